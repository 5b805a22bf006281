"""The fusion encoder against itself: images shared by several texts, wanted rows alone, BERT's layers, dropout."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from crossmask.engine.errors import RecipeError
from crossmask.engine.models import VisionLanguageModel
from crossmask.engine.models.fusion import Attention, ImageIndex, KeyValue
from crossmask.engine.recipe import ModelSection

LENGTH, ROWS = 6, 3
PARTS: dict[str, ImageIndex] = {
    "own": (None,),
    "own twice": (None, None),
    "as ITM asks": (None, torch.tensor([4, 0, 1]), None),
    "numbers": (torch.tensor([1, 1, 2]), torch.tensor([3, 0, 4])),
}


def build(norm: str = "pre", dropout: float = 0.0, pool: str = "cls", **text: object) -> VisionLanguageModel:
    torch.manual_seed(1)
    section = ModelSection.model_validate(
        {
            "image": {"size": 16, "patch_size": 4, "width": 32, "depth": 1, "heads": 2},
            "text": {"width": 24, "depth": 1, "heads": 2, "mlp_ratio": 2.0, "dropout": 0.0, **text},
            "fusion": {"depth": 2, "heads": 3, "mlp_ratio": 2.0, "dropout": dropout, "norm": norm},
            "projection_width": 8,
            "pool": pool,
        }
    )
    model = VisionLanguageModel(section, 40, LENGTH).eval()
    with torch.no_grad():  # layer norms that would show where they stand
        for name, parameter in model.named_parameters():
            if "norm" in name or name.startswith("word_head.2"):
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def words(texts: int) -> tuple[Tensor, Tensor]:
    mask = torch.arange(LENGTH) < torch.randint(2, LENGTH + 1, (texts, 1))
    return torch.randn(texts, LENGTH, 24), mask


def images(model: VisionLanguageModel, count: int = 5) -> tuple[list[KeyValue], Tensor]:
    """Keys and values of so many images, which take gradients, and a mask of their tokens."""
    found = model.project_image(torch.randn(count, 17, 32).requires_grad_())
    for key, value in found:
        key.retain_grad()
        value.retain_grad()
    return found, (torch.rand(count, 17) < 0.7) | (torch.arange(17) == 0)


def by_number(index: ImageIndex) -> Tensor:
    return torch.cat([torch.arange(ROWS) if part is None else part for part in index])


@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("index", PARTS.values(), ids=PARTS)
def test_shared_images_give_what_gathered_ones_do(norm: str, masked: bool, index: ImageIndex) -> None:
    """Output and every gradient, against a copy of each pair's keys and values."""
    model = build(norm)
    text, mask = words(len(index) * ROWS)
    text.requires_grad_()
    shared, image_mask = images(model)
    heads = torch.tensor([[True, False, True], [True, True, True]])
    numbers = by_number(index)
    found = model.fuse(
        text, mask, shared, head_mask=heads, image_mask=image_mask if masked else None, image_index=index
    ).tokens
    copies = [(k[numbers], v[numbers]) for k, v in shared]
    pairs_mask = image_mask[numbers] if masked else None
    wanted = model.fuse(text, mask, copies, head_mask=heads, image_mask=pairs_mask).tokens
    torch.testing.assert_close(found, wanted, atol=2e-6, rtol=1e-5)

    weight = torch.randn_like(found) * mask[..., None]
    sources = [text, *(x for pair in shared for x in pair), *model.fusion.layers.parameters()]
    own, expected = (torch.autograd.grad((x * weight).sum(), sources, retain_graph=True) for x in (found, wanted))
    for a, b in zip(own, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize("linked", [False, True])
@pytest.mark.parametrize("index", [None, PARTS["as ITM asks"]], ids=["own", "as ITM asks"])
def test_wanted_rows_are_those_of_the_whole_output(norm: str, linked: bool, index: ImageIndex | None) -> None:
    model = build(norm)
    texts = ROWS * len(index) if index else 5
    text, mask = words(texts)
    shared, _ = images(model)
    links = (torch.rand(texts, LENGTH, LENGTH) < 0.6) | torch.eye(LENGTH, dtype=torch.bool) if linked else None
    whole = model.fuse(text, mask, shared, links=links, image_index=index).tokens
    for rows in (torch.zeros(texts, 1, dtype=torch.int64), torch.randint(LENGTH, (texts, 4))):
        found = model.fuse(text, mask, shared, links=links, image_index=index, rows=rows).tokens
        words_only = mask.gather(1, rows)[..., None]  # what comes out at padding says nothing
        found, wanted = found * words_only, whole.gather(1, rows[..., None].expand(-1, -1, 24)) * words_only
        torch.testing.assert_close(found, wanted, atol=2e-6, rtol=1e-5)
        sources = list(model.fusion.layers.parameters())
        own, expected = (torch.autograd.grad(x.square().sum(), sources, retain_graph=True) for x in (found, wanted))
        for a, b in zip(own, expected, strict=True):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    nothing = model.fuse(text, mask, shared, rows=torch.zeros(texts, 0, dtype=torch.int64), image_index=index).tokens
    assert nothing.shape == (texts, 0, 24)


def test_shared_images_are_neither_copied_nor_gathered(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the attention gets has the memory of the projection."""
    from crossmask.engine.models import fusion

    model, seen = build(), []
    shared, _ = images(model)
    whole = fusion.cross_attention

    def watch(q: Tensor, k: Tensor, v: Tensor, *others: object, **options: object) -> object:
        if k.shape[2] == 17:
            seen.append((q.shape, k.data_ptr()))
        return whole(q, k, v, *others, **options)

    monkeypatch.setattr(fusion, "cross_attention", watch)
    text, mask = words(2 * ROWS)
    model.fuse(text, mask, shared, image_index=(None, None))
    assert seen == [((ROWS, 3, 2 * LENGTH, 8), key.data_ptr()) for key, _ in shared]


def test_the_importance_of_heads_does_not_depend_on_how_images_are_shared() -> None:
    model, index = build(), PARTS["as ITM asks"]
    text, mask = words(3 * ROWS)
    text.requires_grad_()
    shared, _ = images(model)
    told = []
    for options in ({"image": shared, "image_index": index},
                    {"image": [(k[by_number(index)], v[by_number(index)]) for k, v in shared]}):  # fmt: skip
        model.fusion.record_importance()
        model.fuse(text, mask, **options).tokens.square().sum().backward(retain_graph=True)
        told.append(model.fusion.head_importance())
    torch.testing.assert_close(*told, atol=1e-5, rtol=1e-4)


def test_what_image_index_and_rows_cannot_do_is_an_error() -> None:
    model = build()
    text, mask = words(6)
    shared, _ = images(model)
    with pytest.raises(ValueError, match="leave image_index out"):
        model.fuse(text, mask, shared, -1, image_index=(None, None))
    with pytest.raises(ValueError, match="leave rows out"):
        model.fuse(text[:5], mask[:5], shared, -1, rows=torch.zeros(5, 1, dtype=torch.int64))
    for index, words_of_it in {
        (None, None, None, None): "6 texts are not 4 equal parts",
        (): "not 0 equal parts",
        (None,): "6 texts reads the first images, of which there are 5",
        (torch.zeros(2, dtype=torch.int64), None): r"\(2,\), each has 3 texts",
    }.items():
        with pytest.raises(ValueError, match=words_of_it):
            model.fuse(text, mask, shared, image_index=index)
    heads = torch.ones(2, 6, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match="same for all samples"):
        model.fuse(text, mask, shared, image_index=(None, None), head_mask=heads)


@pytest.mark.parametrize("norm", ["pre", "post"])
def test_layers_are_as_written_down(norm: str) -> None:
    """Pre: x + f(LN x), a norm at the end. Post: LN(x + f(x)), eps 1e-12, none at the end."""
    model = build(norm)
    text, mask = words(2)
    tokens = torch.randn(2, 17, 32)

    def attend(part: object, x: Tensor, source: Tensor, keys: Tensor | None) -> Tensor:
        q = F.linear(x, part.query.weight, part.query.bias).view(2, -1, 3, 8)
        k, v = (y.view(2, -1, 3, 8) for y in F.linear(source, part.key_value.weight, part.key_value.bias).chunk(2, -1))
        s = torch.einsum("bihd,bjhd->bhij", q, k) / 8**0.5
        if keys is not None:
            s = s.masked_fill(~keys[:, None, None], -torch.inf)
        out = torch.einsum("bhij,bjhd->bihd", s.softmax(-1), v).reshape(2, -1, 24)
        return F.linear(out, part.output.weight, part.output.bias)

    x = text
    for layer in model.fusion.layers:
        eps = 1e-12 if norm == "post" else 1e-5

        def normed(x: Tensor, part: object, eps: float = eps) -> Tensor:
            return F.layer_norm(x, (24,), part.weight, part.bias, eps)

        def feed(x: Tensor, part: object) -> Tensor:
            return F.linear(F.gelu(F.linear(x, part[0].weight, part[0].bias)), part[2].weight, part[2].bias)

        if norm == "post":
            x = normed(x + attend(layer.self_attention, x, x, mask), layer.self_norm)
            x = normed(x + attend(layer.cross_attention, x, tokens, None), layer.cross_norm)
            x = normed(x + feed(x, layer.feed_forward), layer.feed_norm)
        else:
            y = normed(x, layer.self_norm)
            x = x + attend(layer.self_attention, y, y, mask)
            x = x + attend(layer.cross_attention, normed(x, layer.cross_norm), tokens, None)
            x = x + feed(normed(x, layer.feed_norm), layer.feed_forward)
    if norm == "pre":
        x = F.layer_norm(x, (24,), model.fusion.norm.weight, model.fusion.norm.bias)
    else:
        assert not list(model.fusion.norm.parameters())
    fused = model.fuse(text, mask, model.project_image(tokens)).tokens
    torch.testing.assert_close(fused[mask], x[mask], atol=3e-6, rtol=1e-5)  # padding says nothing


def test_layer_norms_have_the_eps_of_their_layout() -> None:
    for norm, eps in (("post", 1e-12), ("pre", 1e-5)):
        model = build(norm)
        found = {model.word_head[2].eps, *(part.eps for layer in model.fusion.layers
                 for part in (layer.self_norm, layer.cross_norm, layer.feed_norm))}  # fmt: skip
        assert found == {eps}


def test_word_logits_are_the_decoder_behind_the_hidden_rows() -> None:
    model, rows = build("post"), torch.randn(4, 24)
    weight, bias = model.word_decoder
    assert weight is model.text.word_embeddings.weight
    assert bias is model.word_bias
    torch.testing.assert_close(model.word_logits(rows), model.word_hidden(rows) @ weight.T + bias)
    hidden = F.gelu(F.linear(rows, model.word_head[0].weight, model.word_head[0].bias))
    norm = model.word_head[2]
    torch.testing.assert_close(model.word_hidden(rows), F.layer_norm(hidden, (24,), norm.weight, norm.bias, 1e-12))


def test_attention_weights_are_dropped_while_training() -> None:
    """Uniform weights over eight keys, whose values are the axes: the output shows which weights were kept."""
    attention = Attention(8, 8, 1, dropout=0.3)
    with torch.no_grad():
        for linear in (attention.query, attention.key_value, attention.output):
            linear.weight.zero_()
            linear.bias.zero_()
        attention.key_value.weight[8:].copy_(torch.eye(8))
        attention.output.weight.copy_(torch.eye(8))
        keys = attention.project(torch.eye(8).expand(50, 8, 8))
        asked = torch.zeros(50, 6, 8)
        torch.testing.assert_close(attention.eval()(asked, keys), torch.full((50, 6, 8), 1 / 8))
        torch.manual_seed(0)
        found = attention.train()(asked, keys)
        torch.manual_seed(0)
        assert torch.equal(attention(asked, keys), found)
        assert not torch.equal(attention(asked, keys), found)
    kept = found != 0
    torch.testing.assert_close(found[kept], torch.full((int(kept.sum()),), 1 / 8 / 0.7))
    assert 0.65 < kept.float().mean() < 0.75


def test_both_attentions_drop_what_the_recipe_says() -> None:
    for layer in build(dropout=0.25).fusion.layers:
        assert layer.self_attention.dropout == layer.cross_attention.dropout == layer.dropout.p == 0.25
    text, mask = words(3)
    model = build(dropout=0.0).train()
    shared, _ = images(model, 3)
    before = torch.get_rng_state()
    model.fuse(text, mask, shared)
    assert torch.equal(torch.get_rng_state(), before), "nothing is drawn where nothing is dropped"


def test_tables_of_the_text_tower() -> None:
    model = build(positions=11, segments=2)
    assert model.text.bert.embeddings.position_embeddings.weight.shape == (11, 24)
    assert model.text.bert.embeddings.token_type_embeddings.weight.shape == (2, 24)
    assert build().text.bert.embeddings.position_embeddings.weight.shape == (LENGTH, 24)
    ids = torch.randint(5, 40, (2, 11))
    mask = torch.ones_like(ids, dtype=torch.bool)
    found = model.encode_text(ids, mask).tokens
    with torch.no_grad():
        model.text.bert.embeddings.token_type_embeddings.weight[1] += 1
    assert torch.equal(model.encode_text(ids, mask).tokens, found), "the first segment is the one that is read"
    with pytest.raises(RecipeError, match=r"model.text.positions: 5 are fewer than the 6 tokens of the longest"):
        build(positions=5)
