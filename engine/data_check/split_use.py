"""What a run would do with each pair: train on it, or evaluate on it, and which pairs match each other."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..data.pair_files import UNDECIDED, PairTable
from ..data.pair_groups import held_out, true_matches
from ..data.pairs import HELD_OUT, TEST, TRAIN, UNUSED, VAL, VALIDATION
from ..recipe import DataSection

NAMES = {TRAIN: "training", VAL: "val", TEST: "test", VALIDATION: "validation", HELD_OUT: "held-out", UNUSED: "unused"}
BOUNDS = (1, 2, 3, 5, 9, 17, 33, 65, 129, 257)  # where each stretch of a histogram begins


@dataclass(frozen=True)
class SplitUse:
    """Of N pairs."""

    part: np.ndarray  # (N,) int8, see :data:`NAMES`
    group: np.ndarray  # (N,) int64: pairs of one match each other

    def sizes(self, pairs: PairTable) -> dict[str, dict[str, int]]:
        """Pairs and images of each part there is."""
        found = {}
        for number, name in NAMES.items():
            rows = self.part == number
            if rows.any():
                found[name] = {"pairs": int(rows.sum()), "images": len(np.unique(pairs.image[rows]))}
        return found

    def sides(self, pairs: PairTable) -> tuple[np.ndarray, np.ndarray]:
        """(I,) bool each: images that are trained on, and images that are evaluated on."""
        trained, evaluated = (np.zeros(len(pairs.images), bool) for _ in range(2))
        trained[pairs.image[self.part == TRAIN]] = True
        evaluated[pairs.image[np.isin(self.part, (VAL, TEST, VALIDATION, HELD_OUT))]] = True
        return trained, evaluated


def split_use(section: DataSection, pairs: PairTable, texts: list[str], other: PairTable | None) -> SplitUse:
    """As :class:`FilePairs` splits them. ``pairs``: all, those of ``data.validation_path`` (``other``) at the end."""
    part = pairs.split.astype(np.int8)
    if other is not None:
        more = part[len(part) - len(other) :]
        mine = part[: len(part) - len(other)]
        mine[np.isin(mine, (VAL, TEST))] = UNUSED
        more[more == TRAIN] = UNUSED
        more[more == UNDECIDED] = VALIDATION
    group, names = true_matches(pairs, texts)
    undecided = np.flatnonzero(part == UNDECIDED)
    decided = bool(np.isin(part, (VAL, TEST, VALIDATION)).any())
    out = held_out(group[undecided], [names[row] for row in undecided.tolist()], section.validation_fraction)
    part[undecided] = np.where(out & (not decided), HELD_OUT, TRAIN)
    return SplitUse(part, group)


def histogram(sizes: np.ndarray) -> dict[str, int]:
    """How many there are of each size, in stretches that double: ``1``, ``2``, ``3-4``, ``5-8`` and so on."""
    found = {}
    for low, high in zip(BOUNDS, [*BOUNDS[1:], None], strict=True):
        count = int((sizes >= low).sum() if high is None else ((sizes >= low) & (sizes < high)).sum())
        if count:
            last = f"{low}+" if high is None else str(low) if high == low + 1 else f"{low}-{high - 1}"
            found[last] = count
    return found


def spread(values: np.ndarray) -> dict[str, float]:
    """Least, median, 99th percentile and greatest of some numbers."""
    if not len(values):
        return {}
    points = {"least": 0, "median": 50, "99 %": 99, "greatest": 100}
    return {name: round(float(np.percentile(values, at)), 1) for name, at in points.items()}
