"""A rank without training, started through a launcher by test_launcher.py and test_failed_ranks.py: RUN_DIR BEHAVIOUR.

``stop-1``: rank 1 does this in its third step. Behaviours that begin with ``idle-`` need no torch: their ranks do not
meet, and wait instead of joining collectives. With WATCH_TIMEOUT in the environment a watchdog runs.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from crossmask.engine.beats import beat
from crossmask.engine.errors import DataError
from crossmask.engine.failures import keep_tracebacks_in, report_failure
from crossmask.engine.training.status import write_status
from crossmask.engine.training.watchdog import Watchdog

AGES = 600  # seconds


def misbehave(what: str) -> None:
    if what == "memory":
        raise RuntimeError(
            "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: no"
        )
    if what == "exception":
        raise KeyError("x")
    signals = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "abort": signal.SIGABRT, "fault": signal.SIGSEGV}
    if what in signals:
        os.kill(os.getpid(), signals[what])
    if what == "exit":
        os._exit(3)
    if what == "hold":  # inside C, without giving the interpreter's lock back
        ctypes.PyDLL(None).sleep(AGES)
    time.sleep(AGES)


def steps(rank: int, who: int, what: str, together: Callable[[], object], run_dir: Path) -> NoReturn:
    if rank == 0:
        write_status(run_dir, "running", 0)
    keep_tracebacks_in(run_dir)
    for step in range(1, 4):
        beat("forward", step)
        time.sleep(0.3)  # other launchers' ranks hand a beat on when they next look at the board
        if step == 3 and rank == who:
            beat("backward")
            if what == "alone":  # the others wait for it, and rightly so
                for _ in range(80):
                    time.sleep(0.1)
                    beat("evaluation")
                write_status(run_dir, "finished", step)
                os._exit(0)
            if what == "late":  # all done but the report
                write_status(run_dir, "finished", step)
            misbehave(what)
        together()
    if what == "alone":
        time.sleep(8.5)
        os._exit(0)
    time.sleep(AGES)
    os._exit(9)


def up(run_dir: Path, rank: int, words: dict[str, object]) -> None:
    draft = run_dir / f"draft-{rank}"
    draft.write_text(json.dumps(words))
    draft.rename(run_dir / f"up-{rank}.json")


def fail(run_dir: Path, behaviour: str) -> NoReturn:
    rank, idle = int(os.environ["RANK"]), behaviour.startswith("idle-")
    what, _, who = behaviour.removeprefix("idle-").partition("-")
    watchdog = Watchdog(float(os.environ["WATCH_TIMEOUT"]))
    watchdog.run_dir = run_dir
    watchdog.start()
    code = 1
    try:
        if idle:
            up(run_dir, rank, {"pid": os.getpid()})
            steps(rank, int(who), what, lambda: None, run_dir)
        import torch
        import torch.distributed as dist

        # as init_distributed() does, without the seconds that DeepSpeed's import takes
        dist.init_process_group("gloo")
        up(run_dir, rank, {"pid": os.getpid()})
        if what == "deadlock":
            misfit = [
                lambda: dist.all_reduce(torch.ones(1)),
                lambda: dist.all_gather([torch.ones(1)] * 2, torch.ones(1)),
            ]
            steps(rank, 0, "nothing", misfit[rank], run_dir)
        steps(rank, int(who), what, lambda: dist.all_reduce(torch.ones(1)), run_dir)
    except BaseException as error:
        code = report_failure(error, rank)
    os._exit(code)


def main(run_dir: Path, behaviour: str) -> None:
    if "WATCH_TIMEOUT" in os.environ:
        fail(run_dir, behaviour)
    from crossmask.engine.training.distributed import from_rank_zero, init_distributed, leave

    rank = int(os.environ["RANK"])
    if behaviour == "mistake" and rank == 1:
        leave(report_failure(DataError("cat.png: not an image; remove it from the list"), rank), together=False)
    if behaviour == "mistake":
        time.sleep(AGES)  # waits for rank 1 in vain
    asked: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: asked.append(number))
    world = init_distributed()
    words = {
        "size": world.size,
        "device": str(world.device),
        "agreed": from_rank_zero(f"from {rank}"),
        "threads": os.environ["OMP_NUM_THREADS"],
        "pid": os.getpid(),
    }
    up(run_dir, rank, words)
    deadline = time.monotonic() + 250
    while not asked and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(1.5)  # a checkpoint takes a while
    (run_dir / f"saved-{rank}").write_text(f"{len(asked)}")
    if rank == 0:
        (run_dir / "status.json").write_text(json.dumps({"state": "stopped", "step": 7}))
    leave(0, together=True)


if __name__ == "__main__":
    main(*(kind(word) for kind, word in zip((Path, str), [w for w in sys.argv[1:] if not w.startswith("--")])))  # noqa: B905
