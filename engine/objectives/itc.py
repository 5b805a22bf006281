"""Image–text contrast with momentum distillation."""

from __future__ import annotations

from torch import Tensor

from crossmask.kernels import soft_contrastive

from .views import Keys, StudentView, TeacherView, Terms


def image_text_contrast(
    student: StudentView, teacher: TeacherView, keys: Keys, group_id: Tensor, temperature: Tensor, distillation: float
) -> Terms:
    """ITC of ALBEF (Li et al. 2021), mean of both directions.

    Pairs of one ``group_id`` (B,) are all true matches. ``temperature`` is used within [0.001, 0.5].
    """
    tau = temperature.float()
    tau = tau + (tau.clamp(0.001, 0.5) - tau).detach()  # clamped, yet with a gradient that can lead back inside
    common = (group_id, keys.group_id, tau, distillation)
    image_to_text = soft_contrastive(student.image.feature, keys.text, teacher.image_feature, *common)
    text_to_image = soft_contrastive(student.text.feature, keys.image, teacher.text_feature, *common)
    return {"itc": 0.5 * (image_to_text.mean() + text_to_image.mean())}
