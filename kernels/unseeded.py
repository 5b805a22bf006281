"""Dropout where no seed says of what: on a CPU PyTorch's own draws cost more than what they are drawn for."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

BITS = 16  # drawn for each number: the probability is rounded to a multiple of 2 ** -16


def drop(x: Tensor, p: float) -> Tensor:
    """``torch.nn.functional.dropout`` in training, by PyTorch's generator.

    On a CPU four numbers share a draw of 64 bits, and the backward keeps a byte for each instead of the factor. Forward
    and backward of (8, 12, 150, 257) on one core of an EPYC, PyTorch / this: float32 19.5 / 9.8 ms, bfloat16 18.5 /
    12.8.
    """
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return F.dropout(x, p)
    found: Tensor = _Drop.apply(x, p)
    return found


class _Drop(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float) -> Tensor:
        count, dropped = x.numel(), round(p * 2**BITS)
        draws = torch.empty(-(-count // 4), dtype=torch.int64).random_(-(2**63), None)
        kept = (draws.view(torch.int16)[:count] >= dropped - 2 ** (BITS - 1)).view(x.shape)
        ctx.save_for_backward(kept)
        ctx.scale = 2**BITS / (2**BITS - dropped)
        return x * kept.to(x.dtype).mul_(ctx.scale)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (kept,) = ctx.saved_tensors
        return gradient * kept.to(gradient.dtype).mul_(ctx.scale), None
