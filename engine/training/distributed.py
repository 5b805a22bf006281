"""Joining the ranks of a run: the same under ``deepspeed``, ``torchrun`` and in a single process without launcher."""

from __future__ import annotations

import os
import socket
import sys
import warnings
from contextlib import suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from ..beats import beat
from ..errors import UserError

if TYPE_CHECKING:
    import torch


# Longest wait of a collective. Who hangs is noticed long before, by watchdog.py and by what the recipe allows (at most
# half of this); a shorter wait here would only end runs whose rank 0 evaluates alone on a large held-out set.
PATIENCE = timedelta(days=1)


class World(NamedTuple):
    rank: int
    size: int
    device: torch.device


def init_distributed() -> World:
    """Start torch's process group through DeepSpeed and choose this rank's device.

    nccl on GPUs, gloo on CPUs. Without a launcher's environment variables: one rank. On CPUs the cores are shared
    evenly among the ranks unless OMP_NUM_THREADS is set.

    Raises:
        UserError: more ranks on this machine than GPUs.
    """
    warnings.filterwarnings("ignore")  # of libraries, about themselves; nothing a user could act on
    import torch

    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}.items():
        os.environ.setdefault(name, value)
    local_rank = int(os.environ["LOCAL_RANK"])
    # torchrun says LOCAL_WORLD_SIZE, DeepSpeed LOCAL_SIZE; DeepSpeed's CPU accelerator reads the latter.
    local_size = int(os.environ.setdefault("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE", "1")))
    gpus = 0 if os.environ.get("DS_ACCELERATOR") == "cpu" else torch.cuda.device_count()
    if gpus:
        if local_rank >= gpus:
            raise UserError(f"{local_size} ranks on this machine but {gpus} GPUs; start {gpus} ranks")
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
        os.environ["DS_ACCELERATOR"] = "cpu"
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(threads_per_rank(local_size))

    import deepspeed
    from deepspeed.utils.logging import set_log_level_from_string

    set_log_level_from_string("error")
    if not gpus:
        # DeepSpeed would compile its shared-memory all-reduce here (a minute and a half; it serves inference only)
        # and print that it did. This table is where it looks up which of its operators can be built.
        deepspeed.ops.__compatible_ops__ = {"deepspeed_shm_comm": False}
    beat("meeting the other ranks")
    alone = "MASTER_PORT" not in os.environ
    if alone:  # only now: during the imports' seconds another process might take it
        os.environ["MASTER_PORT"] = str(free_port())
    try:
        deepspeed.init_distributed(
            "nccl" if gpus else "gloo", timeout=PATIENCE, auto_mpi_discovery=False, verbose=False
        )
    finally:
        if alone:  # it is in use from now on: a process that inherited it could not listen there
            del os.environ["MASTER_PORT"]
    return World(torch.distributed.get_rank(), torch.distributed.get_world_size(), device)


_holders = 0  # of the process group that join() began; 0 where there is none of ours
_set: list[str] = []  # environment variables that it set


def join() -> World:
    """:func:`init_distributed` for a part of a program: :func:`part` ends the process group that this began.

    A group that was there before is joined and left alone. Several may be in the group that the first of them began.
    """
    global _holders
    import torch.distributed as dist

    ours = _holders > 0 or not dist.is_initialized()
    if not dist.is_initialized():
        _forget_groups()
    before = set(os.environ)
    world = init_distributed()
    if ours:
        if not _holders:
            _set[:] = sorted(set(os.environ) - before)
        _holders += 1
    return world


def part() -> None:
    """The counterpart of a :func:`join` that began a process group, or joined that one: the last one ends it."""
    global _holders
    if not _holders:
        return
    _holders -= 1
    if _holders:
        return
    import deepspeed.comm
    import torch.distributed as dist

    if dist.is_initialized():
        deepspeed.comm.destroy_process_group()
    _forget_groups()
    for name in _set:
        os.environ.pop(name, None)
    _set.clear()


def _forget_groups() -> None:
    """What DeepSpeed remembers of groups that are gone, whoever ended them: else the next is taken for one of them."""
    if "deepspeed" not in sys.modules:
        return
    import deepspeed.comm
    from deepspeed.utils import groups

    deepspeed.comm.comm.cdb = None
    groups._release_process_group_references(group=None)


def from_rank_zero(value: Any) -> Any:
    """Rank 0's value, on every rank; any picklable object. Call on all ranks."""
    import torch

    box = [value]
    torch.distributed.broadcast_object_list(box, src=0)
    return box[0]


def leave(code: int, together: bool) -> NoReturn:
    """End this rank's process at once.

    Interpreter exit with DeepSpeed and gloo loaded aborts every tenth time on CPUs ("terminate called without an
    active exception"), long after all work is done; ``os._exit`` never does.

    Args:
        together: wait for the other ranks first; only where all of them come here.
    """
    if together:
        import torch

        if torch.distributed.is_initialized():
            with suppress(Exception):  # a rank that died at the last moment: its own end tells
                torch.distributed.barrier()
    with suppress(OSError, ValueError):  # a closed pipe has no reader left to disappoint
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def threads_per_rank(ranks: int) -> int:
    """Cores this process may run on, shared among ``ranks``; at least 1."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // ranks)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
