"""The Gumbel noise of topk_mask: its uniform draws, its logarithms, and that it samples what it says."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch

from crossmask.kernels import native, philox
from crossmask.kernels.topk_mask import reference, topk_mask

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
INF = math.inf
needs_native = pytest.mark.skipif(
    native.status().missing("cpu") is not None, reason=f"native kernel: {native.status().missing('cpu')}"
)
IMPLEMENTATIONS = [pytest.param("native", marks=needs_native), "reference"]


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("seed", [0, 1, -5, 2**63 - 1, -(2**63), 0x123456789ABCDEF])
def test_the_order_of_the_noise_is_that_of_the_uniform_draws(impl: Any, seed: int) -> None:
    """Of equal scores, the k with the largest draws are selected."""
    rows, n = torch.tensor([0, 1, -1, 2**31, 2**32 + 7, 2**63 - 1, -(2**63)]), 1000
    drawn = philox.words(torch.tensor([seed]), rows, n) >> 9
    for k in (1, 17, 333, 500, 999):
        mask = topk_mask(torch.zeros(7, n), k=k, gumbel_seed=seed, gumbel_rows=rows, impl=impl)
        for row, marks in zip(drawn, mask, strict=True):
            cut = row[marks].min()
            assert int((row > cut).sum()) < k <= int((row >= cut).sum())
            assert bool((row[~marks] <= cut).all())


@needs_native
def test_native_noise_is_the_reference_s_to_an_ulp() -> None:
    """In float64 nothing is left of a score of minus the noise but the difference of two float32 logarithms."""
    rows = torch.arange(64)
    noise = reference.gumbel(torch.tensor([9]), rows, 4099).double()
    uniform = philox.uniform(torch.tensor([9]), rows, 4099).double()
    exact = -(-uniform.log()).log()
    for target in (noise, exact):
        room = 2 * 2.0**-23 * target.abs().clamp(min=1.0)  # the inner logarithm's error is absolute in the outer one
        above = topk_mask(-target - room, threshold=0.0, gumbel_seed=9, gumbel_rows=rows, impl="native")
        below = topk_mask(-target + room, threshold=0.0, largest=False, gumbel_seed=9, gumbel_rows=rows, impl="native")
        assert not above.any()
        assert not below.any()


@needs_native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [1, 30, 77, 257, 577])
def test_native_draws_what_the_reference_draws(dtype: torch.dtype, n: int) -> None:
    scores = torch.randn(20, 3, n, generator=torch.Generator().manual_seed(n)).to(dtype)
    told: dict[str, Any] = {"ratio": 0.4, "valid": torch.rand(20, n) < 0.7, "gumbel_seed": 12, "return_indices": True}
    found = topk_mask(scores, **told, impl="native")
    expected = topk_mask(scores, **told, impl="reference")
    assert torch.equal(found.count, expected.count)
    values = reference.values(
        scores, reference.Request(seed=torch.tensor([12]), rows=torch.arange(20))
    )  # two logarithms that differ by an ulp may decide a near tie differently
    for value, a, b in zip(values, found.mask, expected.mask, strict=True):
        if not torch.equal(a, b):
            assert float(value[a ^ b].max() - value[a ^ b].min()) < 1e-5


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("largest", [True, False])
def test_sampling_without_replacement_in_proportion_to_exp(impl: Any, largest: bool) -> None:
    """Two of five, one of which may not be drawn, in many rows, against the sum over all orders of drawing."""
    weights = [0.1, 0.2, 0.3, 0.05, 0.35]
    allowed = [0, 1, 2, 4]
    probability = dict.fromkeys(range(5), 0.0)
    for order in itertools.permutations(allowed, 2):
        left, p = sum(weights[i] for i in allowed), 1.0
        for i in order:
            p, left = p * weights[i] / left, left - weights[i]
        for i in order:
            probability[i] += p
    rows = 40_000 if impl == "native" else 10_000
    scores = torch.tensor(weights, dtype=torch.float64).log().expand(rows, 5)
    valid = torch.tensor([i in allowed for i in range(5)]).expand(rows, 5)
    mask = topk_mask(scores, k=2, valid=valid, gumbel_seed=2024, largest=largest, impl=impl)
    assert mask.sum(1).eq(2).all()
    for i, frequency in enumerate(mask.double().mean(0).tolist()):
        p = probability[i]
        deviation = abs(frequency - p) / max(math.sqrt(p * (1 - p) / rows), 1e-9)
        if largest:
            assert deviation < 4, (i, frequency, p)
        elif i in (0, 4):  # the lowest of the noisy scores is another distribution
            assert deviation > 4


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_a_row_draws_the_same_wherever_it_stands(impl: Any) -> None:
    scores, rows = torch.randn(10, 200), torch.tensor([5, 3, 99, 2**40, 7, 8, 1, 0, 2, 4])
    told: dict[str, Any] = {"ratio": 0.5, "impl": impl}
    whole = topk_mask(scores, gumbel_seed=1, gumbel_rows=rows, **told)
    order = torch.randperm(10)
    assert torch.equal(topk_mask(scores[order], gumbel_seed=1, gumbel_rows=rows[order], **told), whole[order])
    assert torch.equal(topk_mask(scores[3:4], gumbel_seed=1, gumbel_rows=rows[3:4], **told), whole[3:4])
    # of a longer row the first draws are the same
    longer = torch.cat([scores, torch.full((10, 50), -INF)], 1)
    assert torch.equal(topk_mask(longer, k=100, gumbel_seed=1, gumbel_rows=rows, impl=impl)[:, :200], whole)
    other = topk_mask(scores, gumbel_seed=2, gumbel_rows=rows, **told)
    assert not any(torch.equal(a, b) for a, b in zip(whole, other, strict=True))
    plain = topk_mask(scores, gumbel_seed=torch.tensor([1]), gumbel_rows=torch.arange(10), **told)
    assert torch.equal(plain, topk_mask(scores, gumbel_seed=1, **told))
    same = topk_mask(scores[:1].expand(10, -1), gumbel_seed=1, **told)
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(same, 2))
