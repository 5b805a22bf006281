"""Batches of the last grouped epoch beside plain ones of the same epoch, as a rank gets them, for the report."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..atomic import replace_file, writing_to
from ..data.base import PairData
from ..data.sampler import Examples

FILE = "batches.json"
PICTURES, COLUMNS = 24, 6  # of a batch: its first ones, which follow each other in a walk
TILE = 96  # pixels a side at most


def write_batches(run_dir: Path | str, data: PairData, examples: Examples) -> Path:
    """Write ``batches.json``: a sheet of pictures and the captions of each batch."""
    sheets = [
        {"kind": kind, **_sheet(data, rows[:PICTURES], examples.epoch)}
        for kind, batches in (("grouped", examples.grouped), ("plain", examples.plain))
        for rows in batches
    ]
    path = Path(run_dir) / FILE
    with writing_to(path.parent):
        replace_file(path, json.dumps({"epoch": examples.epoch, "sheets": sheets, "measures": examples.measures}))
    return path


def read_batches(run_dir: Path | str) -> dict[str, Any]:
    """What was written; empty where there is nothing, or nothing that can be read."""
    try:
        found = json.loads((Path(run_dir) / FILE).read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) and {"epoch", "sheets", "measures"} <= found.keys() else {}


def _sheet(data: PairData, rows: np.ndarray, epoch: int) -> dict[str, Any]:
    batch = data.train_batch(rows, epoch)
    pixels = (data.normalisation.undo(batch.images) * 255).round().byte().permute(0, 2, 3, 1).numpy()
    side = min(TILE, pixels.shape[1])
    columns = min(COLUMNS, len(rows))
    sheet = Image.new("RGB", (columns * side, -(-len(rows) // columns) * side), "white")
    for i, picture in enumerate(pixels):
        tile = Image.fromarray(picture).resize((side, side), Image.Resampling.BICUBIC)
        sheet.paste(tile, (i % columns * side, i // columns * side))
    written = io.BytesIO()
    sheet.save(written, "png")
    captions = [data.tokenizer.text(ids) for ids in batch.token_ids]
    groups = data.train_group_id[rows]
    return {
        "picture": "data:image/png;base64," + base64.b64encode(written.getvalue()).decode(),
        "captions": captions,
        "groups": len(np.unique(groups)),
    }
