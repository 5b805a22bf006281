"""Masked image modelling with the intact caption."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..models import PretrainingModel
from .views import StudentView, TeacherView, Terms


def masked_image_modelling(
    student_model: PretrainingModel,
    student: StudentView,
    view: TeacherView,
    images: Tensor,
    token_mask: Tensor,
    target: Literal["teacher_feature", "pixel", "normalised_pixel"],
) -> Terms:
    """Predict the patches of the plan from the rest of the image and the whole caption; smooth L1, mean over patches.

    ``teacher_feature`` is the layer-normalised output of the teacher's image tower on the intact image (SyncMask's
    "enhanced labels"; layer norm and smooth L1 are a reconstruction), ``pixel`` the patch itself and
    ``normalised_pixel`` the patch less its mean over its standard deviation (MAE, He et al. 2022). No masked patch
    at all gives 0 with a live graph. ``images`` (R, 3, H, W), ``token_mask`` (R, L).
    """
    assert view.plan is not None
    assert view.image_tokens is not None
    rows, masked = len(images), view.plan.image
    encoded = student_model.model.encode_image(images, masked)
    predicted = student_model.patch_decoder(encoded.tokens, student.text.tokens[:rows], token_mask)[:, 1:][
        masked
    ].float()
    with torch.no_grad():
        if target == "teacher_feature":
            wanted = F.layer_norm(view.image_tokens[:, 1:][masked].float(), predicted.shape[-1:])
        else:
            size = student_model.model.patch_size
            wanted = F.unfold(images.float(), size, stride=size).transpose(1, 2)[masked]
            if target == "normalised_pixel" and len(wanted):
                wanted = (wanted - wanted.mean(1, keepdim=True)) / (wanted.var(1, keepdim=True) + 1e-6).sqrt()
    loss = F.smooth_l1_loss(predicted, wanted, reduction="sum") / max(1, wanted.numel())
    return {"mim": loss}
