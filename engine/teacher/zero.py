"""Where the teacher's shadow lives under each ZeRO stage. The only file that knows DeepSpeed's internals.

A *shadow* is the fp32 moving average of the student's fp32 *master* weights. It is kept exactly where ZeRO keeps the
masters, so that an update needs no communication:

=====  ================================================  ====================================================
stage  shadow on this rank                               teacher's weights, in the student's dtype
=====  ================================================  ====================================================
0      every parameter                                   the shadow itself (parameters are fp32)
1, 2   this rank's part of each flat parameter group     views of one flat buffer per group; one all-gather
                                                         of the cast shadow per update
3      this rank's shard of each parameter, one buffer   none between uses; one all-gather of the cast shadow
                                                         when they are needed
=====  ================================================  ====================================================

At stage 3 the teacher is a plain module whose parameters are empty between uses. A teacher partitioned by DeepSpeed
itself goes silently stale for parameters that DeepSpeed keeps gathered; here there is nothing that could.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import RecipeError
from .gather import gather_flat, world_size


@dataclass(frozen=True)
class Pair:
    """One parameter of the teacher and the student's parameter it follows."""

    name: str
    student: nn.Parameter
    teacher: nn.Parameter


class Shadow(ABC):
    """The fp32 moving average of the masters, as much of it as this rank keeps, and its way into the teacher."""

    tensors: list[Tensor]  # fp32, aligned with masters()

    @abstractmethod
    def masters(self) -> list[Tensor]:
        """The student's fp32 master weights that ``tensors`` follow, asked afresh: DeepSpeed may replace them."""

    @abstractmethod
    def publish(self) -> None:
        """Writes the shadow into the teacher's weights. Collective at stages 1 and 2."""

    @abstractmethod
    def full(self) -> Iterator[tuple[str, Tensor]]:
        """Each parameter by name: whole, fp32. Collective: every rank must run the iterator to its end."""

    @abstractmethod
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes whole fp32 parameters by name and keeps this rank's part; does not publish."""

    def gather(self) -> None:  # noqa: B027 - only stage 3 has something to do here
        """Makes the teacher's weights whole for use. Collective at stage 3, nothing elsewhere."""

    def release(self) -> None:  # noqa: B027
        """Frees what :meth:`gather` brought."""


class _Fixed:
    """Parameters that no optimizer moves: copied once, whole on every rank (stages 0 to 2)."""

    def __init__(self, pairs: Sequence[Pair]) -> None:
        self.pairs = list(pairs)
        for pair in self.pairs:
            pair.teacher.data = pair.student.data.clone()

    def full(self) -> Iterator[tuple[str, Tensor]]:
        for pair in self.pairs:
            yield pair.name, pair.teacher.data.float()

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        for pair in self.pairs:
            pair.teacher.data.copy_(tensors[pair.name])


class ReplicatedShadow(Shadow):
    """Stage 0, fp32: masters are the student's parameters, and the shadow is the teacher's."""

    def __init__(self, pairs: Sequence[Pair]) -> None:
        self._moving = [pair for pair in pairs if pair.student.requires_grad]
        self._fixed = _Fixed([pair for pair in pairs if not pair.student.requires_grad])
        for pair in self._moving:
            if pair.student.dtype is not torch.float32:
                raise RecipeError(
                    f"ZeRO stage 0 with {_short(pair.student.dtype)} parameters keeps no exact fp32 masters for the "
                    "teacher: set zero_optimization.stage to 1 or more, or training.precision to fp32"
                )
            pair.teacher.data = pair.student.detach().clone()
        self.tensors = [pair.teacher.data for pair in self._moving]

    def masters(self) -> list[Tensor]:
        return [pair.student.detach() for pair in self._moving]

    def publish(self) -> None:
        pass  # the shadow is the teacher

    def full(self) -> Iterator[tuple[str, Tensor]]:
        for pair, tensor in zip(self._moving, self.tensors, strict=True):
            yield pair.name, tensor
        yield from self._fixed.full()

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        for pair, tensor in zip(self._moving, self.tensors, strict=True):
            tensor.copy_(tensors[pair.name])
        self._fixed.load(tensors)


