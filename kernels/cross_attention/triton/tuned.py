"""Reads the table of tiles that ``tune.py`` wrote for the GPUs it ran on."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from .configs import Config

VERSION = 1
VARIABLE = "CROSSMASK_ATTENTION_CONFIGS"
DEFAULT = Path(os.path.expanduser("~/.cache/crossmask/attention.json"))  # where there is no home, not an error
REMEDY = "remove it, or write it again: python -m crossmask.kernels.cross_attention.triton.tune"
Key = tuple[str, str, int, int, int]


def path() -> Path | None:
    """The table that launches read; None where there is none. An empty variable switches it off."""
    if VARIABLE in os.environ:
        return Path(os.path.expanduser(os.environ[VARIABLE])) if os.environ[VARIABLE] else None
    return DEFAULT if DEFAULT.exists() else None


def key(kernel: str, dtype: torch.dtype, width: int, queries: int, keys: int) -> Key:
    """What one entry holds for: lengths count by their next power of two, and half precisions alike."""
    kind = "float32" if dtype == torch.float32 else "half"
    return kernel, kind, width, _ceiling(queries), _ceiling(keys)


def _ceiling(length: int) -> int:
    return 1 << (length - 1).bit_length()


def entry(
    kernel: str, dtype: torch.dtype, width: int, queries: int, keys: int, tile: Config | None, milliseconds: float
) -> dict[str, Any]:
    names = ("kernel", "dtype", "width", "queries", "keys")
    wanted = dict(zip(names, key(kernel, dtype, width, queries, keys), strict=True))
    return {**wanted, "tile": tile and dataclasses.asdict(tile), "milliseconds": round(milliseconds, 4)}


def read(file: Path) -> dict[str, list[dict[str, Any]]]:
    """Entries by GPU.

    Raises:
        ValueError: the file is not such a table; names it and the remedy.
    """
    try:
        content = json.loads(file.read_text())
        if content["version"] != VERSION:
            raise ValueError(f"version {content['version']!r}, not {VERSION}")
        for entries in content["gpus"].values():
            for one in entries:
                _parse(one)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        what = f"lacks {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{file} is no table of attention tiles ({what}): {REMEDY}") from error
    return content["gpus"]


def _parse(one: dict[str, Any]) -> tuple[Key, Config | None]:
    from .configs import Config

    found: Key = (one["kernel"], one["dtype"], one["width"], one["queries"], one["keys"])
    if one["tile"] is None:
        return found, None
    tile = Config(**one["tile"])
    for size in (tile.block_s, tile.block_p, tile.warps, tile.stages):
        if not isinstance(size, int) or size < 1 or (size & (size - 1) and size != tile.stages):
            raise ValueError(f"{tile} is not made of powers of two")
    return found, tile


@functools.cache
def table(file: Path, gpu: str) -> dict[Key, Config | None]:
    """What ``file`` says of ``gpu``; empty where it does not name it."""
    return dict(map(_parse, read(file).get(gpu, [])))
