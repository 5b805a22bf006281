"""The last thing on the screen: a table of final retrieval, by every order, and whether the masks found the drawing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from .caption_gallery import print_written
from .further_tables import print_further
from .orders import orders
from .ranking import CUTS


def print_summary(evaluation: Mapping[str, Any], console: Console | None = None) -> None:
    """Print splits x R@1/5/10 and their sum in both directions by every order. Takes what ``evaluation.json`` holds."""
    console = console or Console()
    if evaluation.get("splits"):
        _print_retrieval(evaluation["splits"], console)
    print_further(evaluation, console)
    print_written(evaluation, console)
    console.print()
    for line in verdicts(evaluation):
        console.print(f"  {line}", highlight=False)


def _print_retrieval(splits: Mapping[str, Any], console: Console) -> None:
    console.print("\n[bold]Retrieval on held-out pairs[/], % of queries answered")
    tags = {name: f"({name})" if len(name) == 1 else f"({i})" for i, name in enumerate(splits, 1)}
    for name, split in splits.items():
        console.print(
            f"  {tags[name]} {split['title']}: {split['images']:,} images, {split['captions']:,} captions",
            highlight=False, markup=False, style="dim",
        )  # fmt: skip
    table = Table(box=SIMPLE_HEAD, padding=0, show_edge=False)
    for heading in ("", "order"):
        table.add_column(heading, no_wrap=True)
    for heading in ("TR", "IR"):
        for i, cut in enumerate(CUTS):
            table.add_column(f" {heading} R@{cut}" if i == 0 else f"R@{cut}", justify="right", no_wrap=True)
    spread = any(split.get("sampled") for split in splits.values())
    for heading in ("sum", "±") if spread else ("sum",):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, split in splits.items():
        lines = list(orders(split, flags=False))
        for i, order in enumerate(lines):
            values = [f"{value:5.1f}" if value >= 1 else f"{value:5.2f}" for value in order.values()]
            if spread:
                deviation = order.spreads()[-1]
                values.append("" if deviation is None else f"{deviation:4.1f}")
            style = "dim" if order.name.endswith("chance") else "bold" if i == 0 else ""
            last = order is lines[-1]
            table.add_row(f" {tags[name]}" if i == 0 else "", order.name, *values, style=style, end_section=last)
    console.print(table)
    for line in legend(splits):
        console.print(f"  {line}", highlight=False, markup=False, style="dim")


def legend(splits: Mapping[str, Any]) -> list[str]:
    """What the table's words mean, as far as it has them."""
    if not splits:
        return []
    lines = ["TR: an image asks for its captions; IR: a caption for its images; sum: all six"]
    if any(split.get("reranked") for split in splits.values()):
        lines.append("top: the leading candidates by ITC put in that order, the others behind them")
    if found := [split["sampled"] for split in splits.values() if split.get("sampled")]:
        draws = f"{found[0]['draws']} draws"
        lines.append(f"1 of: among wrong ones of its category, mean of {draws}; ±: deviation of sums")
    return lines


def verdicts(evaluation: Mapping[str, Any]) -> list[str]:
    """One plain line each on ITM and on the masks, with the number each is compared with."""
    lines, itm, masks = [], evaluation.get("itm") or {}, evaluation.get("masks") or {}
    if itm.get("loss") is not None:
        lines.append(
            f"ITM loss {itm['loss']:.3f} nats (nothing learned: {itm['prior']:.3f}), area under ROC {itm['auc']:.3f}"
        )
    if "on_drawing" in masks:
        lines.append(
            f"Masked patches on a drawing {100 * masks['on_drawing']:.1f} % "
            f"(random masks {100 * masks['on_drawing_random']:.1f} %)"
        )
    if "attention_entropy" in masks:
        lines.append(f"Attention entropy {masks['attention_entropy']:.3f} of its maximum")
    return lines
