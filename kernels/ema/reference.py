"""Exponential moving average in plain PyTorch: the specification, and bit for bit what the native kernels compute."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..philox import philox

_INFINITY = 0x7F800000  # of float32; numbers below are float32 bit patterns too
_SMALLEST_NORMAL = 0x38800000  # 2**-14, float16's smallest normal number
_BEYOND = 0x47800000  # 2**16: from here on float16 has infinity alone


@torch.no_grad()
def ema_update_reference(
    teacher: Sequence[Tensor],
    student: Sequence[Tensor],
    decay: float,
    copies: Sequence[Tensor] = (),
    seed: Tensor | None = None,
) -> None:
    """``teacher ← teacher + (1 − decay)·(student − teacher)`` in place; then ``copies ← teacher``.

    In float32, for float64 teachers in float64. Rounded to the nearest; with ``seed``, (1,) int64, 16-bit teachers are
    rounded stochastically. An empty uint8 tensor among the copies stands for a tensor that gets none.
    """
    for i, (t, s) in enumerate(zip(teacher, student, strict=True)):
        exact = torch.float64 if t.dtype == torch.float64 else torch.float32
        result = _average(t.to(exact), s.to(exact), decay)
        if seed is not None and t.dtype in (torch.bfloat16, torch.float16):
            result = round_stochastically(result, t.dtype, draws(seed, i, t.numel()).as_strided(t.size(), t.stride()))
        t.copy_(result)
        if copies and copies[i].dtype != torch.uint8:
            copies[i].copy_(t)


def _average(t: Tensor, s: Tensor, decay: float) -> Tensor:
    """From the nearer end, as torch.lerp, so that the ends are exact; every operation is rounded by itself."""
    weight, keep = torch.tensor([1.0 - decay, decay], dtype=torch.float64).to(t.dtype).tolist()
    if weight == 0.0:
        return t
    if keep == 0.0:
        return s
    difference = s - t
    return t + difference.mul_(weight) if weight < 0.5 else s - difference.mul_(keep)


def draws(seed: Tensor, tensor: int, size: int) -> Tensor:
    """(size,) int32 in [0, 2**16): element e of the tensor takes 16 bits of Philox's counter (e // 8, tensor)."""
    group = torch.arange(-(-size // 8), device=seed.device)
    low, high = group & 0xFFFFFFFF, group >> 32
    words = philox(seed, (low, high, torch.full_like(group, tensor), torch.zeros_like(group)))
    halves = [half for word in words for half in (word & 0xFFFF, word >> 16)]
    return torch.stack(halves, dim=-1).flatten()[:size].int()


def round_stochastically(x: Tensor, dtype: torch.dtype, draw: Tensor) -> Tensor:
    """Float32 to bfloat16 or float16: up with the probability of what is cut off, else down, by 16 random bits each."""
    bits = x.view(torch.int32)
    magnitude = bits & 0x7FFFFFFF
    if dtype == torch.bfloat16:
        rounded = (bits + draw) >> 16
        not_a_number = 0x7FC0
    else:
        held = magnitude.clamp(max=_SMALLEST_NORMAL).view(torch.float32)
        subnormal = ((held * 2.0**40).int() + draw) >> 16  # multiples of 2**-40, 16 bits below the smallest spacing
        moved = magnitude + (draw >> 3)  # 13 bits are cut off
        finite = torch.where(magnitude < _SMALLEST_NORMAL, subnormal, (moved - (112 << 23)) >> 13)
        rounded = torch.where(moved < _BEYOND, finite, 0x7C00) | ((bits >> 16) & 0x8000)
        not_a_number = 0x7E00
    return torch.where(magnitude > _INFINITY, not_a_number, rounded).to(torch.int16).view(dtype)
