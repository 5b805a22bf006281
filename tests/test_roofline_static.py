"""The proof sheet: predictions, the moving average's kernel, and that no compile gets worse unseen."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = ROOT / "benchmarks"


def _load(name: str) -> ModuleType:
    sys.path.insert(0, str(BENCHMARKS))
    try:
        spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    finally:
        sys.path.remove(str(BENCHMARKS))


roofline = _load("prove_roofline")
ema = _load("prove_ema")
selection = _load("prove_selection")
comparison = sys.modules["worse"]


# ---- predictions


@pytest.fixture(scope="module")
def predictions() -> list:
    return roofline.rows()


def test_the_predictions_are_those_of_the_formulas(predictions: list) -> None:
    remedy = "run python benchmarks/prove_roofline.py"
    assert roofline.TABLE.read_text() == roofline.text(predictions), (
        f"benchmarks/static/roofline.csv is stale: {remedy}"
    )
    assert roofline.TABLE.with_suffix(".md").read_text() == roofline.summary(predictions), remedy
    assert roofline.PICTURE.stat().st_size > 10_000, remedy


def test_every_shape_has_a_prediction_for_every_gpu_and_says_that_it_is_one(predictions: list) -> None:
    seen = {(row.op, row.shape, row.statistics, row.gpu) for row in predictions}
    assert len(seen) == len(predictions)
    for gpu in roofline.DEVICES:
        for shape in roofline.SHAPES:
            for way in ("forward", "backward"):
                assert {(f"cross_attention {way}", shape, which, gpu) for which in ("", "all")} <= seen
    assert "measured by nobody" in roofline.text(predictions)
    assert "nobody measured" in " ".join(roofline.summary(predictions).split())
    assert {name for name in dataclasses.asdict(predictions[0]) if name.endswith("_us")} == {
        "predicted_at_least_us",
        "predicted_launch_by_launch_us",
    }


def test_predictions_keep_their_order(predictions: list) -> None:
    for row in predictions:
        assert 0 < row.predicted_at_least_us <= row.predicted_launch_by_launch_us, row
        assert row.issued_flops >= row.matrix_flops or row.op == "ema_update" or "backward" in row.op, row
        assert row.requested_bytes >= row.read_bytes, row
        gpu = roofline.DEVICES[row.gpu]  # what is an estimate decides for none
        assert 1e6 * row.vector_flops / gpu.vector < row.predicted_at_least_us, row
        if row.statistics:
            assert float(row.statistics_add_percent) > 0, row


# ---- the moving average's CUDA kernel


@pytest.fixture(scope="module")
def averages() -> list:
    made_from, rows = ema.PROOF.read()
    remedy = "run python benchmarks/prove_ema.py, where there is an nvcc"
    assert ema.PROOF.fingerprint() == made_from, f"benchmarks/static/ema.csv is stale: {remedy}"
    assert ema.PROOF.table.with_suffix(".md").read_text() == ema.summary(rows), remedy
    return rows


def test_the_moving_average_keeps_the_rules_on_every_architecture(averages: list) -> None:
    assert not [(ema.line(row), why) for row in averages if (why := ema.violations(row))]
    places = {(row.arch, row.tensors, row.rounding) for row in averages}
    assert places == {(arch, n, how) for arch in ema.ARCHITECTURES for n in (98, 798) for how in ema.BLOCKS}


def test_its_rules_see_what_is_wrong(averages: list) -> None:
    for change, reason in (
        ({"spill_bytes": 8}, "spilled"),
        ({"blocks_per_processor": 3}, "3 blocks a multiprocessor"),
        ({"wide_loads": 3}, "3 128-bit loads"),
        ({"wide_stores": 2}, "2 128-bit stores"),
    ):
        assert reason in "; ".join(ema.violations(dataclasses.replace(averages[0], **change)))


@pytest.mark.slow
def test_one_architecture_compiles_to_the_same_figures(averages: list) -> None:
    compiler = ema.nvcc()
    if compiler is None:
        pytest.skip("no nvcc was found (install the CUDA toolkit)")
    found = sorted(ema.compiled(compiler, "sm_90"), key=ema.order)
    committed = [row for row in averages if row.arch == "sm_90"]
    if found[0].source != committed[0].source:
        pytest.skip("another nvcc than the table's")
    assert found == committed


def test_without_a_compiler_the_table_stays_as_it_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    before = ema.PROOF.table.read_bytes()
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["prove_ema.py"])
    assert ema.main() == 0
    assert "no nvcc was found" in capsys.readouterr().out
    assert ema.PROOF.table.read_bytes() == before


# ---- nothing gets worse unseen


@pytest.fixture(scope="module")
def compiles() -> list:
    return selection.PROOF.read()[1]


def _product(rows: list) -> int:
    """Which row multiplies by Hopper's instructions, and is the only one of its kind."""
    return next(i for i, row in enumerate(rows) if row.arch == "sm_90" and row.kernel == "forward" and row.matrix)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("registers", lambda row: row.registers + 1),
        ("spill_bytes", lambda row: 4),
        ("shared_bytes", lambda row: row.shared_bytes + 128),
        ("blocks_per_processor", lambda row: row.blocks_per_processor - 1),
        ("wide_loads", lambda row: row.wide_loads - 1),
        ("matrix", lambda row: "HMMA:64"),
        ("code_bytes", lambda row: row.code_bytes * 2),
    ],
)
def test_a_worse_figure_is_told_by_name(compiles: list, name: str, change: Callable) -> None:
    place = _product(compiles)
    row = compiles[place]
    doctored = [*compiles]
    doctored[place] = dataclasses.replace(row, **{name: change(row)}, job="another", source="another")
    (told,) = comparison.worse(compiles, doctored, selection.line)
    assert told.startswith(selection.line(row))
    assert ("HGMMA → HMMA" if name == "matrix" else f"{name} {getattr(row, name)} → {change(row)}") in told


