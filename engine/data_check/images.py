"""Every image of a set, decoded as a run would decode it: what cannot be read, what is odd, what is there twice."""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from PIL import Image

from ..data.pair_files import PairTable, Source
from ..data.pair_pictures import open_pair_picture, read_pair_picture
from ..data.pictures import MAX_PIXELS
from ..errors import DataError
from .findings import Finding, Shown

TINY = 16  # pixels a side: below, there is nothing to see
ASPECT = 5.0  # of the sides: beyond, squeezing to a square leaves little
AHEAD = 8  # images that wait for each thread: bounds the memory
STEP = 6  # of 255: what is less is no step in a print, for JPEG leaves noise on a plain background
NEAR_BITS = 8  # of 128: how far the coarse prints of near-identical images may differ
NEAR_SIDE = 16  # pixels at which they are compared
NEAR_LIGHT = (5.0, 40.0)  # of 255: how far those may differ, on average and at most
NEAR_LOOKED_AT = 4000  # candidates that are read once more
_CROWD = 40  # images that share a quarter of a print: not looked at one by one
_MODES = {  # what becomes RGB, and how
    "CMYK": ("CMYK image", "is CMYK"),
    "YCCK": ("CMYK image", "is YCCK"),
    "P": ("palette image", "has a palette"),
    "PA": ("palette image", "has a palette"),
    "I": ("clipped image", "has 32-bit integers"),
    "F": ("clipped image", "has 32-bit floating-point numbers"),
}


class Look(NamedTuple):
    """What is known of one image once it was decoded."""

    kinds: tuple[tuple[str, str], ...]  # what to tell, each with a few words
    failed: bool = False
    width: int = 0
    height: int = 0
    mode: str = ""
    pixels: tuple[int, int] = (0, 0)  # hash of the RGB pixels
    print: tuple[int, int] = (0, 0)  # where it gets lighter, on a grid of 8 x 8, to the right and downwards


def look(source: Source, address: str, where: str) -> Look:
    """Decode an image, and judge it. Never raises for what a file may hold."""
    mode, frames, kind = "RGB", 1, None
    try:
        picture = read_pair_picture(source, address, where)
        with open_pair_picture(source, address, where) as raw:  # a second look, at its header alone
            kind, size = raw.format, raw.size
            mode = "transparent" if "transparency" in raw.info or raw.mode in ("RGBA", "LA", "PA") else raw.mode
            if getattr(raw, "is_animated", False) and kind != "MPO":  # a photograph with a preview behind it
                frames = int(getattr(raw, "n_frames", 1))
    except DataError as error:
        oversized = f"more than {MAX_PIXELS >> 20} million" in str(error)
        return Look((("oversized image" if oversized else "unreadable image", str(error)),), failed=True)
    except Exception as error:  # Pillow's readers raise whatever a broken file makes them raise, and so would a run's
        what = f"{where}: cannot read image {address}: {type(error).__name__}: {error}"
        return Look((("unreadable image", " ".join(what.split())),), failed=True)
    width, height = picture.size
    kinds: list[tuple[str, str]] = []
    if min(size) < TINY:
        kinds.append(("tiny image", f"has {width} x {height} pixels"))
    elif max(size) > ASPECT * min(size):
        kinds.append(("extreme aspect", f"has {width} x {height} pixels"))
    plain = all(low == high for low, high in picture.getextrema())  # type: ignore[misc]
    if mode == "transparent":
        white = plain and picture.getpixel((0, 0)) == (255, 255, 255)
        kinds.append(("invisible image", "is wholly transparent") if white else ("transparent image", "is transparent"))
    elif mode in _MODES and (mode, kind) != ("P", "GIF"):  # which knows nothing else
        kinds.append(_MODES[mode])
    elif mode.startswith("I;16"):
        kinds.append(("16-bit image", "has 16 bits"))
    if plain and not any(found in ("invisible image", "clipped image") for found, _ in kinds):
        kinds.append(("one colour", "is of one colour"))
    if frames > 1:
        kinds.append(("animated image", f"has {frames} frames"))
    content = np.asarray(picture)
    pixels = hashlib.blake2b(f"{width}x{height}".encode(), digest_size=16)
    pixels.update(content.data if content.flags.c_contiguous else content.tobytes())
    high, low = np.frombuffer(pixels.digest(), np.uint64).tolist()
    return Look(tuple(kinds), False, width, height, mode, (high, low), (0, 0) if plain else _print(picture))


def _print(picture: Image.Image) -> tuple[int, int]:
    grey = np.asarray(picture.resize((9, 9), Image.Resampling.BOX, reducing_gap=2.0).convert("L"), np.int16)
    right, down = grey[:8, 1:] - grey[:8, :-1] > STEP, grey[1:, :8] - grey[:-1, :8] > STEP
    one, two = (int.from_bytes(np.packbits(bits).tobytes(), "big") for bits in (right, down))
    return one, two


