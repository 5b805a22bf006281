"""What topk_mask refuses, each in one line that names the culprit and the remedy."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..cross_attention.finite import costs_nothing

_WHOLE = (torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8)


def check_scores(scores: Any) -> None:
    if not isinstance(scores, Tensor):
        raise TypeError(f"scores must be a tensor, got {type(scores).__name__}")
    if scores.ndim not in (2, 3) or not scores.is_floating_point():
        raise ValueError(
            "scores must be a floating (rows, positions) tensor or (rows, partials, positions) to take the mean of, "
            f"got {scores.dtype} {tuple(scores.shape)}"
        )
    if scores.ndim == 3 and scores.shape[1] == 0:
        raise ValueError(f"scores must have at least one partial, got {tuple(scores.shape)}")


def check_valid(valid: Any, scores: Tensor) -> None:
    shape = (scores.shape[0], scores.shape[-1])
    if not isinstance(valid, Tensor):
        raise TypeError(f"valid must be a bool tensor {shape}, got {type(valid).__name__}")
    if valid.dtype != torch.bool or valid.shape != shape:
        hint = ": True = may be marked, so valid.bool()" if valid.shape == shape else ""
        raise ValueError(f"valid must be bool {shape}, got {valid.dtype} {tuple(valid.shape)}{hint}")
    if valid.device != scores.device:
        raise ValueError(f"valid must be on the device of scores, {scores.device}, got {valid.device}")


def check_amount(k: Any, ratio: Any, threshold: Any, scores: Tensor) -> None:
    """Of tensors the values are looked at on a CPU alone: elsewhere the host would wait for them."""
    if k is not None and ratio is not None:
        raise ValueError(f"k and ratio both say how many: leave one out, got k={_told(k)} and ratio={_told(ratio)}")
    if k is None and ratio is None and threshold is None:
        raise ValueError("nothing says how many to mark: give k, ratio or threshold")
    if isinstance(threshold, Tensor):
        raise TypeError("threshold must be a number, got a tensor: compare the scores yourself and pass it as valid")
    if threshold is not None and not isinstance(threshold, (int, float)):
        raise TypeError(f"threshold must be a number, got {type(threshold).__name__}")
    B, N = scores.shape[0], scores.shape[-1]
    if isinstance(k, Tensor):
        _check_per_row("k", k, k.dtype in _WHOLE, "int", "int", scores)
        if costs_nothing(k) and B and not 0 <= int(k.min()) <= int(k.max()) <= N:
            raise ValueError(f"k must lie in [0, {N}], the positions of a row, got {int(k.min())} to {int(k.max())}")
    elif k is not None:
        if isinstance(k, float):
            raise TypeError(f"k must be a whole number of positions, got {k}: for a share of them pass ratio={k}")
        if not isinstance(k, int):
            raise TypeError(f"k must be an int or a tensor of one for each row, got {type(k).__name__}: pass int(k)")
        if not 0 <= k <= N:
            raise ValueError(f"k must lie in [0, {N}], the positions of a row, got {k}: pass min(k, {N})")
    elif isinstance(ratio, Tensor):
        # half precision would take 0.2 for 0.19995, and mark one of ten
        exact = ratio.dtype in (torch.float32, torch.float64)
        _check_per_row("ratio", ratio, exact, "float", "float32 or float64", scores)
        if costs_nothing(ratio) and not bool(((ratio >= 0) & (ratio <= 1)).all()):
            raise ValueError(f"ratio must lie in [0, 1], got {float(ratio.min())} to {float(ratio.max())}")
    elif ratio is not None and not isinstance(ratio, (int, float)):
        raise TypeError(f"ratio must be a float or a tensor of one for each row, got {type(ratio).__name__}")
    elif ratio is not None and not 0.0 <= ratio <= 1.0:
        raise ValueError(f"ratio must lie in [0, 1], got {ratio}")


def _check_per_row(name: str, x: Tensor, fits: bool, kind: str, dtype: str, scores: Tensor) -> None:
    shape = (scores.shape[0],)
    if not fits or x.shape != shape or x.device != scores.device:
        raise ValueError(
            f"{name} must be one {kind}, or {shape} {dtype} on {scores.device}, one for each row, "
            f"got {x.dtype} {tuple(x.shape)} on {x.device}"
        )


def check_gumbel(seed: Any, rows: Any, scores: Tensor) -> None:
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or seed.numel() != 1 or seed.device != scores.device:
            raise ValueError(
                f"gumbel_seed must be one int64 on {scores.device}, "
                f"got {seed.dtype} {tuple(seed.shape)} on {seed.device}"
            )
    elif seed is None:
        if rows is not None:
            raise ValueError("gumbel_rows without gumbel_seed: give the seed that the noise is drawn from")
    elif not (isinstance(seed, int) and -(2**63) <= seed < 2**63):
        raise ValueError(f"gumbel_seed must be a 64-bit integer, a tensor of one, or None, got {seed!r}")
    if rows is None:
        return
    shape = (scores.shape[0],)
    if not isinstance(rows, Tensor):
        raise TypeError(f"gumbel_rows must be an int64 tensor {shape}, got {type(rows).__name__}")
    if rows.dtype != torch.int64 or rows.shape != shape or rows.device != scores.device:
        raise ValueError(
            f"gumbel_rows must be int64 {shape} on {scores.device}, one for each row, "
            f"got {rows.dtype} {tuple(rows.shape)} on {rows.device}"
        )


def _told(x: Any) -> str:
    return f"a tensor {tuple(x.shape)}" if isinstance(x, Tensor) else repr(x)
