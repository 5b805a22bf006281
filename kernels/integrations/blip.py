"""BLIP on the shared attention interface: its attention is written out in its modules, so they get another forward.

The forwards below do what ``BlipTextSelfAttention`` and ``BlipAttention`` do up to the attention itself. Parameters,
and so the state dict, are untouched; under every other implementation the original forward runs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers.cache_utils import EncoderDecoderCache
from transformers.models.blip.modeling_blip import BlipAttention, BlipPreTrainedModel
from transformers.models.blip.modeling_blip_text import BlipTextPreTrainedModel, BlipTextSelfAttention

from .layers import ADAPTED, IMPLEMENTATION
from .shared_attention import attend


def adapt() -> None:
    """Let BLIP's classes take ``"crossmask"``; again does nothing."""
    for kind, forward in ((BlipAttention, _image_forward), (BlipTextSelfAttention, _text_forward)):
        if kind not in ADAPTED:
            kind.forward = _switch(kind.forward, forward)
            ADAPTED.add(kind)
    for model in (BlipPreTrainedModel, BlipTextPreTrainedModel):
        # Transformers finds out by reading the source whether a model's implementation can be set, and keeps it here.
        model._can_set_attn_implementation_cached_value = True


def _switch(original: Callable[..., Any], ours: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def forward(self: Any, *arguments: Any, **named: Any) -> Any:
        chosen = ours if self.config._attn_implementation == IMPLEMENTATION else original
        return chosen(self, *arguments, **named)

    return forward


def _image_forward(self: Any, hidden_states: Tensor, **_others: Any) -> tuple[Tensor, None]:
    B, P, width = hidden_states.shape
    qkv = self.qkv(hidden_states).reshape(B, P, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
    dropout = self.dropout.p if self.training else 0.0
    q, k, v = qkv.unbind()
    output, _ = attend(self, q, k, v, None, dropout=dropout, scaling=self.scale, is_causal=False)
    return self.projection(output.reshape(B, P, width)), None


def _text_forward(
    self: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    encoder_hidden_states: Tensor | None = None,
    encoder_attention_mask: Tensor | None = None,
    past_key_values: Any = None,
    **_others: Any,
) -> tuple[Tensor, None]:
    crosses = encoder_hidden_states is not None
    mask = encoder_attention_mask if crosses else attention_mask

    def split(x: Tensor) -> Tensor:
        return x.view(*x.shape[:-1], -1, self.attention_head_size).transpose(1, 2)

    cache, known = past_key_values, False
    if isinstance(past_key_values, EncoderDecoderCache):
        known = bool(past_key_values.is_updated.get(self.layer_idx))
        cache = past_key_values.cross_attention_cache if crosses else past_key_values.self_attention_cache
    if crosses and known:
        key, value = cache.layers[self.layer_idx].keys, cache.layers[self.layer_idx].values
    else:
        source = encoder_hidden_states if crosses else hidden_states
        key, value = split(self.key(source)), split(self.value(source))
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
            if crosses and isinstance(past_key_values, EncoderDecoderCache):
                past_key_values.is_updated[self.layer_idx] = True
    query = split(self.query(hidden_states))
    # A mask is always there where it is needed (shared_attention._MASK_ALWAYS), so none means that all keys are seen.
    varies = mask is not None and mask.shape[2] > 1 and mask.stride(2) != 0
    dropout = self.dropout.p if self.training else 0.0
    output, _ = attend(self, query, key, value, mask, dropout=dropout, is_causal=not crosses and varies)
    return output.flatten(2), None
