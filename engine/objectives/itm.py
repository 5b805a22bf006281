"""Image–text matching with hard negatives."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..models import VisionLanguageModel
from .views import StudentView, TeacherView, Terms

PRIOR = 0.6365141682948128  # entropy in nats of one match among three pairs: what ITM costs when nothing is learned


@torch.no_grad()
def draw_negatives(
    student: StudentView, teacher: TeacherView, group_id: Tensor, temperature: Tensor, rows: int, hardness: float
) -> tuple[Tensor, Tensor, Tensor]:
    """For each of the first ``rows`` texts an image, and for each of those images a text, that do not belong to it.

    Args:
        student, teacher: similarities are of the student's features to the teacher's, as in ALBEF.
        group_id: (B,) equal ids are true matches and never drawn: they are removed before the softmax, so a row
            whose whole batch belongs to it cannot be drawn from.
        hardness: draw in proportion to softmax(hardness * similarity / temperature): 0 uniformly, 1 as ALBEF does.
            Beginning with easy negatives is our addition, for training from scratch.

    Returns:
        (rows,) indices of images, (rows,) indices of texts, (rows,) bool: whether a legal negative exists.
    """
    same = group_id[:rows, None] == group_id[None, :]
    legal = ~same.all(1)
    drawn = []
    pairs = ((student.text.feature, teacher.image_feature), (student.image.feature, teacher.text_feature))
    for queries, keys in pairs:
        z = hardness * (queries[:rows] @ keys.T).float() / temperature
        weight = z.masked_fill(same, -torch.inf).softmax(1)
        # multinomial refuses NaN, which a row without a legal negative, or one of broken features, has become.
        weight = torch.where(weight.isfinite().all(1, keepdim=True), weight, torch.ones_like(weight))
        drawn.append(torch.multinomial(weight, 1)[:, 0])
    return drawn[0], drawn[1], legal


def image_text_matching(
    model: VisionLanguageModel,
    student: StudentView,
    view: TeacherView,
    token_mask: Tensor,
    group_id: Tensor,
    temperature: Tensor,
    rows: int,
    hardness: float = 1.0,
    head_mask: Tensor | None = None,
) -> Terms:
    """ITM of ALBEF: a pair, the same text with a negative image, the same image with a negative text.

    Gradients reach the negatives too. ``token_mask`` (B, L), ``group_id`` (B,); ``head_mask`` (layers, H) bool says
    which heads of the fusion encoder's cross-attention are on.
    """
    assert student.image_keys is not None
    tau = temperature.detach().float().clamp(0.001, 0.5)
    images, texts, legal = draw_negatives(student, view, group_id, tau, rows, hardness)
    own = torch.arange(rows, device=group_id.device)
    text_index, image_index = torch.cat([own, own, texts]), torch.cat([own, images, own])
    fused = model.fuse(
        student.text.tokens[text_index],
        token_mask[text_index],
        [(k[image_index], v[image_index]) for k, v in student.image_keys],
        head_mask=head_mask,
    )
    logits = model.match_logits(fused.tokens, token_mask[text_index])
    target = (torch.arange(3 * rows, device=group_id.device) < rows).long()
    kept = legal.repeat(3).float()  # a match without its negatives would teach to say yes
    count = kept.sum().clamp(min=1)
    loss = (F.cross_entropy(logits, target, reduction="none") * kept).sum() / count
    correct = ((logits.argmax(1) == target).float() * kept).sum() / count
    return {"itm": loss, "itm_accuracy": correct.detach()}
