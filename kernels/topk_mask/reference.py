"""Top-k masks by a stable sort: the specification."""

from __future__ import annotations

import torch
from torch import Tensor


def topk_mask_reference(
    scores: Tensor, ratio: float, valid: Tensor | None, threshold: float | None, largest: bool
) -> Tensor:
    """(B, N) bool mask of the selected positions; the rules stand in ``api.py``."""
    valid = torch.ones_like(scores, dtype=torch.bool) if valid is None else valid
    count = valid.sum(1)
    # The product is rounded in float64 and nudged by one part in 10^9, so that 0.3 * 10 gives 3 and not 2.
    k = (ratio * (1 + 1e-9) * count.double()).floor().long()
    if ratio > 0:
        k = torch.maximum(k, count.clamp(max=1))
    key = scores if largest else -scores
    nan = torch.isnan(scores)
    order = torch.argsort(key.masked_fill(nan, -torch.inf), dim=1, descending=True, stable=True)
    # Stable sorts by ever stronger reasons: NaN goes behind even -inf, and what may not be marked behind NaN.
    for last in (nan, ~valid):
        order = order.gather(1, torch.argsort(last.gather(1, order), dim=1, stable=True))
    rank = torch.empty_like(order).scatter_(
        1, order, torch.arange(scores.shape[1], device=scores.device).expand_as(order)
    )
    mask = (rank < k[:, None]) & valid
    if threshold is not None:
        mask &= scores > threshold if largest else scores < threshold
    return mask
