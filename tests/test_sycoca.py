"""SyCoCa's recipes: what each switch does, what goes together with a captioner, and what a finished model can do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from sycoca_cases import LONGEST, OFF, VOCABULARY, batch, changed, recipe, run_masks, student
from torch import Tensor

from crossmask.engine.ablation.description import load_ablation
from crossmask.engine.data.batch import Batch
from crossmask.engine.errors import RecipeError
from crossmask.engine.evaluation.captioner_measures import captioner_measures
from crossmask.engine.evaluation.masks import mask_measures
from crossmask.engine.evaluation.reconstructions import paint
from crossmask.engine.export_config import build_model, describe_export
from crossmask.engine.masking import check_masking
from crossmask.engine.models.captioner import CaptioningModel
from crossmask.engine.models.captioner_blocks import AttentionalPooler
from crossmask.engine.objectives.captioning import image_captioning
from crossmask.engine.objectives.tg_mim import patch_pixels
from crossmask.engine.recipe import ObjectivesSection, Recipe
from crossmask.engine.recipe_files import load_recipe
from crossmask.engine.training.caption_step import compute_captioner_losses

ALWAYS, MASKED = {"loss", "temperature"}, {"image_mask_ratio", "masked_images"}
RANDOM = {"masking__policy": "random", "masking__options": {"low_ratio": 0.5}}


def terms(described: Recipe, data: Batch | None = None, seed: int = 1) -> dict[str, Tensor]:
    data = batch() if data is None else data
    return compute_captioner_losses(student(described, seed), data, described, run_masks(described), 0, len(data)).terms


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"objectives__caption__weight": 0.0, "objectives__tg_mim__weight": 0.0}, {"itc"}),
        ({"objectives__caption__low_patches": "keep", "objectives__tg_mim__weight": 0.0}, {"itc", "caption"}),
        ({"objectives__tg_mim__text": False}, {"itc", "caption", "tg_mim", "low_mask_ratio"} | MASKED),
        ({}, {"itc", "caption", "tg_mim", "low_mask_ratio"} | MASKED),
        (RANDOM, {"itc", "caption", "tg_mim", "low_mask_ratio"} | MASKED),
        ({"objectives__itc__weight": 0.0}, {"caption", "tg_mim", "low_mask_ratio"} | MASKED),
    ],
)
def test_a_switch_says_what_it_computes(changes: dict[str, Any], names: set[str]) -> None:
    found = terms(recipe(**changes))
    assert set(found) == ALWAYS | names
    assert all(value.isfinite() and not value.requires_grad for value in found.values())


@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.75])
@pytest.mark.parametrize("policy", ["sycoca", "random"])
def test_high_and_low_have_ratios_of_their_own(policy: str, ratio: float) -> None:
    options = {"low_ratio": ratio} | ({"side": "both"} if policy == "sycoca" else {})
    words = batch()
    words = words.rows(slice(2, None))  # those that have words
    found = terms(recipe(masking__policy=policy, masking__options=options, masking__image_ratio=1 - ratio), words)
    assert found["low_mask_ratio"].item() == ratio
    assert found["image_mask_ratio"].item() == 1 - ratio


@pytest.mark.parametrize("weight", [0.1, 0.5, 1.0, 2.0])
def test_the_loss_is_the_weighted_sum(weight: float) -> None:
    found = terms(recipe(objectives__tg_mim__weight=weight))
    wanted = found["itc"] + 2 * found["caption"] + weight * found["tg_mim"]
    assert found["loss"].item() == pytest.approx(wanted.item(), rel=1e-6)


def test_words_and_low_patches_matter_where_they_are_asked_for() -> None:
    whole = terms(recipe())
    assert terms(recipe(objectives__tg_mim__text=False))["tg_mim"] != whole["tg_mim"]
    losses = {how: terms(recipe(objectives__caption__low_patches=how))["caption"] for how in ("encode", "drop", "keep")}
    assert len({value.item() for value in losses.values()}) == 3
    attentive, random = terms(recipe()), terms(recipe(**RANDOM))
    assert attentive["tg_mim"] != random["tg_mim"]
    assert attentive["itc"] == random["itc"]


def test_masks_that_draw_are_a_matter_of_the_step_alone() -> None:
    described, data = recipe(**RANDOM), batch()
    model, masks = student(described), run_masks(described)
    at = [compute_captioner_losses(model, data, described, masks, step, len(data)).terms for step in (3, 3, 4)]
    assert at[0]["tg_mim"] == at[1]["tg_mim"] != at[2]["tg_mim"]


# a pooler's runs in a step: of the feature and of the context, where that reads something else
@pytest.mark.parametrize(("kind", "runs"), [("single", (1, 2, 2)), ("cascade", (2, 3, 3)), ("parallel", (2, 2, 2))])
def test_what_nobody_reads_is_not_computed(kind: str, runs: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[int] = []
    forward = AttentionalPooler.forward

    def counted(self: AttentionalPooler, tokens: Tensor, key_mask: Tensor | None = None) -> Tensor:
        ran.append(len(tokens))
        return forward(self, tokens, key_mask)

    monkeypatch.setattr(AttentionalPooler, "forward", counted)
    pooler = {"kind": kind, "queries": 3, "heads": 2}
    for how, times in zip(("keep", "drop", "encode"), runs, strict=True):
        ran.clear()
        described, data = recipe(model__captioner__pooler=pooler, objectives__caption__low_patches=how), batch()
        made = student(described)
        found = compute_captioner_losses(made, data, described, run_masks(described), 0, 4)
        assert len(ran) == times, how
        if how == "keep":  # what is used twice is what would be computed twice
            model = made.model
            seen = model.encode_image(data.images)
            bare = model.encode_image(data.images, feature=False)
            assert bare.feature.shape == (len(data), 0)
            assert torch.equal(model.context(seen.rows(slice(4))).tokens, model.context(bare.rows(slice(4))).tokens)
            words = model.encode_text(data.token_ids, data.token_mask).rows(slice(4))
            part = data.rows(slice(4))
            anew = image_captioning(model, words, model.context(bare.rows(slice(4))), part.token_ids, part.token_mask)
            assert anew["caption"] == found.terms["caption"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.captioner": None}, "objectives.caption needs a captioner: add model.captioner, or set"),
        ({"model.captioner": None, "objectives.caption": {"weight": 0.0}}, "objectives.tg_mim needs a captioner"),
        ({"objectives.itm.weight": 1.0}, "objectives.itm needs a fusion encoder, which a captioner has none of: set"),
        ({"objectives.mlm": {}}, "objectives.mlm needs a fusion encoder"),
        ({"objectives.mim": {}}, "objectives.mim needs a fusion encoder"),
        ({"objectives.itc": {"distillation": 0.0}}, r"queue_length \(65536\): a captioner contrasts .*; set it to 0"),
        ({"objectives.itc": {"queue_length": 0}}, r"distillation \(0.4\): a captioner's teacher gives no labels"),
        ({"masking.hidden_words": "later"}, "masking.hidden_words .*; set it to token"),
        ({"model.captioner.heads": 3}, r"model.text.width \(16\) is not a multiple of model.captioner.heads \(3\)"),
        ({"model.captioner.heads": 16}, r"model.image.width \(24\) is not a multiple of model.captioner.heads \(16\)"),
        ({"model.captioner.pooler": {"heads": 3}}, r"model.projection_width \(8\) is not a multiple .*pooler.heads"),
        ({f"objectives.{name}.weight": 0.0 for name in ("itc", "caption", "tg_mim")}, "every weight"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_one_clear_line(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Recipe.model_validate(changed(changes))


def test_policies_without_low_patches_or_without_their_input_are_told() -> None:
    with pytest.raises(RecipeError, match=r"low_patches \(encode\): masking.policy 'random' gives no low patches"):
        check_masking(recipe(masking__policy="random", masking__options={}))
    with pytest.raises(RecipeError, match="gives no low patches"):
        check_masking(recipe(masking__options={"side": "high"}))
    check_masking(recipe(masking__options={"side": "high"}, objectives__caption__low_patches="keep"))
    with pytest.raises(RecipeError, match="needs statistics, which is missing: a fusion encoder"):
        check_masking(recipe(masking__policy="syncmask", masking__options={}))


def test_recipes_without_a_captioner_are_what_they_were() -> None:
    plain = Recipe()
    assert (plain.objectives.caption.weight, plain.objectives.tg_mim.weight, plain.model.captioner) == (0, 0, None)
    given = ObjectivesSection.model_validate({"caption": {}, "tg_mim": {}, **OFF})
    assert (given.caption.weight, given.tg_mim.weight) == (2, 1)


@pytest.mark.parametrize("name", ["sycoca", "sycoca-emoji"])
def test_shipped_recipes_have_the_papers_numbers(name: str, tmp_path: Path) -> None:
    (tmp_path / "pairs.json").write_text("[]")
    described = load_recipe(name, [f"data.path={tmp_path / 'pairs.json'}"] if name == "sycoca" else [])
    o = described.objectives
    assert (o.itc.weight, o.caption.weight, o.tg_mim.weight) == (1, 2, 1)
    assert described.masking.policy == "sycoca"
    check_masking(described)


def test_the_shipped_ablation_can_be_run() -> None:
    ablation = load_ablation("sycoca-emoji")
    known = {variant.name for variant in ablation.variants}
    assert {"itc", "coca", "mim", "tg-mim-random", "tg-mim", "sycoca-random", "sycoca"} <= known
    for variant in ablation.variants:
        check_masking(load_recipe(ablation.recipe, ablation.changes(variant)))


def look(described: Recipe) -> Any:
    masks = run_masks(described)

    def see(model: Any, data: Batch) -> Any:
        seen = masks.see(model, data)
        return seen, masks.plan(model, data, seen, 0)

    return see


def test_measures_of_held_out_pairs() -> None:
    described, data = recipe(), batch().rows(slice(2, None))
    model = student(described).model
    found = captioner_measures(model, data, look(described), described, "cpu")
    step = terms(recipe(objectives__caption__low_patches="keep"), data)
    assert found["caption_loss"] == pytest.approx(step["caption"].item(), rel=1e-5)
    assert found["reconstruction"] == pytest.approx(step["tg_mim"].item(), rel=1e-5)
    assert found["reconstruction_other"] != found["reconstruction"]
    assert found["caption_loss_other"] != found["caption_loss"]
    things = torch.zeros(len(data), 16, 16, dtype=torch.uint8)
    things[:, :8] = 1
    words = torch.where(data.maskable, 1, 0).to(torch.uint8)
    known = Batch(data.images, data.token_ids, data.token_mask, data.maskable, data.group_id, data.index, things, words)
    masks = mask_measures(model, known, look(described), -1, "cpu")
    assert masks["on_drawing_random"] == masks["pointing_random"] == 0.5
    assert 0 <= masks["on_named"] <= 1
    low = captioner_measures(model, known, look(described), described, "cpu")["low_on_drawing"]
    assert low == pytest.approx(1 - masks["on_drawing"])  # half is high and half is low


def test_measures_of_pairs_that_do_not_fill_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    described, data = recipe(), batch(8).rows(slice(2, None))  # which begins with those that have words
    model = student(described).model
    monkeypatch.setattr("crossmask.engine.evaluation.captioner_measures.CHUNK", 3)
    seen: list[int] = []

    def watched(model: Any, part: Batch) -> Any:
        seen.append(len(part))
        return look(described)(model, part)

    for count, parts in ((6, [3, 3]), (4, [2, 2]), (5, [3, 2]), (2, [2])):
        seen.clear()
        found = captioner_measures(model, data.rows(slice(count)), watched, described, "cpu")
        assert seen == parts
        assert {"caption_loss_other", "reconstruction_other"} < found.keys()
    alone = captioner_measures(model, data.rows(slice(1)), watched, described, "cpu")
    assert "caption_loss" in alone
    assert "reconstruction" in alone
    assert not any(name.endswith("_other") for name in alone)


def test_painting_replaces_the_hidden_patches_alone() -> None:
    data = batch()
    hidden = torch.zeros(len(data), 16, dtype=torch.bool)
    hidden[:, 5] = True
    pixels = patch_pixels(data.images, 4)
    assert torch.equal(paint(data.images, pixels, hidden, 4), data.images)
    painted = paint(data.images, pixels * 0, hidden, 4)
    assert (painted[:, :, 4:8, 4:8] == 0).all()
    assert torch.equal(painted[:, :, 8:], data.images[:, :, 8:])


@pytest.mark.parametrize("pool", ["cls", "mean"])
@pytest.mark.parametrize("weights", ["teacher", "student"])
def test_an_export_says_what_it_is(weights: Any, pool: str) -> None:
    described = recipe(model__pool=pool)
    model = student(described)
    tensors = dict(model.model.state_dict() if weights == "teacher" else model.state_dict())
    config = describe_export(described, weights, tensors, 3)
    assert (config.vocabulary_size, config.max_length) == (VOCABULARY, LONGEST)
    built = build_model(config)
    built.load_state_dict(tensors)
    shared = built if weights == "teacher" else built.model
    assert isinstance(shared, CaptioningModel)
    data = batch()
    wanted = model.model.encode_text(data.token_ids, data.token_mask).feature
    assert torch.equal(shared.eval().encode_text(data.token_ids, data.token_mask).feature, wanted)
    assert shared.image_decoder is not None
