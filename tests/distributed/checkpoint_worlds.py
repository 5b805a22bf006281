"""Saves on two ranks, resumes on two, reshards, and resumes on one, two and four; writes what it saw as JSON.

    python tests/distributed/checkpoint_worlds.py FOLDER [STAGE:DTYPE ...]

Every number of ranks trains the same global batches without dropout. The comparison on two ranks has dropout, gradient
accumulation and skipped steps before and after the checkpoint.
"""

from __future__ import annotations

import json
import math
import shutil
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import forked
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

FAILING = "3:fp32"
STEPS, SAVED, BAD = 8, 4, (1, 5)
CASES = ["0:fp32", "0:bf16", "1:fp32", "2:fp32", "3:fp32", "1:bf16", "2:bf16", "3:bf16"]


def _run(case: str, dropout: float = 0.0, seed: int = 0) -> Any:
    from resumable import Run

    stage, dtype = case.split(":")
    return Run(int(stage), dtype, accumulation=2, dropout=dropout, seed=seed)


def _manager(folder: Path, case: str, kind: str) -> Any:
    from crossmask.engine.training.checkpoint import CheckpointManager

    return CheckpointManager(folder / case.replace(":", "-") / kind, keep=4, warn=print)


def _mean(loss: str) -> float:
    """Over ranks; NaN for a skipped step."""
    value = torch.tensor(math.nan if loss == "skipped" else float.fromhex(loss), dtype=torch.float64)
    dist.all_reduce(value)
    return value.item() / dist.get_world_size()


def _report(folder: Path, name: str, content: Any) -> None:
    Path(folder, f"{name}.{dist.get_rank()}.json").write_text(json.dumps(content))


def on_two(folder: Path, cases: list[str]) -> None:
    """An uninterrupted run, and one resumed from its checkpoint, with and without dropout."""
    seen: dict[str, Any] = {}
    for case in cases:
        whole = _run(case, dropout=0.5)
        manager, losses = _manager(folder, case, "dropout"), []
        for step in range(STEPS):
            if step == SAVED:
                whole.save(manager, step)
            losses.append(whole.step(step, step in BAD))
        resumed = _run(case, dropout=0.5, seed=1)
        state = resumed.load(manager)
        again = [resumed.step(step, step in BAD) for step in range(state.step, STEPS)]
        ends = [one.everything() for one in (whole, resumed)]
        own = "buffer model.mean", "teacher mean"  # the last local batch's mean: each rank its own, rank 0's is saved
        different = [n for n in ends[0] if n not in own and not torch.equal(ends[0][n], ends[1][n])]
        seen[case] = {"whole": losses, "resumed": again, "different": different, "compared": len(ends[0])}

        plain = _run(case)
        manager = _manager(folder, case, "plain")
        means = []
        for step in range(STEPS):
            if step in (SAVED - 2, SAVED):
                plain.save(manager, step)
                state = plain.everything()
                if dist.get_rank() == 0:
                    save_file(state, manager.run_dir / "everything.safetensors")
            means.append(_mean(plain.step(step, step in BAD)))
        seen[case]["means"] = means
        if dist.get_rank() == 0:
            assert not list(manager.folder.glob("*.partial"))
            shutil.copytree(manager.run_dir, _manager(folder, case, "sharded").run_dir)
    _report(folder, "two", seen)


def failing_loads(folder: Path, case: str, kind: str) -> None:
    """Rank 1 cannot read: what it loads for itself, on which all agree, then a file of DeepSpeed's amid collectives."""
    from crossmask.engine.errors import CheckpointError
    from crossmask.engine.training import checkpoint, checkpoint_state, student_files

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(5, "Input/output error")

    run, manager = _run(case, seed=1), _manager(folder, case, kind)
    manager._warn = lambda line: None
    places = [(checkpoint, "load_file"), (student_files, "load_file"), (checkpoint_state, "entries"), (torch, "load")]
    for module, name in places:
        if (module, kind) == (student_files, "sharded"):
            continue
        usual = getattr(module, name)
        if dist.get_rank() == 1:
            setattr(module, name, fail)
        try:
            run.load(manager)
            told = "loaded"
        except CheckpointError as error:
            told = str(error)
        setattr(module, name, usual)
        _report(folder, f"failing-{kind}-{module.__name__.rpartition('.')[2]}", told)
        if module is torch and dist.get_rank() == 1:
            sys.exit("leaves, as a rank does that raises")


def convert(folder: Path, cases: list[str], kind: str) -> None:
    from crossmask.engine.training.reshard import reshard

    _report(folder, f"convert-{kind}", {case: reshard(_manager(folder, case, kind).run_dir).name for case in cases})


def on_others(folder: Path, cases: list[str], kind: str, save_as: str = "", report: str = "") -> None:
    """Resumes the checkpoint of two ranks on this group's number of ranks; saves what it loaded as another run's."""
    seen: dict[str, Any] = {}
    for case in cases:
        run, manager = _run(case, seed=1), _manager(folder, case, kind)
        try:
            state = run.load(manager)
        except Exception as error:
            seen[case] = {"error": f"{type(error).__name__}: {error}"}
            continue
        expected, loaded = load_file(manager.run_dir.parent / "plain" / "everything.safetensors"), run.everything()
        if save_as:
            run.save(_manager(folder, case, save_as), state.step)
        seen[case] = {
            "missing": sorted(expected.keys() ^ loaded.keys()),
            "different": [n for n in expected if n in loaded and not torch.equal(expected[n], loaded[n])],
            "compared": len(expected),
            "draw": torch.rand(1).item(),
            "means": [_mean(run.step(step, step in BAD)) for step in range(state.step, STEPS)],
        }
    _report(folder, report or f"{kind}-{dist.get_world_size()}", seen)


def failing(folder: Path, kind: str) -> None:
    """The last failure is in a collective: rank 1 tells and leaves, rank 0 loses it."""
    group = forked.fork(2, failing_loads, folder, FAILING, kind, folder=folder)
    began = time.monotonic()
    statuses = group.wait(60.0)
    seen = {"statuses": statuses, "seconds": time.monotonic() - began, "log": group.logs[1].read_text()[-2000:]}
    Path(folder, f"failing-{kind}.json").write_text(json.dumps(seen))


def main() -> None:
    folder, cases = Path(sys.argv[1]), sys.argv[2:] or CASES
    folder.mkdir(parents=True, exist_ok=True)
    forked.prepare()
    forked.run(2, on_two, folder, cases, folder=folder)
    forked.run(1, on_others, folder, cases, "plain", "", "sharded", folder=folder)  # refused, but for stage 0
    failing(folder, "sharded")
    forked.run(1, convert, folder, cases, "plain", folder=folder)
    failing(folder, "plain")
    forked.run(1, on_others, folder, cases, "plain", "one", folder=folder)
    forked.run(2, on_others, folder, cases, "plain", folder=folder)
    forked.run(4, on_others, folder, cases, "plain", folder=folder)
    forked.run(1, convert, folder, cases, "one", folder=folder)
    forked.run(2, on_others, folder, cases, "one", folder=folder)


if __name__ == "__main__":
    main()
