"""Towers, fusion encoder and heads at toy size: shapes, what may and may not influence what, and pairing by name."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from crossmask.engine.models import Fused, PretrainingModel, VisionLanguageModel
from crossmask.engine.recipe import ModelSection, ObjectivesSection

VOCABULARY, LENGTH = 40, 9
OBJECTIVES = ObjectivesSection()


def section(
    stem: str = "patch", pool: str = "cls", text_depth: int = 1, depth: int = 1, width: int = 32
) -> ModelSection:
    """16 x 16 pixels, patches of 4: a grid of 4 x 4. Image and text differ in width so that a mix-up fails."""
    return ModelSection.model_validate(
        {
            "image": {"size": 16, "patch_size": 4, "width": width, "depth": depth, "heads": 2, "stem": stem},
            "text": {"width": 24, "depth": text_depth, "heads": 2, "mlp_ratio": 2.0, "dropout": 0.0},
            "fusion": {"depth": 2, "heads": 3, "mlp_ratio": 2.0, "dropout": 0.0},
            "projection_width": 8,
            "pool": pool,
        }
    )


def build(**options: object) -> VisionLanguageModel:
    torch.manual_seed(1)
    return VisionLanguageModel(section(**options), VOCABULARY, LENGTH).eval()


def captions() -> tuple[Tensor, Tensor]:
    """[CLS] w w w w [SEP], [CLS] w w [SEP] and two pads, [CLS] w [SEP] and three pads."""
    ids = torch.tensor([[2, 10, 11, 12, 13, 3], [2, 20, 21, 3, 0, 0], [2, 30, 3, 0, 0, 0]])
    return ids, ids != 0


def images(n: int = 3) -> Tensor:
    return torch.randn(n, 3, 16, 16)


@pytest.mark.parametrize("stem", ["patch", "conv"])
def test_image_tower_gives_cls_and_patches(stem: str) -> None:
    model = build(stem=stem)
    found = model.encode_image(images())
    assert model.patch_grid == (4, 4)
    assert model.patch_size == 4
    assert found.tokens.shape == (3, 17, 32)
    assert found.feature.shape == (3, 8)
    torch.testing.assert_close(found.feature.norm(dim=1), torch.ones(3))


@pytest.mark.parametrize("stem", ["patch", "conv"])
def test_cls_is_the_first_token(stem: str) -> None:
    """Without attention blocks the CLS token knows nothing of the image, and each patch token of its own patch."""
    model = build(stem=stem, depth=0)
    one, two = images(2).chunk(2)
    a, b = model.encode_image(one).tokens[0], model.encode_image(two).tokens[0]
    assert torch.equal(a[0], b[0])
    assert (a[1:] != b[1:]).any(1).all()


@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_image_feature_pools_what_it_says(pool: str) -> None:
    model = build(pool=pool)
    found = model.encode_image(images())
    pooled = found.tokens[:, 0] if pool == "cls" else found.tokens[:, 1:].mean(1)
    wanted = F.normalize(model.image_projection(pooled), dim=-1)
    torch.testing.assert_close(found.feature, wanted)


def test_patches_are_numbered_row_by_row() -> None:
    """The order of the tower's tokens, of a patch mask and of ``unfold`` is one."""
    model = build(depth=0)
    plain = torch.zeros(1, 3, 16, 16)
    planted = plain.clone()
    planted[:, :, 4:8, 8:12] = 3.0  # row 1, column 2
    changed = (model.encode_image(planted).tokens != model.encode_image(plain).tokens).any(-1)[0]
    assert changed.nonzero()[:, 0].tolist() == [1 + 4 * 1 + 2]
    unfolded = F.unfold(planted, 4, stride=4).transpose(1, 2)[0]
    assert unfolded.any(1).nonzero()[:, 0].tolist() == [6]
    pixels = model.image._pixels(torch.arange(16)[None] == 6)
    assert torch.equal(pixels.expand(1, 3, 16, 16), planted > 0)


