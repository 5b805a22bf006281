"""Masked language modelling on the intact image."""

from __future__ import annotations

import torch
from torch import Tensor

from crossmask.kernels import soft_cross_entropy

from ..models import VisionLanguageModel
from .views import StudentView, TeacherView, Terms

FIRST_WORD_ID = 5  # [PAD] [UNK] [CLS] [SEP] [MASK] come before


def corrupt(token_ids: Tensor, masked: Tensor, mask_id: int, vocabulary_size: int) -> Tensor:
    """BERT's corruption of the masked words: 80 % [MASK], 10 % a random word, 10 % kept. All shapes (B, L)."""
    draw = torch.rand(token_ids.shape, device=token_ids.device)
    random_ids = torch.randint(FIRST_WORD_ID, vocabulary_size, token_ids.shape, device=token_ids.device)
    corrupted = torch.where(draw < 0.8, mask_id, torch.where(draw < 0.9, random_ids, token_ids))
    return torch.where(masked, corrupted, token_ids)


def masked_language_modelling(
    model: VisionLanguageModel,
    student: StudentView,
    view: TeacherView,
    token_ids: Tensor,
    token_mask: Tensor,
    mask_id: int,
    distillation: float,
) -> Terms:
    """Predict the words of the plan from the rest of the caption and the whole image.

    SyncMask (Song et al., CVPR 2024): the teacher's soft label at a masked word comes from its fused feature of the
    *intact* pair. No masked word at all gives 0 with a live graph. ``token_ids`` and ``token_mask`` are (R, L).
    """
    assert view.plan is not None
    assert student.image_keys is not None
    rows, masked = len(token_ids), view.plan.text
    vocabulary_size = len(model.word_bias)
    text = model.encode_text(corrupt(token_ids, masked, mask_id, vocabulary_size), token_mask)
    fused = model.fuse(text.tokens, token_mask, [(k[:rows], v[:rows]) for k, v in student.image_keys])
    logits, labels = model.word_logits(fused.tokens[masked]), token_ids[masked]
    loss = soft_cross_entropy(logits, labels, view.word_logits, distillation).sum() / max(1, len(labels))
    accuracy = (logits.detach().argmax(1) == labels).float().sum() / max(1, len(labels))
    return {"mlm": loss, "mlm_accuracy": accuracy}
