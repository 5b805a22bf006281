"""A few steps of tiny recipes on every rank; writes what each rank holds and sends, beside what a plan says, as JSON.

python tests/distributed/planning_steps.py OUTPUT CASES    CASES: {name: {recipe's dotted path: value}} in JSON
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
from albef_steps import TINY, Pairs

from crossmask.engine.planning.assumed import Assumed
from crossmask.engine.planning.expected import expected
from crossmask.engine.planning.measured import live_storages, measure
from crossmask.engine.recipe import Recipe
from crossmask.engine.training.pretrainer import Pretrainer


def run(case: dict[str, Any]) -> dict[str, Any]:
    values = json.loads(json.dumps(TINY))
    for path, value in case.items():
        *sections, field = path.split(".")
        target = values
        for section in sections:
            target = target.setdefault(section, {})
        target[field] = value
    recipe = Recipe.model_validate(values)
    data = Pairs()
    before = live_storages()
    pretrainer = Pretrainer(recipe, data, dist.get_rank(), dist.get_world_size(), torch.device("cpu"))  # type: ignore[arg-type]
    found = measure(pretrainer, before)
    assumed = Assumed(data.tokenizer.vocabulary_size, data.max_tokens)
    return {"measured": found, "expected": expected(recipe, assumed, dist.get_world_size())}


def main() -> None:
    output, cases = Path(sys.argv[1]), json.loads(sys.argv[2])
    rank, _ = ranks.join()
    seen = {name: run(case) for name, case in cases.items()}
    Path(f"{output}.{rank}.json").write_text(json.dumps(seen))
    ranks.leave()


if __name__ == "__main__":
    main()
