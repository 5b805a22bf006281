"""A run in its folder: what a checkpoint holds besides weights, queue and random states, and how a run goes on from it.

The loop and a user's own loop save the same, so that either goes on from what the other saved.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..atomic import replace_file
from ..errors import CheckpointError, RecipeError
from ..recipe_files import dump_recipe
from ..teacher.gather import world_size
from .checkpoint_state import CheckpointState

if TYPE_CHECKING:
    from .pretrainer import Pretrainer

STATE_KEYS = {"data", "skipped_steps", "skipped_in_a_row", "temperature", "trained_s", "unlogged"}


def begin_folder(pretrainer: Pretrainer, run_dir: Path) -> None:
    """What makes a folder a run's: its recipe and its tokenizer. On one rank.

    Raises:
        RecipeError: it cannot be written.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        replace_file(run_dir / "recipe.yaml", dump_recipe(pretrainer.recipe))
        pretrainer.data.tokenizer.save(run_dir / "tokenizer.json")
    except OSError as error:
        raise RecipeError(
            f"output: {run_dir} cannot be written: {error.strerror}; choose another with --output"
        ) from None


def state_of(pretrainer: Pretrainer) -> dict[str, Any]:
    """What goes into ``state.json``. Collective where heads are masked by importance."""
    extra: dict[str, Any] = {
        "data": pretrainer.data.fingerprint(),
        "skipped_steps": pretrainer.guard.skipped,
        "skipped_in_a_row": pretrainer.guard.in_a_row,
        "temperature": pretrainer.temperature,
        "trained_s": pretrainer.trained_s,
        "unlogged": [{}] * world_size(),  # what each rank has summed since the last record: the loop's
    }
    if pretrainer.recipe.masking.heads.kind == "importance":
        extra["head_importance"] = pretrainer.head_importance().tolist()
    return extra


def restore_state(pretrainer: Pretrainer, state: CheckpointState, run_dir: Path) -> None:
    """Go on from a checkpoint whose weights, queue and random states are in place.

    Raises:
        CheckpointError: it is of another version, or of other data.
    """
    extra = state.extra
    unknown = sorted(STATE_KEYS - set(extra))
    if unknown:
        raise CheckpointError(
            f"{run_dir}: its checkpoint was saved by another version of crossmask (no {unknown[0]}); "
            "start the run again"
        )
    if extra["data"] != pretrainer.data.fingerprint():
        raise CheckpointError(
            f"{run_dir}: the training data are not those the run began with; restore them or start a new run"
        )
    pretrainer.go_on(state.step, float(extra["temperature"]), float(extra["trained_s"]))
    guard = pretrainer.guard
    guard.skipped, guard.in_a_row = int(extra["skipped_steps"]), int(extra["skipped_in_a_row"])
    if "head_importance" in extra:
        pretrainer.restore_head_importance(torch.tensor(extra["head_importance"]))
