"""Top-k masks against a stable sort in plain Python, on random rows and on rows made to break it."""

from __future__ import annotations

import math
import random
from fractions import Fraction

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from crossmask.kernels import topk_mask

NAN, INF = math.nan, math.inf


def expected(
    row: list[float], ratio: float, valid: list[bool] | None, threshold: float | None, largest: bool
) -> list[bool]:
    """The rules of the docstring, read literally; the ratio is the decimal number it is written as."""
    allowed = [i for i in range(len(row)) if valid is None or valid[i]]
    k = math.floor(Fraction(str(ratio)) * len(allowed))
    if ratio > 0 and allowed:
        k = max(k, 1)
    numbers = [i for i in allowed if not math.isnan(row[i])]
    order = sorted(numbers, key=lambda i: -row[i] if largest else row[i])  # stable: ties stay in the order of the row
    chosen = set((order + [i for i in allowed if math.isnan(row[i])])[:k])
    if threshold is not None:
        chosen = {i for i in chosen if (row[i] > threshold if largest else row[i] < threshold)}
    return [i in chosen for i in range(len(row))]


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


@pytest.mark.parametrize("ratio", [-0.1, 1.1, NAN])
def test_ratio_outside_its_range(ratio: float) -> None:
    with pytest.raises(ValueError, match=r"ratio must lie in \[0, 1\], got"):
        topk_mask(torch.zeros(1, 4), ratio=ratio)


def test_shapes_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match=r"scores must be a floating \(rows, positions\) tensor.*\(4,\)"):
        topk_mask(torch.zeros(4), ratio=0.5)
    with pytest.raises(ValueError, match=r"scores must be a floating.*int64"):
        topk_mask(torch.zeros(1, 4, dtype=torch.int64), ratio=0.5)
    with pytest.raises(ValueError, match=r"valid must be bool \(1, 4\), got torch.bool \(1, 3\)"):
        topk_mask(torch.zeros(1, 4), ratio=0.5, valid=torch.ones(1, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"valid must be bool.*float32"):
        topk_mask(torch.zeros(1, 4), ratio=0.5, valid=torch.ones(1, 4))
