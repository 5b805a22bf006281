"""The own model of examples/ on every rank, under ZeRO stages, interrupted and resumed; writes what it saw as JSON.

python tests/distributed/library_steps.py OUTPUT STAGE…
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import own_model
import ranks
import torch.distributed as dist

from crossmask.engine import Pretrainer

STEPS, STOP = 8, 3


def losses(pretrainer: Pretrainer, until: int) -> list[float]:
    found = []
    for batch in pretrainer.batches():
        found.append(pretrainer.step(batch).item())
        if pretrainer.next_step == until:
            break
    return found


def run(stage: int, folder: Path) -> dict[str, Any]:
    recipe = own_model.recipe(STEPS, stage=stage)
    with Pretrainer(recipe) as pretrainer:
        first = losses(pretrainer, STOP)
        pretrainer.save(folder)
        rest = losses(pretrainer, STEPS)
        evaluation = pretrainer.evaluate()
    with Pretrainer(recipe, resumed=True) as again:
        step = again.load(folder)
        resumed = losses(again, STEPS)
        again.save(folder)
        split = again.evaluate()["splits"]["held-out"]
    same = split["i2t"] == evaluation["splits"]["held-out"]["i2t"]
    return {
        "first": first, "rest": rest, "resumed": resumed, "step": step, "r1": split["i2t"]["r1"], "same": same,
        "stage": int(again.engine.zero_optimization_stage()), "left": dist.is_initialized(),
    }  # fmt: skip


def main() -> None:
    output = Path(sys.argv[1])
    rank, _ = ranks.join()
    seen = {stage: run(int(stage), output.parent / f"run-{stage}") for stage in sys.argv[2:]}
    Path(f"{output}.{rank}.json").write_text(json.dumps(seen))
    ranks.leave()


if __name__ == "__main__":
    main()
