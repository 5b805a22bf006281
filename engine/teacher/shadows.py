"""The moving average itself, kept exactly where ZeRO keeps the masters, and its way into the teacher's weights.

A *shadow* is the fp32 moving average of the student's fp32 *master* weights. Where it lies, so that an update needs no
communication:

==========  ==========================================  ==========================================================
ZeRO stage  shadow on this rank                         teacher's weights, in the student's dtype
==========  ==========================================  ==========================================================
0           every parameter                             whole on every rank; no communication at all
1, 2        this rank's part of each flat parameter     views of one flat buffer per group; one collective per update
            group                                       fills them, started by the update, awaited at the first use
3           this rank's part of each sub-group of       none between uses; one collective when they are needed
            parameters
==========  ==========================================  ==========================================================

The update writes the low-precision weights of its part in the same pass over memory, at stages 1 and 2 right into this
rank's slice of the flat buffer, which is the collective's input in place. In fp32 the shadow itself is that slice: the
average costs no memory besides the weights. Under optimizer offload the shadow lies beside the masters, on the CPU.
Masters are averaged by the flat buffer, as DeepSpeed keeps them, in few long tensors; what lies among them and has no
teacher (temperature, matching head) is averaged unread.

The groups of stages 1 and 2 travel in one coalesced all-gather (NCCL: one group call and launch; gloo: one message)
instead of one plain all-gather of a single buffer: its result would be ordered by rank first, and a parameter that
crosses a rank's border would lie in two places, so that every update would have to copy the weights once more.

Nothing here knows DeepSpeed: ``zero.py`` finds the masters and describes them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from crossmask.kernels import ema_update_

from .gather import gather_flat, start_gather, world_size

Masters = Callable[[], list[Tensor]]  # asked afresh at each update: DeepSpeed may replace its tensors


@dataclass(frozen=True)
class Pair:
    """One parameter of the teacher and the student's parameter it follows."""

    name: str
    student: nn.Parameter
    teacher: nn.Parameter


@dataclass(frozen=True)
class FlatGroup:
    """Stages 1, 2: one parameter group, laid into one buffer of which each rank masters an equal part in rank order."""

    flat: Tensor  # the student's weights, in its dtype
    places: list[tuple[Pair, int]]  # with the offset of the parameter's first element


@dataclass(frozen=True)
class Shard:
    """Stage 3: a parameter cut into equal parts, one for each rank, the last one padded; and where this rank's lies."""

    pair: Pair
    shape: torch.Size  # of the whole parameter
    group: int  # the sub-group of masters; from their number on, the fixed part
    offset: int  # of the part's first element
    length: int  # of one part


class Shadow(ABC):
    """As much of the average as this rank keeps."""

    tensors: list[Tensor]  # fp32, aligned with the masters
    copies: list[Tensor] | None  # the same in the student's dtype, written by the update; None where that is fp32

    def __init__(self, masters: Masters, pairs: Iterable[Pair]) -> None:
        self._masters = masters
        self._written = [pair.teacher for pair in pairs]

    def update(self, decay: float) -> None:
        """One step of the average towards the masters. Starts a collective at stages 1 and 2, none elsewhere."""
        self.wait()
        ema_update_(self.tensors, self._masters(), decay, copies=self.copies)
        self._changed()

    def refresh(self) -> None:
        """Writes the shadow, changed from outside, into the weights; like an update."""
        self.wait()
        if self.copies is not None:
            for copy, tensor in zip(self.copies, self.tensors, strict=True):
                copy.copy_(tensor)
        self._changed()

    def _changed(self) -> None:
        self.publish()
        self._count_version()

    def _count_version(self) -> None:
        """Lets autograd refuse a backward pass through weights that have changed: they are written through aliases,
        which it does not see."""
        torch.autograd.graph.increment_version(self._written)

    @abstractmethod
    def full(self) -> Iterator[tuple[str, Tensor]]:
        """Each parameter by name: whole, fp32. Collective: every rank must run the iterator to its end.

        Stages 1 to 3 hold more than the shadow meanwhile, on each rank's device: the whole of one group in fp32 at
        stages 1 and 2 with 16-bit weights (4 bytes a parameter), of one parameter at stage 3.
        """

    @abstractmethod
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes whole fp32 parameters by name and keeps this rank's part; refresh() is still to be called."""

    def publish(self) -> None:  # noqa: B027 - only stages 1 and 2 have something to do here
        """Starts to make the teacher's weights what the shadow is."""

    def wait(self) -> None:  # noqa: B027
        """Ends what publish() started: from here on the weights may be read. Local, and cheap once done."""

    def gather(self) -> None:  # noqa: B027 - only stage 3 has something to do here
        """Makes the teacher's weights whole for use. Collective at stage 3, nothing elsewhere."""

    def release(self) -> None:  # noqa: B027
        """Frees what :meth:`gather` brought."""


