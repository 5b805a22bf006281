"""Steps that do the same job, taken in turns in one process: held to one another first, then timed, then traced.

Memory is what a side holds between two steps and the most that a step allocates beyond it: tensors, by PyTorch's
allocator. What libraries below it take for themselves is not in it."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from albef_step.memory import tensors
from albef_step.products import pytorchs_products

from crossmask.kernels.linear import api as products

from ..clock import Clock, take_turns
from ..problem import verdict
from ..results import Row
from .planned import Planned
from .trace import trace

Step = Callable[[], dict[str, float]]  # takes a step, gives its losses
Built = tuple[Step, Callable[[], AbstractContextManager[None]]]  # and what labels its parts
OURS = "crossmask"
PYTORCHS = f"{OURS}, PyTorch's products"
MEMORY = "memory is that of its tensors"


def variants(device: str, dtype: str) -> tuple[str, ...]:
    """What of ours is measured besides. Where this package has faster float32 products than PyTorch
    (``crossmask.kernels.linear``), its step with PyTorch's as well: algorithm and library are told apart."""
    return (PYTORCHS,) if device == "cpu" and dtype == "fp32" and products.applies() else ()


@dataclass
class Side:
    """One of those that take turns."""

    planned: Planned
    build: Callable[[], Built]
    shares: Side | None = None  # one that was built before, whose weights this one's step moves
    model: Any = None  # for those that share it
    again: bool = False  # a step that was measured before, but for its products: not warmed up and not traced
    step: Step | None = None
    labels: Callable[[], AbstractContextManager[None]] | None = None
    losses: list[dict[str, float]] = field(default_factory=list)  # of the untimed steps
    error: float | None = None  # of those, beside the first side's
    tolerance: float | None = None
    held: int = 0  # bytes between two steps, gradients not counted

    def begin(self, device: torch.device, warm_up: int) -> None:
        before = storages(device)
        self.step, self.labels = self.build()
        self.losses = [self.step() for _ in range(warm_up)]
        bad = [name for losses in self.losses for name, value in losses.items() if not math.isfinite(value)]
        if bad:
            raise ArithmeticError(f"its loss {bad[0]} is not finite")
        drop_gradients(device)
        self.held = sum(count for at, count in storages(device).items() if at not in before)
        if self.shares is not None:
            self.held += self.shares.held


def of_pytorchs_products(side: Side, planned: Planned) -> Side:
    """The same step with PyTorch's float32 products."""

    def build() -> Built:
        assert side.step is not None
        assert side.labels is not None
        step, labels = side.step, side.labels

        def run() -> dict[str, float]:
            with pytorchs_products():
                return step()

        return run, labels

    return Side(planned, build, shares=side, again=True)


def drop_gradients(device: torch.device) -> None:
    """Those of all leaves: what a step allocates is then all its own."""
    for each in tensors(device.type):
        if each.is_leaf and each.grad is not None:
            each.grad = None
    gc.collect()


def storages(device: torch.device) -> dict[int, int]:
    """Bytes of each storage that a tensor on the device has, by address."""
    found = [each.untyped_storage() for each in tensors(device.type)]
    return {each.data_ptr(): each.nbytes() for each in found}


def in_turns(
    sides: Sequence[Side], device: torch.device, rounds: int, tolerances: Sequence[float] = ()
) -> Iterator[Row]:
    """A row for each side.

    Args:
        tolerances: of the untimed steps, one for each: how far losses may be from the first side's, relative to those.
            Without any there is one untimed step and nothing is compared.
    """
    ready: list[Side] = []
    refused: dict[int, Row] = {}
    for side in sides:
        row = begun(side, sides[0], device, tolerances, refused)
        if row is None:
            ready.append(side)
        else:
            refused[id(side)] = row
            yield row
    runs = {str(number): (lambda step=side.step: [step]) for number, side in enumerate(ready)}
    times = take_turns(Clock(device), runs, rounds, math.inf) if runs else {}
    for number, side in enumerate(ready):
        seconds = tuple(seconds for (seconds,) in times[str(number)])
        if side.again:
            yield side.planned.row("measured", seconds=seconds)
            continue
        drop_gradients(device)
        assert side.step is not None
        assert side.labels is not None
        traced = trace(side.step, side.labels(), device, memory=True)
        yield side.planned.row(
            "measured",
            MEMORY,
            seconds=seconds,
            peak_bytes=side.held + traced.allocated,
            parts=traced.whole(),
            error=side.error,
            tolerance=side.tolerance,
        )


def begun(
    side: Side, first: Side, device: torch.device, tolerances: Sequence[float], refused: Mapping[int, Row]
) -> Row | None:
    """Builds a side and holds it to the first one; the row of one that has no time."""
    if side.again and (row := refused.get(id(side.shares))) is not None:
        return side.planned.row(row.status, row.reason)
    try:
        side.begin(device, 0 if side.again else max(1, len(tolerances)))
    except Exception as raised:
        return side.planned.row(*verdict(raised))
    if not tolerances or side is first or side.shares is not None or id(first) in refused:
        return None
    side.error, side.tolerance = worst(side.losses, first.losses, tolerances)
    if side.error <= side.tolerance:
        return None
    told = f"its losses are off by {side.error:.2g}, allowed are {side.tolerance:.2g}"
    return side.planned.row("wrong", told, error=side.error, tolerance=side.tolerance)


def worst(
    found: list[dict[str, float]], wanted: list[dict[str, float]], tolerances: Sequence[float]
) -> tuple[float, float]:
    """Error and tolerance of the step that is furthest beyond what it may; infinite where they are of other losses."""
    if [losses.keys() for losses in found] != [losses.keys() for losses in wanted]:
        return math.inf, tolerances[0]
    steps = zip(found, wanted, tolerances, strict=True)
    errors = [(max(abs(mine[x] - theirs[x]) / abs(theirs[x]) for x in theirs), most) for mine, theirs, most in steps]
    return max(errors, key=lambda each: each[0] / each[1])
