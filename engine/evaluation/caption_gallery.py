"""Captioned pictures and zero-shot figures, for the report and the screen."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from ..atomic import replace_file, writing_to
from ..data.base import PairData
from .zero_shot import TOP

FILE = "captions.json"
SCORES = {  # of a split's captions: heading, and what it says
    "bleu4": ("BLEU-4", "BLEU-4 of the words, all references, no smoothing"),
    "cider": ("CIDEr", "CIDEr x 100"),
    "exact": ("exact", "% that someone wrote in the same words"),
    "distinct": ("distinct", "different captions, % of all"),
    "words": ("words", "words of a caption"),
    "nats_per_token": ("nats", "negative log-probability of a token, natural logarithm"),
}


def write_caption_gallery(run_dir: Path | str, evaluation: Mapping[str, Any], data: PairData) -> Path | None:
    """Write ``captions.json``, pictures and all: the examples of ``evaluation.json``, as the model sees them. The file
    appears whole; None without captions."""
    found = []
    for name, split in evaluation.get("captioning", {}).items():
        rows = np.array([example["row"] for example in split["examples"]], np.int64)
        if not len(rows):
            continue
        pixels = data.normalisation.undo(data.splits[name].take(rows).images)
        pictures = (pixels * 255).round().byte().permute(0, 2, 3, 1).numpy()
        shown = [
            {**example, "image": _inline(picture)} for example, picture in zip(split["examples"], pictures, strict=True)
        ]
        found.append({"split": name, "title": split["title"], "examples": shown})
    if not found:
        return None
    path = Path(run_dir) / FILE
    with writing_to(path.parent):
        replace_file(path, json.dumps(found))
    return path


def _inline(picture: np.ndarray) -> str:
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "png")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def read_captions(run_dir: Path) -> list[dict[str, Any]]:
    """What :func:`write_caption_gallery` wrote; ``[]`` where there is none that can be read."""
    try:
        found = json.loads((run_dir / FILE).read_text("utf-8"))
    except (OSError, ValueError):
        return []
    return found if isinstance(found, list) else []


def caption_rows(evaluation: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row of the report's table for each split that was captioned."""
    return [
        {
            "split": f"({name}) {split['title']}",
            "size": f"{split['images']:,} images, {split['references']:.1f} references each",
            "values": [_number(split.get(field)) for field in SCORES],
            "missing": split.get("missing", ""),
        }
        for name, split in evaluation.get("captioning", {}).items()
    ]


def class_rows(evaluation: Mapping[str, Any]) -> list[list[str]]:
    """Split, level, classes, images, top 1, top 5, macro-F1 and chance of each zero-shot classification."""
    return [
        [
            f"({name})", level, f"{found['classes']:,}", f"{found['images']:,}",
            *(f"{found[field]:.1f}" for field in ("top1", f"top{TOP}", "macro_f1")), f"{found['chance']:.2g}",
        ]
        for name, levels in evaluation.get("zero_shot", {}).items()
        for level, found in levels.items()
    ]  # fmt: skip


def print_written(evaluation: Mapping[str, Any], console: Console) -> None:
    """Tables on the screen of both, where there are any."""
    if evaluation.get("captioning"):
        console.print("\n[bold]Captions of held-out images[/]")
        table = Table(box=SIMPLE_HEAD, padding=0, show_edge=False)
        for heading in ("", "images", *(short for short, _ in SCORES.values())):
            table.add_column(f" {heading}", justify="left" if not heading else "right", no_wrap=True)
        for name, split in evaluation["captioning"].items():
            values = [_number(split.get(field)) for field in SCORES]
            table.add_row(f" ({name})", f"{split['images']:,}", *values)
        console.print(table)
        missing = next((split["missing"] for split in evaluation["captioning"].values() if split.get("missing")), None)
        if missing:
            console.print(f"  {missing}", highlight=False, markup=False)
        for name, split in evaluation["captioning"].items():
            for example in split["examples"][:2]:
                said, wanted = example["caption"], example["references"][0]
                console.print(f"  ({name}) {said}  ←  {wanted}", highlight=False, markup=False, style="dim")
    if rows := class_rows(evaluation):
        console.print("\n[bold]Zero-shot classification[/], %")
        table = Table(box=SIMPLE_HEAD, padding=0, show_edge=False)
        for heading in ("", "level", "classes", "images", "top 1", f"top {TOP}", "macro-F1", "chance"):
            table.add_column(f" {heading}", justify="left" if heading in ("", "level") else "right", no_wrap=True)
        for row in rows:
            table.add_row(*(f" {value}" for value in row))
        console.print(table)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}" if value < 10 else f"{value:.1f}"
