"""The contrastive captioner: one step against a float64 derivation, gradients too, and what may not reach what."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import captioner_oracle as oracle
import pytest
import torch
from sycoca_cases import LONGEST, VOCABULARY, batch, recipe, run_masks, student
from torch import Tensor

from crossmask.engine.errors import RecipeError
from crossmask.engine.models.captioner import CaptioningModel, Context
from crossmask.engine.training.caption_step import Captioned, compute_captioner_losses

CASES: list[dict[str, Any]] = [
    {},
    {"objectives__caption__low_patches": "drop", "model__captioner__image_depth": 1},
    {"objectives__caption__low_patches": "keep", "objectives__tg_mim__text": False},
    {"masking__hidden_patches": "drop"},
    {"masking__image_ratio": 0.75, "masking__options": {"side": "both", "low_ratio": 0.25}},
    {"model__captioner__norm_pre": False, "masking__image_ratio": 0.25},
]


def step(model: Any, described: Any, data: Any, rows: int | None = None) -> Captioned:
    masks = run_masks(described)
    return compute_captioner_losses(model, data, described, masks, 0, len(data) if rows is None else rows)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_step_is_what_the_formulas_say(case: dict[str, Any]) -> None:
    described, data = recipe(**case), batch()
    model = student(described)
    found = step(model, described, data)
    found.loss.backward()
    state = {name: value.detach().double().requires_grad_() for name, value in model.state_dict().items()}
    wanted = oracle.losses(state, data, described)
    for name in ("itc", "caption", "tg_mim"):
        assert found.terms[name].item() == pytest.approx(getattr(wanted, name).item(), rel=1e-5), name
    total = wanted.itc + 2 * wanted.caption + wanted.tg_mim
    assert found.loss.item() == pytest.approx(total.item(), rel=1e-5)
    total.backward()
    for name, parameter in model.named_parameters():
        gradient = state[name].grad
        mine = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        other = torch.zeros_like(mine) if gradient is None else gradient.float()
        torch.testing.assert_close(mine, other, rtol=2e-4, atol=2e-6, msg=lambda text, name=name: f"{name}: {text}")


def test_every_parameter_learns() -> None:
    described = recipe()
    model = student(described)
    step(model, described, batch()).loss.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("cls_mask", ["words", "shifted"])
@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_padding_never_matters(pool: str, cls_mask: str) -> None:
    described = recipe(model__pool=pool, model__captioner__cls_mask=cls_mask)
    model, data = student(described).model, batch()
    context = Context(torch.randn(len(data), 5, 24))
    short = data.token_ids[4:5, :7], data.token_mask[4:5, :7]
    longer = data.token_ids[4:5].clone(), data.token_mask[4:5]
    with torch.no_grad():
        one, two = (model.encode_text(*given) for given in (short, longer))
        torch.testing.assert_close(one.feature, two.feature)
        torch.testing.assert_close(one.tokens, two.tokens[:, :7])
        if cls_mask == "words":  # there the padding itself is not read, whatever stands in it
            longer[0][:, 7:] = 17
            torch.testing.assert_close(one.feature, model.encode_text(*longer).feature)
        logits = [
            model.caption_logits(text.tokens, given[1], Context(context.tokens[4:5]))
            for text, given in ((one, short), (two, longer))
        ]
        torch.testing.assert_close(logits[0], logits[1][:, :7])


def test_a_word_sees_only_those_before_it() -> None:
    model = student(recipe()).model
    data = batch()
    ids, mask = data.token_ids[2:3], data.token_mask[2:3]
    other = ids.clone()
    other[0, 5] = (ids[0, 5] - 6 + 1) % (VOCABULARY - 6) + 6
    context = Context(torch.randn(1, 5, 24))
    with torch.no_grad():
        before, after = (model.encode_text(one, mask) for one in (ids, other))
        logits = [model.caption_logits(text.tokens, mask, context) for text in (before, after)]
    torch.testing.assert_close(logits[0][:, :5], logits[1][:, :5], rtol=0, atol=0)
    assert not torch.allclose(logits[0][:, 5:], logits[1][:, 5:])
    assert not torch.allclose(before.feature, after.feature)


@pytest.mark.parametrize("hidden_patches", ["token", "drop"])
@pytest.mark.parametrize("stem", ["patch", "conv"])
def test_hidden_pixels_reach_neither_decoder(stem: str, hidden_patches: str) -> None:
    described = recipe(model__image__stem=stem, masking__hidden_patches=hidden_patches)
    model, data = student(described).model, batch()
    hidden = torch.zeros(len(data), 16, dtype=torch.bool)
    hidden[:, [1, 6, 11]] = True
    where = model.image._pixels(hidden)
    other = torch.where(where, 7.0, data.images)
    drop = hidden_patches == "drop"
    with torch.no_grad():
        text = model.encode_text(data.token_ids, data.token_mask)
        painted, logits = [], []
        for images in (data.images, other):
            seen = model.encode_image(images, hidden, drop=drop)
            painted.append(model.reconstruct(seen, text, data.token_mask))
            logits.append(model.caption_logits(text.tokens, data.token_mask, model.context(seen)))
        torch.testing.assert_close(painted[0], painted[1])
        torch.testing.assert_close(logits[0], logits[1])
        whole = [model.encode_image(images) for images in (data.images, other)]
        dropped = [model.caption_logits(text.tokens, data.token_mask, model.context(one, hidden)) for one in whole]
    assert not torch.allclose(dropped[0], dropped[1])  # dropped after the image tower they have spoken to the others
    assert not torch.allclose(whole[0].feature, whole[1].feature)


def test_the_pixels_that_are_asked_for_are_the_hidden_ones() -> None:
    """A change of the target outside of the mask changes nothing, inside it does: L1's mean over masked pixels."""
    from crossmask.engine.objectives.tg_mim import text_guided_image_modelling

    described = recipe()
    model, data = student(described).model, batch()
    hidden = torch.zeros(len(data), 16, dtype=torch.bool)
    hidden[0, 3] = hidden[2, 5] = True
    with torch.no_grad():
        text = model.encode_text(data.token_ids, data.token_mask)
        seen = model.encode_image(data.images, hidden)

        def loss(images: Tensor) -> float:
            found = text_guided_image_modelling(model, images, hidden, seen, text, data.token_mask)
            return found["tg_mim"].item()

        outside = torch.where(model.image._pixels(hidden), data.images, 9.0)
        assert loss(outside) == loss(data.images)
        far = torch.where(model.image._pixels(hidden), 1000.0, data.images)
        assert loss(far) == pytest.approx(1000, rel=0.01)
        nothing = text_guided_image_modelling(model, data.images, hidden & False, seen, text, data.token_mask)
    assert nothing["tg_mim"].item() == 0


