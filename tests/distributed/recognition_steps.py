"""A few steps of fine-tuning for recognition on every rank; writes what it saw as JSON and keeps a checkpoint of each.

python tests/distributed/recognition_steps.py OUTPUT RECIPE CASES    CASES: {name: [overrides]} in JSON
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import ranks
import torch
import torch.distributed as dist

from crossmask.engine.data import load_data
from crossmask.engine.recipe_files import dump_recipe, load_recipe
from crossmask.engine.training.checkpoint import CheckpointManager
from crossmask.engine.training.pretrainer import Pretrainer

STEPS = 4


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


def run(file: str, overrides: list[str], folder: Path) -> dict[str, Any]:
    recipe = load_recipe(file, overrides)
    data = load_data(recipe)
    place = (dist.get_rank(), dist.get_world_size(), torch.device("cpu"))
    one = Pretrainer(recipe, data, *place)
    result: dict[str, Any] = {"terms": terms(one, STEPS // 2)}
    manager = CheckpointManager(folder, 1, print, recipe)
    manager.save(STEPS // 2, one.engine, one.teacher, one.queue, {})
    result["terms"] += terms(one, STEPS - STEPS // 2)
    again = Pretrainer(recipe, data, *place, resumed=True)
    again.next_step = manager.load(again.engine, again.teacher, again.queue).step
    result["resumed"] = terms(again, STEPS - STEPS // 2)
    whole, resumed = (p.teacher.state_dict(everywhere=True) for p in (one, again))
    result["same"] = all(torch.equal(x, resumed[name]) for name, x in whole.items())
    result["teacher"] = {name: x.double().abs().sum().item() for name, x in whole.items()}
    if dist.get_rank() == 0:
        (folder / "recipe.yaml").write_text(dump_recipe(recipe))
        data.tokenizer.save(folder / "tokenizer.json")
    return result


def main() -> None:
    output, file, cases = Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])
    rank, _ = ranks.join()
    seen = {name: run(file, overrides, output.parent / f"run-{name}") for name, overrides in cases.items()}
    Path(f"{output}.{rank}.json").write_text(json.dumps(seen))
    ranks.leave()


if __name__ == "__main__":
    main()
