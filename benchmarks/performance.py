"""docs/performance.md, its pictures and the README's section, from the committed record of measurements.

    python benchmarks/performance.py                  # writes them
    python benchmarks/performance.py --check          # writes nothing; 1 where a text is not what the record gives
    python benchmarks/performance.py --accept FILE    # what make bench wrote becomes its device's record; then as above

The record is benchmarks/results/cpu.json, with cpu.csv beside it, and cuda.json once somebody measured a GPU. One of
another processor that it replaces is kept under that one's name and stands beside it, as ratios differ. Pictures are
not compared, since they are another file with another version of matplotlib.
"""

from __future__ import annotations

import argparse
import csv
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import prove_roofline
from suite.figures import table, times
from suite.page import counts, fp32_products, groups, page, plural, slowest, span, step_ratios, title_of
from suite.plots import draw
from suite.results import Results, ResultsError, ratio, read, write
from suite.results import records as files
from suite.standing import standings

ROOT = Path(__file__).resolve().parents[1]
START, END = "<!-- performance: start -->", "<!-- performance: end -->"
DEVICES = ("cpu", "cuda")
SHOWN_GPU, SHOWN_SHAPE = "h100", "ALBEF 30x257"


def records(root: Path) -> tuple[dict[str, Results], dict[str, dict[str, Results]]]:
    """By device, and by device and name those of other machines.

    Raises ResultsError where there is none, or one cannot be used."""
    folder = root / "benchmarks/results"
    if not (folder / "cpu.json").exists():
        raise ResultsError(f"{folder / 'cpu.json'} is missing: make bench, then performance.py --accept its file")
    found = {device: {path.stem: read(path) for path in files(folder, device)} for device in DEVICES}
    main = {device: named.pop(device) for device, named in found.items() if device in named}
    # a file that somebody keeps there under another name is no record
    others = {d: {name: each for name, each in found[d].items() if name == slug(each)} for d in main}
    return main, others


def accept(path: Path, root: Path) -> Path:
    """Copies a file of results over the record of its device; returns where it is. A run of some ops is refused.

    A record of another machine that stood there is kept beside it, by that machine's name."""
    found = read(path)
    device = found.machine.get("device")
    if device not in DEVICES:
        raise ResultsError(f"{path} is of a device {device!r}: give a file that `make bench` or `make bench-gpu` wrote")
    if not any(row.ours and row.seconds for row in found.rows):
        raise ResultsError(f"{path} has no time of ours: measure again with `make bench`")
    if found.machine.get("partial"):
        raise ResultsError(f"{path} is of a part of the suite: measure all of it with `make bench`, without -k")
    record = root / f"benchmarks/results/{device}.json"
    had = read(record) if record.exists() else None
    if had and (lost := {job.op for job in had.jobs} - {job.op for job in found.jobs}):
        told = ", ".join(sorted(lost))
        raise ResultsError(f"{path} has nothing of {told}, which {record} has: measure all of it, or delete that first")
    for path in files(record.parent, device):
        read(path)  # before anything changes: what is damaged could not be shown
    if had and slug(had) != slug(found):
        write(had, record.with_name(f"{slug(had)}.json"))
    write(found, record)
    if (older := record.with_name(f"{slug(found)}.json")) != record:  # of this machine
        for path in (older, older.with_suffix(".csv")):
            path.unlink(missing_ok=True)
    return record


def slug(results: Results) -> str:
    """The name, without its ending, of a record that another machine's stands before; the device's alone where its file
    does not say the machine."""
    return re.sub(r"[^a-z0-9]+", "-", f"{results.machine.get('device')} {results.hardware}".lower()).strip("-")


def section(found: dict[str, Results], others: dict[str, dict[str, Results]], root: Path) -> str:
    """What the README says between its markers."""
    lines: list[str] = []
    for device, results in found.items():
        lines += [""] * bool(lines) + measured(device, results, others[device])
    if "cuda" not in found:
        lines += list(predicted(root))
    lines += ["", "Every op and peer, shares of the machine's ceilings, and what was left out and why:"]
    rows = ", ".join(f"[{device}.csv](benchmarks/results/{device}.csv)" for device in found)
    lines += [f"**[docs/performance.md](docs/performance.md)**; every row: {rows}."]
    return "\n".join(lines)


