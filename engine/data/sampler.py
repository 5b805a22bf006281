"""Which samples a rank sees at a step: a pure function, so a resumed run needs nothing but the step number."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from ..errors import DataError, RecipeError
from .randomness import permutation


@dataclass(frozen=True)
class Examples:
    """Shares of a rank, (B,) int64 sample indices each, of the epoch that is running and of a plain order of it."""

    epoch: int
    grouped: list[np.ndarray]
    plain: list[np.ndarray]
    measures: dict[str, float]  # of the epoch's order


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
        self._later: dict[int, np.ndarray] = {}  # orders of later epochs that ahead() was asked for

    def epoch(self, step: int) -> int:
        return step // self.steps_per_epoch

    def indices(self, step: int, rank: int) -> np.ndarray:
        """The rank's contiguous share of the step's batch: (batch_size / world_size,) int64."""
        epoch, place = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            found = self._later.get(epoch)
            self._epoch, self._order = epoch, self._order_of(epoch) if found is None else found
            self._later = {later: order for later, order in self._later.items() if later > epoch}
        return self._share_of(self._order, place, rank)

    def ahead(self, step: int, rank: int) -> np.ndarray | None:
        """What :meth:`indices` will return at a later step; None where it is not known yet. Waits for nobody, and
        changes nothing that a step could see."""
        epoch, place = divmod(step, self.steps_per_epoch)
        order = self._order if epoch == self._epoch else self._order_ahead(epoch)
        return None if order is None else self._share_of(order, place, rank)

    def _share_of(self, order: np.ndarray, place: int, rank: int) -> np.ndarray:
        share = self.batch_size // self.world_size
        start = place * self.batch_size + rank * share
        return order[start : start + share].astype(np.int64)

    def _order_of(self, epoch: int) -> np.ndarray:
        return permutation(self.seed, epoch, self.size)

    def _order_ahead(self, epoch: int) -> np.ndarray | None:
        if epoch not in self._later:
            self._later[epoch] = permutation(self.seed, epoch, self.size)
        return self._later[epoch]

    # What an order that follows the model needs (grouping_sampler.py); this one needs nothing of it.
    collects = False  # whether collect() does anything

    def begin(self, step: int) -> list[str]:
        """Called before the step that the run starts or goes on at; lines for a person. May write to its folder."""
        return []

    def collect(self, step: int, micro: int, image: Tensor, text: Tensor) -> None:
        """Features (B, E), every rank's in rank order, of micro-batch ``micro`` of ``step``; waits for no device."""

    def records(self) -> list[dict[str, float]]:
        """On rank 0, numbers about the epoch whose first step was the last step."""
        return []

    def examples(self, count: int) -> Examples | None:
        """``count`` batches of each kind for the report; None where epochs are plain."""
        return None

    def flush(self) -> None:
        """Called before a checkpoint is written."""

    def close(self) -> None:
        """Called when the run ends, however it does."""

    def notices(self) -> list[str]:
        """Lines for the start of a run: what it does that differs from the letter of the recipe."""
        return []
