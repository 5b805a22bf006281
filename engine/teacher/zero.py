"""What the teacher and its student must know of DeepSpeed's engine and optimizers while a run goes on.

Read from and tested with DeepSpeed 0.19; a step to another minor version means to read its optimizers again, and its
file formats, which ``training/student_files.py`` and ``training/whole_student.py`` know.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from itertools import chain
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import RecipeError
from .bf16_step import spare_passes
from .shadows import FlatGroup, FlatShadow, Masters, Pair, ReplicatedShadow, Shadow, Shard, ShardedShadow

TESTED = "0.19"


def initialize_untouched(student: nn.Module, optimizer: torch.optim.Optimizer, config: Mapping[str, Any]) -> Any:
    """The engine of ``deepspeed.initialize``, with masters and optimizer state as if it had done nothing to them.

    At stage 0 in bf16 and fp16 DeepSpeed allocates the optimizer's state by a step on zero gradients, in which weight
    decay moves the fp32 masters and Adam counts its first step. Here that step does nothing; the state comes into being
    in the first real one.

    At stage 0 in fp32 the optimizer is the caller's own, and DeepSpeed would apply gradients that are not finite. Here
    ``engine.step()`` leaves such a step out and ``engine.was_step_applied()`` says so, as at every other stage.

    At stage 0 a single rank's gradients are not copied to and fro to be averaged, and a bf16 step reads them twice, not
    six times.
    """
    import deepspeed

    own = {key: value for key, value in vars(optimizer).items() if key == "step"}  # a learning rate scheduler's
    vars(optimizer)["step"] = lambda *arguments, **options: None  # hides the method
    try:
        engine = deepspeed.initialize(model=student, optimizer=optimizer, config=dict(config))[0]
    finally:
        del vars(optimizer)["step"]
        vars(optimizer).update(own)
    if engine.optimizer is optimizer:
        _leave_out_overflows(optimizer)
    if type(engine.optimizer).__name__ == "FP16_UnfusedOptimizer" and engine.bfloat16_enabled():
        spare_passes(engine.optimizer)
    if engine.seq_dp_world_size == 1 and engine.zero_optimization_stage() == 0:
        _keep_gradients(engine)
    return engine


def _keep_gradients(engine: Any) -> None:
    """Leaves the gradients of a single rank where they are.

    At stage 0 DeepSpeed joins all of them into new memory, averages that over one rank and copies it back: three passes
    over the gradients and as much memory again, for nothing. What it does besides is kept: a parameter that no loss
    reached gets a gradient of zeros, as on several ranks.
    """
    engine.buffered_allreduce_fallback = lambda *arguments, **options: engine._get_gradients_for_reduction()


def _leave_out_overflows(optimizer: Any) -> None:
    """Gives the optimizer the ``overflow`` that the engine asks DeepSpeed's own for after each step.

    The gradients are already the same on every rank, so nothing travels.
    """
    step = optimizer.step

    def checked(self: Any, *arguments: Any, **options: Any) -> Any:
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        self.overflow = not bool(torch.isfinite(torch.nn.utils.get_total_norm(gradients)))
        return None if self.overflow else step(*arguments, **options)

    optimizer.step = MethodType(checked, optimizer)  # a method: schedulers wrap nothing else


@contextmanager
def outside_zero_init() -> Iterator[None]:
    """Inside, modules are built whole and plain, even where the caller stands inside ``deepspeed.zero.Init``."""
    from deepspeed.runtime.zero.partition_parameters import restore_init_context, shutdown_init_context

    shutdown_init_context()
    try:
        yield
    finally:
        restore_init_context()


def is_partitioned(parameter: nn.Parameter) -> bool:
    """Whether ZeRO stage 3 has cut the parameter up."""
    return hasattr(parameter, "ds_id")


def whole_shape(parameter: nn.Parameter) -> torch.Size:
    """The parameter's shape, also where ZeRO has cut it up."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


