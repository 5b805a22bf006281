"""A step of a model from outside: ITC against the teacher and its queue, or within the batch, and own losses."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn

from ..beats import beat
from ..data import PairData
from ..data.batch import Batch
from ..data.captions import token_limit
from ..errors import RecipeError
from ..masking import Draws
from ..models.system import OwnStudent, Sizes, System, build_model, build_own, encode_image, encode_text
from ..objectives import Keys, RunMasks, StudentView, TeacherView, Terms, image_text_contrast
from ..objectives.itc import within_bounds
from ..objectives.own import ObjectiveView, own_terms, reads_teacher
from ..recipe import Recipe
from ..teacher import FeatureQueue, Teacher, gather_features
from ..teacher.gather import all_gather_with_grad
from .clock import Clock
from .families import Family, MicroStep
from .step import Schedule


class OwnFamily(Family):
    """Whatever ``model.system`` names.

    With neither a queue nor distillation ITC is CLIP's: within the batch of all ranks, with gradients on both sides,
    and the teacher follows for evaluation and export alone.
    """

    def __init__(self, recipe: Recipe, data: PairData, masks: RunMasks) -> None:
        super().__init__(recipe, data, masks)
        section = recipe.model
        assert section.system is not None
        longest = token_limit(recipe)
        if data.max_tokens > longest:
            raise RecipeError(
                f"data.max_tokens ({longest}): the data have texts of {data.max_tokens} tokens; set it to that"
            )
        sizes = Sizes.of(section, data.tokenizer, longest)
        self.system: System = build_own(section.system, section.options, sizes)
        itc = recipe.objectives.itc
        self.momentum = itc.weight > 0 and (itc.queue_length > 0 or itc.distillation > 0)
        self.looks = self.momentum or self.system.reads_teacher or reads_teacher(recipe.objectives)

    def build_student(self) -> nn.Module:
        return OwnStudent(build_model(self.system), self.recipe.objectives.itc.temperature)

    def build_teacher(self) -> nn.Module:
        return build_model(self.system)

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
        view, keys, enqueue = None, None, None
        if self.looks:
            beat("teacher's forward")
            with teacher.weights(dropout=self.recipe.teacher.dropout) as momentum:
                image = encode_image(momentum, batch.images).feature
                text = encode_text(momentum, batch.token_ids, batch.token_mask).feature
            view = TeacherView(image, text)
        if self.momentum:
            assert view is not None
            image, text, group = map(gather_features, (view.image_feature, view.text_feature, batch.group_id))
            enqueue = (image, text, group)
            queued = Keys(queue.image, queue.text, queue.group_id)  # views, until the next enqueue
            keys = Keys(image, text, group, queued if schedule.queue and len(queue) else None)
        clock.lap("teacher")
        beat("student's forward")
        found = engine(lambda m: compute_own_losses(m, self.system, batch, view, keys, self.recipe, schedule))
        clock.lap("student")
        seen = view or found
        return MicroStep(found.loss, found.terms, seen.image_feature, seen.text_feature, enqueue, keep=view)


class OwnLosses(NamedTuple):  # a tuple: DeepSpeed's ZeRO-3 finds no tensor to hook in a dataclass
    """What a micro-step gives."""

    loss: Tensor
    terms: Terms  # detached
    image_feature: Tensor  # (B, E), detached
    text_feature: Tensor  # (B, E), detached


def compute_own_losses(
    student: OwnStudent,
    system: System,
    batch: Batch,
    view: TeacherView | None,
    keys: Keys | None,
    recipe: Recipe,
    schedule: Schedule,
) -> OwnLosses:
    """ITC, the system's losses and the recipe's own objectives. Collective without ``keys``."""
    section = recipe.objectives
    image = encode_image(student.model, batch.images)
    text = encode_text(student.model, batch.token_ids, batch.token_mask)
    _check_features("encode_image", image.feature, batch, recipe)
    _check_features("encode_text", text.feature, batch, recipe)
    terms: Terms = {}
    weights = {"itc": section.itc.weight}
    if section.itc.weight > 0:
        distillation = schedule.distillation * section.itc.distillation
        if keys is None:
            images, texts = all_gather_with_grad(image.feature), all_gather_with_grad(text.feature)
            keys, distillation = Keys(images, texts, gather_features(batch.group_id)), 0.0
        labels = view or TeacherView(image.feature.detach(), text.feature.detach())  # not read without distillation
        seen, temperature = StudentView(image, text), student.temperature[0]
        terms |= image_text_contrast(seen, labels, keys, batch.group_id, temperature, distillation)
    step, tau = schedule.step, within_bounds(student.temperature)[0]
    draws, progress = Draws(recipe.seed, step, batch.index), step / recipe.training.max_steps
    own = ObjectiveView(student.model, batch, image, text, tau, view, draws, step, progress)
    further = dict(system.losses(own))
    found, own_weights = own_terms(section, own)
    if taken := further.keys() & {*terms, *found, "loss", "temperature"}:
        raise ValueError(f"losses() of system {recipe.model.system!r} returned {min(taken)!r}, another term's name")
    terms |= further | found
    weights |= dict.fromkeys(further, 1.0) | own_weights
    loss = 0.0 * student.temperature.float().sum()  # a live graph even where no objective has begun
    for name, weight in weights.items():
        if name in terms:
            loss = loss + weight * terms[name].float()
    terms |= {"loss": loss, "temperature": student.temperature.float()[0].clamp(0.001, 0.5)}
    detached = {name: term.detach() for name, term in terms.items()}
    return OwnLosses(loss, detached, image.feature.detach(), text.feature.detach())


def _check_features(method: str, feature: Tensor, batch: Batch, recipe: Recipe) -> None:
    pairs, width = len(batch), recipe.model.projection_width
    if tuple(feature.shape) == (pairs, width):
        return
    fits = feature.ndim == 2 and len(feature) == pairs
    remedy = "set model.projection_width to the width of its features" if fits else "give one feature for each pair"
    raise ValueError(
        f"system {recipe.model.system!r}: {method} gives {tuple(feature.shape)}, not ({pairs}, {width}): {remedy}"
    )
