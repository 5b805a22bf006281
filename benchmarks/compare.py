"""Is this package slower than it was? Two files of results, row by row, with the noise of each ratio.

    python benchmarks/compare.py OLD NEW.json [--noise-at-least 0.1] [--all] [--any-machine]

OLD is a file of results, or a folder of records, of which the one of NEW's machine is taken. Both have to be of one
processor or GPU: what a change gains on one, it may not on another, peers included. --any-machine judges all the same,
of a folder the record of NEW's device that is shown.

Rows are matched by job and implementation. 1 is returned where a row of ours is slower beyond its noise, or was
measured in OLD and has no time in NEW, unless NEW is a run of a part of the suite that left it out; 2 where a file
cannot be used. Peers are told with --all and decide nothing: they are what ours is held against, because the machine
itself is faster one day than another.

Of a row of ours, x_t is the logarithm of its time in round t; of the peers of its job that have times in both files,
p_t. Constants are taken off the peers, so that none counts more for being slow, and what their median says of a round
is the state of the machine in that round:

    r_t = x_t - median over peers of (p_t - (median p in OLD + median p in NEW) / 2)
    change = median r in NEW - median r in OLD        printed as new/old, exp(change)

With three peers or more, one that got faster by itself moves nothing. The variance of the change has three parts:

    v = π/2 (s²_OLD / n_OLD + s²_NEW / n_NEW) + τ² + (w / t)²

* s is the quartile distance of r (exclusive quartiles) / 1.349, which for rounds that are drawn from a normal
  distribution is its standard deviation, and π/2 s²/n the variance of a median of n. Of few rounds s says little, so
  s² = (n s² + 5 s²_median) / (n + 5), with the median over all rows of ours in that file.
* τ is what two runs differ by however many rounds they have: alignment of memory, neighbours on the machine. The
  peers know, as none of them was changed: each is compared as above with the other peers of its job, and τ² is what
  the 90th percentile of their |change| / 1.645 has beyond their own v. With fewer than ten of them, τ is a third of
  the floor.
* w is 50 µs of a CPU's time t, what waking its threads costs in one run and not in the other. Three runs of the same
  kernels on two cores differed by 36 % (root mean square) in rows of 0.1 to 0.2 ms, 18 % to 0.4 ms, 12 % to 1 ms, and
  by no more than τ above.

Slower is a change above the floor, log(1 + noise-at-least), *and* above t √v, where t is Student's quantile at
1 - 0.05 / (rows of ours): by Bonferroni, all rows together give a false alarm in at most one comparison of twenty, if
rounds are as they are said to be. It has n_OLD + n_NEW degrees of freedom, and 5 more for
each file whose rounds tell s, for the usual spread that is mixed in, after Smyth 2004 (10.2202/1544-6115.1027) though
with a prior that is fixed; the quantile is Abramowitz and Stegun's 26.7.5.

A row whose job has no peer with times in both files is compared by its times as they are. Its floor is three times as
high, and its τ is the spread of the peers' own new/old: what the machine itself changed by.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from suite.figures import duration
from suite.results import Job, Results, ResultsError, Row, read, records

HARDWARE = ("summary", "processor", "features", "cores", "threads", "gpus", "memory_gb", "system")
ALPHA = 0.05  # of one false alarm in a whole comparison
WAKING = 50e-6  # seconds of a CPU's threads
PRIOR_ROUNDS = 5  # what the spread of all rows counts in that of one
WITHOUT_PEERS = 3.0  # times the floor
ENOUGH_PEERS = 10  # rows of peers, to learn from them what two runs differ by
Verdict = Literal["slower", "faster", "within noise", "only in old", "only in new", "status changed", "no time"]
Key = tuple[Job, str]  # and the implementation's name
STYLES = {"slower": "bold red", "faster": "green", "status changed": "bold red", "only in old": "yellow"}


@dataclass(frozen=True)
class Pair:
    """A row in both files, or in one. Logarithms of ratios; None where they cannot be told."""

    old: Row | None
    new: Row | None
    change: float | None = None
    noise: float | None = None  # what a change has to exceed
    floor: float = 0.0
    peers: int = 0  # that it was held against; 0: by its times as they are

    @property
    def row(self) -> Row:
        found = self.new or self.old
        assert found is not None
        return found

    @property
    def name(self) -> str:
        return f"{self.row.job.title}, {self.row.implementation}"

    @property
    def verdict(self) -> Verdict:
        if self.old is None:
            return "only in new"
        if self.new is None:
            return "only in old"
        if self.change is None or self.noise is None:
            return "status changed" if self.old.status != self.new.status else "no time"
        if abs(self.change) <= max(self.noise, self.floor):
            return "within noise"
        return "slower" if self.change > 0 else "faster"

    @property
    def regressed(self) -> bool:
        """Of ours alone: slower, or without a time that it had."""
        had = self.old is not None and self.old.status == "measured"
        lost = had and (self.new is None or self.new.status != "measured")
        return self.row.ours and (self.verdict == "slower" or lost)


@dataclass(frozen=True)
class Change:
    """What a row did between two files, before it is known what such a change is worth."""

    value: float
    spreads: tuple[float | None, float | None]  # s, of each file
    rounds: tuple[int, int]
    peers: int

    @property
    def freedom(self) -> int:
        """Of Student's t: the rounds, and of a spread that they tell the usual one's that is mixed in."""
        return sum(n + PRIOR_ROUNDS * (s is not None) for n, s in zip(self.rounds, self.spreads, strict=True))

    def variance(self, usual: tuple[float, float]) -> float:
        found = 0.0
        for s, n, other in zip(self.spreads, self.rounds, usual, strict=True):
            mixed = other**2 if s is None else (n * s**2 + PRIOR_ROUNDS * other**2) / (n + PRIOR_ROUNDS)
            found += math.pi / 2 * mixed / n
        return found


def compare(old: Results, new: Results, at_least: float = 0.1) -> list[Pair]:
    """A pair for every row, in OLD's order, and at the end those that only NEW has."""
    before, after = ({key(row): row for row in results.rows} for results in (old, new))
    peers: dict[Job, list[tuple[Row, Row]]] = {}
    for k, row in before.items():
        if k in after and not row.ours:
            peers.setdefault(row.job, []).append((row, after[k]))
    changes = {k: change(before[k], after[k], peers.get(k[0], ())) for k in before if k in after}
    told = {k: c for k, c in changes.items() if c is not None}
    ours = {k: c for k, c in told.items() if before[k].ours}
    usual = tuple(middle(c.spreads[i] for c in ours.values()) for i in (0, 1))
    floor = math.log1p(at_least)
    shared = between_runs([c for k, c in told.items() if not before[k].ours and c.peers], usual, floor / 3)
    machine = [middle_log(after[k]) - middle_log(before[k]) for k in told if not before[k].ours]
    raw = max(shared, percentile_90(machine) / 1.645) if machine else shared
    found = []
    for k in (*before, *(k for k in after if k not in before)):
        c = told.get(k)
        if c is None:
            found.append(Pair(before.get(k), after.get(k)))
            continue
        time = math.exp((middle_log(before[k]) + middle_log(after[k])) / 2)
        waking = 0.0 if new.machine.get("device") == "cuda" else WAKING / time
        deviation = math.sqrt(c.variance(usual) + (shared if c.peers else raw) ** 2 + waking**2)
        noise = student(1 - ALPHA / max(len(ours), 1), c.freedom) * deviation
        limit = floor if c.peers else math.log1p(WITHOUT_PEERS * at_least)
        found.append(Pair(before[k], after[k], c.value, noise, limit, c.peers))
    return found


