"""Masked language modelling on the intact image."""

from __future__ import annotations

from torch import Tensor

from crossmask.kernels import soft_cross_entropy

from ..models import VisionLanguageModel
from .views import StudentView, TeacherView, Terms


def masked_language_modelling(
    model: VisionLanguageModel,
    student: StudentView,
    view: TeacherView,
    token_ids: Tensor,
    token_mask: Tensor,
    distillation: float,
    *,
    later: Tensor | None = None,
    links: Tensor | None = None,
    head_mask: Tensor | None = None,
) -> Terms:
    """Predict the words of the plan from the rest of the caption and what the student saw of the image.

    SyncMask (Song et al., CVPR 2024): the teacher's soft label at a masked word comes from its fused feature of the
    *intact* pair. No masked word at all gives 0 with a live graph. ``token_ids`` and ``token_mask`` are (R, L).

    Args:
        later: (R, L) bool, words that skip the text tower and join as [MASK] in the fusion encoder.
        links: (R, L, L) bool, which word may look at which.
        head_mask: (layers, H) bool, heads of the fusion encoder's cross-attention that are on.
    """
    assert view.plan is not None
    assert student.image_keys is not None
    rows, masked = len(token_ids), view.plan.text
    text = model.encode_text(view.plan.read(token_ids), token_mask, hidden=later, links=links)
    keys = [(k[:rows], v[:rows]) for k, v in student.image_keys]
    fused = model.fuse(text.tokens, token_mask, keys, links=links, head_mask=head_mask)
    logits, labels = model.word_logits(fused.tokens[masked]), token_ids[masked]
    loss = soft_cross_entropy(logits, labels, view.word_logits, distillation).sum() / max(1, len(labels))
    accuracy = (logits.detach().argmax(1) == labels).float().sum() / max(1, len(labels))
    return {"mlm": loss, "mlm_accuracy": accuracy}
