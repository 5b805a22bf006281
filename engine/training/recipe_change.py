"""What may differ between the recipe that a checkpoint was trained with and the one it is resumed with.

``--resume`` takes the run's own recipe, but that is a file, and people edit files.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from ..errors import CheckpointError
from ..recipe import Recipe
from ..recipe_files import RESUMABLE_FIELDS

# These give the saved numbers their meaning: shapes, the order of the data, what a step is.
REFUSED = (
    *("seed", "data", "model", "masking", "objectives", "deepspeed"),
    *("training.batch_size", "training.accumulation_steps", "training.precision"),
)
# These change neither the state nor the losses. Where data lie is free: their fingerprint says whether they are others.
FREE = (
    *RESUMABLE_FIELDS,
    *("name", "note", "output", "evaluation", "training.cpu_ranks", "data.path", "data.image_root"),
    *("training.evaluate_every", "training.max_nonfinite"),
)


def check_recipe(saved: str, recipe: Recipe, checkpoint: str) -> list[str]:
    """Compare a checkpoint's own recipe, as YAML, with the run's; returns a remark for each change that moves losses.

    CheckpointError for a change that would give the saved state another meaning, and for a recipe of another version.
    """
    try:
        before = Recipe.model_validate(yaml.safe_load(saved))
    except (ValidationError, yaml.YAMLError):
        raise CheckpointError(
            f"{checkpoint}: its recipe is of another version of crossmask; start the run again"
        ) from None
    remarks = []
    for name, old, new in differences(before, recipe):
        if _within(name, FREE):
            continue
        change = f"{name} was {_text(old)} when {checkpoint} was saved and is {_text(new)} in the recipe now"
        if _within(name, ("masking",)) and _moved(old, new):
            remarks.append(f"{change}: the losses are those of an uninterrupted run if the file is the same")
            continue
        if _within(name, REFUSED):
            raise CheckpointError(f"{change}: set it back, or start a new run")
        remarks.append(f"{change}: the losses are no longer those of an uninterrupted run")
    return remarks


def differences(before: Recipe, now: Recipe) -> Iterator[tuple[str, Any, Any]]:
    """Dotted name and both values, as in JSON, of every field that is not the same."""
    old, new = (dict(_flat(recipe.model_dump(mode="json"))) for recipe in (before, now))
    for name in sorted(old.keys() | new.keys()):
        if old.get(name) != new.get(name):
            yield name, old.get(name), new.get(name)


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):  # an empty one has nothing to tell beside one that is not
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _within(name: str, fields: tuple[str, ...]) -> bool:
    return any(name == field or name.startswith(field + ".") for field in fields)


def _moved(old: Any, new: Any) -> bool:
    """Whether both are paths (a recipe's are absolute) of files of one name."""
    return (
        all(isinstance(one, str) and Path(one).is_absolute() for one in (old, new)) and Path(old).name == Path(new).name
    )


def _text(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
