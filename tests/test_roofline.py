"""The arithmetic of rooflines: against numbers worked out by hand, and what the kernels really load and store."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from crossmask.kernels.roofline import (
    DEVICES,
    Work,
    adamw,
    cross_attention_backward,
    cross_attention_forward,
    device,
    ema_update,
    layer_norm_backward,
    linear,
    linear_backward,
    max_similarity,
    soft_contrastive,
    soft_cross_entropy,
    topk_mask,
)
from crossmask.kernels.roofline.attention import ALL, forward_op
from crossmask.kernels.roofline.attention_backward import backward_op
from crossmask.kernels.roofline.launches import Launch, Op, once
from crossmask.kernels.roofline.selection import topk_op

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


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


# ---- against the kernels


@pytest.fixture(scope="module")
def lines() -> list[dict[str, Any]]:
    """A line for every launch of every case, in a process where Triton interprets, whatever this machine has."""
    ran = subprocess.run(
        [sys.executable, BENCHMARKS / "traffic.py", "--json"],
        capture_output=True,
        text=True,
        env={**os.environ, "TRITON_INTERPRET": "1"},
    )
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout)


def test_every_launch_loads_stores_and_multiplies_what_the_formulas_say(lines: list[dict[str, Any]]) -> None:
    assert not [(line["case"], line["kernel"], line["wrong"]) for line in lines if line["wrong"]]


def test_every_shipped_kernel_was_counted(lines: list[dict[str, Any]]) -> None:
    seen = {(line["case"].split()[0], line["kernel"]) for line in lines}
    kernels = {
        "cross_attention": "forward_single forward_online column_lse key_statistics backward_rows backward_columns "
        "backward_fused backward_queries backward_keys",
        "topk_mask": "topk_mask",
        "max_similarity": "forward backward_image backward_text",
        "soft_contrastive": "forward_keys forward_rows backward_queries backward_keys",
        "soft_cross_entropy": "forward_words forward_rows backward_words",
    }
    assert seen == {(op, kernel) for op, names in kernels.items() for kernel in names.split()}


def test_the_shapes_of_every_op_are_odd_and_read_tiles_again(lines: list[dict[str, Any]]) -> None:
    """A case that reads nothing twice would not tell bytes requested from unique ones."""
    for op in {line["case"].split()[0] for line in lines}:
        own = [line for line in lines if line["case"].startswith(op)]
        assert any(line["requested"] > line["read"] for line in own), op
    attention = {line["case"].split()[2] for line in lines if line["case"].startswith("cross_attention")}
    assert attention >= {"30x77", "17x33", "1x197"}


@pytest.fixture
def traffic() -> ModuleType:
    if torch.cuda.is_available():
        pytest.skip("kernels of this process are compiled, not interpreted")
    return _load("traffic")


def test_the_count_sees_a_formula_that_is_wrong(traffic: ModuleType) -> None:
    case = traffic.attention_case(1, 1, 40, 20, 16, "fp16", ("entropy",), "sm_80", False)
    (launch,) = case.op.launches
    assert traffic.compared(case)[0]["wrong"] == []
    for change, reason in (
        ({"reads": {**launch.reads, "K": once(launch.reads["K"].unique + 2)}}, "K: 640 bytes read, expected 642"),
        ({"reads": {**launch.reads, "V": launch.reads["V"]._replace(requested=7)}}, "bytes requested, expected 7"),
        ({"reads": {name: read for name, read in launch.reads.items() if name != "Q"}}, "bytes read, expected 0"),
        ({"writes": {**launch.writes, "Entropy": 8}}, "Entropy: 160 bytes written, expected 8"),
        ({"issued": launch.issued - 2}, "FLOPs, expected"),
        ({"kernel": "forward_online"}, "launches ['forward_single'], expected ['forward_online']"),
    ):
        doctored = dataclasses.replace(case.op, launches=[dataclasses.replace(launch, **change)])
        assert reason in "; ".join(traffic.compared(dataclasses.replace(case, op=doctored))[0]["wrong"])


# ---- by hand


def test_a_plain_attention_reads_q_k_v_and_writes_the_output_and_its_lse() -> None:
    work = cross_attention_forward(2, 3, 30, 77, 64, "bf16")
    assert work.read == 2 * 6 * 64 * (30 + 77 + 77)
    assert work.written == 2 * 6 * 64 * 30 + 4 * 6 * 30
    assert work.flops == {"bf16": 4 * 6 * 30 * 77 * 64}
    assert work.kept == 0


def test_statistics_add_what_they_write_and_a_second_sweep_where_keys_do_not_fit_a_tile() -> None:
    plain, all_of_them = (cross_attention_forward(1, 1, 30, 600, 64, "bf16", which) for which in (False, True))
    assert all_of_them.flops["bf16"] == 1.5 * plain.flops["bf16"]
    # max_probability, entropy, query sums; key sums and maxima of the one block, column_lse; what PyTorch makes of them
    kernel = 4 * (3 * 30 + 3 * 600)
    after = 4 * (2 * 600 + 2 * 30 + 600)
    assert all_of_them.written - plain.written == kernel + after
    single = cross_attention_forward(1, 1, 30, 77, 64, "bf16", True)
    assert single.flops == {"bf16": 4 * 30 * 77 * 64}
    with pytest.raises(ValueError, match="unknown statistics"):
        cross_attention_forward(1, 1, 30, 77, 64, "bf16", ["entropie"])


def test_many_blocks_of_queries_leave_key_statistics_to_a_kernel_of_their_own() -> None:
    def kernels(queries: int) -> list[str]:
        op = forward_op(1, 1, queries, 600, 64, "bf16", ("key_attention",), "sm_90")
        return [launch.kernel for launch in op.launches if "." not in launch.kernel]

    assert kernels(2048) == ["forward_online"]
    assert kernels(2049) == ["forward_online", "key_statistics"]


def test_a_backward_has_five_products_or_seven() -> None:
    product = 2 * 6 * 77 * 64
    fused = cross_attention_backward(2, 3, 30, 77, 64, "bf16")
    assert fused.flops == {"bf16": 5 * 30 * product}
    assert cross_attention_backward(2, 3, 577, 77, 64, "bf16").flops == {"bf16": 7 * 577 * product}
    # of six heads many programs share one: as many float32 parts of dq as there are
    parts = backward_op(2, 3, 30, 600, 64, "bf16", (), "sm_90", 132)
    alone = backward_op(2, 3, 30, 600, 64, "bf16", (), "sm_90", 3)
    assert [launch.kernel for launch in alone.launches] == ["backward_rows", "backward_fused"]
    assert parts.launches[1].writes["GradQ"] == 10 * 4 * 6 * 30 * 64
    assert parts.launches[-1].kernel == "torch.copy_"
    assert parts.work().written - parts.work().kept < alone.work().written


def test_what_a_later_launch_reads_again_a_cache_can_keep() -> None:
    """O and dO by two launches, ρ between them: dO and ρ are kept, and of ρ the write, too."""
    launches = [
        Launch("rows", {"O": once(100), "dO": once(100)}, {"Rho": 4}),
        Launch("fused", {"dO": once(100), "Rho": once(4)}, {"GradQ": 60}),
    ]
    work = Op("bf16", launches, frozenset({"GradQ"})).work()
    assert (work.read, work.written, work.kept) == (304, 64, 108)
    assert work.bytes - work.kept == 100 + 100 + 60


def test_a_staged_selection_reads_its_keys_from_the_caches() -> None:
    plain, staged = topk_op(3, 1000, width=10).launches[0], topk_op(3, 9000).launches[0]
    assert plain.reads == {"Scores": once(12000), "Mask": (0, 3000)}
    assert plain.writes == {"Mask": 3000, "Count": 24, "Nan": 24, "Indices": 240}
    assert staged.writes["Keys"] == 3 * 16384 * 4
    assert staged.reads["Keys"].unique == 0
    assert topk_mask(3, 9000).read == 3 * 9000 * 4


def test_losses_write_no_logits() -> None:
    contrast = soft_contrastive(64, 64, 65536, 256, "bf16", "fp32")
    assert contrast.flops == {"bf16": 2 * 2 * 64 * 65600 * 256}
    assert contrast.written < 4 * 64 * 65600 / 10
    assert contrast.read >= 2 * 64 * 256 * 3 + 4 * 65536 * 256
    words = soft_cross_entropy(288, 30522, 768, "bf16")
    assert words.flops == {"bf16": 2 * 288 * 30522 * 768}
    assert words.written < 2 * 288 * 30522 / 10
    assert soft_cross_entropy(288, 30522, 768, "bf16", backward=True).flops == {"bf16": 6 * 288 * 30522 * 768}
    both = soft_contrastive(64, 64, 0, 256, "bf16", teacher=False, backward=True)
    assert both.flops == {"bf16": 2 * 2 * 2 * 64 * 64 * 256}
    assert max_similarity(2, 30, 7, 16, "fp32").flops == {"fp32": 2 * 2 * 30 * 7 * 16}


def test_the_rest_of_a_step() -> None:
    work = linear(10, 20, 30, "bf16")
    assert (work.flops, work.read, work.written) == ({"bf16": 12000.0}, 2 * (200 + 600 + 30), 600)
    back = linear_backward(10, 20, 30, "bf16", bias=False)
    assert back.flops == {"bf16": 24000.0}
    assert (back.read, back.written) == (2 * (300 + 600 + 300 + 200), 2 * (200 + 600))
    assert linear_backward(10, 20, 30, "bf16", bias=False, for_input=False).flops == {"bf16": 12000.0}
    assert (adamw(100).read, adamw(100).written) == (1600, 1400)
    average = ema_update(100, "fp32", "bf16", "bf16")
    assert (average.read, average.written) == (600, 600)
    assert layer_norm_backward(3, 8, "fp32").kept == 4 * 2 * 24 + 24


# ---- work and devices


def test_works_add_and_multiply() -> None:
    work = Work({"bf16": 2.0}, 3.0, 5.0, 7.0, 1.0, 11.0) + Work({"bf16": 1.0, "fp32": 4.0})
    assert work == Work({"bf16": 3.0, "fp32": 4.0}, 3.0, 5.0, 7.0, 1.0, 11.0)
    assert work * 2 == 2 * work == work + work
    assert work.bytes == 12
    assert work.intensity == 10 / 12
    assert Work().intensity == 0


def test_the_roofline_is_the_slower_of_arithmetic_and_memory() -> None:
    gpu = device("h100")
    memory = Work({"bf16": 1e6}, 0.0, 3.35e9)
    assert memory.seconds(gpu) == pytest.approx(1e-3)
    assert memory.bound(gpu) == "memory"
    arithmetic = Work({"bf16": 989.4e9}, 66.9e9, 3.35e8)
    assert arithmetic.seconds(gpu) == pytest.approx(2e-3)
    assert arithmetic.lower_bound(gpu) == pytest.approx(1e-3)  # the two kinds of units at once
    assert arithmetic.bound(gpu) == "compute"
    assert dataclasses.replace(memory, kept=3.35e9 / 2).lower_bound(gpu) == pytest.approx(5e-4)


@pytest.mark.parametrize("name", DEVICES)
def test_no_lower_bound_lies_above_a_prediction(name: str) -> None:
    gpu = DEVICES[name]
    for statistics in ((), ALL):
        op = forward_op(64, 12, 77, 257, 64, "bf16", statistics, gpu.architecture)
        assert 0 < op.work().lower_bound(gpu) <= op.work().seconds(gpu) <= op.seconds(gpu) * (1 + 1e-9)


def test_devices_are_dense_and_plausible() -> None:
    """A rate with sparsity would be twice too large, a bandwidth of both directions, too."""
    for gpu in DEVICES.values():
        assert gpu.name in DEVICES
        assert gpu.matrix["bf16"] == gpu.matrix["fp16"] == pytest.approx(2 * gpu.matrix["tf32"], rel=0.02)
        assert gpu.matrix["fp32"] <= gpu.matrix["tf32"]
        assert 50 < gpu.matrix["bf16"] / gpu.bandwidth < 500  # FLOP a byte at the ridge
        assert gpu.network <= gpu.link < gpu.bandwidth / 5
        assert gpu.l2 < gpu.memory / 100
        assert gpu.source
    with pytest.raises(ValueError, match=r"^unknown GPU 'h900': known are a100-80gb, h100, .*mi300x$"):
        device("h900")
