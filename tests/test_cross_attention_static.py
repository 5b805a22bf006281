"""Cross-attention without a GPU: every tile that ships was proven by a compile, and launches pick the right one."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import random
import subprocess
import sys
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch

from crossmask.kernels import launch
from crossmask.kernels.cross_attention.triton import configs, tune, tuned
from crossmask.kernels.cross_attention.triton.configs import Config

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks/prove_attention.py"
LINKED_WIDTHS = (64, 128)
REMEDY = "python benchmarks/prove_attention.py"
GPU = "Quiet GPU 9000"


def _load() -> ModuleType:
    sys.path.insert(0, str(SCRIPT.parent))
    try:
        spec = importlib.util.spec_from_file_location(SCRIPT.stem, SCRIPT)
        assert spec is not None
        assert spec.loader is not None
        sys.modules[SCRIPT.stem] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    finally:
        sys.path.remove(str(SCRIPT.parent))


prove = _load()


@pytest.fixture(scope="module")
def made_from() -> str:
    assert prove.TABLE.exists(), f"{prove.TABLE} is missing: run {REMEDY}"
    return prove.read()[0]


@pytest.fixture(scope="module")
def rows(made_from: str) -> list:
    return prove.read()[1]


def test_the_table_is_of_these_sources(made_from: str) -> None:
    assert prove.fingerprint() == made_from, f"benchmarks/static/{prove.TABLE.name} is stale: run {REMEDY}"


def test_the_summary_is_of_the_table(rows: list) -> None:
    assert prove.SUMMARY.read_text() == prove.summary(rows), (
        f"benchmarks/static/{prove.SUMMARY.name} is stale: {REMEDY}"
    )


def test_every_compile_keeps_the_rules(rows: list) -> None:
    assert not [(row, why) for row in rows if (why := prove.violations(row))]


def test_the_rules_see_what_is_wrong(rows: list) -> None:
    good = next(row for row in rows if row.arch == "sm_90" and "HGMMA" in row.matrix)
    assert not prove.violations(good)
    for change, reason in (
        ({"spill_bytes": 4}, "spilled"),
        ({"shared_bytes": good.shared_limit + 1}, "shared memory"),
        ({"matrix": ""}, "no matrix instructions"),
        ({"matrix": "HMMA:8"}, "without HGMMA"),
        ({"wide_loads": 0}, "128-bit"),
        ({"tensor_memory": 513}, "tensor memory"),
        ({"blocks_per_processor": 0}, "does not fit"),
    ):
        assert reason in "; ".join(prove.violations(replace(good, **change)))


def test_every_tile_that_a_launch_can_get_was_compiled(rows: list) -> None:
    """With all statistics, masks and dropout; in half precision also with nothing but the output; with links at the
    widths they are compiled for."""
    compiled = defaultdict(set)
    for row in rows:
        compiled[row.kernel, row.arch, row.width, row.dtype, row.variant].add(row.tile)
    missing = []
    for kernel, arch, width in itertools.product(configs.KERNELS, prove.PROCESSORS, prove.WIDTHS):
        wanted = [("bfloat16", "dropout"), ("float32", "dropout")]
        # three are launched for a statistic alone, and sm_89 is sm_86 but for 8-bit floats
        if kernel not in ("column_lse", "key_statistics", "backward_columns") and arch != "sm_89":
            wanted.append(("bfloat16", "plain"))
        if width in LINKED_WIDTHS:
            wanted += [("bfloat16", "links"), ("float32", "links")]
        for dtype, variant in wanted:
            tiles = set(configs.tiles(kernel, arch, width, prove.DTYPES[dtype], variant == "links"))
            if absent := tiles - compiled[kernel, arch, width, dtype, variant]:
                missing.append((kernel, arch, width, dtype, variant, absent))
    assert not missing


@pytest.mark.slow
def test_a_sample_compiles_to_the_same_figures(rows: list, made_from: str) -> None:
    """Nothing but the compiler can have written the table: one compile an architecture, others whenever it changes."""
    draw = random.Random(made_from)
    sample = [
        draw.choice([row for row in rows if row.arch == arch and row.code_bytes < 65536]) for arch in prove.PROCESSORS
    ]
    ran = subprocess.run(
        [sys.executable, SCRIPT, "--processes", "1", "--again", *(row.job for row in sample)],
        capture_output=True,
        text=True,
        env={**os.environ, "TRITON_INTERPRET": "1"},  # which it has to put aside
    )
    assert ran.returncode == 0, ran.stderr
    assert {row["job"]: row for row in json.loads(ran.stdout)} == {
        row.job: prove.dataclasses.asdict(row) for row in sample
    }


# ---- which tile


def _select(
    kernel: str, queries: int, keys: int, arch: str = "sm_80", width: int = 64, dtype: torch.dtype = torch.bfloat16
):
    return configs.select(kernel, arch, width, dtype, queries, keys)


@pytest.mark.parametrize("arch", configs.FAMILIES)
@pytest.mark.parametrize("width", [16, 32, 64, 128, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_launch_always_gets_a_tile(arch: str, width: int, dtype: torch.dtype) -> None:
    for kernel, queries, keys in itertools.product(configs.KERNELS, (1, 30, 577), (1, 30, 77, 257, 8192)):
        tile = _select(kernel, queries, keys, arch, width, dtype)
        if kernel == "forward_single":
            assert tile is None or tile.block_p >= keys
        elif kernel == "backward_fused":
            assert tile is None or tile.block_s >= queries
            assert tile is not None or queries > 32 or width > 128
        else:
            assert tile is not None


def test_a_short_axis_gets_a_small_block_and_a_long_one_the_largest() -> None:
    tiles = configs.tiles("forward_online", "sm_80", 64, torch.bfloat16)
    assert _select("forward_online", 30, 577).block_s == min(tile.block_s for tile in tiles if tile.block_s >= 30)
    assert _select("forward_online", 8192, 577).block_s == max(tile.block_s for tile in tiles)
    assert _select("forward_single", 30, 30).block_p == 32
    assert _select("forward_single", 30, 8192) is None
    assert _select("backward_fused", 8192, 30) is None


@pytest.mark.parametrize(
    ("capability", "arch"),
    [(75, "any"), (80, "sm_80"), (87, "sm_86"), (89, "sm_89"), (90, "sm_90"), (103, "sm_100"), (121, "sm_120")],
)
def test_an_unknown_nvidia_gpu_takes_the_tiles_of_the_nearest_older_one(capability: int, arch: str) -> None:
    assert configs._nearest_nvidia(capability) == arch


@pytest.mark.parametrize(
    ("name", "arch"),
    [("gfx942:sramecc+:xnack-", "gfx942"), ("gfx950", "gfx942"), ("gfx90a", "any"), ("gfx1201", "any")],
)
def test_an_unknown_amd_gpu_takes_small_tiles(name: str, arch: str) -> None:
    assert configs._nearest_amd(name) == arch


def test_the_driver_is_asked_once_for_a_device(monkeypatch: pytest.MonkeyPatch, fresh: None) -> None:
    asked = []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: asked.append(device) or (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: GPU)
    assert configs.architecture(torch.device("cpu")) == "sm_80"
    assert not asked
    assert [configs.architecture(torch.device("cuda", 3)) for _ in range(3)] == ["sm_90"] * 3
    assert asked == [torch.device("cuda", 3)]


# ---- which kernels


def _launched(
    queries: int, keys: int, arch: str = "sm_80", width: int = 64, dtype: torch.dtype = torch.bfloat16
) -> list[str]:
    """Names of the kernels that a call with all statistics starts."""
    recorded = prove.launches(arch, width, dtype, queries, keys, "dropout")
    return [one.kernel.__name__ for one in recorded]


def test_short_axes_take_one_kernel_each_way() -> None:
    assert _launched(30, 30) == ["forward_single", "backward_rows", "backward_fused"]


def test_long_axes_take_the_split_kernels() -> None:
    assert _launched(4096, 4096) == [
        "column_lse",
        "forward_online",
        "key_statistics",
        "backward_rows",
        "backward_columns",
        "backward_queries",
        "backward_keys",
    ]


# ---- tuning


@pytest.fixture
def fresh() -> None:
    configs._asked.cache_clear()
    tuned.table.cache_clear()
    yield
    configs._asked.cache_clear()
    tuned.table.cache_clear()


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh: None) -> Path:
    path = tmp_path / "deep/attention.json"
    monkeypatch.setenv("CROSSMASK_ATTENTION_CONFIGS", str(path))
    return path


def _tuned(favourite: Config, queries: int = 30, keys: int = 257) -> list[dict]:
    """Tunes with a clock that likes ``favourite`` best and the shipped tiles second, and starts nothing."""

    def clock(run) -> float:
        with launch.recording() as recorded:
            run()
        return 2.0 - sum(one.config == favourite for one in recorded) / 8

    with launch.recording(), configs.assuming("sm_90"):
        call = tune.Call(queries, keys, 64, torch.bfloat16, 2, 3, torch.device("meta"))
        return list(tune.tune(call, clock, say=lambda line: None))


def test_tuning_finds_the_tile_that_is_fastest() -> None:
    favourite = Config(128, 16, 4, 2, True)
    found = {entry["kernel"]: entry for entry in _tuned(favourite, 4096, 4096)}
    assert {"forward_online", "column_lse", "key_statistics", "backward_keys", "backward_queries"} <= set(found)
    assert "backward_fused" not in found or found["backward_fused"]["tile"] is None
    tile = prove.dataclasses.asdict(favourite)
    assert found["forward_online"]["tile"] == found["backward_keys"]["tile"] == tile
    assert (found["forward_online"]["queries"], found["forward_online"]["keys"]) == (4096, 4096)


def test_launches_take_the_tuned_tile_of_their_gpu_alone(table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    favourite = Config(32, 16, 8, 3)
    entries = _tuned(Config(32, 16))
    entries[0]["tile"] = prove.dataclasses.asdict(favourite)
    assert entries[0]["kernel"] == "forward_online"
    tune.write(table, GPU, entries)
    name = [GPU]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name[0])
    here = configs.architecture(torch.device("cuda", 0))
    assert here == f"sm_90/{GPU}"
    name[0] = "Another GPU"
    assert configs.architecture(torch.device("cuda", 1)) == "sm_90"

    assert _select("forward_online", 30, 257, here) == favourite
    assert _select("forward_online", 17, 512, here) == favourite  # the same powers of two
    shipped = _select("forward_online", 30, 513, "sm_90")
    assert _select("forward_online", 30, 513, here) == shipped
    assert _select("forward_online", 30, 257, here, dtype=torch.float32).warps != 8
    with configs.assuming(forced={"forward_online": shipped}):
        assert _select("forward_online", 30, 257, here) == shipped


def test_writing_keeps_other_gpus_and_leaves_no_partial_file(table: Path) -> None:
    entries = _tuned(Config(32, 16))
    tune.write(table, GPU, entries)
    tune.write(table, "Another GPU", entries[:1])
    tune.write(table, GPU, entries[:2])
    assert {gpu: len(found) for gpu, found in tuned.read(table).items()} == {GPU: 2, "Another GPU": 1}
    assert list(table.parent.iterdir()) == [table]


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"version": 2, "gpus": {}}', '{"version": 1, "gpus": []}', '{"version": 1, "gpus": {"a": [{}]}}']
    + [
        json.dumps({"version": 1, "gpus": {GPU: [{"kernel": "forward_online", "dtype": "half", "width": 64, **rest}]}})
        for rest in (
            {"queries": 32, "keys": 512, "tile": {"block_s": 33, "block_p": 32}},
            {"queries": 32, "keys": 512, "tile": {"block_s": "32", "block_p": 32}},
            {"queries": 32, "keys": 512, "tile": {"block_q": 32}},
            {"queries": 32, "keys": 512, "tile": 7},
            {"queries": 32, "tile": None},
        )
    ],
)
def test_a_malformed_table_is_one_error_with_its_remedy(
    table: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    table.parent.mkdir()
    table.write_text(text)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: GPU)
    with pytest.raises(ValueError, match="remove it, or write it again") as error:
        configs.architecture(torch.device("cuda", 0))
    assert str(table) in str(error.value)


def test_a_table_that_is_asked_for_has_to_be_there(table: Path) -> None:
    path = tuned.path()
    assert path == table
    with pytest.raises(ValueError, match="No such file"):
        tuned.table(path, GPU)


def test_an_empty_variable_switches_the_table_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CROSSMASK_ATTENTION_CONFIGS", "")
    assert tuned.path() is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to tune on")
def test_without_a_gpu_tuning_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert tune.main([]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert len(said.err.splitlines()) == 1
    assert "GPU" in said.err
