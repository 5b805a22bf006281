"""One run of the suite: what was measured so far, and the file it ends in."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Collection
from pathlib import Path

import torch

from . import machine
from .cases import Case, cases
from .ceilings import Gauge
from .clock import Clock
from .problem import Budget, solve, verdict
from .results import Job, Results, Row, ratio, write

DTYPES = {"cpu": ("fp32", "bf16"), "cuda": ("fp32", "bf16", "fp16")}


class Session:
    """Measures cases when they are asked for, each once; ceilings before the first of each op and at the end."""

    def __init__(
        self, device: torch.device, budget: Budget, path: Path, planned: int, say: Callable[[str], None]
    ) -> None:
        self.device, self.budget, self.path, self.planned, self.say = device, budget, path, planned, say
        self.clock = Clock(device)
        self.gauge = Gauge(device, DTYPES[device.type])
        self.machine = machine.describe(device)
        self.rows: list[Row] = []
        self.done: dict[str, list[Row]] = {}
        self.gauged: str | None = None
        self.started = time.monotonic()

    def case(self, case: Case, names: Collection[str]) -> list[Row]:
        """Rows of a case, measured now unless they were: only the ``names`` among its implementations."""
        if case.name not in self.done:
            if self.gauged != case.op:
                self.gauged = case.op
                self.gauge.measure()
            self._keep(case.name, case.title, lambda: self._measured(case, names))
        return self.done[case.name]

    def _measured(self, case: Case, names: Collection[str]) -> list[Row]:
        torch.manual_seed(0)
        try:
            problem = case.build(self.device)
            problem.implementations = [each for each in problem.implementations if each.name in names]
            return solve(problem, self.clock, self.budget)
        except Exception as error:  # the inputs themselves may be too large
            status, reason = verdict(error)
            if status != "out of memory":
                raise
            jobs = [Job(case.op, case.shape, "", case.dtype, case.what, way) for way in case.ways]  # type: ignore[arg-type]
            return [Row(job, name, name == "crossmask", status, reason) for job in jobs for name in names]

    def step(self, name: str, measure: Callable[[], list[Row]]) -> list[Row]:
        if name not in self.done:
            self._keep(name, name, measure)
        return self.done[name]

    def _keep(self, name: str, title: str, measure: Callable[[], list[Row]]) -> None:
        started = time.monotonic()
        try:
            rows = measure()
        finally:
            self._give_back()
        self.done[name] = rows
        self.rows += rows
        seconds = time.monotonic() - started
        self.say(f"{len(self.done):>3} of {self.planned}  {title}: {told(rows)}  [{seconds:.0f} s]")

    def _give_back(self) -> None:
        gc.collect()
        torch.compiler.reset()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def partial(self, steps: Collection[str]) -> bool:
        """Whether something of the suite was left out, or an end came before it."""
        wanted = {case.name: len(case.ways) * len(case.implementations) for case in cases(self.device.type)}
        wanted |= dict.fromkeys(steps, 1)
        return any(len(self.done.get(name, ())) < rows for name, rows in wanted.items())

    def finish(self, steps: Collection[str] = ()) -> Results | None:
        """Writes what there is; None where nothing was measured. ``steps``: names of all of them."""
        if not self.rows:
            return None
        self.gauge.measure()
        minutes = round((time.monotonic() - self.started) / 60, 1)
        about = {"minutes": minutes, "partial": self.partial(steps)}
        results = Results(self.machine | about, self.gauge.found, tuple(self.rows))
        write(results, self.path)
        return results


def told(rows: list[Row]) -> str:
    """A line on what was measured: ours by way, and the fastest of the others beside it."""
    parts = []
    for job in dict.fromkeys(row.job for row in rows):
        mine = [row for row in rows if row.job == job]
        ours = next((row for row in mine if row.ours and row.seconds), None)
        if ours is None:
            continue
        others = [(found[0], row.implementation) for row in mine if row is not ours and (found := ratio(row, ours))]
        best = " (" + "{1} {0:.2f} ×".format(*min(others)) + ")" if others else ""
        parts.append(f"{job.way} {1e3 * ours.median:.2f} ms{best}")
    bad = sorted({f"{row.implementation} {row.status}" for row in rows if row.status not in ("measured", "skipped")})
    return ", ".join(parts + bad) or "nothing measured"
