"""How fast the teacher follows: the decay (momentum) of each update as a small function of the updates made so far."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Schedule = Callable[[int], float]  # updates made so far -> decay of the next one, in [0, 1]
Name = Literal["constant", "warmup", "cosine"]


@dataclass(frozen=True)
class Constant:
    """``decay``, always. ValueError unless 0 <= decay < 1: at 1 the teacher would never move."""

    decay: float

    def __post_init__(self) -> None:
        _check(self.decay)

    def __call__(self, updates: int) -> float:
        return self.decay


@dataclass(frozen=True)
class WarmUp:
    """``min(decay, (1 + t) / (10 + t))``: a short memory while the student still moves fast.

    The rule of TensorFlow's ``ExponentialMovingAverage(num_updates=t)``. ValueError unless 0 <= decay < 1.
    """

    decay: float

    def __post_init__(self) -> None:
        _check(self.decay)

    def __call__(self, updates: int) -> float:
        return min(self.decay, (1 + updates) / (10 + updates))


@dataclass(frozen=True)
class Cosine:
    """``1 - (1 - decay) (cos(pi t / T) + 1) / 2``: from ``decay`` at the first update to 1 after T of them.

    BYOL (Grill et al., 2020, section 3.2) and DINO (Caron et al., 2021). Beyond T the decay stays 1 and the teacher as
    it is. ValueError unless 0 <= decay < 1 and T >= 1.
    """

    decay: float
    total_updates: int

    def __post_init__(self) -> None:
        _check(self.decay)
        if isinstance(self.total_updates, bool) or not isinstance(self.total_updates, int) or self.total_updates < 1:
            raise ValueError(f"a cosine over {self.total_updates!r} updates: give a whole number, at least 1")

    def __call__(self, updates: int) -> float:
        progress = min(updates, self.total_updates) / self.total_updates
        return 1.0 - (1.0 - self.decay) * (math.cos(math.pi * progress) + 1.0) / 2.0


def named_schedule(name: Name, decay: float, total_updates: int) -> Schedule:
    """The schedule a recipe asks for by name; ``total_updates`` of the whole run matter to "cosine" alone."""
    if name == "cosine":
        return Cosine(decay, total_updates)
    if name not in ("constant", "warmup"):
        raise ValueError(f"schedule {name!r} is not one of constant, warmup, cosine")
    return WarmUp(decay) if name == "warmup" else Constant(decay)


def as_schedule(decay: float | Schedule) -> Schedule:
    """A number as the constant schedule it stands for; ValueError for what is neither number nor function."""
    if callable(decay):
        return decay
    return Constant(decay)


def decay_at(schedule: Schedule, updates: int) -> float:
    """The schedule's decay for the update after ``updates`` earlier ones; ValueError where it is not in [0, 1]."""
    decay = schedule(updates)
    if not isinstance(decay, (int, float)) or not 0.0 <= decay <= 1.0:
        raise ValueError(f"the decay schedule gave {decay!r} for update {updates}: a decay lies in [0, 1]")
    return float(decay)


def _check(decay: object) -> None:
    if isinstance(decay, bool) or not isinstance(decay, (int, float)) or not 0.0 <= decay < 1.0:
        raise ValueError(f"decay {decay!r} is not a number in [0, 1)")
