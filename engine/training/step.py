"""One training step: views of a batch, objectives on them, their weighted sum."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from crossmask.kernels import topk_mask

from ..data.batch import Batch
from ..masking import Draws, MaskPlan, MaskPlanner
from ..masking.links import build_links
from ..models import Encoded, PretrainingModel, VisionLanguageModel
from ..objectives import (
    Keys,
    StudentView,
    TeacherView,
    Terms,
    image_text_contrast,
    image_text_matching,
    masked_image_modelling,
    masked_language_modelling,
    recognise,
    text_guided_retrieval,
)
from ..objectives.itc import within_bounds
from ..objectives.own import ObjectiveView, own_terms
from ..recipe import ObjectivesSection, Recipe


@dataclass(frozen=True)
class Schedule:
    """What changes through a run, at one step."""

    distillation: float  # factor on every alpha, 0..1
    fusion: bool  # whether ITM, MLM and MIM are on, or captioning and TG-MIM
    hardness: float  # of ITM's negatives, 0..1
    queue: bool  # whether ITC contrasts with the momentum queue
    patch_drop: float = 0.0  # share of the student's patches that are left out of the intact pass
    step: int = 0

    @classmethod
    def at(cls, step: int, recipe: Recipe) -> Schedule:
        progress, section = step / recipe.training.max_steps, recipe.objectives
        patch_drop = section.itc.patch_drop if progress < section.itc.patch_drop_until else 0.0
        parts = (section.itm, section.mlm, section.mim, section.caption, section.tg_mim)
        fusion = any(part.weight > 0 for part in parts) and progress >= section.fusion_start
        hardness = section.itm.hardness * _rise(progress - section.fusion_start, section.itm.hardness_ramp)
        distillation, queue = _rise(progress, section.distillation_ramp), progress >= section.itc.queue_start
        return cls(distillation, fusion, hardness, queue, patch_drop, step)


def _rise(progress: float, over: float) -> float:
    """From 0 to 1 over a share of the run; at once where the share is 0."""
    return 1.0 if over == 0 else min(1.0, max(0.0, progress / over))


def fusion_rows(batch_size: int, section: ObjectivesSection, schedule: Schedule) -> int:
    """How many of a rank's pairs go through the fusion encoder, or a captioner's decoders, in this step."""
    if not schedule.fusion:
        return 0
    return batch_size if section.fusion_rows is None else min(batch_size, section.fusion_rows)


def masked_words(plan: MaskPlan, mask_id: int) -> Tensor:
    """(R, L) bool: the words that are read as [MASK]."""
    assert plan.replacement is not None
    return plan.replacement.eq(mask_id)


def _encode_captions(
    model: VisionLanguageModel, batch: Batch, view: TeacherView, masked: bool
) -> tuple[Encoded, Encoded | None]:
    """The captions through the text tower and, if ``masked``, as the student reads the plan's.

    Both in one pass: the gradients of the tower, above all of its vocabulary, are then made once and not added up.
    """
    if not masked or view.plan is None:
        return model.encode_text(batch.token_ids, batch.token_mask), None
    size, rows = len(batch), len(view.plan.text)
    ids, mask = batch.token_ids, batch.token_mask
    both = model.encode_text(torch.cat([ids, view.plan.read(ids[:rows])]), torch.cat([mask, mask[:rows]]))
    return both.rows(slice(size)), both.rows(slice(size, None))


def compute_losses(
    student: PretrainingModel,
    batch: Batch,
    view: TeacherView,
    keys: Keys,
    recipe: Recipe,
    schedule: Schedule,
    masks: MaskPlanner,
    head_mask: Tensor | None = None,
) -> tuple[Tensor, Terms]:
    """The weighted sum of all objectives that are on, and every named term, detached."""
    model, alpha, section, masking = student.model, schedule.distillation, recipe.objectives, recipe.masking
    rows = 0 if view.plan is None else len(view.plan.text)
    draws = Draws(recipe.seed, schedule.step, batch.index)
    plain = masking.hidden_words == "token" and masking.links.kind == "none"
    text, masked_text = _encode_captions(model, batch, view, section.mlm.weight > 0 and plain)
    if schedule.patch_drop > 0:
        patches = model.patch_grid[0] * model.patch_grid[1]
        gone = int(schedule.patch_drop * patches)
        away = topk_mask(draws.uniform("patch drop", patches), k=gone)
        image = model.encode_image(batch.images, away, drop=True, visible_count=patches - gone)
    else:
        image = model.encode_image(batch.images)
    seen = StudentView(image, text, model.project_image(image.tokens) if rows else None)

    terms: Terms = {}
    if section.itc.weight > 0:
        distillation = alpha * section.itc.distillation
        terms |= image_text_contrast(seen, view, keys, batch.group_id, student.temperature[0], distillation)
    if section.composed.weight > 0:
        terms |= text_guided_retrieval(model, seen, batch, student.temperature[0])
    if section.recognition.weight > 0:
        terms |= recognise(model, seen, batch)
    if rows and section.itm.weight > 0 and len(batch) > 1:  # of one pair there is no negative
        terms |= image_text_matching(
            model,
            seen,
            view,
            batch.token_mask,
            batch.group_id,
            student.temperature[0],
            rows,
            draws,
            schedule.hardness,
            head_mask=head_mask,
            kind=batch.kind,
        )
    if rows and section.mlm.weight > 0:
        assert view.plan is not None
        ids, mask = batch.token_ids[:rows], batch.token_mask[:rows]
        terms |= masked_language_modelling(
            model,
            seen,
            view,
            ids,
            mask,
            alpha * section.mlm.distillation,
            later=masked_words(view.plan, masks.mask_id) if masking.hidden_words == "later" else None,
            links=build_links(masking.links, mask, Draws(recipe.seed, schedule.step, batch.index[:rows])),
            head_mask=head_mask,
            text=masked_text,
        )
    if rows and section.mim.weight > 0:
        images, mask = batch.images[:rows], batch.token_mask[:rows]
        terms |= masked_image_modelling(
            student,
            seen,
            view,
            images,
            mask,
            section.mim.target,
            drop=masking.hidden_patches == "drop",
            drop_after=masking.drop_after,
            network_loss=masks.policy.network_loss if model.mask_network is not None else None,
        )

    own_weights: dict[str, float] = {}
    if section.own:
        temperature, progress = within_bounds(student.temperature)[0], schedule.step / recipe.training.max_steps
        own = ObjectiveView(model, batch, image, text, temperature, view, draws, schedule.step, progress)
        found, own_weights = own_terms(section, own)
        terms |= found
    weights = {
        **own_weights,
        "itc": section.itc.weight,
        "itm": section.itm.weight,
        "mlm": section.mlm.weight,
        "mim": section.mim.weight,
        "composed": section.composed.weight,
        "recognition": section.recognition.weight,
        "mask_network": 1.0,  # no other parameter has a gradient of it; it does count where gradients are clipped
    }
    loss = 0.0 * student.temperature.float().sum()  # a live graph even where no objective has begun
    for name, term in terms.items():
        if name in weights:
            loss = loss + weights[name] * term.float()
    terms |= {"loss": loss, "temperature": student.temperature.float()[0].clamp(0.001, 0.5)}
    return loss, {name: term.detach() for name, term in terms.items()}
