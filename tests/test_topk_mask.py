"""Top-k masks against a stable sort in plain Python, on random rows and on rows made to break it."""

from __future__ import annotations

import math
import random
from fractions import Fraction

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from crossmask.kernels.topk_mask import Selection, topk_mask
from crossmask.kernels.topk_mask.request import fixed_point, largest_share, share_of

NAN, INF = math.nan, math.inf
pytestmark = pytest.mark.filterwarnings("ignore:topk_mask. NaN:RuntimeWarning")  # tests/test_topk_mask_op.py has it


def chosen(
    row: list[float],
    ratio: float | None,
    valid: list[bool] | None,
    threshold: float | None,
    largest: bool,
    k: int | None = None,
) -> list[int]:
    """The rules of the docstring, read literally; the ratio is the decimal number it is written as."""
    allowed = [i for i in range(len(row)) if valid is None or valid[i]]
    if ratio is not None:
        k = math.floor(Fraction(str(ratio)) * len(allowed))
        k = max(k, 1) if ratio > 0 and allowed else k
    numbers = [i for i in allowed if not math.isnan(row[i])]
    order = sorted(numbers, key=lambda i: -row[i] if largest else row[i])  # stable: ties stay in the order of the row
    marked = (order + [i for i in allowed if math.isnan(row[i])])[:k]
    if threshold is not None:
        marked = [i for i in marked if (row[i] > threshold if largest else row[i] < threshold)]
    return sorted(marked)


def expected(
    row: list[float], ratio: float, valid: list[bool] | None, threshold: float | None, largest: bool
) -> list[bool]:
    marked = chosen(row, ratio, valid, threshold, largest)
    return [i in marked for i in range(len(row))]


def found(
    row: list[float], ratio: float, valid: list[bool] | None, threshold: float | None, largest: bool
) -> list[bool]:
    mask = topk_mask(
        torch.tensor([row], dtype=torch.float64),
        ratio=ratio,
        valid=None if valid is None else torch.tensor([valid]),
        threshold=threshold,
        largest=largest,
    )
    assert mask.dtype == torch.bool
    return mask[0].tolist()


@pytest.mark.parametrize(
    ("row", "ratio", "valid", "marked"),
    [
        ([1, 3, 2, 0], 0.5, None, [1, 2]),
        ([5, 5, 5, 5], 0.5, None, [0, 1]),  # all equal: the lower indices
        ([1, 2, 2, 2], 0.5, None, [1, 2]),
        ([0.0, -0.0, 0.0, -0.0], 0.5, None, [0, 1]),  # the two zeros are one number
        ([1, 2, 3, 4], 0.0, None, []),
        ([1, 2, 3, 4], 1.0, None, [0, 1, 2, 3]),
        ([1, 2, 3, 4], 1e-12, None, [3]),  # at least one
        ([1, 2, 3, 4], 0.49, None, [3]),  # floor
        ([1, 2, 3, 4], 0.74, None, [2, 3]),
        ([NAN, NAN, 1, 2], 0.25, None, [3]),
        ([NAN, NAN, 1, 2], 0.75, None, [0, 2, 3]),  # NaN last, by index
        ([NAN, NAN], 0.5, None, [0]),
        ([-INF, INF, 0, INF], 0.5, None, [1, 3]),
        ([-INF, -INF, -INF], 0.4, None, [0]),
        ([NAN, -INF], 0.5, None, [1]),  # NaN is lower than the lowest number
        ([9, 8, 7, 6], 0.5, [False, False, True, True], [2]),
        ([9, -INF, 7, 6], 1.0, [False, True, False, False], [1]),  # a valid -inf before an invalid 9
        ([9, NAN, 7, 6], 1.0, [False, True, False, False], [1]),
        ([9, 8, 7, 6], 1.0, [False] * 4, []),
        ([9, 8, 7, 6], 0.1, [False] * 4, []),
    ],
)
def test_by_hand(row: list[float], ratio: float, valid: list[bool] | None, marked: list[int]) -> None:
    assert [i for i, m in enumerate(found(row, ratio, valid, None, True)) if m] == marked


def test_lowest_scores_on_request() -> None:
    assert found([3, 1, 2, 1], 0.5, None, None, False) == [False, True, False, True]
    assert found([2, 2, 2], 0.4, None, None, False) == [True, False, False]
    assert found([NAN, 5, 4], 0.34, None, None, False) == [False, False, True]
    assert found([NAN, INF], 0.5, None, None, False) == [False, True]  # NaN is marked last in this direction too


def test_threshold_is_strict_and_only_takes_away() -> None:
    assert found([1, 2, 3, 4], 0.75, None, 3.0, True) == [False, False, False, True]
    assert found([1, 2, 3, 4], 0.25, None, 0.0, True) == [False, False, False, True]
    assert found([1, 2, 3, 4], 0.75, None, 2.0, False) == [True, False, False, False]
    assert found([1, 2, 3, 4], 1.0, None, 9.0, True) == [False] * 4  # not even the one
    assert found([NAN, 1], 1.0, None, -INF, True) == [False, True]  # NaN is above no threshold


