"""Follows a student at several ZeRO stages in one process and compares bit by bit; writes what it saw as JSON."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import ranks
import torch
from student import Body, build, ids_of
from torch import Tensor

from crossmask.engine.errors import UserError
from crossmask.engine.teacher import Teacher, all_gather_with_grad, gather_features, momentum_at
from crossmask.kernels import ema_update_

MOMENTUM = 0.9


def whole_masters(engine: Any) -> dict[str, Tensor]:
    """The student's fp32 masters by name, gathered by DeepSpeed itself."""
    from deepspeed.utils import safe_get_full_fp32_param

    found = {}
    for name, parameter in engine.module.named_parameters():
        if not parameter.requires_grad:
            continue
        master = safe_get_full_fp32_param(parameter)
        found[name] = (parameter.detach() if master is None else master).float().clone()
    return found


def follow(stage: int, dtype: str, accumulation: int, warmup: bool, extra: dict[str, Any]) -> dict[str, Any]:
    engine = build(stage, dtype, accumulation, extra)
    rank = torch.distributed.get_rank()
    teacher = Teacher(engine, Body(), MOMENTUM, warmup)
    expected = {n.removeprefix("model."): m for n, m in whole_masters(engine).items() if n.startswith("model.")}
    frozen = {n: p for n, p in teacher.state_dict(everywhere=True).items() if n.startswith("frozen")}
    finite = True
    for step in range(6 * accumulation):
        ids = ids_of(step, rank)
        with teacher.weights() as model:
            finite &= bool(torch.isfinite(model.encode(ids)).all())
        engine.backward(engine(ids))
        engine.step()
        if teacher.follow():
            decay = momentum_at(teacher.updates - 1, MOMENTUM, warmup)
            masters = whole_masters(engine)
            ema_update_(list(expected.values()), [masters["model." + n] for n in expected], decay)
    state = teacher.state_dict(everywhere=True)
    with teacher.weights() as model:
        weights = {n: p.detach().clone() for n, p in model.named_parameters()}
        tied = model.decoder.weight is model.embedding.weight
        once, again = model(ids), model(ids)
    student_buffers = dict(engine.module.model.named_buffers())
    moved = {n: p for n, p in whole_masters(engine).items() if n.startswith("model.")}
    reloaded = Teacher(engine, Body(), MOMENTUM, warmup)  # a new one starts as the student
    import deepspeed

    with reloaded.weights() as model, deepspeed.zero.GatheredParameters(list(engine.module.model.parameters())):
        starts_as_student = all(
            torch.equal(own, student)
            for own, student in zip(model.parameters(), engine.module.model.parameters(), strict=True)
        )
    reloaded.load_state_dict(state, teacher.updates)
    state_again = reloaded.state_dict(everywhere=True)
    with reloaded.weights() as model:
        weights_again = {n: p.detach().clone() for n, p in model.named_parameters()}
    low = torch.bfloat16 if dtype == "bf16" else torch.float32
    return {
        "updates": teacher.updates,
        "names": sorted(state),
        "ema_bitwise": all(torch.equal(state[n], e) for n, e in expected.items()),
        "starts_as_student": starts_as_student,
        "compared": len(expected),
        "behind": all(not torch.equal(state[n.removeprefix("model.")], m) for n, m in moved.items()),
        "weights_are_cast_shadow": all(w.dtype is low and torch.equal(w, state[n].to(low)) for n, w in weights.items()),
        "frozen": sorted(frozen) == ["frozen.bias", "frozen.weight"]
        and all(torch.equal(state[n], p) for n, p in frozen.items()),
        "buffers": all(torch.equal(state[n].to(b.dtype), b) for n, b in student_buffers.items())
        and int(state["calls"]) == 6 * accumulation,
        "tied": tied,
        "eval_no_grad": torch.equal(once, again) and not once.requires_grad,
        "finite": finite,
        "released": stage < 3 or all(p.numel() == 0 for p in teacher.model.parameters()),
        "reload": sorted(state_again) == sorted(state)
        and all(torch.equal(state_again[n], t) for n, t in state.items())
        and all(torch.equal(weights_again[n], t) for n, t in weights.items())
        and reloaded.updates == teacher.updates,
        "checksum": float(sum(t.double().abs().sum() for n, t in state.items() if n != "mean")),
    }


def refusals() -> dict[str, str]:
    """The message of each thing that must not work."""
    engine = build(2, "fp32")

    def of(action: Any) -> str:
        try:
            action()
        except (UserError, ValueError) as error:
            return str(error)
        return "accepted"

    larger, narrower, tied = Body(), Body(), Body()
    larger.more = torch.nn.Linear(2, 2)
    narrower.frozen = torch.nn.Linear(13, 13)
    tied.norm.weight = tied.norm.bias
    teacher = Teacher(engine, Body(), MOMENTUM)
    state = teacher.state_dict(everywhere=True)
    return {
        "stage 0 bf16": of(lambda: Teacher(build(0, "bf16"), Body(), MOMENTUM)),
        "unknown parameter": of(lambda: Teacher(engine, larger, MOMENTUM)),
        "other shape": of(lambda: Teacher(engine, narrower, MOMENTUM)),
        "tied differently": of(lambda: Teacher(engine, tied, MOMENTUM)),
        "load missing": of(lambda: teacher.load_state_dict({n: t for n, t in state.items() if n != "position"})),
        "load other shape": of(lambda: teacher.load_state_dict(state | {"hidden.bias": torch.zeros(3)})),
    }


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
    found["plain"] = gather_features(own).tolist() == [0, 1, 2, 10, 11, 12]
    found["bool"] = gather_features(own % 2 == 0).tolist() == [True, False, True, True, False, True]
    return found


def main() -> None:
    output = Path(sys.argv[1])
    rank, _ = ranks.join()
    results = {}
    for case in json.loads(sys.argv[2]):
        name, stage, dtype, accumulation, warmup, extra = case
        results[name] = follow(stage, dtype, accumulation, warmup, extra)
    results["refusals"], results["gather"] = refusals(), gathers()
    output.with_suffix(f".{rank}.json").write_text(json.dumps(results))
    ranks.leave()


if __name__ == "__main__":
    main()
