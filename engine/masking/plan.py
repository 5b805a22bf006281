"""What a mask policy reads and what it returns."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from crossmask.kernels import AttentionStatistics


@dataclass(frozen=True)
class MaskContext:
    statistics: AttentionStatistics  # of the teacher's chosen fusion layer; patches only, without the image's CLS
    maskable: Tensor  # (B, L) bool, True = a word that may be masked


@dataclass(frozen=True)
class MaskPlan:
    image: Tensor  # (B, P) bool, True = hide this patch
    text: Tensor  # (B, L) bool, True = hide this word
