"""What a teacher refuses, what the engine's start leaves behind, and when an update waits; for ranks that have met."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import torch
from student import Body, Student, build, ids_of, optimizer_of
from torch import nn

from crossmask.engine.errors import UserError
from crossmask.engine.teacher import Teacher, shadows
from crossmask.engine.teacher.zero import check_engine


def message_of(action: Callable[[], Any]) -> str:
    try:
        action()
    except (UserError, ValueError) as error:
        return str(error)
    return "accepted"


def changed(edit: Callable[[Body], Any]) -> Callable[[], nn.Module]:
    def build_model() -> nn.Module:
        body = Body()
        edit(body)
        return body

    return build_model


def tie(body: Body) -> None:
    body.norm.weight = body.norm.bias


def untie(body: Body) -> None:
    body.decoder.weight = nn.Parameter(body.decoder.weight.detach().clone())


def tie_buffers(body: Body) -> None:
    body.peak = body.mean


def refusals(engine: Any) -> dict[str, str]:
    """The message of each thing that must not work; ``engine`` of stage 2 in bf16, here and below."""
    teacher = Teacher(engine, Body, 0.9, buffers="average")
    state = teacher.state_dict(everywhere=True)

    def built(build_model: Any = Body, decay: Any = 0.9, **options: Any) -> str:
        return message_of(lambda: Teacher(engine, build_model, decay, **options))

    def other_student(edit: Callable[[Body], Any], restore: Callable[[Body], Any], then: Callable[[], str]) -> str:
        edit(engine.module.model)
        try:
            return then()
        finally:
            restore(engine.module.model)

    def shrink(body: Body) -> None:
        body.mean = torch.ones(1)

    def renew(body: Body) -> None:
        body.mean, body.peak = torch.zeros(13, dtype=torch.bfloat16), torch.zeros(13, dtype=torch.bfloat16)

    def loaded(changes: dict[str, Any], without: str = "") -> str:
        other = {n: t for n, t in (state | changes).items() if n != without}
        return message_of(lambda: teacher.load_state_dict(other))

    found = {
        "not an engine": message_of(lambda: Teacher(nn.Linear(2, 2), Body, 0.9)),
        "a model": built(Body()),
        "no model": built(lambda: None),
        "own model": built(lambda: engine.module.model),
        "decay 1": built(decay=1.0),
        "decay true": built(decay=True),
        "decay text": built(decay="0.9"),
        "buffers": built(buffers="mean"),
        "prefix": built(prefix="student."),
        "unknown parameter": built(changed(lambda body: body.add_module("more", nn.Linear(2, 2)))),
        "unknown buffer": built(changed(lambda body: body.register_buffer("extra", torch.zeros(2)))),
        "other shape": built(changed(lambda body: setattr(body, "frozen", nn.Linear(13, 13)))),
        "tied differently": built(changed(tie)),
        "not tied": built(changed(untie)),
        "other buffer shape": built(changed(lambda body: setattr(body, "mean", torch.zeros(5)))),
        "buffers tied differently": built(changed(tie_buffers)),
        "buffers not tied": other_student(tie_buffers, renew, built),
        "buffer's new shape": other_student(shrink, renew, lambda: message_of(teacher.update)),
        "load missing": loaded({}, without="position"),
        "load missing buffer": loaded({}, without="mean"),
        "load other shape": loaded({"hidden.bias": torch.zeros(3)}),
        "load unknown": loaded({"other": torch.zeros(3)}),
        "schedule": message_of(lambda: Teacher(engine, Body, lambda t: 1.5).update()),
    }
    frozen_by_refusal = not engine.module.model.position.requires_grad or not engine.module.training
    found["student after refusals"] = "changed" if frozen_by_refusal else "as before"
    same = teacher.state_dict(everywhere=True)
    found["teacher after refusals"] = (
        "as before" if all(torch.equal(same[n], t) for n, t in state.items()) else "changed"
    )

    def configured(**attributes: Any) -> str:
        """Of an engine that says this of itself."""
        fake = SimpleNamespace(**{name: getattr(engine, name) for name in ASKED} | attributes)
        return message_of(lambda: check_engine(fake))

    nvme = SimpleNamespace(device="nvme")
    optimizer = engine.optimizer
    found |= {
        "as it is": configured(),
        "no optimizer": configured(optimizer=None),
        "pipeline": configured(pipeline_parallelism=True),
        "tensor parallel": configured(mp_world_size=2),
        "experts": configured(has_moe_layers=True),
        "nvme optimizer": configured(zero_offload_optimizer=lambda: nvme),
        "nvme parameters": configured(zero_offload_param=lambda: nvme),
        "ratio": configured(zero_partial_offload=lambda: 0.5),
        "autocast fp16": configured(torch_autocast_enabled=lambda: True, torch_autocast_dtype=lambda: torch.float16),
        "zenflow": configured(
            optimizer=type("DeepSpeedZeroOptimizer", (), {"zenflow": True, "check_grad_overflow": True})()
        ),
        "int8": configured(zero_quantized_nontrainable_weights=lambda: True),
        "unknown optimizer": configured(optimizer=type("FP16_Optimizer", (), {})()),
    }
    for name, checks in {
        "bf16 unchecked": (False, True, torch.bfloat16),
        "fp32 unchecked": (False, False, torch.float32),
    }.items():
        given = dict(zip(("check_grad_overflow", "compute_grad_norm", "dtype"), checks, strict=True))
        found[name] = configured(optimizer=type("DeepSpeedZeroOptimizer", (), given)())
    low, process_groups = optimizer.single_partition_of_fp32_groups, optimizer.real_dp_process_group
    optimizer.single_partition_of_fp32_groups = [part.detach().bfloat16() for part in low]
    found["low-precision masters"] = built()
    optimizer.single_partition_of_fp32_groups = low
    optimizer.real_dp_process_group = [process_groups[0], None]
    found["several groups"] = built()
    optimizer.real_dp_process_group = process_groups
    return found


ASKED = ("module", "optimizer", "was_step_applied", "pipeline_parallelism", "mp_world_size", "has_moe_layers")
ASKED += ("zero_offload_optimizer", "zero_offload_param", "zero_partial_offload", "torch_autocast_enabled")
ASKED += ("torch_autocast_dtype", "zero_optimization_stage", "bfloat16_enabled", "fp16_enabled")
ASKED += ("zero_quantized_nontrainable_weights",)


def untouched_start() -> dict[str, bool]:
    """At stage 0 in bf16: masters and Adam's state after initialisation, and after the first step."""
    import deepspeed

    rank = torch.distributed.get_rank()
    engine = build(0, "bf16", config={"gradient_clipping": 0.0}, dropout=0.0)
    torch.manual_seed(0)
    plain = Student().bfloat16().float()
    optimizer = optimizer_of(plain)
    masters = [master for group in engine.optimizer.fp32_groups for master in group]
    references = [p for group in optimizer.param_groups for p in group["params"]]
    low = [p for group in engine.optimizer.fp16_groups for p in group]
    found = {
        "masters untouched": all(torch.equal(m, p) for m, p in zip(masters, references, strict=True)),
        "no state": not engine.optimizer.state,
        "step is back": "step" not in vars(engine.basic_optimizer),
    }
    engine.backward(engine(ids_of(0, rank)))
    for reference, own in zip(references, low, strict=True):
        reference.grad = own.grad.float()
    engine.step()
    optimizer.step()
    state = engine.optimizer.state
    found |= {
        "first step": all(torch.equal(m, p) for m, p in zip(masters, references, strict=True)),
        "first state": all(
            torch.equal(value, optimizer.state[reference][name])
            for master, reference in zip(masters, references, strict=True)
            for name, value in state[master].items()
        ),
        "one step": all(int(state[master]["step"]) == 1 for master in masters),
    }
    torch.manual_seed(0)
    student = Student()
    config = {"train_micro_batch_size_per_gpu": 4, "bf16": {"enabled": True}}
    usual = deepspeed.initialize(model=student, optimizer=optimizer_of(student), config=config)[0]
    moved = (m for group in usual.optimizer.fp32_groups for m in group)
    torch.manual_seed(0)
    starts = [p for group in optimizer_of(Student().bfloat16().float()).param_groups for p in group["params"]]
    # fails once DeepSpeed takes no hidden step any more: then initialize_untouched can go
    found["usual start moves masters"] = any(not torch.equal(m, p) for m, p in zip(moved, starts, strict=True))
    return found


