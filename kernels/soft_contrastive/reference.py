"""Soft-target contrastive loss in plain PyTorch: the specification. It materialises the (N, M) logits."""

from __future__ import annotations

import torch
from torch import Tensor


def soft_contrastive_reference(
    queries: Tensor,
    keys: Tensor,
    teacher_queries: Tensor,
    query_groups: Tensor,
    key_groups: Tensor,
    temperature: Tensor,
    distillation: float,
) -> Tensor:
    """(N,) losses; see ``api.py``. Uses L = lse(z) - alpha sum_j q_j z_j - (1 - alpha) mean over positives of z."""
    compute = torch.float64 if queries.dtype == torch.float64 else torch.float32
    tau = temperature.to(compute)
    z = queries.to(compute) @ keys.to(compute).T / tau
    positive = (query_groups[:, None] == key_groups[None, :]).to(compute)
    match = (z * positive).sum(1) / positive.sum(1)
    loss = torch.logsumexp(z, 1) - (1 - distillation) * match
    if distillation > 0:
        with torch.no_grad():
            soft = torch.softmax(teacher_queries.to(compute) @ keys.to(compute).T / tau, 1)
        loss = loss - distillation * (soft * z).sum(1)
    return loss
