"""A table of compiles: made in parallel, row by row reusable, and tied to the sources that it was made from.

A script says what is launched and which rules a compile has to keep (``Proof``); what is here compiles it without a
GPU, writes benchmarks/static/NAME.{csv,md}, and reads it again. Rows are frozen dataclasses of str, int and bool: what
was compiled, the ``FIGURES``, and ``job`` and ``source``, which say what the figures depend on.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import csv
import dataclasses
import functools
import hashlib
import importlib
import io
import json
import multiprocessing
import sys
import time
import tokenize
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

import triton
from ahead_of_time import Figures, Job, compile
from worse import worse

ROOT = Path(__file__).resolve().parents[1]
FIGURES = (
    *("registers", "spill_bytes", "shared_bytes", "shared_limit"),
    *("blocks_per_processor", "tensor_memory", "matrix", "wide_loads", "code_bytes"),
)
R = TypeVar("R", bound=Any)


def work(job: Job) -> Figures:
    module, name = job.kernel.split(":")
    return compile(job, getattr(importlib.import_module(module), name))


def filled(row: R, found: Figures) -> R:
    return dataclasses.replace(
        row,
        registers=found.registers,
        spill_bytes=found.spill,
        shared_bytes=found.shared,
        shared_limit=found.shared_limit,
        blocks_per_processor=found.ctas,
        tensor_memory=found.tensor_memory,
        matrix=" ".join(f"{name}:{count}" for name, count in sorted(found.matrix.items())),
        wide_loads=found.wide_loads,
        code_bytes=found.code,
    )


@functools.cache
def source(kernel: Any) -> str:
    """Of a kernel, all that it calls, Triton, and what reads the figures: a row with another one is compiled again."""
    reader = Path(__file__).with_name("ahead_of_time.py").read_text()
    return hashlib.sha256(f"{kernel.cache_key} {triton.__version__} {reader}".encode()).hexdigest()[:12]


def misfits(row: Any) -> list[str]:
    """What no compile may show, whatever the kernel."""
    wrong = []
    if row.spill_bytes:
        wrong.append(f"{row.spill_bytes} bytes of registers spilled")
    if row.shared_bytes > row.shared_limit:
        wrong.append(f"{row.shared_bytes} bytes of shared memory, limit {row.shared_limit}")
    if row.tensor_memory > 512:
        wrong.append(f"{row.tensor_memory} columns of tensor memory, limit 512")
    if row.blocks_per_processor < 1:
        wrong.append("does not fit a multiprocessor")
    return wrong


def fingerprint(sources: Sequence[Path]) -> str:
    """Of the sources, Python's comments and blank lines aside, and of Triton: a table with another one is stale."""
    digest = hashlib.sha256(triton.__version__.encode())
    for path in sources:
        if path.suffix != ".py":
            digest.update(path.read_bytes())
            continue
        lines = path.read_text().splitlines()
        for token in tokenize.generate_tokens(io.StringIO(path.read_text()).readline):
            if token.type == tokenize.COMMENT:
                lines[token.start[0] - 1] = lines[token.start[0] - 1][: token.start[1]]
        digest.update("\n".join(line.rstrip() for line in lines if line.strip()).encode())
    return digest.hexdigest()[:16]


def arguments(parse: argparse.ArgumentParser) -> None:
    parse.add_argument("--processes", type=int, default=2)
    parse.add_argument("--fresh", action="store_true", help="compile what did not change, too")
    parse.add_argument("--again", metavar="JOB", nargs="+", help="compile these rows of the table, and print JSON")
    parse.add_argument("--check", action="store_true", help="write nothing; 1 where a row is worse than in the table")
    parse.add_argument("--accept-worse", action="store_true", help="write the table although rows are worse")


