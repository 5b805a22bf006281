"""Training what is left of an ablation, one run after another, by the launcher of ``crossmask train``."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from ..atomic import replace_file, writing_to
from ..failures import EXIT_STOPPED
from ..recipe_files import load_run_recipe
from ..training.run_lock import run_lock
from .plan import PlannedRun, Start, read_json

ORIGIN = "ablation.json"  # in a run's folder: the variant that it is, and the commit that it was finished with
Train = Callable[[PlannedRun, Start], int]


def run_all(
    runs: Sequence[PlannedRun],
    tell: Callable[[str], None],
    finished: Callable[[], object] = lambda: None,
    train: Train | None = None,
) -> int:
    """Train what is not finished, in order, and stop at the first run that fails or is stopped.

    Args:
        tell: is given a line before each run and at the end. finished: called after each run that was trained.
        train: trains one run and returns its exit code; default, the launcher of ``crossmask train``.

    Returns:
        0, or the exit code of the run at which it stopped; its reason has been printed by then.
    """
    train = train or train_run
    began, took = time.monotonic(), dict[str, float]()
    starts = [run.look() for run in runs]
    for run, start in zip(runs, starts, strict=True):
        if start is Start.FINISHED:
            took[run.variant.name] = training_seconds(read_json(run.folder / "evaluation.json")) or 0.0
    for n, (run, start) in enumerate(zip(runs, starts, strict=True)):
        place = f"run {n + 1} of {len(runs)}: {run.variant.heading}, seed {run.seed}"
        if start is Start.FINISHED:
            tell(f"{place}: finished before, kept")
            continue
        left = [other for other, state in zip(runs[n:], starts[n:], strict=True) if state is not Start.FINISHED]
        tell(f"{place}: {start.value}; {clock(time.monotonic() - began)} so far{_estimate(left, took)}")
        if start is Start.AGAIN:
            with run_lock(run.folder, "begun again"):  # refuses one that is still being trained
                pass
            shutil.rmtree(run.folder)
        begun = time.monotonic()
        code = train(run, start)
        if code:
            how = "stopped" if code == EXIT_STOPPED else "failed"
            tell(f"the ablation ends here: {run.name} {how}; the same command goes on from it")
            return code
        took[run.variant.name] = time.monotonic() - begun
        _sign(run)
        finished()
    return 0


def train_run(run: PlannedRun, start: Start) -> int:
    """As ``crossmask train`` does, or with ``--resume``; the exit code."""
    from ..training.launcher import launch, plan_ranks

    if start is Start.RESUME:
        recipe, arguments = load_run_recipe(run.folder), ["--resume", str(run.folder)]
    else:
        recipe, arguments = run.recipe, run.arguments
    return launch(arguments, run.folder, plan_ranks(recipe), rank_timeout=recipe.training.rank_timeout)


def training_seconds(evaluation: dict[str, object]) -> float | None:
    """Without start-up and evaluation; a run that was resumed counts all its parts."""
    minutes = evaluation.get("minutes")
    return 60.0 * minutes if isinstance(minutes, (int, float)) else None


def clock(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def commit() -> str | None:
    """Of the checkout this code runs from, ``-dirty`` with changes; None where it is none, or git is missing."""
    here = Path(__file__).resolve()
    with suppress(OSError, subprocess.SubprocessError):
        git = ("git", "-C", str(here.parent))
        # an installation inside someone else's checkout is not of that checkout
        for command in (("ls-files", "--error-unmatch", here.name), ("describe", "--always", "--dirty", "--exclude=*")):
            done = subprocess.run([*git, *command], capture_output=True, text=True, timeout=30)
            if done.returncode:
                return None
        return done.stdout.strip() or None
    return None


def _estimate(left: Sequence[PlannedRun], took: dict[str, float]) -> str:
    """By the same variant's last run, else by the mean of the others'; nothing where none has been seen."""
    if not took:
        return ""
    mean = sum(took.values()) / len(took)
    return f", about {clock(sum(took.get(run.variant.name, mean) for run in left))} to go"


def _sign(run: PlannedRun) -> None:
    origin = {"variant": run.variant.name, "seed": run.seed, "commit": commit()}
    with writing_to(run.folder):
        replace_file(run.folder / ORIGIN, json.dumps(origin))
