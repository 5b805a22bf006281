"""Whole steps of the benchmark suite beside those of others, and on several ranks: what agrees, what has no time."""

from __future__ import annotations

import gc
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from crossmask.engine.training import caption_step
from crossmask.kernels.linear import api as products

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
import bench_scaling  # noqa: E402
from albef_step import sizes  # noqa: E402
from suite.results import Row  # noqa: E402
from suite.steps import albef, coca, one, scaling, trace, turns  # noqa: E402
from suite.steps.planned import Options  # noqa: E402

sys.path.remove(str(BENCHMARKS))

CPU = Options("cpu", 2, True)


@pytest.fixture(scope="module", autouse=True)
def only_what_is_made_here() -> Iterator[None]:
    """Tensors are looked for among all objects: not among the million that the imports have made, for time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def measured(subject: Any, options: Options = CPU) -> dict[tuple[str, str], Row]:
    return {(row.job.dtype, row.implementation): row for row in subject.measure(options)}


@pytest.fixture
def tiny_coca(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("open_clip")
    vision = {"image_size": 32, "patch_size": 16, "width": 64, "layers": 1, "head_width": 32, "output_tokens": True}
    vision |= {"attentional_pool": True, "attn_pooler_queries": 5, "attn_pooler_heads": 4}
    text = {"context_length": 12, "vocab_size": 1200, "width": 48, "heads": 3}
    config = {"embed_dim": 48, "vision_cfg": vision, "multimodal_cfg": {**text, "layers": 1}, "custom_text": True}
    config["text_cfg"] = {**text, "layers": 1, "embed_cls": True, "output_tokens": True}
    monkeypatch.setattr(coca, "configuration", lambda: config)
    monkeypatch.setattr(coca, "LONGEST", 10)
    monkeypatch.setattr(products, "applies", lambda: True)


@pytest.mark.usefixtures("tiny_coca")
def test_coca_is_the_same_by_both() -> None:
    rows = measured(coca.Coca(), replace(CPU, quick=False))
    assert list(rows) == [
        *(("fp32", name) for name in ("open_clip", "crossmask", turns.PYTORCHS)),
        *(("bf16", name) for name in ("open_clip", "crossmask")),
    ]
    for (dtype, name), row in rows.items():
        assert row.status == "measured", row.reason
        assert len(row.seconds) == 2
        if name == turns.PYTORCHS:
            continue
        assert row.peak_bytes is not None
        assert {"image tower", "text tower", "decoders", "objectives", "optimizer", trace.REST} <= row.parts.keys()
        if name == "crossmask":
            assert row.error is not None
            assert row.tolerance in coca.TOLERANCES[dtype]
    assert "average" not in rows["fp32", "open_clip"].parts


@pytest.mark.usefixtures("tiny_coca")
def test_coca_that_computes_something_else_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coca, "TOLERANCES", {"fp32": coca.TOLERANCES["fp32"]})
    called = caption_step.image_captioning

    def last_word_left_out(model: Any, text: Any, context: Any, ids: Any, mask: Any) -> Any:
        return called(model, text, context, ids, mask & torch.arange(mask.shape[1]).lt(mask.sum(1, True) - 1))

    monkeypatch.setattr(caption_step, "image_captioning", last_word_left_out)
    rows = measured(coca.Coca())
    assert (rows["fp32", "crossmask"].status, rows["fp32", "crossmask"].seconds) == ("wrong", ())
    assert rows["fp32", "open_clip"].status == "measured"


@pytest.mark.usefixtures("tiny_coca")
def test_coca_whose_update_is_another_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which the second step's losses tell."""
    monkeypatch.setattr(coca, "TOLERANCES", {"fp32": coca.TOLERANCES["fp32"]})
    step = coca.OpenClipStep.__call__

    def still(self: coca.OpenClipStep, batch: Any) -> dict[str, float]:
        for group in self.optimizer.param_groups:
            group["lr"] = 0.0
        return step(self, batch)

    monkeypatch.setattr(coca.OpenClipStep, "__call__", still)
    assert measured(coca.Coca())["fp32", "crossmask"].status == "wrong"


def test_coca_without_open_clip_is_skipped(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "open_clip", None)
    rows = one.collect(coca.Coca(), CPU, tmp_path / "rows.json")
    assert {row.status for row in rows} == {"skipped"}
    assert rows[0].reason == "open_clip is not installed: pip install open_clip_torch"


