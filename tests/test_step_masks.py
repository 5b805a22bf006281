"""A training step under every way of masking: what is hidden stays hidden, and every part that should learn learns."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from crossmask.engine.data.batch import Batch
from crossmask.engine.masking import policies
from crossmask.engine.models import PretrainingModel
from crossmask.engine.objectives import Keys, RunMasks, TeacherView, look
from crossmask.engine.recipe import Recipe
from crossmask.engine.training.step import Schedule, compute_losses

VOCABULARY, MASK_ID, ROWS = 40, 4, 6
MODEL = {
    "image": {"size": 16, "patch_size": 4, "width": 32, "depth": 2, "heads": 2},
    "text": {"width": 24, "depth": 2, "heads": 2, "dropout": 0.0},
    "fusion": {"depth": 2, "heads": 3, "dropout": 0.0},
    "projection_width": 8,
}


def batch() -> Batch:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(5, VOCABULARY, (ROWS, 9), generator=generator)
    ids[:, 0], ids[:, -1] = 2, 3
    ids[0, 5:] = torch.tensor([3, 0, 0, 0])
    images = torch.randn(ROWS, 3, 16, 16, generator=generator)
    return Batch(images, ids, ids != 0, ids > 4, torch.arange(ROWS), torch.arange(ROWS))


def build(objectives: dict[str, Any] | None = None, **masking: Any) -> tuple[Recipe, RunMasks, PretrainingModel]:
    given = {"text_ratio": 0.4, **masking}
    recipe = Recipe.model_validate({"model": MODEL, "masking": given, "objectives": objectives or {}})
    tokenizer = SimpleNamespace(
        mask_id=MASK_ID,
        vocabulary_size=VOCABULARY,
        word_ids=None,
        special_ids=frozenset(range(5)),
        split=str.split,
        pieces=lambda word: [5 + len(word) % 30],
        words=lambda ids: [str(i) for i in ids],
    )
    captions = ["one two three", "two cat", "a cat sat here", "three words more"] * 5
    data = SimpleNamespace(tokenizer=tokenizer, train_size=ROWS, training_captions=lambda: captions)
    masks = RunMasks(recipe, data)  # type: ignore[arg-type]
    torch.manual_seed(1)
    model = PretrainingModel(
        recipe.model, recipe.objectives, VOCABULARY, 9, masking=recipe.masking, mask_network=masks.network()
    )
    return recipe, masks, model


def step(
    recipe: Recipe, masks: RunMasks, model: PretrainingModel, number: int = 0, head_mask: torch.Tensor | None = None
) -> tuple[torch.Tensor, dict[str, torch.Tensor], TeacherView]:
    data, schedule = batch(), Schedule.at(number, recipe)
    view = look(model.model, data, masks, number, ROWS)
    keys = Keys(view.image_feature, view.text_feature, data.group_id)
    torch.manual_seed(9)
    return (*compute_losses(model, data, view, keys, recipe, schedule, masks.planner, head_mask), view)


OPTIONS: dict[str, dict[str, Any]] = {
    "prior": {"prior": "contrast"},
    "entity_words": {"options": {"words": ["cat"]}},
    "sycoca": {"options": {"side": "both"}},
}


@pytest.mark.parametrize("policy", sorted(policies()))
def test_every_policy_trains_a_step(policy: str) -> None:
    recipe, masks, model = build(policy=policy, **OPTIONS.get(policy, {}))
    loss, terms, view = step(recipe, masks, model)
    assert torch.isfinite(loss)
    assert view.plan is not None
    assert all(torch.isfinite(value) for value in terms.values())
    assert not (view.plan.text & ~batch().maskable).any()
    loss.backward()
    assert ("mask_network" in terms) == (model.model.mask_network is not None)
    for name, parameter in model.named_parameters():
        if "mask_network" in name:
            assert parameter.grad is not None, name
            assert torch.isfinite(parameter.grad).all(), name


@pytest.mark.parametrize(
    "masking",
    [
        {"hidden_patches": "drop"},
        {"hidden_patches": "drop", "drop_after": 1},
        {"hidden_words": "later"},
        {"links": {"kind": "token_level", "rate": 0.4}},
        {"links": {"kind": "sequence_to_sequence"}},
        {"links": {"kind": "segment", "segment_words": 2}},
        {"corruption": {"rate": 0.8}},
        {"text_ratio": {"kind": "linear", "start": 0.3, "end": 0.15}},
        {"image_ratio": {"kind": "gaussian", "start": 0.55, "end": 1.0, "low": 0.5}},
        {"text_policy": "pmi"},
    ],
    ids=str,
)
def test_every_way_of_hiding_trains_every_parameter(masking: dict[str, Any]) -> None:
    recipe, masks, model = build(**masking)
    loss, _, _ = step(recipe, masks, model.train())
    loss.backward()
    without = {name for name, p in model.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all()}
    # A mask token that nothing is replaced by has nothing to learn: dropped patches join in the decoder.
    assert without == set()


def test_dropped_patches_have_no_part_in_the_encoder() -> None:
    recipe, masks, model = build(hidden_patches="drop", policy="random", image_ratio=0.75)
    seen: list[int] = []
    for block in model.model.image.vit.blocks:
        block.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[1]))
    step(recipe, masks, model)
    assert sorted(set(seen)) == [1 + 4, 1 + 16]  # MIM's pass of a quarter of 16 patches, and the intact passes


def test_patch_drop_shortens_the_students_intact_pass() -> None:
    objectives = {"itc": {"patch_drop": 0.5, "patch_drop_until": 0.5}, "mim": {"weight": 0.0}}
    recipe, masks, model = build(objectives)
    seen: list[int] = []
    model.model.image.vit.blocks[0].register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[1]))
    step(recipe, masks, model)
    assert seen == [17, 9]  # the teacher's pass, and the student's with half of the patches
    seen.clear()
    step(recipe, masks, model, number=recipe.training.max_steps // 2)  # from here on all patches stay
    assert seen == [17, 17]


def test_heads_that_are_off_get_no_gradient() -> None:
    recipe, masks, model = build(objectives={"mim": {"weight": 0.0}, "itc": {"weight": 0.0}})
    heads = torch.tensor([[True, False, True], [True, True, False]])
    step(recipe, masks, model, head_mask=heads)[0].backward()
    for layer, off in zip(model.model.fusion.layers, (1, 2), strict=True):
        gradient = layer.cross_attention.query.weight.grad.unflatten(0, (3, 8))
        assert (gradient[off] == 0).all()
        assert all((gradient[h] != 0).any() for h in range(3) if h != off)


def test_several_views_are_all_reconstructed() -> None:
    """The loss of two views is the mean of the losses of either."""
    recipe, masks, model = build(policy="sycoca", options={"side": "both"})
    both = step(recipe, masks, model)[1]["mim"]
    found = []
    for side in ("high", "low"):
        one, of_side, _ = build(policy="sycoca", options={"side": side})
        found.append(step(one, of_side, model)[1]["mim"])
    torch.testing.assert_close(both, (found[0] + found[1]) / 2)


def test_masks_are_those_of_the_samples_wherever_they_stand() -> None:
    """Two halves of a batch, as two ranks see it, get the masks of the whole."""
    for policy in ("random", "adamae", "informask", "whole_modality"):
        _, masks, model = build(policy=policy)
        data = batch()
        whole = look(model.model, data, masks, 7, ROWS).plan
        halves = [look(model.model, data.rows(rows), masks, 7, 3).plan for rows in (slice(3), slice(3, 6))]
        assert whole is not None
        for name in ("image", "text", "replacement"):
            parts = [getattr(half, name) for half in halves]
            assert torch.equal(getattr(whole, name), torch.cat(parts)), (policy, name)
