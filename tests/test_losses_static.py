"""The losses without a GPU: every tile that ships was proven by a compile, and launches get a proven one."""

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

from crossmask.kernels.soft_contrastive.triton import configs as contrastive_configs
from crossmask.kernels.soft_cross_entropy.triton import configs as entropy_configs

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks/prove_losses.py"
REMEDY = "python benchmarks/prove_losses.py"


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
launches = sys.modules["losses_launches"]
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


def test_every_op_is_in_the_table_for_every_architecture(rows: list) -> None:
    assert {(row.op, row.arch) for row in rows} == {(op, arch) for op in launches.OPS for arch in prove.PROCESSORS}


def test_the_rules_see_what_is_wrong(rows: list) -> None:
    hopper = [row for row in rows if row.arch == "sm_90" and "UNIT=8" in row.flags.split()]
    good = next(row for row in hopper if "HGMMA" in row.matrix and row.tile.startswith("64x"))
    assert not prove.violations(good)
    for change, reason in (
        ({"spill_bytes": 4}, "spilled"),
        ({"shared_bytes": good.shared_limit + 1}, "shared memory"),
        ({"blocks_per_processor": 0}, "does not fit"),
        ({"matrix": ""}, "no matrix instructions"),
        ({"matrix": "HMMA:8"}, "without HGMMA"),
        ({"wide_loads": 0}, "128-bit"),
    ):
        assert reason in "; ".join(prove.violations(replace(good, **change)))


@pytest.mark.parametrize("arch", prove.PROCESSORS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_every_tile_of_soft_contrastive_that_a_launch_can_get_was_compiled(rows: list, arch: str, dtype: str) -> None:
    """But for a width's blocks, which narrower features shrink. Partial sums are float32 whatever the features are."""
    proven = {
        (row.kernel, *row.tile.split("x")[:2], row.warps, row.stages)
        for row in rows
        if (row.arch, row.op) == (arch, "soft_contrastive") and (row.dtype == dtype or row.kernel == "forward_rows")
    }
    for kernel in ("forward_keys", "forward_rows", "backward_queries", "backward_keys"):
        for queries in (1, 8, 16, 17, 32, 33, 64, 65, 512, 5000):
            for width in (1, 64, 128, 256, 257, 512, 768, 4096):
                tile = contrastive_configs.select(kernel, arch, launches.DTYPES[dtype], queries, width)
                named = (kernel, str(tile.block_n), str(tile.block_k), tile.warps, tile.stages)
                assert named in proven, (kernel, queries, width)


@pytest.mark.parametrize("arch", prove.PROCESSORS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_every_tile_of_soft_cross_entropy_that_a_launch_can_get_was_compiled(rows: list, arch: str, dtype: str) -> None:
    """But for a width's block, which narrower features shrink; with a teacher and without."""
    of_op = [row for row in rows if (row.arch, row.op) == (arch, "soft_cross_entropy")]
    proven = {
        (row.kernel, row.dtype, *row.tile.split("x")[:2], row.warps, row.stages, "teacher" in row.flags.split())
        for row in of_op
    }
    for kernel in ("forward_words", "backward_words"):
        for words in (1, 16, 17, 32, 33, 64, 65, 577, 5000):
            tile = entropy_configs.select(kernel, arch, launches.DTYPES[dtype], words)
            named = (kernel, dtype, str(tile.block_v), str(tile.block_n), tile.warps, tile.stages)
            assert {(*named, True), (*named, False)} <= proven, (kernel, words)
    assert {row.kernel for row in of_op} == {"forward_words", "forward_rows", "backward_words"}


def test_every_flag_and_dtype_was_compiled(rows: list) -> None:
    of_op = [row for row in rows if row.op == "soft_cross_entropy"]
    assert {row.dtype for row in of_op} == {*launches.DTYPES}
    flags = [set(row.flags.split()) for row in of_op if row.kernel == "backward_words"]
    assert any(one >= {"UNIT=1", "bias", "teacher", "teacher_bias", "for_bias"} for one in flags)
    assert any(
        one >= {"UNIT=8", "bias", "teacher", "teacher_bias", "for_bias"} and "even_d" not in one for one in flags
    )
    assert any(one.isdisjoint({"bias", "teacher", "teacher_bias", "for_bias"}) for one in flags)
    of_op = [row for row in rows if row.op == "soft_contrastive"]
    assert {row.dtype for row in of_op} == {*launches.DTYPES}
    flags = [set(row.flags.split()) for row in of_op if row.kernel == "backward_queries"]
    assert any("teacher" not in one for one in flags)
    assert any("UNIT=1" in one and "teacher" in one for one in flags)
    assert any("teacher" in one and not one & {"even_e", "even_w"} for one in flags)


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


def test_a_block_of_the_width_has_an_edge_only_where_nothing_divides_it() -> None:
    for width, wanted in ((256, 64), (768, 64), (96, 32), (72, 32), (16, 16), (255, 16)):
        call = launches._contrast("sm_90", "bfloat16", 64, width, "distilled")
        assert call.launched[0].arguments["BLOCK_E"] == wanted
        assert call.launched[0].arguments["EVEN_E"] == (width not in (72, 255))


def test_contrast_of_the_recorded_calls_has_no_values() -> None:
    call = launches._contrast("sm_80", "float16", 8, 64, "plain")
    assert all(x.device.type == "meta" for one in call.launched for x in one.arguments.values() if torch.is_tensor(x))
