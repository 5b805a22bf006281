"""Tables on the screen of what is evaluated beyond image–text retrieval: recognition and text-guided retrieval."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import zip_longest
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .composed import COMPOSED_CUTS
from .composed_gallery import ASKED_WITH, percent
from .recognition_rows import all_remarks, by_what, recognised

MAJORITY = 20  # characters of a class's name in a table's row


def print_further(evaluation: Mapping[str, Any], console: Console) -> None:
    """What there is of both in ``evaluation.json``."""
    if evaluation.get("recognition"):
        _print_recognition(evaluation["recognition"], console)
    if evaluation.get("composed"):
        _print_composed(evaluation["composed"], console)


def _print_recognition(found: Mapping[str, Any], console: Console) -> None:
    console.print(f"\n[bold]Recognition[/] by {by_what(found)}")
    console.print("  accuracy / macro-F1 on held-out images, %", highlight=False, style="dim")
    splits = list(dict.fromkeys(name for of in found.values() for name in of["splits"]))
    table = Table(box=SIMPLE_HEAD, padding=(0, 1), show_edge=False)
    table.add_column("", no_wrap=True)
    for name in splits:
        table.add_column(name, justify="right", no_wrap=True)
    for level, of in found.items():
        table.add_row(f"{level}: {of['classes']:,} classes", style="bold")
        for row, scores in recognised(of).items():
            table.add_row(f"  {row}", *(_both(scores.get(name)) for name in splits))
        majority = {name: split["majority"] for name, split in of["splits"].items()}
        largest = of["majority"] if len(of["majority"]) <= MAJORITY else f"{of['majority'][: MAJORITY - 1]}…"
        cells = (_both(majority.get(name)) for name in splits)
        table.add_row(Text(f"  always {largest!r}"), *cells, style="dim", end_section=True)
    console.print(table)
    for line in all_remarks(found):
        console.print(f"  {line}", highlight=False, markup=False, style="dim")


def _both(scores: Mapping[str, float] | None) -> str:
    return "–" if scores is None else f"{scores['accuracy']:.1f} / {scores['macro_f1']:4.1f}"


def _print_composed(found: Mapping[str, Any], console: Console) -> None:
    console.print("\n[bold]Text-guided retrieval[/], % of requests answered")
    table = Table(box=SIMPLE_HEAD, padding=(0, 1), show_edge=False)
    for heading in ("", "asked with"):
        table.add_column(heading, no_wrap=True)
    for cut in COMPOSED_CUTS:
        table.add_column(f"R@{cut}", justify="right", no_wrap=True)
    for name, split in found.items():
        console.print(f"  {name}: {split['title']}", highlight=False, markup=False, style="dim")
        sizes = [f"{split['triplets']:,} requests", f"{split['candidates']:,} images"] if "triplets" in split else []
        for kind, what in zip_longest(ASKED_WITH, (name, *sizes), fillvalue=""):
            values = [percent(split[kind][f"r{cut}"]) for cut in COMPOSED_CUTS]
            style = "bold" if kind == "query" else "dim" if kind == "chance" else ""
            table.add_row(what, ASKED_WITH[kind], *values, style=style, end_section=kind == "chance")
    console.print(table)
