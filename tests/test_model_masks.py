"""Who may look at what in a model, and what its towers and heads tell about it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from crossmask.engine.errors import RecipeError
from crossmask.engine.models import PretrainingModel, VisionLanguageModel
from crossmask.engine.recipe import ModelSection, ObjectivesSection

VOCABULARY, LENGTH = 40, 9
OBJECTIVES = ObjectivesSection()


def section(pool: str = "cls", text_depth: int = 1, depth: int = 1) -> ModelSection:
    """16 x 16 pixels, patches of 4. Image and text differ in width so that a mix-up fails."""
    return ModelSection.model_validate(
        {
            "image": {"size": 16, "patch_size": 4, "width": 32, "depth": depth, "heads": 2},
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


def images() -> Tensor:
    return torch.randn(3, 3, 16, 16)


def causal(length: int, rows: int = 3) -> Tensor:
    return torch.ones(length, length).tril().bool().expand(rows, -1, -1)


@pytest.mark.parametrize("where", ["tower", "fusion"])
def test_links_say_who_looks_at_whom(where: str) -> None:
    model = build(text_depth=2)
    ids, mask = captions()
    image = model.project_image(model.encode_image(images()).tokens)

    def read(token_ids: Tensor, links: Tensor | None) -> Tensor:
        if where == "tower":
            return model.encode_text(token_ids, mask, links=links).tokens
        embedded = model.text.bert.embeddings(input_ids=token_ids)
        return model.fuse(embedded, mask, image, links=links).tokens

    other = ids.clone()
    other[0, 3] = 33
    plain, links = read(ids, None), causal(6)
    torch.testing.assert_close(read(ids, torch.ones(3, 6, 6).bool())[mask], plain[mask])
    a, b = read(ids, links), read(other, links)
    torch.testing.assert_close(a[0, :3], b[0, :3], rtol=0, atol=1e-6)
    assert (a[0, 3:] - b[0, 3:]).abs().amax(1).min() > 1e-5
    assert not torch.allclose(a[mask], plain[mask])
    torch.testing.assert_close(a[1:], b[1:])
    back = read(other, links.mT)  # the other way round, so that a transposed mask fails
    torch.testing.assert_close(back[0, 4:], read(ids, links.mT)[0, 4:], rtol=0, atol=1e-6)
    pads = torch.where(mask, ids, 7)  # pads are not read, whatever the links say
    torch.testing.assert_close(read(pads, torch.ones(3, 6, 6).bool())[mask], plain[mask])


@pytest.mark.parametrize("where", ["tower", "fusion"])
def test_a_word_that_may_look_at_nothing_stays_finite(where: str) -> None:
    model = build(text_depth=2)
    ids, mask = captions()
    links = torch.zeros(3, 6, 6).bool()
    text = model.encode_text(ids, mask, links=links if where == "tower" else None).tokens
    if where == "tower":  # it looks at itself
        itself = model.encode_text(ids, mask, links=torch.eye(6).bool().expand(3, -1, -1)).tokens
        torch.testing.assert_close(text[mask], itself[mask])
    image = model.project_image(model.encode_image(images()).tokens)
    fused = model.fuse(text, mask, image, links=links if where == "fusion" else None).tokens
    fused.square().mul(torch.randn_like(fused)).sum().backward()
    assert fused.isfinite().all()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_links_and_hidden_words_go_together() -> None:
    """The tower on the visible words, linked as the whole caption says."""
    model = build(text_depth=2)
    ids, mask = captions()
    hidden = torch.tensor([[0, 1, 0, 0, 0, 0], [0, 0, 1, 0, 0, 0], [0, 1, 0, 0, 0, 0]]).bool()
    found = model.encode_text(ids, mask, hidden=hidden, links=causal(6)).tokens
    for i in range(3):
        kept = (mask & ~hidden)[i]
        linked = causal(6)[0][kept][:, kept][None, None]
        positions = kept.nonzero().T
        wanted = model.text.bert(input_ids=ids[i][kept][None], attention_mask=linked, position_ids=positions)
        torch.testing.assert_close(found[i][kept], wanted.last_hidden_state[0])


def test_heads_that_are_off_do_not_look_at_the_image() -> None:
    model = build()
    ids, mask = captions()
    text = model.encode_text(ids, mask).tokens
    one, two = (model.project_image(model.encode_image(images()).tokens) for _ in range(2))

    def fused(image: list[tuple[Tensor, Tensor]], heads: Tensor | None) -> Tensor:
        return model.fuse(text, mask, image, head_mask=heads).tokens

    torch.testing.assert_close(fused(one, torch.ones(2, 3).bool()), fused(one, None))
    assert torch.equal(fused(one, torch.zeros(2, 3).bool()), fused(two, torch.zeros(2, 3).bool()))
    some = torch.tensor([[True, False, True], [False, True, True]])
    for layer, head in ((0, 1), (1, 0)):  # what a head that is off projects is never read
        moved = [(k.clone(), v.clone()) for k, v in one]
        moved[layer][1][:, head] += 3.0
        assert torch.equal(fused(moved, some), fused(one, some))
        assert not torch.allclose(fused(moved, None), fused(one, None))
    each = some[:, None].repeat(1, 3, 1)
    torch.testing.assert_close(fused(one, each), fused(one, some))
    each[:, 1] = True
    torch.testing.assert_close(fused(one, each)[1], fused(one, None)[1])
    torch.testing.assert_close(fused(one, each)[0], fused(one, some)[0])
    single = torch.tensor([[True, True, True], [False, False, True]])  # the statistics are then of the third head
    of_one = model.fuse(text, mask, one, -1, head_mask=single).statistics
    moved = [one[0], tuple(x.clone() for x in one[1])]
    moved[1][0][:, :2] += torch.randn(3, 2, 17, 8)
    assert torch.equal(
        model.fuse(text, mask, moved, -1, head_mask=single).statistics.key_attention, of_one.key_attention
    )
    torch.testing.assert_close(of_one.key_attention.sum(1), torch.ones(3))


@pytest.mark.parametrize("masked_cls", [False, True])
def test_image_tokens_that_do_not_count_are_not_read(masked_cls: bool) -> None:
    """As if they had never been there, in the output and in the statistics, which stay of the patches alone."""
    model = build()
    ids, mask = captions()
    text, tokens = model.encode_text(ids, mask).tokens, model.encode_image(images()).tokens
    there = torch.tensor([not masked_cls] + [True] * 12 + [False] * 4).expand(3, -1)
    found = model.fuse(text, mask, model.project_image(tokens), -1, image_mask=there)
    short = model.project_image(tokens[:, int(masked_cls) : 13])
    torch.testing.assert_close(found.tokens, model.fuse(text, mask, short).tokens)
    assert found.statistics is not None
    assert found.statistics.key_attention.shape == (3, 16)
    assert (found.statistics.key_attention[:, 12:] == 0).all()
    if not masked_cls:
        wanted = model.fuse(text, mask, short, -1).statistics
        for name in ("key_attention", "query_attention", "entropy"):
            mine, theirs = getattr(found.statistics, name), getattr(wanted, name)
            torch.testing.assert_close(mine[:, :12] if name == "key_attention" else mine, theirs)
    everything = model.fuse(text, mask, model.project_image(tokens), -1, image_mask=torch.ones(3, 17).bool())
    plain = model.fuse(text, mask, model.project_image(tokens), -1)
    torch.testing.assert_close(everything.tokens, plain.tokens)
    torch.testing.assert_close(everything.statistics.key_attention, plain.statistics.key_attention)


def importance_inputs() -> tuple[VisionLanguageModel, Tensor, Tensor, Tensor, Tensor]:
    model = build()
    ids, mask = captions()
    text, image = model.encode_text(ids, mask).tokens.detach(), model.encode_image(images()).tokens.detach()
    return model, text, mask, image, torch.randn(3, 6, 24)


def test_head_importance_is_the_slope_of_the_loss_over_the_heads() -> None:
    """Michel et al. 2019: E |dL / dξ| at ξ = 1, where ξ scales what a head hands to the output projection."""
    model, text, mask, image, weight = importance_inputs()

    def loss() -> Tensor:
        return (model.fuse(text, mask, model.project_image(image)).tokens * weight).sum()

    loss().backward()
    assert torch.equal(model.fusion.head_importance(), torch.zeros(2, 3))
    model.fusion.record_importance()
    loss().backward()
    found = model.fusion.head_importance()
    gates = torch.ones(2, 3, 3, requires_grad=True)  # layers, samples, heads
    sample = mask.nonzero()[:, 0]  # of each word, which come without padding
    hooks = [
        layer.cross_attention.output.register_forward_pre_hook(
            lambda m, args, gate=gate: ((args[0].unflatten(-1, (3, 8)) * gate[sample, :, None]).flatten(-2),)
        )
        for layer, gate in zip(model.fusion.layers, gates.unbind(), strict=True)
    ]
    model.fusion.record_importance(False)
    loss().backward()
    for hook in hooks:
        hook.remove()
    torch.testing.assert_close(found, gates.grad.abs().mean(1), rtol=1e-4, atol=1e-5)
    assert torch.equal(model.fusion.head_importance(), found)  # nothing was noted while it was off
    model.fusion.record_importance()
    for _ in range(2):
        loss().backward()
    torch.testing.assert_close(model.fusion.head_importance(), 2 * found)
    model.fusion.record_importance()
    loss().backward()
    torch.testing.assert_close(model.fusion.head_importance(), found)
    assert not any("importance" in name for name in model.state_dict())


def test_a_head_that_is_off_keeps_the_importance_it_had() -> None:
    """Otherwise the most important heads, being off, would look unimportant at the next step."""
    model, text, mask, image, weight = importance_inputs()

    def step(heads: Tensor | None) -> Tensor:
        model.fusion.record_importance()
        (model.fuse(text, mask, model.project_image(image), head_mask=heads).tokens * weight).sum().backward()
        return model.fusion.head_importance()

    everything = step(None)
    some = torch.tensor([[True, False, True], [False, True, True]])
    for heads in (some, some[:, None].repeat(1, 3, 1)):
        found = step(heads)
        assert torch.equal(found[~some], everything[~some])
        assert (found[some] != everything[some]).any()
        assert torch.equal(step(heads), found)  # and does not add up
    torch.testing.assert_close(step(None), everything)


def test_head_importance_in_half_precision() -> None:
    model, text, mask, image, weight = (
        x.bfloat16() if i in (0, 1, 3) else x for i, x in enumerate(importance_inputs())
    )
    model.fusion.record_importance()
    (model.fuse(text, mask, model.project_image(image)).tokens.float() * weight).sum().backward()
    found = model.fusion.head_importance()
    assert found.dtype == torch.float32
    exact, *_ = importance_inputs()
    exact.fusion.record_importance()
    (exact.fuse(text.float(), mask, exact.project_image(image.float())).tokens * weight).sum().backward()
    wanted = exact.fusion.head_importance()
    torch.testing.assert_close(found, wanted, rtol=0.1, atol=0.05 * wanted.max().item())


@pytest.mark.parametrize("pool", ["cls", "mean"])
@pytest.mark.parametrize("drop", [False, True])
def test_attention_of_the_last_block_by_hand(pool: str, drop: bool) -> None:
    model = build(pool=pool, depth=2)
    with torch.no_grad():
        model.image.vit.blocks[-1].attn.qkv.weight.mul_(20)
    pixels, counts = images(), (4, 11, 0)
    hidden = torch.stack([torch.randperm(16) < n for n in counts]) if drop else None
    asked: list[Tensor] = []
    calls = [0]
    block = model.image.vit.blocks[-1]
    hook = block.norm1.register_forward_hook(lambda m, args, out: asked.append(out))
    counter = model.image.vit.blocks[0].register_forward_hook(lambda *_: calls.__setitem__(0, calls[0] + 1))
    found = model.encode_image(pixels, hidden, drop=drop, attention=True)
    hook.remove()
    counter.remove()
    assert calls == [1]  # no second pass
    assert found.attention is not None
    assert found.attention.shape == (3, 16)
    assert found.attention.dtype == torch.float32
    assert not found.attention.requires_grad
    torch.testing.assert_close(found.attention.sum(1), torch.ones(3))
    assert found.attention.std() > 0.01
    for i in range(3):
        x = asked[0][i]
        if drop:
            assert found.image_mask is not None
            x = x[found.image_mask[i]]
        q, k, _ = block.attn.qkv(x).view(len(x), 3, 2, 16).unbind(1)
        queries = q[:1] if pool == "cls" else q[1:]
        p = (torch.einsum("shd,phd->hsp", queries, k[1:]) / 4).softmax(-1).mean((0, 1))
        wanted = torch.zeros(16)
        wanted[~hidden[i] if drop else slice(None)] = p
        torch.testing.assert_close(found.attention[i], wanted)
    plain = model.encode_image(pixels, hidden, drop=drop)
    assert plain.attention is None
    assert torch.equal(plain.tokens, found.tokens)
    assert not model.image.vit.blocks[-1].attn.qkv._forward_hooks


def test_attention_of_a_tower_without_blocks_names_the_remedy() -> None:
    with pytest.raises(RecipeError, match=r"image_attention: model\.image\.depth of at least 1"):
        build(depth=0).encode_image(images(), attention=True)


class Scorer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(32, 1)

    def forward(self, patches: Tensor) -> Tensor:
        return self.head(patches)[..., 0]


def test_a_mask_network_is_carried_by_student_and_teacher() -> None:
    plain = PretrainingModel(section(), OBJECTIVES, VOCABULARY, LENGTH).state_dict().keys()
    student = PretrainingModel(section(), OBJECTIVES, VOCABULARY, LENGTH, mask_network=Scorer())
    teacher = VisionLanguageModel(section(), VOCABULARY, LENGTH, mask_network=Scorer())
    assert student.state_dict().keys() - plain == {f"model.mask_network.head.{x}" for x in ("weight", "bias")}
    assert {f"model.{name}" for name, _ in teacher.named_parameters()} <= dict(student.named_parameters()).keys()
    assert student.model.mask_network is not teacher.mask_network
    model = student.model.bfloat16()
    scores = model.score_patches(model.encode_image(images()).tokens)
    assert scores.shape == (3, 16)
    assert scores.dtype == torch.float32
    tokens = torch.randn(3, 17, 32)
    torch.testing.assert_close(teacher.score_patches(tokens), teacher.mask_network.head(tokens)[:, 1:, 0])  # not [CLS]
    with pytest.raises(ValueError, match="no mask network"):
        build().score_patches(torch.zeros(1, 17, 32))
