"""Starts the backward kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from ..request import Contrast, Forward
from .backward import backward_keys, backward_queries
from .launch_forward import Shares, Sweep


@torch.no_grad()
def backward(
    grad_loss: Tensor, contrast: Contrast, found: Forward, for_queries: bool, for_keys: bool
) -> tuple[Tensor, Tensor]:
    """d queries (N, E), d keys (M, E), of the in-batch keys; what is not asked for is (0, E)."""
    queries, width = contrast.queries.shape
    d_queries, d_keys = (contrast.queries.new_empty((0, width)) for _ in range(2))
    statistics = {"Lse": found.lse, "TeacherLse": found.teacher_lse, "Matches": found.matches}
    grad_loss = grad_loss.contiguous()
    if for_queries:
        sweeps = [Sweep(contrast, *source) for source in contrast.sources()]
        shares = [Shares.of(sweep, backward_queries) for sweep in sweeps]
        splits = sum(share.splits for share in shares)
        part = torch.empty((splits, queries, width), dtype=torch.float32, device=grad_loss.device)
        before = 0
        for sweep, share in zip(sweeps, shares, strict=True):
            given = {"Part": part, "first_split": before, "split_keys": share.keys}
            given |= {"part_split": part.stride(0) // sweep.unit, "part_row": part.stride(1) // sweep.unit}
            sweep.start(backward_queries, share.splits * share.blocks, share.tile, statistics | given)
            before += share.splits
        d_queries = part.sum(0).mul_((grad_loss / contrast.temperature)[:, None]).to(contrast.dtype)
    if for_keys:
        d_keys = torch.empty(contrast.keys.shape, dtype=contrast.dtype, device=grad_loss.device)
        if len(d_keys):
            sweep = Sweep(contrast, contrast.keys, contrast.key_groups)
            tile = sweep.tile(backward_keys)
            programs = -(-sweep.keys // tile.block_k) * -(-width // tile.block_w)
            # not 0, by which a gradient would be divided
            largest = grad_loss.abs().amax().clamp(min=torch.finfo(torch.float32).tiny)
            given = {"GradLoss": grad_loss, "Largest": largest, "GradKey": d_keys, "dk_row": width // sweep.unit}
            sweep.start(backward_keys, programs, tile, statistics | given)
    return d_queries, d_keys
