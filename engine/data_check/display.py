"""The check on a terminal: a bar while it reads, then what was found by kind."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.markup import escape as escape_markup
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from ..beats import Beat, tell_beats
from ..errors import printable
from .findings import Findings, kind_of

PATIENCE = 2.0  # seconds before a bar is shown
EXAMPLES = 3


class Watch:
    """A progress bar for whatever takes longer than :data:`PATIENCE`; on a terminal alone."""

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._begun = time.monotonic()
        self._told = ("", -1)

    @contextmanager
    def watching(self) -> Iterator[Watch]:
        tell_beats(self._beat)  # of the readers, which say what they are at
        try:
            yield self
        finally:
            tell_beats(lambda beat: None)
            if self._progress is not None:
                self._progress.stop()

    def _beat(self, beat: Beat) -> None:
        self.at(beat.phase)

    def at(self, phase: str, done: int = 0, total: int | None = None) -> None:
        """Something is being done; ``done`` of ``total`` where that is known."""
        if not self._console.is_terminal or time.monotonic() - self._begun < PATIENCE:
            return
        if self._progress is None:
            self._progress = Progress(
                SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
                TextColumn("{task.fields[rate]}"), TimeElapsedColumn(), TextColumn("left:"), TimeRemainingColumn(),
                console=self._console, transient=True,
            )  # fmt: skip
            self._progress.start()
        if self._task is None or self._told[0] != phase:
            if self._task is not None:
                self._progress.remove_task(self._task)
            self._task = self._progress.add_task(phase, total=total, rate="")
            self._told = (phase, done)
        speed = self._progress.tasks[0].speed if self._progress.tasks else None
        self._progress.update(
            self._task, completed=done, total=total, rate=f"{speed:,.0f}/s" if speed and total else ""
        )


def show(facts: Mapping[str, Any], findings: Findings, root: str, console: Console) -> None:
    """Facts of the set, what was found, and the verdict. ``root``: a folder that is left out of places."""
    console.print(f"[bold]{escape(str(facts['source']))}[/bold]: {facts['pairs']:,} pairs, {facts['images']:,} images")
    for line in fact_lines(facts):
        console.print(f"  {escape(line)}", highlight=False)
    for notice in facts.get("notices", []):
        console.print(f"  {escape(str(notice))}", style="dim", highlight=False)
    if not findings.counts:
        return
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    table.add_column("")
    table.add_column("what", no_wrap=True)
    table.add_column("how many", justify="right", no_wrap=True)
    table.add_column("the first", overflow="fold", ratio=3)
    table.add_column("what to do", overflow="fold", ratio=2)
    for kind, count in findings.ordered():
        known = kind_of(kind)
        places = [short_place(finding.where, root) for finding in findings.first[kind]]
        places = list(dict.fromkeys(places))
        more = " …" if len(places) > EXAMPLES or count > len(findings.first[kind]) else ""
        table.add_row(
            "[red]✗[/red]" if known.defect else "[yellow]·[/yellow]",
            f"[bold]{kind}[/bold]" if known.defect else kind,
            f"{count:,}",
            escape(", ".join(places[:EXAMPLES]) + more),
            known.remedy,
        )
    console.print()
    console.print(table)


def escape(text: str) -> str:
    return escape_markup(printable(text))


def fact_lines(facts: Mapping[str, Any]) -> list[str]:
    """The facts of a set, a line each."""
    lines = []
    if splits := facts.get("splits"):
        parts = (f"{name} {size['pairs']:,} pairs of {size['images']:,} images" for name, size in splits.items())
        lines.append("a run's splits: " + ", ".join(parts))
    if size := facts.get("image sizes"):
        width, height = size["width"], size["height"]
        lines.append(
            f"image sizes: width {_spread(width)}; height {_spread(height)}; as stored: "
            + ", ".join(f"{mode} {count:,}" for mode, count in facts["modes"].items())
        )
    if words := facts.get("caption words"):
        lines.append(f"words of a caption: {_spread(words)}")
    for name in ("images per caption", "captions per image", "pairs per group"):
        if sizes := facts.get(name):
            counts = ", ".join(f"{size} ({count:,} times)" for size, count in sizes.items())
            lines.append(f"{name}: {counts}; at most {facts[f'most {name}']:,}")
    return lines


def _spread(values: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in values.items())


def short_place(where: str, root: str) -> str:
    return where.removeprefix(root.rstrip(os.sep) + os.sep)
