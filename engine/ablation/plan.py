"""Which runs an ablation is made of, all of them checked, and what a folder already holds of one."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from ..deepspeed_config import build_deepspeed_config
from ..errors import CheckpointError, RecipeError
from ..recipe import Recipe
from ..recipe_files import RESUMABLE_FIELDS, load_recipe
from ..training.launcher import plan_ranks
from ..training.recipe_change import differences
from ..training.run_lock import LOCK
from ..training.status import read_status
from .description import Ablation, VariantSection, quoted

# Fields that may differ between a run and what the ablation would start: they change nothing that is measured.
FREE = ("name", "note", "output", "training.evaluate_every", *RESUMABLE_FIELDS)
GIVEN = {"seed": "--seeds", "output": "--output"}  # fields that are no variant's


class Start(Enum):
    """What is left to do for a run, by what its folder holds."""

    NEW = "new"
    AGAIN = "again"  # it ended before its first checkpoint
    RESUME = "resume"
    FINISHED = "finished"


@dataclass(frozen=True)
class PlannedRun:
    """One variant with one seed."""

    variant: VariantSection
    seed: int
    folder: Path
    file: str  # of its recipe
    overrides: tuple[str, ...]
    recipe: Recipe  # both together
    source: Path | None = None  # folder of the run that it starts from

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def arguments(self) -> list[str]:
        """As on the command line of ``crossmask train``."""
        return [self.file, *self.overrides, "--output", str(self.folder)]

    def look(self) -> Start:
        """What its folder holds.

        Raises:
            CheckpointError: something that is not this run.
        """
        present = {path.name for path in self.folder.iterdir()} - {LOCK} if self.folder.is_dir() else set()
        if self.folder.exists() and not self.folder.is_dir():
            raise CheckpointError(f"{self.folder} is a file; choose another folder with --output")
        if not present:
            return Start.AGAIN if self.folder.is_dir() else Start.NEW
        if "recipe.yaml" not in present:
            raise CheckpointError(f"{self.folder} holds files but no run; choose another folder with --output")
        self._compare()
        if read_status(self.folder).get("state") == "finished" and read_json(self.folder / "evaluation.json"):
            return Start.FINISHED
        return Start.RESUME if (self.folder / "checkpoints" / "latest").is_file() else Start.AGAIN

    def _compare(self) -> None:
        file = self.folder / "recipe.yaml"
        try:
            there = Recipe.model_validate(yaml.safe_load(file.read_text("utf-8")))
        except (OSError, ValueError, yaml.YAMLError, ValidationError):
            raise CheckpointError(
                f"{file} cannot be read as a recipe of this version of crossmask; move the folder away, or choose "
                "another with --output"
            ) from None
        found = [
            f"{name} is {_short(old)} there and {_short(new)} in the ablation"
            for name, old, new in differences(there, self.recipe)
            if name not in FREE and not (self.source and name == "model.initial" and _moved(old, new))
        ]
        if found:
            more = f" (and {len(found) - 1} more differences)" if len(found) > 1 else ""
            raise CheckpointError(
                f"{self.folder} is another run: {found[0]}{more}; repeat the overrides that it was begun with, choose "
                "another folder with --output, or remove this one"
            )


def plan_runs(ablation: Ablation, output: Path, seeds: Sequence[int] | None = None) -> list[PlannedRun]:
    """All runs in the order they are trained: every variant with the first seed, then with the next.

    Args:
        output: each run's folder is VARIANT-seedN in it. seeds: default, the ablation's.

    Raises:
        RecipeError: a variant whose recipe cannot be used; two variants that are the same run.
    """
    seeds = ablation.seeds if seeds is None else list(dict.fromkeys(seeds))
    runs = [_plan(ablation, v, seed, output.absolute()) for seed in seeds for v in ablation.variants]
    seen: dict[str, str] = {}
    for run in runs:
        same = seen.setdefault(_identity(run.recipe), run.name)
        if same != run.name:
            raise RecipeError(f"variants {same} and {run.name} would be the same run; let one of them differ")
    return runs


def choose(ablation: Ablation, runs: Sequence[PlannedRun], only: Sequence[str] = ()) -> list[PlannedRun]:
    """Those of the variants named in ``only``, by default all, once their folders have been looked at.

    Raises:
        RecipeError: no such variant; a run whose weights come from one that is neither chosen nor finished.
        CheckpointError: a folder that holds something else.
    """
    chosen = {ablation.variant(name).name for name in only} or {v.name for v in ablation.variants}
    by_folder = {run.folder: run for run in runs}
    wanted = [run for run in runs if run.variant.name in chosen]
    for run in wanted:
        run.look()
        needed = by_folder.get(run.source) if run.source else None
        if needed and needed not in wanted and needed.look() is not Start.FINISHED:
            raise RecipeError(
                f"--only: {run.name} starts from {needed.name}, which is not finished; add {needed.variant.name}"
            )
    return wanted


def read_json(file: Path) -> dict[str, Any]:
    """{} where there is none, or none that can be read."""
    try:
        found = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _plan(ablation: Ablation, variant: VariantSection, seed: int, output: Path) -> PlannedRun:
    changes = ablation.changes(variant)
    for change in changes:
        name = change.partition("=")[0].strip()
        if name in GIVEN:
            raise RecipeError(f"override {change}: an ablation's {name} is given with {GIVEN[name]}")
        if name == "model.initial" and variant.source:
            raise RecipeError(f"override {change}: variant {variant.name} starts from {variant.source} (its key from)")
    changes += [f"name={ablation.name}-{variant.name}", f"seed={seed}"]
    file = variant.recipe or ablation.recipe
    try:
        recipe = load_recipe(file, changes)
        ranks = plan_ranks(recipe)
        build_deepspeed_config(recipe, ranks.ranks, ranks.device_type)
    except RecipeError as error:
        raise RecipeError(f"variant {variant.name}: {error}") from None
    folder, source = output / f"{variant.name}-seed{seed}", None
    if variant.source:  # not there yet, which load_recipe would not have
        source = output / f"{variant.source}-seed{seed}"
        changes.append(f"model.initial={quoted(str(source))}")
        recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"initial": source})})
    return PlannedRun(variant, seed, folder, file, tuple(changes), recipe, source)


def _identity(recipe: Recipe) -> str:
    return json.dumps(recipe.model_dump(mode="json", exclude={"name", "note", "output"}), sort_keys=True)


def _moved(old: Any, new: Any) -> bool:
    """Whether both are the same run's folder, the ablation's own being elsewhere now."""
    return isinstance(old, str) and isinstance(new, str) and os.path.basename(old) == os.path.basename(new)


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}…"
