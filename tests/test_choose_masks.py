"""Masks of a policy without a recipe or an engine: the same as the planner's, and mistakes in one line."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from crossmask.engine.errors import RecipeError
from crossmask.engine.masking import Draws, MaskContext, MaskPlanner, build_policy, choose_masks
from crossmask.engine.recipe import MaskingSection
from crossmask.kernels import AttentionStatistics, cross_attention, topk_mask

B, L, GRID = 3, 6, (4, 5)
P = GRID[0] * GRID[1]
WORDS = torch.arange(L)[None] < torch.tensor([6, 4, 1])[:, None]


def told() -> AttentionStatistics:
    q, k = torch.randn(B, 2, L, 8), torch.randn(B, 2, P, 8)
    asked = ("key_attention", "query_attention")
    return cross_attention(q, k, k, query_mask=WORDS, statistics=asked).statistics


def test_what_is_looked_at_most_is_hidden() -> None:
    statistics = told()
    plan = choose_masks("syncmask", grid=GRID, statistics=statistics, words=WORDS, image_ratio=0.25, text_ratio=0.5)
    assert torch.equal(plan.image, topk_mask(statistics.key_attention, ratio=0.25))
    assert torch.equal(plan.text, topk_mask(statistics.query_attention, ratio=0.5, valid=WORDS))
    assert plan.image.sum(1).tolist() == [5, 5, 5]
    assert plan.text.sum(1).tolist() == [3, 2, 1]


@pytest.mark.parametrize("policy", ["random", "sycoca", "text_guided", "attmask", "blockwise"])
def test_it_is_what_the_planner_of_a_run_chooses(policy: str) -> None:
    samples = torch.tensor([7, 1, 40])
    seen = {name: torch.rand(B, P) for name in ("similarities", "caption_similarity", "image_attention")}
    plan = choose_masks(policy, grid=GRID, words=WORDS, image_ratio=0.4, seed=3, step=9, samples=samples, **seen)
    context = MaskContext(WORDS.long(), WORDS, WORDS, GRID, Draws(3, 9, samples), step=9, **seen)
    wanted = MaskPlanner(MaskingSection(policy=policy, image_ratio=0.4), 4, 100)(context)
    assert torch.equal(plan.image, wanted.image)
    assert torch.equal(plan.text, wanted.text)
    alone = choose_masks(  # a sample's mask is its own, whatever batch it stands in
        policy,
        grid=GRID,
        words=WORDS[2:],
        image_ratio=0.4,
        seed=3,
        step=9,
        samples=samples[2:],
        **{name: x[2:] for name, x in seen.items()},
    )
    assert torch.equal(alone.image, plan.image[2:])


def test_images_alone_and_options_and_thresholds() -> None:
    scores = torch.rand(B, P)
    low = choose_masks("sycoca", grid=GRID, similarities=scores, image_ratio=0.3, options={"side": "low"}).image
    assert torch.equal(low, topk_mask(scores, ratio=0.3, largest=False))
    statistics = replace(told(), query_attention=torch.rand(B, L))
    bar = float(statistics.key_attention.median())  # type: ignore[union-attr]
    plan = choose_masks(grid=GRID, statistics=statistics, image_ratio=1.0, image_threshold=bar)
    assert torch.equal(plan.image, statistics.key_attention > bar)
    assert choose_masks("random", grid=GRID, samples=torch.arange(4)).image.sum(1).tolist() == [P // 2] * 4
    own = build_policy(MaskingSection(policy="random"))
    assert torch.equal(
        choose_masks(own, grid=GRID, words=WORDS).image, choose_masks("random", grid=GRID, words=WORDS).image
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"policy": "synkmask"}, "unknown policy 'synkmask'; did you mean 'syncmask'"),
        ({"policy": "sycoca"}, "policy 'sycoca' reads similarities, which is missing; give similarities="),
        ({"policy": "sycoca", "options": {"sides": "low"}}, "has no option 'sides'; did you mean 'side'"),
        ({"similarity": torch.rand(B, P)}, "no policy reads 'similarity'; did you mean 'similarities'"),
        ({"policy": "sycoca", "similarities": torch.rand(B, 7)}, r"similarities is \(3, 7\), and a grid of \(4, 5\)"),
        ({"policy": "random", "image_threshold": 0.1}, "policy 'random' has no threshold"),
        ({"image_threshold": 2.0}, "image_threshold: 2.0: "),
        ({"policy": "random", "words": None}, "nothing says how many samples"),
        ({"policy": "term_weight"}, "policy 'term_weight' counts words before a run"),
    ],
)
def test_mistakes_are_one_line(arguments: dict[str, object], message: str) -> None:
    with pytest.raises((RecipeError, ValueError), match=message) as caught:
        choose_masks(**({"grid": GRID, "words": WORDS} | arguments))  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
