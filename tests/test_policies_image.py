"""Policies that choose patches: each one's defining property, on inputs made by hand."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from crossmask.engine.errors import RecipeError
from crossmask.engine.masking import Draws, MaskContext, MaskPlan, build_policy
from crossmask.engine.masking.policies.blockwise import BLOCKS
from crossmask.engine.masking.policies.random import random_patches
from crossmask.engine.masking.policies.self_guided import object_patches, second_eigenvector
from crossmask.engine.recipe import MaskingSection
from crossmask.kernels import AttentionStatistics
from crossmask.kernels.max_similarity import max_similarity

WORDS = torch.tensor([False, True, True, True, True, False])


def context_of(rows: int, grid: tuple[int, int] = (2, 3), step: int = 0, **given: Any) -> MaskContext:
    maskable = given.pop("maskable", WORDS.expand(rows, 6))
    tokens = torch.ones(rows, 6, dtype=torch.int64)
    return MaskContext(tokens, tokens > 0, maskable, grid, Draws(0, step, torch.arange(rows)), **given)


def plan_of(policy: str, context: MaskContext, **options: Any) -> MaskPlan:
    return build_policy(MaskingSection(policy=policy, options=options))(context)


def marked(mask: Tensor) -> list[list[int]]:
    return [row.nonzero()[:, 0].tolist() for row in mask]


def near(shares: Tensor, expected: float | Tensor, rows: int) -> bool:
    """Within five standard errors of shares that were counted over so many rows."""
    expected = torch.as_tensor(expected, dtype=torch.float64)
    error = (expected * (1 - expected) / rows).sqrt()
    return bool(((shares.double() - expected).abs() <= 5 * error + 1e-9).all())


# ── by the caption ──────────────────────────────────────────────────────────────────────────────────────────────────

MATCH = torch.tensor([[0.9, -0.2, 0.5, 0.1, -0.7, 0.3], [0.0] * 6])
ONE_CAPTION = torch.stack([WORDS, torch.zeros(6, dtype=torch.bool)])


def test_sycoca_hides_what_matches_most_or_least() -> None:
    context = context_of(2, similarities=MATCH, image_ratio=0.5, maskable=ONE_CAPTION)
    assert marked(plan_of("sycoca", context).image) == [[0, 2, 5], []]
    assert marked(plan_of("sycoca", context, side="low").image) == [[1, 3, 4], []]
    both = plan_of("sycoca", context, side="both")
    assert [marked(image) for image in both.images] == [[[0, 2, 5], []], [[1, 3, 4], []]]


def test_sycoca_takes_the_best_word_and_not_the_mean_of_words() -> None:
    """Patch 0 is one rare word to the letter and the opposite of the others, patch 1 is a bit like all words."""
    words = F.normalize(
        torch.tensor([[9.0, 9, 9], [1.0, 0, 0], [0.0, 1, 0], [0.0, 0, 1], [0.0, 0, 1], [9, 0, 0]]), dim=1
    )
    patches = torch.tensor(
        [[1.0, -0.5, -0.5], [0.6, 0.6, 0.6], [-1.0, -1, -1], [0.1, 0, 0], [0.0, 0.2, 0], [0, 0, 0.3]]
    )
    found = max_similarity(patches[None], words[None], WORDS[None])
    mean = (patches @ words[WORDS].T).mean(1)
    assert mean.argmax() == 1
    assert marked(plan_of("sycoca", context_of(1, similarities=found, image_ratio=0.17)).image) == [[0]]


def test_mascot_gives_a_high_informed_and_a_low_informed_view() -> None:
    patches = torch.tensor([[0.3, 0.05, 0.2, 0.25, 0.1, 0.1]] * 2)
    words = torch.tensor([[0.9, 0.1, 0.3, 0.2, 0.25, 0.8]] * 2)
    seen = AttentionStatistics(key_attention=patches, query_attention=words)
    context = context_of(2, statistics=seen, image_ratio=0.5, text_ratio=0.5, maskable=ONE_CAPTION)
    plan = plan_of("mascot", context)
    assert [marked(image) for image in plan.images] == [[[0, 2, 3], []], [[1, 4, 5], []]]
    assert marked(plan.text) == [[2, 4], []]
    with pytest.raises(ValueError, match="key_attention and query_attention"):
        plan_of("mascot", dataclasses.replace(context, statistics=AttentionStatistics(key_attention=patches)))


def test_text_guided_goes_by_the_caption_and_not_by_its_words() -> None:
    context = context_of(2, caption_similarity=MATCH, similarities=-MATCH, image_ratio=0.34, maskable=ONE_CAPTION)
    assert marked(plan_of("text_guided", context).image) == [[0, 2], []]


# ── by the image tower ──────────────────────────────────────────────────────────────────────────────────────────────


def test_attmask_hides_what_is_attended_most_or_least() -> None:
    attention = torch.tensor([[0.1, 0.4, 0.05, 0.2, 0.15, 0.1]])
    context = context_of(1, image_attention=attention, image_ratio=0.5)
    assert marked(plan_of("attmask", context).image) == [[1, 3, 4]]
    assert marked(plan_of("attmask", context, mode="low").image) == [[0, 2, 5]]


def test_attmask_hints_are_drawn_from_the_most_attended() -> None:
    """r = 0.6 and s = 0.25 of 40 patches: the top 24 less 6 of the top 10."""
    rows, P = 4000, 40
    attention = torch.rand(P).expand(rows, P)
    rank = attention[0].argsort(descending=True)
    context = context_of(rows, (5, 8), image_attention=attention, image_ratio=0.6)
    hidden = plan_of("attmask", context, mode="hint", hint_ratio=0.25).image
    assert (hidden.sum(1) == 18).all()
    share = hidden.double().mean(0)[rank]
    assert near(share[:10], 0.4, rows)
    assert (share[10:24] == 1).all()
    assert (share[24:] == 0).all()


def planted(objects: int, background: int, noise: float, rows: int = 3, width: int = 32) -> tuple[Tensor, Tensor]:
    """(rows, P, width) features of an object and a background that share most of what they are, and where it is."""
    P = objects + background
    inside = torch.stack([torch.randperm(P) < objects for _ in range(rows)])
    one, other, common = torch.randn(3, rows, 1, width)
    return torch.where(inside[:, :, None], one, other) + 2 * common + noise * torch.randn(rows, P, width), inside


def test_self_guided_finds_the_second_eigenvector() -> None:
    for P, noise in ((36, 0.3), (196, 1.0), (577, 0.5)):
        x = F.normalize(planted(P // 4, P - P // 4, noise, rows=2)[0], dim=-1)
        found = second_eigenvector(x)
        W = 0.5 * (1 + x.double() @ x.double().mT)
        root = W.sum(2).sqrt()
        vectors = torch.linalg.eigh(W / root[:, :, None] / root[:, None]).eigenvectors
        wanted = vectors[:, :, -2] / root
        assert (F.cosine_similarity(found.double(), wanted, dim=1).abs() > 1 - 1e-5).all()


def test_self_guided_hides_the_object_first() -> None:
    features, inside = planted(12, 24, 0.3)
    for ratio, count in ((1 / 3, 12), (0.2, 7), (0.6, 21)):
        context = context_of(3, (6, 6), image_features=features, image_ratio=ratio)
        hidden = plan_of("self_guided", context, hint_ratio=0.0).image
        assert (hidden.sum(1) == count).all()
        assert ((hidden & inside).sum(1) == min(count, 12)).all()


def test_self_guided_hides_all_of_the_object_before_anything_else() -> None:
    """Also where some of the background is more like the object than some of the object is."""
    features = planted(12, 24, 3.0, rows=40)[0]
    inside = object_patches(second_eigenvector(F.normalize(features, dim=-1)))
    context = context_of(40, (6, 6), image_features=features, image_ratio=0.5)
    hidden = plan_of("self_guided", context, hint_ratio=0.0).image
    assert ((hidden & inside).sum(1) == inside.sum(1).clamp(max=18)).all()


def test_self_guided_ranks_by_relevance_to_the_object() -> None:
    features, inside = planted(12, 24, 0.3)
    x = F.normalize(features, dim=-1)
    centre = F.normalize((x * inside[:, :, None]).sum(1, keepdim=True), dim=-1)
    relevance = (x * centre).sum(-1)
    hidden = plan_of(
        "self_guided", context_of(3, (6, 6), image_features=features, image_ratio=0.2), hint_ratio=0.0
    ).image
    wanted = relevance.masked_fill(~inside, -9).topk(7).indices.sort().values
    assert marked(hidden) == wanted.tolist()


def test_self_guided_hints_come_from_the_object_and_cost_nothing() -> None:
    features, inside = planted(12, 24, 0.3, rows=1)
    rows = 2000
    context = context_of(rows, (6, 6), image_features=features.expand(rows, 36, 32), image_ratio=0.5)
    hidden = plan_of("self_guided", context, hint_ratio=0.25).image
    assert (hidden.sum(1) == 18).all()
    assert (hidden[:, inside[0]].sum(1) == 9).all()  # 12 less a quarter of them
    assert near(hidden[:, inside[0]].double().mean(0), 0.75, rows)


def test_self_guided_follows_its_patches() -> None:
    features, _ = planted(12, 24, 0.5)
    order = torch.randperm(36)
    hidden = plan_of("self_guided", context_of(3, (6, 6), image_features=features), hint_ratio=0.0).image
    moved = plan_of("self_guided", context_of(3, (6, 6), image_features=features[:, order]), hint_ratio=0.0).image
    assert torch.equal(hidden[:, order], moved)


def test_self_guided_starts_at_random_and_survives_equal_patches() -> None:
    features, _ = planted(12, 24, 0.3)
    context = context_of(3, (6, 6), image_features=features, progress=0.1)
    assert torch.equal(plan_of("self_guided", context, start=0.2).image, random_patches(context))
    assert not torch.equal(plan_of("self_guided", context, start=0.1).image, random_patches(context))
    for same in (torch.ones(3, 36, 32), torch.zeros(3, 36, 32)):
        assert (plan_of("self_guided", context_of(3, (6, 6), image_features=same)).image.sum(1) == 18).all()


def test_self_guided_object_is_the_side_of_the_largest_magnitude() -> None:
    y = torch.tensor([[-0.9, -0.8, 0.3, 0.4, 0.2], [0.9, 0.1, -0.2, -0.3, 0.8]])
    assert marked(object_patches(y)) == [[0, 1], [0, 4]]


# ── by nothing but chance ───────────────────────────────────────────────────────────────────────────────────────────


def blocks_one_by_one(context: MaskContext, row: int, min_area: int) -> set[int]:
    """The rule of ``blockwise`` as a loop over the same draws."""
    (H, W), most = context.grid, context.image_ratio * context.patches
    areas, aspects, tops, lefts = context.draws.uniform("blocks", 4, BLOCKS)[row].tolist()
    count = int(most)
    from_below = float(context.draws.uniform("direction", 1)[row]) < 0.5
    hidden: list[int] = []
    for area, aspect, top, left in zip(areas, aspects, tops, lefts, strict=True):
        area = min_area + area * max(0, most - min_area)
        aspect = 0.3 ** (1 - 2 * aspect)
        height = min(H, max(1, round((area * aspect) ** 0.5)))
        width = min(W, max(1, round((area / aspect) ** 0.5)))
        top, left = int(top * (H - height + 1)), int(left * (W - width + 1))
        block = [y * W + x for y in range(top, top + height) for x in range(left, left + width)]
        new = [patch for patch in sorted(block, reverse=from_below) if patch not in hidden]
        hidden += new[: count - len(hidden)]
    return set(hidden)


@pytest.mark.parametrize(("grid", "ratio", "min_area"), [((14, 14), 0.4, 16), ((8, 12), 0.75, 4), ((7, 5), 0.1, 16)])
def test_blockwise_adds_blocks_until_the_ratio_is_reached(grid: tuple[int, int], ratio: float, min_area: int) -> None:
    context = context_of(40, grid, image_ratio=ratio)
    hidden = plan_of("blockwise", context, min_area=min_area).image
    assert [set(row) for row in marked(hidden)] == [blocks_one_by_one(context, row, min_area) for row in range(40)]


def test_blockwise_masks_hang_together_and_lie_anywhere() -> None:
    rows, grid, ratio = 4000, (14, 14), 0.4
    context = context_of(rows, grid, image_ratio=ratio)
    assert neighbours(plan_of("blockwise", context).image, grid) > 0.85
    assert neighbours(random_patches(context), grid) < 0.45
    one = plan_of("blockwise", dataclasses.replace(context, image_ratio=16 / 196)).image
    share = one.double().mean(0).view(grid)
    for turned in (share.flip(0), share.flip(1), share.T):  # no side is preferred
        assert (share - turned).abs().max() < 0.04


def neighbours(masks: Tensor, grid: tuple[int, int]) -> float:
    """Of what lies beside a hidden patch, the share that is hidden."""
    x = masks.view(-1, *grid).double()
    beside = (x[:, 1:] * x[:, :-1]).sum() + (x[:, :, 1:] * x[:, :, :-1]).sum()
    inner = x[:, 1:].sum() + x[:, :-1].sum() + x[:, :, 1:].sum() + x[:, :, :-1].sum()
    return float(2 * beside / inner)


def spectrum(masks: Tensor, size: int) -> tuple[float, float, float]:
    """Mean power of masks at low, middle and high frequencies; 1 for white noise of the same ratio."""
    x = masks.view(-1, size, size).double()
    power = torch.fft.fft2(x - x.mean()).abs().square().mean(0) / size**2 / x.var()
    axis = torch.fft.fftfreq(size).double()
    radius = (axis[:, None] ** 2 + axis[None] ** 2).sqrt()
    bands = ((0.01, 0.07), (0.12, 0.2), (0.4, 0.75))
    low, middle, high = (float(power[(radius >= start) & (radius < end)].mean()) for start, end in bands)
    return low, middle, high


@pytest.mark.parametrize("ratio", [0.5, 0.75])
def test_colour_is_the_spectrum_of_the_masks(ratio: float) -> None:
    rows, size = 300, 24
    context = context_of(rows, (size, size), image_ratio=ratio)

    def bands(colour: str) -> tuple[float, float, float]:
        masks = plan_of("colour", context, colour=colour).image
        assert (masks.sum(1) == int(ratio * size**2)).all()
        return spectrum(masks, size)

    assert all(abs(band - 1) < 0.1 for band in spectrum(random_patches(context), size))
    low, middle, high = bands("red")
    assert low > 1.5 * middle > 1.5 * 1.5 * high
    low, middle, high = bands("blue")
    assert low < 0.75 < 1.05 < high
    low, middle, high = bands("green")
    assert middle > 1.5 * low
    assert middle > 4 * high
    low, middle, high = bands("purple")
    assert middle < 0.9 * low
    assert middle < 0.8 * high


@pytest.mark.parametrize("colour", ["green", "red", "blue", "purple"])
def test_colour_is_alike_everywhere(colour: str) -> None:
    """No border: the corner of the grid is hidden as often as its middle."""
    rows = 4000
    hidden = plan_of("colour", context_of(rows, (9, 7), image_ratio=1 / 3), colour=colour, sigma=0.8, wide=1.5).image
    share = hidden.double().mean(0).view(9, 7)
    edge = torch.cat([share[0], share[-1], share[1:-1, 0], share[1:-1, -1]]).mean()
    # a mask of a fixed count favours nothing by itself, but a blob has more patches inside than at the edge
    assert abs(float(edge / share[2:-2, 2:-2].mean()) - 1) < 0.1


def test_colour_refuses_filters_in_the_wrong_order() -> None:
    with pytest.raises(RecipeError, match=r"masking.options: wide \(1\) is not above sigma \(2\)"):
        plan_of("colour", context_of(1), sigma=2.0, wide=1.0)
    plan_of("colour", context_of(1), colour="red", sigma=2.0, wide=1.0)


def test_colour_is_not_rounded_to_bfloat16() -> None:
    context = context_of(30, (24, 24))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = plan_of("colour", context).image
    assert torch.equal(under, plan_of("colour", context).image)


@pytest.mark.parametrize("views", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("ratio", [0.1, 0.2, 0.25, 0.5, 0.6, 0.75, 0.9])
def test_disjoint_views_overlap_as_little_as_they_can(views: int, ratio: float) -> None:
    grid, P = (10, 6), 60
    context = context_of(50, grid, image_ratio=ratio)
    masks = torch.stack(plan_of("disjoint", context, views=views).images)  # (views, 50, P)
    count = int(ratio * (1 + 1e-9) * P)
    assert masks.shape == (views, 50, P)
    assert (masks.sum(2) == count).all()
    times = masks.sum(0)
    assert (times.amax(1) - times.amin(1) <= 1).all()
    if views * count <= P:
        assert (times <= 1).all()  # no patch is hidden twice
    if views * (P - count) <= P:
        assert ((~masks).sum(0) <= 1).all()  # no patch is seen twice
    if views * count >= P:
        assert (times >= 1).all()  # and all are reconstructed


def test_disjoint_views_are_each_random() -> None:
    rows = 4000
    plan = plan_of("disjoint", context_of(rows, (4, 5), image_ratio=0.3), views=3)
    for image in plan.images:
        assert near(image.double().mean(0), 0.3, rows)
        # Pairs of patches too: 0.3 * 5 / 19.
        assert near((image[:, :1] & image[:, 1:]).double().mean(0), 0.3 * 5 / 19, rows)


def test_disjoint_views_beyond_one_round_are_drawn_anew() -> None:
    first, second, third, fourth = plan_of("disjoint", context_of(50, (4, 5), image_ratio=0.5), views=4).images
    assert not (first & second | third & fourth).any()
    assert near((first & third).double().mean(), 0.25, 50 * 20)


def test_prior_draws_in_proportion_to_its_weights() -> None:
    rows, weights = 8000, torch.tensor([4.0, 0.0, 1.0, 2.0, 0.0, 3.0])
    context = context_of(rows, priors=weights.expand(rows, 6), image_ratio=1 / 6)
    for power in (1.0, 2.0, 0.5):
        share = plan_of("prior", context, power=power).image.double().mean(0)
        wanted = torch.where(weights > 0, weights**power, 0.0)
        assert near(share, wanted / wanted.sum(), rows)
    # weights of 0 come last, equals among themselves
    four, five = (plan_of("prior", dataclasses.replace(context, image_ratio=k / 6)).image for k in (4, 5))
    assert not four[:, [1, 4]].any()
    assert five[:, [0, 2, 3, 5]].all()
    assert near(five[:, [1, 4]].double().mean(0), 0.5, rows)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_prior_has_no_scale(scale: float) -> None:
    rows, weights = 300, torch.tensor([4.0, 0.0, 1.0, 2.0, 0.0, 3.0])
    plans = [
        plan_of("prior", context_of(rows, priors=(s * weights).expand(rows, 6), image_ratio=0.5), power=4.0).image
        for s in (1.0, scale)
    ]
    assert (plans[0] != plans[1]).double().mean() < 0.01  # rounding may turn a draw


def test_whole_modality_hides_one_or_the_other() -> None:
    rows = 4000
    context = context_of(rows, image_ratio=0.5, text_ratio=0.25)
    plan = plan_of("whole_modality", context, image=0.3, text=0.2)
    patches, words = plan.image.sum(1), plan.text.sum(1)
    whole_image, whole_text = patches == 6, words == 4
    assert not (whole_image & whole_text).any()
    assert near(whole_image.double().mean(), 0.3, rows)
    assert near(whole_text.double().mean(), 0.2, rows)
    assert (words[whole_image] == 0).all()  # what the image is told from is whole
    assert (patches[whole_text] == 0).all()
    usual = ~(whole_image | whole_text)
    assert (patches[usual] == 3).all()
    assert (words[usual] == 1).all()


def test_whole_modality_at_its_ends() -> None:
    context = context_of(50)
    assert plan_of("whole_modality", context, image=1.0, text=0.0).image.all()
    assert plan_of("whole_modality", context, image=0.0, text=1.0).text[:, 1:5].all()
    neither = plan_of("whole_modality", context, image=0.0, text=0.0)
    assert torch.equal(neither.image, random_patches(context))
    with pytest.raises(RecipeError, match="more than 1 together"):
        plan_of("whole_modality", context, image=0.7, text=0.4)