@dataclasses.dataclass(frozen=True)
class Proof(Generic[R]):
    name: str  # of the table
    script: str  # that makes it
    row: type[R]
    sources: Sequence[Path]  # what the launches and their compiles depend on
    describe: Callable[[R], str]  # a row in a line
    violations: Callable[[R], list[str]]
    order: Callable[[R], tuple[Any, ...]]
    summary: Callable[[Sequence[R]], str]

    @property
    def table(self) -> Path:
        return ROOT / f"benchmarks/static/{self.name}.csv"

    @property
    def partial(self) -> Path:
        """What a run that was cut short, or asked for a part, has found."""
        return self.table.with_name(self.table.name + ".partial")

    @property
    def columns(self) -> dict[str, str]:
        return {field.name: str(field.type) for field in dataclasses.fields(self.row)}

    def fingerprint(self) -> str:
        return fingerprint(self.sources)

    def compiled(
        self,
        todo: Sequence[tuple[R, Job]],
        processes: int,
        known: Mapping[tuple[str, str], R],
        strict: bool = True,
    ) -> Iterator[R]:
        """Rows in order, with progress on stderr. ``strict``: a compile that fails ends it, and says which."""
        start, count = time.monotonic(), sum((row.job, row.source) not in known for row, _ in todo)
        with concurrent.futures.ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
            futures = {row.job: pool.submit(work, job) for row, job in todo if (row.job, row.source) not in known}
            done = 0
            for row, _ in todo:
                if row.job not in futures:
                    before = known[row.job, row.source]
                    yield dataclasses.replace(row, **{name: getattr(before, name) for name in FIGURES})
                    continue
                try:
                    found = futures[row.job].result()
                except Exception as error:
                    what = f"{self.describe(row)}: {error!r:.300}"
                    if strict or isinstance(error, concurrent.futures.BrokenExecutor):
                        pool.shutdown(wait=False, cancel_futures=True)
                        raise SystemExit(what) from error
                    print(what, file=sys.stderr)
                    continue
                finally:
                    done += 1
                left = (time.monotonic() - start) / done * (count - done)
                print(f"\r{done}/{count} compiles, {left / 60:.1f} min left ", end="", file=sys.stderr, flush=True)
                yield filled(row, found)
        print(file=sys.stderr)

    def again(self, jobs: Collection[str], launched: Sequence[tuple[R, Job]], processes: int) -> None:
        """Prints rows of the committed table, compiled from what is ``launched`` now."""
        todo = [case for case in launched if case[0].job in jobs]
        if missing := set(jobs) - {row.job for row, _ in todo}:
            raise SystemExit(f"nothing that is launched today is compiled as {sorted(missing)}: the table is stale")
        print(json.dumps([dataclasses.asdict(row) for row in self.compiled(todo, processes, {})]))

    def prove(self, todo: Sequence[tuple[R, Job]], whole: bool, options: argparse.Namespace) -> int:
        """Compiles ``todo``, and says what breaks a rule, and what is worse than in the table, row by row. The
        ``whole`` goes into the table, unless something is worse and that was not accepted; a part is printed."""
        rows = []
        self.table.parent.mkdir(exist_ok=True)
        before = {} if options.fresh else self.known()
        committed = self.committed()
        with self.partial.open("a", newline="") as file:
            for row in self.compiled(todo, options.processes, before):
                rows.append(row)
                if (row.job, row.source) not in before:
                    csv.DictWriter(file, self.columns, lineterminator="\n").writerow(dataclasses.asdict(row))
                    file.flush()
                if wrong := self.violations(row):
                    print(f"\r{self.describe(row)}: {'; '.join(wrong)}")
        rows.sort(key=self.order)
        bad = sum(bool(self.violations(row)) for row in rows)
        if bad:
            print(f"{bad} of {len(rows)} compiles break a rule", file=sys.stderr)
        return max(int(bad > 0), self.settle(rows, committed, whole, options))

    def settle(self, rows: Sequence[R], committed: Sequence[R], whole: bool, options: argparse.Namespace) -> int:
        """Writes or prints ``rows``, or says by name which are worse than the ``committed`` ones; then 1."""
        fell = worse(committed, rows, self.describe)
        for one in fell:
            print(f"worse than {self.table.name} has it: {one}")
        if fell and not options.accept_worse and (whole or options.check):
            print(
                f"{len(fell)} of {len(rows)} compiles are worse, and the table stays as it is: mend the kernel, or say "
                f"python benchmarks/{self.script} --accept-worse",
                file=sys.stderr,
            )
            return 1
        if whole and not options.check:
            self.write(rows)
            print(f"benchmarks/static/{self.table.name}: {len(rows)} compiles")
        elif options.check:
            print(f"none of {len(rows)} compiles is worse than in {self.table.name}")
        else:
            print(self.summary(rows))
        return 0

    # ---- the table

    def write(self, rows: Sequence[R]) -> None:
        self.table.parent.mkdir(exist_ok=True)
        with self.table.open("w", newline="") as file:
            made = f"made by benchmarks/{self.script} from {self.fingerprint()} with Triton {triton.__version__}"
            file.write(f"# {made}\n")
            table = csv.DictWriter(file, self.columns, lineterminator="\n")
            table.writeheader()
            table.writerows(dataclasses.asdict(row) for row in rows)
        self.table.with_suffix(".md").write_text(self.summary(rows))
        self.partial.unlink(missing_ok=True)

    def read(self) -> tuple[str, list[R]]:
        """The fingerprint that the committed table was made from, and its rows."""
        with self.table.open(newline="") as file:
            made_from = file.readline().split(" from ")[1].split()[0]
            return made_from, [self.parsed(line) for line in csv.DictReader(file)]

    def parsed(self, line: Mapping[str, str]) -> R:
        kinds: dict[str, Any] = {"int": int, "str": str, "bool": "True".__eq__}
        return self.row(**{name: kinds[kind](line[name]) for name, kind in self.columns.items()})

    def committed(self) -> list[R]:
        """The rows of the table as it lies there; none where there is none, or one with other columns."""
        if not self.table.exists():
            return []
        with self.table.open(newline="") as file:
            file.readline()
            lines = csv.DictReader(file)
            return [self.parsed(line) for line in lines] if lines.fieldnames == [*self.columns] else []

    def known(self) -> dict[tuple[str, str], R]:
        """What earlier runs found, by what it depends on. A table with other columns is of no use."""
        rows: list[R] = []
        for path in (self.table, self.partial):
            if path.exists():
                lines = (line for line in path.read_text().splitlines() if not line.startswith("#"))
                reader = csv.DictReader(lines, None if path == self.table else list(self.columns))
                usable = (line for line in reader if set(line) == set(self.columns) and None not in line.values())
                rows += map(self.parsed, usable)
        return {(row.job, row.source): row for row in rows}