def test_what_is_better_new_or_gone_is_not_worse(compiles: list) -> None:
    place = _product(compiles)
    better = [*compiles]
    better[place] = dataclasses.replace(compiles[place], registers=1, wide_loads=99, blocks_per_processor=99)
    assert comparison.worse(compiles, compiles, selection.line) == []
    assert comparison.worse(compiles, better, selection.line) == []
    assert comparison.worse(compiles[1:], compiles, selection.line) == []
    assert comparison.worse(compiles, compiles[1:], selection.line) == []
    assert comparison.worse([], compiles, selection.line) == []


def test_of_rows_that_are_alike_the_worst_count(compiles: list) -> None:
    row = compiles[0]
    light, heavy = (dataclasses.replace(row, registers=n, job=str(n)) for n in (40, 80))
    assert comparison.worse([light, heavy], [heavy, light], selection.line) == []
    assert comparison.worse([light, heavy], [dataclasses.replace(light, registers=81)], selection.line)


@pytest.mark.parametrize(
    "flags", [{}, {"check": True}, {"accept_worse": True}], ids=lambda flags: "".join(flags) or "none"
)
def test_a_worse_sheet_is_written_only_where_that_was_accepted(
    compiles: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, flags: dict
) -> None:
    table = tmp_path / "selection.csv"
    shutil.copy(selection.PROOF.table, table)
    monkeypatch.setattr(type(selection.PROOF), "table", property(lambda self: table))
    monkeypatch.setattr(type(selection.PROOF), "fingerprint", lambda self: "0")
    place = _product(compiles)
    doctored = [*compiles]
    doctored[place] = dataclasses.replace(compiles[place], registers=200)
    monkeypatch.setattr(type(selection.PROOF), "compiled", lambda self, *_: iter(doctored))
    options = argparse.Namespace(**{"check": False, "accept_worse": False, "fresh": False, "processes": 1} | flags)
    before = table.read_bytes()
    code = selection.PROOF.prove([], True, options)
    told = capsys.readouterr()
    assert f"worse than selection.csv has it: {selection.line(compiles[place])}: registers" in told.out
    if "accept_worse" in flags:
        assert (code, selection.PROOF.read()[1][place].registers) == (0, 200)
    else:
        assert (code, table.read_bytes()) == (1, before)
        assert "--accept-worse" in told.err
    doctored[place] = compiles[place]
    assert selection.PROOF.prove([], True, argparse.Namespace(**{**vars(options), "check": True})) == 0
