"""Cross-attention that also tells where it looked: the public face of the op."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree

from ..unseeded import drop
from . import finite, op, reference
from .checks import check, check_names, check_types
from .dispatch import PLAIN, Implementation, choose, implementation
from .request import Forward, Masks

__all__ = ["AttentionStatistics", "CrossAttentionOutput", "cross_attention", "implementation"]


@dataclass(frozen=True, eq=False)  # tensors have no one truth to compare by
class AttentionStatistics:
    """What a call was asked to tell; float32 whatever the input's dtype (float64 for float64), ``None`` where it was
    not asked. All are of the weights before dropout.

    With ``per_head`` the last three keep their head dimension: (B, H, P) and (B, H, S), means and maxima over valid
    positions alone. With ``normalise=False`` the two means are sums over the same weights.
    """

    lse: Tensor | None = None  # (B, H, S) natural log of the sum over keys of exp(scale q.k); -inf if there is no key
    max_probability: Tensor | None = None  # (B, H, S) largest softmax weight of a row
    entropy: Tensor | None = None  # (B, H, S) of a row's softmax, in nats
    key_attention: Tensor | None = None  # (B, P) mean over heads and valid queries of the softmax over keys
    query_attention: Tensor | None = None  # (B, S) mean over heads and valid keys of the softmax over valid queries
    key_max: Tensor | None = None  # (B, P) largest softmax weight over heads and valid queries; carries no gradient


@dataclass(frozen=True, eq=False)  # tensors have no one truth to compare by
class CrossAttentionOutput:
    """What :func:`cross_attention` returns."""

    output: Tensor  # (B, H, S, D), the dtype of q
    statistics: AttentionStatistics


def cross_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None = None,
    query_mask: Tensor | None = None,
    head_mask: Tensor | None = None,
    *,
    link_mask: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int | Tensor | None = None,
    statistics: Collection[str] = (),
    per_head: bool = False,
    normalise: bool = True,
    check_finite: bool | None = None,
    impl: Implementation | None = None,
) -> CrossAttentionOutput:
    """Softmax attention of queries over keys, with statistics of the attention weights, in one pass.

    Args:
        q: (B, H, S, D) queries, float16, bfloat16, float32 or float64; any strides. 1 <= D <= 256.
        k, v: (B, H, P, D) keys and values, the dtype and device of ``q``. Under autocast all three are cast first.
        key_mask: (B, P) bool, True = attend. A row whose keys are all masked gives zeros. What stands in masked places
            must be finite.
        query_mask: (B, S) bool, True = count in the key and query statistics. It never changes the output.
        head_mask: (H,) or (B, H) bool, True = on. A head that is off gives zeros and counts in no mean.
        link_mask: (B, S, P) or (1, S, P) bool, True = this query may attend to this key, in every head: segment,
            causal, sequence-to-sequence or token-to-token masks. A row without a link gives zeros, as one without
            keys; the softmax over queries is over those with a link to the key, and without any counts as zero. What
            is padding belongs into ``key_mask``: a key that only no link reaches must still be finite.
        scale: factor on the logits, a number; default ``D ** -0.5``. Multiply ``q`` by a learned one.
        dropout_p: probability of dropping a weight, in [0, 1); what is kept is divided by ``1 - dropout_p``. Pass 0
            when evaluating.
        dropout_seed: int, or (1,) int64 on the device of ``q``; None draws one from the device's generator. The same
            seed drops the same weights in every implementation but ``eager`` (``dropout.py``).
        statistics: any of ``lse``, ``max_probability``, ``entropy``, ``key_attention``, ``query_attention``,
            ``key_max``. What is not asked for costs nothing.
        per_head: key and query statistics for every head, instead of their mean (maximum) over heads.
        normalise: False: ``key_attention`` and ``query_attention`` are sums over valid positions, and over heads unless
            ``per_head``, instead of means. Per head, and with as many queries as fit one block, ``triton`` then
            launches nothing after the attention; ``topk_mask`` takes the heads' mean itself.
        check_finite: raise where NaN or infinity of an input reaches the result. None looks where that needs no
            synchronisation: on a CPU, outside torch.compile. In compiled code True works for ``triton`` and
            ``blockwise`` alone.
        impl: ``None`` picks ``triton`` on a GPU; elsewhere PyTorch's own attention (``sdpa``, or on a CPU ``eager`` in
            half precision and for dropout without a seed) for the output alone, and ``blockwise`` (plain PyTorch, never
            all B·H·S·P weights at once) for more. A name forces one; ``reference`` is the specification and
            materialises the weights, as ``eager`` does.

    Gradients flow through the output and through every statistic but ``key_max``: a loss on where attention looks needs
    no materialised weights either. The formulas are in ``triton/backward.py``.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, values that are not finite, an unknown statistic, or an
            implementation that cannot do what is asked.
        TypeError: an argument of another type than the above.
        NotImplementedError: under torch.func's transforms or forward-mode differentiation, and for second derivatives;
            ``reference`` has them.

    ``key_attention`` is A_t2i and ``query_attention`` is A_i2t of SyncMask (Song et al., CVPR 2024): each row of a
    softmax over keys sums to one, so only the softmax over the *query* axis says which words an image attends to.
    """
    check_types(q, k, v, scale, dropout_p, dropout_seed)
    q, k, v = op.autocast(q, k, v)
    names = check_names(statistics)
    head_mask = check(q, k, v, key_mask, query_mask, head_mask, link_mask)
    chosen = choose(impl, q.device, q.dtype, names, dropout_p, dropout_seed is not None)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    if check_finite is None:
        check_finite = finite.costs_nothing(q)
    if chosen in PLAIN:
        attend = F.scaled_dot_product_attention if chosen == "sdpa" else partial(_eager, dropout_p=dropout_p)
        output = _plain(q, k, v, key_mask, head_mask, link_mask, scale, attend)
        if check_finite and not torch.compiler.is_compiling():
            finite.check(q, k, v, output, None)
        return CrossAttentionOutput(output, AttentionStatistics())

    seed = _seed(dropout_seed, q.device) if dropout_p else None
    if chosen == "reference":
        request = op.request(scale, dropout_p, per_head, normalise, names)
        with op.no_autocast(q.device.type):
            found = reference.forward(q, k, v, Masks(key_mask, query_mask, head_mask, link_mask), seed, request)
        if check_finite and not torch.compiler.is_compiling():
            finite.check(q, k, v, found.output, found.lse)
    else:
        op.refuse_transforms(q, k, v)
        found = Forward(
            *torch.ops.crossmask.cross_attention(
                *(q, k, v, key_mask, query_mask, head_mask, link_mask, seed),
                *(scale, dropout_p, per_head, bool(normalise), names, chosen, check_finite),
            )
        )
    told = {name: getattr(found, name) for name in names}
    return CrossAttentionOutput(found.output, AttentionStatistics(**told))


def _plain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    head_mask: Tensor | None,
    link_mask: Tensor | None,
    scale: float,
    attend: Any,
) -> Tensor:
    """Output alone, by PyTorch's attention ``attend``."""
    keys = None if key_mask is None else key_mask[:, None, None, :]
    on = None if head_mask is None else head_mask[:, :, None, None]
    allowed = on if keys is None else keys if on is None else keys & on
    if link_mask is not None:
        links = link_mask[:, None]
        allowed = links if allowed is None else allowed & links
    if allowed is None:
        output: Tensor = attend(q, k, v, attn_mask=None, scale=scale)
        return output
    # A softmax over no key is NaN, and so is its gradient: such a row attends everywhere and is zeroed.
    seen = allowed.any(3, keepdim=True)
    output = attend(q, k, v, attn_mask=(allowed | ~seen).expand(-1, -1, -1, k.shape[2]), scale=scale)
    return output.where(seen, 0.0)


def _eager(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, scale: float, dropout_p: float = 0.0) -> Tensor:
    s = (q * scale) @ k.transpose(-1, -2)
    if attn_mask is not None:
        s = s.masked_fill(~attn_mask, -torch.inf)
    weights = s.softmax(-1)
    return (drop(weights, dropout_p) if dropout_p else weights) @ v


def _seed(given: int | Tensor | None, device: torch.device) -> Tensor:
    """(1,) int64 on the device, without a synchronisation: a captured CUDA graph draws a new one each replay."""
    if given is None:
        return torch.randint(2**62, (1,), device=device, dtype=torch.int64)
    if isinstance(given, Tensor):
        return given.reshape(1)
    return torch.full((1,), given, device=device, dtype=torch.int64)


for _result in (AttentionStatistics, CrossAttentionOutput):  # so that torch.export and checkpointing see the tensors
    pytree.register_dataclass(_result, serialized_type_name=f"crossmask.{_result.__name__}")
