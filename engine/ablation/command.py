"""``crossmask ablate``: plan, train what is missing, write what was reached."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from ..errors import CheckpointError, UserError
from ..training.run_lock import run_lock
from .description import Ablation, load_ablation
from .plan import PlannedRun, choose, plan_runs
from .results import collect
from .running import Train, run_all
from .writing import write_results


def ablate(
    path: str,
    overrides: Sequence[str],
    output: Path | None,
    seeds: str | None,
    only: str | None,
    tell: Callable[[str], None],
    *,
    dry_run: bool = False,
    table_only: bool = False,
    train: Train | None = None,
) -> int:
    """Train what is not finished of an ablation and write its table and picture after each run.

    Args:
        path: a file, or a shipped ablation's name. overrides: of all variants, after their own.
        output: default, runs/ablation-NAME. seeds, only: lists with commas, by default the ablation's own.
        dry_run: say what would be done and touch nothing. table_only: train nothing.

    Returns:
        The exit code.

    Raises:
        UserError: found before anything is trained.
    """
    ablation = load_ablation(path).overridden(overrides)
    output = output or Path("runs") / f"ablation-{ablation.name}"
    if output.exists() and not output.is_dir():
        raise CheckpointError(f"{output} is a file; choose a folder with --output")
    runs = choose(ablation, plan_runs(ablation, output, _seeds(seeds)), _words(only))
    if dry_run:
        for run in runs:
            tell(_describe(run))
        return 0
    if table_only:
        if not _write(ablation, output, tell):
            raise CheckpointError(f"{output}: no run is finished; leave --table-only out")
        return 0
    with run_lock(output, "filled by an ablation"):
        code = run_all(runs, tell, lambda: _write(ablation, output, lambda line: None), train)
        _write(ablation, output, tell)
    return code


def _write(ablation: Ablation, output: Path, tell: Callable[[str], None]) -> bool:
    """Whether there was anything to write."""
    results, lost = collect(ablation, output)
    if not results:
        return False
    for file in write_results(ablation, results, output):
        tell(os.path.relpath(file))
    for metric, close in lost:
        tell(f"metric {metric.path}: no run has measured it{f'; did you mean {close}?' if close else ''}")
    return True


def _describe(run: PlannedRun) -> str:
    begins = f" from {run.source.name}" if run.source else ""
    changes = " ".join(run.overrides)
    return f"{run.look().value:8} {run.name}{begins}: {Path(run.file).stem} {changes}"


def _words(text: str | None) -> list[str]:
    return [word.strip() for word in (text or "").split(",") if word.strip()]


def _seeds(text: str | None) -> list[int] | None:
    if text is None:
        return None
    words = _words(text)
    if not words or not all(word.isdecimal() for word in words):
        raise UserError(f"--seeds {text}: write whole numbers with commas, such as 0,1,2")
    return [int(word) for word in words]
