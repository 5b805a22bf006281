"""``crossmask export``: a run's teacher or student, from a checkpoint of any ZeRO stage and world size, as a folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import yaml
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from .data import CaptionTokenizer
from .errors import CheckpointError
from .exported import DTYPES, Weights, build_model, describe_export, refuse_occupied, save_exported
from .recipe import Recipe
from .recipe_files import check_run_dir
from .training.checkpoint import CheckpointManager
from .training.checkpoint_state import RECIPE, STATE, TEACHER
from .training.manifest import STUDENT, entries, one_line
from .training.optimizer import parameter_groups
from .training.student_files import more_than_data
from .training.whole_student import whole_student


def export_run(
    run: Path,
    folder: Path,
    weights: Weights = "teacher",
    step: int | None = None,
    dtype: str = "fp32",
    force: bool = False,
    tell: Callable[[str], None] = lambda line: None,
) -> str:
    """Write ``run``'s latest good checkpoint, or that of ``step``, to ``folder``; returns a line that says what it is.

    No data and no GPU are needed; for the student DeepSpeed is. ``tell`` takes one line at a time.

    Raises:
        CheckpointError: no run, no usable checkpoint, files that do not fit together, a folder that is in the way.
    """
    if dtype not in DTYPES:
        raise CheckpointError(f"--dtype {dtype}: choose {', '.join(DTYPES)}")
    refuse_occupied(folder, force)
    whole_run = check_run_dir(run)
    read = {RECIPE, STATE, TEACHER}  # a teacher needs no more
    checkpoint, state = CheckpointManager(run, warn=tell).verified(
        step, lambda name: weights == "student" or name in read, tell
    )
    recipe = _recipe(checkpoint / RECIPE if RECIPE in entries(checkpoint) else whole_run)
    tokenizer = CaptionTokenizer.load(run / "tokenizer.json")
    tensors = _teacher(checkpoint)
    if weights == "student":
        if problem := more_than_data(checkpoint / STUDENT):
            raise CheckpointError(f"{checkpoint}: {problem}; it was not opened")
        tell(f"putting the student together: ZeRO stage {state.zero_stage}, saved by {state.world_size} ranks")
        tensors = whole_student(checkpoint / STUDENT, state.zero_stage, _trained(recipe, tensors))
    config = describe_export(recipe, weights, tensors, state.step, dtype)
    save_exported(folder, tensors, config, tokenizer, force)
    size = sum(file.stat().st_size for file in folder.iterdir())
    return (
        f"{folder}: the {weights} after {state.step:,} steps, {config.parameters:,} parameters in {dtype}, "
        f'{size / 1e6:,.1f} MB; load it with load_exported("{folder}"), see {folder / "README.md"}'
    )


def _recipe(file: Path) -> Recipe:
    """Read as it is: where the run's data lay does not matter here."""
    try:
        return Recipe.model_validate(yaml.safe_load(file.read_text(encoding="utf-8")))
    except (OSError, yaml.YAMLError, UnicodeDecodeError, ValidationError) as error:
        raise CheckpointError(f"{file} is not a recipe of this version of crossmask: {one_line(error)[:120]}") from None


def _teacher(checkpoint: Path) -> dict[str, Tensor]:
    try:
        return load_file(checkpoint / TEACHER)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{checkpoint / TEACHER} cannot be read: {one_line(error)}") from None


def _trained(recipe: Recipe, teacher: dict[str, Tensor]) -> list[list[str]]:
    """The names in each parameter group of the student's optimizer, in its order. The teacher tells the sizes."""
    config = describe_export(recipe, "teacher", teacher, 0).model_copy(update={"weights": "student"})
    with torch.device("meta"):
        student = build_model(config)
    names = {id(parameter): name for name, parameter in student.named_parameters()}
    groups = parameter_groups(student, recipe.optimizer)
    return [[names[id(parameter)] for parameter in group["params"]] for group in groups]
