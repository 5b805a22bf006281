"""``crossmask data masks``: what a recipe would hide, drawn on its own data before anything is trained, or after."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from .data import PairData, load_data
from .data.batch import Batch
from .errors import CheckpointError, RecipeError
from .evaluation.evaluate import frozen, sample
from .evaluation.mask_pictures import draw_masks
from .exported import MODEL
from .masking import MaskPlan
from .objectives import RunMasks
from .recipe import Recipe
from .recipe_files import load_recipe
from .training.systems import build_system

FORMATS = (".png", ".jpg", ".jpeg", ".webp")


def preview(recipe: str, overrides: Sequence[str], output: Path, pairs: int, step: int | None) -> Iterator[str]:
    """Draw ``pairs`` held-out pairs (or training pairs where nothing is held out) with their masks to ``output``.

    ``recipe`` is a recipe, or a run's folder, whose trained teacher then chooses. Yields lines for the user.

    Raises:
        RecipeError, DataError, CheckpointError: one line each.
    """
    if output.suffix.lower() not in FORMATS:
        raise RecipeError(f"--output: {output} is no picture's name; end it in one of {', '.join(FORMATS)}")
    run = Path(recipe)
    trained = run.is_dir() and (run / "recipe.yaml").is_file()
    # a run may be somebody else's: its recipe names no code to import here, an override may
    described = load_recipe(run / "recipe.yaml" if trained else recipe, overrides, trusted=not trained)
    if described.model.system is not None:
        raise RecipeError(f"{recipe}: masks are drawn of crossmask's own models, not of {described.model.system}")
    data = load_data(described)
    masks = RunMasks(described, data)
    model = load_teacher(run, described, data, masks) if trained else fresh_teacher(described, data, masks)
    batch = pick(described, data, pairs) if data.splits else masks.add_priors(pick(described, data, pairs))
    moment = described.training.max_steps if step is None else step
    plan = plan_for(described, model, masks, batch, moment)
    picture = draw_masks(batch, plan, model.patch_grid, data.tokenizer, data.normalisation)
    part = output.with_name(f".{output.name}.part")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        picture.save(part, format={".jpg": "jpeg"}.get(output.suffix.lower(), output.suffix.lower()[1:]))
        os.replace(part, output)
    except OSError as error:
        raise RecipeError(f"--output: {output} cannot be written: {error.strerror or error}") from None
    words = plan.text.sum() / batch.maskable.sum().clamp(min=1)
    hidden = ", ".join(f"{view.float().mean():.0%}" for view in plan.images)
    yield f"{described.masking.policy} at step {moment} hides {hidden} of the patches and {words:.0%} of the words"
    if not trained:
        yield "the teacher is untrained, so what it attends to is chance; give a run's folder to see a trained one"
    yield str(output)


def pick(recipe: Recipe, data: PairData, count: int) -> Batch:
    """Some pairs, in a fixed random order."""
    if data.splits:
        return sample(next(iter(data.splits.values())), count, recipe.seed)
    order = np.random.Generator(np.random.Philox(key=[recipe.seed, 0])).permutation(data.train_size)
    return data.train_batch(order[:count], 0)


def plan_for(recipe: Recipe, model: Any, masks: RunMasks, batch: Batch, step: int) -> MaskPlan:
    with frozen(model, recipe.seed):
        return masks.plan(model, batch, masks.see(model, batch), step)


def fresh_teacher(recipe: Recipe, data: PairData, masks: RunMasks) -> Any:
    """The teacher of a run that has not begun."""
    torch.manual_seed(recipe.seed)
    return build_system(recipe, data, masks).build_teacher()


def load_teacher(run: Path, recipe: Recipe, data: PairData, masks: RunMasks) -> Any:
    """The exported teacher of a finished run; a policy's network, or block, that the run did not have stays fresh."""
    file = run / "export" / MODEL
    if not file.is_file():
        raise CheckpointError(f"{run}: no export/{MODEL}, so the run is not finished; wait, or --resume it")
    model = fresh_teacher(recipe, data, masks)
    try:
        weights: dict[str, Any] = load_file(file)
        missing, unexpected = model.load_state_dict(weights, strict=False)
    except (SafetensorError, OSError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{file} does not fit the recipe: {reason[:200]}") from None
    of_masks = ("mask_network.", "word_reader.")
    missing = [name for name in missing if not name.startswith(of_masks)]
    unexpected = [name for name in unexpected if not name.startswith(of_masks)]
    if missing or unexpected:
        raise CheckpointError(f"{file} does not fit the recipe: {(missing or unexpected)[0]} is not in both")
    return model
