"""One small set of pairs, in every form in which users bring theirs."""

from __future__ import annotations

import io
import json
import tarfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from crossmask.engine.recipe import Recipe

COLOURS, THINGS = ("red", "green", "blue", "grey"), ("shirt", "hat", "coat", "shoe", "bag")


def encoded(name: str, size: tuple[int, int] = (20, 24), kind: str = "PNG") -> bytes:
    """A picture of noise that depends on its name alone."""
    noise = np.random.default_rng(zlib.crc32(name.encode())).integers(0, 256, (size[1], size[0], 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, kind)
    return file.getvalue()


def rows() -> list[dict[str, Any]]:
    """20 pictures, every fifth with two captions, in order."""
    found = []
    for number, (colour, thing) in enumerate((colour, thing) for colour in COLOURS for thing in THINGS):
        captions = [f"a {colour} {thing}"] + ([f"one {thing} in {colour}"] if number % 5 == 0 else [])
        found.append({"key": f"{number:04d}", "captions": captions, "category": thing, "group": f"g{number // 2}"})
    return found


def lines(folder: Path) -> Path:
    """As a JSONL file beside its pictures."""
    written = []
    for row in rows():
        (folder / f"{row['key']}.png").write_bytes(encoded(row["key"]))
        rest = {name: row[name] for name in ("category", "group")}
        written += [{"image": f"{row['key']}.png", "caption": caption, **rest} for caption in row["captions"]]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in written))
    return folder / "pairs.jsonl"


def members(row: dict[str, Any]) -> dict[str, bytes]:
    """A row as members of a shard: one caption as text, several in JSON."""
    rest: dict[str, Any] = {name: row[name] for name in ("category", "group")}
    found = {f"{row['key']}.png": encoded(row["key"])}
    if len(row["captions"]) == 1:
        found[f"{row['key']}.txt"] = row["captions"][0].encode()
    else:
        rest["captions"] = row["captions"]
    return found | {f"{row['key']}.json": json.dumps(rest).encode()}


def shard(path: Path, found: dict[str, bytes], kind: int = tarfile.USTAR_FORMAT) -> Path:
    with tarfile.open(path, "w", format=kind) as file:
        for name, contents in found.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(contents)
            file.addfile(entry, io.BytesIO(contents))
    return path


def shards(folder: Path, per: int = 8) -> Path:
    """As a folder of shards ``s-000.tar`` and so on."""
    for number, start in enumerate(range(0, len(rows()), per)):
        together = {name: data for row in rows()[start : start + per] for name, data in members(row).items()}
        shard(folder / f"s-{number:03d}.tar", together)
    return folder


def recipe(path: Path | str, **data: Any) -> Recipe:
    """A run of two steps of a tiny model."""
    tower = {"width": 16, "depth": 1, "heads": 2}
    values = {
        "data": {"source": "pairs", "path": str(path), "validation_fraction": 0.2, **data},
        "model": {
            "image": {"size": 16, "patch_size": 8, **tower},
            "text": tower,
            "fusion": {"depth": 1, "heads": 2},
            "projection_width": 8,
        },
        "objectives": {"itc": {"queue_length": 8}},
        "training": {"max_steps": 2, "batch_size": 4, "precision": "fp32"},
    }
    return Recipe.model_validate(values)


def two_steps(found: Recipe) -> list[float]:
    """The losses of its run."""
    from crossmask.engine.training.pretrainer import Pretrainer

    with Pretrainer(found) as pretrainer:
        return [pretrainer.step().item() for _ in range(2)]
