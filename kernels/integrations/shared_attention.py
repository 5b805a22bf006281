"""What Transformers calls for ``attn_implementation="crossmask"``: the attention, and the mask it wants.

A padding mask stays (B, P): Transformers is given a view of it, expanded over the queries, and the attention recognises
the view by its stride. Whatever is no softmax of scaled products with a mask that all heads share (additive biases,
masks per head, causal attention without a mask, for which a fused kernel needs none) goes to Transformers' own
``sdpa`` for the output, and has no statistics.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function, sdpa_mask
from transformers.utils.import_utils import is_tracing

from ..cross_attention import cross_attention
from ..cross_attention.checks import MAX_WIDTH
from .recording import SLOT, Slot

MASKED = -1e4  # an additive mask's value at or below which a key has no weight left: exp(-10000) is 0 in every dtype
_BEYOND_SOFTMAX = ("softcap", "s_aux", "sinks", "indices", "block_indices")  # arguments that ask for other attention
# BLIP's text model takes no is_causal, so that no mask must mean no mask
_MASK_ALWAYS = {"blip_text_model"}


def make_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    use_vmap: bool = False,
    config: Any = None,
    **others: Any,
) -> Tensor | None:
    """Transformers' ``sdpa_mask`` (B, 1, S, P) bool, True = attend, without B·S·P bytes where only keys are masked."""
    only_keys = mask_function is bidirectional_mask_function and not use_vmap and kv_offset == 0
    if only_keys and attention_mask is not None and attention_mask.ndim == 2:
        keys = attention_mask.bool()
        if (missing := kv_length - keys.shape[1]) > 0:
            keys = nn.functional.pad(keys, (0, missing))
        keys = keys[:, :kv_length]
        if allow_is_bidirectional_skip and not is_tracing(keys) and bool(keys.all()):
            return None
        return keys[:, None, None, :].expand(batch_size, 1, q_length, kv_length)
    causal_skip = allow_is_causal_skip and getattr(config, "model_type", None) not in _MASK_ALWAYS
    found: Tensor | None = sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        allow_is_causal_skip=causal_skip,
        allow_is_bidirectional_skip=allow_is_bidirectional_skip,
        use_vmap=use_vmap,
        config=config,
        **others,
    )
    return found


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention as Transformers' interface wants it; statistics go to the layer's slot while it is recorded.

    Args:
        query: (B, H, S, D), or (1, H, S, D) for learned queries; key, value: (B, H / groups, P, D).
        attention_mask: (B or 1, 1 or H, S or 1, P), bool (True = attend) or additive; None with ``is_causal`` (or the
            layer's own) and more than one query: causal.

    Returns:
        (B, S, H, D), and None: the weights are never in memory.

    Raises:
        ValueError: the attention is no plain softmax, or statistics are asked where there are none.
    """
    for name in _BEYOND_SOFTMAX:
        if others.get(name) is not None:
            raise ValueError(
                f"{type(module).__name__} asks for {name}, which is beyond softmax attention: use "
                "set_attn_implementation('eager') for this model"
            )
    if position_bias is not None and _bias_is_zero(module):
        position_bias = None
    slot: Slot | None = getattr(module, SLOT, None)
    causal = _causal(module, is_causal)
    groups = getattr(module, "num_key_value_groups", 1)
    if slot is None:
        plain = (
            position_bias is None
            and groups == 1
            and others.get("cache") is None
            and not (attention_mask is None and causal and query.shape[2] > 1)
            and _fits(query, key, value)
            and (attention_mask is None or (attention_mask.dtype == torch.bool and _shared(attention_mask, query, key)))
        )
        if not plain:
            found: tuple[Tensor, None] = sdpa_attention_forward(
                *(module, query, key, value, attention_mask),
                dropout=dropout,
                scaling=scaling,
                is_causal=is_causal,
                position_bias=position_bias,
                **others,
            )
            return found
    else:
        _check(slot, module, query, key, value, attention_mask, is_causal, position_bias, others)
        key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    query, key, value = _same_batch(query, key, value)
    masks = _masks(attention_mask, query, key, causal, slot)
    result = cross_attention(
        *(query, key, value, masks.keys),
        query_mask=None if slot is None else slot.query_mask(query),
        link_mask=masks.links,
        scale=scaling,
        dropout_p=dropout,
        statistics=() if slot is None else slot.statistics,
        per_head=slot is not None and slot.per_head,
        check_finite=False,  # as the other implementations: what is not finite passes through
    )
    if slot is not None:
        slot.keep(result.statistics)
    return result.output.transpose(1, 2).contiguous(), None


class _Masks(NamedTuple):
    keys: Tensor | None  # (B, P) bool
    links: Tensor | None  # (B, S, P) or (1, S, P) bool


def _masks(mask: Tensor | None, query: Tensor, key: Tensor, causal: bool, slot: Slot | None) -> _Masks:
    B, S, P = query.shape[0], query.shape[2], key.shape[2]
    if mask is None:
        if not causal or S == 1:
            return _Masks(None, None)
        # aligned at the upper left, as PyTorch's is_causal
        return _Masks(None, torch.ones(1, S, P, dtype=torch.bool, device=query.device).tril())
    if mask.dtype != torch.bool:
        assert slot is not None  # additive masks go to sdpa without one
        mask = _allowed(mask, slot)
    if mask.shape[2] == 1 or mask.stride(2) == 0:
        return _Masks(mask[:, 0, 0].expand(B, P), None)
    links = mask[:, 0]
    links = links[:1] if links.stride(0) == 0 else links
    # Padding that came in such a mask is what no query may see; only the mean over valid keys has to know.
    counted = slot is not None and "query_attention" in slot.statistics
    return _Masks(links.any(1).expand(B, P) if counted else None, links)


def _allowed(mask: Tensor, slot: Slot) -> Tensor:
    """Where an additive mask lets attend; it must be 0 there and very negative elsewhere."""
    if mask.stride(2) == 0:
        mask = mask[:, :, :1]
    allowed = mask == 0
    known = (allowed | (mask <= MASKED)).all()
    refusal = (
        f"{slot.name} adds a bias to its logits, so it has no statistics: take it out of record_attention's layers"
    )
    if torch.compiler.is_compiling():
        torch._assert_async(known, refusal)
    elif not bool(known):
        raise ValueError(refusal)
    return allowed


def _causal(module: nn.Module, is_causal: bool | None) -> bool:
    """Transformers' rule; without a mask such a layer is causal, with one the mask says all."""
    return bool(is_causal if is_causal is not None else getattr(module, "is_causal", True))


def _bias_is_zero(module: nn.Module) -> bool:
    """T5's cross-attention is given a position bias of zeros, its self-attention the first layer's, learned one."""
    return (
        getattr(module, "has_relative_attention_bias", None) is False
        and getattr(module, "is_decoder", False)
        and not getattr(module, "is_causal", True)
    )


def _fits(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """What the op takes: one width for all, one number of heads."""
    return key.shape == value.shape and query.shape[3] == key.shape[3] <= MAX_WIDTH and query.shape[1] == key.shape[1]


def _shared(mask: Tensor, query: Tensor, key: Tensor) -> bool:
    """Whether a mask is one for all heads, in a shape that broadcasts."""
    return (
        mask.ndim == 4
        and (mask.shape[1] == 1 or mask.stride(1) == 0)
        and mask.shape[2] in (1, query.shape[2])
        and mask.shape[3] == key.shape[2]
    )


def _same_batch(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Learned queries come as a batch of one (Q-Former)."""
    B = max(query.shape[0], key.shape[0])
    query, key, value = (x if x.shape[0] == B else x.expand(B, -1, -1, -1) for x in (query, key, value))
    return query, key, value


def _check(
    slot: Slot,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    is_causal: bool | None,
    position_bias: Tensor | None,
    others: dict[str, Any],
) -> None:
    """Statistics have to be those of the weights that were used, or there are none."""
    told = is_causal if is_causal is not None else getattr(module, "is_causal", mask is None and query.shape[2] > 1)
    if told:
        slot.refuse_causal()
    what = None
    if position_bias is not None:
        what = "adds a position bias to its logits"
    elif others.get("cache") is not None:
        what = "reads a paged cache"
    elif key.shape != value.shape or query.shape[3] != key.shape[3] or query.shape[3] > MAX_WIDTH:
        what = (
            f"has heads of width {query.shape[3]} and values of width {value.shape[3]} (one width, at most {MAX_WIDTH})"
        )
    elif mask is not None and not _shared(mask, query, key):
        what = f"has a mask of shape {tuple(mask.shape)}, which is not one for all heads"
    if what:
        raise ValueError(f"{slot.name} {what}, so it has no statistics: take it out of record_attention's layers")
