"""One step of a contrastive captioner: three passes of the image tower, the masks between them, three losses."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..data.batch import Batch
from ..masking import Draws, MaskPlan
from ..models import Encoded
from ..models.captioner import CaptioningModel
from ..models.captioner_student import CaptioningStudent
from ..objectives import Keys, Terms
from ..objectives.captioning import caption_context, image_captioning, low_patches
from ..objectives.itc import image_text_contrast
from ..objectives.masks import RunMasks, Seen
from ..objectives.own import ObjectiveView, own_terms
from ..objectives.tg_mim import text_guided_image_modelling
from ..objectives.views import StudentView, TeacherView
from ..recipe import Recipe
from ..teacher import gather_features
from ..teacher.gather import all_gather_with_grad


class Captioned(NamedTuple):  # a tuple: DeepSpeed's ZeRO-3 finds no tensor to hook in a dataclass
    """What a micro-step gives."""

    loss: Tensor
    terms: Terms  # detached
    image_feature: Tensor  # (B, E), detached
    text_feature: Tensor  # (B, E), detached


def compute_captioner_losses(
    student: CaptioningStudent, batch: Batch, recipe: Recipe, masks: RunMasks, step: int, rows: int
) -> Captioned:
    """SyCoCa (Ma et al. 2024): ITC of the intact pairs, captions from the image without its low patches, pixels of the
    high patches from the rest and the words. The last two of the first ``rows`` pairs. Collective.

    The patches are chosen from the student's own intact pass, without gradient: the paper has no momentum model.
    """
    model, section = student.model, recipe.objectives
    image = model.encode_image(batch.images, attention=masks.attention and rows > 0)
    text = model.encode_text(batch.token_ids, batch.token_mask)
    terms: Terms = {}
    if section.itc.weight > 0:
        keys = Keys(
            all_gather_with_grad(image.feature), all_gather_with_grad(text.feature), gather_features(batch.group_id)
        )
        teacher = TeacherView(image.feature.detach(), text.feature.detach())  # not read without distillation
        seen = StudentView(image, text)
        terms |= image_text_contrast(seen, teacher, keys, batch.group_id, student.temperature[0], 0.0)
    if rows:
        part, words = batch.rows(slice(rows)), text.rows(slice(rows))
        intact = image.rows(slice(rows))
        plan = choose_masks(model, part, intact, words, masks, step) if hides(recipe) else None
        if section.caption.weight > 0:
            context = caption_context(model, part.images, intact, plan, recipe)
            terms |= image_captioning(model, words, context, part.token_ids, part.token_mask)
        if plan is not None and section.tg_mim.weight > 0:
            hidden = plan.image
            drop = recipe.masking.hidden_patches == "drop"
            after = recipe.masking.drop_after
            masked = model.encode_image(part.images, hidden, drop=drop, drop_after=after, feature=False)
            guide = words if section.tg_mim.text else None
            terms |= text_guided_image_modelling(model, part.images, hidden, masked, guide, part.token_mask)
        terms |= {} if plan is None else mask_shares(plan)
    weights = {"itc": section.itc.weight, "caption": section.caption.weight, "tg_mim": section.tg_mim.weight}
    if section.own:
        draws, progress = Draws(recipe.seed, step, batch.index), step / recipe.training.max_steps
        temperature = student.clamped_temperature
        found, own = own_terms(
            section, ObjectiveView(model, batch, image, text, temperature, None, draws, step, progress)
        )
        terms |= found
        weights |= own
    loss = 0.0 * student.temperature.float().sum()  # a live graph even where no objective has begun
    for name, weight in weights.items():
        if name in terms:
            loss = loss + weight * terms[name].float()
    terms |= {"loss": loss, "temperature": student.clamped_temperature}
    detached = {name: term.detach() for name, term in terms.items()}
    return Captioned(loss, detached, image.feature.detach(), text.feature.detach())


def hides(recipe: Recipe) -> bool:
    """Whether a step hides any patches: CoCa's own objectives do not."""
    caption, tg_mim = recipe.objectives.caption, recipe.objectives.tg_mim
    return tg_mim.weight > 0 or (caption.weight > 0 and caption.low_patches != "keep")


@torch.no_grad()
def choose_masks(
    model: CaptioningModel, batch: Batch, image: Encoded, text: Encoded, masks: RunMasks, step: int
) -> MaskPlan:
    """High patches first; low ones are the plan's second view, where it has one."""
    return masks.plan(model, batch, Seen(image, text), step)


def mask_shares(plan: MaskPlan) -> Terms:
    """Measures of a plan, under the names that a log has them by."""
    found: Terms = {"image_mask_ratio": plan.image.float().mean(), "masked_images": plan.image.any(1).float().mean()}
    if plan.more_images:
        found["low_mask_ratio"] = low_patches(plan).float().mean()
    return found