def test_captions_without_words_hide_nothing_and_still_learn_to_end() -> None:
    described = recipe()
    model, data = student(described), batch(2)
    found = step(model, described, data)
    assert found.terms["image_mask_ratio"].item() == 0
    assert found.terms["tg_mim"].item() == 0
    assert found.terms["caption"].item() > 0
    found.loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_scores_carry_no_gradient_and_rows_limit_the_decoders() -> None:
    described = recipe(objectives__itc__weight=0.0)
    model, data = student(described), batch()
    step(model, described, data).loss.backward()
    projections = (model.model.image_projection.weight, model.model.text_projection.weight)
    assert all(p.grad is None for p in projections)
    few = step(model, recipe(), data, rows=2)
    part = step(model, recipe(), data.rows(slice(2)))
    assert few.terms["caption"].item() == pytest.approx(part.terms["caption"].item(), rel=1e-6)
    assert few.terms["itc"].item() != pytest.approx(part.terms["itc"].item(), rel=1e-3)
    assert set(step(model, recipe(), data, rows=0).terms) == {"itc", "loss", "temperature"}


@pytest.mark.parametrize("kind", ["single", "parallel", "cascade"])
@pytest.mark.parametrize("low", ["encode", "drop"])
def test_poolers_stand_between_image_and_text_decoder(kind: str, low: str) -> None:
    described = recipe(
        model__captioner__pooler={"kind": kind, "queries": 3, "heads": 2}, objectives__caption__low_patches=low
    )
    model, data = student(described), batch()
    seen = model.model.encode_image(data.images)
    context = model.model.context(seen)
    assert context.tokens.shape == (len(data), 2 if kind == "single" else 3, 8)
    assert model.model.patch_features(seen.tokens).shape == (len(data), 16, 8)
    found = step(model, described, data)
    found.loss.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    hidden = torch.zeros(len(data), 16, dtype=torch.bool)
    hidden[:, :4] = True
    loud = replace(seen, tokens=torch.where(torch.nn.functional.pad(hidden, (1, 0))[..., None], 99.0, seen.tokens))
    torch.testing.assert_close(model.model.context(loud, hidden).tokens, model.model.context(seen, hidden).tokens)


def test_the_last_position_is_the_cls_tokens_whatever_the_captions_length() -> None:
    model = student(recipe()).model
    assert model.text.position_embeddings.shape == (LONGEST + 1, 16)
    data = batch()
    text = model.encode_text(data.token_ids[:1, :2], data.token_mask[:1, :2])
    text.feature.sum().backward()
    gradient = model.text.position_embeddings.grad
    assert gradient is not None
    assert gradient.abs().sum(1).nonzero()[:, 0].tolist() == [0, 1, LONGEST]


def test_initial_weights_have_the_deviation_that_is_asked_for() -> None:
    described = recipe(model__captioner__initial_std=0.01)
    torch.manual_seed(0)
    model = CaptioningModel(described.model, VOCABULARY, LONGEST, reconstructs=True)
    for name, p in model.named_parameters():
        if p.ndim == 2 and not name.startswith(("image.vit.pos", "text.position")):
            assert p.std().item() == pytest.approx(0.01, rel=0.25), name


def test_a_model_without_the_section_says_so() -> None:
    described = recipe()
    with pytest.raises(RecipeError, match=r"model\.captioner is missing"):
        CaptioningModel(described.model.model_copy(update={"captioner": None}), VOCABULARY, LONGEST)
    model = CaptioningModel(described.model, VOCABULARY, LONGEST)
    data = batch()
    seen = model.encode_image(data.images)
    with pytest.raises(ValueError, match="no image decoder"):
        model.reconstruct(seen, None, None)
