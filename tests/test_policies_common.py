"""What every mask policy keeps to, whoever wrote it: exact counts, words that may be masked, the same mask for the same
sample in any company, and no waiting for the device. A policy's own property is tested where its subject is."""

from __future__ import annotations

import dataclasses
import operator
import re
import typing
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from crossmask.engine.errors import RecipeError
from crossmask.engine.masking import KEEP, Corpus, Draws, MaskContext, MaskPlan, Policy, build_policy, policies
from crossmask.engine.masking.plan import PROVIDED_BY
from crossmask.engine.recipe import MaskingSection
from crossmask.kernels import AttentionStatistics

VOCABULARY, GRID, WIDTH = 60, (6, 5), 16
P = GRID[0] * GRID[1]
CLS, SEP, PAD = 2, 3, 0

# Where a policy does not hide exactly image_ratio of the patches or text_ratio of the words, and why.
NOT_EXACT_PATCHES = {
    "attmask mode=hint": "gives hints back",
    "whole_modality": "all or none of one side",
}
NOT_EXACT_WORDS = {
    "whole_modality": "all or none of one side",
    "entity_words": "the last entity stays whole",
    "mmclip words": "the last entity stays whole",
}
# An image is chosen by its caption's words, so a caption without one hides nothing.
BY_WORDS = {"syncmask", "sycoca", "mascot", "text_guided", "mmclip"}
DETERMINISTIC = {"syncmask", "syncmask direction=two_blocks", "mascot", "mmclip"}  # nothing is drawn
# Options that a policy cannot do without, or that no list of choices would find.
ENTITIES = {"words": ["7", "11", "23", "42", "20 31"]}  # the last one, of two pieces, stands in full_context
GIVEN: dict[str, dict[str, Any]] = {"entity_words": ENTITIES}
MORE: dict[str, tuple[str, dict[str, Any]]] = {"mmclip words": ("mmclip", ENTITIES)}


def variants() -> dict[str, tuple[str, dict[str, Any]]]:
    """Every policy as it is, and with each other value of its options that are a choice of words."""
    found: dict[str, tuple[str, dict[str, Any]]] = {}
    for name, kind in policies().items():
        found[name] = (name, GIVEN.get(name, {}))
        for option, field in kind.Options.model_fields.items():
            if typing.get_origin(field.annotation) is typing.Literal:
                for value in typing.get_args(field.annotation):
                    if value != field.default:
                        found[f"{name} {option}={value}"] = (name, GIVEN.get(name, {}) | {option: value})
    return found | MORE


VARIANTS = variants()
every_policy = pytest.mark.parametrize("variant", list(VARIANTS))


def pieces(word: str) -> list[int]:
    return [int(word) if word.isdigit() else 5 + sum(map(ord, word)) % (VOCABULARY - 5)]


def corpus() -> Corpus:
    random = torch.Generator().manual_seed(5)
    captions = [torch.randint(5, VOCABULARY, (3 + i % 8,), generator=random).tolist() for i in range(80)]
    return Corpus(captions, VOCABULARY, pieces)


def policy_of(variant: str) -> Policy:
    name, options = VARIANTS[variant]
    policy = build_policy(MaskingSection(policy=name, options=options))
    policy.prepare(corpus())
    return policy


