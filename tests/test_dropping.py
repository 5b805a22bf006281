"""Leaving patches and words out of their encoders: what is kept, what it may know of the rest, and what it costs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from crossmask.engine.models import PretrainingModel, VisionLanguageModel
from crossmask.engine.models.dropping import gather, keep_visible, restore
from crossmask.engine.recipe import MaskingSection, ModelSection, ObjectivesSection

VOCABULARY, LENGTH, MASK = 40, 9, 4
PATCHES, DEPTH = 16, 3


def section(stem: str = "patch", pool: str = "cls", text_depth: int = 2, depth: int = DEPTH) -> ModelSection:
    """16 x 16 pixels, patches of 4. Image and text differ in width so that a mix-up fails."""
    return ModelSection.model_validate(
        {
            "image": {"size": 16, "patch_size": 4, "width": 32, "depth": depth, "heads": 2, "stem": stem},
            "text": {"width": 24, "depth": text_depth, "heads": 2, "mlp_ratio": 2.0, "dropout": 0.0},
            "fusion": {"depth": 2, "heads": 3, "mlp_ratio": 2.0, "dropout": 0.0},
            "projection_width": 8,
            "pool": pool,
        }
    )


def build(**options: object) -> VisionLanguageModel:
    torch.manual_seed(1)
    model = VisionLanguageModel(section(**options), VOCABULARY, LENGTH).eval()
    with torch.no_grad():  # weights as large as trained ones: what leaks then shows
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(4)
    return model


def images(n: int = 3) -> Tensor:
    return torch.randn(n, 3, 16, 16)


def hide(*counts: int, positions: int = PATCHES) -> Tensor:
    """(len(counts), positions) bool with so many True in each row, at random places."""
    return torch.stack([torch.randperm(positions) < count for count in counts])


def captions() -> tuple[Tensor, Tensor]:
    """[CLS] w w w w [SEP], [CLS] w w [SEP] and two pads, [CLS] w [SEP] and three pads."""
    ids = torch.tensor([[2, 10, 11, 12, 13, 3], [2, 20, 21, 3, 0, 0], [2, 30, 3, 0, 0, 0]])
    return ids, ids != 0


# ---------------------------------------------------------------------------------------- keeping, gathering, restoring


def test_kept_positions_by_hand() -> None:
    hidden = torch.tensor([[0, 1, 0, 0, 1], [1, 1, 1, 0, 1], [0, 0, 1, 1, 0]]).bool()
    found = keep_visible(hidden)
    assert found.valid is not None
    assert found.index.shape == found.valid.shape == (3, 3)
    assert all(len(set(row.tolist())) == 3 for row in found.index)  # restoring writes each position at most once
    assert [row[ok].tolist() for row, ok in zip(found.index, found.valid, strict=True)] == [[0, 2, 3], [3], [0, 1, 4]]
    even = keep_visible(hidden[[0, 2]])
    assert even.valid is None
    assert even.index.tolist() == [[0, 2, 3], [0, 1, 4]]
    assert torch.equal(keep_visible(hidden[[0, 2]], 3).index, even.index)
    behind = found.after(2)
    assert behind.valid is not None
    assert behind.index[1, :3].tolist() == [0, 1, 5]
    assert behind.valid[1].tolist() == [True, True, True, False, False]
    assert even.after(1).valid is None


def test_a_wrong_count_is_refused_instead_of_showing_what_is_hidden() -> None:
    with pytest.raises(ValueError, match="a row keeps 9 positions, not 8: pass no count where rows differ"):
        keep_visible(hide(8, 7), 8)


def test_a_known_count_reads_nothing_on_the_host() -> None:
    """Tensors without data cannot be read."""
    assert keep_visible(torch.empty(3, 7, dtype=torch.bool, device="meta"), 4).index.shape == (3, 4)


@pytest.mark.parametrize("positions", [1, 30, 77, 197, 257, 577])
@pytest.mark.parametrize("even", [True, False])
def test_restoring_undoes_gathering(positions: int, even: bool) -> None:
    k = positions // 2
    hidden = hide(k, k, k, positions=positions) if even else hide(0, positions, k, positions=positions)
    x = torch.randn(3, positions, 5, dtype=torch.float64, requires_grad=True)
    fills = [torch.randn(*shape, 5, dtype=torch.float64, requires_grad=True) for shape in ((), (positions,))]
    for fill in (*fills, torch.randn(3, positions, 5, dtype=torch.float64, requires_grad=True)):
        visible = keep_visible(hidden, positions - k if even else None)
        assert (visible.valid is None) == (even or positions == 0)
        kept = gather(x, visible)
        found = restore(kept, visible, fill, positions)
        wanted = torch.where(hidden[..., None], fill, x)
        assert torch.equal(found, wanted)
        counts = torch.ones_like(visible.index).bool() if visible.valid is None else visible.valid
        assert torch.equal(kept[counts], x[~hidden])
        weight = torch.randn_like(found)
        gradients = torch.autograd.grad((found * weight).sum(), (x, fill))
        for mine, theirs in zip(gradients, torch.autograd.grad((wanted * weight).sum(), (x, fill)), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)


def test_nothing_at_all_can_be_kept() -> None:
    hidden = torch.ones(2, 4, dtype=torch.bool)
    for visible in (keep_visible(hidden), keep_visible(hidden, 0)):
        kept = gather(torch.randn(2, 4, 3), visible)
        assert kept.shape == (2, 0, 3)
        assert (restore(kept, visible, torch.full((3,), 7.0), 4) == 7).all()
    assert keep_visible(torch.ones(0, 4, dtype=torch.bool)).index.shape == (0, 4)


# ---------------------------------------------------------------------------------------------------------- image tower


def by_hand(model: VisionLanguageModel, image: Tensor, hidden: Tensor, drop_after: int) -> Tensor:
    """One image: embed all, run the mixer on all, take the visible ones out, run the rest."""
    vit = model.image.vit
    x = vit._pos_embed(vit.patch_embed(image[None]))
    for block in vit.blocks[:drop_after]:
        x = block(x)
    x = torch.cat([x[:, :1], x[:, 1:][:, ~hidden]], 1)
    for block in vit.blocks[drop_after:]:
        x = block(x)
    return vit.norm(x)[0]


@pytest.mark.parametrize("drop_after", range(DEPTH + 1))
@pytest.mark.parametrize("counts", [(8, 8, 8), (4, 11, 0), (16, 15, 3)])
@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_blocks_read_the_visible_patches_alone(drop_after: int, counts: tuple[int, ...], pool: str) -> None:
    model, pixels, hidden = build(pool=pool), images(), hide(*counts)
    count = PATCHES - counts[0] if len(set(counts)) == 1 else None
    found = model.encode_image(pixels, hidden, drop=True, drop_after=drop_after, visible_count=count)
    assert found.visible is not None
    assert found.tokens.shape == (3, 1 + PATCHES - min(counts), 32)
    mask = found.image_mask
    assert (mask is None) == (count is not None)
    for i in range(3):
        tokens = found.tokens[i] if mask is None else found.tokens[i][mask[i]]
        wanted = by_hand(model, pixels[i], hidden[i], drop_after)
        torch.testing.assert_close(tokens, wanted, rtol=1e-4, atol=1e-5)
        pooled = wanted[0] if pool == "cls" else wanted[1:].sum(0) / max(1, len(wanted) - 1)
        feature = F.normalize(model.image_projection(pooled), dim=-1)
        torch.testing.assert_close(found.feature[i], feature, rtol=1e-4, atol=1e-5)
        alone = model.encode_image(pixels[i : i + 1], hidden[i : i + 1], drop=True, drop_after=drop_after)
        assert alone.visible is not None
        assert alone.visible.valid is None  # one row is as long as itself
        part = found.rows(slice(i, i + 1))
        assert torch.equal(part.tokens[0], found.tokens[i])
        assert torch.equal(part.feature[0], found.feature[i])
        assert mask is None or torch.equal(part.image_mask[0], mask[i])
        torch.testing.assert_close(tokens, alone.tokens[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("stem", ["patch", "conv"])
@pytest.mark.parametrize("drop_after", [0, 2])
def test_dropping_nothing_is_plain_encoding(stem: str, drop_after: int) -> None:
    model, pixels = build(stem=stem), images()
    plain = model.encode_image(pixels)
    for count in (None, PATCHES):
        hidden = torch.zeros(3, PATCHES, dtype=torch.bool)
        found = model.encode_image(pixels, hidden, drop=True, drop_after=drop_after, visible_count=count)
        assert torch.equal(found.tokens, plain.tokens)
        assert torch.equal(found.feature, plain.feature)
    assert plain.visible is None
    assert model.encode_image(pixels, drop=True).visible is None


@pytest.mark.parametrize("stem", ["patch", "conv"])
@pytest.mark.parametrize("counts", [(8, 8, 8), (4, 11, 2)])
def test_hidden_pixels_reach_nothing_but_a_mixer(stem: str, counts: tuple[int, ...]) -> None:
    model, original, hidden = build(stem=stem), images(), hide(*counts)
    pixels = hidden.view(3, 1, 4, 4).repeat_interleave(4, 2).repeat_interleave(4, 3).expand_as(original)
    other = torch.where(pixels, 50 * torch.randn_like(original), original)
    one, two = (model.encode_image(x, hidden, drop=True) for x in (original, other))
    mask = torch.ones(3, one.tokens.shape[1]).bool() if one.image_mask is None else one.image_mask
    assert torch.equal(one.tokens[mask], two.tokens[mask])
    assert torch.equal(one.feature, two.feature)
    leaf = original.clone().requires_grad_()
    model.encode_image(leaf, hidden, drop=True).feature.square().mul(torch.randn(3, 8)).sum().backward()
    assert (leaf.grad[pixels] == 0).all()
    assert (leaf.grad[~pixels] != 0).any()
    seen = [model.encode_image(x, hidden, drop=True, drop_after=1).tokens[mask] for x in (original, other)]
    assert not torch.allclose(seen[0], seen[1])  # deferred masking: the first block saw them


@contextmanager
def lengths(blocks: nn.Module) -> Iterator[list[int]]:
    """How many tokens each block reads."""
    found: list[int] = []
    hooks = [block.register_forward_pre_hook(lambda m, args: found.append(args[0].shape[1])) for block in blocks]
    yield found
    for hook in hooks:
        hook.remove()


def test_the_towers_cost_falls_with_the_ratio() -> None:
    model, pixels = build(), images()

    def cost(hidden: Tensor, drop: bool) -> int:
        with FlopCounterMode(display=False) as counter:
            model.encode_image(pixels, hidden, drop=drop)
        return counter.get_total_flops()

    half = hide(8, 8, 8)
    with lengths(model.image.vit.blocks) as found:
        model.encode_image(pixels, half)
        model.encode_image(pixels, half, drop=True)
        model.encode_image(pixels, half, drop=True, drop_after=2)
        model.encode_image(pixels, hide(4, 12, 12), drop=True)
    assert found == [17, 17, 17, 9, 9, 9, 17, 17, 9, 13, 13, 13]
    assert cost(half, False) == cost(hide(0, 0, 0), True)
    assert cost(half, True) < 0.6 * cost(half, False)
    assert cost(hide(12, 12, 12), True) < 0.4 * cost(half, False)


def test_padded_rows_in_half_precision() -> None:
    """There the CPU takes another attention, which reads masks in its own way."""
    exact, model = build(pool="mean"), build(pool="mean").bfloat16()
    pixels, hidden = images(), hide(3, 8, 12)
    found, wanted = (m.encode_image(pixels, hidden, drop=True) for m in (model, exact))
    assert found.tokens.dtype == torch.bfloat16
    torch.testing.assert_close(found.feature, wanted.feature, atol=0.06, rtol=0)
    found.tokens.float().square().sum().backward()
    assert all(p.grad.isfinite().all() for p in model.image.vit.parameters() if p.grad is not None)


@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_an_image_of_which_nothing_is_left_still_has_a_feature(pool: str) -> None:
    model = build(pool=pool)
    for counts in ((16, 16, 16), (16, 3, 0)):
        found = model.encode_image(images(), hide(*counts), drop=True)
        assert found.feature.isfinite().all()


def test_more_mixers_than_blocks_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"drop_after must lie in 0 \.\. 3, the tower's blocks, got 4"):
        build().encode_image(images(), hide(1, 1, 1), drop=True, drop_after=4)


# ----------------------------------------------------------------------------------------------------------- mask later


HIDDEN = torch.tensor([[0, 1, 0, 1, 0, 0], [0, 0, 1, 0, 0, 0], [0, 1, 0, 0, 0, 0]]).bool()


def shortened(model: VisionLanguageModel, ids: Tensor, kept: Tensor) -> Tensor:
    """One caption: the tower on its visible words at their own positions."""
    return model.text.bert(input_ids=ids[kept][None], position_ids=kept.nonzero().T).last_hidden_state[0]


@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_hidden_words_skip_the_tower(pool: str) -> None:
    model = build(pool=pool)
    ids, mask = captions()
    found = model.encode_text(ids, mask, hidden=HIDDEN)
    assert found.tokens.shape == (3, 6, 24)
    embeddings = model.text.bert.embeddings
    placeholder = embeddings.LayerNorm(
        embeddings.word_embeddings.weight[MASK]
        + embeddings.position_embeddings.weight[:6]
        + embeddings.token_type_embeddings.weight[0]
    )
    for i in range(3):
        kept = mask[i] & ~HIDDEN[i]
        wanted = shortened(model, ids[i], kept)
        torch.testing.assert_close(found.tokens[i][kept], wanted, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.tokens[i][HIDDEN[i]], placeholder[HIDDEN[i]])
        pooled = wanted[0] if pool == "cls" else wanted[1:].mean(0)
        feature = F.normalize(model.text_projection(pooled), dim=-1)
        torch.testing.assert_close(found.feature[i], feature, rtol=1e-4, atol=1e-5)
    other = ids.masked_fill(HIDDEN, 33).masked_fill(~mask, 17)  # nobody reads what stands there
    assert torch.equal(model.encode_text(other, mask, hidden=HIDDEN).tokens, found.tokens)
    moved = model.encode_text(ids, mask, hidden=HIDDEN.roll(1, 0)).tokens
    assert not torch.allclose(moved[0, 0], found.tokens[0, 0])


def test_hiding_no_word_is_plain_encoding_and_the_tower_reads_fewer() -> None:
    model = build()
    ids, mask = captions()
    with lengths(model.text.bert.encoder.layer) as found:
        plain = model.encode_text(ids, mask)
        none = model.encode_text(ids, mask, hidden=torch.zeros_like(HIDDEN))
        model.encode_text(ids, mask, hidden=HIDDEN)
        model.encode_text(ids, mask, hidden=HIDDEN | (torch.arange(6) > 1))
    assert found == [13, 13, 13, 13, 9, 9, 4, 4]  # words, one caption's behind the other's
    torch.testing.assert_close(none.tokens[mask], plain.tokens[mask])
    torch.testing.assert_close(none.feature, plain.feature)


def test_without_blocks_hidden_words_are_mask_embeddings() -> None:
    model = build(text_depth=0, pool="mean")
    ids, mask = captions()
    found = model.encode_text(ids, mask, hidden=HIDDEN)
    assert torch.equal(found.tokens, model.text(ids.masked_fill(HIDDEN, MASK), mask))
    visible = model.encode_text(ids, mask & ~HIDDEN)  # the mean leaves hidden words out
    torch.testing.assert_close(found.feature, visible.feature)


def test_a_caption_that_is_all_hidden_stays_finite() -> None:
    model = build(pool="mean")
    ids, mask = captions()
    hidden = HIDDEN.clone()
    hidden[1] = True
    for gone in (hidden, torch.ones_like(hidden)):
        model.zero_grad()
        found = model.encode_text(ids, mask, hidden=gone)
        assert found.tokens.isfinite().all()
        assert found.feature.isfinite().all()
        found.tokens.square().mul(torch.randn(3, 6, 1)).sum().backward()
        assert all(p.grad.isfinite().all() for p in model.text.parameters() if p.grad is not None)


def test_fusion_predicts_hidden_words_from_visible_ones_and_learns_the_mask_embedding() -> None:
    model = build()
    ids, mask = captions()
    text = model.encode_text(ids, mask, hidden=HIDDEN).tokens
    fused = model.fuse(text, mask, model.project_image(model.encode_image(images()).tokens)).tokens
    model.word_logits(fused[HIDDEN]).square().sum().backward()
    gradient = model.text.word_embeddings.weight.grad
    assert (gradient[MASK] != 0).any()
    assert (model.text.bert.encoder.layer[0].attention.self.query.weight.grad != 0).any()


# -------------------------------------------------------------------------------------------------------- patch decoder


def student(hidden_patches: str) -> PretrainingModel:
    torch.manual_seed(1)
    masking = MaskingSection.model_validate({"hidden_patches": hidden_patches})
    return PretrainingModel(section(), ObjectivesSection(), VOCABULARY, LENGTH, masking).eval()


def decode(model: PretrainingModel, pixels: Tensor, hidden: Tensor, drop: bool) -> Tensor:
    ids, mask = captions()
    text = model.model.encode_text(ids, mask).tokens
    return model.decode_patches(model.model.encode_image(pixels, hidden, drop=drop), text, mask)


@pytest.mark.parametrize("counts", [(8, 8, 8), (4, 11, 2)])
def test_dropped_patches_are_decoded_where_they_were(counts: tuple[int, ...]) -> None:
    model, pixels, hidden = student("drop"), images(), hide(*counts)
    found = decode(model, pixels, hidden, drop=True)
    assert found.shape == (3, 1 + PATCHES, 32)
    encoded = model.model.encode_image(pixels, hidden, drop=True)
    ids, mask = captions()
    text = model.model.encode_text(ids, mask).tokens
    tower = model.model.image
    for i in range(3):
        x = tower.mask_token + tower.vit.pos_embed[0]
        kept = F.pad(~hidden[i], (1, 0), value=True)
        x = x.masked_scatter(kept[:, None], encoded.tokens[i][: int(kept.sum())])
        wanted = model.patch_decoder(x[None], text[i : i + 1], mask[i : i + 1])[0]
        torch.testing.assert_close(found[i], wanted, rtol=1e-4, atol=1e-5)
    row = hidden[0].nonzero()[:2, 0] + 1
    assert not torch.allclose(found[0, row[0]], found[0, row[1]])  # each placeholder knows its position


def test_a_dropped_patch_is_told_from_the_visible_ones() -> None:
    model, pixels, hidden = student("drop"), images(), hide(8, 8, 8)
    seen = int((~hidden[0]).nonzero()[0])
    shown = hidden.view(3, 1, 4, 4).repeat_interleave(4, 2).repeat_interleave(4, 3)
    other = pixels.clone()
    other[0, :, 4 * (seen // 4), 4 * (seen % 4)] += 9.0
    a, b = (decode(model, x, hidden, drop=True)[:, 1:] for x in (pixels, other))
    assert not torch.allclose(a[0][hidden[0]], b[0][hidden[0]])
    assert torch.equal(a[1:], b[1:])
    unseen = torch.where(shown, torch.randn_like(pixels), pixels)
    assert torch.equal(decode(model, unseen, hidden, drop=True)[:, 1:], a)
    decode(model, pixels, hidden, drop=True).square().sum().backward()
    assert (model.model.image.mask_token.grad != 0).any()
    assert all((p.grad != 0).any() for p in model.patch_decoder.parameters() if p.ndim == 2)


def test_the_decoder_is_what_it_was_where_patches_become_a_token() -> None:
    plain, dropping = student("token"), student("drop")
    torch.manual_seed(1)
    default = PretrainingModel(section(), ObjectivesSection(), VOCABULARY, LENGTH).eval()
    assert plain.state_dict().keys() == default.state_dict().keys()
    assert all(
        torch.equal(x, y) for x, y in zip(plain.state_dict().values(), default.state_dict().values(), strict=True)
    )
    more = dropping.state_dict().keys() - plain.state_dict().keys()
    assert more
    assert all(name.startswith(("patch_decoder.self_norm.", "patch_decoder.self_attention.")) for name in more)
    pixels, hidden = images(), hide(8, 2, 0)
    ids, mask = captions()
    text = plain.model.encode_text(ids, mask).tokens
    tokens = plain.model.encode_image(pixels, hidden).tokens
    assert torch.equal(decode(plain, pixels, hidden, drop=False), plain.patch_decoder(tokens, text, mask))
