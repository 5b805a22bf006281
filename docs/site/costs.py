"""What an op moves, multiplies and takes, for the kernels' pages: from the roofline's formulas and the record."""

from __future__ import annotations

import csv
import functools
import sys

from rooms import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

from suite.figures import digits, duration, table, times
from suite.results import Results, Row, read
from suite.standing import Standing, standings

WAYS = {"forward": "forward", "both": "forward + backward"}
GPU = "h100"


@functools.cache
def record() -> Results:
    return read(ROOT / "benchmarks/results/cpu.json")


def cost(op: str) -> str:
    """Two tables: what the op has to do, and how it stands against the best peer on the machine of the record."""
    found = [each for each in standings(record()) if each.job.op == op]
    lines = needed(op)
    machine = record().machine
    versions = machine.get("versions") or {}
    threads = machine.get("threads")
    lines += [f"**Measured** on {machine.get('summary')}, {threads} threads, PyTorch {versions.get('torch')}, by"]
    lines += [
        "`make bench`. A ratio is the best peer's time in ours, median and quartiles over rounds: above 1 ours is"
    ]
    lines += ["faster. Every peer is in [how fast it is](../performance.md).", ""]
    for way in WAYS:
        rows = [measured(each) for each in found if each.job.way == way]
        if rows:
            lines += [f'=== "{WAYS[way].capitalize()}"', ""]
            head = ("shape", "dtype", "ours", "best peer", "its time in ours")
            lines += [f"    {line}".rstrip() for line in table(head, rows)]
    return "\n".join(lines)


def measured(each: Standing) -> list[str]:
    job = each.job
    mark = {"faster": " ●", "alike": " ○", "slower": ""}[each.place]
    shape = ", ".join(filter(None, (job.shape, job.what)))
    return [shape, job.dtype, duration(each.ours.median), each.peer.implementation, times(each.times) + mark]


def needed(op: str) -> list[str]:
    """Bytes and FLOPs of each job, the same for whoever does it, and the least time of the GPU, where worked out."""
    jobs: dict[tuple[str, ...], Row] = {}
    for row in record().rows:
        if row.job.op == op and row.ours and row.job.way in WAYS and row.needed_bytes:
            jobs.setdefault((row.job.shape, row.job.what, row.job.dtype, row.job.way), row)
    if not jobs:
        return []
    lines = ["**Needed**, whoever computes it: bytes that no cache can save, and FLOPs of matrix products.", ""]
    head = ("shape", "dtype", "pass", "MiB", "GFLOP", "FLOPs a byte")
    rows = []
    for (shape, what, dtype, way), row in jobs.items():
        told = ", ".join(filter(None, (shape, what)))
        intensity = digits(row.flops / row.needed_bytes) if row.flops else "0"
        flops = digits(row.flops / 1e9) if row.flops else "0"
        rows += [[told, dtype, WAYS[way], digits(row.needed_bytes / 2**20), flops, intensity]]
    sizes = dict.fromkeys((row.job.shape, row.job.size) for row in jobs.values())
    body = table(head, rows) + [f"{shape}: `{size}`  " for shape, size in sizes if size] + [""]
    predicted = prediction(op)
    details = [
        '??? note "Bytes and FLOPs at the measured shapes"',
        "",
        *(f"    {line}".rstrip() for line in lines + body),
    ]
    return [*predicted, *details, ""]


def prediction(op: str) -> list[str]:
    """Of benchmarks/static/roofline.csv: the least time that a GPU takes."""
    lines = (ROOT / "benchmarks/static/roofline.csv").read_text().splitlines()
    rows = [row for row in csv.DictReader(lines[1:]) if row["op"].split()[0] == op.rstrip("_") and row["gpu"] == GPU]
    rows = rows or [row for row in csv.DictReader(lines[1:]) if row["op"].split()[0] == op and row["gpu"] == GPU]
    if not rows:
        return []
    told = []
    for row in rows:
        moved = int(row["read_bytes"]) + int(row["written_bytes"])
        asked = "all statistics" if row["statistics"] else "output alone" if op == "cross_attention" else ""
        way = " ".join(row["op"].split()[1:])
        told += [[", ".join(filter(None, (row["shape"], asked, way))), digits(moved / 2**20)]]
        told[-1] += [digits(float(row["matrix_flops"]) / 1e9), digits(float(row["flops_per_byte"])), row["bound"]]
        told[-1] += [f"{float(row['predicted_at_least_us']):,.1f} µs"]
    head = ("shape", "MiB moved", "GFLOP", "FLOPs a byte", "bound by", "at least")
    words = (
        "**Predicted** for an NVIDIA H100, bfloat16 where nothing else is said, from what the kernels read, write and"
    )
    return [f"{words} multiply ([how](../roofline.md)); **no GPU has been measured**.", "", *table(head, told)]


def overview() -> str:
    """Of each op: how often it is faster than the best peer on the machine of the record."""
    found = standings(record())
    head = ("op", "jobs", "ours faster", "alike", "slower", "best peer's time in ours: median (range)")
    rows = []
    for op in dict.fromkeys(job.op for job in record().jobs if job.op not in ("step", "scaling")):
        ratios = sorted(each.times[0] for each in found if each.job.op == op)
        places = [each.place for each in found if each.job.op == op]
        middle = ratios[len(ratios) // 2] if len(ratios) % 2 else sum(ratios[len(ratios) // 2 - 1 :][:2]) / 2
        counts = [str(places.count(place)) for place in ("faster", "alike", "slower")]
        rows += [[f"[`{op}`]({op}.md)", str(len(places)), *counts]]
        rows[-1] += [f"{middle:.2f} ({ratios[0]:.2f} – {ratios[-1]:.2f})"]
    return "\n".join(table(head, rows))
