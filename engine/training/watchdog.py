"""Ending a run that hangs, from inside its ranks; ``watch.py`` has the rule.

Each rank runs a :class:`Watchdog`, two threads that publish its last beat (``beat_board.py``) and look at everybody's.
Under ``crossmask train`` they leave the verdict to the launcher and take over when it has died. Under other launchers
every rank judges: one says why, and all of them end with exit code 1, whereupon the launcher ends the rest. A rank of
the same machine that is stopped, which no launcher's SIGTERM would end, is killed by its fellows.

From the last beat of any rank until no rank is left pass at most ``rank_timeout`` (before the first step
:data:`watch.START_UP`, where that is longer) and :data:`watch.HANG_MARGIN` seconds; 30 seconds more, the launcher's own
patience, where a rank is stopped on another machine than any living one.

Not noticed: under another launcher, a run whose every rank is stopped, or blocked inside C with the interpreter's lock;
a run of one rank above all.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import psutil

from ..beats import last_beat
from ..failures import EXIT_FAILED, FAILURE_FILE, print_error, resume_hint
from .beat_board import Board, FileBoard, Record, StoreBoard
from .rank_processes import LAUNCHER_PID, exit_status, start_ticks
from .stacks import StackFile, collect_stacks
from .status import record_failure
from .watch import Hang, Watch

SPEAKERS_TIME = 3.0  # seconds in which one rank tells why before the others leave


class Watchdog:
    """One rank's part in the watch; see the top of this file.

    >>> watchdog = Watchdog(recipe.training.rank_timeout)
    >>> watchdog.start()
    >>> watchdog.run_dir = run_dir      # as soon as it is known
    """

    def __init__(self, timeout: float) -> None:
        """From the launcher's environment variables, which init_distributed() completes where there are none."""
        environment = os.environ
        self.rank, ranks = int(environment.get("RANK", "0")), int(environment.get("WORLD_SIZE", "1"))
        self.run_dir: Path | None = None
        self.watch = Watch(ranks, timeout)
        note, launcher = environment.get(FAILURE_FILE), environment.get(LAUNCHER_PID, "")
        self._board: Board | None = None
        if note:
            self._board = FileBoard(Path(note).parent)
        elif ranks > 1:
            import torch.distributed  # noqa: F401  (by the main thread: two threads must not import it at once)

            self._board = StoreBoard(environment)
        self._launcher = int(launcher) if note and launcher.isdigit() else None
        self._stacks = StackFile(Path(note).with_name(f"stacks-{self.rank}.txt") if note else None)
        self._pulse = 0
        self._closed = threading.Event()
        self._others: Mapping[int, Record] = {}
        self._exchanged = time.monotonic()
        self._mine = Record(
            self.rank, socket.gethostname(), os.getpid(), start_ticks(os.getpid()), self._stacks.path,
            step=None, phase="", count=0, at=0.0, pulse=0, collectives=0,
        )  # fmt: skip

    def start(self) -> None:
        if isinstance(self._board, FileBoard):
            self._board.publish(self._record())  # from now on every beat is on it at once
        if self._board is not None:
            threading.Thread(target=self._keep_exchanging, name="beats", daemon=True).start()
        threading.Thread(target=self._keep_watching, name="watchdog", daemon=True).start()

    def close(self) -> None:
        self._closed.set()

    def _record(self) -> Record:
        self._pulse += 1
        mine = replace(self._mine, pulse=self._pulse, collectives=_collectives_issued(self._mine.collectives))
        self._mine = mine.after(last_beat())
        return self._mine

    def _keep_exchanging(self) -> None:
        """A thread of its own: a store whose process is stopped does not answer, and keeps who asks waiting."""
        assert self._board is not None
        while not self._closed.is_set():
            with suppress(Exception):
                self._others = self._board.exchange(self._record())
                self._exchanged = time.monotonic()
            self._closed.wait(self.watch.interval)

    def _keep_watching(self) -> None:
        while not self._closed.wait(self.watch.interval):
            now = time.monotonic()
            # No look at the others for a while, with this process running, means that their meeting place is gone.
            reached = self._board is None or now - self._exchanged < self.watch.silence
            hang = self.watch.look({**self._others, self.rank: self._record()}, now, reached)
            if hang is not None and self._in_charge():
                self._end(hang, reached)

    def _in_charge(self) -> bool:
        """Under our launcher only when that has died."""
        return self._launcher is None or exit_status(self._launcher)[0]

    def _end(self, hang: Hang, reached: bool) -> NoReturn:
        alive = [
            rank for rank in self.watch.seen
            if rank == self.rank or (rank not in hang.silent and (reached or rank != 0))
        ]  # fmt: skip
        local = [r for r in self.watch.seen.values() if r.host == self._mine.host]
        mine = [r for r in local if r.rank == self.rank or r.rank in hang.silent]
        self._closed.set()  # the store may be gone in a moment, which its client would remark upon
        self._stacks.write()
        names = collect_stacks(mine, self.run_dir)
        if self.rank == min(alive):
            with suppress(OSError):
                if self.run_dir is not None:
                    record_failure(self.run_dir, hang.reason, self.watch.step)
            print_error(f"{hang.line}{names}{resume_hint(self.run_dir)}")
        else:
            time.sleep(SPEAKERS_TIME)
        for record in mine:
            if record.rank != self.rank:
                end_process(record)
        with suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(EXIT_FAILED)


def end_process(record: Record) -> None:
    """SIGKILL, which also ends a process that is stopped; nothing where another has its id by now."""
    with suppress(psutil.Error):
        if start_ticks(record.pid) == record.started:
            psutil.Process(record.pid).kill()


def _collectives_issued(before: int) -> int:
    """Over all process groups of this process. torch has no public count; without it nobody is called behind."""
    torch_distributed = sys.modules.get("torch.distributed")
    if torch_distributed is None or not getattr(torch_distributed, "is_initialized", bool)():
        return before
    try:
        groups = list(torch_distributed.distributed_c10d._world.pg_map)
        return sum(int(group._get_sequence_number_for_group()) for group in groups)
    except Exception:
        return before
