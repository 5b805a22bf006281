"""A model that lies on the disk, whatever wrote it: a run's checkpoint, an export, a converted checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..beats import beat
from ..data import CaptionTokenizer
from ..errors import CheckpointError
from ..exported import (
    CONFIG,
    ExportConfig,
    Weights,
    build_model,
    describe_export,
    read_config,
    read_tensors,
    read_tokenizer,
    read_weights,
)
from ..exported import QUEUE as EXPORTED_QUEUE
from ..exported import TEACHER as EXPORTED_TEACHER
from ..recipe import ModelSection, Recipe
from ..recipe_files import check_run_dir
from .checkpoint import CheckpointManager
from .checkpoint_state import QUEUE, RECIPE, STATE, TEACHER
from .manifest import STUDENT, entries, one_line
from .optimizer import parameter_groups
from .student_files import more_than_data
from .whole_student import whole_student


@dataclass(frozen=True)
class StoredModel:
    """``config`` is the student's where there is one, else the teacher's. Tensors are on the CPU."""

    config: ExportConfig
    tokenizer: CaptionTokenizer | None
    student: dict[str, Tensor] | None  # of PretrainingModel
    teacher: dict[str, Tensor] | None  # of VisionLanguageModel
    queue: dict[str, Tensor] | None  # FeatureQueue.state_dict


def read_stored(folder: Path, tell: Callable[[str], None] = lambda line: None) -> StoredModel:
    """All that a folder holds: a run's, of its latest good checkpoint, or one of ``crossmask export`` or ``convert``.

    Raises:
        CheckpointError: no such folder, or files that are damaged or do not fit together.
    """
    if _is_export(folder):
        return _read_exported(folder)
    recipe, step, found = read_run(folder, (STUDENT, TEACHER, QUEUE), tell=tell)
    assert found.student is not None
    return StoredModel(
        found.described(recipe, "student", step), found.tokenizer, found.student, found.teacher, found.queue
    )


def read_section(folder: Path) -> ModelSection:
    """What the model in a folder of :func:`read_stored` is, before its weights are read.

    Raises:
        CheckpointError: no such folder, or a description that is damaged.
    """
    return read_config(folder).model if _is_export(folder) else _recipe(folder / "recipe.yaml").model


def _is_export(folder: Path) -> bool:
    """Else it is a run's; CheckpointError where it is neither."""
    if (folder / CONFIG).is_file():
        return True
    if not (folder / "recipe.yaml").is_file():
        what = "no such folder" if not folder.is_dir() else f"neither {CONFIG} nor recipe.yaml is in it"
        raise CheckpointError(f"{folder}: {what}; give a folder of crossmask convert, crossmask export or a run")
    return False


def _read_exported(folder: Path) -> StoredModel:
    config, queue = read_config(folder), None
    tokenizer = read_tokenizer(folder, config)
    beat("reading weights")
    _, tensors = read_weights(folder, config, config.weights)
    if config.weights == "teacher":
        return StoredModel(config, tokenizer, None, tensors, None)
    teacher = read_weights(folder, config, "teacher")[1] if (folder / EXPORTED_TEACHER).is_file() else None
    if (folder / EXPORTED_QUEUE).is_file():
        queue = read_tensors(folder / EXPORTED_QUEUE)
        _check_queue(queue, config.model.projection_width, folder / EXPORTED_QUEUE)
    return StoredModel(config, tokenizer, tensors, teacher, queue)


def _check_queue(queue: dict[str, Tensor], width: int, file: Path) -> None:
    """A queue is left as it was written, or refused."""
    image, text, group, position = (queue.get(name) for name in ("image", "text", "group_id", "position"))
    fits = (
        image is not None and text is not None and group is not None and position is not None
        and image.shape == text.shape == (len(group), width)
        and group.ndim == 1 and position.shape == (2,) and len(group) <= int(position[0])
        and 0 <= int(position[1]) < max(1, int(position[0]))
    )  # fmt: skip
    if not fits:
        shown = "none" if image is None else tuple(image.shape)
        raise CheckpointError(
            f"{file}: not a queue for features of width {width} (its images are {shown}); remove it, or convert again"
        )


@dataclass(frozen=True)
class RunModel:
    """What was asked for of a run's checkpoint; None for the rest."""

    tokenizer: CaptionTokenizer
    teacher: dict[str, Tensor]
    student: dict[str, Tensor] | None
    queue: dict[str, Tensor] | None

    def described(self, recipe: Recipe, weights: Weights, step: int) -> ExportConfig:
        """What the teacher or the student is, with the ids that the run's tokenizer has for [PAD] and [MASK]."""
        tensors = self.teacher if weights == "teacher" else self.student
        assert tensors is not None
        return describe_export(recipe, weights, tensors, step, tokenizer=self.tokenizer)


def read_run(
    run: Path, wanted: Collection[str], step: int | None = None, tell: Callable[[str], None] = lambda line: None
) -> tuple[Recipe, int, RunModel]:
    """The latest good checkpoint of a run, or that of ``step``: its recipe, its step and what is ``wanted`` of
    ``student``, ``teacher.safetensors`` and ``queue.safetensors``; the teacher comes in any case.

    No data and no GPU are needed; for the student DeepSpeed is. ``tell`` takes one line at a time.

    Raises:
        CheckpointError: no run, no usable checkpoint, files that do not fit together.
    """
    whole_run = check_run_dir(run)
    read = {RECIPE, STATE, TEACHER, *wanted}

    def needed(name: str) -> bool:
        return name in read or (STUDENT in read and name.startswith(f"{STUDENT}/"))

    checkpoint, state = CheckpointManager(run, warn=tell).verified(step, needed, tell)
    recipe = _recipe(checkpoint / RECIPE if RECIPE in entries(checkpoint) else whole_run)
    tokenizer = CaptionTokenizer.load(run / "tokenizer.json")
    teacher = _tensors(checkpoint / TEACHER)
    student = None
    if STUDENT in read:
        if problem := more_than_data(checkpoint / STUDENT):
            raise CheckpointError(f"{checkpoint}: {problem}; it was not opened")
        tell(f"putting the student together: ZeRO stage {state.zero_stage}, saved by {state.world_size} ranks")
        student = whole_student(checkpoint / STUDENT, state.zero_stage, _trained(recipe, teacher, tokenizer))
    queue = _tensors(checkpoint / QUEUE) if QUEUE in read else None
    return recipe, state.step, RunModel(tokenizer, teacher, student, queue)


def _recipe(file: Path) -> Recipe:
    """Read as it is: where the run's data lay does not matter here."""
    try:
        return Recipe.model_validate(yaml.safe_load(file.read_text(encoding="utf-8")))
    except (OSError, yaml.YAMLError, UnicodeDecodeError, ValidationError) as error:
        raise CheckpointError(f"{file} is not a recipe of this version of crossmask: {one_line(error)[:120]}") from None


def _tensors(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file} cannot be read: {one_line(error)}") from None


def _trained(recipe: Recipe, teacher: dict[str, Tensor], tokenizer: CaptionTokenizer) -> list[list[str]]:
    """The names in each parameter group of the student's optimizer, in its order. The teacher tells the sizes."""
    config = describe_export(recipe, "teacher", teacher, 0, tokenizer=tokenizer).model_copy(
        update={"weights": "student"}
    )
    with torch.device("meta"):
        student = build_model(config)
    names = {id(parameter): name for name, parameter in student.named_parameters()}
    groups = parameter_groups(student, recipe.optimizer)
    return [[names[id(parameter)] for parameter in group["params"]] for group in groups]