@pytest.mark.parametrize("tenths", range(11))
@pytest.mark.parametrize("n", [1, 3, 10, 20, 30, 70, 100, 576])
def test_rounding_follows_the_decimal_ratio(tenths: int, n: int) -> None:
    """0.3 * 10 is 3 although the product of doubles may fall short of it; likewise 0.7 * 10 and 0.1 * 30."""
    ratio = tenths / 10
    count = int(topk_mask(torch.randn(1, n), ratio=ratio).sum())
    assert count == (max(1, tenths * n // 10) if tenths else 0)


@pytest.mark.parametrize("ratio", [0.07, 0.14, 0.28, 0.29, 0.55, 0.56, 0.57, 0.58, 0.35])
def test_rounding_of_hundredths(ratio: float) -> None:
    for n in (50, 100, 200, 300, 1000):
        assert int(topk_mask(torch.randn(1, n), ratio=ratio).sum()) == round(100 * ratio) * n // 100


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_rows_are_independent_in_every_dtype(dtype: torch.dtype) -> None:
    """Few distinct values, so that most rows are decided by index."""
    generator = random.Random(0)
    rows = [[generator.choice([-1.5, 0.0, -0.0, 0.25, 2.0, INF]) for _ in range(37)] for _ in range(40)]
    valid = [[generator.random() < 0.8 for _ in range(37)] for _ in range(40)]
    for largest in (True, False):
        mask = topk_mask(torch.tensor(rows, dtype=dtype), ratio=0.35, valid=torch.tensor(valid), largest=largest)
        for row, allowed, marks in zip(rows, valid, mask.tolist(), strict=True):
            assert marks == expected(row, 0.35, allowed, None, largest)


@pytest.mark.parametrize("n", [1, 30, 77, 197, 257, 577])
def test_random_rows(n: int) -> None:
    scores = torch.randn(8, n)
    mask = topk_mask(scores, ratio=0.5)
    for row, marks in zip(scores.tolist(), mask.tolist(), strict=True):
        assert marks == expected(row, 0.5, None, None, True)


def test_empty_and_strided_inputs() -> None:
    assert topk_mask(torch.zeros(0, 4), ratio=0.5).shape == (0, 4)
    assert topk_mask(torch.zeros(3, 0), ratio=0.5).shape == (3, 0)
    scores = torch.randn(6, 5)
    assert torch.equal(topk_mask(scores.T, ratio=0.5), topk_mask(scores.T.contiguous(), ratio=0.5))


NUMBERS = st.one_of(st.sampled_from([0.0, -0.0, 1.0, -1.0, NAN, INF, -INF, 1e-310]), st.floats(width=64))


@settings(max_examples=300, deadline=None)
@given(
    row=st.lists(NUMBERS, min_size=1, max_size=40),
    thousandths=st.integers(0, 1000),
    seed=st.one_of(st.none(), st.integers(0, 2**16)),
    threshold=st.one_of(st.none(), st.sampled_from([0.0, 1.0, -1.0]), st.floats(-2, 2)),
    largest=st.booleans(),
)
@example(row=[NAN, -INF], thousandths=500, seed=None, threshold=None, largest=True)
def test_equals_a_stable_sort(
    row: list[float], thousandths: int, seed: int | None, threshold: float | None, largest: bool
) -> None:
    generator = random.Random(seed)
    valid = None if seed is None else [generator.random() < 0.6 for _ in row]
    ratio = thousandths / 1000
    assert found(row, ratio, valid, threshold, largest) == expected(row, ratio, valid, threshold, largest)


IMPLEMENTATIONS = [None, "reference"]  # None: native where the extension was built


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@settings(max_examples=200, deadline=None)
@given(
    rows=st.integers(1, 40).flatmap(lambda n: st.lists(st.lists(NUMBERS, min_size=n, max_size=n), max_size=3)),
    by=st.sampled_from(["k", "rows of k", "ratio", "rows of ratio", "threshold"]),
    seed=st.integers(0, 2**16),
    masked=st.booleans(),
    threshold=st.one_of(st.none(), st.sampled_from([0.0, -0.0, 1.0, INF, -INF, NAN]), st.floats(-2, 2)),
    largest=st.booleans(),
)
def test_selection_equals_a_stable_sort(
    impl: str | None,
    rows: list[list[float]],
    by: str,
    seed: int,
    masked: bool,
    threshold: float | None,
    largest: bool,
) -> None:
    """Mask, indices, count and NaN for every way to say how many, the amount another one in each row."""
    generator = random.Random(seed)
    n = len(rows[0]) if rows else 5
    valid = [[generator.random() < 0.6 for _ in row] for row in rows]
    ks = [generator.randint(0, n) for _ in rows]
    ratios = [generator.choice([0, 1, 1000, generator.randint(0, 1000)]) / 1000 for _ in rows]
    if not by.startswith("rows"):
        ks, ratios = ks[:1] * len(ks), ratios[:1] * len(ks)
    amount = {
        "k": {"k": ks[0] if ks else 3},
        "rows of k": {"k": torch.tensor(ks, dtype=torch.int64)},
        "ratio": {"ratio": ratios[0] if ratios else 0.3},
        "rows of ratio": {"ratio": torch.tensor(ratios, dtype=torch.float64)},
        "threshold": {},
    }[by]
    if by == "threshold" and threshold is None:
        threshold = 0.5
    selection = topk_mask(
        torch.tensor(rows, dtype=torch.float64).reshape(len(rows), n),
        **amount,
        valid=torch.tensor(valid, dtype=torch.bool).reshape(len(rows), n) if masked else None,
        threshold=threshold,
        largest=largest,
        return_indices=True,
        impl=impl,
    )
    assert isinstance(selection, Selection)
    columns = selection.indices.shape[1]
    if by in ("k", "ratio"):
        assert columns == (amount["k"] if by == "k" else len(chosen([0.0] * n, amount["ratio"], None, None, True)))
    else:
        assert columns == n
    for b, row in enumerate(rows):
        allowed = valid[b] if masked else None
        ratio = ratios[b] if "ratio" in by else None
        marked = chosen(row, ratio, allowed, threshold, largest, ks[b] if "k" in by else None)
        assert selection.mask[b].nonzero()[:, 0].tolist() == marked
        assert selection.indices[b].tolist() == marked + [-1] * (columns - len(marked))
        assert selection.count[b] == len(marked)
        assert selection.nan[b] == sum(math.isnan(x) for i, x in enumerate(row) if not masked or valid[b][i])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("tenths", range(11))
def test_rows_of_ratios_round_as_one_ratio(tenths: int, dtype: torch.dtype) -> None:
    """In float32, 0.7 is less than 0.7, and yet 7 of 10."""
    for n in (1, 3, 10, 30, 100, 577, 16384):
        mask = topk_mask(torch.randn(1, n), ratio=torch.tensor([tenths / 10], dtype=dtype))
        assert int(mask.sum()) == (max(1, tenths * n // 10) if tenths else 0)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_the_mean_of_partials(impl: str | None) -> None:
    partials = torch.tensor([[[1.0, 5.0, 2.0, NAN], [4.0, -3.0, 2.0, 9.0]]])  # means 2.5, 1, 2, NaN
    assert topk_mask(partials, k=2, impl=impl).tolist() == [[True, False, True, False]]
    assert topk_mask(partials, threshold=2.25, impl=impl).tolist() == [[True, False, False, False]]
    assert topk_mask(partials, k=4, return_indices=True, impl=impl).nan.tolist() == [1]
    one = torch.randn(3, 1, 50)
    assert torch.equal(topk_mask(one, ratio=0.4, impl=impl), topk_mask(one[:, 0], ratio=0.4, impl=impl))
    big = torch.tensor([[[3e38, 1.0], [3e38, 2.0]]])  # the sum overflows, as a sum in float32 does
    assert topk_mask(big, threshold=3.3e38, impl=impl).tolist() == [[True, False]]


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_partials_are_added_in_their_order_in_float32(impl: str | None) -> None:
    """(1 + 2^24) - 2^24 is 0 in float32; another order, or a wider sum, gives 1. Half precision is widened first."""
    partials = torch.tensor([[[1.0, 0.25], [2.0**24, 0.25], [-(2.0**24), 0.25]]])
    assert topk_mask(partials, k=1, impl=impl).tolist() == [[False, True]]
    assert topk_mask(partials.double(), k=1, impl=impl).tolist() == [[True, False]]
    half = torch.tensor([[[256.0, 257.5], [1.0, 0.0]]])
    assert topk_mask(half.bfloat16(), k=1, impl=impl).tolist() == [[False, True]]  # 257.5 is 258 there; 257 stays


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_the_sum_is_multiplied_by_a_rounded_share(impl: str | None) -> None:
    """Not divided: float32(1/3) x is not always x / 3, and implementations have to agree to the last bit."""
    x = torch.arange(1.0, 200.0)
    mean = x * torch.tensor(1 / 3)
    assert not torch.equal(mean, x / 3)
    partials = torch.stack([x, x * 0, x * 0])[None].expand(1, 3, len(x))
    for i in range(0, len(x), 7):
        lower = float(torch.nextafter(mean[i], torch.tensor(0.0)))
        assert int(topk_mask(partials, threshold=float(mean[i]), impl=impl).sum()) == len(x) - i - 1
        assert int(topk_mask(partials, threshold=lower, impl=impl).sum()) == len(x) - i


def test_share_of_very_long_rows() -> None:
    """Counts at which the product of a ratio and a count would leave 64 bits."""
    count = torch.tensor([2**14, 2**20, 2**31 + 7, 2**38, 0])
    for ratio in (0.0, 1e-15, 1e-6, 0.3, 0.5, 1.0):
        fixed = fixed_point(ratio)
        assert isinstance(fixed, int)
        exact = [min(max(c * fixed >> 48, min(1, c, fixed)), c) for c in count.tolist()]
        assert share_of(fixed, count).tolist() == exact
        assert share_of(torch.tensor([fixed]), count).tolist() == exact
        assert [largest_share(fixed, c) for c in count.tolist()] == exact
    assert int(share_of(torch.tensor(fixed_point(0.3)), torch.tensor(10**9))) == 3 * 10**8
