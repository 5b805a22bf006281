"""Every op at every size in every dtype, by us and by what one would use instead, and whole training steps.

    make bench                           # on the CPU, a quarter of an hour on two cores
    make bench-gpu                       # on a GPU
    make bench ARGS="-k topk_mask"       # some of it: any option of pytest's and pytest-benchmark's
    make bench-compare                   # the last run against the record of this kind of machine

An item is one implementation's way of doing one job, and its statistics are pytest-benchmark's. What is measured is the
job: its implementations are each held to a float64 reference (suite/problem.py), then take turns in this process
(suite/clock.py); the items hand their times over. Results, with what has no time and why, are written as JSON and CSV
when the run ends, also when it is stopped.
"""

from __future__ import annotations

import pytest
from pytest_benchmark.fixture import BenchmarkFixture
from suite.items import report
from suite.results import Row


def test_op(measured: list[Row], benchmark: BenchmarkFixture, request: pytest.FixtureRequest) -> None:
    report(measured[0], benchmark, request.node)


def test_step(measured: list[Row], benchmark: BenchmarkFixture, request: pytest.FixtureRequest) -> None:
    bad = [row for row in measured if row.ours and row.status in ("failed", "wrong")]
    timed = [row for row in measured if row.ours and row.seconds]
    report((bad + timed + measured)[0], benchmark, request.node)
