"""What lies in a checkpoint's folder, by name, and what the checkpoint says of itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from .manifest import entries, find_damage, one_line

STATE, RECIPE = "state.json", "recipe.yaml"
TEACHER, QUEUE = "teacher.safetensors", "queue.safetensors"


@dataclass(frozen=True)
class CheckpointState:
    """``extra`` is what the loop passed to save()."""

    step: int
    world_size: int
    zero_stage: int
    teacher_updates: int
    extra: dict[str, Any] = field(default_factory=dict)


Inspection = tuple[str | None, CheckpointState | None]  # what is damaged; else the state
_LEAST = {"step": 0, "world_size": 1, "zero_stage": 0, "teacher_updates": 0}


def read_state(checkpoint: Path) -> CheckpointState:
    """The state of a checkpoint whose files match its manifest.

    CheckpointError where it cannot be read, is of another version, or the manifest does not name what it implies.
    """
    try:
        values = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
        named = entries(checkpoint).keys()
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{STATE}: {one_line(error)}") from None
    if not isinstance(values, dict) or values.keys() != {*_LEAST, "extra"}:
        raise CheckpointError(f"{STATE}: other keys, it is of another version of crossmask")
    right = all(type(values[name]) is int and values[name] >= least for name, least in _LEAST.items())
    if not right or not isinstance(values["extra"], dict):
        raise CheckpointError(f"{STATE}: other types, it is of another version of crossmask")
    state = CheckpointState(**values)
    for name in (STATE, TEACHER, QUEUE, *map(random_file, range(state.world_size))):
        if name not in named:
            raise CheckpointError(f"{name}: not in the manifest, it is of another version of crossmask")
    return state


def inspect(
    checkpoint: Path, part: int = 0, parts: int = 1, needed: Callable[[str], bool] = lambda name: True
) -> Inspection:
    """find_damage(), and what the checkpoint says of itself where there is none. Local."""
    damage = find_damage(checkpoint, part, parts, needed)
    try:
        return (damage, None) if damage else (None, read_state(checkpoint))
    except CheckpointError as error:
        return str(error), None


def random_file(rank: int) -> str:
    """Where a rank keeps its random generators."""
    return f"rng-rank{rank:02d}.safetensors"
