"""Tiny captioners, recipes and batches that the tests of SyCoCa share."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from crossmask.engine.data.batch import Batch
from crossmask.engine.models.captioner_student import CaptioningStudent
from crossmask.engine.objectives import RunMasks
from crossmask.engine.recipe import Recipe

VOCABULARY, LONGEST = 40, 9
OFF = {"itm": {"weight": 0.0}, "mlm": {"weight": 0.0}, "mim": {"weight": 0.0}}
TOWER = {"depth": 2, "heads": 2, "mlp_ratio": 2.0}
TINY: dict[str, Any] = {
    "model": {
        "image": {**TOWER, "size": 16, "patch_size": 4, "width": 24},
        "text": {**TOWER, "width": 16, "dropout": 0.0},
        "captioner": {"depth": 2, "heads": 2, "mlp_ratio": 2.0},
        "projection_width": 8,
    },
    "masking": {"policy": "sycoca", "options": {"side": "both"}, "image_ratio": 0.5, "text_ratio": 0.0},
    "objectives": {"itc": {"queue_length": 0, "distillation": 0.0}, "caption": {}, "tg_mim": {}, **OFF},
    "optimizer": {"lr": 1e-3, "warmup_steps": 0},
    "training": {"batch_size": 8, "max_steps": 4, "precision": "fp32"},
}


def recipe(**changes: Any) -> Recipe:
    """TINY with changes by dotted path, ``__`` for the dot."""
    return Recipe.model_validate(changed({path.replace("__", "."): value for path, value in changes.items()}))


def changed(changes: dict[str, Any]) -> dict[str, Any]:
    import copy

    values = copy.deepcopy(TINY)
    for path, value in changes.items():
        *sections, field = path.split(".")
        target = values
        for section in sections:
            target = target.setdefault(section, {})
        target[field] = value
    return values


def student(described: Recipe, seed: int = 1) -> CaptioningStudent:
    torch.manual_seed(seed)
    made = CaptioningStudent(described.model, described.objectives, VOCABULARY, LONGEST)
    with torch.no_grad():  # nothing that is zero at first may hide a mistake
        for name, parameter in made.named_parameters():
            if name != "temperature":
                parameter.add_(0.05 * torch.randn_like(parameter))
    return made.eval()


def run_masks(described: Recipe) -> RunMasks:
    tokenizer = SimpleNamespace(mask_id=4, vocabulary_size=VOCABULARY, word_ids=None)
    return RunMasks(described, SimpleNamespace(tokenizer=tokenizer, train_size=8))  # type: ignore[arg-type]


def batch(n: int = 6, seed: int = 3) -> Batch:
    """Captions of 2 to 9 tokens: the first is empty, the second has no word that may be masked."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(6, VOCABULARY, (n, LONGEST), generator=generator)
    for i in range(n):
        length = (2, 4, 9, 5, 7, 3)[i % 6]
        ids[i, 0], ids[i, length - 1], ids[i, length:] = 2, 3, 0
    if n > 1:
        ids[1, 1:3] = 5  # a function word
    images = torch.randn(n, 3, 16, 16, generator=generator)
    return Batch(images, ids, ids != 0, ids > 5, torch.tensor([i - (i % 4 == 3) for i in range(n)]), torch.arange(n))
