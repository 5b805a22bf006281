"""What a step's measurement is asked for, and the rows that it will have: they are known before anything runs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from ..results import Job, Row, Status

PENDING = "was not measured"


@dataclass(frozen=True)
class Options:
    device: str  # "cpu" or "cuda"
    rounds: int  # turns of steps that take turns, at most; most take so long that they have fewer
    quick: bool  # fewer steps


@dataclass(frozen=True)
class Planned:
    """A row to come."""

    job: Job
    implementation: str
    ours: bool
    samples: int

    def row(self, status: Status, reason: str = "", **figures: Any) -> Row:
        return Row(self.job, self.implementation, self.ours, status, reason, samples=self.samples, **figures)

    def is_of(self, row: Row) -> bool:
        return (row.job, row.implementation) == (self.job, self.implementation)


class Subject(Protocol):
    """An entry of the suite."""

    def planned(self, options: Options) -> list[Planned]:
        """Cheap: no data, no model."""
        ...

    def measure(self, options: Options) -> Iterator[Row]:
        """Rows as they are ready, in a process that does nothing else. What it raises stands in the rows left out."""
        ...
