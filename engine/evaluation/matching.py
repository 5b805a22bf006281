"""Does the match head tell pairs from near misses? Measured on held-out pairs as it is trained.

Each pair is shown once as it is, once with a wrong image and once with a wrong caption, both drawn in proportion to how
similar the features find them (ALBEF, Li et al. 2021). A head that has learned nothing answers with the share of true
pairs, one in three: its loss is the entropy of that prior, 0.6365 nats.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..beats import beat
from ..data.batch import Batch

ITM_PRIOR = -(math.log(1 / 3) / 3 + 2 * math.log(2 / 3) / 3)  # 0.6365 nats


def draw_hard_negatives(similarity: Tensor, group_id: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """For each row of (B, B) logits a column of another group, drawn from their softmax; and (B,) bool, False where
    no other group is present."""
    same = group_id[:, None] == group_id[None, :]
    weights = similarity.float().masked_fill(same, -torch.inf).softmax(1).nan_to_num(0.0)
    possible = ~same.all(1)
    weights[~possible] = 1.0
    return torch.multinomial(weights, 1, generator=generator)[:, 0], possible


@torch.no_grad()
def match_measures(
    model: Any, batches: Iterable[Batch], temperature: float, device: torch.device | str, seed: int = 0
) -> dict[str, float]:
    """Loss (nats), accuracy, area under the ROC curve and number of pairs shown. Negatives come from the same batch.

    The loss is the mean over all shown pairs, one true to two false, and compares with ``prior``.
    """
    generator = torch.Generator().manual_seed(seed)
    logits, labels = [], []
    for batch in batches:
        beat("evaluation: matching")
        batch = batch.to(device)
        image = model.encode_image(batch.images)
        text = model.encode_text(batch.token_ids, batch.token_mask)
        similarity = (image.feature @ text.feature.T / temperature).cpu()
        group = batch.group_id.cpu()
        wrong_text, has_text = draw_hard_negatives(similarity, group, generator)
        wrong_image, has_image = draw_hard_negatives(similarity.T, group, generator)
        usable = (has_text & has_image).nonzero()[:, 0]
        if not len(usable):
            continue
        images = torch.cat([usable, wrong_image[usable], usable]).to(device)
        texts = torch.cat([usable, usable, wrong_text[usable]]).to(device)
        projected = model.project_image(image.tokens)
        for i, t in zip(images.split(256), texts.split(256), strict=True):
            mask = batch.token_mask[t]
            fused = model.fuse(text.tokens[t], mask, [(k[i], v[i]) for k, v in projected])
            logits.append(model.match_logits(fused.tokens, mask).float().cpu())
        labels.append(torch.cat([torch.ones(len(usable)), torch.zeros(2 * len(usable))]).long())
    if not logits:
        return {"loss": math.nan, "prior": ITM_PRIOR, "accuracy": math.nan, "auc": math.nan, "pairs": 0}
    answers, truth = torch.cat(logits), torch.cat(labels)
    return {
        "loss": float(F.cross_entropy(answers, truth)),
        "prior": ITM_PRIOR,
        "accuracy": float((answers.argmax(1) == truth).float().mean()),
        "auc": area_under_roc(answers[:, 1] - answers[:, 0], truth.bool()),
        "pairs": len(truth),
    }


def area_under_roc(scores: Tensor, positive: Tensor) -> float:
    """Chance that a true pair scores above a false one; ties count half. ``scores`` (N,), ``positive`` (N,) bool."""
    right, wrong = scores[positive].double(), scores[~positive].double().sort().values
    if not len(right) or not len(wrong):
        return math.nan
    below = torch.searchsorted(wrong, right, right=False)
    at_most = torch.searchsorted(wrong, right, right=True)
    return float((below + at_most).double().mean() / 2 / len(wrong))
