"""Mask ratios that change over the run or from sample to sample.

Linear decay from 0.3 to 0.15: Ankner et al. 2023, "Dynamic masking rate schedules for MLM pretraining". Cosine and
linear time-variant ratios: Yang et al. 2023, "Learning better masking for better language model pre-training".
Per-sample uniform: MaskViT (Gupta et al. 2022). Per-sample truncated Gaussian: MAGE (Li et al. 2023).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..recipe import RatioSection
from .draws import Draws


def ratio_at(setting: float | RatioSection, progress: float, draws: Draws, purpose: str) -> float | Tensor:
    """The ratio at a share of the run, 0..1: a number, or (B,) float32 where it differs from sample to sample."""
    if not isinstance(setting, RatioSection):
        return setting
    start, end = setting.start, setting.end
    if setting.kind == "uniform":
        return start + (end - start) * draws.uniform(purpose)
    if setting.kind == "gaussian":
        # By the inverse of the distribution function between the ends: exact truncation without rejection. Mirrored
        # where the ends lie above the mean: next to 1 the function would have no digits left to tell them apart.
        side = -1.0 if setting.low + end > 2.0 * start else 1.0
        ends = [_normal(side * (x - start) / setting.spread) for x in (setting.low, end)]
        quantile = ends[0] + (ends[1] - ends[0]) * draws.uniform(purpose).double()
        drawn = start + side * setting.spread * torch.special.ndtri(quantile.clamp(min=1e-300))
        return drawn.clamp(setting.low, end).float()
    done = min(1.0, progress / setting.until)
    if setting.kind == "step":
        return end if done >= 1.0 else start
    if setting.kind == "cosine":
        done = 0.5 - 0.5 * math.cos(math.pi * done)
    return start + (end - start) * done


def _normal(z: float) -> float:
    return 0.5 * math.erfc(-z / math.sqrt(2))
