"""Which pairs belong together, and which are held out."""

from __future__ import annotations

import zlib

import numpy as np

from ..beats import beat
from .pair_files import PairTable

_BEAT_EVERY = 4096  # pairs


def true_matches(pairs: PairTable, texts: list[str]) -> tuple[np.ndarray, list[str]]:
    """(N,) int64 group of each pair, and the N names by which :func:`held_out` knows them.

    Pairs match that share an image, a group or, without a group, the words of the caption (``texts``, N), and so do
    pairs that others link in this way. In the layouts of benchmarks words do not count: only an image's own captions
    match it, as published.
    """
    number: dict[str, int] = {}
    keys, names = np.full(len(pairs), -1, np.int64), []
    by_image = [source.by_image for source in pairs.sources]
    for row, (group, source) in enumerate(zip(pairs.groups, pairs.source.tolist(), strict=True)):
        if group is None and by_image[source]:
            names.append(pairs.names[pairs.image[row]])
            continue
        names.append(texts[row] if group is None else f"group {group}")
        keys[row] = number.setdefault(names[-1], len(number))
    return linked(pairs.image, keys), names


def linked(image: np.ndarray, key: np.ndarray) -> np.ndarray:
    """(N,) int64: equal for rows that share an image or a key, or that others link; from 0 in order of appearance.

    ``image`` (N,) int from 0, ``key`` (N,) int from 0 with -1 for none.
    """
    images = int(image.max(initial=-1)) + 1
    parent = list(range(images + int(key.max(initial=-1)) + 1))

    def find(node: int) -> int:
        while parent[node] != node:
            parent[node] = parent[parent[node]]
            node = parent[node]
        return node

    for row, (one, other) in enumerate(zip(image.tolist(), key.tolist(), strict=True)):
        if row % _BEAT_EVERY == 0:
            beat("grouping the pairs")
        if other >= 0:
            parent[find(one)] = find(images + other)
    number: dict[int, int] = {}
    return np.array([number.setdefault(find(one), len(number)) for one in image.tolist()], np.int64)


def held_out(group: np.ndarray, names: list[str], fraction: float) -> np.ndarray:
    """(N,) bool: which pairs are held out, whole groups each, by the CRC-32 of the first of a group's names in
    alphabetical order, so that further pairs move no others. Neither side is left empty by chance.

    ``group`` (N,) int64; ``names`` N.
    """
    lowest: dict[int, str] = {}
    for number, name in zip(group.tolist(), names, strict=True):
        lowest[number] = min(name, lowest.get(number, name))
    chance = {number: zlib.crc32(name.encode()) / 2**32 for number, name in lowest.items()}
    out = {number for number, value in chance.items() if value < fraction}
    if fraction > 0 and len(chance) > 1 and len(out) in (0, len(chance)):
        out ^= {(max if out else min)(chance, key=lambda number: chance[number])}  # the nearest to the other side
    return np.isin(group, np.array(sorted(out), np.int64))
