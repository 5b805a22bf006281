"""Triton's selection kernel against the reference: on a GPU where there is one, else in Triton's interpreter."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import interpreter_bf16
import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from crossmask.kernels import launch, philox
from crossmask.kernels.topk_mask import reference
from crossmask.kernels.topk_mask.request import Request, Selected, fixed_point, largest_share
from crossmask.kernels.topk_mask.triton import configs, kernel
from crossmask.kernels.topk_mask.triton import launch as launcher
from crossmask.kernels.topk_mask.triton.configs import Config

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LENGTHS = (1, 30, 77, 197, 257, 577)
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
NAN, INF = math.nan, math.inf
STAGED = Config(block=128, chunk=32, warps=1, staged=True)
UNSTAGED = Config(block=128, chunk=32, warps=1)
# adding to NaN and infinities is what some tests are about
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    """Every torch.empty is full of NaN, or of the largest integer."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


def select(scores: Tensor, valid: Tensor | None = None, **asked: Any) -> Selected:
    """Of (B, N) or (B, R, N) scores, with all indices."""
    scores = (scores if scores.ndim == 3 else scores[:, None]).to(DEVICE)
    asked = {name: x.to(DEVICE) if isinstance(x, Tensor) else x for name, x in asked.items()}
    request = Request(**{"width": scores.shape[-1], **asked})
    emulated = DEVICE == "cpu" and scores.dtype == torch.bfloat16
    with interpreter_bf16.repaired() if emulated else nullcontext():
        return launcher.select(scores, None if valid is None else valid.to(DEVICE), request)


def assert_as_reference(scores: Tensor, valid: Tensor | None = None, **asked: Any) -> Selected:
    found = select(scores, valid, **asked)
    request = Request(**{"width": scores.shape[-1], **asked})
    wanted = reference.select(scores if scores.ndim == 3 else scores[:, None], valid, request)
    for name, value, want in zip(("mask", "indices", "count", "nan"), found, wanted, strict=True):
        assert value.dtype == want.dtype, name
        assert value.is_contiguous(), name
        assert torch.equal(value.cpu(), want), f"{name} {asked}"
    return found