def key(row: Row) -> Key:
    return row.job, row.implementation


def change(old: Row, new: Row, others: Sequence[tuple[Row, Row]]) -> Change | None:
    """Against the peers of the job but itself; None where one of both has no time."""
    if not old.seconds or not new.seconds:
        return None
    rounds = len(old.seconds), len(new.seconds)
    peers = [
        (a, b)
        for a, b in others
        if a.implementation != old.implementation and (len(a.seconds), len(b.seconds)) == rounds
    ]
    offsets = [(middle_log(a) + middle_log(b)) / 2 for a, b in peers]
    series = []
    for row, others in ((old, [a for a, _ in peers]), (new, [b for _, b in peers])):
        logs = [[math.log(x) - offset for x in other.seconds] for other, offset in zip(others, offsets, strict=True)]
        machine = [statistics.median(at) for at in zip(*logs, strict=True)] or [0.0] * len(row.seconds)
        series.append([math.log(x) - m for x, m in zip(row.seconds, machine, strict=True)])
    first, last = series
    return Change(
        statistics.median(last) - statistics.median(first),
        (spread(first), spread(last)),
        rounds,
        len(peers),
    )


def middle_log(row: Row) -> float:
    return statistics.median(map(math.log, row.seconds))


def spread(values: Sequence[float]) -> float | None:
    """A standard deviation from the quartiles, which one slow round in ten does not change; of three rounds or more."""
    if len(values) < 3:
        return None
    low, _, high = statistics.quantiles(values, n=4)
    return (high - low) / 1.349


