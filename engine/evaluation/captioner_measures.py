"""What a contrastive captioner does on held-out pairs: how likely their captions are, and pixels brought back."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..beats import beat
from ..data.batch import Batch
from ..masking import MaskPlan
from ..models import Encoded
from ..models.captioner import Context
from ..objectives.captioning import image_captioning, low_patches
from ..objectives.tg_mim import patch_pixels
from ..recipe import Recipe
from .masks import CHUNK, Look, Shares, add_mask_shares


def is_captioner(model: Any) -> bool:
    """Whether it has a text decoder in place of a fusion encoder and a match head."""
    return hasattr(model, "caption_hidden")


@torch.no_grad()
def captioner_measures(
    model: Any, batch: Batch, look: Look, recipe: Recipe, device: torch.device | str
) -> dict[str, float]:
    """On one batch of held-out pairs; losses are means, of pixels as normalised.

    * ``caption_loss``: nats a word, from the whole image; ``caption_loss_other``: from another pair's image.
    * ``reconstruction``: L1 on the high patches; ``reconstruction_other``: with another pair's caption, so that the
      difference is what the words are worth; ``reconstruction_mean``: of painting them in the other patches' mean.
    * ``low_on_drawing``, ``low_on_named``: as their namesakes, of the low patches.

    Of one pair alone there is no other, and nothing is said of it.
    """
    found, low = Shares(), Shares()
    for rows in _chunks(len(batch)):
        beat("evaluation: captions and pixels")
        part = batch.rows(rows).to(device)
        seen, plan = look(model, part)
        words = part.token_mask[:, 1:].sum()
        read = {"caption_loss": model.context(seen.image)}
        other = torch.arange(len(part), device=part.images.device).roll(1) if len(part) > 1 else None
        if other is not None:
            tokens, mask = read["caption_loss"].tokens, read["caption_loss"].mask
            read["caption_loss_other"] = Context(tokens[other], None if mask is None else mask[other])
        for name, context in read.items():
            loss = image_captioning(model, seen.text, context, part.token_ids, part.token_mask)["caption"]
            found.add(name, loss * words, words)
        if model.image_decoder is not None:
            _add_reconstruction(found, model, part, plan, seen.text, other, recipe)
        if plan.more_images:
            add_mask_shares(low, MaskPlan(low_patches(plan), plan.text), part, model.patch_grid)
    of_low = {f"low_{name}": v for name, v in low.result().items() if name in ("on_drawing", "on_named")}
    return found.result() | of_low


def _chunks(count: int) -> Iterator[slice]:
    """All rows, so many at once that each has another beside it, unless there is but one."""
    start = 0
    while start < count:
        end = min(start + CHUNK, count)
        end -= end == count - 1
        yield slice(start, end)
        start = end


def _add_reconstruction(
    shares: Shares, model: Any, batch: Batch, plan: MaskPlan, text: Encoded, other: Tensor | None, recipe: Recipe
) -> None:
    hidden, pixels = plan.image, patch_pixels(batch.images, model.patch_size)
    painted = reconstruct(model, batch, plan, text if recipe.objectives.tg_mim.text else None, recipe)
    colours = pixels.unflatten(2, (3, -1)).mean(3)  # (B, P, 3)
    seen = (~hidden).float()[..., None]
    mean = (colours * seen).sum(1) / seen.sum(1).clamp(min=1)  # (B, 3)
    guesses = {"reconstruction": painted, "reconstruction_mean": _filled(mean, pixels)}
    if recipe.objectives.tg_mim.text and other is not None:
        wrong = Encoded(text.tokens[other], text.feature[other])
        guesses["reconstruction_other"] = reconstruct(model, batch, plan, wrong, recipe, batch.token_mask[other])
    for name, guess in guesses.items():
        shares.add(name, (guess - pixels).abs().mean(2) * hidden, hidden)


def reconstruct(
    model: Any, batch: Batch, plan: MaskPlan, text: Encoded | None, recipe: Recipe, mask: Tensor | None = None
) -> Tensor:
    """(B, P, 3 patch²) float32: what the image decoder paints everywhere, from the image without its high patches."""
    drop, after = recipe.masking.hidden_patches == "drop", recipe.masking.drop_after
    encoded = model.encode_image(batch.images, plan.image, drop=drop, drop_after=after, feature=False)
    painted: Tensor = model.reconstruct(encoded, text, batch.token_mask if mask is None else mask)
    return painted.float()


def _filled(colour: Tensor, pixels: Tensor) -> Tensor:
    """(B, 3) as (B, P, 3 patch²)."""
    return colour[:, None, :, None].expand(-1, pixels.shape[1], -1, pixels.shape[2] // 3).flatten(2)
