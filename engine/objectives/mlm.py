"""Masked language modelling on the intact image."""

from __future__ import annotations

from torch import Tensor

from crossmask.kernels import soft_cross_entropy

from ..models import Encoded, VisionLanguageModel
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
    text: Encoded | None = None,
) -> Terms:
    """Predict the words of the plan from the rest of the caption and what the student saw of the image.

    The teacher's soft label at a masked word comes from its fused feature of the *intact* pair in SyncMask (Song et
    al., CVPR 2024) and of the masked caption with the intact image in ALBEF (Li et al. 2021, eq. 7); :func:`.look`
    makes either. The last fusion layer, the head and the vocabulary see masked words only. No masked word at all gives
    0 with a live graph. ``token_ids`` and ``token_mask`` are (R, L).

    Args:
        later: (R, L) bool, words that skip the text tower and join as [MASK] in the fusion encoder.
        links: (R, L, L) bool, which word may look at which.
        head_mask: (layers, H) bool, heads of the fusion encoder's cross-attention that are on.
        text: the captions of the plan through the text tower, where they went through it already.
    """
    assert view.plan is not None
    assert view.words is not None
    assert student.image_keys is not None
    rows, words = len(token_ids), view.words
    if text is None:
        text = model.encode_text(view.plan.read(token_ids), token_mask, hidden=later, links=links)
    keys = student.image_keys
    if rows < len(keys[0][0]):
        keys = [(k[:rows], v[:rows]) for k, v in keys]
    fused = model.fuse(text.tokens, token_mask, keys, links=links, head_mask=head_mask, rows=words.places)
    labels = words.take(token_ids.gather(1, words.places))
    found = soft_cross_entropy(
        model.word_hidden(words.take(fused.tokens)),
        *model.word_decoder,
        labels,
        view.word_hidden,
        view.word_weight,
        view.word_bias,
        distillation,
        return_argmax=True,
    )
    count = max(1, len(labels))
    return {"mlm": found.loss.sum() / count, "mlm_accuracy": (found.argmax == labels).sum() / count}
