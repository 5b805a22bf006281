"""Starts the selection kernel: one launch, and nothing waits for the device."""

from __future__ import annotations

import ctypes
import math

import torch
from torch import Tensor

from ... import launch
from ...cross_attention.triton.configs import architecture
from ..request import BITS, Request, Selected
from . import configs
from .kernel import topk_mask


def select(scores: Tensor, valid: Tensor | None, request: Request) -> Selected:
    """The mask of the (B, R, N) scores' means that ``request`` asks for, its indices, and counts.

    Raises:
        ValueError: more than 16384 positions, which do not fit the registers of one program.
    """
    B, R, N = scores.shape
    if N > configs.LONGEST:
        raise ValueError(
            f"the Triton selection takes rows of at most {configs.LONGEST} positions, got {N}: say impl='reference'"
        )

    def empty(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=scores.device)

    mask, indices, count, nan = empty(B, N, dtype=torch.bool), empty(B, request.width), empty(B), empty(B)
    if B == 0 or N == 0:
        return mask, indices.fill_(-1), count.zero_(), nan.zero_()
    config = configs.select(architecture(scores.device), N, request.seed is not None)
    unit = configs.units(N, scores)
    limit = request.k if request.ratio is None else request.ratio
    share = request.ratio is not None or limit is None
    limit = 1 << BITS if limit is None else limit
    per_row = isinstance(limit, Tensor)
    bits = 64 if scores.dtype == torch.float64 else 32
    beyond = sortable(request.threshold, request.largest, bits)
    keys = empty(B, config.block, dtype=torch.int64 if bits == 64 else torch.int32) if config.staged else count
    arguments = {
        "Scores": scores,
        "Valid": launch.byte(valid, scores),
        "Limit": limit.contiguous() if isinstance(limit, Tensor) else count,
        "Seed": count if request.seed is None else request.seed,
        "Rows": count if request.rows is None else request.rows.contiguous(),
        "Keys": keys,
        "Mask": mask.view(torch.uint8),
        "Indices": indices if request.width else count,
        "Count": count,
        "Nan": nan,
        "N": N // unit,
        "partials": R,
        "row_stride": scores.stride(0) // unit,
        "partial_stride": scores.stride(1) // unit,
        "width": request.width,
        "limit_high": 0 if isinstance(limit, Tensor) else limit >> 24,
        "limit_low": 0 if isinstance(limit, Tensor) else limit & 0xFFFFFF,
        "is_ratio": int(share),
        "flip": 0 if request.largest else -1,
        "beyond_high": beyond >> (bits - 32),
        "beyond_low": _signed(beyond & 0xFFFFFFFF) if bits == 64 else 0,
        "UNIT": unit,
        "BLOCK": config.block,
        "CHUNK": config.chunk,
        "BITS": bits,
        "HAS_VALID": valid is not None,
        "PER_ROW": per_row,
        "HAS_NOISE": request.seed is not None,
        "STAGED": config.staged,
        "HAS_INDICES": request.width > 0,
    }
    launch.start(topk_mask, (B,), arguments, config, scores.device)
    return mask, indices, count, nan


def sortable(threshold: float | None, largest: bool, bits: int) -> int:
    """The key of a threshold, as ``kernel.sortable`` makes those of values: what has a larger one lies beyond it.

    As an integer, because Triton passes a float to a kernel in 32 bits. None: the lowest, beyond which all lies.
    """
    highest = (1 << (bits - 1)) - 1
    if threshold is None:
        return -highest - 1
    if math.isnan(threshold):
        return highest
    if bits == 64:
        raw = ctypes.c_int64.from_buffer(ctypes.c_double(threshold)).value
    else:  # rounded to float32; what is too large for it is infinite
        raw = ctypes.c_int32.from_buffer(ctypes.c_float(threshold)).value
    magnitude = raw & highest
    key = raw if raw >= 0 else -1 - magnitude if magnitude else 0
    return key if largest else ~key


def _signed(word: int) -> int:
    return word - (1 << 32) if word >> 31 else word
