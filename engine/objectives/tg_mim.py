"""Text-guided masked image modelling: the pixels of hidden patches from the other patches and the caption."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..models import Encoded
from ..models.captioner import CaptioningModel
from .views import Terms


def patch_pixels(images: Tensor, size: int) -> Tensor:
    """(B, 3, H, W) -> (B, P, 3 size²): each patch's pixels, channel by channel, patches row by row."""
    return F.unfold(images.float(), size, stride=size).transpose(1, 2)


def text_guided_image_modelling(
    model: CaptioningModel,
    images: Tensor,
    hidden: Tensor,
    encoded: Encoded,
    text: Encoded | None,
    token_mask: Tensor,
) -> Terms:
    """TG-MIM of SyCoCa (Ma et al. 2024): L1 between an image decoder's pixels and the normalised image's, mean over
    masked pixels (that mean is a reconstruction).

    Args:
        hidden: (R, P) bool, the patches that ``encoded`` was made without; (R, 3, H, W) ``images`` are whole.
        text: whose words the decoder reads; None: none, which is masked image modelling.

    No masked patch at all gives 0 with a live graph.
    """
    found = model.reconstruct(encoded, text, token_mask).float()
    with torch.no_grad():
        wanted = patch_pixels(images, model.patch_size)
    of_patch = (found - wanted).abs().mean(2)
    return {"tg_mim": of_patch.where(hidden, 0.0).sum() / hidden.sum().clamp(min=1)}
