"""Microbenchmarks of the kernels against what one would use instead: ``make bench``, one process, one thread.

Each group is one job at one shape; its fastest row is marked. Figures belong to the machine that printed them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from crossmask.kernels import cross_attention, ema_update_, topk_mask

torch.set_num_threads(1)

SHAPES = {"16x37": (192, 4, 16, 37, 32), "30x257": (8, 12, 30, 257, 64)}  # B, H, S, P, D: emoji recipe, ALBEF
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("impl", ["sdpa", "eager", None], ids=["sdpa", "eager", "chosen"])
def test_attention_forward_and_backward(benchmark: Any, impl: Any, shape: str, dtype: str) -> None:
    b, h, s, p, d = SHAPES[shape]
    benchmark.group = f"attention, forward and backward, {shape} {dtype}"
    q, k, v = (torch.randn(b, h, n, d, dtype=DTYPES[dtype], requires_grad=True) for n in (s, p, p))
    gradient = torch.randn_like(q)
    benchmark(lambda: cross_attention(q, k, v, impl=impl).output.backward(gradient))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "statistics", [(), ("entropy", "key_attention", "query_attention")], ids=["output", "statistics"]
)
def test_statistics(benchmark: Any, statistics: tuple[str, ...], shape: str, dtype: str) -> None:
    b, h, s, p, d = SHAPES[shape]
    benchmark.group = f"teacher's attention, forward, {shape} {dtype}"
    q, k, v = (torch.randn(b, h, n, d, dtype=DTYPES[dtype]) for n in (s, p, p))
    with torch.no_grad():
        benchmark(lambda: cross_attention(q, k, v, statistics=statistics))


def torch_topk(scores: torch.Tensor, ratio: float) -> torch.Tensor:
    k = int(ratio * scores.shape[1])
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, scores.topk(k, 1).indices, True)


@pytest.mark.parametrize("n", [36, 196, 577])
@pytest.mark.parametrize("select", [lambda s, r: topk_mask(s, ratio=r), torch_topk], ids=["topk_mask", "torch.topk"])
def test_mask_selection(benchmark: Any, select: Callable[[torch.Tensor, float], torch.Tensor], n: int) -> None:
    benchmark.group = f"top-k mask, 256 rows of {n}"
    scores = torch.rand(256, n)
    benchmark(lambda: select(scores, 0.4))


def lerp(teacher: list[torch.Tensor], student: list[torch.Tensor]) -> None:
    torch._foreach_lerp_(teacher, [s.float() for s in student], 0.01)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("update", [lambda t, s: ema_update_(t, s, 0.99), lerp], ids=["ema_update_", "foreach_lerp_"])
def test_ema(benchmark: Any, update: Callable[..., None], dtype: str) -> None:
    benchmark.group = f"EMA of 20 M parameters in 80 tensors, fp32 from {dtype}"
    teacher = [torch.randn(250_000) for _ in range(80)]
    student = [t.to(DTYPES[dtype], copy=True) for t in teacher]
    benchmark(lambda: update(teacher, student))