def test_albef_by_both(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = replace(sizes.TINY, image_depth=1, text_depth=1, fusion_depth=1)
    monkeypatch.setattr(albef, "BASE", tiny)
    monkeypatch.setattr(albef, "LONGEST", 10)
    monkeypatch.setattr(products, "applies", lambda: True)
    assert list(albef.ROUNDS["cpu"]) == ["bf16"]
    monkeypatch.setitem(albef.ROUNDS, "cpu", {"fp32": 2, "bf16": 2})  # as GPUs have both
    rows = measured(albef.AlbefBase(), replace(CPU, quick=False))
    assert list(rows) == [
        *(("fp32", name) for name in ("common way", "crossmask", turns.PYTORCHS)),
        *(("bf16", name) for name in ("common way", "crossmask")),
    ]
    for row in rows.values():
        assert row.status == "measured", row.reason
        assert len(row.seconds) == 2
        assert row.samples == tiny.batch
        if row.implementation == turns.PYTORCHS:
            continue
        assert row.ours == row.implementation.startswith("crossmask")
        wanted = {"image tower", "text tower", "fusion", "teacher", "objectives", "optimizer", "average", "queue"}
        assert wanted <= row.parts.keys()
        assert row.parts[trace.REST] < 0.5 * sum(row.parts.values())
    peaks = {name: row.peak_bytes for name, row in rows.items()}
    weights = 4 * sum(p.numel() for p in albef.CommonStep(tiny).model.parameters())
    for name, peak in peaks.items():
        if name[1] == turns.PYTORCHS:
            continue
        assert peak is not None
        assert weights < peak < 20 * weights, name


def test_scaling_has_a_row_for_every_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(asked: Any, ranks: int, stage: int, limit: float) -> dict[str, Any]:
        assert (asked.recipe, asked.batch, asked.precision, asked.device) == ("albef-emoji", 64, "bf16", "cpu")
        if stage == 1:
            raise bench_scaling.RankFailed("rank 0 ended with 1: ValueError: so it is")
        if stage == 2:
            raise bench_scaling.RankFailed("rank 1 ended with -9: ")
        return {"seconds": [0.25 / ranks] * asked.steps, "peak": 1000 + stage}

    monkeypatch.setattr(bench_scaling, "start", start)
    rows = list(scaling.Scaling().measure(CPU))
    assert [row.job.size for row in rows[:5]] == [
        *(f"1 rank, ZeRO {stage}, batch 64" for stage in range(4)),
        "2 ranks, ZeRO 0, batch 64",
    ]
    assert [row.status for row in rows[:4]] == ["measured", "failed", "out of memory", "measured"]
    assert rows[1].reason.endswith("ValueError: so it is")
    assert (rows[7].median, rows[7].peak_bytes, rows[7].samples) == (0.125, 1003, 64)
    assert [replace(each, ours=True) for each in scaling.Scaling().planned(CPU)] == scaling.Scaling().planned(CPU)


def test_ranks_go_up_to_the_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    assert scaling.ranks_on("cpu") == [1, 2]
    for gpus, ranks in {1: [1], 2: [1, 2], 6: [1, 2, 4], 8: [1, 2, 4, 8]}.items():
        monkeypatch.setattr(torch.cuda, "device_count", lambda gpus=gpus: gpus)
        assert scaling.ranks_on("cuda") == ranks


def test_one_rank_that_fails_ends_the_wait_for_the_others(tmp_path: Path) -> None:
    logs = [tmp_path / "0", tmp_path / "1"]
    codes = ["import time; time.sleep(60)", "print('Traceback'); print('ValueError: no'); raise SystemExit(3)"]
    running = []
    for log, code in zip(logs, codes, strict=True):
        with log.open("wb") as out:
            running.append(subprocess.Popen([sys.executable, "-c", code], stdout=out))
    try:
        with pytest.raises(bench_scaling.RankFailed, match="rank 1 ended with 3: ValueError: no"):
            bench_scaling.wait(running, logs, 30.0)
        with pytest.raises(bench_scaling.RankFailed, match="no end within 0 s"):
            bench_scaling.wait(running[:1], logs, 0.2)
    finally:
        for each in running:
            each.kill()
            each.wait()
