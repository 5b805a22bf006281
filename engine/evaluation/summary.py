"""The last thing on the screen: a table of final retrieval, and whether the masks found the drawing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from .retrieval import CUTS

DIRECTIONS = {"i2t": "image → text", "t2i": "text → image"}


def print_summary(evaluation: Mapping[str, Any], console: Console | None = None) -> None:
    """Print splits x R@1/5/10 in both directions with chance, ITM and masks. Takes what ``evaluation.json`` holds."""
    console = console or Console()
    console.print("\n[bold]Retrieval on held-out pairs[/], % of queries answered")
    splits = evaluation.get("splits", {})
    tags = {name: f"({name})" if len(name) == 1 else f"({i})" for i, name in enumerate(splits, 1)}
    for name, split in splits.items():
        console.print(
            f"  {tags[name]} {split['title']}: {split['images']:,} images, {split['captions']:,} captions",
            highlight=False, markup=False, style="dim",
        )  # fmt: skip
    table = Table(box=SIMPLE_HEAD, pad_edge=True)
    for heading in ("", "direction"):
        table.add_column(heading, no_wrap=True)
    for cut in CUTS:
        table.add_column(f"R@{cut}", justify="right", no_wrap=True)
    table.add_column("ITC+ITM", justify="right", no_wrap=True)
    table.add_column("ITM", justify="right", no_wrap=True)
    table.add_column("chance", justify="right", style="dim", no_wrap=True)
    for name, split in splits.items():
        for direction, words in DIRECTIONS.items():
            found, first = split[direction], direction == "i2t"
            table.add_row(
                tags[name] if first else "",
                words,
                f"[bold]{found['r1']:.1f}[/]",
                *(f"{found[f'r{cut}']:.1f}" for cut in CUTS[1:]),
                reranked(split, direction),
                itm_alone(split, direction),
                f"{split.get('chance', {}).get(direction, {}).get('r1', split['chance_r1']):.2f}",
            )
    console.print(table)
    asked = max((s["reranked"]["i2t"].get("queries", 0) for s in splits.values() if s.get("reranked")), default=0)
    if asked:
        console.print(
            "  ITC+ITM, ITM: R@1 with the leading candidates in that order, for at most\n"
            f"  {asked:,} queries; in brackets, the difference from ITC's own order for them.\n",
            highlight=False, style="dim",
        )  # fmt: skip
    for line in verdicts(evaluation):
        console.print(f"  {line}", highlight=False)


def reranked(split: Mapping[str, Any], direction: str) -> str:
    """R@1 after the leading candidates were ordered by ITC and ITM together, and what that changed for these queries
    (a sample of a large split, whose R@1 before may differ from the whole split's)."""
    found = split.get("reranked")
    if not found:
        return "–"
    before, after = found.get("before", {}).get(direction, split[direction])["r1"], found[direction]["r1"]
    return f"{after:.1f} ({after - before:+.1f})"


def itm_alone(split: Mapping[str, Any], direction: str) -> str:
    """R@1 after the leading candidates were ordered by ITM alone."""
    found = (split.get("reranked") or {}).get("itm", {}).get(direction)
    return f"{found['r1']:.1f}" if found else "–"


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