class _Fixed:
    """Parameters that no optimizer moves: copied once, whole on every rank (stages 0 to 2)."""

    def __init__(self, pairs: Sequence[Pair]) -> None:
        self.pairs = list(pairs)
        for pair in self.pairs:
            pair.teacher.data = pair.student.detach().clone()

    def full(self) -> Iterator[tuple[str, Tensor]]:
        for pair in self.pairs:
            yield pair.name, pair.teacher.detach().float()

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        for pair in self.pairs:
            pair.teacher.data.copy_(tensors[pair.name])


class ReplicatedShadow(Shadow):
    """Stage 0: every rank has all masters, and so the whole shadow. In fp32 the shadow is the teacher's weights."""

    def __init__(self, moving: Sequence[Pair], fixed: Sequence[Pair], masters: Masters) -> None:
        """``masters`` are those of ``moving``, in its order."""
        super().__init__(masters, [*moving, *fixed])
        self._moving, self._fixed = list(moving), _Fixed(fixed)
        self.tensors = [master.clone() for master in masters()]
        same = all(pair.student.dtype is torch.float32 for pair in self._moving)
        for pair, tensor in zip(self._moving, self.tensors, strict=True):
            pair.teacher.data = tensor if same else pair.student.detach().clone()
        self.copies = None if same else [pair.teacher.data for pair in self._moving]

    def full(self) -> Iterator[tuple[str, Tensor]]:
        for pair, tensor in zip(self._moving, self.tensors, strict=True):
            yield pair.name, tensor
        yield from self._fixed.full()

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        for pair, tensor in zip(self._moving, self.tensors, strict=True):
            tensor.copy_(tensors[pair.name])
        self._fixed.load(tensors)


class FlatShadow(Shadow):
    """Stages 1 and 2.

    The weights keep DeepSpeed's layout, so that the all-gather works in place; where a rank's part is no multiple of 8
    elements, the slices of the ranks behind it begin at unaligned addresses, which costs the kernel its wide stores.
    """

    def __init__(
        self, groups: Sequence[FlatGroup], fixed: Sequence[Pair], masters: Masters, process_group: ProcessGroup | None
    ) -> None:
        """``masters``: this rank's part of each group's masters, in the groups' order."""
        super().__init__(masters, [*(pair for group in groups for pair, _ in group.places), *fixed])
        self._places = [group.places for group in groups]
        self._fixed, self._process_group = _Fixed(fixed), process_group
        self._work: dist.Work | None = None
        self._rank = dist.get_rank(process_group) if world_size(process_group) > 1 else 0
        self._weights = [torch.zeros_like(group.flat) for group in groups]
        self._parts, self.tensors, copies = [], [], []
        for weights, places, master in zip(self._weights, self._places, masters(), strict=True):
            if master.numel() * world_size(process_group) != weights.numel():
                raise RuntimeError("a rank's masters are not an equal part of their flat group: unknown ZeRO layout")
            for pair, offset in places:
                pair.teacher.data = weights.narrow(0, offset, pair.student.numel()).view(pair.student.shape)
            part = weights.narrow(0, self._rank * master.numel(), master.numel())
            beside = part if master.device == part.device else torch.empty_like(part, device=master.device)
            if part.dtype is torch.float32:
                self.tensors.append(beside.copy_(master))
            else:
                self.tensors.append(master.clone())
                copies.append(beside)
            self._parts.append(part)
        self.copies = copies or None
        self.refresh()

    def publish(self) -> None:
        for part, own in zip(self._parts, self.copies or self.tensors, strict=True):
            if own is not part:  # under offload: from the CPU; blocking, or the next update would overtake the copy
                part.copy_(own)
        self._work = start_gather(self._weights, self._parts, self._process_group)

    def wait(self) -> None:
        if self._work is not None:
            self._work.wait()
            self._work = None
            self._count_version()  # again: a module kept from before may have been used meanwhile

    def full(self) -> Iterator[tuple[str, Tensor]]:
        self.wait()
        for places, shadow, weights in zip(self._places, self.tensors, self._weights, strict=True):
            fp32 = weights.dtype is torch.float32
            whole = weights if fp32 else gather_flat(shadow.to(weights.device), self._process_group)
            for pair, offset in places:
                yield pair.name, whole.narrow(0, offset, pair.teacher.numel()).view(pair.teacher.shape)
        yield from self._fixed.full()

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        self.wait()
        for places, shadow in zip(self._places, self.tensors, strict=True):
            for pair, offset in places:
                _copy_overlap(tensors[pair.name].reshape(-1), offset, shadow, self._rank * shadow.numel())
        self._fixed.load(tensors)