def full_context(
    rows: int = 7,
    step: int = 3,
    pad: int = 0,
    words: tuple[int, ...] = (0, 1, 3, 8, 10, 5, 7),
    grid: tuple[int, int] = GRID,
    **given: Any,
) -> MaskContext:
    """Samples of different lengths, the first without a word, with every optional input."""
    random = torch.Generator().manual_seed(1)
    L, P = max(words) + 2, grid[0] * grid[1]
    lengths = torch.tensor([words[i % len(words)] for i in range(rows)])[:, None]
    place = torch.arange(L)
    maskable = (place > 0) & (place <= lengths)
    token_mask = place <= lengths + 1
    ids = torch.randint(5, VOCABULARY, (rows, L), generator=random)
    if len(words) > 3:
        ids[3 :: len(words), 2:4] = torch.tensor([20, 31])
    ids = ids.where(maskable, torch.where(place == 0, CLS, SEP)).where(token_mask, PAD)

    def number(*shape: int) -> Tensor:
        return torch.rand(rows, *shape, generator=random)

    attention = AttentionStatistics(key_attention=number(P) / P, query_attention=number(L) / L)
    if pad:
        ids, token_mask, maskable = (torch.nn.functional.pad(x, (0, pad)) for x in (ids, token_mask, maskable))
        assert attention.query_attention is not None
        attention = dataclasses.replace(
            attention, query_attention=torch.nn.functional.pad(attention.query_attention, (0, pad), value=0.5)
        )
    defaults: dict[str, Any] = {
        "image_ratio": 0.4,
        "text_ratio": 0.3,
        "step": step,
        "progress": 0.4,
        "statistics": attention,
        "similarities": number(P) * 2 - 1,
        "caption_similarity": number(P) * 2 - 1,
        "image_attention": number(P) / P,
        "image_features": torch.randn(rows, P, WIDTH, generator=random),
        "priors": number(P),
        "patch_scores": number(P) * 4 - 2,
        "word_attention": torch.nn.functional.pad(number(L) / L, (0, pad), value=0.5),
    }
    draws = Draws(11, step, torch.arange(rows) * 17 + 4)
    return MaskContext(ids, token_mask, maskable, grid, draws, **(defaults | given))


