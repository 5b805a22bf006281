"""Mask policies on statistics made by hand: which patches and words they hide, and which they never may."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from crossmask.engine.errors import RecipeError
from crossmask.engine.masking import (
    Draws,
    MaskContext,
    MaskPlan,
    MaskPlanner,
    Policy,
    build_policy,
    check_masking,
    policies,
    register_policy,
)
from crossmask.engine.masking import registry as registry_file
from crossmask.engine.recipe import MaskingSection, RatioSection, Recipe
from crossmask.kernels import AttentionStatistics, cross_attention

PATCHES = torch.tensor([[0.05, 0.30, 0.10, 0.20, 0.30, 0.05], [0.50, 0.10, 0.10, 0.10, 0.10, 0.10]])
WORDS = torch.tensor([[0.40, 0.05, 0.15, 0.10, 0.30, 0.0], [0.30, 0.20, 0.20, 0.30, 0.0, 0.0]])
# [CLS] w w w [SEP] [PAD] and [CLS] w w [SEP] [PAD] [PAD]: the specials weigh most, and still are not to be hidden.
MASKABLE = torch.tensor([[False, True, True, True, False, False], [False, True, True, False, False, False]])


def context(maskable: Tensor = MASKABLE, statistics: AttentionStatistics | None = None, step: int = 0) -> MaskContext:
    patches = 6 if statistics is None or statistics.key_attention is None else statistics.key_attention.shape[1]
    return MaskContext(
        token_ids=torch.full(maskable.shape, 9),
        token_mask=torch.ones_like(maskable),
        maskable=maskable,
        grid=(1, patches),
        draws=Draws(0, step, torch.arange(len(maskable))),
        statistics=statistics,
        step=step,
    )


def plan(maskable: Tensor = MASKABLE, patches: Tensor = PATCHES, words: Tensor = WORDS, **section: object) -> MaskPlan:
    planner = MaskPlanner(MaskingSection(**section), mask_id=4, vocabulary_size=20)
    return planner(context(maskable, AttentionStatistics(key_attention=patches, query_attention=words)))


def marked(mask: Tensor) -> list[list[int]]:
    assert mask.dtype == torch.bool
    return [row.nonzero()[:, 0].tolist() for row in mask]


def test_syncmask_hides_exactly_the_most_attended() -> None:
    found = plan(policy="syncmask", image_ratio=0.5, text_ratio=0.67)
    assert marked(found.image) == [[1, 3, 4], [0, 1, 2]]  # ties to the lower index
    assert marked(found.text) == [[2, 3], [1]]  # floor(0.67 * 3) and floor(0.67 * 2)


@pytest.mark.parametrize(("ratio", "words"), [(0.0, [[], []]), (0.15, [[2], [1]]), (1.0, [[1, 2, 3], [1, 2]])])
def test_syncmask_at_its_text_ratios(ratio: float, words: list[list[int]]) -> None:
    assert marked(plan(text_ratio=ratio).text) == words


@pytest.mark.parametrize(
    ("ratio", "patches"), [(0.0, [[], []]), (0.01, [[1], [0]]), (0.34, [[1, 4], [0, 1]]), (1.0, [[*range(6)]] * 2)]
)
def test_syncmask_at_its_image_ratios(ratio: float, patches: list[list[int]]) -> None:
    assert marked(plan(image_ratio=ratio).image) == patches


def test_thresholds_take_away_what_is_not_above_them() -> None:
    found = plan(image_ratio=0.5, image_threshold=0.2, text_ratio=1.0, text_threshold=0.12)
    assert marked(found.image) == [[1, 4], [0]]  # 0.20 is not above 0.20
    assert marked(found.text) == [[2], [1, 2]]
    nothing = plan(image_threshold=1.0, text_threshold=1.0)
    assert marked(nothing.image) == marked(nothing.text) == [[], []]


@pytest.mark.parametrize("policy", ["syncmask", "random"])
def test_caption_without_words_hides_no_word(policy: str) -> None:
    maskable = MASKABLE.clone()
    maskable[1] = False
    found = plan(maskable, policy=policy, text_ratio=0.5)
    assert marked(found.text)[1] == []
    assert len(marked(found.text)[0]) == 1


def test_caption_without_words_says_nothing_about_the_image() -> None:
    """No word counts, so the attention over patches is zero everywhere: the first half of the rows of the picture
    would win every tie."""
    q, k = torch.randn(2, 2, 4, 8), torch.randn(2, 2, 6, 8)
    maskable = torch.tensor([[False, True, True, False], [False, False, False, False]])
    seen = cross_attention(q, k, k, query_mask=maskable, statistics=("key_attention", "query_attention")).statistics
    found = build_policy(MaskingSection())(context(maskable, seen))
    assert [len(row) for row in marked(found.image)] == [3, 0]
    assert [len(row) for row in marked(found.text)] == [1, 0]


def test_syncmask_is_deterministic_and_follows_the_statistics() -> None:
    again = plan(image_ratio=0.5), plan(image_ratio=0.5)
    assert torch.equal(again[0].image, again[1].image)
    flipped = plan(image_ratio=0.5, patches=PATCHES.flip(1))
    assert marked(flipped.image)[0] == [1, 2, 4]


def test_syncmask_names_missing_statistics() -> None:
    with pytest.raises(ValueError, match="key_attention and query_attention"):
        build_policy(MaskingSection())(context(statistics=AttentionStatistics(key_attention=PATCHES)))
    with pytest.raises(RecipeError) as caught:
        build_policy(MaskingSection())(context())
    assert str(caught.value).startswith("mask policy 'syncmask' needs statistics, which is missing: a fusion encoder")


def test_random_masks_at_the_right_ratios_and_uniformly() -> None:
    planner = MaskPlanner(MaskingSection(policy="random", image_ratio=0.25, text_ratio=0.5), 4, 20)
    patches = torch.linspace(0, 1, 16).expand(4000, 16)  # what the attention says must not matter
    maskable = torch.tensor([False, True, True, True, True, False, False]).expand(4000, 7)
    found = planner(context(maskable, AttentionStatistics(key_attention=patches)))
    assert (found.image.sum(1) == 4).all()
    assert (found.text.sum(1) == 2).all()
    assert not (found.text & ~maskable).any()
    # Each patch is hidden with chance 1/4, standard error 0.0068; each word with 1/2, standard error 0.0079.
    assert (found.image.float().mean(0) - 0.25).abs().max() < 0.03
    assert (found.text[:, 1:5].float().mean(0) - 0.5).abs().max() < 0.035
    second = planner(context(maskable, AttentionStatistics(key_attention=patches), step=1))
    assert not torch.equal(found.image, second.image)


def test_independent_words_are_a_coin_each() -> None:
    """As ALBEF and BERT corrupt captions: counts are binomial, in place of the same share of every caption."""
    section = MaskingSection(policy="random", text_ratio=0.3, options={"independent_words": True})
    maskable = torch.tensor([False, True, True, True, True, False, False]).expand(4000, 7)
    found = MaskPlanner(section, 4, 20)(context(maskable)).text
    assert not (found & ~maskable).any()
    counts = torch.bincount(found.sum(1), minlength=5) / 4000
    binomial = torch.tensor([math.comb(4, k) * 0.3**k * 0.7 ** (4 - k) for k in range(5)])
    assert (counts - binomial).abs().max() < 0.035
    assert (found[:, 1:5].float().mean(0) - 0.3).abs().max() < 0.03
    each = MaskPlanner(
        section.model_copy(update={"text_ratio": RatioSection(kind="uniform", start=0.0, end=1.0)}), 4, 20
    )
    assert each(context(maskable)).text.sum(1).float().var() > found.sum(1).float().var()


def test_unknown_policy_names_its_neighbour() -> None:
    with pytest.raises(RecipeError) as caught:
        build_policy(MaskingSection(policy="synkmask"))
    line = "masking.policy: unknown policy 'synkmask'; did you mean 'syncmask'?"
    assert str(caught.value) == f"{line} plugins names the modules that register further ones"
    with pytest.raises(RecipeError, match=r"unknown policy 'qqqq'; known: .*random, .*syncmask"):
        build_policy(MaskingSection(policy="qqqq"))


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry_file, "_policies", dict(registry_file._policies))


@pytest.mark.usefixtures("registered")
def test_own_policy_by_its_name() -> None:
    @register_policy("nothing")
    class Nothing(Policy):
        def __call__(self, context: MaskContext) -> MaskPlan:
            return MaskPlan(torch.zeros(2, 6, dtype=torch.bool), torch.zeros_like(context.maskable))

    assert "nothing" in policies()
    assert marked(plan(policy="nothing").image) == [[], []]
    with pytest.raises(ValueError, match="'nothing' is already registered"):
        register_policy("nothing")(Nothing)


def test_list_of_policies_is_a_copy() -> None:
    policies().clear()
    assert set(policies()) >= {"random", "syncmask"}


def test_options_are_checked_by_name_and_range() -> None:
    for given, message in (
        ({"options": {"mode": "high"}}, "masking.options: policy 'syncmask' has no option 'mode'; known: direction"),
        (
            {"policy": "attmask", "options": {"mod": "low"}},
            "policy 'attmask' has no option 'mod'; did you mean 'mode'?",
        ),
        (
            {"policy": "attmask", "options": {"mode": "lo"}},
            "masking.options.mode: 'lo' is not allowed; expected one of",
        ),
        ({"text_policy": "informsk"}, "masking.text_policy: unknown policy 'informsk'; did you mean 'informask'?"),
    ):
        with pytest.raises(RecipeError) as caught:
            MaskPlanner(MaskingSection.model_validate(given), 4, 20)
        assert message in str(caught.value)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"policy": "prior"}, "mask policy 'prior' needs priors, which is missing: masking.prior provides it"),
        ({"prior": "contrast"}, "masking.prior: policy 'syncmask' reads no prior; remove it, or take 'prior'"),
        ({"text_policy": "adamae"}, "masking.text_policy: 'adamae' has a network that chooses patches; name it as"),
        ({"policy": "random", "image_threshold": 0.1}, "masking.image_threshold: policy 'random' has no threshold"),
        ({"text_policy": "pmi", "text_threshold": 0.1}, "masking.text_threshold: policy 'pmi' has no threshold"),
        ({"text_policy": "difference", "text_options": {"reference": "/gone"}}, "text_options.reference: no such file"),
    ],
)
def test_what_has_no_effect_or_no_input_is_refused(given: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        check_masking(Recipe.model_validate({"masking": given}))
    assert message in str(caught.value)


def test_a_network_that_nothing_trains_is_refused() -> None:
    recipe = Recipe.model_validate({"masking": {"policy": "adamae"}, "objectives": {"mim": {"weight": 0.0}}})
    with pytest.raises(RecipeError, match=r"'adamae' needs patch_scores.*objectives.mim"):
        check_masking(recipe)


def test_words_can_have_a_policy_of_their_own() -> None:
    found = plan(policy="syncmask", text_policy="random", image_ratio=0.5, text_ratio=0.67)
    assert marked(found.image) == [[1, 3, 4], [0, 1, 2]]
    rows = [
        plan(policy="syncmask", text_policy="random", text_ratio=0.67, words=words).text for words in (WORDS, -WORDS)
    ]
    assert torch.equal(*rows)  # what the attention says about words does not matter


def test_plan_says_what_is_read() -> None:
    found = plan(text_ratio=1.0)
    ids = torch.full(MASKABLE.shape, 9)
    read = found.read(ids)
    assert torch.equal(read[~found.text], ids[~found.text])
    with pytest.raises(ValueError, match="no replacement"):
        MaskPlan(found.image, found.text).read(ids)
