"""Zero-shot classification: an image is of the class whose prompts its feature is nearest to (Radford et al. 2021).

A class's embedding is the mean, normalised again, of the normalised features of its name, or names, in every template.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..beats import beat
from ..data.base import EvaluationSplit
from ..data.classes import classes_of
from ..data.pair_layouts import lone_surrogate
from ..data.tokenizer import CaptionTokenizer
from ..errors import RecipeError
from ..models.system import encode_image, encode_text
from .embedding import BATCH, Progress
from .linear_probe import scores

TEMPLATES = ("{}",)  # where no file says more: captions that are names need no sentence around them
TOP = 5
FORMAT = (
    'give {"templates": ["a photo of a {}", …], "classes": {"class": "name" or ["name", …], …} or ["class", …]}, and if'
    ' the classes are sub-categories "level": "subcategory"'
)


@dataclass(frozen=True)
class Prompts:
    """Classes of one level, by the text that the data have for them, with the names by which they are asked for."""

    level: str
    classes: Mapping[str, tuple[str, ...]]
    templates: tuple[str, ...] = TEMPLATES


def read_prompts(file: Path) -> Prompts:
    """``evaluation.prompts``.

    Raises:
        RecipeError: one line: what in the file cannot be used.
    """
    where = f"evaluation.prompts: {file}"
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"{where} cannot be read: {error.strerror}; {FORMAT}") from None
    except ValueError as error:
        raise RecipeError(f"{where} is no JSON ({error}); {FORMAT}") from None
    if not isinstance(found, dict) or "classes" not in found:
        raise RecipeError(f"{where} has no classes; {FORMAT}")
    if unknown := sorted(found.keys() - {"classes", "templates", "level"}):
        raise RecipeError(f"{where} has the unknown key {unknown[0]!r}; {FORMAT}")
    classes, level = found["classes"], found.get("level", "category")
    if isinstance(classes, list) and all(isinstance(name, str) for name in classes):
        classes = {name: name for name in classes}
    if not isinstance(classes, dict) or not isinstance(level, str):
        raise RecipeError(f"{where}: its classes are neither a list of names nor a mapping; {FORMAT}")
    named = {name: (given,) if isinstance(given, str) else given for name, given in classes.items()}
    for name, given in named.items():
        if not given or not isinstance(given, (list, tuple)) or not all(isinstance(x, str) and x for x in given):
            raise RecipeError(f"{where}: class {name!r} has no name to ask for it by; {FORMAT}")
    if len(named) < 2:
        raise RecipeError(
            f"{where} has {len(named) or 'no'} class{'es' * (not named)}, which leaves nothing to tell apart; {FORMAT}"
        )
    templates = found.get("templates", list(TEMPLATES))
    if not isinstance(templates, list) or not templates:
        raise RecipeError(f"{where}: its templates are no list of texts; {FORMAT}")
    for template in templates:
        if not isinstance(template, str) or template.count("{}") != 1:
            raise RecipeError(f"{where}: template {template!r} must have {{}} once, where the name goes")
    for text in (*templates, *named, *(name for given in named.values() for name in given)):
        if half := lone_surrogate(text):
            raise RecipeError(f"{where}: {text[:40]!r} has {half}; write the whole character, or remove it")
    return Prompts(level, {name: tuple(given) for name, given in named.items()}, tuple(templates))


def levels_of(split: EvaluationSplit) -> dict[str, np.ndarray]:
    """What is asked without a file: each level of classes, and names where a source has them; level -> (N,) text."""
    names = {} if split.names is None else {"name": split.names}
    return {**split.labels, **names}


def check_prompts(prompts: Prompts, splits: Mapping[str, EvaluationSplit]) -> None:
    """RecipeError, one line, where no image is of any class that is asked for."""
    given = {name: split.labels[prompts.level] for name, split in splits.items() if prompts.level in split.labels}
    if not given:
        raise RecipeError(
            f"evaluation.prompts: the images have no {prompts.level}; add the column {prompts.level} to the pairs, or"
            " leave evaluation.prompts out"
        )
    there = sorted({name for labels in given.values() for name in classes_of(labels)})
    if not prompts.classes.keys() & set(there):
        raise RecipeError(
            f"evaluation.prompts: no image is of any of its classes ({', '.join(list(prompts.classes)[:3])}, …): the"
            f" column {prompts.level} has {', '.join(there[:3])}, …"
        )


@torch.no_grad()
def zero_shot(
    model: Any,
    split: EvaluationSplit,
    tokenizer: CaptionTokenizer,
    longest: int,
    device: torch.device | str,
    prompts: Prompts | None = None,
    progress: Callable[[str], None] = lambda text: None,
) -> dict[str, dict[str, Any]]:
    """A split's ``zero_shot`` of ``evaluation.json``: by level the accuracy (top 1 and 5) and macro-F1, in %, over the
    images that are of one of the classes; ``unlabelled`` counts the others.

    Without ``prompts`` the classes of a level are those of the split's images, asked for by what they are called.
    Prompts are cut at ``longest`` tokens.
    """
    levels = levels_of(split)
    if prompts is not None:
        levels = {prompts.level: levels[prompts.level]} if prompts.level in levels else {}
    asked = {
        level: prompts or Prompts(level, {name: (name,) for name in classes_of(names)})
        for level, names in levels.items()
    }
    asked = {level: own for level, own in asked.items() if len(own.classes) > 1}
    if not asked:
        return {}
    told, features = Progress(progress), []
    for start, batch in zip(range(0, split.image_count, BATCH), split.images(BATCH), strict=True):
        beat("evaluation: encoding images")
        told("zero-shot: images encoded", start, split.image_count)
        features.append(encode_image(model, batch.images.to(device)).feature.float())
    images = torch.cat(features)
    found = {}
    for level, own in asked.items():
        number = {name: n for n, name in enumerate(own.classes)}
        label = torch.tensor([number.get(name, -1) for name in levels[level].tolist()])
        known = label >= 0
        if not known.any():
            continue
        classes = class_embeddings(model, own, tokenizer, longest, device)
        similarity = images[known.to(images.device)] @ classes.T
        found[level] = {
            "classes": len(number),
            "images": int(known.sum()),
            "unlabelled": int((~known).sum()),
            "templates": len(own.templates),
            **class_scores(similarity.cpu(), label[known]),
            "chance": 100 / len(number),
        }
    return found


def class_embeddings(
    model: Any, prompts: Prompts, tokenizer: CaptionTokenizer, longest: int, device: torch.device | str
) -> Tensor:
    """(classes, E) float32, length 1."""
    texts = [[t.replace("{}", name) for t in prompts.templates for name in given] for given in prompts.classes.values()]
    flat = [text for own in texts for text in own]
    features = []
    for start in range(0, len(flat), BATCH):
        beat("evaluation: encoding prompts")
        ids, mask = tokenizer.batch(flat[start : start + BATCH], longest)
        features.append(encode_text(model, ids.to(device), mask.to(device)).feature.float())
    parts = torch.cat(features).split([len(own) for own in texts])
    return F.normalize(torch.stack([part.mean(0) for part in parts]), dim=-1)


def class_scores(similarity: Tensor, label: Tensor) -> dict[str, float]:
    """(N, K) similarities and (N,) int64 classes -> % right at 1 and 5, and macro-F1 in %. A class as near as the right
    one comes before it; NaN is never right."""
    own = similarity.gather(1, label[:, None])
    others = (similarity >= own).sum(1) - 1
    others = torch.where(own[:, 0].isnan(), similarity.shape[1], others)
    predicted = torch.where(others == 0, label, _rival(similarity, label))
    return {
        "top1": 100 * float((others == 0).double().mean()),
        f"top{TOP}": 100 * float((others < TOP).double().mean()),
        "macro_f1": scores(predicted, label)["macro_f1"],
    }


def _rival(similarity: Tensor, label: Tensor) -> Tensor:
    """(N,) int64: the nearest of the other classes."""
    return similarity.nan_to_num(-torch.inf).scatter(1, label[:, None], -torch.inf).argmax(1)