def change(value: Any, of_tensor: Callable[[Tensor], Tensor]) -> Any:
    """A context or a plan, or a part of it, with all its tensors changed."""
    if isinstance(value, Tensor):
        return of_tensor(value)
    if isinstance(value, tuple):
        return tuple(change(part, of_tensor) for part in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return dataclasses.replace(value, **{name: change(part, of_tensor) for name, part in fields.items()})
    return value


def without_inputs(context: MaskContext, keep: tuple[str, ...] = ()) -> MaskContext:
    return dataclasses.replace(context, **{name: None for name in PROVIDED_BY if name not in keep})


def parts(plan: MaskPlan) -> list[Tensor]:
    return [*plan.images, plan.text, *([] if plan.replacement is None else [plan.replacement])]


def same(one: MaskPlan, other: MaskPlan) -> bool:
    return len(parts(one)) == len(parts(other)) and all(map(torch.equal, parts(one), parts(other)))


def expected(ratio: float | Tensor, count: Tensor) -> Tensor:
    """floor(ratio * count), at least 1 where both are positive."""
    share = torch.as_tensor(ratio, dtype=torch.float64)
    k = (share * (1 + 1e-7) * count).floor().long()
    return torch.where((share > 0) & (count > 0), k.clamp(min=1), k)


def exact(variant: str, exceptions: dict[str, str]) -> bool:
    return not {variant, VARIANTS[variant][0]} & set(exceptions)


ROW_RATIOS = torch.tensor([0.3, 0.0, 0.15, 0.55, 1.0, 0.77, 0.01])


@every_policy
@pytest.mark.parametrize("ratios", [(0.4, 0.3), (0.75, 0.15), (0.0, 0.0), (1.0, 1.0), (ROW_RATIOS, ROW_RATIOS.flip(0))])
def test_counts_are_exact(variant: str, ratios: tuple[float | Tensor, float | Tensor]) -> None:
    context = full_context(image_ratio=ratios[0], text_ratio=ratios[1])
    plan = policy_of(variant)(context)
    words = context.maskable.sum(1)
    patches = torch.full_like(words, P)
    if VARIANTS[variant][0] in BY_WORDS:
        patches = patches * (words > 0)
    if exact(variant, NOT_EXACT_PATCHES):
        for image in plan.images:
            assert image.sum(1).tolist() == expected(ratios[0], patches).tolist()
    if exact(variant, NOT_EXACT_WORDS):
        assert plan.text.sum(1).tolist() == expected(ratios[1], words).tolist()


@every_policy
@pytest.mark.parametrize("grid", [(1, 1), (1, 9), (3, 1), (14, 14), (24, 24)])
def test_any_grid(variant: str, grid: tuple[int, int]) -> None:
    plan = policy_of(variant)(full_context(grid=grid))
    for image in plan.images:
        assert image.shape == (7, grid[0] * grid[1])
        if exact(variant, NOT_EXACT_PATCHES):
            assert (image.sum(1) == max(1, int(0.4 * grid[0] * grid[1]))).int().sum() >= 6  # all but the wordless one


@every_policy
def test_no_samples_at_all(variant: str) -> None:
    plan = policy_of(variant)(change(full_context(), lambda x: x[:0]))
    assert all(len(part) == 0 for part in parts(plan))


@every_policy
def test_plan_has_the_right_form_and_hides_only_words_that_may_be(variant: str) -> None:
    context = full_context(text_ratio=0.8)
    plan = policy_of(variant)(context)
    B, L = context.token_ids.shape
    for image in plan.images:
        assert image.shape == (B, P)
        assert image.dtype == torch.bool
    assert plan.text.shape == (B, L)
    assert plan.text.dtype == torch.bool
    assert not (plan.text & ~context.maskable).any()
    if plan.replacement is not None:
        assert plan.replacement.shape == (B, L)
        assert plan.replacement.dtype == torch.int64
        assert ((plan.replacement == KEEP) | (plan.replacement >= 0) & (plan.replacement < VOCABULARY)).all()
        assert (plan.replacement[~context.token_mask] == KEEP).all()


@every_policy
def test_captions_without_a_word(variant: str) -> None:
    context = full_context(rows=3, words=(0,), text_ratio=0.5)
    context = dataclasses.replace(
        context, token_ids=torch.tensor([[CLS, SEP, PAD]] * 3), token_mask=torch.tensor([[True, True, False]] * 3)
    )
    context = dataclasses.replace(
        context,
        maskable=torch.zeros(3, 3, dtype=torch.bool),
        statistics=AttentionStatistics(key_attention=torch.zeros(3, P), query_attention=torch.zeros(3, 3)),
        word_attention=torch.zeros(3, 3),
        similarities=torch.zeros(3, P),
    )
    plan = policy_of(variant)(context)
    assert not plan.text.any()
    if VARIANTS[variant][0] in BY_WORDS:
        assert not any(image.any() for image in plan.images)


@every_policy
def test_same_numbers_same_mask_another_step_another_mask(variant: str) -> None:
    plan = policy_of(variant)(full_context())
    assert same(plan, policy_of(variant)(full_context()))
    drawn = variant not in DETERMINISTIC
    assert same(plan, policy_of(variant)(full_context(step=4))) != drawn
    of_others = dataclasses.replace(full_context(), draws=Draws(11, 3, torch.arange(7) + 900))
    assert same(plan, policy_of(variant)(of_others)) != drawn


@every_policy
def test_every_draw_is_for_a_purpose_of_its_own(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two draws for one purpose are the same numbers: what is hidden of the words would follow the patches."""
    policy, purposes, key = policy_of(variant), [], Draws.key

    def recorded(draws: Draws, purpose: str) -> int:
        purposes.append(purpose)
        return key(draws, purpose)

    monkeypatch.setattr(Draws, "key", recorded)
    policy(full_context())
    assert len(set(purposes)) == len(purposes)


@every_policy
def test_mask_does_not_depend_on_the_rest_of_the_batch(variant: str) -> None:
    context, policy = full_context(image_ratio=ROW_RATIOS, text_ratio=ROW_RATIOS.flip(0)), policy_of(variant)
    whole = policy(context)
    for rows in ([4, 2, 6, 0, 1, 3, 5], [5, 3], [2], [6, 6, 1, 6] * 9):
        pick = operator.itemgetter(rows)
        assert same(policy(change(context, pick)), change(whole, pick))


@every_policy
def test_mask_does_not_depend_on_padding(variant: str) -> None:
    plan, padded = policy_of(variant)(full_context()), policy_of(variant)(full_context(pad=9))
    L = plan.text.shape[1]
    assert all(map(torch.equal, plan.images, padded.images))
    assert torch.equal(plan.text, padded.text[:, :L])
    assert not padded.text[:, L:].any()
    if plan.replacement is not None:
        assert padded.replacement is not None
        assert torch.equal(plan.replacement, padded.replacement[:, :L])


@every_policy
def test_mask_is_the_same_under_autocast(variant: str) -> None:
    """Rounded to bfloat16, many scores tie, and ties go to the upper left."""
    policy = policy_of(variant)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = policy(full_context())
    assert same(policy(full_context()), under)


@every_policy
def test_nan_breaks_nothing(variant: str) -> None:
    context = full_context()
    spoiled = dataclasses.replace(
        context,
        **{
            name: change(getattr(context, name), lambda x: torch.full_like(x, torch.nan))
            for name in PROVIDED_BY
            if getattr(context, name) is not None
        },
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of topk_mask
        plan = policy_of(variant)(spoiled)
    assert [x.sum() for x in plan.images] == [x.sum() for x in policy_of(variant)(context).images]


@pytest.mark.parametrize("name", [name for name, kind in policies().items() if kind.needs])
def test_missing_input_names_the_policy_and_the_remedy(name: str) -> None:
    needs = policies()[name].needs
    for missing in needs:
        assert missing in PROVIDED_BY
        keep = tuple(other for other in needs if other != missing)
        with pytest.raises(RecipeError, match=f"'{name}' needs {missing}") as caught:
            policy_of(name)(without_inputs(full_context(), keep))
        assert PROVIDED_BY[missing] in str(caught.value)


@every_policy
def test_only_what_it_says_is_read(variant: str) -> None:
    """The engine computes no other input than those in ``needs``."""
    policy = policy_of(variant)
    assert same(policy(full_context()), policy(without_inputs(full_context(), policy.needs)))


class NothingComesBack(TorchDispatchMode):
    """Fails where a tensor is copied from the GPU to the host."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        to = kwargs.get("device")
        if func is torch.ops.aten._to_copy.default and to is not None and torch.device(to).type == "cpu":
            assert args[0].device.type == "cpu", "a copy from the GPU waits for it"
        return func(*args, **kwargs)


@every_policy
@pytest.mark.parametrize("ratio", [0.4, "rows"])
def test_nothing_waits_for_the_gpu(variant: str, ratio: float | str) -> None:
    """On a GPU of which nothing is known but shapes: whoever looks at a value, or makes a shape of one, raises."""
    policy = policy_of(variant)
    policy(full_context())  # what is prepared at the first call stays on the CPU
    with FakeTensorMode(allow_non_fake_inputs=True), NothingComesBack():
        ratios = {"image_ratio": ROW_RATIOS, "text_ratio": ROW_RATIOS} if ratio == "rows" else {}
        plan = policy(change(full_context(**ratios), lambda x: torch.empty(x.shape, dtype=x.dtype, device="cuda")))
        for image in plan.images:
            assert image.shape == (7, P)
            assert image.device.type == "cuda"
        assert plan.text.device.type == "cuda"


@pytest.mark.parametrize("name", list(policies()))
def test_docstring_names_its_paper_and_options_say_what_they_are(name: str) -> None:
    kind = policies()[name]
    assert re.search(r"\b(19|20)\d\d\b", kind.__doc__ or ""), "the year of its paper"
    assert "et al." in (kind.__doc__ or "")
    for option, field in kind.Options.model_fields.items():
        assert field.description, option
        assert not field.is_required(), option
    with pytest.raises(RecipeError, match="has no option 'nonsense'"):
        build_policy(MaskingSection(policy=name, options={"nonsense": 1}))


WITH_NETWORK = [name for name in policies() if policies()[name]().network(8) is not None]


def test_there_are_networks() -> None:
    assert {"hard_patches", "adamae"} <= set(WITH_NETWORK)


@pytest.mark.parametrize("name", WITH_NETWORK)
def test_network_scores_patches_and_learns_from_the_hidden_alone(name: str) -> None:
    policy = policies()[name]()
    assert "patch_scores" in policy.needs
    network = policy.network(24)
    assert network is not None
    features = torch.randn(3, P, 24)
    scores = network(features)
    assert scores.shape == (3, P)
    assert torch.allclose(network(features[1:2]), scores[1:2], atol=1e-5)

    hidden = torch.rand(3, P) < 0.5
    hidden[2] = False
    losses = torch.rand(3, P) * hidden
    loss = policy.network_loss(scores, hidden, losses)
    loss.backward()
    assert loss.ndim == 0
    assert loss.isfinite()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in network.parameters())
    assert torch.equal(policy.network_loss(scores, hidden, torch.where(hidden, losses, 9.0)), loss)
    assert policy.network_loss(scores, torch.zeros_like(hidden), losses) == 0
