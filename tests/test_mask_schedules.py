"""Ratios that change, draws that belong to a sample, corruption, and how a planner puts them together."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from crossmask.engine.errors import RecipeError
from crossmask.engine.masking import KEEP, Draws, MaskContext, MaskPlan, MaskPlanner
from crossmask.engine.masking.corruption import FIRST_WORD_ID, corrupt
from crossmask.engine.masking.schedules import ratio_at
from crossmask.engine.recipe import CorruptionSection, MaskingSection, RatioSection

VOCABULARY, MASK = 205, 4
GRID = (4, 4)
MANY = 20_000


def draws(count: int = 8, seed: int = 0, step: int = 0, first: int = 0) -> Draws:
    return Draws(seed, step, torch.arange(first, first + count))


def context(count: int = 64, words: int = 10, pad: int = 2, step: int = 0, seed: int = 0, **given: Any) -> MaskContext:
    """[CLS], words, [SEP], padding."""
    L = words + 2 + pad
    place = torch.arange(L).expand(count, L)
    maskable, real = (place > 0) & (place <= words), place <= words + 1
    ids = (FIRST_WORD_ID + (torch.arange(count)[:, None] * 31 + place * 7) % (VOCABULARY - FIRST_WORD_ID)) * maskable
    defaults: dict[str, Any] = {"draws": draws(count, seed, step), "step": step}
    return MaskContext(ids, real, maskable, GRID, **(defaults | given))


def planner(**section: Any) -> MaskPlanner:
    return MaskPlanner(MaskingSection(**{"policy": "random", **section}), MASK, VOCABULARY)


def value(section: RatioSection | float, progress: float) -> float:
    found = ratio_at(section, progress, draws(), "ratio")
    assert isinstance(found, float)
    return found


# Schedules over the run


def test_constant_is_a_number_at_any_time() -> None:
    assert [value(0.15, progress) for progress in (0.0, 0.5, 1.0)] == [0.15] * 3


def test_linear_falls_from_30_to_15_percent() -> None:
    fall = RatioSection(kind="linear", start=0.3, end=0.15)
    assert [value(fall, x) for x in (0.0, 0.25, 0.5, 1.0)] == pytest.approx([0.3, 0.2625, 0.225, 0.15], abs=1e-12)


def test_cosine_is_slow_at_both_ends() -> None:
    fall = RatioSection(kind="cosine", start=0.3, end=0.02)
    expected = [0.02 + 0.14 * (1 + math.cos(math.pi * x)) for x in (0.0, 0.1, 0.5, 0.9, 1.0)]
    assert [value(fall, x) for x in (0.0, 0.1, 0.5, 0.9, 1.0)] == pytest.approx(expected, abs=1e-12)
    assert value(fall, 0.1) > value(RatioSection(kind="linear", start=0.3, end=0.02), 0.1)


def test_step_switches_once() -> None:
    switch = RatioSection(kind="step", start=0.4, end=0.1, until=0.3)
    assert [value(switch, x) for x in (0.0, 0.299, 0.3, 1.0)] == [0.4, 0.4, 0.1, 0.1]


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_until_is_when_the_end_is_reached_and_kept(kind: Any) -> None:
    rise = RatioSection(kind=kind, start=0.0, end=0.75, until=0.5)
    assert [value(rise, x) for x in (0.0, 0.25, 0.5, 0.8, 1.0, 1.2)] == pytest.approx([0.0, 0.375] + [0.75] * 4)


@pytest.mark.parametrize("kind", ["linear", "cosine", "step"])
def test_schedules_stay_within_their_ends(kind: Any) -> None:
    for start, end in ((0.3, 0.15), (0.1, 1.0), (1.0, 0.0), (0.7, 1.0), (0.2, 0.2)):
        section = RatioSection(kind=kind, start=start, end=end, until=0.7)
        for step in range(301):
            assert min(start, end) - 1e-12 <= value(section, step / 300) <= min(max(start, end) + 1e-12, 1.0)


# Ratios that differ from sample to sample


def sampled(section: RatioSection, count: int = MANY) -> Tensor:
    found = ratio_at(section, 0.5, draws(count), "ratio")
    assert isinstance(found, Tensor)
    assert found.shape == (count,)
    assert found.dtype == torch.float32
    return found.double().sort().values


def distance(sample: Tensor, distribution: Callable[[Tensor], Tensor]) -> float:
    """Kolmogorov and Smirnov's: the largest gap between the sample's distribution function and the true one."""
    n, true = len(sample), distribution(sample)
    steps = torch.arange(n + 1, dtype=torch.float64) / n
    return max(float((true - steps[:-1]).abs().max()), float((true - steps[1:]).abs().max()))


BOUND = 1.95 / math.sqrt(MANY)  # exceeded by one sample in a thousand; these samples are always the same


def test_uniform_ratio_of_maskvit() -> None:
    found = sampled(RatioSection(kind="uniform", start=0.5, end=1.0))
    assert 0.5 <= found[0] < 0.501
    assert 0.999 < found[-1] <= 1.0
    assert distance(found, lambda x: (x - 0.5) / 0.5) < BOUND


def truncated(mean: float, spread: float, low: float, high: float) -> Callable[[Tensor], Tensor]:
    """Distribution function by integrating the density, which is correct far from the mean too."""
    x = torch.linspace(low, high, 20_001, dtype=torch.float64)
    middle = (x[1:] + x[:-1]) / 2
    z = (middle - mean) / spread
    density = torch.exp(-0.5 * (z**2 - (z**2).min()))
    total = torch.cat([torch.zeros(1, dtype=torch.float64), density.cumsum(0)])
    total = total / total[-1]

    def function(at: Tensor) -> Tensor:
        place = ((at - low) / (high - low) * 20_000).clamp(0, 20_000)
        left = place.floor().long().clamp(max=19_999)
        return total[left] + (place - left) * (total[left + 1] - total[left])

    return function


@pytest.mark.parametrize(
    ("mean", "spread", "low", "high"),
    [
        (0.55, 0.25, 0.5, 1.0),  # MAGE
        (0.55, 0.25, 0.0, 1.0),
        (0.9, 0.05, 0.0, 1.0),
        (0.1, 0.02, 0.6, 1.0),  # both ends far above the mean
        (1.0, 0.02, 0.1, 0.5),  # and below
    ],
)
def test_gaussian_ratio_follows_its_truncated_distribution(mean: float, spread: float, low: float, high: float) -> None:
    found = sampled(RatioSection(kind="gaussian", start=mean, spread=spread, low=low, end=high))
    assert low - 1e-7 <= found[0] <= found[-1] <= high + 1e-7
    assert distance(found, truncated(mean, spread, low, high)) < BOUND


def test_gaussian_beyond_all_digits_gives_the_nearer_end() -> None:
    assert sampled(RatioSection(kind="gaussian", start=0.0, spread=0.001, low=0.5, end=1.0), 8).tolist() == [0.5] * 8
    above = sampled(RatioSection(kind="gaussian", start=1.0, spread=0.001, low=0.0, end=0.5), 8)
    assert above.tolist() == [0.5] * 8


@pytest.mark.parametrize("kind", ["uniform", "gaussian"])
def test_sampled_ratio_belongs_to_the_sample(kind: Any) -> None:
    section = RatioSection(kind=kind, start=0.55, end=1.0)
    whole = ratio_at(section, 0.1, draws(32), "ratio")
    rows = torch.tensor([30, 2, 2, 17])
    some = ratio_at(section, 0.9, Draws(0, 0, rows), "ratio")
    assert isinstance(whole, Tensor)
    assert isinstance(some, Tensor)
    assert torch.equal(whole[rows], some)
    assert not torch.equal(some, ratio_at(section, 0.9, Draws(0, 1, rows), "ratio"))
    assert not torch.equal(some, ratio_at(section, 0.9, Draws(0, 0, rows), "other ratio"))


@pytest.mark.parametrize(
    "wrong",
    [
        {"kind": "uniform", "start": 0.5, "end": 0.5},
        {"kind": "gaussian", "start": 0.5, "end": 0.4, "low": 0.4},
        {"kind": "linear", "start": 1.5, "end": 0.1},
        {"kind": "linear", "start": 0.5, "end": 0.1, "until": 0.0},
    ],
)
def test_impossible_schedules_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"not below end|less than or equal|greater than"):
        RatioSection(**wrong)


# Draws


def test_keys_differ_in_every_part_and_bits_look_random() -> None:
    keys = {
        (seed, step, purpose): Draws(seed, step, torch.arange(1)).key(purpose)
        for seed in (0, 1, 2, 2**31, 2**63, 10**30)
        for step in (0, 1, 2, 3, 100, 2**31, 2**40)
        for purpose in ("", "random patches", "random words", "words random", "corruption", "a", "b")
    }
    assert len(set(keys.values())) == len(keys)
    assert all(0 <= key < 2**63 for key in keys.values())
    ones = torch.tensor([[key >> bit & 1 for bit in range(63)] for key in keys.values()]).double().mean(0)
    assert (ones - 0.5).abs().max() < 5 * 0.5 / math.sqrt(len(keys))


def test_neighbouring_keys_are_unrelated() -> None:
    """Half of the bits change with any part, also where seed and step trade places or their sum stays the same."""
    flips = []
    for n in range(200):
        key = Draws(n, 5, torch.arange(1)).key("x")
        others = [Draws(seed, step, torch.arange(1)).key("x") for seed, step in ((n + 1, 5), (n, 6), (n + 1, 4))]
        others.append(Draws(n, 5, torch.arange(1)).key("y"))
        flips.extend((key ^ other).bit_count() for other in others)
    assert 30.5 < sum(flips) / len(flips) < 32.5
    assert min(flips) >= 12


def test_streams_are_uncorrelated() -> None:
    streams = [
        draws(MANY).uniform("a")[:, None],
        draws(MANY).uniform("b")[:, None],
        draws(MANY, step=1).uniform("a")[:, None],
        draws(MANY, seed=1).uniform("a")[:, None],
        draws(MANY, first=MANY).uniform("a")[:, None],
        draws(MANY).uniform("a", 6)[:, 1:],
    ]
    together = torch.cat(streams, 1).T.double()
    correlation = torch.corrcoef(together) - torch.eye(len(together))
    assert correlation.abs().max() < 4.5 / math.sqrt(MANY)


def test_uniform_and_normal_are_what_they_say() -> None:
    uniform = draws(MANY).uniform("u").double().sort().values
    assert 0 < uniform[0] < uniform[-1] < 1
    assert distance(uniform, lambda x: x) < BOUND
    normal = draws(MANY).normal("n").double().sort().values
    assert normal.isfinite().all()
    assert distance(normal, torch.special.ndtr) < BOUND


def test_shape_is_laid_out_row_by_row_and_longer_rows_begin_alike() -> None:
    one = draws().uniform("x", 12)
    assert torch.equal(draws().uniform("x", 3, 4), one.view(8, 3, 4))
    assert torch.equal(draws().uniform("x", 30)[:, :12], one)
    assert torch.equal(draws().uniform("x"), one[:, 0])


def test_gumbel_arguments_are_of_their_purpose() -> None:
    one, other = draws().gumbel("x"), draws().gumbel("y")
    assert one["gumbel_seed"].shape == (1,)
    assert one["gumbel_seed"] != other["gumbel_seed"]
    assert torch.equal(one["gumbel_rows"], torch.arange(8))


# Corruption


def shares(section: CorruptionSection, plan: Tensor, at: MaskContext) -> tuple[float, float, float]:
    read = corrupt(plan, at, section, MASK, VOCABULARY)[plan]
    return tuple(float(x.float().mean()) for x in (read == MASK, read >= FIRST_WORD_ID, read == KEEP))  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("mask", "random"), [(0.8, 0.1), (1.0, 0.0), (0.0, 1.0), (0.0, 0.0), (0.5, 0.5), (0.7, 0.3), (0.9, 0.1)]
)
def test_what_is_read_has_its_frequencies(mask: float, random: float) -> None:
    at = context(4000)
    found = shares(CorruptionSection(mask=mask, random=random), at.maskable, at)
    for share, expected in zip(found, (mask, random, max(0.0, 1 - mask - random)), strict=True):
        assert abs(share - expected) <= 5 * math.sqrt(expected * (1 - expected) / 40_000) + 1e-12


@pytest.mark.parametrize(("mask", "random"), [(0.0, 1.0), (0.8, 0.1)])
def test_random_words_are_words_and_all_equally_likely(mask: float, random: float) -> None:
    """Also where few are random: which word is read is drawn apart from whether one is."""
    at = context(8000)
    read = corrupt(at.maskable, at, CorruptionSection(mask=mask, random=random), MASK, VOCABULARY)
    words = read[at.maskable & (read != KEEP) & (read != MASK)]
    counts = torch.bincount(words, minlength=VOCABULARY)
    assert len(counts) == VOCABULARY
    assert counts[:FIRST_WORD_ID].sum() == 0
    expected = len(words) / (VOCABULARY - FIRST_WORD_ID)
    chi = float(((counts[FIRST_WORD_ID:] - expected) ** 2 / expected).sum())
    assert chi < 200 + 5 * math.sqrt(2 * 200)


def test_nothing_but_predicted_words_is_corrupted_without_a_rate() -> None:
    at = context(500, text_ratio=0.3)
    plan = planner(text_ratio=0.3)(at)
    assert plan.replacement is not None
    assert (plan.replacement[~plan.text] == KEEP).all()
    assert (plan.replacement[plan.text] != KEEP).any()
    read = plan.read(at.token_ids)
    assert torch.equal(read[~plan.text], at.token_ids[~plan.text])
    assert read.dtype == torch.int64


def test_rate_below_the_prediction_corrupts_some_of_the_predicted() -> None:
    at = context(500)
    plan = planner(text_ratio=0.4, corruption={"mask": 1.0, "random": 0.0, "rate": 0.2})(at)
    assert plan.replacement is not None
    corrupted = plan.replacement != KEEP
    assert (plan.text.sum(1) == 4).all()
    assert (corrupted.sum(1) == 2).all()
    assert not (corrupted & ~plan.text).any()
    # which of the predicted is as good as random
    first = (corrupted & (plan.text.cumsum(1) == 1)).float().sum() / 500
    assert abs(first - 0.5) < 0.12


def test_rate_above_the_prediction_corrupts_all_predicted_and_others() -> None:
    at = context(500)
    plan = planner(text_ratio=0.2, corruption={"mask": 1.0, "random": 0.0, "rate": 0.5})(at)
    assert plan.replacement is not None
    corrupted = plan.replacement != KEEP
    assert (plan.text.sum(1) == 2).all()
    assert (corrupted.sum(1) == 5).all()
    assert not (plan.text & ~corrupted).any()
    assert not (corrupted & ~at.maskable).any()


@pytest.mark.parametrize("rate", [0.0, 1.0])
def test_rate_of_none_and_all(rate: float) -> None:
    at = context(50)
    plan = planner(text_ratio=0.2, corruption={"mask": 1.0, "random": 0.0, "rate": rate})(at)
    assert plan.replacement is not None
    assert torch.equal(plan.replacement != KEEP, at.maskable if rate else torch.zeros_like(at.maskable))


def test_rate_may_differ_from_sample_to_sample() -> None:
    at = context(500)
    rate = {"kind": "uniform", "start": 0.1, "end": 0.9}
    plan = planner(text_ratio=0.2, corruption={"mask": 1.0, "random": 0.0, "rate": rate})(at)
    assert plan.replacement is not None
    assert set((plan.replacement != KEEP).sum(1).tolist()) == set(range(1, 9))


def test_plan_without_replacement_cannot_be_read() -> None:
    nothing = torch.zeros(1, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match="no replacement: a MaskPlanner fills it"):
        MaskPlan(nothing, nothing).read(torch.zeros(1, 3, dtype=torch.int64))


# The planner


SECTIONS: list[dict[str, Any]] = [
    {},
    {"image_ratio": {"kind": "gaussian", "start": 0.55, "end": 1.0, "low": 0.5}},
    {"text_ratio": {"kind": "uniform", "start": 0.1, "end": 0.9}, "corruption": {"rate": 0.4}},
    {"text_policy": "random", "corruption": {"rate": {"kind": "uniform", "start": 0.1, "end": 0.9}}},
]


def picked(at: MaskContext, rows: Tensor, length: int) -> MaskContext:
    return MaskContext(
        at.token_ids[rows, :length],
        at.token_mask[rows, :length],
        at.maskable[rows, :length],
        GRID,
        Draws(at.draws.seed, at.draws.step, at.draws.index[rows]),
        step=at.step,
        progress=at.progress,
    )


@pytest.mark.parametrize("section", SECTIONS)
@pytest.mark.parametrize("ranks", [1, 2, 3, 64])
def test_plan_is_the_same_on_any_number_of_ranks(section: dict[str, Any], ranks: int) -> None:
    """Samples dealt out to ranks as a sampler does, each rank padding to what it needs."""
    at, plan_of = context(64), planner(**section)
    whole = plan_of(at)
    for rank in range(ranks):
        rows = torch.arange(rank, 64, ranks)
        length = at.token_ids.shape[1] - (rank % 2)  # padding differs from rank to rank
        part = plan_of(picked(at, rows, length))
        assert torch.equal(part.image, whole.image[rows])
        assert torch.equal(part.text, whole.text[rows, :length])
        assert part.replacement is not None
        assert whole.replacement is not None
        assert torch.equal(part.replacement, whole.replacement[rows, :length])


def test_plan_changes_with_seed_and_step_and_repeats_with_both() -> None:
    plan_of = planner(image_ratio=0.5, text_ratio=0.5)
    one, again = plan_of(context(step=3)), plan_of(context(step=3))
    assert torch.equal(one.image, again.image)
    assert torch.equal(one.text, again.text)
    for other in (plan_of(context(step=4)), plan_of(context(step=3, seed=1))):
        assert not torch.equal(one.image, other.image)
        assert not torch.equal(one.text, other.text)


def test_planner_sets_the_ratios_of_the_run() -> None:
    fall = {"kind": "linear", "start": 0.8, "end": 0.2}
    plan_of = planner(image_ratio=0.25, text_ratio=fall)
    for progress, words in ((0.0, 8), (0.5, 5), (1.0, 2)):
        plan = plan_of(context(progress=progress, image_ratio=1.0, text_ratio=1.0))
        assert (plan.image.sum(1) == 4).all()
        assert (plan.text.sum(1) == words).all()


def test_ratio_of_each_sample_is_its_own() -> None:
    ratios = {"kind": "uniform", "start": 0.0, "end": 1.0}
    plan = planner(image_ratio=ratios, text_ratio=ratios)(context(400))
    assert set(plan.image.sum(1).tolist()) == set(range(1, 16))
    assert set(plan.text.sum(1).tolist()) == set(range(1, 10))
    # the two ratios of a sample are drawn apart
    both = torch.stack([plan.image.sum(1), plan.text.sum(1)]).double()
    assert abs(float(torch.corrcoef(both)[0, 1])) < 0.2


def test_words_of_another_policy() -> None:
    at = context(32)
    plan_of = planner(policy="random", text_policy="whole_modality")
    alone = planner(policy="random")(at)
    plan = plan_of(at)
    assert torch.equal(plan.image, alone.image)
    other = planner(policy="whole_modality")(at)
    assert torch.equal(plan.text, other.text)
    assert plan_of.needs == frozenset()


def test_needs_are_those_of_both_policies() -> None:
    assert planner(policy="random", text_policy="syncmask").needs == {"statistics"}
    assert planner(policy="syncmask", text_policy="random").needs == {"statistics"}


def test_unknown_text_policy_names_its_field() -> None:
    with pytest.raises(RecipeError, match=r"masking\.text_policy: unknown policy 'radom'; did you mean 'random'"):
        planner(text_policy="radom")
