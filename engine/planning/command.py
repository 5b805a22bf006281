"""``crossmask plan``: what a recipe would need and take on GPUs that need not be there."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from crossmask.kernels.roofline import DEVICES

from ..atomic import replace_file
from ..errors import RecipeError, UserError, nearest
from ..recipe import Recipe
from ..recipe_files import WEIGHT_FIELDS, load_recipe
from .advice import help_for
from .display import show
from .estimate import described, plan
from .tally import Rates

WIDTH = 80
UNREAD = ("data.validation_path", "data.image_root", "data.vocabulary", "evaluation.prompts", *WEIGHT_FIELDS)


def plan_recipe(
    path: str,
    overrides: Sequence[str],
    gpus: int,
    gpu: str,
    output: Path | None = None,
    efficiency: float | None = None,
    console: Console | None = None,
) -> None:
    """Print the plan, and write it to ``output`` as JSON.

    Raises:
        UserError: an unknown GPU, a number that cannot be one of GPUs, a batch that does not divide, a recipe that fits
            at no stage; what is known of the last is printed before.
    """
    if gpu not in DEVICES:
        begin = (name for name in DEVICES if gpu and name.startswith(gpu.lower()))  # a100 is by letters nearer to h100
        close = next(begin, None) or nearest(gpu.lower(), DEVICES)
        hint = f"did you mean {close}? " if close else ""
        raise UserError(f"--gpu {gpu}: {hint}known are {', '.join(DEVICES)}")
    if gpus < 1:
        raise UserError(f"--gpus {gpus}: give how many GPUs train together, at least 1")
    rates = Rates()
    if efficiency is not None:
        if not 0 < efficiency <= 1:
            raise UserError(f"--efficiency {efficiency:g}: give a share of the peak above 0, up to 1, such as 0.6")
        rates = Rates(matrix=efficiency)
    recipe = load_unopened(path, overrides)
    if recipe.model.system is not None:
        raise RecipeError(
            f"{path}: a plan counts what crossmask's own models do, and knows none of {recipe.model.system}"
        )
    found = plan(recipe, DEVICES[gpu], gpus, rates)
    show(found, console or Console(width=WIDTH, highlight=False))
    if output is not None:
        try:
            replace_file(output, json.dumps(described(found), indent=1) + "\n")
        except OSError as error:
            raise UserError(f"--json {output}: cannot be written: {error.strerror}; choose another file") from None
    if found.recommended is None:
        raise RecipeError(
            f"{found.recipe.name}: {found.pairs} pairs a GPU fit into no {found.device.name} at any ZeRO stage;"
            f" {help_for(found)}"
        )


def load_unopened(path: str, overrides: Sequence[str]) -> Recipe:
    """The recipe, whether the data and the first weights that it names are there or not: a plan reads neither."""
    kept = [one for one in overrides if one.partition("=")[0] not in (*UNREAD, "data.path")]
    absent = [f"{name}=null" for name in UNREAD]
    return load_recipe(path, [*kept, "data.path=.", *absent])
