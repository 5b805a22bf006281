"""What somebody reads who embeds the kernels and errs: one exact line that names the culprit and the remedy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel, GPTJConfig, GPTJModel

from crossmask.kernels import modules
from crossmask.kernels.integrations import transformers as ours

TINY = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 20}
WORDS = torch.ones(1, 4, dtype=torch.long)


def refusal(call: Callable[[], object], kind: type[Exception] = ValueError) -> str:
    """What a call says that is refused."""
    with pytest.raises(kind) as told:
        call()
    return str(told.value)


def recorded(record: Any, model: nn.Module, *named: Any, inputs: Sequence[Any] = (), **options: Any) -> None:
    with record(model, *named):
        if inputs:
            model(*inputs, **options)


@pytest.fixture(scope="module")
def bert() -> BertModel:
    return ours.use_crossmask(BertModel(BertConfig(**TINY)).eval())  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def decoder() -> nn.Module:
    return nn.TransformerDecoder(nn.TransformerDecoderLayer(16, 2, 16, batch_first=True), 2).eval()


def test_another_version_of_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ours.importlib.metadata, "version", lambda _name: "4.57.3")
    wanted = "transformers 4.57.3 is outside the tested range: pip install 'transformers>=5.20,<6'"
    assert refusal(ours.register, ImportError) == wanted
    assert refusal(partial(ours.use_crossmask, nn.Linear(2, 2)), ImportError) == wanted


def test_a_model_without_the_shared_interface() -> None:
    model = GPTJModel(GPTJConfig(vocab_size=10, n_positions=8, n_embd=8, n_layer=1, n_head=2, rotary_dim=2))
    wanted = (
        "GPTJModel is not on Transformers' shared attention interface: its attention is its own code (GPTJAttention), "
        "which crossmask cannot run"
    )
    assert refusal(partial(ours.use_crossmask, model)) == wanted
    assert refusal(partial(recorded, ours.record_attention, model)) == wanted
    wanted = "GPTJModel has no attention that can tell (it has GPTJAttention; those that can: torch's"
    assert refusal(partial(recorded, modules.record_attention, model)).startswith(wanted)


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (
            "encoder.layer.1.atention.self",
            "no attention layer matches 'encoder.layer.1.atention.self': the closest names are "
            "encoder.layer.1.attention.self, encoder.layer.0.attention.self, encoder.layer.1.attention",
        ),
        (
            "visual",
            "no attention layer matches 'visual': the attention layers are encoder.layer.0.attention.self, "
            "encoder.layer.1.attention.self",
        ),
        (
            "cross",
            "the model has no cross-attention layer; its attention layers are encoder.layer.0.attention.self, "
            "encoder.layer.1.attention.self",
        ),
        (
            ["encoder.layer.0", "pooler"],
            "there is no attention layer in 'pooler'; the model's are encoder.layer.0.attention.self, "
            "encoder.layer.1.attention.self",
        ),
        ([], "layers is empty: name attention layers, or a pattern of names, 'cross', 'self'"),
    ],
)
def test_a_name_that_selects_nothing_in_transformers(bert: BertModel, wanted: str, message: str) -> None:
    assert refusal(partial(recorded, ours.record_attention, bert, wanted)) == message


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (
            "layers.1.multihead_atn",
            "no attention layer matches 'layers.1.multihead_atn': the closest names are layers.1.multihead_attn, "
            "layers.0.multihead_attn, layers.1.self_attn",
        ),
        (
            "layers.1.norm1",
            "there is no attention layer in 'layers.1.norm1'; the model's are layers.0.self_attn, "
            "layers.0.multihead_attn, layers.1.self_attn, layers.1.multihead_attn",
        ),
        (
            "*.cross",
            "no attention layer matches '*.cross': the attention layers are layers.0.self_attn, "
            "layers.0.multihead_attn, layers.1.self_attn, layers.1.multihead_attn",
        ),
        ([], "layers is empty: name attention layers, or a pattern of names"),
    ],
)
def test_a_name_that_selects_nothing_in_modules(decoder: nn.Module, wanted: str, message: str) -> None:
    assert refusal(partial(recorded, modules.record_attention, decoder, wanted)) == message
    assert refusal(partial(modules.swap_attention, decoder, wanted)) == message


def test_key_statistics_of_causal_self_attention(decoder: nn.Module) -> None:
    model = ours.use_crossmask(BertModel(BertConfig(**TINY, is_decoder=True)))
    record = partial(
        recorded, ours.record_attention, model, "encoder.layer.0", ("key_attention", "lse"), inputs=(WORDS,)
    )
    assert refusal(record) == (
        "encoder.layer.0.attention.self is self-attention with a causal mask: an early key is seen by more queries "
        "than a late one, so key_attention would tell positions apart; ask for lse, max_probability or entropy, for "
        "other layers, or pass causal=True"
    )
    causal = nn.Transformer.generate_square_subsequent_mask(4)
    pair = (torch.randn(1, 4, 16), torch.randn(1, 5, 16))
    options = {"inputs": pair, "tgt_mask": causal, "tgt_is_causal": True}
    assert refusal(partial(recorded, modules.record_attention, decoder, "layers.0.self_attn", **options)) == (
        "layers.0.self_attn: key_attention of a causal self-attention tells early from late keys, not what is looked "
        "at; ask for lse, max_probability or entropy, or of other layers (record_attention has causal=True for it)"
    )
