"""What cross-attention refuses, each in one line that names the culprit."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from .request import STATISTICS

MAX_WIDTH = 256
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_types(q: Any, k: Any, v: Any, scale: Any, dropout_p: Any, dropout_seed: Any) -> None:
    """What everything after this takes for granted."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    if isinstance(scale, Tensor):
        raise TypeError("scale must be a number, got a tensor: multiply q by a learned scale, and pass scale=1.0")
    if scale is not None and not (isinstance(scale, int | float) and math.isfinite(scale)):
        raise ValueError(f"scale must be a finite number or None, got {scale!r}")
    if not (isinstance(dropout_p, int | float) and 0.0 <= dropout_p < 1.0):
        raise ValueError(f"dropout_p must be a number in [0, 1), got {dropout_p!r}")
    if isinstance(dropout_seed, Tensor):
        if dropout_seed.dtype != torch.int64 or dropout_seed.numel() != 1 or dropout_seed.device != q.device:
            raise ValueError(
                f"dropout_seed must be one int64 on {q.device}, "
                f"got {dropout_seed.dtype} {tuple(dropout_seed.shape)} on {dropout_seed.device}"
            )
    elif dropout_seed is not None and not (isinstance(dropout_seed, int) and -(2**63) <= dropout_seed < 2**63):
        raise ValueError(f"dropout_seed must be a 64-bit integer, a tensor of one, or None, got {dropout_seed!r}")


def check_names(statistics: Collection[str]) -> list[str]:
    """The names in the order of STATISTICS, each once."""
    if isinstance(statistics, str):
        raise ValueError(
            f"statistics must be a collection of names, got the string {statistics!r}: write ({statistics!r},)"
        )
    try:
        given = list(statistics)
    except TypeError:
        raise TypeError(f"statistics must be a collection of names, got {statistics!r}") from None
    unknown = [name for name in given if name not in STATISTICS]
    if unknown:
        raise ValueError(f"unknown statistics {unknown}; choose from {list(STATISTICS)}")
    return [name for name in STATISTICS if name in given]


def check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    query_mask: Tensor | None,
    head_mask: Tensor | None,
    link_mask: Tensor | None = None,
) -> Tensor | None:
    """Refuse what does not fit; returns the head mask as (B, H)."""
    if q.ndim != 4 or k.ndim != 4 or v.ndim != 4:
        shapes = ", ".join(str(tuple(x.shape)) for x in (q, k, v))
        raise ValueError(f"q, k and v must be (batch, heads, length, width), got {shapes}")
    if k.shape != v.shape or q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3]:
        raise ValueError(f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} do not fit together")
    if not q.dtype == k.dtype == v.dtype or q.dtype not in DTYPES:
        raise ValueError(
            "q, k and v must share one floating dtype, float16, bfloat16, float32 or float64, "
            f"got {q.dtype}, {k.dtype}, {v.dtype}"
        )
    if not q.device == k.device == v.device:
        raise ValueError(f"q, k and v must be on one device, got {q.device}, {k.device}, {v.device}")
    B, H, S, D = q.shape
    if not 1 <= D <= MAX_WIDTH:
        raise ValueError(f"the width of a head must lie in 1 .. {MAX_WIDTH}, got {D}: use more heads")
    if H == 0 or S == 0 or k.shape[2] == 0:
        raise ValueError(f"there must be a head, a query and a key, got q {tuple(q.shape)} and k {tuple(k.shape)}")
    if isinstance(head_mask, Tensor) and head_mask.shape == (H,):
        head_mask = head_mask.expand(B, H)
    for name, mask, shape, true in (
        ("key_mask", key_mask, (B, k.shape[2]), "attend"),
        ("query_mask", query_mask, (B, S), "count"),
        ("head_mask", head_mask, (B, H), "on"),
        ("link_mask", link_mask, (B, S, k.shape[2]), "linked"),
    ):
        if mask is None:
            continue
        if not isinstance(mask, Tensor):
            raise TypeError(f"{name} must be a bool tensor {shape}, got {type(mask).__name__}")
        fitting = [shape, (1, *shape[1:])] if name == "link_mask" else [shape]
        if mask.dtype != torch.bool or mask.shape not in fitting:
            other = {"head_mask": f" or {(H,)}", "link_mask": f" or {(1, *shape[1:])}"}.get(name, "")
            wanted = f"bool {shape}{other}"
            hint = f": True = {true}, so mask.bool()" if mask.dtype != torch.bool and mask.shape in fitting else ""
            raise ValueError(f"{name} must be {wanted}, got {mask.dtype} {tuple(mask.shape)}{hint}")
        if mask.device != q.device:
            raise ValueError(f"{name} must be on the device of q, {q.device}, got {mask.device}")
    return head_mask