class ImageFacts:
    """Of I images, as they become known: 44 bytes each."""

    def __init__(self, count: int) -> None:
        self.seen = np.zeros(count, bool)
        self.failed = np.zeros(count, bool)
        self.width, self.height = np.zeros(count, np.int32), np.zeros(count, np.int32)
        self.pixels, self.print = np.zeros((count, 2), np.uint64), np.zeros((count, 2), np.uint64)
        self.modes: dict[str, int] = {}

    def take(self, image: int, look: Look) -> None:
        self.seen[image], self.failed[image] = True, look.failed
        if not look.failed:
            self.width[image], self.height[image] = look.width, look.height
            self.pixels[image], self.print[image] = look.pixels, look.print
            self.modes[look.mode] = self.modes.get(look.mode, 0) + 1

    @property
    def good(self) -> np.ndarray:
        return self.seen & ~self.failed


def first_rows(pairs: PairTable) -> np.ndarray:
    """(I,) int64: the first pair of each image, -1 for one that no pair is left of."""
    first = np.full(len(pairs.images), -1, np.int64)
    images, rows = np.unique(pairs.image, return_index=True)
    first[images] = rows
    return first


def place_of(pairs: PairTable, rows: np.ndarray, image: int, short: bool = False) -> tuple[Source, str]:
    """The source of an image, and its place in words."""
    row = int(rows[image])
    if row < 0:  # its captions could not be used
        source = pairs.sources[0]
        return source, f"{source.path}: {pairs.names[image]}"
    return pairs.sources[pairs.source[row]], pairs.where(row, short)


def looks(pairs: PairTable, rows: np.ndarray, threads: int | None = None) -> Iterator[tuple[int, Look]]:
    """Every image, decoded by a pool of threads, in order. Closing the iterator leaves the rest undone."""
    threads = threads or min(16, os.cpu_count() or 1)
    waiting: deque[tuple[int, Future[Look]]] = deque()
    pool = ThreadPoolExecutor(threads, "check")
    try:
        for image, address in enumerate(pairs.images):
            source, where = place_of(pairs, rows, image)
            waiting.append((image, pool.submit(look, source, address, where)))
            if len(waiting) >= threads * AHEAD:
                number, future = waiting.popleft()
                yield number, future.result()
        while waiting:
            number, future = waiting.popleft()
            yield number, future.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def tell(pairs: PairTable, rows: np.ndarray, image: int, found: Look, add: Callable[[Finding], None]) -> None:
    """Findings of one image."""
    source, where = place_of(pairs, rows, image)
    shown = (Shown(source, pairs.images[image], pairs.names[image]),)
    for kind, what in found.kinds:
        add(Finding(kind, where, what if found.failed else f"{where}: the image {pairs.names[image]} {what}", shown))


def duplicates(facts: ImageFacts) -> list[list[int]]:
    """Images with the same pixels, each group ascending."""
    good = np.flatnonzero(facts.good)
    order = good[np.lexsort((good, facts.pixels[good, 1], facts.pixels[good, 0]))]
    same = (facts.pixels[order[1:]] == facts.pixels[order[:-1]]).all(1)
    found: list[list[int]] = []
    for at in np.flatnonzero(same).tolist():
        one, other = int(order[at]), int(order[at + 1])
        if found and found[-1][-1] == one:
            found[-1].append(other)
        else:
            found.append([one, other])
    return sorted(found)


def near_duplicates(pairs: PairTable, rows: np.ndarray, facts: ImageFacts) -> list[tuple[int, int]]:
    """Pairs of images that look the same and are not, pixel for pixel: by a coarse print first, then looked at.

    Prints that differ in few of 128 bits share one of their four quarters in most cases; those that do not are missed.
    """
    good = np.flatnonzero(facts.good & facts.print.any(1))
    quarters = facts.print[good].astype(">u8").view(">u4").reshape(len(good), -1)
    candidates: dict[tuple[int, int], None] = {}
    for quarter in quarters.T:
        order = np.argsort(quarter, kind="stable")
        starts = np.flatnonzero(np.diff(quarter[order], prepend=quarter[order[:1]] + 1))
        for start, end in zip(starts.tolist(), [*starts[1:].tolist(), len(order)], strict=True):
            if not 1 < end - start <= _CROWD or not quarter[order[start]]:
                continue
            crowd = good[np.sort(order[start:end])]
            for at, one in enumerate(crowd[:-1].tolist()):
                others = crowd[at + 1 :]
                bits = np.unpackbits((facts.print[others] ^ facts.print[one]).view(np.uint8), axis=1).sum(1)
                same = (facts.pixels[others] == facts.pixels[one]).all(1)
                candidates.update(dict.fromkeys((one, int(x)) for x in others[(bits <= NEAR_BITS) & ~same]))
    return sorted(pair for pair in list(candidates)[:NEAR_LOOKED_AT] if _alike(pairs, rows, *pair))


def _alike(pairs: PairTable, rows: np.ndarray, one: int, other: int) -> bool:
    small = []
    for image in (one, other):
        source, where = place_of(pairs, rows, image)
        try:
            picture = read_pair_picture(source, pairs.images[image], where)
        except DataError:
            return False
        small.append(
            np.asarray(picture.resize((NEAR_SIDE, NEAR_SIDE), Image.Resampling.BOX, reducing_gap=3.0), np.float32)
        )
    apart = np.abs(small[0] - small[1])
    return bool(apart.mean() <= NEAR_LIGHT[0] and apart.max() <= NEAR_LIGHT[1])
