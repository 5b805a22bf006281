"""Tables on the screen of what is evaluated beyond image–text retrieval: recognition and text-guided retrieval."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from .composed import COMPOSED_CUTS, QUERIES

_ROWS = {
    "query": "image and words", "image": "image alone", "text": "words alone", "sum": "sum of both", "chance": "chance",
}  # fmt: skip


def print_further(evaluation: Mapping[str, Any], console: Console) -> None:
    """What there is of both in ``evaluation.json``."""
    if evaluation.get("recognition"):
        _print_recognition(evaluation["recognition"], console)
    if evaluation.get("composed"):
        _print_composed(evaluation["composed"], console)


def _print_recognition(found: Mapping[str, Any], console: Console) -> None:
    console.print("\n[bold]Recognition by linear probes[/] on the frozen model, % accuracy / macro-F1")
    for level, of in found.items():
        splits = of["splits"]
        table = Table(box=SIMPLE_HEAD, padding=(0, 1), show_edge=False)
        table.add_column(f"{level}: {of['classes']} classes", no_wrap=True)
        for name in splits:
            table.add_column(name, justify="right", no_wrap=True)
        for feature, probe in of["features"].items():
            table.add_row(feature, *(_both(probe["splits"][name]) for name in splits))
        majority = (_both(split["majority"]) for split in splits.values())
        table.add_row(f"always {of['majority']!r}", *majority, style="dim")
        console.print(table)
        for line in remarks(of):
            console.print(f"  {line}", highlight=False, markup=False, style="dim")


def remarks(level: Mapping[str, Any]) -> list[str]:
    """What a reader should know of one level: what was unseen, unlabelled or rare."""
    lines = []
    for name, split in level["splits"].items():
        if split["unseen_images"]:
            lines.append(
                f"{name}: {split['unseen_images']} of {split['images']} images are of {split['unseen_classes']} classes"
                " without a training image: always wrong"
            )
        if split["unlabelled"]:
            lines.append(f"{name}: {split['unlabelled']} images without a class are left out")
        if not split["images"]:
            lines.append(f"{name}: no image has a class, so all figures are 0")
    if level["single"]:
        lines.append(f"{level['single']} of the classes have one training image")
    return lines


def _both(score: Mapping[str, float]) -> str:
    return f"{score['accuracy']:.1f} / {score['macro_f1']:.1f}"


def _print_composed(found: Mapping[str, Any], console: Console) -> None:
    console.print("\n[bold]Text-guided retrieval[/], % of requests answered")
    table = Table(box=SIMPLE_HEAD, padding=(0, 1), show_edge=False)
    for heading in ("", "asked with"):
        table.add_column(heading, no_wrap=True)
    for cut in COMPOSED_CUTS:
        table.add_column(f"R@{cut}", justify="right", no_wrap=True)
    for name, split in found.items():
        size = f": {split['triplets']:,} of {split['candidates']:,}" if "triplets" in split else ""
        console.print(f"  {name}: {split['title']}{size}", highlight=False, markup=False, style="dim")
        for i, kind in enumerate((*QUERIES, "chance")):
            values = [f"{split[kind][f'r{cut}']:.1f}" for cut in COMPOSED_CUTS]
            style = "bold" if i == 0 else "dim" if kind == "chance" else ""
            table.add_row(name if i == 0 else "", _ROWS[kind], *values, style=style, end_section=kind == "chance")
    console.print(table)
