"""Top-k masks by a stable sort: the specification. Plain PyTorch, any device, any N."""

from __future__ import annotations

import torch
from torch import Tensor

from ..philox import uniform
from .request import Request, Selected, share_of


def gumbel(seed: Tensor, rows: Tensor, columns: int) -> Tensor:
    """(B, columns) float32 standard Gumbel noise ``-log(-log(u))``, for float64 scores too; ``u`` as in philox."""
    return -(-uniform(seed, rows, columns).log()).log()


def values(scores: Tensor, request: Request) -> Tensor:
    """(B, N) what is selected from: partials added in their order, times 1/R, and the noise. float32, or float64."""
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    value = scores[:, 0]
    for partial in scores.unbind(1)[1:]:
        value = value + partial
    if scores.shape[1] > 1:
        value = value * (1.0 / scores.shape[1])
    if request.seed is not None and request.rows is not None:
        value = value + gumbel(request.seed, request.rows, value.shape[1])
    return value


def select(scores: Tensor, valid: Tensor | None, request: Request) -> Selected:
    """The rules stand in ``api.py``, the types in ``request.py``."""
    value = values(scores, request)
    valid = torch.ones_like(value, dtype=torch.bool) if valid is None else valid
    count = valid.sum(1)
    if request.ratio is not None:
        k = share_of(request.ratio, count)
    elif request.k is not None:
        k = count.clamp(max=request.k) if isinstance(request.k, int) else torch.minimum(request.k.clamp(min=0), count)
    else:
        k = count

    nan = value.isnan()
    key = (value if request.largest else -value).masked_fill(nan, -torch.inf)
    order = torch.argsort(key, dim=1, descending=True, stable=True)
    # Stable sorts by ever stronger reasons: NaN goes behind even -inf, and what may not be marked behind NaN.
    for last in (nan, ~valid):
        order = order.gather(1, torch.argsort(last.gather(1, order), dim=1, stable=True))
    position = torch.arange(value.shape[1], device=value.device)
    rank = torch.empty_like(order).scatter_(1, order, position.expand_as(order))
    mask = (rank < k[:, None]) & valid
    if request.threshold is not None:
        mask = mask & (value > request.threshold if request.largest else value < request.threshold)
    return mask, indices_of(mask, request.width), mask.sum(1), (nan & valid).sum(1)


def indices_of(mask: Tensor, width: int) -> Tensor:
    """(B, width) int64: where each row of the (B, N) mask is True, ascending, then -1."""
    B, N = mask.shape
    place = (mask.cumsum(1) - 1).masked_fill(~mask, width).clamp(max=width)  # the last column is cut off
    indices = torch.full((B, width + 1), -1, dtype=torch.int64, device=mask.device)
    return indices.scatter_(1, place, torch.arange(N, device=mask.device).expand(B, N))[:, :width].contiguous()
