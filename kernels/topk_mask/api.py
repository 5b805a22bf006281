"""Exact top-k selection as a mask: the public face of the op."""

from __future__ import annotations

import torch
from torch import Tensor

from .reference import topk_mask_reference


def topk_mask(
    scores: Tensor,
    *,
    ratio: float,
    valid: Tensor | None = None,
    threshold: float | None = None,
    largest: bool = True,
) -> Tensor:
    """Mark each row's highest (or lowest) scores.

    A row keeps ``k = floor(ratio * number of valid positions)``, at least 1 when anything is valid and ``ratio > 0``.
    Ties go to the lower index. NaN counts as the lowest score of all, in either direction: it is marked last.

    Args:
        scores: (B, N), any floating dtype.
        ratio: share of the valid positions, in [0, 1].
        valid: (B, N) bool, True = may be marked; default all.
        threshold: additionally require ``score > threshold`` (``<`` when ``largest`` is False).

    Returns:
        (B, N) bool.

    Raises:
        ValueError: a ratio outside [0, 1] or shapes that do not fit.
    """
    if not 0.0 <= ratio <= 1.0:
        raise ValueError(f"ratio must lie in [0, 1], got {ratio}")
    if scores.ndim != 2 or not scores.is_floating_point():
        raise ValueError(
            f"scores must be a floating (rows, positions) tensor, got {scores.dtype} {tuple(scores.shape)}"
        )
    if valid is not None and (valid.shape != scores.shape or valid.dtype != torch.bool):
        raise ValueError(f"valid must be bool {tuple(scores.shape)}, got {valid.dtype} {tuple(valid.shape)}")
    return topk_mask_reference(scores, ratio, valid, threshold, largest)
