"""What is measured where words are written or asked for: captions of held-out images, and zero-shot classification."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from ..data.base import PairData
from ..models.captioner import CaptioningModel
from ..recipe import Recipe
from .captioning import captioning, write_captions
from .zero_shot import Prompts, check_prompts, read_prompts, zero_shot


def prompts_of(recipe: Recipe, data: PairData) -> Prompts | None:
    """Those of ``evaluation.prompts``; None without. RecipeError, one line, where they do not go with the data."""
    if recipe.evaluation.prompts is None:
        return None
    found = read_prompts(recipe.evaluation.prompts)
    if data.splits:
        check_prompts(found, data.splits)
    return found


def written(
    model: Any,
    data: PairData,
    recipe: Recipe,
    device: torch.device | str,
    progress: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """``captioning`` and ``zero_shot`` of ``evaluation.json``, each by split: captions of a model that writes them,
    ``evaluation.captioning.samples`` a split; classes of such a model, and of any where ``evaluation.prompts`` are
    given. For a model in evaluation mode."""
    writes, tokenizer, prompts = isinstance(model, CaptioningModel), data.tokenizer, prompts_of(recipe, data)
    found: dict[str, Any] = {}
    if writes and recipe.evaluation.captioning.samples:
        found["captioning"] = {}
        for name, split in data.splits.items():
            heading = f"captions: {split.title}"
            progress(heading)
            captions = write_captions(model, split, tokenizer, recipe, device, partial(_under, progress, heading))
            shown = recipe.evaluation.captioning.shown
            found["captioning"][name] = {
                "title": split.title,
                **captioning(captions),
                "examples": captions.examples(shown),
            }
    if writes or prompts is not None:
        classes = {}
        for name, split in data.splits.items():
            progress(f"zero-shot: {split.title}")
            classes[name] = zero_shot(model, split, tokenizer, data.max_tokens, device, prompts, progress)
        if any(classes.values()):
            found["zero_shot"] = {name: levels for name, levels in classes.items() if levels}
    return found


def _under(progress: Callable[[str], None], heading: str, text: str) -> None:
    progress(f"{heading}: {text}")