def some(*shape: int) -> Tensor:
    """A random mask with something valid in each row."""
    mask = torch.rand(*shape) < 0.7
    mask[:, shape[1] // 2] = True
    return mask


def nasty(dtype: torch.dtype) -> Tensor:
    """(40,) of values that orders get wrong."""
    limits = torch.finfo(dtype)
    near = [1.0, 1.0 + limits.eps, 1.0 - limits.eps / 2, -1.0, -1.0 - limits.eps, limits.max, -limits.max]
    tiny = [limits.tiny, -limits.tiny, limits.smallest_normal / 2, limits.tiny * limits.eps, -limits.tiny * limits.eps]
    odd = [NAN, -NAN, 0.0, -0.0, INF, -INF, NAN, 0.0, -0.0, -INF, INF, 2.0, -2.0, 0.5]
    values = torch.tensor((near + tiny + odd) * 2, dtype=torch.float64).to(dtype)[:40]
    return values[torch.randperm(40)]


# ---- lengths, dtypes, and which path a length takes


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("N", LENGTHS)
def test_every_length_and_dtype(N: int, dtype: torch.dtype) -> None:
    for R in (1, 3):
        scores = torch.randn(3, R, N).to(dtype)
        assert_as_reference(scores, k=min(7, N))
        assert_as_reference(scores, some(3, N), ratio=fixed_point(0.3), largest=False)


@pytest.mark.parametrize("N", [1024, 4096, 8191, 16384])
def test_long_rows(N: int) -> None:
    scores = torch.randn(2, 2, N)
    scores[0, :, N // 3 :] = 1.0  # the cut lies among ties
    assert_as_reference(scores, some(2, N), k=N // 2)
    assert_as_reference(scores[:, :1].double(), ratio=fixed_point(0.6), largest=False)


def test_longer_rows_are_refused_with_the_way_out() -> None:
    with pytest.raises(ValueError, match=r"at most 16384 positions, got 16385: say impl='reference'"):
        select(torch.zeros(1, 16385), k=1)


@pytest.mark.parametrize("shape", [(0, 1, 5), (3, 2, 0), (0, 1, 0)])
def test_empty_inputs(shape: tuple[int, int, int]) -> None:
    mask, indices, count, nan = assert_as_reference(torch.zeros(shape), k=0)
    assert mask.shape == indices.shape == (shape[0], shape[2])
    assert count.tolist() == nan.tolist() == [0] * shape[0]


@pytest.mark.parametrize("config", [STAGED, UNSTAGED], ids=["staged", "unstaged"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_every_way_through_the_kernel(config: Config, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several chunks, of which the last holds a part or nothing, in short rows."""
    monkeypatch.setattr(configs, "select", lambda *asked: config)
    row_ratio = fixed_point(torch.tensor([0.1, 0.5, 1.0], dtype=torch.float64))
    for N in (1, 32, 33, 97, 128):
        scores = torch.randn(3, 2, N, dtype=dtype).mul(2).round().div(2)  # ties
        assert_as_reference(scores, some(3, N), ratio=row_ratio)
        assert_as_reference(scores[:2], k=N // 2, largest=False, threshold=0.5, width=N // 2)
        assert_sampled(scores[:2], some(2, N), k=N // 3, seed=torch.tensor([N]), rows=torch.arange(2))


# ---- how many


def test_k_for_all_rows_and_for_each() -> None:
    scores, valid = torch.randn(5, 77), some(5, 77)
    valid[2] = False
    for k in (0, 1, 5, 77):
        assert_as_reference(scores, valid, k=k, width=k)
    found = assert_as_reference(scores, valid, k=torch.tensor([0, 1, 5, 30, 77]))
    assert found[2].tolist()[:3] == [0, 1, 0]
    clamped = select(scores, valid, k=torch.tensor([-3, 78, 2**40, -(2**62), 2**62]))
    assert clamped[2].tolist() == [0, int(valid[1].sum()), 0, 0, int(valid[4].sum())]


@pytest.mark.parametrize("ratio", [0.0, 1e-12, 0.1, 0.3, 1 / 3, 0.75, 1.0])
def test_ratio_of_what_is_valid(ratio: float) -> None:
    scores, valid = torch.randn(6, 197), some(6, 197)
    valid[1] = False
    valid[2, 10:] = False
    valid[2, :10] = True
    fixed = fixed_point(ratio)
    assert_as_reference(scores, valid, ratio=fixed, width=largest_share(fixed, 197))
    found = assert_as_reference(scores, valid, ratio=fixed_point(torch.full((6,), ratio, dtype=torch.float64)))
    assert found[2][2] == (max(1, math.floor(round(ratio * 10, 9))) if ratio else 0)


def test_a_whole_row_of_the_longest_takes_all() -> None:
    """The product of ratio and count is at its largest: it must not wrap."""
    scores = torch.randn(1, 16384)
    assert int(select(scores, ratio=fixed_point(1.0), width=0)[2]) == 16384
    assert int(select(scores, ratio=fixed_point(torch.tensor([1.0])), width=0)[2]) == 16384


@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("threshold", [0.0, -0.0, 1.0, -1.0, 0.1, INF, -INF, NAN, 1e300, -1e300, 1e-300, 1e-40])
def test_threshold(threshold: float, dtype: torch.dtype, largest: bool) -> None:
    scores = torch.stack([nasty(dtype), torch.full((40,), 0.1, dtype=torch.float64).to(dtype)])
    assert_as_reference(scores, threshold=threshold, largest=largest)
    assert_as_reference(scores, some(2, 40), k=9, threshold=threshold, largest=largest)


def test_the_threshold_of_a_value_is_rounded_like_the_value() -> None:
    """0.1 lies above float32's 0.1 and below; the scores are what they are compared with."""
    for dtype in (torch.float32, torch.float64):
        for threshold in (0.1, math.nextafter(0.1, 0), math.nextafter(0.1, 1)):
            for largest in (True, False):
                row = torch.tensor([[0.1, 0.1000001, 0.0999999]], dtype=torch.float64).to(dtype)
                assert_as_reference(row, threshold=threshold, largest=largest)


# ---- order


@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_k_of_a_nasty_row(dtype: torch.dtype, largest: bool) -> None:
    """NaN last, +0 as -0, denormals not 0, ties to the lower index: the ranks of all, one k after the other."""
    scores = nasty(dtype).expand(40, 40)
    valid = torch.ones(40, 40, dtype=torch.bool)
    valid[:, 7] = False
    found = assert_as_reference(scores, valid, k=torch.arange(40), largest=largest)
    assert set(found[3].tolist()) == {int(scores[0].isnan()[valid[0]].sum())}


@pytest.mark.parametrize("value", [0.0, -0.0, 1.5, -1.5, INF, -INF, NAN, 1e-42, -1e-42])
def test_rows_of_one_value_take_the_first(value: float) -> None:
    k = torch.tensor([1, 38, 76])
    for largest in (True, False):
        mask = assert_as_reference(torch.full((3, 77), value), k=k, largest=largest)[0]
        assert torch.equal(mask.cpu(), torch.arange(77) < k[:, None])


def test_ties_everywhere() -> None:
    for values in (2, 3, 10):
        scores = torch.randint(0, values, (4, 577)) - values / 2
        for k in (1, 100, 288, 576):
            assert_as_reference(scores, some(4, 577), k=k, largest=k != 288)


def test_float64_keys_that_differ_in_their_lower_half() -> None:
    scores = 1.0 + torch.randperm(197).double()[None] * 2.0**-52
    for k in (1, 50, 196):
        assert_as_reference(scores, k=k)
        assert_as_reference(-scores, k=k, largest=False)
    assert_as_reference(scores, threshold=float(scores[0, 3]))


def test_not_a_number_is_counted_where_it_is_valid_and_after_the_mean() -> None:
    scores = torch.randn(3, 2, 30)
    scores[0, 0, 3], scores[0, 1, 5], scores[1, :, 7] = NAN, NAN, torch.tensor([INF, -INF])
    valid = torch.ones(3, 30, dtype=torch.bool)
    valid[0, 3] = False
    found = assert_as_reference(scores, valid, k=30)
    assert found[3].tolist() == [1, 1, 0]
    assert found[2].tolist() == [29, 30, 30]


# ---- partials and strides


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("R", [2, 3, 7, 12])
def test_partials_are_added_in_their_order(R: int, dtype: torch.dtype) -> None:
    """Sums of values far apart: any other order, or a product in place of the quotient's rounding, selects others."""
    scores = (torch.randn(4, R, 197, dtype=torch.float64) * 10.0 ** torch.randint(-3, 4, (4, R, 1))).to(dtype)
    scores[:, 0] += 1000
    assert_as_reference(scores, k=60)
    wide = scores.to(torch.promote_types(dtype, torch.float32))
    mean = reference.values(wide, Request())
    assert_as_reference(scores, threshold=float(mean[1].median()))


def test_a_mean_that_rounds_to_minus_zero_is_zero() -> None:
    scores = torch.zeros(1, 3, 30)
    scores[0, 0, 4:8] = -torch.finfo(torch.float32).smallest_normal * 2.0**-23
    assert_as_reference(scores, k=6)
    assert_as_reference(scores, threshold=0.0, largest=False)


def test_scores_are_read_where_they_lie() -> None:
    base = torch.randn(6, 4, 200)
    for scores in (base[::2], base[:, 1::2], base[:, :, 3:100], base[1::3, ::3, 4:196], base.transpose(0, 1), base[:1]):
        assert_as_reference(scores, some(scores.shape[0], scores.shape[2]), k=20)
    assert_as_reference(base[:1].expand(5, 4, 200), some(5, 200), k=torch.arange(5) * 30)
    assert_as_reference(base[:, :1].expand(6, 3, 200), k=20)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_aligned_rows_select_what_others_select(dtype: torch.dtype) -> None:
    aligned = torch.randn(3, 2, 64).to(dtype)
    shifted = torch.empty(3, 2, 65, dtype=dtype)[:, :, 1:].copy_(aligned)
    assert configs.units(64, aligned) == 16 // dtype.itemsize
    assert configs.units(64, shifted) == configs.units(63, aligned) == 1
    valid = some(3, 64)
    for one, other in zip(select(aligned, valid, k=9), select(shifted, valid, k=9), strict=True):
        assert torch.equal(one, other)
    assert_as_reference(aligned, valid, k=9)


# ---- noise


@triton.jit
def _uniform(Seed, Rows, Out, first, LENGTH: tl.constexpr):
    row = tl.program_id(0)
    u = kernel.uniform(Seed, Rows, row, first, LENGTH)
    tl.store(Out + row * LENGTH + tl.arange(0, LENGTH), u)


@pytest.mark.parametrize("seed", [0, 1, -1, 2**31, 2**32 + 5, 2**63 - 1, -(2**63)])
def test_draws_are_those_of_philox(seed: int) -> None:
    rows = torch.tensor([0, 1, -1, 2**31, -(2**31), 2**32, 2**40 + 3, 2**63 - 1, -(2**63)], device=DEVICE)
    found, given = torch.empty(9, 256, device=DEVICE), torch.tensor([seed], device=DEVICE)
    wanted = philox.uniform(given, rows, 640)
    for first in (0, 4, 256, 384):
        _uniform[(9,)](given, rows, found, first, LENGTH=256)
        assert torch.equal(found, wanted[:, first : first + 256])


def assert_sampled(scores: Tensor, valid: Tensor | None = None, **asked: Any) -> Selected:
    """As the reference, but where two values lie so close that a rounding of the logarithms decides."""
    found = select(scores, valid, **asked)
    scores = scores if scores.ndim == 3 else scores[:, None]
    wanted = reference.select(scores, valid, Request(**{"width": scores.shape[-1], **asked}))
    value = reference.values(scores, Request(**asked))
    assert torch.equal(found[2].cpu(), wanted[2])
    assert torch.equal(found[3].cpu(), wanted[3])
    assert torch.equal(reference.indices_of(found[0].cpu(), found[1].shape[1]), found[1].cpu())
    for row in (found[0].cpu() != wanted[0]).any(1).nonzero().flatten():
        mask, other = found[0][row].cpu(), wanted[0][row]
        assert torch.allclose(value[row][mask & ~other].sort()[0], value[row][other & ~mask].sort()[0], rtol=1e-5)
    return found


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("N", [*LENGTHS, 1030])
def test_noise_is_added_to_the_mean(N: int, dtype: torch.dtype) -> None:
    scores, rows = torch.randn(3, 2, N).to(dtype), torch.tensor([5, -5, 2**40])
    assert_sampled(scores, some(3, N), ratio=fixed_point(0.4), seed=torch.tensor([9]), rows=rows)
    assert_sampled(scores, k=min(3, N), seed=torch.tensor([-9]), rows=rows, largest=False)


def test_noise_depends_on_what_a_row_is_and_not_on_where_it_lies() -> None:
    scores, rows, seed = torch.zeros(8, 577), torch.randint(-(2**60), 2**60, (8,)), torch.tensor([3])
    whole = select(scores, k=50, seed=seed, rows=rows)[0]
    parts = [select(scores[:4], k=50, seed=seed, rows=rows[i::2])[0] for i in range(2)]
    assert torch.equal(whole, torch.stack(parts, 1).flatten(0, 1))
    assert not torch.equal(whole, select(scores, k=50, seed=seed + 1, rows=rows)[0])
    assert len({tuple(row) for row in whole.tolist()}) == 8


def test_noise_leaves_infinities_and_nan_where_they_are() -> None:
    scores = torch.randn(4, 77)
    scores[:, 5], scores[:, 6], scores[:, 7] = INF, -INF, NAN
    noise = {"seed": torch.tensor([1]), "rows": torch.arange(4)}
    assert select(scores, k=1, **noise)[1][:, 0].tolist() == [5] * 4
    found = select(scores, k=75, **noise)
    assert not found[0][:, 6:8].any()
    assert found[3].tolist() == [1] * 4


# ---- what a call costs


def test_two_runs_agree() -> None:
    scores, valid = torch.randn(4, 3, 577).mul(4).round(), some(4, 577)
    asked = {"ratio": fixed_point(0.5), "seed": torch.tensor([1]), "rows": torch.arange(4)}
    first, second = select(scores, valid, **asked), select(scores, valid, **asked)
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


def test_no_indices_where_none_are_asked_for() -> None:
    scores, valid = torch.randn(3, 257), some(3, 257)
    without = select(scores, valid, k=20, width=0)
    assert without[1].shape == (3, 0)
    for i in (0, 2, 3):
        assert torch.equal(without[i], select(scores, valid, k=20, width=20)[i])
    assert (select(scores, valid, k=20, width=31)[1][:, 20:] == -1).all()


def _recorded(B: int = 4, R: int = 3, N: int = 577, **asked: Any) -> launch.Launch:
    """Of tensors that have no data: whatever looked at data, and so waited for a GPU, would fail."""
    with launch.recording() as recorded:
        valid = torch.empty(B, N, dtype=torch.bool, device="meta")
        launcher.select(torch.empty(B, R, N, device="meta"), valid, Request(**asked))
    assert len(recorded) == 1, "one launch"
    return recorded[0]


def test_one_launch_that_waits_for_nothing() -> None:
    per_row = torch.empty(4, dtype=torch.int64, device="meta")
    one = _recorded(k=per_row, seed=per_row[:1], rows=per_row, threshold=0.5, width=577)
    assert one.grid == (4,)
    assert set(one.arguments) == set(one.kernel.arg_names)


def test_one_binary_for_all_values() -> None:
    """What is not specialised still has a type, by its size: every size fits the same."""
    several: list[Callable[[], launch.Launch]] = [
        lambda: _recorded(k=1),
        lambda: _recorded(k=16),
        lambda: _recorded(ratio=fixed_point(1.0)),
        lambda: _recorded(ratio=1, threshold=-1e30),
        lambda: _recorded(threshold=NAN, largest=False),
        lambda: _recorded(B=1, R=1, N=1023),
    ]
    constants = set()
    for call in several:
        arguments = {name: x for name, x in call().arguments.items() if not isinstance(x, Tensor)}
        for name in kernel.SIZES:
            size = arguments.pop(name)
            assert type(size) is int, name
            assert -(2**31) <= size < 2**31, name
        constants.add(tuple(sorted(arguments.items())))
    assert len(constants) == 1
