"""The suite as pytest sees it: items that share a measurement, and times that pytest-benchmark is told afterwards."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from .cases import Case, cases
from .results import Row
from .steps import STEPS


@dataclass(frozen=True)
class Item:
    """One implementation's way of doing a case."""

    case: Case
    way: str
    implementation: str


class Replay:
    """A timer for pytest-benchmark that tells times which were taken before, while alternatives took turns."""

    def __init__(self) -> None:
        self.marks: Iterator[float] = iter(())

    def load(self, seconds: Sequence[float]) -> None:
        self.marks = iter([mark for each in seconds for mark in (0.0, each)])

    def __call__(self) -> float:
        return next(self.marks, 0.0)


def ops(device: str) -> list[object]:
    """Parameters of ``test_op``; items of a case stand together."""
    return [
        pytest.param(Item(case, way, name), marks=mark(f"{case.name}-{way}"), id=f"{case.name}-{way}-{name}")
        for case in cases(device)
        for way in case.ways
        for name in case.implementations
    ]


def steps() -> list[object]:
    return [pytest.param(name, marks=mark(name), id=name.replace(" ", "_")) for name in STEPS]


def mark(group: str) -> pytest.MarkDecorator:
    return pytest.mark.benchmark(group=group, timer=Replay())


def of(item: pytest.Item) -> Item | str | None:
    """What an item of pytest is to measure: an op's, a step's name, or nothing of ours."""
    return item.callspec.params.get("measured") if hasattr(item, "callspec") else None


def report(row: Row, benchmark: BenchmarkFixture, item: pytest.Item) -> None:
    """Hands a row's times to pytest-benchmark, or says why there are none: ours that are wrong fail, others skip."""
    if row.status != "measured":
        said = f"{row.implementation}: {row.status}: {row.reason}"
        if row.ours and row.status in ("failed", "wrong"):
            pytest.fail(f"{row.job.title}: {said}", pytrace=False)
        pytest.skip(said)
    marker = item.get_closest_marker("benchmark")
    assert marker is not None
    marker.kwargs["timer"].load(row.seconds)
    told = ("peak_bytes", "needed_bytes", "flops", "error", "tolerance", "samples", "predicted_us", "parts", "reason")
    benchmark.extra_info |= {"size": row.job.size} | {name: getattr(row, name) for name in told}
    benchmark.pedantic(lambda: None, rounds=len(row.seconds))
