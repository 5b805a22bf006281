"""Masks over training: the same few held-out pairs at the start, in the middle and at the end of a run."""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ..atomic import replace_file, writing_to
from ..data.base import PairData
from ..recipe import Recipe
from .evaluate import frozen, sample
from .gallery import describe_pairs
from .masks import Look

FOLDER = "mask_history"
PAIRS = 4  # of a snapshot
_FILE = re.compile(r"step-(\d+)\.json")


def snapshot_steps(max_steps: int) -> tuple[int, ...]:
    """The steps after which a run keeps its masks: before the first, halfway, and after the last."""
    return tuple(dict.fromkeys((0, max_steps // 2, max_steps)))


def write_snapshot(
    run_dir: Path | str,
    step: int,
    model: Any,
    data: PairData,
    look: Look,
    recipe: Recipe,
    device: torch.device | str,
) -> Path:
    """Write ``mask_history/step-N.json``, pictures and all, in one file that appears whole; a second time replaces it.

    The pairs are scenes where the source composes any: there a mask has something to choose from.
    """
    with frozen(model, recipe.seed):
        name, split = next(iter(data.splits.items()))
        scenes = data.scene_batch(name, PAIRS, recipe.seed + 2)
        batch = sample(split, PAIRS, recipe.seed + 2) if scenes is None else scenes
        pairs = describe_pairs(model, batch, look, data, device)
    for pair in pairs:
        picture = io.BytesIO()
        Image.fromarray(pair.pop("pixels")).save(picture, "png")
        pair["image"] = "data:image/png;base64," + base64.b64encode(picture.getvalue()).decode()
    folder = Path(run_dir) / FOLDER
    with writing_to(folder):
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"step-{step:09d}.json"
        replace_file(path, json.dumps({"step": step, "grid": list(model.patch_grid), "pairs": pairs}))
    return path


def read_snapshots(run_dir: Path | str) -> list[dict[str, Any]]:
    """Every snapshot that can be read, by step."""
    found = []
    folder = Path(run_dir) / FOLDER
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        if _FILE.fullmatch(path.name) is None:
            continue
        try:
            snapshot = json.loads(path.read_text("utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(snapshot, dict) and {"step", "grid", "pairs"} <= snapshot.keys():
            found.append(snapshot)
    return found


def history(snapshots: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row for each pair that all snapshots have: its picture, its words' masks and its hidden patches, step by step.

    ``score``: of the hidden patches, the share on a named thing, and what random masks of that picture get.
    """
    if len(snapshots) < 2:
        return []
    rows = []
    for i, first in enumerate(snapshots[0]["pairs"]):
        same = [s["pairs"][i] for s in snapshots if len(s["pairs"]) > i]
        if len(same) < len(snapshots) or any(pair["image"] != first["image"] for pair in same):
            continue  # of another version of the data
        looks = [
            {"step": s["step"], "patches": pair["masked_patches"], "words": pair["words"], "score": _score(pair)}
            for s, pair in zip(snapshots, same, strict=True)
        ]
        named = first.get("named_patches")
        luck = 100 * len(named) / len(first["attention"]) if named else None
        rows.append({"image": first["image"], "looks": looks, "luck": luck})
    return rows


def _score(pair: Mapping[str, Any]) -> float | None:
    """Percent of the hidden patches that lie on a thing drawn and named."""
    named, hidden = pair.get("named_patches"), pair["masked_patches"]
    return 100 * len(set(named) & set(hidden)) / len(hidden) if named and hidden else None