class ShardedShadow(Shadow):
    """Stage 3. Between uses the teacher's parameters are empty, so there is nothing that could go stale.

    Each :meth:`gather` brings all weights afresh, also where no update lay between (accumulated micro-batches), and
    holds the whole teacher until :meth:`release`: 2 bytes a parameter and rank in 16 bits.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        fixed: Sequence[Tensor],
        masters: Masters,
        process_group: ProcessGroup | None,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """``masters``: this rank's part of each sub-group, 1-d. ``fixed``: of each parameter that no optimizer moves.

        ``dtype`` of the student's weights, ``device`` where the teacher's are wanted (the masters' differs under
        offload).
        """
        super().__init__(masters, [shard.pair for shard in shards])
        self._shards, self._process_group, self._device = list(shards), process_group, device
        self.tensors = [master.clone() for master in masters()]
        low = self.tensors if dtype is torch.float32 else [tensor.to(dtype) for tensor in self.tensors]
        self.copies = None if dtype is torch.float32 else low
        self._fixed = [part.detach().reshape(-1).to(dtype, copy=True) for part in fixed]
        self._low = [*low, *self._fixed]
        self.release()

    def _parts(self, flats: Sequence[Tensor]) -> list[Tensor]:
        """Each shard's, of sub-groups and fixed parts."""
        return [flats[shard.group].narrow(0, shard.offset, shard.length) for shard in self._shards]

    def gather(self) -> None:
        ranks = world_size(self._process_group)
        parts = self._parts([flat.to(self._device) for flat in self._low])
        everyone = [part.new_empty(ranks * part.numel()) for part in parts]
        work = start_gather(everyone, parts, self._process_group)
        if work is not None:
            work.wait()
        for shard, whole in zip(self._shards, everyone, strict=True):
            shard.pair.teacher.data = whole[: shard.shape.numel()].view(shard.shape)

    def release(self) -> None:
        for shard in self._shards:
            shard.pair.teacher.data = self._low[shard.group].new_empty(0, device=self._device)

    def full(self) -> Iterator[tuple[str, Tensor]]:
        for shard, part in zip(self._shards, self._parts([*self.tensors, *self._fixed]), strict=True):
            whole = gather_flat(part.to(self._device, torch.float32), self._process_group)
            yield shard.pair.name, whole[: shard.shape.numel()].view(shard.shape)

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        rank = dist.get_rank(self._process_group) if world_size(self._process_group) > 1 else 0
        for shard, part in zip(self._shards, self._parts([*self.tensors, *self._fixed]), strict=True):
            _copy_overlap(tensors[shard.pair.name].reshape(-1), 0, part, rank * shard.length)


def _copy_overlap(source: Tensor, source_start: int, target: Tensor, target_start: int) -> None:
    """Copies where two intervals of one flat space meet; both tensors are 1-d, the starts are their places in it."""
    begin = max(source_start, target_start)
    end = min(source_start + source.numel(), target_start + target.numel())
    if begin < end:
        target[begin - target_start : end - target_start].copy_(source[begin - source_start : end - source_start])