def check_engine(engine: Any) -> None:
    """Refuses, in one line, an engine whose masters the teacher cannot follow exactly.

    Raises:
        ValueError: not an initialised DeepSpeed engine, or one without an optimizer.
        RecipeError: a configuration that keeps the masters out of reach, or that hides skipped steps.
    """
    _warn_of_untested_version()
    if not hasattr(engine, "was_step_applied") or not isinstance(getattr(engine, "module", None), nn.Module):
        raise ValueError(
            f"the teacher follows a DeepSpeed engine, not a {type(engine).__name__}: give it deepspeed.initialize's"
        )
    optimizer, kind = engine.optimizer, type(engine.optimizer).__name__
    if optimizer is None or kind == "DeepSpeedZeRoOffload":
        raise ValueError(
            "the student's engine has no optimizer, so nothing would move the teacher: initialise with one"
        )
    for present, what, remedy in (
        (engine.pipeline_parallelism, "a pipeline's parameters, which lie on several ranks", "leave the pipeline out"),
        (engine.mp_world_size > 1, "parameters under tensor parallelism", "use data parallelism alone"),
        (engine.has_moe_layers, "experts, whose process groups differ", "use data parallelism alone"),
        (_device(engine.zero_offload_optimizer()) == "nvme", "masters on NVMe", "set offload_optimizer.device to cpu"),
        (_device(engine.zero_offload_param()) == "nvme", "parameters on NVMe", "set offload_param.device to cpu"),
        (engine.zero_partial_offload() != 1.0, "masters on two devices", "set offload_optimizer.ratio to 1.0"),
        (
            engine.torch_autocast_enabled() and engine.torch_autocast_dtype() is torch.float16,
            "torch_autocast in float16, whose gradient scaler leaves steps out unseen",
            "set torch_autocast.dtype to bfloat16",
        ),
        (bool(getattr(optimizer, "zenflow", False)), "ZenFlow, which moves masters later", "leave zenflow out"),
        (
            kind == "DeepSpeedZeroOptimizer" and not _checks_gradients(optimizer),
            "steps whose gradients nothing checks",
            "leave bf16.check_grad_overflow and zero_optimization.compute_grad_norm true",
        ),
        (
            engine.zero_quantized_nontrainable_weights(),
            "frozen weights that are kept as int8 codes",
            "leave zero_quantized_nontrainable_weights out",
        ),
    ):
        if present:
            raise RecipeError(f"the teacher cannot follow {what}: {remedy}")
    lowered = engine.zero_optimization_stage() > 0 or engine.bfloat16_enabled() or engine.fp16_enabled()
    known = ("FP16_UnfusedOptimizer", "DeepSpeedZeroOptimizer", "BF16_Optimizer", "DeepSpeedZeroOptimizer_Stage3")
    if lowered and kind not in known:
        raise RecipeError(
            f"the teacher does not know where DeepSpeed's {kind} keeps its fp32 masters: "
            "use torch.optim.AdamW, or another zero_optimization.stage"
        )


def shadow_of(engine: Any, pairs: Sequence[Pair]) -> Shadow:
    """The shadow that fits the engine's ZeRO stage, holding the masters as they are now; see :func:`check_engine`."""
    optimizer, kind = engine.optimizer, type(engine.optimizer).__name__
    try:
        if kind == "DeepSpeedZeroOptimizer_Stage3":
            return _sharded(optimizer, pairs, engine.device)
        if kind in ("DeepSpeedZeroOptimizer", "BF16_Optimizer"):
            return _flat(optimizer, pairs)
        return _replicated(optimizer, pairs)
    except (AttributeError, KeyError) as error:
        raise RuntimeError(f"{kind} has no {error}: the teacher reads the insides of DeepSpeed {TESTED}") from error


def _replicated(optimizer: Any, pairs: Sequence[Pair]) -> Shadow:
    """Stage 0. In fp32 a parameter is its own master; in bf16 and fp16 every rank has an fp32 copy of each."""

    def masters() -> dict[int, Tensor]:
        if not hasattr(optimizer, "fp32_groups"):
            return {id(own): own.detach() for group in optimizer.param_groups for own in group["params"]}
        groups = zip(chain(*optimizer.fp16_groups), chain(*optimizer.fp32_groups), strict=True)
        return {id(own): master.detach() for own, master in groups}

    known = masters()
    moving = [pair for pair in pairs if id(pair.student) in known]
    fixed = [pair for pair in pairs if id(pair.student) not in known]

    def ordered() -> list[Tensor]:
        now = masters()
        return [now[id(pair.student)] for pair in moving]

    return ReplicatedShadow(moving, fixed, _fp32(ordered))


def _flat(optimizer: Any, pairs: Sequence[Pair]) -> Shadow:
    """Stages 1 and 2, and stage 1 with bf16 parameters and fp32 gradient accumulation.

    A parameter's place is read from the addresses, which hold whatever order and padding DeepSpeed chose.
    """
    if type(optimizer).__name__ == "BF16_Optimizer":
        flats, groups, own = optimizer.bf16_groups_flat, optimizer.bf16_groups, "fp32_groups_flat_partition"
    else:
        flats, groups, own = optimizer.bit16_groups_flat, optimizer.bit16_groups, "single_partition_of_fp32_groups"

    def masters() -> list[Tensor]:
        return [master.detach() for master in getattr(optimizer, own)]

    by_student = {id(pair.student): pair for pair in pairs}
    described, placed = [], set()
    for flat, parameters in zip(flats, groups, strict=True):
        places = []
        for parameter in parameters:
            offset, remainder = divmod(parameter.data_ptr() - flat.data_ptr(), flat.element_size())
            if remainder or not 0 <= offset <= flat.numel() - parameter.numel():
                raise RuntimeError("a parameter does not lie in its flat ZeRO group: unknown DeepSpeed layout")
            if pair := by_student.get(id(parameter)):
                places.append((pair, offset))
                placed.add(id(parameter))
        described.append(FlatGroup(flat, places))
    fixed = [pair for pair in pairs if id(pair.student) not in placed]
    return FlatShadow(described, fixed, _fp32(masters), _only_group(optimizer.real_dp_process_group))


