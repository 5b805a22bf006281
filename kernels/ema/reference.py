"""Exponential moving average in plain PyTorch: the specification."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


@torch.no_grad()
def ema_update_reference(teacher: Sequence[Tensor], student: Sequence[Tensor], decay: float) -> None:
    """``teacher ← teacher + (1 − decay)·(student − teacher)``, in the teacher's dtype, float64 included; in place."""
    for t, s in zip(teacher, student, strict=True):
        t.add_(s.to(t.dtype) - t, alpha=1.0 - decay)
