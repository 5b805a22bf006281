"""Ranks as forks of one process that has imported everything: a group of them starts in a moment, not in ten seconds.

The parent must not run anything that starts threads (no forward pass, no process group): only its children do.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple


class Group(NamedTuple):
    """Running ranks, by rank number."""

    pids: list[int]
    logs: list[Path]

    def wait(self, timeout: float = 120.0) -> list[int]:
        """Exit statuses as ``subprocess`` gives them; ranks that still run after ``timeout`` seconds are killed."""
        deadline, statuses = time.monotonic() + timeout, dict[int, int]()
        while len(statuses) < len(self.pids):
            for pid in set(self.pids) - set(statuses):
                if time.monotonic() > deadline:
                    os.kill(pid, signal.SIGKILL)
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    statuses[pid] = os.waitstatus_to_exitcode(status)
            time.sleep(0.002)
        return [statuses[pid] for pid in self.pids]

    def kill(self) -> None:
        for pid in self.pids:
            os.kill(pid, signal.SIGKILL)  # not reaped yet, so the number is still theirs


def prepare() -> None:
    """Imports what the ranks need. DeepSpeed says nothing below errors, and builds no shared-memory collectives."""
    import logging
    import warnings

    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    import deepspeed
    import resumable  # noqa: F401 - and all of crossmask that it needs
    import torch
    import torch._dynamo
    import torch._inductor.compile_fx  # DeepSpeed's engine imports both when it is built: four seconds each time

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    torch.set_num_threads(1)


def fork(ranks: int, body: Callable[..., Any], *arguments: Any, folder: Path) -> Group:
    """Starts ``body(*arguments)`` on every rank of a new gloo group that meets in ``folder``."""
    folder = Path(tempfile.mkdtemp(dir=folder))
    sys.stdout.flush()
    logs = [folder / f"rank{rank}.log" for rank in range(ranks)]
    pids = []
    for rank, log in enumerate(logs):
        pid = os.fork()
        if not pid:
            _child(rank, ranks, folder / "meeting", log, body, arguments)
        pids.append(pid)
    return Group(pids, logs)


def run(ranks: int, body: Callable[..., Any], *arguments: Any, folder: Path, timeout: float = 120.0) -> None:
    """The same, to its end; the first failed rank's output goes into a RuntimeError."""
    group = fork(ranks, body, *arguments, folder=folder)
    statuses = group.wait(timeout)
    failed = [rank for rank, status in enumerate(statuses) if status]
    if failed:
        told = "\n".join(f"rank {rank}, status {statuses[rank]}:\n{group.logs[rank].read_text()}" for rank in failed)
        raise RuntimeError(f"{body.__name__}{arguments}: {told}")


def _child(rank: int, ranks: int, meeting: Path, log: Path, body: Callable[..., Any], arguments: Sequence[Any]) -> None:
    status = 1
    try:
        output = os.open(log, os.O_WRONLY | os.O_CREAT)
        os.dup2(output, 1)
        os.dup2(output, 2)
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: nobody outlives the parent
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
        os.environ |= {"LOCAL_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
        import torch.distributed as dist

        dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=ranks)
        body(*arguments)
        dist.barrier()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)  # never back into the parent's code, nor into the interpreter's exit
