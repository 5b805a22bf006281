"""A few steps of a tiny model on every rank, with other threads for the data each time; prints each run's losses.

Arguments: OUTPUT DATA.jsonl.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
import threading
from contextlib import closing
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import ranks
import torch
import torch.distributed as dist

from crossmask.engine.data import load_data
from crossmask.engine.recipe import Recipe
from crossmask.engine.training.checkpoint import CheckpointManager
from crossmask.engine.training.pretrainer import Pretrainer

STEPS, STOP = 9, 5  # of 12 pairs: epochs of 4 steps, so that a run stops and goes on in the midst of one
TOWER = {"width": 16, "depth": 1, "heads": 2, "mlp_ratio": 2.0}
GROUPED = {"search_space": 48, "similar": 2, "lead": 0.5}


def recipe(path: str, prefetch: int, workers: int, grouping: dict[str, Any]) -> Recipe:
    threads = {"prefetch": prefetch, "workers": workers}
    pairs = {"source": "pairs", "path": path, "vocabulary_size": 64, "max_words": 8, "validation_fraction": 0.0}
    return Recipe.model_validate(
        {
            "data": {**pairs, **threads, "rand_augment": {"operations": 1}, "grouping": grouping},
            "model": {
                "image": {"size": 32, "patch_size": 8, **TOWER},
                "text": TOWER,
                "fusion": {"depth": 1, "heads": 2, "mlp_ratio": 2.0},
                "projection_width": 8,
            },
            "masking": {"policy": "prior", "prior": "contrast"},
            "objectives": {"itc": {"queue_length": 24}},
            "optimizer": {"lr": 1e-3, "warmup_steps": 0},
            "training": {"batch_size": 12, "accumulation_steps": 2, "max_steps": STEPS, "precision": "fp32"},
        }
    )


def run(path: str, folder: Path, first: int, last: int, *, prefetch: int, workers: int, grouped: bool) -> list[str]:
    """The loss of each step from ``first`` to ``last`` as this rank saw it, to the bit, and a digest of the weights."""
    asked = recipe(path, prefetch, workers, GROUPED if grouped else {})
    run = Pretrainer(
        asked, load_data(asked), dist.get_rank(), dist.get_world_size(), torch.device("cpu"), run_dir=folder
    )
    checkpoints = CheckpointManager(folder, recipe=asked)
    seen = []
    with closing(run.sampler), closing(run.prefetcher):
        if first:
            run.next_step = checkpoints.load(run.engine, run.teacher, run.queue).step
        while run.next_step < last:
            seen.append(float(run.step()).hex())
        if last < STEPS:
            run.sampler.flush()
            checkpoints.save(run.next_step, run.engine, run.teacher, run.queue)
    weights = hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in run.engine.module.parameters()))
    return [*seen, weights.hexdigest()]


def main() -> None:
    output, path = sys.argv[1:]
    ranks.join()
    seen: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as mine:
        shared = [mine]
        dist.broadcast_object_list(shared, src=0)
        for number, (prefetch, workers, grouped) in enumerate(
            [(0, 1, False), (4, 4, False), (0, 1, True), (3, 2, True)]
        ):
            threads = {"prefetch": prefetch, "workers": workers, "grouped": grouped}
            folder = Path(shared[0], str(number))
            seen[f"{prefetch} {workers} {grouped}"] = run(path, folder, 0, STEPS, **threads)
        folder = Path(shared[0], "stopped")
        before = run(path, folder, 0, STOP, prefetch=1, workers=2, grouped=False)
        after = run(path, folder, STOP, STEPS, prefetch=4, workers=1, grouped=False)
        seen["stopped"] = [*before[:-1], *after]
        dist.barrier()
    seen["threads"] = [t.name for t in threading.enumerate() if t.name.startswith("batches")]
    Path(f"{output}.{dist.get_rank()}.json").write_text(json.dumps(seen))
    ranks.leave()


if __name__ == "__main__":
    main()
