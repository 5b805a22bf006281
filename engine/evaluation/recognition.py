"""Category and sub-category recognition by linear probes on what the frozen model says of images, texts and pairs.

SyncMask (Song et al., CVPR 2024) fine-tunes a linear classifier together with the model on the fused representation.
A probe leaves the model as it is, which is quick and says what pre-training itself has learned; its figures are not
comparable with published ones.

Classes are those of the training set. An image of a class that training has not can only be wrong, and is counted;
images without a class are left out and counted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..beats import beat
from ..data.base import EvaluationSplit, PairData
from ..data.classes import classes_of, require_classes
from .embedding import BATCH, Progress
from .linear_probe import choose_probe, scores

UNSEEN = 2**31  # from here on stand numbers of classes that training has not
Features = dict[str, Tensor]  # "image", "text" and "fused", each (N, width) float32


def recognition(
    model: Any,
    data: PairData,
    device: torch.device | str,
    seed: int,
    progress: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """``recognition`` of ``evaluation.json``: by level (``category``, ``subcategory``) what there is to recognise, and
    by feature (``image``, ``text``, ``fused``) the accuracy and macro-F1 of each split; percentages.

    The model must be in evaluation mode. Raises DataError where the training data have no two classes.
    """
    training = data.training_split()
    levels = require_classes(training, data.splits)
    assert training is not None
    told = Progress(progress)
    progress("recognition: encoding the training pairs")
    train = represent(model, training, device, told)
    tests = {name: represent(model, split, device, told) for name, split in data.splits.items()}
    found = {}
    for level in levels:
        progress(f"recognition: fitting probes of the {level}")
        found[level] = _recognise(level, training, train, data.splits, tests, seed)
    return found


def _recognise(
    level: str,
    training: EvaluationSplit,
    train: Features,
    splits: Mapping[str, EvaluationSplit],
    tests: Mapping[str, Features],
    seed: int,
) -> dict[str, Any]:
    classes = classes_of(training.labels[level])
    target, kept = _numbered(training.labels[level], classes)
    counts = torch.bincount(target, minlength=len(classes))
    majority = int(counts.argmax())
    asked = {name: _numbered(split.labels[level], classes) for name, split in splits.items() if level in split.labels}
    result: dict[str, Any] = {
        "classes": len(classes),
        "images": len(target),
        "single": int((counts == 1).sum()),  # classes with one training image
        "unlabelled": int((~kept).sum()),
        "majority": classes[majority],
        "splits": {
            name: {
                "title": splits[name].title,
                "images": len(true),
                "unlabelled": int((~rows).sum()),
                "unseen_classes": len(true[true >= UNSEEN].unique()),
                "unseen_images": int((true >= UNSEEN).sum()),
                "majority": scores(torch.full_like(true, majority), true),
            }
            for name, (true, rows) in asked.items()
        },
        "features": {},
    }
    group = torch.from_numpy(training.image_group_id)[kept]
    for feature, values in train.items():
        own = values[kept.to(values.device)]
        probe, penalty, chosen_on = choose_probe(own, target.to(own.device), group, len(classes), seed)
        result["features"][feature] = {
            "penalty": penalty,
            "chosen_on": chosen_on,
            "splits": {
                name: scores(probe.predict(tests[name][feature][rows.to(own.device)]).cpu(), true)
                for name, (true, rows) in asked.items()
            },
        }
    return result


def _numbered(names: np.ndarray, classes: list[str]) -> tuple[Tensor, Tensor]:
    """(M,) int64, the classes of the images that have one, and (N,) bool, which these are."""
    number = {name: i for i, name in enumerate(classes)}
    for name in classes_of(names):
        number.setdefault(name, UNSEEN + len(number))
    known = [name for name in names.tolist() if name]
    return torch.tensor([number[name] for name in known], dtype=torch.int64), torch.from_numpy(names != "")


@torch.no_grad()
def represent(
    model: Any, split: EvaluationSplit, device: torch.device | str, progress: Progress | None = None
) -> Features:
    """Each image of a split with its caption, on the device: ``image``, ``text`` and, where the model has a fusion
    encoder, ``fused``. They are what ITC and ITM project, before the projection: [CLS] or the mean of the tokens."""
    progress = progress or Progress()
    parts: dict[str, list[Tensor]] = {}
    for start, batch in zip(range(0, split.image_count, BATCH), split.images(BATCH), strict=True):
        beat("evaluation: encoding pairs")
        progress("recognition: pairs encoded", start, split.image_count)
        here = batch.to(device)
        image, text = model.encode_image(here.images), model.encode_text(here.token_ids, here.token_mask)
        if hasattr(model, "fuse"):
            fused = model.fuse(text.tokens, here.token_mask, model.project_image(image.tokens))
            found = {
                "image": model.pool_image(image.tokens),
                "text": model.pool_text(text.tokens, here.token_mask),
                "fused": model.pool_fused(fused.tokens, here.token_mask),
            }
        else:  # a contrastive captioner: its two features are all that speaks for a whole
            found = {"image": image.feature, "text": text.feature}
        for name, values in found.items():
            parts.setdefault(name, []).append(values.float())
    return {name: torch.cat(values) for name, values in parts.items()}
