"""Text-guided retrieval for the report: its table, and requests as pictures with what was found for them."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from ..atomic import replace_file, writing_to
from ..beats import beat
from ..data.base import PairData
from .composed import COMPOSED_CUTS, QUERIES

FILE = "composed.json"
SIDE = 112  # pixels a side at most
ASKED_WITH = {
    "query": "image and words", "image": "image alone", "text": "words alone", "sum": "sum of both", "chance": "chance",
}  # fmt: skip


def write_composed_gallery(run_dir: Path | str, evaluation: Mapping[str, Any], data: PairData) -> Path | None:
    """Write ``composed.json``, pictures and all: the examples of ``evaluation.json``, as the model sees them. The file
    appears whole; None where there are none."""
    found = []
    for name, split in evaluation.get("composed", {}).items():
        examples = split.get("examples")
        if not examples:
            continue
        beat("evaluation: drawing answers")
        asked = data.composed[name].requests(np.array([example["row"] for example in examples], np.int64))
        places = sorted({place for example in examples for place in (*example["first"], example["right"])})
        candidates = data.composed[name].candidates(np.array(places, np.int64))
        picture = dict(zip(places, _inline(data, candidates), strict=True))
        shown = [
            {
                "words": data.tokenizer.text(ids),
                "reference": reference,
                "rank": example["rank"],
                "right": picture[example["right"]],
                "first": [picture[place] for place in example["first"]],
            }
            for example, ids, reference in zip(examples, asked.token_ids, _inline(data, asked.images), strict=True)
        ]
        found.append({"split": name, "title": split["title"], "candidates": split["candidates"], "examples": shown})
    if not found:
        return None
    path = Path(run_dir) / FILE
    with writing_to(path.parent):
        replace_file(path, json.dumps(found))
    return path


def _inline(data: PairData, images: Tensor) -> list[str]:
    """(N, 3, H, W) as the model sees them -> N data URLs."""
    found = []
    for pixels in (data.normalisation.undo(images) * 255).round().byte().permute(0, 2, 3, 1).numpy():
        picture, file = Image.fromarray(pixels), io.BytesIO()
        picture.thumbnail((SIDE, SIDE), Image.Resampling.BICUBIC)
        picture.save(file, "png")
        found.append("data:image/png;base64," + base64.b64encode(file.getvalue()).decode())
    return found


def read_composed(run_dir: Path) -> list[dict[str, Any]]:
    """What :func:`write_composed_gallery` wrote; ``[]`` where there is none that can be read."""
    try:
        found = json.loads((run_dir / FILE).read_text("utf-8"))
    except (OSError, ValueError):
        return []
    return found if isinstance(found, list) else []


def composed_rows(evaluation: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The report's table: a row for each set, R@1, R@10 and R@50 in percent for each of :data:`ASKED_WITH`."""
    rows = []
    for name, split in evaluation.get("composed", {}).items():
        sized = "triplets" in split  # which a mean of sets is not
        rows.append(
            {
                "split": f"({name}) {split['title']}" if sized else split["title"],
                "size": f"{split['triplets']:,} requests, {split['candidates']:,} candidates" if sized else "",
                "values": [percent(split[kind][f"r{cut}"]) for kind in ASKED_WITH for cut in COMPOSED_CUTS],
            }
        )
    return rows


def percent(value: float) -> str:
    """One decimal; two below 1, where chance is."""
    return f"{value:.1f}" if value >= 1 else f"{value:.2f}"


def composed_card(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """R@10 in large print, of the mean over sets or else of the first: beside the best that needs no training."""
    sets = evaluation["composed"]
    name = "average" if "average" in sets else next(iter(sets))
    found = sets[name]
    reached, (best, kind) = found["query"]["r10"], max((found[k]["r10"], k) for k in QUERIES if k != "query")
    return {
        "title": "Text-guided retrieval",
        "label": f"R@10, {found['title']}",
        "value": f"{reached:.1f}",
        "unit": "%",
        "note": f"{ASKED_WITH[kind]} {best:.1f} %, chance {found['chance']['r10']:.2g} %",
        "mood": "good" if reached >= best + 1 else "bad" if reached <= best else "even",
    }
