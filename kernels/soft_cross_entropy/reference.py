"""Soft-label cross-entropy in plain PyTorch: the specification."""

from __future__ import annotations

import torch
from torch import Tensor


def soft_cross_entropy_reference(
    logits: Tensor, labels: Tensor, teacher_logits: Tensor | None, distillation: float
) -> Tensor:
    """(N,) losses by L = lse(z) - alpha sum_j q_j z_j - (1 - alpha) z_label; see ``api.py``."""
    z = logits if logits.dtype == torch.float64 else logits.float()
    label = z.gather(1, labels[:, None])[:, 0]
    loss = torch.logsumexp(z, 1) - (1 - distillation) * label
    if distillation > 0 and teacher_logits is not None:
        soft = torch.softmax(teacher_logits.detach().to(z.dtype), 1)
        loss = loss - distillation * (soft * z).sum(1)
    return loss
