"""Losses that are not finite: the step is left out on every rank, and too many in a row end the run."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import NonFiniteLossError
from ..teacher.gather import world_size
from ..teacher.zero import discard_gradients
from .agreement import any_rank


class NonFiniteGuard:
    """Decides before each backward, for all ranks together, whether the loss may be used.

    >>> if not guard.accept(loss, batch.index, engine):
    ...     continue            # no backward, no engine.step, no teacher update, nothing into the queue
    >>> engine.backward(loss); engine.step()
    """

    def __init__(self, max_in_a_row: int, skipped: int = 0) -> None:
        """``max_in_a_row``: the so-manieth non-finite loss in a row raises. ``skipped``: the count so far (resume)."""
        self.max_in_a_row, self.skipped, self.in_a_row = max_in_a_row, skipped, 0

    def accept(self, loss: Tensor, index: Tensor, engine: Any | None = None) -> bool:
        """True where the scalar ``loss`` is finite on every rank. Collective; one number travels.

        On False the whole optimizer step is to be left out: with ``engine`` given, the micro-batches accumulated for
        it are forgotten too, so the next accepted one starts a fresh step. ``index``: (B,) this rank's sample
        indices, named in the NonFiniteLossError that the last allowed one raises on every rank.
        """
        bad = ~torch.isfinite(loss.detach()).all()
        if not any_rank(bad):
            self.in_a_row = 0
            return True
        self.skipped += 1
        self.in_a_row += 1
        if engine is not None:
            discard_gradients(engine)
        if self.in_a_row >= self.max_in_a_row:
            raise NonFiniteLossError(self._message(float(loss.detach()), bool(bad), index))
        return False

    def _message(self, loss: float, bad: bool, index: Tensor) -> str:
        mine = (loss, [int(i) for i in index]) if bad else None
        everyone: list[tuple[float, list[int]] | None] = [mine]
        if world_size() > 1:
            everyone = [None] * world_size()
            dist.all_gather_object(everyone, mine)
        found = [entry for entry in everyone if entry is not None]
        samples = ", ".join(str(i) for _, indices in found for i in indices)
        times = "once" if self.in_a_row == 1 else f"{self.in_a_row} steps in a row"
        return (
            f"the loss was not finite ({found[0][0]}) {times}; samples of the last batch: {samples}; "
            "look at these samples, or lower optimizer.lr"
        )
