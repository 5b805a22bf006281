"""Category and sub-category recognition: a linear classifier fine-tuned together with the model."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..data.batch import Batch
from ..models import VisionLanguageModel
from .views import StudentView, Terms


def recognise(model: VisionLanguageModel, student: StudentView, batch: Batch) -> Terms:
    """Cross-entropy of the classifier on each intact image and text, fused, against the class of the pair.

    SyncMask (Song et al. 2024) fine-tunes a linear classifier with the whole model, as FashionViL and Kaleido-BERT do.
    Which of the fused tokens it reads is a reconstruction: what ITM reads, ``pool_fused``. ``batch.label`` (B,) int64;
    pairs of no known class, -1, are left out of the mean over this rank's pairs, and a batch without any class gives 0
    with a live graph.
    """
    assert model.classifier is not None
    assert batch.label is not None
    keys = student.image_keys
    fused = model.fuse(
        student.text.tokens,
        batch.token_mask,
        model.project_image(student.image.tokens) if keys is None else keys,
        # where [CLS] speaks for the pair, nothing else is computed by the last layer
        rows=torch.zeros_like(batch.token_ids[:, :1]) if model.pool == "cls" else None,
    )
    logits = model.classifier(model.pool_fused(fused.tokens, batch.token_mask))
    known = batch.label >= 0
    count = known.sum().clamp(min=1)
    loss = F.cross_entropy(logits, batch.label, ignore_index=-1, reduction="sum") / count
    correct = ((logits.argmax(1) == batch.label) & known).sum() / count
    return {"recognition": loss, "recognition_accuracy": correct.detach()}
