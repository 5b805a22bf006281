"""Random numbers as a pure function of what they are for.

Every number is a hash of (seed, epoch, sample index, purpose, draw), so a sample is the same whatever batch, rank or
world size it appears in, and resuming a run needs no generator state. The hash is SplitMix64's finaliser
(Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014), vectorised over the batch.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, replace

import numpy as np

_GAMMA = np.uint64(0x9E3779B97F4A7C15)


def _mix(x: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def uniform(seed: int, epoch: int, indices: np.ndarray, purpose: str, draws: int) -> np.ndarray:
    """Numbers in [0, 1): (B, draws) float64 for B sample ``indices``; a new ``purpose`` is an independent stream."""
    key = np.zeros(1, np.uint64)
    with np.errstate(over="ignore"):
        for part in (seed, epoch, zlib.crc32(purpose.encode())):
            key = _mix(key + _GAMMA + np.uint64(part))
        rows = _mix(key + _GAMMA * (indices.astype(np.uint64) + np.uint64(1)))
        bits = _mix(rows[:, None] + _GAMMA * (np.arange(draws, dtype=np.uint64) + np.uint64(1)))
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


@dataclass(frozen=True)
class Draws:
    """The random numbers of some samples: ``indices`` (B,) int64 in one epoch of one seed."""

    seed: int
    epoch: int
    indices: np.ndarray

    def uniform(self, purpose: str, draws: int) -> np.ndarray:
        return uniform(self.seed, self.epoch, self.indices, purpose, draws)

    def take(self, rows: np.ndarray) -> Draws:
        return replace(self, indices=self.indices[rows])


def permutation(seed: int, epoch: int, size: int) -> np.ndarray:
    """The order of an epoch: a permutation of ``range(size)``, int64."""
    return np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(size)
