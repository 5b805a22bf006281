"""Crossmask's own families of models: which student and teacher, and what a micro-step computes.

``fusion`` is ALBEF's and SyncMask's: two towers and a fusion encoder, with a momentum teacher whose features, masks and
labels a step reads. ``captioner`` is SyCoCa's, whose teacher is followed for evaluation and export alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..beats import beat
from ..data import PairData
from ..data.batch import Batch
from ..models import PretrainingModel, VisionLanguageModel, build_word_reader
from ..models.captioner import CaptioningModel
from ..models.captioner_student import CaptioningStudent
from ..objectives import Keys, RunMasks, TeacherView, Terms, look
from ..recipe import Recipe
from ..teacher import FeatureQueue, Teacher, gather_features
from .caption_step import compute_captioner_losses
from .clock import Clock
from .families import Family, MicroStep
from .step import Schedule, compute_losses, fusion_rows


class FusionSystem(Family):
    """ALBEF (Li et al. 2021), SyncMask (Song et al. 2024) and what else has two towers and a fusion encoder."""

    def build_student(self) -> nn.Module:
        recipe = self.recipe
        return PretrainingModel(
            recipe.model,
            recipe.objectives,
            *self.sizes,
            masking=recipe.masking,
            mask_network=self.masks.network(),
            classes=self.classes,
            **self.specials,
        )

    def build_teacher(self) -> nn.Module:
        model = self.recipe.model
        network = self.masks.network()
        reader = build_word_reader(model, self.recipe.masking)
        return VisionLanguageModel(
            model, *self.sizes, mask_network=network, word_reader=reader, classes=self.classes, **self.specials
        )

    def forward(
        self,
        engine: Any,
        teacher: Teacher,
        queue: FeatureQueue,
        batch: Batch,
        schedule: Schedule,
        heads: Tensor | None,
        clock: Clock,
    ) -> MicroStep:
        recipe = self.recipe
        rows = fusion_rows(len(batch), recipe.objectives, schedule)
        beat("teacher's forward")
        with teacher.weights(dropout=recipe.teacher.dropout) as momentum:
            view: TeacherView = momentum(lambda m: look(m, batch, self.masks, schedule.step, rows))
        image, text, group_id = (gather_features(x) for x in (view.image_feature, view.text_feature, batch.group_id))
        queued = Keys(queue.image, queue.text, queue.group_id)  # views, until the next enqueue
        keys = Keys(image, text, group_id, queued if schedule.queue and len(queue) else None)
        clock.lap("teacher")
        planner = self.masks.planner
        beat("student's forward")
        loss, terms = engine(lambda m: compute_losses(m, batch, view, keys, recipe, schedule, planner, heads))
        clock.lap("student")
        measures = _mask_measures(view, batch)
        return MicroStep(loss, terms, view.image_feature, view.text_feature, (image, text, group_id), measures, view)


class CaptionerSystem(Family):
    """SyCoCa (Ma et al. 2024), and CoCa (Yu et al. 2022) by its recipe."""

    def build_student(self) -> nn.Module:
        return CaptioningStudent(self.recipe.model, self.recipe.objectives, *self.sizes, **self.specials)

    def build_teacher(self) -> nn.Module:
        reconstructs = self.recipe.objectives.tg_mim.weight > 0
        return CaptioningModel(self.recipe.model, *self.sizes, reconstructs=reconstructs, **self.specials)

    def forward(
        self,
        engine: Any,
        teacher: Teacher,
        queue: FeatureQueue,
        batch: Batch,
        schedule: Schedule,
        heads: Tensor | None,
        clock: Clock,
    ) -> MicroStep:
        recipe = self.recipe
        rows = fusion_rows(len(batch), recipe.objectives, schedule)
        beat("student's forward")
        found = engine(lambda m: compute_captioner_losses(m, batch, recipe, self.masks, schedule.step, rows))
        clock.lap("student")
        return MicroStep(found.loss, found.terms, found.image_feature, found.text_feature)


def build_system(recipe: Recipe, data: PairData, masks: RunMasks) -> Family:
    """The family of a recipe: another's where ``model.system`` names one, a captioner's where there is
    ``model.captioner``."""
    if recipe.model.system is not None:
        from .own_system import OwnFamily

        return OwnFamily(recipe, data, masks)
    kind = FusionSystem if recipe.model.captioner is None else CaptionerSystem
    return kind(recipe, data, masks)


@torch.no_grad()
def _mask_measures(view: TeacherView, batch: Batch) -> Terms:
    if view.plan is None:
        return {}
    words = batch.maskable[: len(view.plan.text)].sum().clamp(min=1)
    return {
        "image_mask_ratio": view.plan.image.float().mean(),
        "text_mask_ratio": view.plan.text.sum() / words,
        "masked_rows": view.plan.text.any(1).float().mean(),
        "masked_images": view.plan.image.any(1).float().mean(),
    }