class FlatShadow(Shadow):
    """Stages 1 and 2: ZeRO lays a group's parameters into one flat buffer and gives each rank an equal part of it.

    A parameter's place is read from the addresses, which hold whatever order and padding DeepSpeed chose. Parameters
    of a group that have no teacher (temperature, matching head) share the buffer and are averaged unread.
    """

    def __init__(self, optimizer: Any, pairs: Sequence[Pair]) -> None:
        self._optimizer = optimizer
        self._flat, groups, self._masters_of = _flat_layout(optimizer)
        self._process_groups = list(optimizer.real_dp_process_group)
        by_student = {id(pair.student): pair for pair in pairs}
        self._places: list[list[tuple[Pair, int]]] = []  # per group: (pair, offset of its first element)
        self._weights: list[Tensor] = []  # per group: the teacher's flat weights, in the student's dtype
        placed: set[int] = set()
        for flat, parameters in zip(self._flat, groups, strict=True):
            weights = torch.zeros_like(flat)
            places = []
            for parameter in parameters:
                offset, remainder = divmod(parameter.data_ptr() - flat.data_ptr(), flat.element_size())
                if remainder or not 0 <= offset <= flat.numel() - parameter.numel():
                    raise RuntimeError("a parameter does not lie in its flat ZeRO group: unknown DeepSpeed layout")
                if pair := by_student.get(id(parameter)):
                    pair.teacher.data = weights.narrow(0, offset, parameter.numel()).view(parameter.shape)
                    places.append((pair, offset))
                    placed.add(id(parameter))
            self._weights.append(weights)
            self._places.append(places)
        self._fixed = _Fixed([pair for pair in pairs if id(pair.student) not in placed])
        self.tensors = [master.clone() for master in self.masters()]

    def masters(self) -> list[Tensor]:
        return [master.detach() for master in self._masters_of()]

    def publish(self) -> None:
        for weights, shadow, group in zip(self._weights, self.tensors, self._process_groups, strict=True):
            gather_flat(shadow.to(weights.device, weights.dtype), group, out=weights)

    def full(self) -> Iterator[tuple[str, Tensor]]:
        for places, shadow, weights, group in zip(
            self._places, self.tensors, self._weights, self._process_groups, strict=True
        ):
            whole = gather_flat(shadow.to(weights.device), group)
            for pair, offset in places:
                yield pair.name, whole.narrow(0, offset, pair.teacher.numel()).view(pair.teacher.shape)
        yield from self._fixed.full()

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        for places, shadow, group in zip(self._places, self.tensors, self._process_groups, strict=True):
            start = shadow.numel() * (torch.distributed.get_rank(group) if world_size(group) > 1 else 0)
            for pair, offset in places:
                _copy_overlap(tensors[pair.name].reshape(-1), offset, shadow, start)
        self._fixed.load(tensors)


class ShardedShadow(Shadow):
    """Stage 3: every parameter is cut into W equal shards, the last one padded."""

    def __init__(self, pairs: Sequence[Pair]) -> None:
        self._pairs = list(pairs)
        first = self._pairs[0].student
        self._dtype: torch.dtype = first.ds_tensor.dtype  # type: ignore[attr-defined]
        self._group = first.ds_process_group  # type: ignore[attr-defined]
        self._shapes = [tuple(pair.student.ds_shape) for pair in self._pairs]  # type: ignore[attr-defined]
        self._moving = [pair for pair in self._pairs if pair.student.requires_grad]
        shards = [_local_master(pair.student) for pair in self._pairs]
        self._lengths = [shard.numel() for shard in shards]
        self._buffer = torch.cat([shard.reshape(-1) for shard in shards])  # fp32
        self._views = list(self._buffer.split(self._lengths))
        self.tensors = [view for view, pair in zip(self._views, self._pairs, strict=True) if pair.student.requires_grad]
        self.release()

    def masters(self) -> list[Tensor]:
        return [_local_master(pair.student) for pair in self._moving]

    def publish(self) -> None:
        pass  # the weights are made from the shadow at each use

    def _whole(self, buffer: Tensor) -> Iterator[Tensor]:
        ranks = world_size(self._group)
        everyone = gather_flat(buffer, self._group).view(ranks, -1)  # (W, S)
        for part, shape in zip(everyone.split(self._lengths, dim=1), self._shapes, strict=True):
            yield part.reshape(-1)[: torch.Size(shape).numel()].view(shape)

    def gather(self) -> None:
        for pair, weight in zip(self._pairs, self._whole(self._buffer.to(self._dtype)), strict=True):
            pair.teacher.data = weight

    def release(self) -> None:
        for pair in self._pairs:
            pair.teacher.data = self._buffer.new_empty(0, dtype=self._dtype)

    def full(self) -> Iterator[tuple[str, Tensor]]:
        yield from zip((pair.name for pair in self._pairs), self._whole(self._buffer), strict=True)

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        rank = torch.distributed.get_rank(self._group) if world_size(self._group) > 1 else 0
        for pair, view in zip(self._pairs, self._views, strict=True):
            view.zero_()
            _copy_overlap(tensors[pair.name].reshape(-1), 0, view, rank * view.numel())


def shadow_of(engine: Any, pairs: Sequence[Pair]) -> Shadow:
    """The shadow that fits the engine's ZeRO stage, holding the masters as they are now.

    RecipeError where the configuration keeps no fp32 masters within reach: low-precision masters, NVMe offload,
    stage 0 with bf16 or fp16 parameters.
    """
    stage = int(engine.zero_optimization_stage())
    if stage == 0:
        return ReplicatedShadow(pairs)
    offload = engine.zero_offload_optimizer()
    if offload is not None and str(getattr(offload.device, "value", offload.device)) == "nvme":
        raise RecipeError("the teacher cannot follow masters on NVMe: set offload_optimizer.device to cpu or none")
    shadow: Shadow = ShardedShadow(pairs) if stage == 3 else FlatShadow(engine.optimizer, pairs)
    if any(master.dtype is not torch.float32 for master in shadow.masters()):
        raise RecipeError("the teacher needs fp32 masters: switch DeepSpeed's low-precision master weights off")
    return shadow


