"""A few steps of a tiny captioner on every rank under ZeRO 0 to 3; writes what it saw as JSON.

python tests/distributed/sycoca_steps.py OUTPUT CASES    CASES: {name: {recipe's dotted path: value}} in JSON
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))

import albef_steps
import ranks
import sycoca_cases
import torch
import torch.distributed as dist

from crossmask.engine.recipe import Recipe
from crossmask.engine.training.caption_step import compute_captioner_losses
from crossmask.engine.training.checkpoint import CheckpointManager
from crossmask.engine.training.pretrainer import Pretrainer

STEPS = 4


class Pairs(albef_steps.Pairs):
    def fingerprint(self) -> str:
        return "pairs"


def build(recipe: Recipe, resumed: bool = False) -> Pretrainer:
    data: Any = Pairs()
    return Pretrainer(recipe, data, dist.get_rank(), dist.get_world_size(), torch.device("cpu"), resumed=resumed)


def terms(pretrainer: Pretrainer, steps: int) -> list[dict[str, float]]:
    found = []
    for _ in range(steps):
        pretrainer.step()
        assert pretrainer.last is not None
        seen = pretrainer.last.terms
        mean = torch.stack([seen[name].double() for name in sorted(seen)])
        dist.all_reduce(mean)
        found.append(dict(zip(sorted(seen), (mean / dist.get_world_size()).tolist(), strict=True)))
    return found


def run(case: dict[str, Any], folder: Path) -> dict[str, Any]:
    resume = case.pop("resume", False)
    recipe = Recipe.model_validate(sycoca_cases.changed(case))
    pretrainer = build(recipe)
    result: dict[str, Any] = {"terms": terms(pretrainer, STEPS // 2)}
    if resume:
        manager = CheckpointManager(folder, 1, print, recipe)
        manager.save(STEPS // 2, pretrainer.engine, pretrainer.teacher, pretrainer.queue, {})
    result["terms"] += terms(pretrainer, STEPS - STEPS // 2)
    result["teacher"] = digest(pretrainer)
    result["updates"] = pretrainer.teacher.updates
    if resume:
        again = build(recipe, resumed=True)
        state = manager.load(again.engine, again.teacher, again.queue)
        again.next_step = state.step
        result["resumed"] = terms(again, STEPS - STEPS // 2)
        result["resumed_teacher"] = digest(again)
    return result


def digest(pretrainer: Pretrainer) -> dict[str, float]:
    """Sums of the teacher's tensors, by name. Collective."""
    state = pretrainer.teacher.state_dict(everywhere=True)
    return {name: value.double().abs().sum().item() for name, value in state.items()}


def contrast() -> dict[str, float]:
    """ITC's loss and gradients of one batch on all ranks, against the same in one process."""
    recipe = sycoca_cases.recipe(objectives__caption__weight=0.0, objectives__tg_mim__weight=0.0)
    whole, rank, world = sycoca_cases.batch(6), dist.get_rank(), dist.get_world_size()
    share = len(whole) // world
    part = whole.rows(slice(rank * share, (rank + 1) * share))
    model = sycoca_cases.student(recipe)
    masks = sycoca_cases.run_masks(recipe)
    found = compute_captioner_losses(model, part, recipe, masks, 0, 0)
    found.loss.backward()
    mean = found.loss.detach().clone()
    dist.all_reduce(mean)
    off = largest = 0.0
    alone = sycoca_cases.student(recipe)
    import crossmask.engine.teacher.gather as gather

    kept, gather.world_size = gather.world_size, lambda group=None: 1
    wanted = compute_captioner_losses(alone, whole, recipe, masks, 0, 0)
    wanted.loss.backward()
    gather.world_size = kept
    for mine, other in zip(model.parameters(), alone.parameters(), strict=True):
        if (mine.grad is None) != (other.grad is None):
            return {"loss": float("nan"), "gradient": float("nan")}
        if mine.grad is not None and other.grad is not None:
            dist.all_reduce(mine.grad)
            off = max(off, (mine.grad / world - other.grad).abs().max().item())
            largest = max(largest, other.grad.abs().max().item())
    return {
        "loss": abs(mean.item() / world - wanted.loss.item()),
        "gradient": off / largest,
        "value": wanted.loss.item(),
    }


def main() -> None:
    output, cases = Path(sys.argv[1]), json.loads(sys.argv[2])
    rank, _ = ranks.join()
    seen: dict[str, Any] = {"contrast": contrast()}
    seen |= {name: run(case, output.parent / f"run-{name}") for name, case in cases.items()}
    Path(f"{output}.{rank}.json").write_text(json.dumps(seen))
    ranks.leave()


if __name__ == "__main__":
    main()