def middle(values: Iterable[float | None]) -> float:
    """The usual spread of a round; a tenth where no row has enough rounds to tell."""
    known = [x for x in values if x is not None]
    return statistics.median(known) if known else 0.1


def percentile_90(values: Sequence[float]) -> float:
    return sorted(map(abs, values))[math.ceil(0.9 * len(values)) - 1]


def between_runs(peers: Sequence[Change], usual: tuple[float, float], otherwise: float) -> float:
    """τ: what changed in peers, none of which anybody changed, beyond the noise of their rounds."""
    if len(peers) < ENOUGH_PEERS:
        return otherwise
    found = (percentile_90([c.value for c in peers]) / 1.645) ** 2
    return math.sqrt(max(0.0, found - statistics.median(c.variance(usual) for c in peers)))


def student(probability: float, freedom: int) -> float:
    """Student's quantile from the normal one's, by the series 26.7.5 of Abramowitz and Stegun."""
    z = statistics.NormalDist().inv_cdf(probability)
    return (
        z
        + (z**3 + z) / (4 * freedom)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * freedom**3)
    )


def differences(old: Results, new: Results) -> list[str]:
    """A line each for what is not the same about machine and versions."""
    pairs = [(name, old.machine.get(name), new.machine.get(name)) for name in HARDWARE]
    known, now = (results.machine.get("versions") or {} for results in (old, new))
    versions = [(name, known.get(name, "none"), now.get(name, "none")) for name in sorted({*known, *now})]
    found = []
    for what, rows in (("machine", pairs), ("versions", versions)):
        if changed := [f"{name} {show(a)} → {show(b)}" for name, a, b in rows if a != b]:
            found.append(f"not the same {what}: {'; '.join(changed)}")
    return found


def show(value: object) -> str:
    return " ".join(map(str, value)) or "none" if isinstance(value, list) else str(value)


def time_of(row: Row | None) -> str:
    return "" if row is None else duration(row.median) if row.seconds else row.status


def table(pairs: Sequence[Pair]) -> Table:
    found = Table("", "old", "new", "new/old", "±", "against", "verdict", title_justify="left", pad_edge=False)
    for pair in pairs:
        known = pair.change is not None and pair.noise is not None
        verdict = pair.verdict if pair.verdict != "status changed" else f"{pair.old.status} → {pair.new.status}"
        if (memory := memory_ratio(pair)) and not 0.9 < memory < 1.1:
            verdict += f"; memory {memory:.2f} ×"
        found.add_row(
            escape(pair.name),
            time_of(pair.old),
            time_of(pair.new),
            f"{math.exp(pair.change):.2f}" if known else "",
            f"{100 * math.expm1(max(pair.noise, pair.floor)):.0f} %" if known else "",
            (f"{pair.peers} peers" if pair.peers > 1 else "1 peer" if pair.peers else "raw times") if known else "",
            verdict,
            style=STYLES.get(pair.verdict) if pair.row.ours else "dim",
        )
    return found


def memory_ratio(pair: Pair) -> float | None:
    if pair.old is None or pair.new is None or not pair.old.peak_bytes or not pair.new.peak_bytes:
        return None
    return pair.new.peak_bytes / pair.old.peak_bytes


