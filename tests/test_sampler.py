"""Step sampler: permutations, shares, and the mistakes it names."""

from __future__ import annotations

import numpy as np
import pytest

from crossmask.engine.data import StepSampler
from crossmask.engine.errors import DataError, RecipeError, UserError


def epoch(sampler: StepSampler, number: int) -> np.ndarray:
    steps = range(number * sampler.steps_per_epoch, (number + 1) * sampler.steps_per_epoch)
    return np.concatenate([sampler.indices(s, r) for s in steps for r in range(sampler.world_size)])


def test_an_epoch_is_a_permutation() -> None:
    sampler = StepSampler(96, 12, 2, seed=3)
    first, second = epoch(sampler, 0), epoch(sampler, 1)
    assert sorted(first) == sorted(second) == list(range(96))
    assert (first != second).any()
    assert first.dtype == np.int64
    assert (first != epoch(StepSampler(96, 12, 2, seed=4), 0)).any()


def test_a_short_rest_is_never_a_batch() -> None:
    sampler = StepSampler(101, 25, 1, seed=0)
    assert sampler.steps_per_epoch == 4
    assert [sampler.epoch(s) for s in (0, 3, 4, 7, 8)] == [0, 0, 1, 1, 2]
    assert all(len(sampler.indices(s, 0)) == 25 for s in range(9))
    assert len(set(epoch(sampler, 1))) == 100


@pytest.mark.parametrize("world", [1, 2, 3, 4, 6])
def test_ranks_share_one_batch_whatever_their_number(world: int) -> None:
    whole = StepSampler(60, 12, 1, seed=1)
    dealt = StepSampler(60, 12, world, seed=1)
    for step in (0, 4, 5, 17):
        shares = [dealt.indices(step, rank) for rank in range(world)]
        assert {len(s) for s in shares} == {12 // world}
        assert np.concatenate(shares).tolist() == whole.indices(step, 0).tolist()


def test_a_step_needs_no_history() -> None:
    walked, fresh = StepSampler(50, 10, 2, seed=9), StepSampler(50, 10, 2, seed=9)
    last = [walked.indices(step, 1) for step in range(24)][-1]
    assert fresh.indices(23, 1).tolist() == last.tolist()
    assert walked.indices(0, 1).tolist() == fresh.indices(0, 1).tolist()


@pytest.mark.parametrize(
    ("size", "batch", "world", "accumulation", "error", "parts"),
    [
        (100, 10, 3, 1, RecipeError, ["(10)", "3 ranks", "9 or 12"]),
        (100, 12, 2, 4, RecipeError, ["(12)", "= 8", "8 or 16"]),
        (100, 3, 4, 1, RecipeError, ["(3)", "to 4"]),
        (20, 32, 2, 1, DataError, ["(32)", "20 training samples", "at most 20"]),
        (3, 4, 4, 1, DataError, ["4 ranks", "3 training samples"]),
        (0, 4, 1, 1, DataError, ["0 training samples"]),
    ],
)
def test_mistakes_are_one_line(
    size: int, batch: int, world: int, accumulation: int, error: type[UserError], parts: list[str]
) -> None:
    with pytest.raises(error) as caught:
        StepSampler(size, batch, world, 0, accumulation)
    message = str(caught.value)
    assert "\n" not in message
    assert all(part in message for part in parts), message
