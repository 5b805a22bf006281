"""Which samples a rank sees at a step: a pure function, so a resumed run needs nothing but the step number."""

from __future__ import annotations

import numpy as np

from ..errors import DataError, RecipeError
from .randomness import permutation


class StepSampler:
    """Epochs are permutations of ``range(size)``; an epoch has ``size // batch_size`` steps and never a short batch.

    Raises RecipeError where a batch cannot be dealt evenly to the ranks, DataError where there is less data than that.
    """

    def __init__(self, size: int, batch_size: int, world_size: int, seed: int, accumulation_steps: int = 1) -> None:
        shares = world_size * accumulation_steps
        if size < world_size:
            raise DataError(f"{world_size} ranks but only {size} training samples; start fewer ranks or add data")
        if batch_size % shares:
            below, above = batch_size // shares * shares, -(-batch_size // shares) * shares
            choice = f"{below} or {above}" if below else f"{above}"
            raise RecipeError(
                f"training.batch_size ({batch_size}) is not divisible by {world_size} ranks x {accumulation_steps}"
                f" accumulation steps = {shares}; set training.batch_size to {choice}"
            )
        if size < batch_size:
            raise DataError(
                f"training.batch_size ({batch_size}) is larger than the {size} training samples;"
                f" set training.batch_size to at most {max(size // shares, 1) * shares} or add data"
            )
        self.size, self.batch_size, self.world_size, self.seed = size, batch_size, world_size, seed
        self.steps_per_epoch = size // batch_size
        self._epoch, self._order = -1, np.empty(0, np.int64)

    def epoch(self, step: int) -> int:
        return step // self.steps_per_epoch

    def indices(self, step: int, rank: int) -> np.ndarray:
        """The rank's contiguous share of the step's batch: (batch_size / world_size,) int64."""
        epoch, place = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, permutation(self.seed, epoch, self.size)
        share = self.batch_size // self.world_size
        start = place * self.batch_size + rank * share
        return self._order[start : start + share].astype(np.int64)
