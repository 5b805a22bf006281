"""Image–text contrast with momentum distillation."""

from __future__ import annotations

from torch import Tensor

from crossmask.kernels import soft_contrastive

from .views import Keys, StudentView, TeacherView, Terms


def within_bounds(temperature: Tensor) -> Tensor:
    """Clamped to [0.001, 0.5], yet with a gradient that can lead back inside; float32."""
    tau = temperature.float()
    return tau + (tau.clamp(0.001, 0.5) - tau).detach()


def image_text_contrast(
    student: StudentView, teacher: TeacherView, keys: Keys, group_id: Tensor, temperature: Tensor, distillation: float
) -> Terms:
    """ITC of ALBEF (Li et al. 2021), mean of both directions.

    Pairs of one ``group_id`` (B,) are all true matches. ``temperature`` is used within [0.001, 0.5]. Keys of the batch
    receive a gradient where they carry one; the queue is read where it lies and receives none.
    """
    tau = within_bounds(temperature)
    queue = keys.queue

    def contrast(queries: Tensor, of_batch: Tensor, teacher_queries: Tensor, of_queue: Tensor | None) -> Tensor:
        return soft_contrastive(
            queries,
            of_batch,
            teacher_queries,
            group_id,
            keys.group_id,
            tau,
            distillation,
            queue=of_queue,
            queue_groups=None if queue is None else queue.group_id,
        ).mean()

    image_to_text = contrast(
        student.image.feature, keys.text, teacher.image_feature, None if queue is None else queue.text
    )
    text_to_image = contrast(
        student.text.feature, keys.image, teacher.text_feature, None if queue is None else queue.image
    )
    return {"itc": 0.5 * (image_to_text + text_to_image)}
