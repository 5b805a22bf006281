"""What the objectives read: the batch as the student and the teacher see it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from crossmask.kernels import AttentionStatistics

from ..data.batch import Batch
from ..masking import MaskPlan
from ..models import Encoded, VisionLanguageModel
from ..models.fusion import KeyValue
from .masks import RunMasks

Terms = dict[str, Tensor]  # named scalars: losses under their objective's name, measures under longer names


@dataclass(frozen=True)
class TeacherView:
    """The intact batch through the momentum model. The first R pairs went through its fusion encoder."""

    image_feature: Tensor  # (B, E)
    text_feature: Tensor  # (B, E)
    image_tokens: Tensor | None = None  # (R, 1 + P, width)
    fused_tokens: Tensor | None = None  # (R, L, width)
    statistics: AttentionStatistics | None = None
    plan: MaskPlan | None = None  # (R, P) and (R, L)
    word_logits: Tensor | None = None  # (masked words, V), in the order of plan.text's True entries


@dataclass(frozen=True)
class StudentView:
    """The intact batch through the student; each image's keys and values for the fusion encoder, projected once."""

    image: Encoded
    text: Encoded
    image_keys: list[KeyValue] | None = None


@dataclass(frozen=True)
class Keys:
    """What ITC contrasts against: every rank's teacher features and the queue."""

    image: Tensor  # (M, E)
    text: Tensor  # (M, E)
    group_id: Tensor  # (M,)


@torch.no_grad()
def look(teacher: VisionLanguageModel, batch: Batch, masks: RunMasks, step: int, rows: int) -> TeacherView:
    """The teacher's features of the whole batch, and of its first ``rows`` pairs everything that masking needs."""
    image = teacher.encode_image(batch.images, attention=masks.attention and rows > 0)
    text = teacher.encode_text(batch.token_ids, batch.token_mask)
    if rows == 0:
        return TeacherView(image.feature, text.feature)
    part = batch.rows(slice(rows))
    seen = masks.see(teacher, part, image.rows(slice(rows)), text.rows(slice(rows)))
    assert seen.fused_tokens is not None
    plan = masks.plan(teacher, part, seen, step)
    return TeacherView(
        image.feature,
        text.feature,
        seen.image.tokens,
        seen.fused_tokens,
        seen.statistics,
        plan,
        teacher.word_logits(seen.fused_tokens[plan.text]),
    )
