"""The Python stacks of ranks that hang or crash, as ``stacks-rank1.txt`` in the run folder.

``faulthandler`` writes them from inside a signal handler in C: a rank that holds the interpreter's lock inside C, or
that dies of a fault there, still shows where.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import psutil

from .beat_board import Record
from .rank_processes import start_ticks

SIGNAL = signal.SIGUSR2  # asks a rank for its stacks
TIME_TO_WRITE = 2.0  # seconds; a process that is stopped never does


class StackFile:
    """Where this process writes its stacks on SIGUSR2, and on a fault."""

    def __init__(self, path: Path | None) -> None:
        """``path`` in our launcher's folder, which outlives the process; without one, memory that other processes
        see as a file while this one lives, and faults go to the screen, as there is nobody to tell of them."""
        if path is not None:
            self.path = str(path)
            # Never closed: faulthandler keeps the number, and the process needs it to its end.
            self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            faulthandler.enable(self._file)
        else:
            self._file = os.memfd_create("stacks")
            self.path = f"/proc/{os.getpid()}/fd/{self._file}"
            faulthandler.enable()
        # The interrupted thread alone, which is the main one: the others may be running, and reading theirs may crash.
        faulthandler.register(SIGNAL, self._file, all_threads=False, chain=False)

    def write(self) -> None:
        """Write this process's own stacks, of all threads; they stand still meanwhile."""
        faulthandler.dump_traceback(self._file, all_threads=True)


def collect_stacks(records: Sequence[Record], run_dir: Path | None) -> str:
    """Have other processes of this machine write their stacks; keep what all of ``records`` wrote in the run folder.

    Returns what to add to a message: ``; stacks: RUN/stacks-rank0.txt``, or nothing where there are none.
    """
    waiting = {record.rank: record for record in records if record.stacks}
    for record in waiting.values():
        with suppress(psutil.Error, OSError):
            if record.pid != os.getpid() and start_ticks(record.pid) == record.started:
                psutil.Process(record.pid).send_signal(SIGNAL)
    deadline = time.monotonic() + TIME_TO_WRITE
    while time.monotonic() < deadline and not all(_written(r) for r in waiting.values()):
        time.sleep(0.1)
    time.sleep(0.1)  # a dump is written line by line
    return keep_stacks({rank: Path(record.stacks) for rank, record in waiting.items()}, run_dir)


def keep_stacks(files: Mapping[int, Path], run_dir: Path | None) -> str:
    """Copy what the ranks have written, by rank, into the run folder; returns as :func:`collect_stacks`."""
    kept: list[Path] = []
    for rank, file in sorted(files.items()):
        with suppress(OSError):
            text = file.read_bytes()
            if text and run_dir is not None and run_dir.is_dir():
                name = run_dir / f"stacks-rank{rank}.txt"
                name.write_bytes(text)
                kept.append(name)
    if not kept:
        return ""
    return f"; stacks: {os.path.relpath(kept[0] if len(kept) == 1 else kept[0].with_name('stacks-rank*.txt'))}"


def remove_earlier(run_dir: Path) -> None:
    """Stacks and tracebacks of a run's earlier end, when it goes on: they would be taken for this start's."""
    for path in [*run_dir.glob("stacks-rank*.txt"), *run_dir.glob("traceback-rank*.txt")]:
        with suppress(OSError):
            path.unlink()


def _written(record: Record) -> bool:
    with suppress(OSError):
        return os.stat(record.stacks).st_size > 0
    return False
