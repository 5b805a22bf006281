"""Follows a student under many configurations in one process and compares bit by bit; writes what it saw as JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from itertools import chain
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import ranks
import teacher_wrong
import torch
from student import Body, Student, build, ids_of, optimizer_of
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from crossmask.engine.teacher import Teacher, all_gather_with_grad, gather_features, named_schedule

STEPS, DECAY, LR = 20, 0.9, 1e-3


class Collectives(TorchDispatchMode):
    """The names of the collectives that are called inside."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, op: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        if op.namespace == "c10d":
            self.seen.append(op.name().partition("::")[2])
        return op(*arguments, **(options or {}))


def plain_ema(teacher: Tensor, student: Tensor, decay: float) -> Tensor:
    """The formula in plain operations, each rounded to float32 by itself."""
    w, m = (torch.tensor(x, dtype=torch.float32) for x in (1.0 - decay, decay))
    if w == 0 or m == 0:
        return teacher.clone() if w == 0 else student.float()
    difference = student.float() - teacher
    return teacher + w * difference if w < 0.5 else student.float() - m * difference


def whole_masters(engine: Any, round_robin: bool) -> dict[str, Tensor]:
    """The student's fp32 masters by name, gathered by DeepSpeed itself, wherever it can."""
    from deepspeed.utils import safe_get_full_fp32_param

    found = {}
    replicated = getattr(engine.optimizer, "fp32_groups", None)  # stage 0 in bf16
    if replicated:
        masters = zip(chain(*engine.optimizer.fp16_groups), chain(*replicated), strict=True)
        found = {id(own): master.detach().clone() for own, master in masters}
        return {name: found[id(p)] for name, p in engine.module.named_parameters() if p.requires_grad}
    for name, parameter in engine.module.named_parameters():
        if parameter.requires_grad:
            # DeepSpeed 0.19's own function mixes parameters up under round_robin_gradients; in fp32 it is not needed
            master = None if round_robin else safe_get_full_fp32_param(parameter)
            found[name] = (parameter.detach() if master is None else master).float().clone()
    return found


def whole_batch(step: int, accumulation: int) -> Tensor:
    """The ids of all ranks and micro-batches of one optimizer step."""
    size = torch.distributed.get_world_size()
    return torch.cat([ids_of(step * accumulation + m, rank) for m in range(accumulation) for rank in range(size)])


def plain_run(accumulation: int, schedule: Any) -> dict[str, Tensor]:
    """The teacher's parameters after the same training in one process: no DeepSpeed, no Teacher, no op of ours."""
    torch.manual_seed(0)
    student = Student()
    student.model.dropout.p = 0.0
    optimizer = optimizer_of(student, LR)
    teacher = {name: p.detach().clone() for name, p in student.model.named_parameters()}
    for step in range(STEPS):
        optimizer.zero_grad()
        student(whole_batch(step, accumulation)).backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        for name, p in student.model.named_parameters():
            teacher[name] = plain_ema(teacher[name], p.detach(), schedule(step))
    return teacher


@contextmanager
def inside_zero_init(config: dict[str, Any]) -> Iterator[None]:
    import deepspeed

    with deepspeed.zero.Init(config_dict_or_path=config):
        yield


