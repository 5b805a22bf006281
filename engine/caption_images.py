"""``crossmask caption``: what a trained captioner writes under a user's own pictures."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from .data.pictures import read_picture
from .errors import CheckpointError, DataError, RecipeError
from .evaluation.generation import generate
from .export_config import Weights
from .exported import prepare_images
from .model_evaluation import open_model
from .models.captioner import CaptioningModel
from .recipe_sections_evaluation import CaptioningSection

MAX_BEAMS = 64  # each costs as much as one more picture
_ROWS = 192  # beginnings that are read at once: what the section's own batch and beams come to
_FIELD = re.compile(rf"\b(?:{'|'.join(CaptioningSection.model_fields)})\b")


def _as_option(field: object) -> str:
    """A field, or what :data:`_FIELD` found, as the command line has it."""
    name = field[0] if isinstance(field, re.Match) else str(field)
    return f"--{name.replace('_', '-')}"


def caption_images(
    folder: Path,
    images: Sequence[Path],
    options: dict[str, Any],
    seed: int = 0,
    weights: Weights | None = None,
    tell: Callable[[str], None] = lambda line: None,
) -> Iterator[tuple[Path, str, float]]:
    """Each picture with its caption and the caption's log-probability a token, in nats.

    Args:
        folder: of a run, of ``crossmask export`` or of ``crossmask convert open-clip``.
        options: fields of :class:`CaptioningSection` to change.

    Raises:
        CheckpointError: no such model, or one that writes no captions. DataError: a picture that cannot be read.
        RecipeError: an option that cannot be used. One line each.
    """
    try:
        section = CaptioningSection.model_validate(options)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        if first["type"] == "value_error":  # fields that disagree: the message names them
            raise RecipeError(re.sub(_FIELD, _as_option, str(first["ctx"]["error"]))) from None
        raise RecipeError(f"{_as_option(first['loc'][0])}: {first['msg'].lower()}") from None
    if section.beams > MAX_BEAMS:
        raise RecipeError(f"--beams {section.beams}: a search keeps at most {MAX_BEAMS}; give {MAX_BEAMS} or fewer")
    for image in images:
        if not image.is_file():
            what = "it is a folder; name the pictures in it" if image.is_dir() else "no such file; correct its name"
            raise DataError(f"{image}: {what}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    trained = open_model(folder, weights, device, tell)
    model = trained.model
    if not isinstance(model, CaptioningModel):
        raise CheckpointError(
            f"{folder} writes no captions: it has no text decoder (model.captioner); take one that has"
        )
    longest = model.text.max_length - 1  # [CLS] has a place as well
    if section.max_tokens is not None and section.max_tokens > longest:
        tell(f"--max-tokens {section.max_tokens}: this model's longest caption has {longest} tokens, which are taken")
    at_once = max(1, min(section.batch_size, _ROWS // section.beams))
    for start in range(0, len(images), at_once):
        paths = images[start : start + at_once]
        pixels = prepare_images([read_picture(str(path)) for path in paths], trained.config)
        index = torch.arange(start, start + len(paths))
        with torch.no_grad():
            context = model.context(model.encode_image(pixels.to(device), feature=False))
            found = generate(model, context, section, trained.tokenizer, seed, index)
        per_token = (found.score / found.length).tolist()
        for path, ids, value in zip(paths, found.token_ids.cpu(), per_token, strict=True):
            yield path, trained.tokenizer.text(ids), value
