"""Trains the small student, saves and resumes, as the test that starts it says; writes losses and teacher as JSON.

Arguments: RUN_FOLDER OUTPUT JSON. The JSON's keys: stage, dtype, steps, save_at (list), resume, keep, and what is to
go wrong: kill_at (step whose save is cut short by SIGKILL), kill_rank, kill_file (end of the name of the file that
is half-written then), full_disk_at, full_disk_rank, full_disk_file.
"""

from __future__ import annotations

import io
import json
import os
import random
import signal
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import numpy as np
import ranks
import torch
from student import Body, build, ids_of

from crossmask.engine.errors import CheckpointError
from crossmask.engine.teacher import FeatureQueue, Teacher, gather_features
from crossmask.engine.training import checkpoint
from crossmask.engine.training.checkpoint import CheckpointManager

PICKLE, TENSORS = torch.save, checkpoint.save_file


def go_wrong_while_saving(name_end: str, fail: Any) -> None:
    """Replaces torch.save and safetensors' save_file: half the bytes of one file, then ``fail``."""

    def save(state: Any, file: Any) -> None:
        if file.name.endswith(name_end):
            whole = io.BytesIO()
            PICKLE(state, whole)
            file.write(whole.getvalue()[: whole.tell() // 2])
            file.flush()
            fail()
        PICKLE(state, file)

    def save_file(state: Any, path: Any) -> None:
        TENSORS(state, path)
        if str(path).endswith(name_end):
            os.truncate(path, Path(path).stat().st_size // 2)
            fail()

    torch.save = save
    checkpoint.save_file = save_file


def disk_full() -> None:
    raise OSError(28, "No space left on device")


def write(result: dict[str, Any], teacher: Teacher, queue: FeatureQueue, path: Path) -> None:
    """Collective: the teacher's tensors are gathered."""
    whole = teacher.state_dict(everywhere=True)
    result["teacher"] = {
        name: tensor.double().sum().item().hex() for name, tensor in sorted(whole.items()) if name != "mean"
    }
    result["queue"] = [queue.image.sum().item().hex(), queue.group_id.tolist(), int(queue.pointer)]
    path.write_text(json.dumps(result))


def main() -> None:
    run, output, plan = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
    rank, _ = ranks.join()
    engine = build(plan["stage"], plan["dtype"], seed=1 if plan.get("resume") else 0)
    teacher, queue = Teacher(engine, Body, 0.9), FeatureQueue(13, 2)
    warnings: list[str] = []
    manager = CheckpointManager(run, plan.get("keep", 2), warnings.append)
    result: dict[str, Any] = {"losses": [], "draws": [], "warnings": warnings, "error": None}
    start = 0
    for generator in (random, np.random, torch):
        getattr(generator, "manual_seed", getattr(generator, "seed", None))(rank)
    try:
        if plan.get("resume"):
            state = manager.load(engine, teacher, queue)
            start = state.step
            result["extra"], result["updates"] = state.extra, teacher.updates
        for step in range(start, plan["steps"]):
            ids = ids_of(step, rank)
            with teacher.weights() as model:
                rows = model.encode(ids).float()[:, 0, :2]
            loss = engine(ids)  # its dropout draws from torch's generator
            engine.backward(loss)
            engine.step()
            teacher.follow()
            queue.enqueue(gather_features(rows), gather_features(-rows), gather_features(ids[:, 0]))
            result["losses"].append(loss.item().hex())
            from_numpy = float(np.random.randn())  # noqa: NPY002
            result["draws"].append([random.random(), random.gauss(0, 1), from_numpy, torch.rand(1).item()])
            if step + 1 in plan.get("save_at", []):
                if plan.get("kill_at") == step + 1 and plan["kill_rank"] == rank:
                    go_wrong_while_saving(plan["kill_file"], lambda: os.kill(os.getpid(), signal.SIGKILL))
                if plan.get("full_disk_at") == step + 1 and plan["full_disk_rank"] == rank:
                    go_wrong_while_saving(plan["full_disk_file"], disk_full)
                write(result, teacher, queue, output.with_suffix(f".{rank}.json"))
                try:
                    manager.save(step + 1, engine, teacher, queue, {"skipped": step})
                except CheckpointError as error:
                    result["error"] = str(error)
                    torch.save, checkpoint.save_file = PICKLE, TENSORS
    except CheckpointError as error:
        result["error"] = str(error)
    write(result, teacher, queue, output.with_suffix(f".{rank}.json"))
    ranks.leave()


if __name__ == "__main__":
    main()
