"""The rule by which a run hangs: no rank has beaten for ``training.rank_timeout`` seconds; and whose fault it is.

A rank that stops (SIGSTOP, a loop in C that holds the interpreter, a sleep, a collective that the others do not join)
stops all: the others wait for it in their next collective and beat no more. Rank 0 alone at work, while the others wait
for its evaluation or checkpoint, beats, and nobody is disturbed.

The launcher applies the rule under ``crossmask train``, the ranks elsewhere (``watchdog.py``). Time counts only while
the watcher itself runs: a job that was suspended as a whole goes on afterwards.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from .beat_board import Record

HANG_MARGIN = 15.0  # seconds from the timeout to the end of all ranks, stacks written
INTERVAL = 0.2  # seconds between two looks
RANKS_PER_SECOND = 64  # beats that the store has to take; more ranks look less often
SILENCE = 5.0  # seconds without a pulse after which a process is stopped or blocked rather than late
# Seconds that ranks get without a beat before their first step, where the timeout is not longer: slow disks.
START_UP = 180.0
NAMED = 4  # ranks a message lists


def interval(ranks: int) -> float:
    """Seconds between two looks of a rank at the board."""
    return max(INTERVAL, ranks / RANKS_PER_SECOND)


@dataclass(frozen=True)
class Hang:
    """No rank makes progress any more."""

    rank: int | None  # whose fault it is; None where they wait for each other
    reason: str  # one line
    silent: tuple[int, ...]  # ranks whose process does not run

    @property
    def line(self) -> str:
        """What the user reads: the reason, and what to do where it was none."""
        return f"{self.reason}: the run was ended; if it was at work, raise training.rank_timeout"


class Watch:
    """Says when a run hangs, from what the board shows. Compares no clocks of different machines."""

    def __init__(self, ranks: int, timeout: float) -> None:
        self.ranks, self.timeout, self.interval = ranks, timeout, interval(ranks)
        self.silence = min(max(SILENCE, 4 * self.interval), timeout / 2)
        self.seen: dict[int, Record] = {}
        self._clock = 0.0  # seconds watched
        self._looked: float | None = None
        self._moved = 0.0  # on that clock: the last progress of any rank
        self._pulse: dict[int, float] = {}

    def look(self, records: Mapping[int, Record], now: float, store: bool = True) -> Hang | None:
        """``now``: time.monotonic(). ``store``: whether the board could be read of late."""
        if self._looked is not None:  # a watcher that was suspended has not been watching
            self._clock += min(now - self._looked, 4 * self.interval + 1.0)
        self._looked = now
        for rank, record in records.items():
            before = self.seen.get(rank)
            if before is None or record.count != before.count:
                self._moved = self._clock
            if before is None or record.pulse != before.pulse:
                self._pulse[rank] = self._clock
            self.seen[rank] = record
        limit = self.timeout if self._begun else max(self.timeout, START_UP)
        return self._judge(store, limit) if self._clock - self._moved >= limit else None

    def _judge(self, store: bool, limit: float) -> Hang:
        """Whose fault it is: who never came; whose process stands still; who has issued fewer collectives."""
        seconds = f"{limit:g} s"
        if not store:
            return Hang(0, f"rank 0 has not answered for {seconds} ({self.where(0)})", (0,))
        absent = [rank for rank in range(self.ranks) if rank not in self.seen]
        if absent and not self._begun:
            also = f", nor did {len(absent) - 1} more" if len(absent) > 1 else ""
            return Hang(absent[0], f"rank {absent[0]} did not come up within {seconds}{also}", ())
        oldest_first = sorted(self.seen.values(), key=lambda record: record.at)
        silent = absent + [r.rank for r in oldest_first if self._clock - self._pulse[r.rank] > self.silence]
        if silent:
            return Hang(
                silent[0], f"rank {silent[0]} has not answered for {seconds} ({self.where(silent[0])})", tuple(silent)
            )
        behind = min(oldest_first, key=lambda record: record.collectives)
        if self.ranks == 1 or behind.collectives < max(record.collectives for record in oldest_first):
            wait = " and the others wait for it" if self.ranks > 1 else ""
            return Hang(
                behind.rank,
                f"rank {behind.rank} has made no progress for {seconds} ({self.where(behind.rank)}){wait}",
                (),
            )
        each = [f"rank {record.rank} {self.where(record.rank)}" for record in oldest_first[:NAMED]]
        each += [f"{self.ranks - NAMED} more"] if self.ranks > NAMED else []
        return Hang(None, f"no rank has made progress for {seconds} ({'; '.join(each)})", ())

    def where(self, rank: int) -> str:
        record = self.seen.get(rank)
        if record is None:
            return "never seen"
        return f"last seen {'while' if record.step is None else f'in step {record.step},'} {record.phase}"

    @property
    def _begun(self) -> bool:
        """A rank that takes its first step has met all the others."""
        return any(record.step is not None for record in self.seen.values())

    @property
    def step(self) -> int:
        """The furthest step that any rank is known to have begun."""
        return max((record.step or 0 for record in self.seen.values()), default=0)
