"""The teacher's buffers: what is no parameter and still state, such as running means."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from crossmask.kernels import ema_update_

from .pairing import BufferPair


class Buffers:
    """Copied from the student at each update, or averaged like parameters: floating ones, that is, in fp32.

    Nothing travels: each rank's teacher follows the buffers of its own rank's student, as DeepSpeed leaves them. Where
    they differ between ranks (running means of local batches), rank 0's are what a checkpoint keeps and what every rank
    has after loading it. DeepSpeed treats the student's the same way.

    A checkpoint holds the persistent ones alone. The average of another begins anew from the student's value when a
    run is resumed, which is then not bit by bit the run that was never interrupted: make it persistent if that matters.
    """

    def __init__(self, pairs: Sequence[BufferPair], average: bool) -> None:
        self._pairs = list(pairs)
        for pair in self._pairs:  # in the student's dtype and on its device, which are not those of parameters
            pair.teacher.tensor.data = pair.student.tensor.detach().clone(memory_format=torch.contiguous_format)
        self._averages = {
            pair.name: pair.teacher.tensor.detach().float().clone()
            for pair in self._pairs
            if average and pair.teacher.tensor.is_floating_point()
        }

    def update(self, decay: float) -> None:
        """One step towards the student's. ValueError, before anything is changed, where the shape of one is another."""
        now = {pair.name: _followed(pair) for pair in self._pairs}
        averaged = [pair for pair in self._pairs if pair.name in self._averages]
        if averaged:
            students = [now[pair.name].float().contiguous() for pair in averaged]
            ema_update_([self._averages[pair.name] for pair in averaged], students, decay)
        for pair in self._pairs:
            pair.teacher.tensor.copy_(self._averages.get(pair.name, now[pair.name]))

    def shapes(self) -> dict[str, torch.Size]:
        """Of the persistent ones, by name."""
        return {pair.name: pair.teacher.tensor.shape for pair in self._persistent()}

    def state(self) -> Iterator[tuple[str, Tensor]]:
        """Persistent ones by name: averaged ones in fp32, others in their own dtype."""
        for pair in self._persistent():
            yield pair.name, self._averages.get(pair.name, pair.teacher.tensor)

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Takes the persistent ones back; the others become the student's of now."""
        for pair in self._pairs:
            value = state[pair.name] if pair.teacher.persistent else _followed(pair)
            if pair.name in self._averages:
                self._averages[pair.name].copy_(value)
            pair.teacher.tensor.copy_(value)

    def _persistent(self) -> list[BufferPair]:
        return [pair for pair in self._pairs if pair.teacher.persistent]


def _followed(pair: BufferPair) -> Tensor:
    """The student's buffer; copying it would silently broadcast another shape."""
    tensor = pair.student.tensor.detach()
    own, shape = pair.teacher.tensor.shape, tensor.shape
    if shape != own:
        raise ValueError(f"the student's buffer {pair.name} is now {tuple(shape)}, the teacher's is {tuple(own)}")
    return tensor