def measured(device: str, results: Results, others: dict[str, Results]) -> list[str]:
    m = results.machine
    kind, command = ("GPU figures", "make bench-gpu") if device == "cuda" else ("CPU figures", "make bench")
    torch = (m.get("versions") or {}).get("torch", "unknown")
    threads = f", {plural(m['threads'], 'thread')}" if m.get("threads") else ""
    lines = [
        f"**{kind}**, by `{command}`: {m.get('summary')}{threads}, PyTorch {torch}. Ours against the *fastest* of",
        "those that give all that is asked, in turns in one process, ops after a check against float64. A ratio is the",
        "other's time in ours, so above 1 ours is faster; *alike* is where the quartiles have 1 between them.",
        "",
    ]
    found = standings(results)
    ops = [each for each in found if each.job.op != "step"]
    head = ("", "jobs", "ours faster", "alike", "ours slower", "best peer's time in ours: median (range)")
    lines += table(head, ([label, *counts(of), span(of)] for label, of in groups(ops, brief=True).items()))
    suffix = "-cuda" if device == "cuda" else ""
    lines += [f"![Cross-attention: others' time in ours]({'docs/images/performance-attention' + suffix}.png)", ""]
    for each in step_ratios(results):
        ours, peer = each.ours, each.peer
        both = ours.peak_bytes and peer.peak_bytes
        memory = f", in {ours.peak_bytes / peer.peak_bytes:.2f} of the memory" if both else ""
        speed = f"**{times(each.times)}** times the samples/s of {peer.implementation}"
        # the same step of ours with other products tells algorithm and library apart
        mine = [(row, share) for row in results.of(each.job) if row.ours and (share := ratio(peer, row))]
        apart = "".join(f"; {row.implementation}: {times(share)}" for row, share in mine if row is not ours)
        lines.append(f"* A step of {each.job.shape} ({each.job.size}), {each.job.dtype}: {speed}{memory}{apart}.")
    if (worst := slowest(results)) is not None:
        slower = sum(each.place == "slower" for each in found)
        most = f"{title_of(worst.job)}: {worst.peer.implementation} takes {times(worst.times)} of our time"
        lines.append(f"* Slower than the best peer in {slower} of {len(found)} jobs, most so in {most}.")
    return lines + [elsewhere(each, results) for each in others.values()]


def elsewhere(other: Results, results: Results) -> str:
    """A line on another machine: ratios are of a machine."""
    steps = [f"{each.job.shape}, {each.job.dtype}: {times(each.times)}" for each in step_ratios(other)]
    found = standings(other)
    slower = sum(each.place == "slower" for each in found)
    rates = [fp32_products(each) for each in (other, results)]
    than = f", {rates[0]} in fp32 where the one above has {rates[1]}" if all(rates) else ""
    commit = other.machine.get("commit") or "an unknown commit"
    told = f"* On another machine, {other.hardware}{than}, at {commit}: ours slower in {slower} of {len(found)} jobs"
    return f"{told}{'; a step of ' * bool(steps)}{'; of '.join(steps)}."


def predicted(root: Path) -> Iterator[str]:
    """What the proof sheet says of a GPU that nobody measured."""
    path = root / "benchmarks/static/roofline.csv"
    with path.open() as file:
        rows = list(csv.DictReader(line for line in file if not line.startswith("#")))
    picked = {
        row["op"].split()[1]: row
        for row in rows
        if (row["gpu"], row["shape"], row["statistics"]) == (SHOWN_GPU, SHOWN_SHAPE, "all") and "attention" in row["op"]
    }
    name, batch = prove_roofline.DEVICES[SHOWN_GPU].title, prove_roofline.BATCH
    least = " and ".join(f"{float(row['predicted_at_least_us']):.1f} µs {way}" for way, row in picked.items())
    more = " and ".join(f"{row['statistics_add_percent']} %" for row in picked.values())
    what = f"attention with all statistics at {SHOWN_SHAPE} (batch {batch}, bf16)"
    yield f"* **GPU figures are predicted, none is measured**: {what} takes an {name} at least {least},"
    yield f"  {more} more than without statistics: [docs/roofline.md](docs/roofline.md)."


def spliced(path: Path, text: str) -> str:
    """The README with ``text`` between its markers. Raises ResultsError where it has not both once."""
    readme = path.read_text() if path.exists() else ""
    if readme.count(START) != 1 or readme.count(END) != 1 or readme.index(START) > readme.index(END):
        raise ResultsError(f"{path} has not {START} and {END} once each: put these lines where the figures belong")
    before, _, rest = readme.partition(START)
    return f"{before}{START}\n{text}\n{END}{rest.partition(END)[2]}"


def texts(root: Path) -> tuple[dict[Path, str], dict[str, Results]]:
    """Every file that is made from the record, and the record."""
    found, others = records(root)
    readme = root / "README.md"
    made = {root / "docs/performance.md": page(found, others), readme: spliced(readme, section(found, others, root))}
    if "cuda" in found:  # the sheet of predictions says where the measurements are
        made[root / "benchmarks/static/roofline.md"] = prove_roofline.summary(prove_roofline.rows(), measured=True)
    return made, found


def main(arguments: Sequence[str] | None = None) -> int:
    parse = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parse.add_argument("--check", action="store_true", help="write nothing; 1 where a text is not the record's")
    parse.add_argument("--accept", type=Path, metavar="FILE", help="make this the record of its device first")
    parse.add_argument("--root", type=Path, default=ROOT, help="of the checkout to write to")
    options = parse.parse_args(arguments)
    if options.check and options.accept:
        parse.error("--check writes nothing, --accept does: give one of them")
    try:
        if options.accept:
            spliced(options.root / "README.md", "")  # so that nothing changes where that cannot be written
            print(f"The record is now {accept(options.accept, options.root)}")
        made, found = texts(options.root)
    except ResultsError as error:
        print(error, file=sys.stderr)
        return 2
    stale = [path for path, text in made.items() if not path.exists() or path.read_text() != text]
    if options.check:
        for path in stale:
            print(
                f"{path.relative_to(options.root)} is not what the record gives: run python benchmarks/performance.py"
            )
        return int(bool(stale))
    for path, text in made.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    pictures = [
        path
        for device, results in found.items()
        for path in draw(results, options.root / "docs/images", "-cuda" if device == "cuda" else "")
    ]
    print(f"Written: {', '.join(str(path.relative_to(options.root)) for path in [*made, *pictures])}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
