"""Where we stand in a job: which row is ours, and which of the others would serve a user best in its place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from .results import Job, Results, Row, ratio

Place = Literal["faster", "alike", "slower"]


@dataclass(frozen=True)
class Standing:
    """``times``: the best peer's time in ours, the median over rounds and its quartiles. Above 1 we are faster."""

    ours: Row
    peer: Row
    times: tuple[float, float, float]

    @property
    def job(self) -> Job:
        return self.ours.job

    @property
    def place(self) -> Place:
        """Alike: the quartiles have 1 between them."""
        _, low, high = self.times
        return "faster" if low > 1 else "slower" if high < 1 else "alike"


def ours_of(rows: Sequence[Row]) -> Row | None:
    """The first of ours that has a time."""
    return next((row for row in rows if row.ours and row.seconds), None)


def peers_of(rows: Sequence[Row], ours: Row) -> list[Row]:
    """Others with times of the same rounds, also those that give less than was asked for."""
    return [row for row in rows if not row.ours and ratio(row, ours) is not None]


def standing(rows: Sequence[Row]) -> Standing | None:
    """Against the fastest of those that give all that is asked. None: there is none of them, or none of ours."""
    ours = ours_of(rows)
    if ours is None:
        return None
    whole = [row for row in peers_of(rows, ours) if not row.missing]
    found = [Standing(ours, row, told) for row in whole if (told := ratio(row, ours)) is not None]
    return min(found, key=lambda each: each.times[0], default=None)


def standings(results: Results) -> list[Standing]:
    """Of every job that has a peer; backward alone is left out, which both passes together have in them."""
    jobs = [job for job in results.jobs if job.way != "backward"]
    return [found for job in jobs if (found := standing(results.of(job))) is not None]