@pytest.mark.parametrize("stem", ["patch", "conv"])
def test_hidden_pixels_cannot_be_seen(stem: str) -> None:
    """A convolutional stem overlaps its neighbours, and its norm reads the whole image: neither may tell."""
    model = build(stem=stem)
    mask = torch.rand(3, 16) < 0.5
    original = images()
    hidden = mask.view(3, 1, 4, 4).repeat_interleave(4, 2).repeat_interleave(4, 3).expand_as(original)
    other = torch.where(hidden, 50 * torch.randn_like(original), original)
    assert torch.equal(model.encode_image(original, mask).tokens, model.encode_image(other, mask).tokens)
    assert not torch.equal(model.encode_image(original).tokens, model.encode_image(other).tokens)
    pixels = original.clone().requires_grad_()
    model.encode_image(pixels, mask).tokens.square().sum().backward()
    assert (pixels.grad[hidden] == 0).all()
    assert (pixels.grad[~hidden] != 0).any()


@pytest.mark.parametrize("stem", ["patch", "conv"])
def test_hidden_patches_become_the_mask_token(stem: str) -> None:
    model = build(stem=stem, depth=0)
    mask = torch.zeros(1, 16, dtype=torch.bool)
    mask[0, 5] = True
    tokens = model.encode_image(images(1), mask).tokens[0]
    wanted = model.image.vit.norm(model.image.mask_token + model.image.vit.pos_embed[0, 1 + 5])
    torch.testing.assert_close(tokens[1 + 5], wanted)
    nothing = torch.zeros(1, 16, dtype=torch.bool)
    one = images(1)
    assert torch.equal(model.encode_image(one, nothing).tokens, model.encode_image(one).tokens)


def test_mask_token_learns() -> None:
    model = build()
    mask = torch.zeros(3, 16, dtype=torch.bool)
    model.encode_image(images(), mask | (torch.arange(16) < 4)).tokens.square().sum().backward()
    assert (model.image.mask_token.grad != 0).any()


@pytest.mark.parametrize("stem", ["patch", "conv"])
def test_images_are_independent_of_their_batch(stem: str) -> None:
    model = build(stem=stem)
    batch = images()
    together = model.encode_image(batch).tokens
    torch.testing.assert_close(together[1:2], model.encode_image(batch[1:2]).tokens)


@pytest.mark.parametrize("pool", ["cls", "mean"])
@pytest.mark.parametrize("depth", [0, 2])
def test_padding_changes_no_feature(depth: int, pool: str) -> None:
    model = build(text_depth=depth, pool=pool)
    ids, mask = captions()
    short = model.encode_text(ids, mask)
    longer = model.encode_text(F.pad(ids, (0, 3)), F.pad(mask, (0, 3)))
    torch.testing.assert_close(short.feature, longer.feature)
    torch.testing.assert_close(short.tokens[mask], longer.tokens[:, :6][mask])
    garbage = torch.where(mask, ids, 7)  # what the mask hides is not read, whatever stands there
    torch.testing.assert_close(short.feature, model.encode_text(garbage, mask).feature)
    torch.testing.assert_close(short.feature.norm(dim=1), torch.ones(3))


@pytest.mark.parametrize("depth", [0, 2])
def test_captions_are_independent_of_their_batch(depth: int) -> None:
    model = build(text_depth=depth, pool="mean")
    ids, mask = captions()
    together = model.encode_text(ids, mask).feature
    for i in range(3):
        n = int(mask[i].sum())
        torch.testing.assert_close(together[i], model.encode_text(ids[i : i + 1, :n], mask[i : i + 1, :n]).feature[0])
    swapped = ids.clone()
    swapped[0, 2] = 33
    other = model.encode_text(swapped, mask).feature
    assert not torch.allclose(other[0], together[0])
    torch.testing.assert_close(other[1:], together[1:])


def test_mean_pool_of_captions_leaves_out_cls_and_pads() -> None:
    model = build(text_depth=0, pool="mean")
    ids, mask = captions()
    found = model.encode_text(ids, mask)
    for i, n in enumerate((6, 4, 3)):
        wanted = F.normalize(model.text_projection(found.tokens[i, 1:n].mean(0)), dim=-1)
        torch.testing.assert_close(found.feature[i], wanted)


def fuse(
    model: VisionLanguageModel, layer: int | None, query_mask: Tensor | None = None
) -> tuple[Fused, Tensor, Tensor]:
    ids, mask = captions()
    image, text = model.encode_image(images()).tokens, model.encode_text(ids, mask).tokens
    return model.fuse(text, mask, model.project_image(image), layer, query_mask), image, mask


