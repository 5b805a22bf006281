"""What the suite found: one row for each implementation of a job, kept as JSON with every time, and as CSV.

A row that has no time says why. Files are replaced whole, so that a run that is stopped leaves the one before.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from crossmask.engine.atomic import replace_file

Status = Literal["measured", "skipped", "failed", "wrong", "out of memory"]
Way = Literal["forward", "backward", "both", "step"]
FORMAT = 1


class ResultsError(Exception):
    """A file of results that cannot be used; one line that names it and what to do."""


@dataclass(frozen=True)
class Job:
    """What is to be done, whoever does it. Rows of one job are comparable."""

    op: str  # "cross_attention"; of whole training steps "step", of runs on several ranks "scaling"
    shape: str  # as the literature knows it: "ALBEF 30x257"
    size: str  # what of: "B=8 H=12 S=30 P=257 D=64"
    dtype: str  # "fp32", "bf16", "fp16"
    what: str  # "output", "all statistics": what is asked for; "" where there is one thing to ask for
    way: Way

    @property
    def title(self) -> str:
        return ", ".join(filter(None, (self.op, self.what, self.way, self.shape, self.dtype)))


@dataclass(frozen=True)
class Row:
    """An implementation's way of doing a job. Times are seconds of every round; rounds of one job's rows are shared.

    ``needed_bytes`` and ``flops`` are what the job needs, the same for all of its rows: bytes that no cache can save,
    and FLOPs of its matrix products. An implementation that moves more does not look faster for it.
    """

    job: Job
    implementation: str
    ours: bool
    status: Status
    reason: str = ""  # why there is no time, or what to know about the one there is
    seconds: tuple[float, ...] = ()
    peak_bytes: int | None = None  # most that was allocated beyond the inputs, results included
    needed_bytes: float = 0.0
    flops: float = 0.0
    error: float | None = None  # the largest of its outputs, relative to their size
    tolerance: float | None = None  # what that output may have
    samples: int | None = None  # of a step
    predicted_us: tuple[float, float] | None = None  # at least, launch by launch; where the GPU is one we know
    parts: dict[str, float] = field(default_factory=dict)  # seconds of a step's parts, by name
    missing: tuple[str, ...] = ()  # outputs that the job asks for and this does not give

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def quartiles(self) -> tuple[float, float]:
        return quartiles(self.seconds)


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    if len(values) < 2:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high


@dataclass(frozen=True)
class Ceilings:
    """The most that this machine did in this run: bytes/s of memory, FLOP/s of a large matrix product by dtype."""

    copy: float
    update: float  # y += a x in place: two reads and a write
    gemm: dict[str, float]

    @property
    def memory(self) -> float:
        return max(self.copy, self.update)


@dataclass(frozen=True)
class Results:
    machine: dict[str, Any]
    ceilings: Ceilings | None
    rows: tuple[Row, ...]

    def of(self, job: Job) -> list[Row]:
        return [row for row in self.rows if row.job == job]

    @property
    def jobs(self) -> list[Job]:
        return list(dict.fromkeys(row.job for row in self.rows))

    @property
    def hardware(self) -> str:
        """What has to be the same for two files to be comparable, as what one processor gains, another may not: the
        GPUs, or the processor, its vector instructions and the threads. Empty where that is not known."""
        m = self.machine
        if m.get("device") == "cuda":
            gpus = Counter(m.get("gpus") or ())
            return ", ".join(f"{count} x {name}" for name, count in gpus.items())
        if not m.get("processor") or not m.get("threads"):
            return ""
        return ", ".join(
            (m["processor"], *(m.get("features") or ()), f"{m['threads']} thread{'s' * (m['threads'] > 1)}")
        )

    def shares(self, row: Row) -> tuple[float | None, float | None]:
        """Of the ceilings: the job's bytes by the row's time, and its FLOPs. Above 1 where caches held the inputs."""
        if self.ceilings is None or not row.seconds:
            return None, None
        memory = row.needed_bytes / row.median / self.ceilings.memory if row.needed_bytes else None
        rate = self.ceilings.gemm.get(row.job.dtype)
        return memory, row.flops / row.median / rate if row.flops and rate else None


def ratio(row: Row, other: Row) -> tuple[float, float, float] | None:
    """row's time in other's: the median over shared rounds, and its quartiles. None where one has no time."""
    if not row.seconds or len(row.seconds) != len(other.seconds):
        return None
    found = [a / b for a, b in zip(row.seconds, other.seconds, strict=True)]
    return statistics.median(found), *quartiles(found)


def write(results: Results, path: Path) -> None:
    """``path`` as JSON with everything, and a CSV beside it with a line for each row."""
    whole = {
        "format": FORMAT,
        "machine": results.machine,
        "ceilings": dataclasses.asdict(results.ceilings) if results.ceilings else None,
        "rows": [_sparse(row) for row in results.rows],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, json.dumps(whole, indent=1) + "\n")
    replace_file(path.with_suffix(".csv"), table(results))


def _sparse(row: Row) -> dict[str, Any]:
    """Without what is as it is by default; times to the nanosecond, which is as good as clocks are."""
    found = {
        f.name: getattr(row, f.name)
        for f in dataclasses.fields(row)
        if f.name != "job" and (f.default is dataclasses.MISSING or getattr(row, f.name) != f.default)
    }
    found["seconds"] = [round(x, 9) for x in row.seconds]
    found["parts"] = {name: round(x, 6) for name, x in row.parts.items()}
    return dataclasses.asdict(row.job) | {name: x for name, x in found.items() if x not in ({}, [], ())}


COLUMNS = (
    *("op", "shape", "size", "dtype", "what", "pass", "implementation", "ours", "status", "reason", "rounds"),
    *("median_us", "q1_us", "q3_us", "peak_mib", "gb_per_s", "share_of_memory", "gflop_per_s", "share_of_gemm"),
    *("error", "tolerance", "samples_per_s", "predicted_at_least_us", "predicted_launch_by_launch_us"),
)


def table(results: Results) -> str:
    """The CSV file."""
    file = io.StringIO()
    lines = csv.writer(file, lineterminator="\n")
    lines.writerow(COLUMNS)

    def short(x: float | None) -> str:
        return "" if x is None else f"{x:.5g}"

    for row in results.rows:
        job, (memory, gemm) = row.job, results.shares(row)
        times: Iterable[float | None] = (None, None, None)
        median = None
        if row.seconds:
            median = row.median
            times = (1e6 * x for x in (median, *row.quartiles))
        lines.writerow(
            [job.op, job.shape, job.size, job.dtype, job.what, job.way, row.implementation, row.ours, row.status]
            + [row.reason, len(row.seconds), *map(short, times)]
            + [short(row.peak_bytes / 2**20 if row.peak_bytes is not None else None)]
            + [short(row.needed_bytes / median / 1e9 if median and row.needed_bytes else None), short(memory)]
            + [short(row.flops / median / 1e9 if median and row.flops else None), short(gemm)]
            + [short(row.error), short(row.tolerance)]
            + [short(row.samples / median if median and row.samples else None)]
            + [short(x) for x in (row.predicted_us or (None, None))]
        )
    return file.getvalue()


def read(path: Path) -> Results:
    """What ``write`` wrote.

    Raises:
        ResultsError: there is no such file, or it is something else.
    """
    try:
        whole = json.loads(path.read_text())
    except OSError as error:
        raise ResultsError(f"{path}: {error.strerror}; `make bench` writes one") from None
    except ValueError:
        raise ResultsError(f"{path} is not JSON: give a file that `make bench` or `make bench-gpu` wrote") from None
    if not isinstance(whole, dict) or whole.get("format") != FORMAT:
        raise ResultsError(f"{path} is not a file of results in format {FORMAT}: measure again with `make bench`")
    try:
        of_job = [f.name for f in dataclasses.fields(Job)]
        rows = []
        for entry in whole["rows"]:
            job = Job(**{name: entry.pop(name) for name in of_job})
            entry["seconds"] = tuple(entry.get("seconds", ()))
            entry["missing"] = tuple(entry.get("missing", ()))
            if entry.get("predicted_us"):
                entry["predicted_us"] = tuple(entry["predicted_us"])
            rows.append(Row(job, **entry))
        for row in rows:
            _check(row)
        if not isinstance(whole["machine"], dict):
            raise TypeError("no machine")
        ceilings = Ceilings(**whole["ceilings"]) if whole["ceilings"] else None
        return Results(whole["machine"], ceilings, tuple(rows))
    except (KeyError, TypeError, AttributeError) as error:
        raise ResultsError(f"{path} is damaged ({error}): measure again with `make bench`") from None


def _check(row: Row) -> None:
    if not all(isinstance(x, str) for x in (*dataclasses.astuple(row.job), row.implementation)):
        raise TypeError("a name that is none")
    if row.status not in get_args(Status) or (row.status == "measured") != bool(row.seconds):
        raise TypeError(f"{row.job.title}, {row.implementation}: {row.status} with {len(row.seconds)} times")
    if not all(isinstance(x, (int, float)) and 0 < x < math.inf for x in row.seconds):
        raise TypeError(f"{row.job.title}, {row.implementation}: a time that is none")


def records(folder: Path, device: str) -> list[Path]:
    """Files of the records of a device, ``cpu.json`` or ``cuda.json`` first, then those of other machines."""
    return [path for path in (folder / f"{device}.json", *sorted(folder.glob(f"{device}-*.json"))) if path.exists()]
