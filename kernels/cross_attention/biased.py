"""Attention with numbers added to the logits, such as relative positions or a floating mask, and its statistics.

Plain PyTorch that writes the B·H·S·P weights down, as the reference does: the kernels know masks, not biases.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from . import op, reference
from .api import AttentionStatistics, CrossAttentionOutput
from .checks import check, check_names, check_types
from .request import Masks


def biased_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    links: Tensor | None = None,
    key_mask: Tensor | None = None,
    query_mask: Tensor | None = None,
    *,
    scale: float | None = None,
    dropout_p: float = 0.0,
    statistics: Collection[str] = (),
    per_head: bool = False,
) -> CrossAttentionOutput:
    """``softmax(scale q.k + bias) v``, with statistics of those weights.

    Args:
        q, k, v, key_mask, query_mask, scale, dropout_p, statistics, per_head: as for :func:`.api.cross_attention`.
        bias: floating, broadcasts to (B, H, S, P), finite; a gradient flows into it.
        links: bool, broadcasts to (B, H, S, P), True = this query may attend to this key.

    Raises:
        ValueError, TypeError: as for :func:`.api.cross_attention`.
    """
    check_types(q, k, v, scale, dropout_p, None)
    names = check_names(statistics)
    q, k, v = op.autocast(q, k, v)
    check(q, k, v, key_mask, query_mask, None)
    request = op.request(q.shape[-1] ** -0.5 if scale is None else float(scale), dropout_p, per_head, True, names)
    seed = torch.randint(2**62, (1,), device=q.device, dtype=torch.int64) if dropout_p else None
    with op.no_autocast(q.device.type):
        masks = Masks(key_mask, query_mask)
        found = reference.forward(q, k, v, masks, seed, request, bias=bias, links=links)
    told = {name: getattr(found, name) for name in names}
    return CrossAttentionOutput(found.output, AttentionStatistics(**told))
