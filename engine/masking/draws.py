"""Random numbers of a mask: a function of the run's seed, the step, the sample and the purpose, and of nothing else.

So a sample gets the same mask in whatever batch and on whatever rank it stands, a resumed run repeats the masks of one
that was never stopped, and nothing waits for the device.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from crossmask.kernels import philox

_MASK = 2**64 - 1


@dataclass(frozen=True)
class Draws:
    """The numbers of some samples at one step. Each ``purpose`` is an independent stream."""

    seed: int
    step: int
    index: Tensor  # (B,) int64: which samples of the data source these are

    def key(self, purpose: str) -> int:
        """A 63-bit number for (seed, step, purpose): SplitMix64's finaliser after each part (Steele et al. 2014)."""
        state = 0
        for part in (self.seed, self.step, zlib.crc32(purpose.encode())):
            state = (state + part + 0x9E3779B97F4A7C15) & _MASK
            state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
            state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
            state ^= state >> 31
        return state >> 1

    def _seed(self, purpose: str) -> Tensor:
        # filled on the device: a tensor made from a number would be copied there
        return torch.full((1,), self.key(purpose), dtype=torch.int64, device=self.index.device)

    def uniform(self, purpose: str, *shape: int) -> Tensor:
        """(B, *shape) float32 in the open interval (0, 1)."""
        numbers = 1
        for length in shape:
            numbers *= length
        drawn = philox.uniform(self._seed(purpose), self.index, numbers)
        return drawn.reshape(len(self.index), *shape)

    def normal(self, purpose: str, *shape: int) -> Tensor:
        """(B, *shape) float32 of the standard normal distribution."""
        return torch.special.ndtri(self.uniform(purpose, *shape))

    def gumbel(self, purpose: str) -> dict[str, Any]:
        """Arguments for ``topk_mask``: it then draws without replacement, in proportion to ``exp(score)``."""
        return {"gumbel_seed": self._seed(purpose), "gumbel_rows": self.index}