def _sharded(optimizer: Any, pairs: Sequence[Pair], device: torch.device) -> Shadow:
    """Stage 3: masters lie flat by sub-group, a parameter's part at a known place of its sub-group.

    hpZ keeps a second copy of the parameters within a node, which the masters and their process group do not know of.
    """

    def part_of(pair: Pair) -> Tensor:
        part: Tensor = pair.student.ds_tensor  # type: ignore[attr-defined]
        return part

    def masters() -> list[Tensor]:
        return [master.detach() for master in optimizer.fp32_partitioned_groups_flat]

    trained = {id(parameter) for group in optimizer.fp16_groups for parameter in group}
    shards: list[Shard] = []
    fixed: list[Tensor] = []
    for pair in pairs:
        if id(pair.student) in trained:
            group, offset, _ = optimizer.grad_position[optimizer.get_param_id(pair.student)]
        else:  # numbered behind the sub-groups
            group, offset = len(optimizer.fp16_groups) + len(fixed), 0
            fixed.append(part_of(pair))
        shards.append(Shard(pair, whole_shape(pair.student), group, offset, part_of(pair).numel()))
    process_group = _only_group([pair.student.ds_process_group for pair in pairs])  # type: ignore[attr-defined]
    return ShardedShadow(shards, fixed, _fp32(masters), process_group, part_of(pairs[0]).dtype, device)


def autocast(engine: Any) -> torch.autocast | None:
    """A fresh autocast context like the one DeepSpeed's ``torch_autocast`` puts around the student, or None."""
    if not engine.torch_autocast_enabled():
        return None
    return torch.autocast(engine.device.type, dtype=engine.torch_autocast_dtype())


def loss_scale_can_fall(engine: Any) -> bool:
    """Whether fp16's loss scale is above its minimum: a step left out then tells nothing of the loss or the data."""
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    if scaler is not None:
        return bool(scaler.dynamic and scaler.cur_scale > scaler.min_scale)
    scaler = getattr(engine.optimizer, "loss_scale_config", None)  # stage 0
    return bool(scaler and scaler.dynamic_loss_scale and scaler.cur_scale > scaler.min_loss_scale)


def discard_gradients(engine: Any) -> None:
    """Forgets the micro-batches accumulated since the last optimizer step, as if they had never been seen.

    Safe between micro-batches, before the ``backward`` of the last one, at stages 0 to 3 with and without optimizer
    offload. Local: call it on every rank. Follows what DeepSpeed itself does on an overflow.
    """
    engine.micro_steps -= engine.micro_steps % engine.gradient_accumulation_steps()
    optimizer, kind = engine.optimizer, type(engine.optimizer).__name__
    if kind not in ("DeepSpeedZeroOptimizer", "BF16_Optimizer", "DeepSpeedZeroOptimizer_Stage3"):
        engine.zero_grad()
        return
    optimizer.zero_grad(set_to_none=True)  # at stage 3 this makes the next micro-batch the first: its sums start anew
    if kind == "DeepSpeedZeroOptimizer":
        optimizer.micro_step_id = -1  # likewise
        optimizer._wait_for_offload_copies()
        optimizer._release_preflattened_grad_buffers()
        for sums in (optimizer.averaged_gradients, optimizer.all_grad_tensors):
            for group in sums:
                sums[group] = None
    if getattr(optimizer, "cpu_offload", False) or getattr(optimizer, "offload_optimizer", False):
        optimizer.reset_cpu_buffers()  # norms, and whether anything overflowed
        for name in ("_offload_accumulated_param_ids", "_offload_boundary_param_ids"):
            getattr(optimizer, name, set()).clear()


def _checks_gradients(optimizer: Any) -> bool:
    """Stages 1 and 2: whether a step on gradients that are not finite is left out, by looking at them or their norm."""
    return bool(
        optimizer.check_grad_overflow or (optimizer.compute_grad_norm and optimizer.dtype is not torch.bfloat16)
    )


def _fp32(masters: Masters) -> Masters:
    if any(master.dtype is not torch.float32 for master in masters()):
        raise RecipeError("the teacher needs fp32 masters: leave DeepSpeed's *_master_weights_and_grads out")
    return masters


def _only_group(process_groups: Sequence[Any]) -> Any:
    if any(group is not process_groups[0] for group in process_groups):
        raise RecipeError("the teacher cannot follow parameters of several process groups: use data parallelism alone")
    return process_groups[0]


def _device(offload: Any) -> str:
    """ "none", "cpu" or "nvme"."""
    device = getattr(offload, "device", "none")
    return str(getattr(device, "value", device))


@cache
def _warn_of_untested_version() -> None:
    import deepspeed

    if deepspeed.__version__.split(".")[:2] != TESTED.split("."):
        warnings.warn(
            f"the teacher reads DeepSpeed's insides; it was proved exact with {TESTED}, not with "
            f"{deepspeed.__version__}: install deepspeed=={TESTED}.*",
            stacklevel=2,
        )