def follow(case: dict[str, Any]) -> dict[str, Any]:
    """``case``: stage, dtype, and where they differ from the usual accumulation, schedule, buffers, zero, config."""
    stage, dtype, accumulation = case["stage"], case["dtype"], case.get("accumulation", 1)
    schedule = named_schedule(case.get("schedule", "constant"), DECAY, STEPS)
    average = case.get("buffers", "copy") == "average"
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    init = {
        "train_micro_batch_size_per_gpu": 4,
        "zero_optimization": {"stage": 3},
        "bf16": {"enabled": dtype == "bf16"},
    }
    with inside_zero_init(init) if case.get("inside_init") else nullcontext():
        options = {"config": case.get("config"), "dropout": 0.0, "lr": LR}
        engine = build(stage, dtype, accumulation, case.get("zero"), **options)
        before = torch.get_rng_state()
        teacher = Teacher(engine, Body, schedule, buffers=case.get("buffers", "copy"))
        rng_untouched = torch.equal(before, torch.get_rng_state())
    robin = bool(case.get("zero", {}).get("round_robin_gradients"))
    body = engine.module.model
    expected = {n.removeprefix("model."): m for n, m in whole_masters(engine, robin).items() if n.startswith("model.")}
    buffers = {name: body.get_buffer(name).clone() for name in ("calls", "mean", "peak")}
    first = teacher.state_dict(everywhere=True)
    finite, buffers_follow, collectives, updates_seen = True, True, [], 0
    for micro in range(STEPS * accumulation):
        ids = ids_of(micro, rank)
        with teacher.weights() as model:
            finite &= bool(torch.isfinite(model.encode(ids)).all())
        engine.backward(engine(ids))
        engine.step()
        with Collectives() as counted:
            applied = teacher.follow()
            again = teacher.follow()  # the same step is followed once
        if applied:
            collectives.append(counted.seen)
            masters = whole_masters(engine, robin)
            decay = schedule(updates_seen)
            expected = {n: plain_ema(e, masters["model." + n], decay) for n, e in expected.items()}
            updates_seen += 1
            for name, own in buffers.items():
                now = body.get_buffer(name)
                buffers[name] = plain_ema(own, now, decay) if average and now.is_floating_point() else now.clone()
            with teacher.weights() as model:
                buffers_follow &= all(torch.equal(model.get_buffer(name), b) for name, b in buffers.items())
        assert not again
    state = teacher.state_dict(everywhere=True)
    with teacher.weights() as model:
        weights = {n: p.detach().clone() for n, p in model.named_parameters()}
        tied = model.decoder.weight is model.embedding.weight
        once, twice = model(ids), model(ids)
        free = not model.norm(torch.zeros(2, 13, dtype=model.norm.weight.dtype, requires_grad=True)).requires_grad
        with teacher.weights() as inner:
            places = [p.data_ptr() for p in inner.parameters()]
        nested = places == [p.data_ptr() for p in model.parameters() if p.numel()] and torch.equal(model(ids), once)
    moved = whole_masters(engine, robin)
    low = torch.bfloat16 if dtype == "bf16" else torch.float32
    computed = torch.bfloat16 if "torch_autocast" in case.get("config", {}) else low
    shadow = teacher._shadow
    one_gather = ["allgather_into_tensor_coalesced_"] if stage in (1, 2) and size > 1 else []
    seen = {
        "updates": teacher.updates == updates_seen == STEPS,
        "names": sorted(state),
        "compared": len(expected),
        "ema_bitwise": all(torch.equal(state[n], e) for n, e in expected.items()),
        "behind": all(not torch.equal(state[n], moved["model." + n]) for n in expected),
        "weights_are_cast_shadow": all(w.dtype is low and torch.equal(w, state[n].to(low)) for n, w in weights.items()),
        "frozen": all(torch.equal(state[n], first[n]) for n in ("frozen.bias", "frozen.weight")),
        "buffers_follow": buffers_follow,
        "buffers_saved": all(torch.equal(state[n], buffers[n]) for n in ("calls", "mean"))
        and int(state["calls"]) == STEPS * accumulation
        and state["mean"].dtype is (torch.float32 if average else body.mean.dtype),
        "tied": tied,
        "eval": torch.equal(once, twice),
        "no_grad": free and not once.requires_grad,
        "autocast": once.dtype is computed,
        "nested": nested,
        # at stages 1 and 2 the copies keep DeepSpeed's layout
        "aligned": all(t.data_ptr() % 16 == 0 for t in [*shadow.tensors, *(shadow.copies or [])] if stage in (0, 3)),
        "finite": finite,
        "released": stage < 3 or all(p.numel() == 0 for p in teacher.model.parameters()),
        "collectives": all(found == one_gather for found in collectives),
        "rng_untouched": rng_untouched,
        "old_weights_refused": old_weights_refused(teacher),
        "reload": reloads(engine, teacher, state, weights, case),
        "checksum": [float(state[n].double().abs().sum()) for n in sorted(expected)],
    }
    if case.get("plain"):
        plain = plain_run(accumulation, schedule)
        seen["plain_error"] = max(float((state[n] - p).abs().max()) for n, p in plain.items())
    return seen


