"""Linear and soft-label cross-entropy with all logits in memory: the specification. Differentiable twice."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def soft_cross_entropy_reference(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    teacher_hidden: Tensor | None,
    teacher_weight: Tensor | None,
    teacher_bias: Tensor | None,
    distillation: float,
    token_weights: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """losses (N,) = -w_i (alpha sum_j q_ij log p_ij + (1 - alpha) log p_i,label), p = softmax(z), and the argmax of z.

    The rules stand in ``api.py``.
    """
    z = _logits(hidden, weight, bias)
    p = z.log_softmax(1)
    loss = -(1 - distillation) * p.gather(1, labels[:, None])[:, 0]
    if distillation > 0:
        assert teacher_hidden is not None
        assert teacher_weight is not None
        with torch.no_grad():
            q = _logits(teacher_hidden, teacher_weight, teacher_bias).softmax(1)
        loss = loss - distillation * (q * p).sum(1)
    if token_weights is not None:
        loss = loss * token_weights.detach().to(loss.dtype)
    return loss, z.detach().argmax(1)


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    return F.linear(hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))