@pytest.mark.parametrize(("layer", "index"), [(-1, 1), (-2, 0), (0, 0), (1, 1)])
def test_statistics_are_of_the_patches_of_the_chosen_layer(layer: int, index: int) -> None:
    """Recomputed from the layer's own weights: queries of the normalised words, keys of the image without its CLS."""
    model = build()
    asked: list[Tensor] = []
    attention = model.fusion.layers[index].cross_attention
    hook = model.fusion.layers[index].cross_norm.register_forward_hook(lambda module, args, out: asked.append(out))
    ids, mask = captions()
    words = mask & (ids > 4)
    found, image, _ = fuse(model, layer, words)
    hook.remove()
    assert len(asked) == 1
    assert found.statistics is not None
    queries = asked[0]
    if queries.ndim == 2:  # the words without padding, at which queries count nowhere
        queries = torch.zeros(3, 6, 24).index_put((mask,), queries)
    q = F.linear(queries, attention.query.weight, attention.query.bias).view(3, 6, 3, 8)
    k = F.linear(image[:, 1:], attention.key_value.weight[:24], attention.key_value.bias[:24]).view(3, 16, 3, 8)
    s = torch.einsum("blhd,bphd->bhlp", q, k) / 8**0.5
    for b in range(3):
        of_words = s[b][:, words[b]]  # (H, valid words, P)
        torch.testing.assert_close(found.statistics.key_attention[b], of_words.softmax(2).mean((0, 1)))
        torch.testing.assert_close(found.statistics.query_attention[b][words[b]], of_words.softmax(1).mean((0, 2)))
    assert found.statistics.key_attention.shape == (3, 16)
    assert (found.statistics.query_attention[~words] == 0).all()
    p = s.softmax(-1)
    torch.testing.assert_close(found.statistics.entropy, -(p * p.log()).sum(-1))
    assert not found.statistics.key_attention.requires_grad


def test_statistics_change_nothing_and_default_to_all_tokens() -> None:
    model = build()
    torch.manual_seed(5)
    plain, _, mask = fuse(model, None)
    assert plain.statistics is None
    torch.manual_seed(5)
    found, _, _ = fuse(model, -1)
    torch.manual_seed(5)
    same, _, _ = fuse(model, -1, mask)
    assert torch.equal(plain.tokens, found.tokens)
    assert torch.equal(found.statistics.key_attention, same.statistics.key_attention)


def test_layer_out_of_range_is_an_error() -> None:
    with pytest.raises(IndexError):
        fuse(build(), 2)


def test_cls_of_the_image_has_no_part_in_the_statistics_but_in_the_output() -> None:
    model = build()
    ids, mask = captions()
    image, text = model.encode_image(images()).tokens, model.encode_text(ids, mask).tokens
    moved = image.clone()
    moved[:, 0] += 10 * torch.randn(32)
    a = model.fuse(text, mask, model.project_image(image), statistics_layer=0)
    b = model.fuse(text, mask, model.project_image(moved), statistics_layer=0)
    assert torch.equal(a.statistics.key_attention, b.statistics.key_attention)
    assert not torch.allclose(a.tokens, b.tokens)


def test_an_image_projected_once_serves_all_its_captions() -> None:
    model = build()
    ids, mask = captions()
    image, text = model.encode_image(images(2)).tokens, model.encode_text(ids, mask).tokens
    pairs = torch.tensor([1, 0, 1])
    shared = [(k[pairs], v[pairs]) for k, v in model.project_image(image)]
    for (k, v), (k_own, v_own) in zip(shared, model.project_image(image[pairs]), strict=True):
        assert k.shape == v.shape == (3, 3, 17, 8)
        torch.testing.assert_close(k, k_own)
        torch.testing.assert_close(v, v_own)
    whole = model.fuse(text, mask, shared).tokens
    for i in range(3):
        single = model.fuse(text[i : i + 1], mask[i : i + 1], model.project_image(image[pairs[i]][None])).tokens
        torch.testing.assert_close(whole[i : i + 1], single)


def test_pads_do_not_influence_fused_words_or_the_match() -> None:
    for pool in ("cls", "mean"):
        model = build(pool=pool)
        ids, mask = captions()
        image, text = model.project_image(model.encode_image(images()).tokens), model.encode_text(ids, mask).tokens
        noisy = torch.where(mask[..., None], text, 9.0)
        a, b = model.fuse(text, mask, image).tokens, model.fuse(noisy, mask, image).tokens
        torch.testing.assert_close(a[mask], b[mask])
        torch.testing.assert_close(model.match_logits(a, mask), model.match_logits(b, mask))
        assert model.match_logits(a, mask).shape == (3, 2)


