"""What the objectives read: the batch as the student and the teacher see it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from crossmask.kernels import AttentionStatistics

from ..data.batch import Batch
from ..masking import MaskPlan
from ..models import Encoded, VisionLanguageModel
from ..models.fusion import KeyValue
from .masked_words import MaskedWords
from .masks import RunMasks, Seen

Terms = dict[str, Tensor]  # named scalars: losses under their objective's name, measures under longer names


@dataclass(frozen=True)
class TeacherView:
    """The batch through the momentum model. The first R pairs are those of ITM, MLM and MIM."""

    image_feature: Tensor  # (B, E)
    text_feature: Tensor  # (B, E)
    image_tokens: Tensor | None = None  # (R, 1 + P, width) of the intact images
    statistics: AttentionStatistics | None = None  # of the intact pairs, where the mask policy reads them
    plan: MaskPlan | None = None  # (R, P) and (R, L)
    words: MaskedWords | None = None  # of the plan, where MLM is on
    word_hidden: Tensor | None = None  # (masked words, width) before the decoder, where MLM has soft labels
    word_weight: Tensor | None = None  # (V, width) of the decoder; holds what ZeRO stage 3 gathered until the backward
    word_bias: Tensor | None = None  # (V,)


@dataclass(frozen=True)
class StudentView:
    """The intact batch through the student; each image's keys and values for the fusion encoder, projected once."""

    image: Encoded
    text: Encoded
    image_keys: list[KeyValue] | None = None


@dataclass(frozen=True)
class Keys:
    """What ITC contrasts against: features of every rank's batch, and apart from them those of the queue."""

    image: Tensor  # (M, E)
    text: Tensor  # (M, E)
    group_id: Tensor  # (M,)
    queue: Keys | None = None


@torch.no_grad()
def look(teacher: VisionLanguageModel, batch: Batch, masks: RunMasks, step: int, rows: int) -> TeacherView:
    """The teacher's features of the whole batch, and of its first ``rows`` pairs what masks and soft labels need.

    Intact pairs are fused where the mask policy reads attention or where soft labels come from them; masked captions
    where soft labels come from those (``mlm.teacher_reads``), after the plan is made; nothing where neither is read.
    """
    image = teacher.encode_image(batch.images, attention=masks.attention and rows > 0)
    text = teacher.encode_text(batch.token_ids, batch.token_mask)
    view = TeacherView(image.feature, text.feature)
    if rows == 0:
        return view
    part, image, text = batch.rows(slice(rows)), image.rows(slice(rows)), text.rows(slice(rows))
    mlm = masks.recipe.objectives.mlm
    labels = mlm.weight > 0 and mlm.distillation > 0
    keys = teacher.project_image(image.tokens) if labels or masks.statistics else []
    intact = labels and mlm.teacher_reads == "intact"

    def decide(seen: Seen) -> Tensor:
        """Make the plan; the places of the words whose soft labels come from the intact pair."""
        nonlocal view
        plan = masks.plan(teacher, part, seen, step)
        words = None if mlm.weight == 0 else MaskedWords.of(plan.text)
        view = replace(view, image_tokens=image.tokens, statistics=seen.statistics, plan=plan, words=words)
        return part.token_ids[:, :0] if words is None or not intact else words.places

    if masks.statistics:
        fused = masks.see(teacher, part, image, text, keys, decide).fused_tokens
    else:
        decide(Seen(image, text))
        fused = None
    plan, words = view.plan, view.words
    if not labels:
        return view
    assert plan is not None
    assert words is not None
    if fused is None or not intact:
        if mlm.teacher_reads == "masked":
            text = teacher.encode_text(plan.read(part.token_ids), part.token_mask)
        fused = teacher.fuse(text.tokens, part.token_mask, keys, rows=words.places).tokens
    weight, bias = teacher.word_decoder
    return replace(
        view,
        word_hidden=teacher.word_hidden(words.take(fused)),
        word_weight=weight.detach(),
        word_bias=bias.detach(),
    )
