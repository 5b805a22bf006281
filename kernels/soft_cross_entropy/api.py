"""Vocabulary cross-entropy against labels and a teacher: the public face of the op."""

from __future__ import annotations

from torch import Tensor

from .reference import soft_cross_entropy_reference


def soft_cross_entropy(logits: Tensor, labels: Tensor, teacher_logits: Tensor | None, distillation: float) -> Tensor:
    """(1 - alpha) * cross-entropy to the labels + alpha * cross-entropy to the teacher's softmax, row by row.

    Masked language modelling with momentum distillation (ALBEF, Li et al. 2021, eq. 7).

    Args:
        logits: (N, V) student logits; receive gradients.
        labels: (N,) int64.
        teacher_logits: (N, V), no gradient; may be None when ``distillation`` is 0.
        distillation: alpha in [0, 1].

    Returns:
        (N,) losses in float32, nats.

    Raises:
        ValueError: shapes that do not fit, or a teacher missing while ``distillation`` is positive.
    """
    if logits.ndim != 2 or labels.shape != logits.shape[:1]:
        raise ValueError(f"logits {tuple(logits.shape)} and labels {tuple(labels.shape)} must be (N, V) and (N,)")
    if distillation > 0 and (teacher_logits is None or teacher_logits.shape != logits.shape):
        raise ValueError(f"distillation {distillation} needs teacher_logits of shape {tuple(logits.shape)}")
    return soft_cross_entropy_reference(logits, labels, teacher_logits, distillation)
