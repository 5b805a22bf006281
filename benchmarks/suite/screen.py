"""What a run says at its end: one line for each job, ours beside the others."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from rich.console import Console
from rich.table import Table

from .results import Results, Row, ratio


def show(results: Results, path: Path, console: Console) -> None:
    ceilings, machine = results.ceilings, results.machine
    console.print(f"\n{machine['summary']}, {machine['threads']} threads, torch {machine['versions'].get('torch')}")
    if ceilings is not None:
        gemm = ", ".join(f"{name} {rate / 1e9:,.0f} GFLOP/s" for name, rate in ceilings.gemm.items())
        memory = f"copy {ceilings.copy / 1e9:.1f} GB/s, in-place update {ceilings.update / 1e9:.1f} GB/s"
        console.print(f"ceilings of this run: {memory}; products: {gemm}")
    table = Table(
        *("job", "ours, ms", "quartiles", "MiB", "of memory", "of products", "the others' time in ours, × (quartiles)"),
        title_justify="left",
    )
    op = ""
    for job in results.jobs:
        rows = results.of(job)
        ours = next((row for row in rows if row.ours and row.seconds), None)
        if op and op != job.op:
            table.add_section()
        op = job.op
        if ours is None:
            table.add_row(job.title, "", "", "", "", "", "; ".join(f"{r.implementation}: {r.status}" for r in rows))
            continue
        low, high = ours.quartiles
        memory, gemm = results.shares(ours)
        others = [said for row in rows if row is not ours and (said := _against(row, ours))]
        table.add_row(
            job.title,
            f"{1e3 * ours.median:.3f}",
            f"{1e3 * low:.3f} .. {1e3 * high:.3f}",
            "" if ours.peak_bytes is None else f"{ours.peak_bytes / 2**20:.1f}",
            *("" if share is None else f"{share:.0%}" for share in (memory, gemm)),
            ", ".join(others),
        )
    console.print(table)
    missing = Counter((row.implementation, row.status, row.reason) for row in results.rows if not row.seconds)
    for (name, status, reason), count in missing.items():
        console.print(f"no time, {count} job{'s' * (count > 1)}: {name}: {status}: {reason}", highlight=False)
    console.print(f"Written: {path} and {path.with_suffix('.csv').name}. Against the record: make bench-compare")


def _against(row: Row, ours: Row) -> str | None:
    found = ratio(row, ours)
    if found is None:
        return None
    middle, low, high = found
    return f"{row.implementation} {middle:.2f} ({low:.2f} .. {high:.2f})"
