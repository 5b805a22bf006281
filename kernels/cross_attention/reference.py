"""Cross-attention with statistics in plain PyTorch: the specification every faster implementation is held to.

It materialises the (B, H, S, P) weights, in float32 for half-precision inputs and in float64 for float64, and leaves
the gradients to autograd.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import dropout
from .request import Forward, Masks, Request, share


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    masks: Masks,
    seed: Tensor | None,
    request: Request,
    *,
    bias: Tensor | None = None,
    links: Tensor | None = None,
) -> Forward:
    """What ``request`` asks for. Shapes, dtypes and masks as in ``request.py``; ``bias`` and ``links``, which only
    ``biased.py`` has, broadcast to (B, H, S, P)."""
    compute = torch.float64 if q.dtype == torch.float64 else torch.float32
    B, H, S, _ = q.shape
    P = k.shape[2]
    s = request.scale * (q.to(compute) @ k.to(compute).transpose(-1, -2))  # (B, H, S, P)
    if bias is not None:
        s = s + bias.to(compute)
    allowed = torch.ones(B, H, 1, P, dtype=torch.bool, device=q.device)
    if masks.key is not None:
        allowed = allowed & masks.key[:, None, None, :]
    if masks.head is not None:
        allowed = allowed & masks.head[:, :, None, None]
    if masks.link is not None:
        allowed = allowed & masks.link[:, None]
    if links is not None:
        allowed = allowed & links
    counted = torch.ones(B, S, dtype=torch.bool, device=q.device) if masks.query is None else masks.query

    s = s.masked_fill(~allowed, -torch.inf)
    lse = torch.logsumexp(s, dim=-1)  # (B, H, S)
    # A row that attends to nothing has lse = -inf; a finite stand-in keeps exp(-inf - lse) at 0 instead of NaN.
    row = torch.where(lse == -torch.inf, torch.zeros_like(lse), lse)
    p = torch.exp(s - row[..., None])
    dropped = p
    if request.dropout_p:
        assert seed is not None
        heads, rows = torch.arange(B * H, device=q.device), torch.arange(S, device=q.device)
        kept = dropout.keep(seed, request.dropout_p, heads, rows, P).view(B, H, S, P)
        dropped = torch.where(kept, p / (1 - request.dropout_p), 0.0)
    output = (dropped @ v.to(compute)).to(q.dtype)

    max_probability = _first_maximum(p) if request.max_probability else None
    entropy = None
    if request.entropy:
        # sum p (lse - s): -sum p log p has no finite gradient at a weight of 0, and lse - sum p s cancels.
        surprise = (row[..., None] - s).masked_fill(s == -torch.inf, 0.0)
        entropy = (p * surprise).sum(-1)

    key_attention = key_max = None
    if request.key_attention:
        per_query = p if request.per_head else p.sum(1, keepdim=True)
        total = (per_query * counted[:, None, :, None]).sum(2)  # (B, H or 1, P)
        key_attention = _over_heads(total, masks.query, S, masks.head, H, request)
    if request.key_max:
        key_max = p.detach().masked_fill(~counted[:, None, :, None], 0.0).amax(2)
        key_max = key_max if request.per_head else key_max.amax(1)

    query_attention = column = None
    if request.query_attention:
        t = s.masked_fill(~counted[:, None, :, None], -torch.inf)
        column = torch.logsumexp(t, dim=2)  # (B, H, P)
        finite = torch.where(column == -torch.inf, torch.zeros_like(column), column)
        r = torch.exp(t - finite[:, :, None])  # zero without a key or link: logits of -inf
        total = (r if request.per_head else r.sum(1, keepdim=True)).sum(3)  # (B, H or 1, S)
        query_attention = _over_heads(total, masks.key, P, masks.head, H, request)
    return Forward(output, lse, max_probability, entropy, key_attention, query_attention, key_max, column)


def _first_maximum(p: Tensor) -> Tensor:
    """Largest weight of each row; where several are equal the gradient goes to the first of them."""
    return p.gather(-1, p.detach().argmax(-1, keepdim=True))[..., 0]


def _over_heads(
    total: Tensor, valid: Tensor | None, length: int, heads: Tensor | None, head_count: int, request: Request
) -> Tensor:
    """Sums over valid positions (B, H or 1, length) made a mean: (B, length), or per head (B, H, length)."""
    one = share(valid, length, heads, head_count, request, total.dtype)
    mean = total * (one[..., None] if isinstance(one, Tensor) else one)
    return mean if request.per_head else mean[:, 0]
