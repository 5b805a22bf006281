"""Mask selection without a GPU: every tile that ships was proven by a compile, and launches get a proven one."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from types import ModuleType

import pytest
import torch

from crossmask.kernels.max_similarity.triton import configs as similarity_configs
from crossmask.kernels.topk_mask.triton import configs as selection_configs

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks/prove_selection.py"
REMEDY = "python benchmarks/prove_selection.py"


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
launches = sys.modules["selection_launches"]
PROOF = prove.PROOF


@pytest.fixture(scope="module")
def made_from() -> str:
    assert PROOF.table.exists(), f"{PROOF.table} is missing: run {REMEDY}"
    return PROOF.read()[0]


@pytest.fixture(scope="module")
def rows(made_from: str) -> list:
    return PROOF.read()[1]


def test_the_table_is_of_these_sources(made_from: str) -> None:
    assert PROOF.fingerprint() == made_from, f"benchmarks/static/{PROOF.table.name} is stale: run {REMEDY}"


def test_the_summary_is_of_the_table(rows: list) -> None:
    summary = PROOF.table.with_suffix(".md")
    assert summary.read_text() == prove.summary(rows), f"benchmarks/static/{summary.name} is stale: run {REMEDY}"


def test_every_compile_keeps_the_rules(rows: list) -> None:
    assert not [(prove.line(row), why) for row in rows if (why := prove.violations(row))]


def test_the_rules_see_what_is_wrong(rows: list) -> None:
    hopper = [row for row in rows if row.arch == "sm_90" and "UNIT=8" in row.flags.split()]
    product = next(row for row in hopper if row.kernel == "forward" and "HGMMA" in row.matrix)
    row = next(row for row in rows if row.op == "topk_mask" and row.variant == "plain")
    assert not prove.violations(product)
    assert not prove.violations(row)
    for good, change, reason in (
        (row, {"spill_bytes": 4}, "spilled"),
        (row, {"shared_bytes": row.shared_limit + 1}, "shared memory"),
        (row, {"blocks_per_processor": 0}, "does not fit"),
        (row, {"wide_loads": 0}, "128-bit"),
        (product, {"matrix": ""}, "no matrix instructions"),
        (product, {"matrix": "HMMA:8"}, "without HGMMA"),
        (product, {"wide_loads": 0}, "128-bit"),
    ):
        assert reason in "; ".join(prove.violations(replace(good, **change)))


def _of(rows: list, arch: str, op: str) -> set[tuple]:
    """Kernel, whether float32, tile, warps and stages, and of topk_mask whether staged, of all that was compiled."""
    return {
        (row.kernel, row.dtype, row.tile, row.warps, row.stages, "staged" in row.flags.split())
        for row in rows
        if (row.arch, row.op) == (arch, op)
    }


@pytest.mark.parametrize("arch", prove.PROCESSORS)
def test_every_row_gets_a_proven_block(rows: list, arch: str) -> None:
    """Whatever its length, with noise and without. sm_89 is sm_86 but for 8-bit floats, and noise is proven there."""
    proven = _of(rows, arch, "topk_mask") | (_of(rows, "sm_86", "topk_mask") if arch == "sm_89" else set())
    edges = [block + more for block in selection_configs.blocks()[:-1] for more in (-1, 0, 1)]
    for positions in [*edges, *range(1, 600), *range(600, selection_configs.LONGEST, 97), selection_configs.LONGEST]:
        for noise in (False, True):
            tile = selection_configs.select(arch, positions, noise)
            assert positions <= tile.block in selection_configs.blocks()
            assert tile.block < 2 * max(positions, selection_configs.SHORTEST)
            named = ("topk_mask", "float32", launches.label(tile), tile.warps, tile.stages, tile.staged)
            assert named in proven, (positions, noise)


@pytest.mark.parametrize("arch", prove.PROCESSORS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_every_tile_of_max_similarity_that_a_launch_can_get_was_compiled(rows: list, arch: str, dtype: str) -> None:
    proven = _of(rows, arch, "max_similarity")
    for kernel in ("forward", "backward_image", "backward_text"):
        for words in range(1, 513):
            tile = similarity_configs.select(kernel, arch, launches.DTYPES[dtype], words)
            named = (kernel, dtype, launches.label(tile), tile.warps, tile.stages, False)
            assert named in proven, (kernel, words)


def test_every_flag_and_dtype_was_compiled(rows: list) -> None:
    """For some architecture and block; together, because they ask for more registers together."""
    seen = {(row.op, row.dtype) for row in rows}
    assert seen >= {("topk_mask", dtype) for dtype in launches.DTYPES}
    assert seen >= {("max_similarity", dtype) for dtype in launches.DTYPES if dtype != "float64"}
    for arch in set(prove.PROCESSORS) - {"sm_89"}:
        flags = [set(row.flags.split()) for row in rows if (row.arch, row.op) == (arch, "topk_mask")]
        assert any(one >= {"valid", "per_row", "noise", "staged", "indices"} for one in flags)
        assert any(one >= {"valid", "per_row", "noise", "indices"} and "staged" not in one for one in flags)
        assert any(one.isdisjoint({"valid", "per_row", "noise", "indices"}) for one in flags)


@pytest.mark.slow
def test_a_sample_compiles_to_the_same_figures(rows: list, made_from: str) -> None:
    """Nothing but the compiler can have written the table: one compile an architecture, others whenever it changes."""
    draw = random.Random(made_from)
    sample = [
        draw.choice([row for row in rows if row.arch == arch and row.code_bytes < 32768]) for arch in prove.PROCESSORS
    ]
    ran = subprocess.run(
        [sys.executable, SCRIPT, "--processes", "1", "--again", *(row.job for row in sample)],
        capture_output=True,
        text=True,
        env={**os.environ, "TRITON_INTERPRET": "1"},  # which it has to put aside
    )
    assert ran.returncode == 0, ran.stderr
    assert {row["job"]: row for row in json.loads(ran.stdout)} == {row.job: asdict(row) for row in sample}


# ---- which block


def test_a_row_is_shared_by_as_many_threads_as_keep_it_in_registers() -> None:
    for lanes, arch in ((32, "sm_90"), (64, "gfx942")):
        for block in selection_configs.blocks():
            tile = selection_configs.select(arch, block, False)
            threads = tile.warps * lanes
            assert threads <= 512
            assert block <= threads * 32
            assert tile.block % tile.chunk == 0
            assert threads <= tile.chunk or tile.chunk == tile.block


def test_rows_are_wide_only_where_everything_is_a_multiple_of_16_bytes() -> None:
    for dtype, elements in ((torch.float64, 2), (torch.float32, 4), (torch.bfloat16, 8)):
        base = torch.empty(3, 2, 64, dtype=dtype)
        assert selection_configs.units(64, base) == elements
        assert selection_configs.units(63, base[:, :, :63]) == 1
        assert selection_configs.units(32, torch.empty(3, 2, 33, dtype=dtype)[:, :, :32]) == 1
