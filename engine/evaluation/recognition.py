"""Category and sub-category recognition: by the classifier that was fine-tuned with the model, and by linear probes.

SyncMask (Song et al., CVPR 2024) fine-tunes a linear classifier together with the model on the fused representation
(``objectives.recognition``). A probe is fitted on what the frozen model says of images, texts and pairs: it leaves the
model as it is, which is quick and says what training itself has learned; its figures are not comparable with published
ones.

Classes are those of the training set. An image of a class that training has not can only be wrong, and is counted;
images without a class are left out and counted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..beats import beat
from ..data.base import EvaluationSplit, PairData
from ..data.classes import Classes, classes_of, require_classes
from ..recipe import Recipe
from .embedding import BATCH, Progress
from .linear_probe import choose_probe, scores

UNSEEN = 2**31  # from here on stand numbers of classes that training has not
Features = dict[str, Tensor]  # "image", "text" and "fused", each (N, width) float32


def classifier_missing(model: Any, data: PairData, recipe: Recipe) -> str | None:
    """Why a recipe with ``objectives.recognition`` cannot have the model's own classifier evaluated, in one line; None
    where it can."""
    column, classifier = recipe.objectives.recognition.column, getattr(model, "classifier", None)
    training = data.training_split()
    if not hasattr(model, "fuse"):
        return "a captioner has no classifier: set objectives.recognition.weight to 0"
    if classifier is None:
        return "the model has no classifier: fine-tune it with recipes/recognition-emoji.yaml or one like it"
    if (own := classifier.classes.column) != column:
        return (
            f"the model's classifier is of the column {own}, not {column}: set objectives.recognition.column to {own}"
        )
    trained = () if training is None else classes_of(training.labels.get(column, np.array([])))
    if not trained or not any(column in split.labels for split in data.splits.values()):
        return f"the data have no column {column} that the model's classifier could be held against: add it"
    return None


def recognition(
    model: Any,
    data: PairData,
    device: torch.device | str,
    seed: int,
    progress: Callable[[str], None] = lambda text: None,
    *,
    probes: bool = True,
    classifier: bool = False,
) -> dict[str, Any]:
    """``recognition`` of ``evaluation.json``: by level (``category``, ``subcategory``) what there is to recognise, and
    the accuracy and macro-F1 of each split, percent: with ``probes`` by feature (``image``, ``text``, ``fused``), with
    ``classifier`` under ``fine_tuned`` those of the model's own on image and text fused, for its column.

    The model must be in evaluation mode, and for ``classifier`` there is no :func:`classifier_missing`. Raises
    DataError where ``probes`` are asked for and the training data have no two classes.
    """
    training = data.training_split()
    levels = require_classes(training, data.splits) if probes else []
    assert training is not None
    own: Classes | None = model.classifier.classes if classifier else None
    told = Progress(progress)
    train: Features = {}
    if probes:
        progress("recognition: encoding the training pairs")
        train = represent(model, training, device, told)
    tests = {name: represent(model, split, device, told) for name, split in data.splits.items()}
    found = {}
    for level in dict.fromkeys([*levels, *([] if own is None else [own.column])]):
        progress(f"recognition: fitting probes of the {level}" if level in levels else "recognition")
        found[level] = _recognise(level, training, train if level in levels else {}, data.splits, tests, seed)
    if own is not None:
        found[own.column]["fine_tuned"] = _fine_tuned(model, own, data.splits, tests)
    return found


@torch.no_grad()
def _fine_tuned(
    model: Any, classes: Classes, splits: Mapping[str, EvaluationSplit], tests: Mapping[str, Features]
) -> dict[str, Any]:
    """What the model's own classifier gets; classes that it does not know count as ever."""
    asked = _asked(classes.column, classes.names, splits)
    result: dict[str, Any] = {"classes": len(classes.names), "splits": {}}
    for name, (true, rows) in asked.items():
        fused = tests[name]["fused"]
        said = model.classifier(fused[rows.to(fused.device)].to(model.dtype)).argmax(1).cpu()
        result["splits"][name] = {"unseen_images": int((true >= UNSEEN).sum()), **scores(said, true)}
    return result


def _asked(
    level: str, classes: Sequence[str], splits: Mapping[str, EvaluationSplit]
) -> dict[str, tuple[Tensor, Tensor]]:
    """:func:`_numbered` of every split that has the level."""
    return {name: _numbered(split.labels[level], classes) for name, split in splits.items() if level in split.labels}


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
    asked = _asked(level, classes, splits)
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


def _numbered(names: np.ndarray, classes: Sequence[str]) -> tuple[Tensor, Tensor]:
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
