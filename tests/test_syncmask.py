"""Synchronised masks: both directions, the block that patches read words with, and plans made within the last layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_step_masks import ROWS, VOCABULARY, batch, build, step
from torch import Tensor

from crossmask.engine.errors import RecipeError
from crossmask.engine.export_config import build_model, describe_export
from crossmask.engine.masking import Draws, MaskContext, build_policy, check_masking, reads_words
from crossmask.engine.models import PretrainingModel, VisionLanguageModel, WordReader, build_word_reader
from crossmask.engine.recipe import MaskingSection, ModelSection, Recipe
from crossmask.engine.training.mask_notice import nothing_hidden
from crossmask.kernels import AttentionStatistics

TWO = {"options": {"direction": "two_blocks"}}


def context(**given: Any) -> MaskContext:
    """Two captions of three words, [CLS] before and [SEP] behind; four patches."""
    real = torch.ones(2, 5).bool()
    words = torch.tensor([[0, 1, 1, 1, 0]] * 2).bool()
    values = {
        "statistics": AttentionStatistics(
            key_attention=torch.tensor([[0.1, 0.4, 0.2, 0.3], [0.4, 0.1, 0.3, 0.2]]),
            query_attention=torch.tensor([[0.0, 0.5, 0.3, 0.2, 0.0], [0.0, 0.2, 0.5, 0.3, 0.0]]),
        ),
        "word_attention": torch.tensor([[0.9, 0.1, 0.2, 0.7, 0.9], [0.9, 0.6, 0.1, 0.3, 0.9]]),
        "text_ratio": 0.34,
        **given,
    }
    draws = Draws(0, 0, torch.arange(2))
    return MaskContext(torch.full((2, 5), 7), real, words, (2, 2), draws, **values)


@pytest.mark.parametrize(("masking", "words"), [({}, [1, 2]), (TWO, [3, 1])])
def test_the_direction_says_whose_softmax_chooses_the_words(masking: dict[str, Any], words: list[int]) -> None:
    plan = build_policy(MaskingSection.model_validate({"policy": "syncmask", **masking}))(context())
    assert plan.text.nonzero()[:, 1].tolist() == words
    assert plan.image.nonzero()[:, 1].tolist() == [1, 3, 0, 2]  # the patches' side is the fusion layer's in both


def test_two_blocks_need_a_block_and_something_that_trains_it() -> None:
    masking = MaskingSection.model_validate(TWO)
    assert reads_words(masking)
    assert not reads_words(MaskingSection())
    assert reads_words(MaskingSection(policy="random", text_policy="syncmask", text_options=TWO["options"]))
    with pytest.raises(RecipeError, match=r"needs word_attention.*objectives\.mim"):
        build_policy(masking)(context(word_attention=None))
    recipe = Recipe.model_validate({"masking": TWO, "objectives": {"mim": {"weight": 0.0}}})
    with pytest.raises(RecipeError, match=r"word_attention, which is missing.*objectives\.mim"):
        check_masking(recipe)
    with pytest.raises(RecipeError, match="direction: 'both' is not allowed"):
        build_policy(MaskingSection(options={"direction": "both"}))


def by_hand(reader: WordReader, image: Tensor, text: Tensor, words: Tensor) -> Tensor:
    """Patch by patch, head by head, in float64."""
    attention, heads = reader.attention.double(), reader.attention.heads
    asked = attention.query(reader.norm.double()(image.double()[:, 1:]))
    keys = attention.key_value(text.double()).chunk(2, dim=-1)[0]
    q, k = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (asked, keys))
    if attention.sharpness is not None:
        q, k = (torch.nn.functional.normalize(x, dim=-1) for x in (q, k))
        q = q * (attention.sharpness * q.shape[-1] ** 0.5)[:, None, None]
    logits = (q @ k.transpose(-1, -2)) / q.shape[-1] ** 0.5
    weights = logits.masked_fill(~words[:, None, None, :], -torch.inf).softmax(-1).nan_to_num(0.0)
    return weights.mean((1, 2))


@pytest.mark.parametrize("cosine", [False, True])
def test_word_attention_is_the_mean_of_the_patches_softmax_over_words(cosine: bool) -> None:
    torch.manual_seed(2)
    reader = WordReader(16, 12, 2, qk_norm=cosine)
    image, text = 3 * torch.randn(3, 10, 16), 3 * torch.randn(3, 6, 12)
    words = torch.rand(3, 6) < 0.6
    words[2] = False  # all special: nobody is looked at
    found = reader.word_attention(image, text, words)
    assert found.dtype == torch.float32
    assert not found.requires_grad
    torch.testing.assert_close(found.double(), by_hand(reader, image, text, words), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(found.sum(1), torch.tensor([1.0, 1.0, 0.0]))
    assert (found[~words] == 0).all()
    other = image.clone()
    other[:, 0] = torch.randn(3, 16)
    assert torch.equal(found, WordReader.word_attention(reader.float(), other, text, words)) or torch.allclose(
        found, reader.word_attention(other, text, words)
    )  # the image's CLS asks nothing


def test_the_block_is_mirrored_and_trained_by_masked_images_alone() -> None:
    recipe, masks, student = build(**TWO)
    assert isinstance(student.model.word_reader, WordReader)
    assert {name.split(".")[0] for name, _ in student.patch_decoder.named_parameters()} == {
        "feed_norm", "feed_forward", "head",
    }  # fmt: skip
    teacher = VisionLanguageModel(
        recipe.model, VOCABULARY, 9, word_reader=build_word_reader(recipe.model, recipe.masking)
    )
    mirrored = {name for name, _ in teacher.named_parameters()}
    assert mirrored == {n.removeprefix("model.") for n, _ in student.named_parameters() if n.startswith("model.")}
    assert any(name.startswith("word_reader.attention.") for name in mirrored)
    loss, terms, _ = step(recipe, masks, student)
    loss.backward()
    gradient = student.model.word_reader.attention.query.weight.grad
    assert gradient is not None
    assert gradient.abs().sum() > 0
    assert terms["mim"] > 0
    recipe, masks, student = build({"mim": {"weight": 1e-30}}, **TWO)
    step(recipe, masks, student)[0].backward()
    gradient = student.model.word_reader.attention.query.weight.grad  # type: ignore[union-attr]
    assert gradient is None or gradient.abs().max() < 1e-20


def test_the_teacher_chooses_the_words_by_its_block() -> None:
    recipe, masks, student = build(**TWO)
    data = batch()
    _, _, view = step(recipe, masks, student)
    model = student.model
    with torch.no_grad():
        image, text = model.encode_image(data.images), model.encode_text(data.token_ids, data.token_mask)
        weights = model.word_attention(image.tokens, text.tokens, data.maskable)
    assert view.plan is not None
    for i in range(ROWS):
        count = int(view.plan.text[i].sum())
        assert count == max(1, int(0.4 * data.maskable[i].sum()))
        assert set(weights[i].topk(count).indices.tolist()) == set(view.plan.text[i].nonzero()[:, 0].tolist())


def test_the_block_leaves_the_other_weights_as_they_begin_without_it() -> None:
    """So that the two directions of an ablation differ in the block alone."""
    plain, two = build()[2].state_dict(), build(**TWO)[2].state_dict()
    shared = [name for name in two if name in plain and not name.startswith("patch_decoder.")]
    assert len(shared) > 20
    assert all(torch.equal(plain[name], two[name]) for name in shared)


def test_without_the_option_no_name_changes() -> None:
    _, _, student = build()
    names = [name for name, _ in student.named_parameters()]
    assert not [name for name in names if "word_reader" in name]
    assert [n for n in names if n.startswith("patch_decoder.")][:4] == [
        "patch_decoder.norm.weight", "patch_decoder.norm.bias",
        "patch_decoder.attention.query.weight", "patch_decoder.attention.query.bias",
    ]  # fmt: skip
    _, _, dropping = build(hidden_patches="drop", **TWO)
    assert dropping.model.word_reader is not None
    assert dropping.model.word_reader.self_attention is not None


@pytest.mark.parametrize("weights", ["teacher", "student"])
def test_an_export_of_it_can_be_built_again(weights: Any) -> None:
    recipe, _, student = build(**TWO)
    tensors = student.state_dict() if weights == "student" else student.model.state_dict()
    config = describe_export(recipe, weights, tensors, step=3)
    assert config.word_reader
    built = build_model(config)
    assert set(built.state_dict()) == set(tensors)
    assert isinstance(built, PretrainingModel) == (weights == "student")


# ------------------------------------------------------------------------------------- plans made within the last layer


@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize("layer", [0, -1])
@pytest.mark.parametrize("count", [0, 2])
def test_rows_chosen_by_statistics_are_those_of_the_whole_pass(norm: str, layer: int, count: int) -> None:
    section = ModelSection.model_validate(
        {
            "image": {"size": 16, "patch_size": 4, "width": 32, "depth": 1, "heads": 2},
            "text": {"width": 24, "depth": 1, "heads": 2, "dropout": 0.0},
            "fusion": {"depth": 2, "heads": 3, "dropout": 0.0, "norm": norm},
        }
    )
    torch.manual_seed(4)
    model, data = VisionLanguageModel(section, VOCABULARY, 9).eval(), batch()
    asked: list[AttentionStatistics] = []

    def choose(found: AttentionStatistics) -> Tensor:
        asked.append(found)
        assert found.query_attention is not None
        return found.query_attention.topk(count, dim=1).indices

    with torch.no_grad():
        image = model.project_image(model.encode_image(data.images).tokens)
        text = model.encode_text(data.token_ids, data.token_mask).tokens
        whole = model.fuse(text, data.token_mask, image, layer, data.maskable)
        part = model.fuse(text, data.token_mask, image, layer, data.maskable, rows=choose)
    assert len(asked) == 1
    assert part.statistics is asked[0]
    assert whole.statistics is not None
    for name in ("key_attention", "query_attention", "entropy"):
        torch.testing.assert_close(getattr(part.statistics, name), getattr(whole.statistics, name))
    assert part.tokens.shape == (ROWS, count, 24)
    places = choose(whole.statistics)[:, :, None].expand(-1, -1, 24)
    torch.testing.assert_close(part.tokens, whole.tokens.gather(1, places))


def test_rows_of_statistics_that_nobody_makes_are_refused() -> None:
    model, data = build()[2].model, batch()
    image = model.project_image(model.encode_image(data.images).tokens)
    text = model.encode_text(data.token_ids, data.token_mask).tokens
    with pytest.raises(ValueError, match="need a statistics_layer"):
        model.fuse(text, data.token_mask, image, rows=lambda found: data.token_ids[:, :1])


# --------------------------------------------------------------------------------------------------- nothing to hide


@pytest.mark.parametrize("masking", [{}, TWO])
def test_a_threshold_that_masks_nothing_costs_nothing_and_teaches_nothing(masking: dict[str, Any]) -> None:
    recipe, masks, student = build(text_threshold=1.0, image_threshold=1.0, **masking)
    loss, terms, view = step(recipe, masks, student)
    loss.backward()
    assert view.plan is not None
    assert not view.plan.text.any()
    assert not view.plan.image.any()
    assert terms["mlm"] == terms["mim"] == 0
    assert torch.isfinite(loss)


def test_it_is_said_which_side_hides_nothing_and_why() -> None:
    strict = Recipe.model_validate({"masking": {"text_threshold": 0.9, "image_threshold": 0.8}})
    assert nothing_hidden({"masked_rows": 0.5, "masked_images": 1.0}, strict) is None
    assert nothing_hidden({}, strict) is None  # nothing has been masked yet
    said = nothing_hidden({"masked_rows": 0.0, "masked_images": 1.0}, strict)
    assert said is not None
    assert "caption" in said
    assert "masking.text_threshold (0.9)" in said
    said = nothing_hidden({"masked_rows": 0.1, "masked_images": 0.0}, strict)
    assert said is not None
    assert "masking.image_threshold (0.8)" in said
    said = nothing_hidden({"masked_rows": 0.0}, Recipe())
    assert said is not None
    assert "all are special" in said
    off = Recipe.model_validate({"objectives": {"mlm": {"weight": 0.0}}})
    assert nothing_hidden({"masked_rows": 0.0}, off) is None
    assert nothing_hidden({"masked_rows": 0.0}, Recipe.model_validate({"masking": {"text_ratio": 0.0}})) is None
