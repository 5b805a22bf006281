"""The embedded art: 10,612 emoji drawings of 1,914 captions in eight styles, as tensors.

``emoji_set/<style>.png`` is an atlas of 64 x 64 tiles, 48 a row; ``index.json[style][i]`` is the caption of tile i.
The drawings lie on white. Here they become premultiplied RGBA, so that they can be put on any canvas: the background is
every near-white pixel that is connected to the border through near-white.
"""

from __future__ import annotations

import json
import re
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

SET = Path(__file__).parent / "emoji_set"
TILE, COLUMNS = 64, 48
NEAR_WHITE = 248  # all three channels at least this; the palettes' lightest real colours lie below
HELD_OUT_DESIGNER = "twemoji"

# A drawing is mirrored only where its meaning survives: not flags or signs, nothing with letters, digits, notes or the
# hands of a clock on it, and nothing whose caption speaks of a side.
_UNMIRRORED_GROUPS = {"flags", "symbols"}
_UNMIRRORED_SUBGROUPS = {
    "time",
    "books & paper",
    "office supplies",
    "money",
    "music",
    "award medals",
    "computer",
    "phone",
}
_SIDED = re.compile(
    r"\b((left|right|east|west)\w*|clockwise|arrow\w*|clock|letters?|abc|text|writing|sign|word|number|button|mahjong"
    r"|billiards?|8|slot|ticket|dice|stop|atm|bank|hospital|hotel|post|100|hundred|calendar|globe)\b"
)
_COLOURS = re.compile(
    r"\b(red|orange|yellow|green|blue|purple|violet|pink|brown|black|white|gr[ae]y|gold(en)?|silver|bronze|colou?r\w*|blond|rainbow"
    r"|1st|2nd|3rd)\b"
)


@dataclass(frozen=True)
class Caption:
    """One emoji as text. ``name`` and ``tags`` are what a model may read; the rest is for splits and rules."""

    id: str
    name: str
    tags: tuple[str, ...]
    group: str
    subgroup: str

    @property
    def held_out(self) -> bool:
        return zlib.crc32(self.id.encode()) % 10 == 0

    @property
    def is_flag(self) -> bool:
        return self.group == "flags"

    @property
    def may_mirror(self) -> bool:
        words = " ".join((self.name, *self.tags)).lower().replace("-", " ")
        return (
            self.group not in _UNMIRRORED_GROUPS
            and self.subgroup not in _UNMIRRORED_SUBGROUPS
            and _SIDED.search(words) is None
        )

    @property
    def names_colour(self) -> bool:
        """Whether a change of hue could make the caption false."""
        return self.is_flag or _COLOURS.search(" ".join((self.name, *self.tags)).lower()) is not None


@dataclass(frozen=True)
class EmojiArt:
    """All drawings, ordered by style and then by tile. R = min(64, canvas) pixels a side."""

    captions: list[Caption]
    styles: list[str]
    rgba: Tensor  # (N, 4, R, R) uint8, colour premultiplied with alpha
    caption: np.ndarray  # (N,) int64, row in ``captions``
    style: np.ndarray  # (N,) int64, row in ``styles``


def read_captions(folder: Path = SET) -> list[Caption]:
    rows = [json.loads(line) for line in (folder / "captions.jsonl").read_text("utf-8").splitlines()]
    return [Caption(r["id"], r["name"], tuple(r["tags"]), r["group"], r["subgroup"]) for r in rows]


def background(near_white: np.ndarray) -> np.ndarray:
    """Flood fill from the border: (N, S, S) bool near-white -> (N, S, S) bool, True = background.

    Rows are swept down, up, right and left until nothing changes, all images at once with eight images in a byte:
    a few rounds, against one pass per pixel of path length for a dilation.
    """
    count = len(near_white)
    free = np.packbits(near_white.transpose(1, 2, 0), axis=2)  # (S, S, N/8)
    reach = np.zeros_like(free)
    reach[0], reach[-1], reach[:, 0], reach[:, -1] = free[0], free[-1], free[:, 0], free[:, -1]
    size, before = free.shape[0], np.zeros_like(free)
    while not np.array_equal(before, reach):
        before = reach.copy()
        for i in range(1, size):
            reach[i] |= reach[i - 1] & free[i]
        for i in range(size - 2, -1, -1):
            reach[i] |= reach[i + 1] & free[i]
        for i in range(1, size):
            reach[:, i] |= reach[:, i - 1] & free[:, i]
        for i in range(size - 2, -1, -1):
            reach[:, i] |= reach[:, i + 1] & free[:, i]
    return np.unpackbits(reach, axis=2, count=count).transpose(2, 0, 1).astype(bool)


def load_art(canvas: int, folder: Path = SET) -> EmojiArt:
    """Decode the atlases and cut the drawings out of their white; about a second and at most 180 MB."""
    index: dict[str, list[int]] = json.loads((folder / "index.json").read_text("utf-8"))
    size, parts = min(TILE, canvas), []
    for style, rows in index.items():
        with Image.open(folder / f"{style}.png") as image:
            pixels = np.asarray(image)
            palette = np.asarray(image.getpalette(), np.uint8).reshape(-1, 3)
        tiles = pixels.reshape(-1, TILE, COLUMNS, TILE).swapaxes(1, 2).reshape(-1, TILE, TILE)[: len(rows)]
        alpha = ~background((palette.min(axis=1) >= NEAR_WHITE)[tiles])
        # A drawing that is all near-white would vanish: it keeps its whole tile.
        alpha[alpha.mean(axis=(1, 2)) < 0.01] = True
        planes = [np.where(alpha, palette[tiles, channel], 0) for channel in range(3)]
        rgba = torch.from_numpy(np.stack([*planes, alpha * np.uint8(255)], axis=1))
        parts.append(rgba if size == TILE else _shrink(rgba, size))
    return EmojiArt(
        captions=read_captions(folder),
        styles=list(index),
        rgba=torch.cat(parts),
        caption=np.concatenate([np.asarray(rows, np.int64) for rows in index.values()]),
        style=np.repeat(np.arange(len(index)), [len(rows) for rows in index.values()]),
    )


def _shrink(rgba: Tensor, size: int) -> Tensor:
    chunks = (F.interpolate(c.float(), size=size, mode="area") for c in rgba.split(256))
    return torch.cat([c.round_().to(torch.uint8) for c in chunks])
