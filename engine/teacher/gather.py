"""Gathering rows across ranks, with and without a gradient. One process, or none at all, is a world of one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

# torch renamed the collectives on one tensor; the old names warn, the new ones are missing from older releases.
_gather_into = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_scatter_sum = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def world_size(group: ProcessGroup | None = None) -> int:
    """Ranks in ``group`` (default: all); 1 without a process group."""
    return dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1


def gather_flat(shard: Tensor, group: ProcessGroup | None = None) -> Tensor:
    """The equal shards (S, ...) of all ranks one after another in rank order: (W * S, ...), same dtype; collective."""
    ranks = world_size(group)
    out = shard.new_empty((ranks * shard.shape[0], *shard.shape[1:]))
    if ranks == 1:
        return out.copy_(shard)
    _gather_into(out, shard.contiguous(), group=group)
    return out


def start_gather(
    wholes: Sequence[Tensor], shards: Sequence[Tensor], group: ProcessGroup | None = None
) -> dist.Work | None:
    """Starts one collective that fills each 1-d whole (W * S_i,) with the shards (S_i,) of all ranks in rank order.

    A shard may be this rank's own part of its whole. Returns what to ``wait()`` for before the wholes are read and
    before the shards change; None in a world of one, where everything is done. Collective.
    """
    if world_size(group) == 1:
        for whole, shard in zip(wholes, shards, strict=True):
            if whole.data_ptr() != shard.data_ptr():
                whole.copy_(shard)
        return None
    backend: Any = group or dist.group.WORLD  # torch offers the coalesced form on the group object alone
    work: dist.Work = backend.all_gather_single_coalesced(list(wholes), list(shards))
    return work


@torch.no_grad()
def gather_features(rows: Tensor, group: ProcessGroup | None = None) -> Tensor:
    """(B, ...) of every rank, the same B -> (W * B, ...) in rank order, without a gradient. Collective."""
    if world_size(group) == 1:
        return rows.detach()
    if rows.dtype is torch.bool:  # not every backend moves bool
        return gather_flat(rows.to(torch.uint8), group).to(torch.bool)
    return gather_flat(rows.detach(), group)


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: ProcessGroup | None) -> Tensor:
        ctx.group = group
        return gather_flat(rows, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = gradients
        ranks = world_size(ctx.group)
        mine = gradient.new_empty((gradient.shape[0] // ranks, *gradient.shape[1:]))
        _scatter_sum(mine, gradient.contiguous(), group=ctx.group)
        return mine, None


def all_gather_with_grad(rows: Tensor, group: ProcessGroup | None = None) -> Tensor:
    """(B, ...) -> (W * B, ...) in rank order; the backward sums every rank's gradient for this rank's rows.

    A loss averaged over the local batch therefore needs no further factor: ZeRO divides the gradients by W.
    Collective in both directions: every rank must run the backward.
    """
    if world_size(group) == 1:
        return rows
    result: Tensor = _AllGather.apply(rows, group)
    return result
