"""Soft-target contrastive loss in plain PyTorch: the specification. It materialises the (N, M + Q) logits."""

from __future__ import annotations

import torch
from torch import Tensor

from .request import accumulation


def soft_contrastive_reference(
    queries: Tensor,
    keys: Tensor,
    teacher_queries: Tensor,
    query_groups: Tensor,
    key_groups: Tensor,
    temperature: Tensor,
    distillation: float,
    queue: Tensor | None = None,
    queue_groups: Tensor | None = None,
) -> Tensor:
    """(N,) losses; see ``api.py``. Differentiable twice."""
    compute = accumulation(queries.dtype)
    tau = temperature.to(compute)
    rows, groups = keys.to(compute), key_groups
    if queue is not None and queue_groups is not None:
        rows, groups = torch.cat((rows, queue.detach().to(compute))), torch.cat((groups, queue_groups))
    z = queries.to(compute) @ rows.T / tau
    match = (query_groups[:, None] == groups[None, :]) & (groups != -1)
    count = match.sum(1)
    lse, found = torch.logsumexp(z, 1), count > 0
    positive = (z * match).sum(1) / count.clamp(min=1)
    loss = (1 - distillation) * torch.where(found, lse - positive, 0.0)
    if distillation > 0:
        with torch.no_grad():
            soft = torch.softmax(teacher_queries.to(compute) @ rows.T / tau, 1)
        loss = loss + distillation * (lse - (soft * z).sum(1))
    return loss