def old_weights_refused(teacher: Teacher) -> bool:
    """A backward pass through weights that an update has changed meanwhile."""
    with teacher.weights() as model, torch.enable_grad():
        weight = model.norm.weight
        product = (weight * torch.ones_like(weight, requires_grad=True)).sum()
    teacher.update()
    with teacher.weights():
        try:
            product.backward()
        except RuntimeError as error:
            return "modified by an inplace operation" in str(error)
    return False


def on_meta() -> Body:
    with torch.device("meta"):
        return Body()


def reloads(engine: Any, teacher: Teacher, state: Any, weights: Any, case: dict[str, Any]) -> bool:
    """A new teacher starts as the student, and is the one that was saved once it has loaded its state."""
    import deepspeed

    with torch.inference_mode():
        reloaded = Teacher(engine, on_meta, teacher.schedule, buffers=case.get("buffers", "copy"))
    with reloaded.weights() as model, deepspeed.zero.GatheredParameters(list(engine.module.model.parameters())):
        pairs = zip(model.parameters(), engine.module.model.parameters(), strict=True)
        started = all(torch.equal(own, student) for own, student in pairs)
    # everything differs from the student's and this teacher's, frozen weights and buffers too; exact in 16 bits
    state = {n: t * 2 for n, t in state.items()}
    weights = {n: w * 2 for n, w in weights.items()}
    engine.global_steps += 1  # as a student's checkpoint, loaded before
    reloaded.load_state_dict(state, teacher.updates)
    again = reloaded.state_dict(everywhere=True)
    with reloaded.weights() as model:
        same = all(torch.equal(p, weights[n]) for n, p in model.named_parameters())
        same &= torch.equal(model.mean, state["mean"].to(model.mean.dtype)) and torch.equal(model.calls, state["calls"])
    followed = reloaded.follow()
    engine.global_steps -= 1
    return (
        started
        and same
        and sorted(again) == sorted(state)
        and all(torch.equal(again[n], t) and again[n].dtype is t.dtype for n, t in state.items())
        and reloaded.updates == teacher.updates
        and not followed
    )


def gathers() -> dict[str, bool]:
    """A contrastive loss over gathered rows against the same loss on one process."""
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    found = {}
    for name, dtype, tolerance in (("fp32", torch.float32, 1e-6), ("bf16", torch.bfloat16, 2e-2)):
        torch.manual_seed(0)
        a, b = (torch.randn(4 * size, 8).to(dtype).requires_grad_() for _ in range(2))
        mine = slice(4 * rank, 4 * rank + 4)
        x, y = (t.detach()[mine].clone().requires_grad_() for t in (a, b))
        truth = torch.nn.functional.cross_entropy(a.float() @ b.float().T, torch.arange(4 * size))
        truth.backward()
        logits = x.float() @ all_gather_with_grad(y).float().T
        torch.nn.functional.cross_entropy(logits, torch.arange(4 * size)[mine]).backward()
        # ZeRO averages over ranks, hence the division
        found[name] = all(
            torch.allclose(local.grad.float() / size, whole.grad.float()[mine], atol=tolerance)
            for local, whole in ((x, a), (y, b))
        )
    own = torch.arange(3) + 10 * rank
    found["plain"] = gather_features(own).tolist() == [n + 10 * r for r in range(size) for n in range(3)]
    found["bool"] = gather_features(own % 2 == 0).tolist() == [True, False, True] * size
    return found


def main() -> None:
    output = Path(sys.argv[1])
    rank, size = ranks.join()
    results: dict[str, Any] = {name: follow(case) for name, case in json.loads(sys.argv[2]).items()}
    results["gather"] = gathers()
    if size == 2:
        engine = build(2, "bf16")
        results |= {"refusals": teacher_wrong.refusals(engine), "start": teacher_wrong.untouched_start()}
        results |= {"overlap": teacher_wrong.overlap(engine), "overflows": teacher_wrong.overflows()}
        results["waits"] = [teacher_wrong.load_waits(), teacher_wrong.use_before_waiting_refused(engine)]
    output.with_suffix(f".{rank}.json").write_text(json.dumps(results))
    ranks.leave()


if __name__ == "__main__":
    main()
