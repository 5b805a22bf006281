"""Starts the backward: the gradient by the logits of a range of words, and its two products, range by range."""

from __future__ import annotations

import torch
from torch import Tensor

from ..request import Gradients, Inputs, Needed, row_factors
from .backward import backward_words
from .launch_forward import Run

CHUNK = 4096  # words of a range, fewer where there are very many rows
BUFFER = 2**25  # gradients by logits of a range


@torch.no_grad()
def backward(grad_loss: Tensor, inputs: Inputs, lse: Tensor, teacher_lse: Tensor, needed: Needed) -> Gradients:
    """With g the rows' factors, dW = dz^T (g hidden) and dhidden = g (dz W): the factors never meet the logits, which
    would need a wider range than theirs in float16."""
    run = Run(inputs)
    hidden, weight, bias, rows, words = run.hidden, run.weight, inputs.bias, run.rows, run.words
    factors = row_factors(grad_loss, inputs.token_weights)
    scaled = (hidden * factors[:, None]).to(run.dtype) if needed.weight else None

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=run.device)

    d_hidden = torch.zeros(hidden.shape, dtype=torch.float32, device=run.device) if needed.hidden else None
    d_weight = empty(*weight.shape, dtype=weight.dtype) if needed.weight else None
    d_bias = empty(words) if needed.bias and bias is not None else None

    tile = run.tile(backward_words)
    blocks = -(-rows // tile.block_n)
    chunk = max(1, min(CHUNK, BUFFER // rows) // tile.block_v) * tile.block_v
    row = -(-rows // 16) * 16  # so that every word's gradients begin at a multiple of 16 bytes
    buffer, sums = empty(min(chunk, words), row, dtype=run.dtype), empty(blocks, min(chunk, words))
    given = {
        "Lse": lse.contiguous(), "TeacherLse": teacher_lse.contiguous(),
        "Factors": factors, "GradLogits": buffer, "PartialBias": sums, "FOR_BIAS": d_bias is not None, "dz_row": row,
    }  # fmt: skip
    for first in range(0, words, chunk):
        stop = min(first + chunk, words)
        range_ = slice(first, stop)
        programs = -(-(stop - first) // tile.block_v) * blocks
        run.start(backward_words, programs, tile, given | {"first": first, "stop": stop})
        dz = buffer[: stop - first, :rows]
        if d_bias is not None:
            torch.sum(sums.view(-1)[: blocks * (stop - first)].view(blocks, -1), 0, out=d_bias[range_])
        if d_weight is not None:
            assert scaled is not None
            torch.mm(dz, scaled, out=d_weight[range_])
        if d_hidden is not None:
            d_hidden += _product(dz.T, weight[range_])
    return Gradients(
        None if d_hidden is None else (d_hidden * factors[:, None]).to(hidden.dtype),
        d_weight,
        None if d_bias is None or bias is None else d_bias.to(bias.dtype),
    )


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in float32. PyTorch keeps a product of halves in it on NVIDIA's GPUs alone; elsewhere it is rounded, but
    on a CPU, where the interpreter runs."""
    if a.dtype == torch.float32:
        return a @ b
    if a.device.type == "cuda":
        return torch.mm(a, b) if torch.version.hip else torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()