def overflows() -> dict[str, list[bool]]:
    """A step whose gradients are not finite on rank 1 between two good ones: what was followed, what stayed."""
    rank, found = torch.distributed.get_rank(), {}
    offload, fp32_sums = {"offload_optimizer": {"device": "cpu"}}, {"data_types": {"grad_accum_dtype": "fp32"}}
    for stage, dtype, zero, config in (
        (0, "fp32", {}, {}),
        (0, "fp32", {}, {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}, "gradient_clipping": 0.0}),
        (0, "bf16", {}, {}),
        (1, "bf16", {}, {}),
        (1, "bf16", {}, fp32_sums),
        (2, "fp32", {}, {}),
        (2, "bf16", offload, {}),
        (3, "fp32", {}, {}),
        (3, "bf16", offload, {}),
    ):
        engine = build(stage, dtype, 1, zero, config=config, dropout=0.0)
        teacher = Teacher(engine, Body, 0.9)
        followed, states = [], [teacher.state_dict(everywhere=True)]
        for step, factor in enumerate((1.0, float("inf") if rank else 1.0, 1.0)):
            engine.backward(engine(ids_of(step, rank), factor))
            engine.step()
            followed.append(teacher.follow())
            states.append(teacher.state_dict(everywhere=True))
        after, skipped, end = (all(torch.equal(a[n], b[n]) for n in a) for a, b in pairwise(states))
        finite = all(bool(torch.isfinite(t).all()) for t in states[-1].values())
        found[f"{stage} {dtype} {[*zero, *config]}"] = [*followed, after, skipped, end, finite, teacher.updates == 2]
    return found


