"""Decisions that every rank must take alike: one cheap collective, and a world of one needs none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import UserError
from ..teacher.gather import world_size

T = TypeVar("T")


def collective_device() -> torch.device:
    """Where a tensor must lie for the default process group to move it."""
    return torch.device("cuda" if "nccl" in dist.get_backend() else "cpu")


def any_rank(flag: bool | Tensor) -> bool:
    """True where ``flag`` (a bool, or a tensor of one element) is true on at least one rank. Collective."""
    if world_size() == 1:
        return bool(flag)
    vote = torch.as_tensor(flag).detach().reshape(1).to(collective_device(), torch.int32)
    dist.all_reduce(vote, op=dist.ReduceOp.MAX)
    return bool(vote.item())


def first_error(error: str | None) -> str | None:
    """The first rank's error message, if any rank has one, on every rank. Collective."""
    if not any_rank(error is not None):
        return None
    if world_size() == 1:
        return error
    errors: list[str | None] = [None] * world_size()
    dist.all_gather_object(errors, error)
    return next(f"rank {rank}: {message}" for rank, message in enumerate(errors) if message is not None)


def rank_of_process() -> int:
    """This process's rank; 0 without a process group."""
    return dist.get_rank() if world_size() > 1 else 0


def by_first_rank(make: Callable[[], T]) -> T:
    """What ``make`` returns on rank 0, on every rank; it is pickled. Collective.

    Raises:
        UserError: on the other ranks, where ``make`` raised something on rank 0, which raises that itself.
    """
    if world_size() == 1:
        return make()
    box: list[Any] = [None]
    error: Exception | None = None
    if rank_of_process() == 0:
        try:
            box = [make()]
        except Exception as problem:
            error = problem
    told = first_error(None if error is None else str(error) or type(error).__name__)
    if error is not None:
        raise error
    if told is not None:
        raise UserError(told)
    dist.broadcast_object_list(box, src=0)
    made: T = box[0]
    return made
