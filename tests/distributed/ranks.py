"""Starts a script of this folder on a few CPU ranks; on each rank, joins them and quiets DeepSpeed."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent


def start(script: str, *arguments: str | Path, ranks: int = 2, timeout: float = 120.0) -> list[tuple[int, str]]:
    """Runs ``script`` on every rank and returns (exit status, output) by rank; kills all of them after ``timeout``.

    Once a rank has failed the others get five seconds, since they may wait for it for ever.
    """
    with tempfile.TemporaryDirectory() as folder:
        processes = []
        logs = [Path(folder, f"rank{rank}.log") for rank in range(ranks)]
        for rank, log in enumerate(logs):
            environment = os.environ | {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(ranks),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": "29500",  # unused: the ranks meet in a file
                "CROSSMASK_TEST_MEETING": str(Path(folder, "meeting")),
                "OMP_NUM_THREADS": "1",
                "CUDA_VISIBLE_DEVICES": "",
                "DS_ACCELERATOR": "cpu",
            }
            with log.open("w") as file:
                command = [sys.executable, str(HERE / script), *map(str, arguments)]
                processes.append(subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT))
        codes = _wait(processes, timeout)
        return [(code, log.read_text()) for code, log in zip(codes, logs, strict=True)]


def _wait(processes: list[subprocess.Popen[bytes]], timeout: float) -> list[int]:
    import time

    deadline = time.monotonic() + timeout
    while any(p.poll() is None for p in processes) and time.monotonic() < deadline:
        if any(p.poll() not in (None, 0) for p in processes):
            deadline = min(deadline, time.monotonic() + 5.0)
        time.sleep(0.05)
    for p in processes:
        if p.poll() is None:
            p.kill()
    return [p.wait() for p in processes]


def join() -> tuple[int, int]:
    """(rank, world size), with gloo ready and without building DeepSpeed's shared-memory collectives."""
    import logging
    import warnings

    import torch.distributed as dist

    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore", FutureWarning)
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group(
        "gloo", init_method=f"file://{os.environ['CROSSMASK_TEST_MEETING']}", rank=rank, world_size=world
    )
    return rank, world


def leave() -> None:
    """Ends this rank: some CPU runs abort in native threads at interpreter exit, after everything is done."""
    import torch.distributed as dist

    dist.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