def load_waits() -> bool:
    """Whether loading leaves the buffers alone that a gather of stage 2, in place in fp32, still reads."""
    engine = build(2, "fp32")
    teacher = Teacher(engine, Body, 0.5)
    state = teacher.state_dict(everywhere=True)
    teacher.update()
    shadow: Any = teacher._shadow
    before, work, seen = [tensor.clone() for tensor in shadow.tensors], shadow._work, []

    def wait() -> None:
        seen.append(all(torch.equal(a, b) for a, b in zip(before, shadow.tensors, strict=True)))
        work.wait()

    shadow._work = SimpleNamespace(wait=wait)
    teacher.load_state_dict({name: tensor * 2 for name, tensor in state.items()})
    return seen == [True]


def use_before_waiting_refused(engine: Any) -> bool:
    """Whether autograd refuses weights that were used while their gather was under way."""
    teacher = Teacher(engine, Body, 0.5)
    weight = teacher.model.norm.weight
    teacher.update()
    product = (weight * torch.ones_like(weight, requires_grad=True)).sum()
    teacher.model  # noqa: B018
    try:
        product.backward()
    except RuntimeError as error:
        return "modified by an inplace operation" in str(error)
    return False


def overlap(engine: Any) -> dict[str, list[int]]:
    """How often the gather was waited for: after an update, at the first use, at the second, and so on."""
    waits: list[int] = []
    start = shadows.start_gather

    def counted(*arguments: Any) -> Any:
        work = start(*arguments)
        return SimpleNamespace(wait=lambda: (waits.append(1), work.wait()))

    found: dict[str, list[int]] = {}
    shadows.start_gather = counted
    try:
        teacher = Teacher(engine, Body, 0.5)
        for name, use in {
            "model": lambda: teacher.model,
            "weights": lambda: teacher.weights().__enter__(),
            "state_dict": teacher.state_dict,
            "update": teacher.update,
        }.items():
            teacher.model  # noqa: B018
            waits.clear()
            counts = []
            for action in (teacher.update, use, use):
                action()
                counts.append(len(waits))
            found[name] = counts
    finally:
        shadows.start_gather = start
    return found