def test_word_decoder_is_tied_to_the_embeddings() -> None:
    model = build()
    with torch.no_grad():
        model.word_bias.copy_(torch.randn(VOCABULARY))
    rows = torch.randn(4, 24)
    wanted = model.word_head(rows) @ model.text.bert.embeddings.word_embeddings.weight.T + model.word_bias
    torch.testing.assert_close(model.word_logits(rows), wanted)
    assert model.word_logits(torch.zeros(0, 24)).shape == (0, VOCABULARY)
    model.word_logits(rows).square().sum().backward()
    assert (model.text.bert.embeddings.word_embeddings.weight.grad != 0).any()


@pytest.mark.parametrize("stem", ["patch", "conv"])
def test_teacher_and_student_pair_by_name(stem: str) -> None:
    student = PretrainingModel(section(stem=stem), OBJECTIVES, VOCABULARY, LENGTH)
    teacher = VisionLanguageModel(section(stem=stem), VOCABULARY, LENGTH)
    names = {name: parameter.shape for name, parameter in student.named_parameters()}
    paired = {f"model.{name}": parameter.shape for name, parameter in teacher.named_parameters()}
    assert paired.items() <= names.items()
    alone = names.keys() - paired.keys()
    assert "temperature" in alone
    assert all(name == "temperature" or name.startswith("patch_decoder.") for name in alone)
    assert student.temperature.shape == (1,)
    assert student.temperature.item() == pytest.approx(0.07)


@pytest.mark.parametrize(("target", "width"), [("teacher_feature", 32), ("pixel", 48), ("normalised_pixel", 48)])
def test_patch_decoder_predicts_the_target_from_patches_and_words(target: str, width: int) -> None:
    objectives = ObjectivesSection.model_validate({"mim": {"target": target}})
    student = PretrainingModel(section(), objectives, VOCABULARY, LENGTH).eval()
    ids, mask = captions()
    image, text = student.model.encode_image(images()).tokens, student.model.encode_text(ids, mask).tokens
    found = student.patch_decoder(image, text, mask)
    assert found.shape == (3, 17, width)
    noisy = torch.where(mask[..., None], text, 9.0)
    torch.testing.assert_close(found, student.patch_decoder(image, noisy, mask))  # pads are not read
    other = text.clone()
    other[0, 1] += 1.0
    changed = student.patch_decoder(image, other, mask)
    assert not torch.allclose(changed[0], found[0])  # words are
    torch.testing.assert_close(changed[1:], found[1:])


def test_visits_run_inside_forward() -> None:
    model = build()
    assert model(lambda m: m is model)
    student = PretrainingModel(section(), OBJECTIVES, VOCABULARY, LENGTH)
    assert student(lambda m: m.model.patch_grid) == (4, 4)


@pytest.mark.parametrize("stem", ["patch", "conv"])
def test_bfloat16_keeps_features_in_float32(stem: str) -> None:
    model = build(stem=stem).bfloat16()
    exact = build(stem=stem)
    ids, mask = captions()
    pixels = images()
    image, text = model.encode_image(pixels), model.encode_text(ids, mask)
    assert image.tokens.dtype == text.tokens.dtype == torch.bfloat16
    assert image.feature.dtype == text.feature.dtype == torch.float32
    torch.testing.assert_close(image.feature, exact.encode_image(pixels).feature, atol=0.05, rtol=0)
    torch.testing.assert_close(text.feature, exact.encode_text(ids, mask).feature, atol=0.05, rtol=0)
    fused = model.fuse(text.tokens, mask, model.project_image(image.tokens), -1)
    assert fused.statistics.key_attention.dtype == torch.float32
    assert model.match_logits(fused.tokens, mask).dtype == torch.float32


@pytest.mark.parametrize(("precision", "fused"), [("fp32", True), ("bf16", False), ("autocast", False)])
def test_half_precision_on_a_cpu_does_without_fused_attention(precision: str, fused: bool) -> None:
    """Whose backward has no half-precision products there."""
    tower = build().image.to(torch.bfloat16 if precision == "bf16" else torch.float32)
    images = torch.randn(2, 3, 16, 16, dtype=torch.bfloat16 if precision == "bf16" else torch.float32)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
        tower(images)
    assert [block.attn.fused_attn for block in tower.vit.blocks] == [fused] * len(tower.vit.blocks)