def reason(pair: Pair) -> str:
    """Why a row regressed, in a line."""
    if pair.new is None:
        return f"{pair.name}: was measured, and is not in the new file"
    if pair.change is None or pair.noise is None:
        why = f" ({pair.new.reason})" if pair.new.reason else ""
        return f"{pair.name}: was measured, is {pair.new.status}{why}"
    noise = 100 * math.expm1(max(pair.noise, pair.floor))
    return f"{pair.name}: {math.exp(pair.change):.2f} × the time, noise is {noise:.0f} %"


def load(path: Path) -> Results:
    results = read(path)
    seen: set[Key] = set()
    for row in results.rows:
        if key(row) in seen:
            raise ResultsError(
                f"{path} holds {row.job.title}, {row.implementation} twice: measure again with `make bench`"
            )
        seen.add(key(row))
    if not results.rows:
        raise ResultsError(f"{path} has no rows: measure again with `make bench`")
    return results


def of_machine(new: Results, folder: Path, any_machine: bool) -> tuple[Path, Results]:
    """The record of the machine that ``new`` is of. Raises ResultsError where the folder has none."""
    paths = records(folder, str(new.machine.get("device") or "cpu"))
    had = []
    for path in paths:
        results = load(path)
        if any_machine or (results.hardware and results.hardware == new.hardware):
            return path, results
        had.append(f"{path.name}: {results.hardware or 'not said'}")
    raise ResultsError(
        f"{folder} has no record of this machine, {new.hardware or 'which its file does not say'} "
        f"({'; '.join(had) or 'none at all'}): measure the older commit here as well, keep its file elsewhere, and "
        "give both: make bench-compare OLD=FILE NEW=FILE"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parse = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parse.add_argument("old", type=Path, metavar="OLD")
    parse.add_argument("new", type=Path, metavar="NEW.json")
    parse.add_argument("--noise-at-least", type=float, default=0.1, metavar="SHARE", help="the floor (default 0.1)")
    parse.add_argument("--any-machine", action="store_true", help="judge files of two kinds of machine all the same")
    parse.add_argument("--all", action="store_true", help="peers, too")
    options = parse.parse_args(arguments)
    if not 0 < options.noise_at_least < 10:
        parse.error("--noise-at-least is a share above 0, such as 0.1")
    try:
        new = load(options.new)
        path, old = (
            of_machine(new, options.old, options.any_machine)
            if options.old.is_dir()
            else (options.old, load(options.old))
        )
        kinds = [results.machine.get("device") for results in (old, new)]
        if kinds[0] != kinds[1]:
            raise ResultsError(f"{path} is of a {kinds[0]}, {options.new} of a {kinds[1]}: give two of one kind")
        if not (old.hardware and old.hardware == new.hardware) and not options.any_machine:
            raise ResultsError(
                f"{path} is of {old.hardware or 'an unknown machine'}; {options.new} of "
                f"{new.hardware or 'an unknown machine'}: measure both on one machine, or judge them all the same with "
                "--any-machine"
            )
    except ResultsError as error:
        print(error, file=sys.stderr)
        return 2
    console = Console(width=None if sys.stdout.isatty() else 160)
    pairs = compare(old, new, options.noise_at_least)
    ours = [pair for pair in pairs if pair.row.ours]
    commits = [results.machine.get("commit") or "unknown" for results in (old, new)]
    console.print(table(pairs if options.all else ours))
    console.print(
        f"commits {commits[0]} → {commits[1]}; new/old is relative to the peers of the job unless it says raw times"
    )
    for line in differences(old, new):
        console.print(f"[bold yellow]Warning[/]: {escape(line)}; ratios to peers still mean something, times do not")
    counts = {v: n for v in Verdict.__args__ if (n := sum(pair.verdict == v for pair in ours))}
    console.print(f"{len(ours)} rows of ours: {', '.join(f'{n} {v}' for v, n in counts.items())}")
    regressed = [pair for pair in pairs if pair.regressed]
    if new.machine.get("partial"):  # what was not asked for is not lost
        left_out = [pair for pair in regressed if pair.new is None]
        regressed = [pair for pair in regressed if pair.new is not None]
        console.print(f"{options.new} is of a part of the suite: {len(left_out)} rows of {path} are not in it")
    for pair in regressed:
        console.print(f"[bold red]Regressed[/]: {escape(reason(pair))}", soft_wrap=True)
    return int(bool(regressed))


if __name__ == "__main__":
    sys.exit(main())
