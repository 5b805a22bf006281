"""Losses that are not finite: the step is left out on every rank, and too many in a row end the run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import NonFiniteLossError
from ..teacher.gather import world_size
from ..teacher.zero import discard_gradients, loss_scale_can_fall
from .agreement import any_rank


class NonFiniteGuard:
    """Decides before each backward, for all ranks together, whether the loss may be used.

    >>> if not guard.accept(loss, batch.index, engine):
    ...     return              # no backward, no engine.step, no teacher update, nothing more into the queue
    >>> engine.backward(loss); engine.step()
    >>> guard.stepped(engine.was_step_applied(), batch.index, engine)       # at the last micro-batch of a step

    What the teacher saw in a step's earlier micro-batches is in the queue by then, and stays: it gave finite losses.
    """

    def __init__(self, max_in_a_row: int, name_of: Callable[[int], str] | None = None) -> None:
        """``max_in_a_row``: the so-manieth step left out in a row raises. ``name_of``: a sample's index in words."""
        self.max_in_a_row, self.name_of = max_in_a_row, name_of
        self.skipped = self.in_a_row = 0  # steps left out, so far and since the last good one

    def accept(self, loss: Tensor, index: Tensor, engine: Any | None = None) -> bool:
        """True where the scalar ``loss`` is finite on every rank. Collective; one number travels.

        On False the whole optimizer step is to be left out: with ``engine`` given, the micro-batches accumulated for
        it are forgotten too, so the next accepted one starts a fresh step. ``index``: (B,) this rank's sample
        indices, named in the NonFiniteLossError that the last allowed one raises on every rank.
        """
        bad = ~torch.isfinite(loss.detach()).all()
        if not any_rank(bad):
            return True
        if engine is not None:
            discard_gradients(engine)
        self._left_out(f"loss was not finite ({float(loss.detach())})", bool(bad), index)
        return False

    def stepped(self, applied: bool, index: Tensor, engine: Any | None = None) -> None:
        """After a step's last ``engine.step()``. Collective where it was not applied: a step whose gradients overflowed
        although the loss was finite is left out, the same on every rank.

        With ``engine`` given, not counted while fp16's loss scale can still fall: that is how it finds its level.
        """
        if applied:
            self.in_a_row = 0
        elif engine is None or not loss_scale_can_fall(engine):
            self._left_out("gradient was not finite", True, index)

    def _left_out(self, what: str, mine: bool, index: Tensor) -> None:
        self.skipped += 1
        self.in_a_row += 1
        if self.in_a_row >= self.max_in_a_row:
            raise NonFiniteLossError(self._message(what, mine, index))

    def _message(self, what: str, bad: bool, index: Tensor) -> str:
        mine = (what, [self._name(int(i)) for i in index]) if bad else None
        everyone: list[tuple[str, list[str]] | None] = [mine]
        if world_size() > 1:
            everyone = [None] * world_size()
            dist.all_gather_object(everyone, mine)
        found = [entry for entry in everyone if entry is not None]
        samples = ", ".join(name for _, names in found for name in names)
        times = "once" if self.in_a_row == 1 else f"{self.in_a_row} steps in a row"
        return (
            f"the {found[0][0]} {times}; samples of the last batch: {samples}; "
            "look at these samples, or lower optimizer.lr"
        )

    def _name(self, index: int) -> str:
        return str(index) if self.name_of is None else f"{index} ({self.name_of(index)})"
