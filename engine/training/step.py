"""One training step: views of a batch, objectives on them, their weighted sum."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..data.batch import Batch
from ..models import PretrainingModel
from ..objectives import (
    Keys,
    StudentView,
    TeacherView,
    Terms,
    image_text_contrast,
    image_text_matching,
    masked_image_modelling,
    masked_language_modelling,
)
from ..recipe import ObjectivesSection, Recipe


@dataclass(frozen=True)
class Schedule:
    """What changes through a run, at one step."""

    distillation: float  # factor on every alpha, 0..1
    fusion: bool  # whether ITM, MLM and MIM are on
    hardness: float  # of ITM's negatives, 0..1
    queue: bool  # whether ITC contrasts with the momentum queue

    @classmethod
    def at(cls, step: int, recipe: Recipe) -> Schedule:
        progress, section = step / recipe.training.max_steps, recipe.objectives
        fusion = any(o.weight > 0 for o in (section.itm, section.mlm, section.mim)) and progress >= section.fusion_start
        hardness = section.itm.hardness * _rise(progress - section.fusion_start, section.itm.hardness_ramp)
        return cls(_rise(progress, section.distillation_ramp), fusion, hardness, progress >= section.itc.queue_start)


def _rise(progress: float, over: float) -> float:
    """From 0 to 1 over a share of the run; at once where the share is 0."""
    return 1.0 if over == 0 else min(1.0, max(0.0, progress / over))


def fusion_rows(batch_size: int, section: ObjectivesSection, schedule: Schedule) -> int:
    """How many of a rank's pairs go through the fusion encoder in this step."""
    if not schedule.fusion:
        return 0
    return batch_size if section.fusion_rows is None else min(batch_size, section.fusion_rows)


def compute_losses(
    student: PretrainingModel,
    batch: Batch,
    view: TeacherView,
    keys: Keys,
    section: ObjectivesSection,
    schedule: Schedule,
    mask_id: int,
) -> tuple[Tensor, Terms]:
    """The weighted sum of all objectives that are on, and every named term, detached."""
    model, alpha = student.model, schedule.distillation
    rows = 0 if view.plan is None else len(view.plan.text)
    image, text = model.encode_image(batch.images), model.encode_text(batch.token_ids, batch.token_mask)
    seen = StudentView(image, text, model.project_image(image.tokens) if rows else None)

    terms: Terms = {}
    if section.itc.weight > 0:
        distillation = alpha * section.itc.distillation
        terms |= image_text_contrast(seen, view, keys, batch.group_id, student.temperature[0], distillation)
    if rows and section.itm.weight > 0:
        terms |= image_text_matching(
            model, seen, view, batch.token_mask, batch.group_id, student.temperature[0], rows, schedule.hardness
        )
    if rows and section.mlm.weight > 0:
        ids, mask = batch.token_ids[:rows], batch.token_mask[:rows]
        terms |= masked_language_modelling(model, seen, view, ids, mask, mask_id, alpha * section.mlm.distillation)
    if rows and section.mim.weight > 0:
        images, mask = batch.images[:rows], batch.token_mask[:rows]
        terms |= masked_image_modelling(student, seen, view, images, mask, section.mim.target)

    weights = {
        "itc": section.itc.weight,
        "itm": section.itm.weight,
        "mlm": section.mlm.weight,
        "mim": section.mim.weight,
    }
    loss = 0.0 * student.temperature.float().sum()  # a live graph even where no objective has begun
    for name, term in terms.items():
        if name in weights:
            loss = loss + weights[name] * term.float()
    terms |= {"loss": loss, "temperature": student.temperature.float()[0].clamp(0.001, 0.5)}
    return loss, {name: term.detach() for name, term in terms.items()}