def parameter_dtype(engine: Any) -> torch.dtype:
    """The dtype the student computes in (its parameters' dtype)."""
    for parameter in engine.module.parameters():
        tensor: Tensor = getattr(parameter, "ds_tensor", parameter)
        if tensor.is_floating_point():
            return tensor.dtype
    raise ValueError("the student has no floating-point parameter")


def autocast(engine: Any) -> torch.autocast | None:
    """A fresh autocast context like the one DeepSpeed's ``torch_autocast`` puts around the student, or None."""
    if not engine.torch_autocast_enabled():
        return None
    return torch.autocast(engine.device.type, dtype=engine.torch_autocast_dtype())


def discard_gradients(engine: Any) -> None:
    """Forgets the micro-batches accumulated since the last optimizer step, as if they had never been seen.

    Safe between micro-batches, before ``engine.step`` of the last one, at stages 0 to 3 without optimizer offload
    (NotImplementedError with it). Local: call it on every rank. Follows what DeepSpeed itself does on an overflow.
    """
    pending = engine.micro_steps % engine.gradient_accumulation_steps()
    engine.micro_steps -= pending
    optimizer, stage = engine.optimizer, int(engine.zero_optimization_stage())
    if pending and (getattr(optimizer, "cpu_offload", False) or getattr(optimizer, "offload_optimizer", False)):
        raise NotImplementedError("accumulated gradients cannot be discarded under optimizer offload")
    if stage == 0:
        engine.zero_grad()
        return
    optimizer.zero_grad(set_to_none=True)
    if hasattr(optimizer, "averaged_gradients"):
        if hasattr(optimizer, "_release_preflattened_grad_buffers"):
            optimizer._release_preflattened_grad_buffers()
        optimizer.averaged_gradients = {}
    if hasattr(optimizer, "all_grad_tensors"):
        optimizer.all_grad_tensors = {}
    if stage < 3 and hasattr(optimizer, "micro_step_id"):  # stage 3 resets its own in zero_grad
        optimizer.micro_step_id = -1


@contextmanager
def student_files_written_by(engine: Any, write: Callable[[Any, str], None]) -> Iterator[None]:
    """Inside, ``engine.save_checkpoint`` hands every (object, path) to ``write`` and copies no recovery scripts.

    A rank whose disk is full must still reach DeepSpeed's barriers: ``write`` can note the error instead of raising.
    """
    from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointEngine

    class Writer(CheckpointEngine):
        def create(self, info: Any) -> None:
            pass

        def save(self, state_dict: Any, path: str) -> None:
            write(state_dict, path)

        def load(self, path: str, map_location: Any = None) -> Any:
            raise NotImplementedError

        def commit(self, info: Any) -> bool:
            return True

    usual = engine.checkpoint_engine
    engine.checkpoint_engine = Writer()
    engine._copy_recovery_script = lambda save_path: None
    try:
        yield
    finally:
        engine.checkpoint_engine = usual
        del engine._copy_recovery_script


def _flat_layout(optimizer: Any) -> tuple[list[Tensor], list[list[nn.Parameter]], Callable[[], list[Tensor]]]:
    """Flat groups, the parameters in them, and how to ask for this rank's masters."""
    if hasattr(optimizer, "single_partition_of_fp32_groups"):
        return (
            list(optimizer.bit16_groups_flat),
            list(optimizer.bit16_groups),
            lambda: list(optimizer.single_partition_of_fp32_groups),
        )
    if hasattr(optimizer, "fp32_groups_flat_partition"):  # stage 1, bf16, gradients accumulated in fp32
        return (
            list(optimizer.bf16_groups_flat),
            list(optimizer.bf16_groups),
            lambda: list(optimizer.fp32_groups_flat_partition),
        )
    raise RecipeError(f"the teacher does not know DeepSpeed's {type(optimizer).__name__}: use ZeRO stage 1, 2 or 3")


def _local_master(parameter: nn.Parameter) -> Tensor:
    """This rank's fp32 shard of a stage-3 parameter; of one that is frozen, its weights cast up."""
    if not parameter.requires_grad:
        frozen: Tensor = parameter.ds_tensor  # type: ignore[attr-defined]
        return frozen.detach().float()
    from deepspeed.utils import safe_get_local_fp32_param

    shard: Tensor = safe_get_local_fp32_param(parameter)
    return shard.detach()


def _copy_overlap(source: Tensor, source_start: int, target: Tensor, target_start: int) -> None:
    """Copies where two intervals of one flat space meet; both tensors are 1-d, the starts are their places in it."""
    begin = max(source_start, target_start)
    end = min(source_start + source.numel(), target_start + target.numel())
    if begin < end:
        target[begin - target_start : end - target_start].copy_(source[begin - source_start : end - source_start])


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
