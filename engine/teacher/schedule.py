"""How fast the teacher follows: the momentum of the t-th update."""

from __future__ import annotations


def momentum_at(updates: int, momentum: float, warmup: bool = False) -> float:
    """Momentum of the update that follows ``updates`` earlier ones; in [0, 1).

    Constant, or with ``warmup`` ``min(momentum, (1 + t) / (10 + t))``: short memory while the student still moves fast.
    """
    return min(momentum, (1 + updates) / (10 + updates)) if warmup else momentum
