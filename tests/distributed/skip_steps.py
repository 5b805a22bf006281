"""A run in which some micro-batches are not finite against one that never sees those steps. Writes JSON."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import ranks
import torch
from student import Body, build, ids_of

from crossmask.engine.errors import NonFiniteLossError
from crossmask.engine.teacher import Teacher
from crossmask.engine.training.nonfinite import NonFiniteGuard


def weights(engine: Any, teacher: Teacher) -> dict[str, str]:
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
        found = {name: p.double().sum().item().hex() for name, p in engine.module.named_parameters()}
    state = teacher.state_dict(everywhere=True)
    # buffers are written by the forward pass, which a skipped step has made too
    return found | {
        f"teacher {name}": state[name].double().sum().item().hex() for name in state if name not in ("mean", "calls")
    }


def train(
    stage: int, dtype: str, accumulation: int, variant: str, bad: dict[int, int], steps: list[int]
) -> dict[str, Any]:
    """``bad``: step -> its micro-batch that is NaN on rank 1 only. ``variant``: "", "offload" or "fp32 sums"."""
    rank = torch.distributed.get_rank()
    zero = {"offload_optimizer": {"device": "cpu"}} if variant == "offload" else {}
    config = {"data_types": {"grad_accum_dtype": "fp32"}} if variant == "fp32 sums" else {}
    engine = build(stage, dtype, accumulation, zero, config=config)
    engine.module.model.dropout.p = 0.0  # so that a skipped forward leaves the generator alone
    teacher, guard = Teacher(engine, Body, 0.9), NonFiniteGuard(3)
    for step in steps:
        for micro in range(accumulation):
            nan = bad.get(step) == micro and rank == 1
            loss = engine(ids_of(10 * step + micro, rank), float("nan") if nan else 1.0)
            if not guard.accept(loss, torch.tensor([7, 8]), engine):
                break
            engine.backward(loss)
            engine.step()
            if teacher.follow():
                guard.stepped(True, torch.tensor([7, 8]))
    return {
        "weights": weights(engine, teacher),
        "updates": teacher.updates,
        "skipped": guard.skipped,
        "global_steps": engine.global_steps,
    }


def main() -> None:
    rank, _ = ranks.join()
    results: dict[str, Any] = {}
    for case in json.loads(sys.argv[2]):
        bad = {1: case[2] - 1, 3: 0}
        results[" ".join(map(str, case))] = [train(*case, bad, [0, 1, 2, 3, 4]), train(*case, {}, [0, 2, 4])]
    guard = NonFiniteGuard(2)
    accepted = [guard.accept(torch.tensor(x), torch.tensor([1])) for x in (float("inf"), 1.0)]
    guard.stepped(True, torch.tensor([1]))
    accepted.append(guard.accept(torch.tensor(float("inf") if rank else 2.0), torch.tensor([1])))
    try:
        guard.accept(torch.tensor(float("nan") if rank else 2.0), torch.tensor([40 + rank, 50 + rank]))
        message = ""
    except NonFiniteLossError as error:
        message = str(error)
    results["guard"] = {"accepted": accepted, "message": message, "skipped": guard.skipped}
    Path(f"{sys.argv[1]}.{rank}.json").write_text(json.dumps(results))
    ranks.leave()


if __name__ == "__main__":
    main()
