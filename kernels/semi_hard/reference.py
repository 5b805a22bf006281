"""The walk to the s-th most similar sample, a step at a time: the specification. Plain PyTorch, any floating dtype."""

from __future__ import annotations

import torch
from torch import Tensor


def walk(similarity: Tensor, groups: Tensor | None, similar: int, start: int, apart: int) -> Tensor:
    """(M,) int64 on the CPU; the rules stand in ``api.py``. ``similarity`` (M, M), ``groups`` (M,) int64 or None."""
    unused = torch.ones(len(similarity), dtype=torch.bool, device=similarity.device)
    unused[start] = False
    order = [start]
    for place in range(1, len(similarity)):
        row = similarity[order[-1]] if place % 2 else similarity[:, order[-1]]
        candidates = unused
        if groups is not None:
            for near in (order[-apart:], order[-1:]):
                others = unused & ~torch.isin(groups, groups[near])
                if bool(others.any()):
                    candidates = others
                    break
        samples = candidates.nonzero()[:, 0]
        value = row[samples]
        nan = value.isnan()
        ranked = torch.argsort(value.masked_fill(nan, -torch.inf), descending=True, stable=True)
        ranked = ranked[torch.argsort(nan[ranked].to(torch.uint8), stable=True)]  # NaN behind even -inf
        order.append(int(samples[ranked[min(similar, len(samples)) - 1]]))
        unused[order[-1]] = False
    return torch.tensor(order, dtype=torch.int64)
