"""torch.compile keeps the modules in one graph, whatever they are asked, and a recorded model too."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from crossmask.kernels.modules import CrossAttention, MultiheadAttention, record_attention

B, S, P, E, H = 2, 5, 7, 16, 4


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()


def compiled(module: nn.Module) -> nn.Module:
    return torch.compile(module, fullgraph=True, backend="aot_eager")  # type: ignore[return-value]


@pytest.mark.parametrize("masks", ["none", "bool", "float", "heads"])
def test_the_drop_in(masks: str) -> None:
    module = MultiheadAttention(E, H, batch_first=True)
    query, key = torch.randn(B, S, E, requires_grad=True), torch.randn(B, P, E)
    links = torch.rand(S, P) < 0.5
    options: dict[str, Tensor] = {
        "none": {},
        "bool": {"key_padding_mask": torch.arange(P).expand(B, -1) > 4},
        "float": {"attn_mask": torch.zeros(S, P).masked_fill(links, -torch.inf)},
        "heads": {"attn_mask": links.expand(B * H, -1, -1)},
    }[masks]
    wanted, told = module(query, key, key, statistics=("key_attention",), **options)
    (gradient,) = torch.autograd.grad(wanted.square().sum() + told.key_attention.square().sum(), query)
    found, same = compiled(module)(query, key, key, statistics=("key_attention",), **options)
    (ours,) = torch.autograd.grad(found.square().sum() + same.key_attention.square().sum(), query)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(same.key_attention, told.key_attention)
    torch.testing.assert_close(ours, gradient)
    plain, weights = compiled(module)(query, key, key, **options)
    assert weights.shape == (B, S, P)
    assert plain.shape == wanted.shape


def test_our_module() -> None:
    module = CrossAttention(E, 8, H, qk_norm=True)
    x, context = torch.randn(B, S, E), torch.randn(B, P, 8)
    wanted = module(x, context, statistics=("entropy",))
    found = compiled(module)(x, context, statistics=("entropy",))
    torch.testing.assert_close(found.output, wanted.output)
    torch.testing.assert_close(found.statistics.entropy, wanted.statistics.entropy)


def test_a_recorded_decoder() -> None:
    model = nn.TransformerDecoder(nn.TransformerDecoderLayer(E, H, 32, batch_first=True), 2).eval()
    fast = compiled(model)
    x, memory = torch.randn(B, S, E), torch.randn(B, P, E)
    padding = torch.arange(P).expand(B, -1) > 4
    wanted = fast(x, memory, memory_key_padding_mask=padding)
    with record_attention(fast, "*.multihead_attn") as record:
        found = fast(x, memory, memory_key_padding_mask=padding)
    with record_attention(model, "*.multihead_attn") as plain:
        model(x, memory, memory_key_padding_mask=padding)
    torch.testing.assert_close(found, wanted)
    assert list(record) == ["layers.0.multihead_attn", "layers.1.multihead_attn"]
    for name, told in record.items():
        torch.testing.assert_close(told.key_attention, plain[name].key_attention)
    assert torch.equal(fast(x, memory, memory_key_padding_mask=padding), wanted)  # and is no longer recorded
