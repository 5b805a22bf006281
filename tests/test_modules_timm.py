"""timm's attention, swapped and recorded: the same outputs, statistics of its weights, one graph."""

from __future__ import annotations

import pytest
import timm
import torch
from timm.layers import Attention, AttentionPoolLatent
from torch import Tensor, nn

from crossmask.kernels.modules import record_attention, swap_attention

B, N, E, H = 2, 9, 32, 4


def weights_of(module: Attention, x: Tensor, added: Tensor | None = None) -> Tensor:
    """(B, H, N, N) by the definition."""
    q, k, _ = module.qkv(x).unflatten(-1, (3, H, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    logits = module.q_norm(q) @ module.k_norm(k).transpose(-1, -2) * (E // H) ** -0.5
    return (logits if added is None else logits + added).softmax(-1)


KINDS = {
    "plain": {},
    "biased": {"qkv_bias": True},
    "normalised": {"qk_norm": True, "scale_norm": True, "norm_layer": nn.LayerNorm},
    "gated": {"gated": True, "attn_head_dim": 8, "dim_out": 24},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fused", [True, False])
def test_attention(kind: str, fused: bool) -> None:
    module = Attention(E, H, **KINDS[kind])
    module.fused_attn = fused
    x = torch.randn(B, N, E, requires_grad=True)
    wanted = module(x)
    names = list(module.state_dict())
    (gradient,) = torch.autograd.grad(wanted.square().sum(), x)
    assert swap_attention(module) == [""]
    assert isinstance(module, Attention)
    assert list(module.state_dict()) == names
    assert torch.equal(module(x), wanted)
    found, told = module(x, statistics=("key_attention", "max_probability"))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(torch.autograd.grad(found.square().sum(), x)[0], gradient, rtol=1e-4, atol=1e-5)
    weights = weights_of(module, x)
    torch.testing.assert_close(told.key_attention, weights.mean((1, 2)))
    torch.testing.assert_close(told.max_probability, weights.amax(-1))


@pytest.mark.parametrize("shape", [(N, N), (H, N, N), (B, 1, N, N), (B, H, N, N), (B, 1, 1, N)])
@pytest.mark.parametrize("mask", ["bool", "float", "bias"])
def test_masks_as_scaled_dot_product_attention_takes_them(shape: tuple[int, ...], mask: str) -> None:
    module = Attention(E, H)
    x = torch.randn(B, N, E)
    allowed = torch.rand(shape) < 0.6
    allowed[..., 0] = True
    added = torch.zeros(shape).masked_fill(~allowed, -torch.inf)
    if mask == "bias":
        added = added + torch.randn(shape)
    given = allowed if mask == "bool" else added
    wanted = module(x, attn_mask=given)
    swap_attention(module)
    found, told = module(x, attn_mask=given, statistics=("key_attention", "key_max"))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    weights = weights_of(module, x, added)
    torch.testing.assert_close(told.key_attention, weights.mean((1, 2)))
    torch.testing.assert_close(told.key_max, weights.amax((1, 2)))


def test_causal_attention() -> None:
    module = Attention(E, H)
    x = torch.randn(B, N, E)
    wanted = module(x, is_causal=True)
    swap_attention(module)
    assert torch.equal(module(x, is_causal=True), wanted)
    torch.testing.assert_close(module(x, is_causal=True, statistics=("entropy",))[0], wanted)
    with pytest.raises(ValueError, match="key_attention of a causal self-attention"):
        module(x, is_causal=True, statistics=("key_attention",))


def test_what_the_class_token_of_a_vit_looks_at_also_compiled() -> None:
    torch._dynamo.reset()
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, embed_dim=E, num_heads=H).eval()
    fast = torch.compile(model, fullgraph=True, backend="aot_eager")
    images = torch.randn(B, 3, 32, 32)
    first = torch.zeros(B, 5, dtype=torch.bool)
    first[:, 0] = True
    seen: list[Tensor] = []
    hook = model.blocks[1].norm1.register_forward_hook(lambda module, given, x: seen.append(x))
    wanted = model(images)
    hook.remove()
    attention = model.blocks[1].attn
    q, k, _ = attention.qkv(seen[0]).unflatten(-1, (3, H, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    weights = (q @ k.transpose(-1, -2) * (E // H) ** -0.5).softmax(-1)
    for run in (model, fast):
        with record_attention(run, "blocks.1", query_mask=first) as record:
            found = run(images)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
        assert list(record) == ["blocks.1.attn"]
        torch.testing.assert_close(record["blocks.1.attn"].key_attention, weights[:, :, 0].mean(1))
    assert type(attention) is Attention


@pytest.mark.parametrize(
    ("options", "shape"),
    [
        ({}, (B, E)),
        ({"latent_len": 3, "pool_type": "avg", "pos_embed": "abs", "feat_size": N, "qk_norm": True}, (B, E)),
    ],
)
def test_attention_pooling(options: dict[str, object], shape: tuple[int, ...]) -> None:
    module = AttentionPoolLatent(E, num_heads=H, **options)
    x = torch.randn(B, N, E)
    wanted = module(x)
    swap_attention(module)
    assert torch.equal(module(x), wanted)
    found, told = module(x, statistics=("key_attention",))
    assert found.shape == shape
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(told.key_attention.sum(1), torch.ones(B))
    with record_attention(module) as record:
        module(x)
    assert torch.equal(record[""].key_attention, told.key_attention)


def test_attention_that_is_timms_own_otherwise_is_named() -> None:
    model = timm.create_model("beit_base_patch16_224", img_size=32, depth=1, embed_dim=32, num_heads=2)
    with pytest.raises(ValueError, match=r"Beit has no attention that can tell \(it has Attention;.*timm's Attention"):
        swap_attention(model)
