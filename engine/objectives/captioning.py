"""Image captioning: the next word from the words before it and the image."""

from __future__ import annotations

from torch import Tensor

from crossmask.kernels import soft_cross_entropy

from ..masking import MaskPlan
from ..models import Encoded
from ..models.captioner import CaptioningModel, Context
from ..recipe import Recipe
from .views import Terms


def image_captioning(
    model: CaptioningModel, text: Encoded, context: Context, token_ids: Tensor, token_mask: Tensor
) -> Terms:
    """IC of CoCa (Yu et al. 2022), mean over words in nats: cross-entropy of each token behind the first, the one that
    ends the caption included, given those before it and ``context``.

    In SyCoCa (Ma et al. 2024) the context is without the patches that no word matches. ``token_ids`` and
    ``token_mask`` are (R, L), padding behind; logits of all words at all places never exist. No word to predict at all
    gives 0 with a live graph.
    """
    wanted = token_mask[:, 1:]  # place i tells token i + 1
    hidden = model.caption_hidden(text.tokens[:, :-1], wanted, context)
    places = wanted.flatten().nonzero()[:, 0]
    losses = soft_cross_entropy(
        hidden.flatten(0, 1).index_select(0, places),
        model.vocabulary.weight,
        None,
        token_ids[:, 1:].flatten().index_select(0, places),
    )
    return {"caption": losses.sum() / max(1, len(places))}


def low_patches(plan: MaskPlan) -> Tensor:
    """(R, P) bool: what captioning does without, the plan's second view."""
    return plan.more_images[0]


def caption_context(
    model: CaptioningModel, images: Tensor, image: Encoded, plan: MaskPlan | None, recipe: Recipe
) -> Context:
    """What the text decoder reads: of ``image``, the intact pass, or of a pass of its own over (R, 3, H, W) ``images``
    whose low patches are hidden (``objectives.caption.low_patches``)."""
    how = recipe.objectives.caption.low_patches
    if how == "keep" or plan is None:
        return model.context(image)
    if how == "drop":
        return model.context(image, low_patches(plan))
    drop, after = recipe.masking.hidden_patches == "drop", recipe.masking.drop_after
    return model.context(model.encode_image(images, low_patches(plan), drop=drop, drop_after=after, feature=False))
