"""Processes of a run on this machine: the ranks that DeepSpeed's launcher has started, and how they ended."""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from ..failures import LESS_MEMORY

LAUNCHER_PID = "CROSSMASK_LAUNCHER_PID"  # environment variable: the command a user started, which no rank may outlive


@dataclass(frozen=True)
class End:
    """How a rank's process ended."""

    rank: int
    status: int | None  # exit code, or minus the signal's number; None where it could not be seen
    seen_at: float  # what look() was given

    def describe(self, where: str = "") -> str:
        """What happened and what it most likely means. ``where``: what is known of its last moments."""
        what, how, meaning = "ended without a word", "", ""
        if self.status is not None and self.status >= 0:
            how = f"exit code {self.status}"
        elif self.status is not None:
            how = _signal_name(-self.status)
            if self.status == -signal.SIGKILL:
                what, meaning = "was killed", f": most likely the machine ran out of memory; {LESS_MEMORY}"
            elif -self.status in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                what = "was ended from outside"
            else:
                what = "crashed in native code"
        details = "; ".join(filter(None, [how, where]))
        return f"rank {self.rank} {what}{f' ({details})' if details else ''}{meaning}"


class RankProcesses:
    """Keeps track of ``count`` ranks in a process group, by their local rank; cheap enough for a look every 0.2 s."""

    def __init__(self, group: int, count: int) -> None:
        self.group, self.count = group, count
        self.found: dict[int, psutil.Process] = {}
        self.ended: dict[int, End] = {}

    def look(self, now: float) -> None:
        """Find ranks that have come up, and note those that have ended while they can still be asked how."""
        if len(self.found) < self.count:
            for process in rank_processes(self.group):
                rank = _local_rank(process)
                if rank is not None:
                    self.found.setdefault(rank, process)
        for rank, process in self.found.items():
            if rank not in self.ended:
                ended, status = exit_status(process.pid)
                if ended:
                    self.ended[rank] = End(rank, status, now)

    @property
    def all_alive(self) -> bool:
        """Every rank came up and none had ended at the last look."""
        return len(self.found) == self.count and not self.ended


def exit_status(pid: int) -> tuple[bool, int | None]:
    """(whether the process has ended, its exit code or minus its signal). A zombie still knows; later nobody does."""
    fields = _stat(pid)
    if not fields:
        return True, None
    if fields[0] not in "ZX":
        return False, None
    return True, os.waitstatus_to_exitcode(int(fields[49])) if len(fields) > 49 else None


def start_ticks(pid: int) -> int:
    """When the process was started, in clock ticks since the machine was: no correction of its clock changes it.

    Tells a process from a later one with the same id. 0 where there is none.
    """
    fields = _stat(pid)
    return int(fields[19]) if fields else 0


def process_descriptor(pid: int) -> int | None:
    """A descriptor that becomes readable when the process ends, zombie or not; None where it has ended already.

    Raises:
        OSError: not in this kernel, or forbidden by the container around us.
    """
    try:
        return os.pidfd_open(pid)
    except ProcessLookupError:
        return None


def members(group: int) -> list[psutil.Process]:
    """Living processes of a process group; orphans, which a process tree no longer shows, included."""

    def belongs(process: psutil.Process) -> bool:
        try:
            return os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE
        except (ProcessLookupError, psutil.Error):
            return False

    return [process for process in psutil.process_iter() if belongs(process)]


def rank_processes(group: int) -> set[psutil.Process]:
    """The ranks: what DeepSpeed started with ``--local_rank``. What they forked in turn looks alike and is left out."""

    def parent(process: psutil.Process) -> int:
        try:
            return process.ppid()
        except psutil.Error:
            return 0

    parents = {process: parent(process) for process in members(group) if _local_rank(process) is not None}
    pids = {process.pid for process in parents}
    return {process for process, parent in parents.items() if parent not in pids}


def send(process: psutil.Process, number: signal.Signals) -> None:
    with suppress(psutil.Error):
        process.send_signal(number)


def send_group(group: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.killpg(group, number)


def _stat(pid: int) -> list[str]:
    """/proc/PID/stat from its third field on; nothing where there is no such process."""
    try:
        # The name before, in parentheses, may hold anything; behind it are numbers.
        return Path(f"/proc/{pid}/stat").read_text("utf-8", "replace").rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return []


def _local_rank(process: psutil.Process) -> int | None:
    try:
        words = [word for word in process.cmdline() if word.startswith("--local_rank=")]
    except psutil.Error:
        return None
    return int(words[0].partition("=")[2]) if words and words[0].partition("=")[2].isdigit() else None


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
