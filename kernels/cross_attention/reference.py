"""Cross-attention with statistics in plain PyTorch: the specification every faster implementation is held to.

It materialises the (B, H, S, P) probabilities, in float32 for half-precision inputs and in float64 for float64.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

STATISTICS = ("lse", "max_probability", "entropy", "key_attention", "query_attention")


def cross_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None = None,
    query_mask: Tensor | None = None,
    scale: float | None = None,
    statistics: Collection[str] = (),
) -> tuple[Tensor, dict[str, Tensor]]:
    """Output (B, H, S, D) in the dtype of ``q`` and the statistics asked for, by name. Shapes as in ``api.py``."""
    compute = torch.float64 if q.dtype == torch.float64 else torch.float32
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    s = scale * (q.to(compute) @ k.to(compute).transpose(-1, -2))  # (B, H, S, P)
    if key_mask is not None:
        s = s.masked_fill(~key_mask[:, None, None, :], -torch.inf)
    lse = torch.logsumexp(s, dim=-1)  # (B, H, S)
    # A fully masked row has lse = -inf; a finite stand-in keeps exp(-inf - lse) at 0 instead of NaN.
    row = torch.where(lse == -torch.inf, torch.zeros_like(lse), lse)
    p = torch.exp(s - row[..., None])
    output = (p @ v.to(compute)).to(q.dtype)

    found: dict[str, Tensor] = {}
    if "lse" in statistics:
        found["lse"] = lse
    if "max_probability" in statistics:
        found["max_probability"] = p.amax(-1)
    if "entropy" in statistics:
        # sum p (lse - s): -sum p log p has no finite gradient at a weight of 0, and lse - sum p s cancels.
        surprise = (row[..., None] - s).masked_fill(s == -torch.inf, 0.0)
        found["entropy"] = (p * surprise).sum(-1)
    if "key_attention" in statistics:
        found["key_attention"] = _mean_over_valid(p.mean(1), query_mask, dim=1)
    if "query_attention" in statistics:
        t = s if query_mask is None else s.masked_fill(~query_mask[:, None, :, None], -torch.inf)
        column = torch.logsumexp(t, dim=2, keepdim=True)
        column = torch.where(column == -torch.inf, torch.zeros_like(column), column)
        found["query_attention"] = _mean_over_valid(torch.exp(t - column).mean(1), key_mask, dim=2)
    return output, {name: value if compute == torch.float64 else value.float() for name, value in found.items()}


def _mean_over_valid(weights: Tensor, mask: Tensor | None, dim: int) -> Tensor:
    """Mean of (B, S, P) over one axis, counting only the positions that ``mask`` allows; 0 where it allows none."""
    if mask is None:
        return weights.mean(dim)
    valid = mask[:, :, None] if dim == 1 else mask[:, None, :]
    return (weights * valid).sum(dim) / valid.sum(dim).clamp(min=1)
