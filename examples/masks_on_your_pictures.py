"""What a mask policy hides of your own pictures, by what a timm model looks at; no training, no engine.

    python examples/masks_on_your_pictures.py picture.jpg other.png --output masks.png [--weights] [--policy attmask]

Without ``--weights`` the model is untrained, and what it looks at is chance; with it timm downloads its weights.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import timm
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

from crossmask.engine.masking import choose_masks
from crossmask.kernels.modules import record_attention

SIDE = 224


def load(path: Path) -> Tensor:
    """(3, SIDE, SIDE) in 0..1"""
    return pil_to_tensor(Image.open(path).convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC)) / 255


def looked_at(model: torch.nn.Module, images: Tensor) -> Tensor:
    """(B, P) float32: what [CLS] looks at in the last block, mean over heads."""
    tokens = 1 + model.patch_embed.num_patches
    first = torch.zeros(len(images), tokens, dtype=torch.bool)
    first[:, 0] = True
    last = f"blocks.{len(model.blocks) - 1}"
    with torch.no_grad(), record_attention(model, last, query_mask=first) as record:
        model((images - 0.5) / 0.5)
    (told,) = record.values()
    assert told.key_attention is not None
    return told.key_attention[:, 1:]


def draw(images: Tensor, scores: Tensor, hidden: Tensor, side: int) -> Image.Image:
    """Each picture, what is looked at, and what is left of it, side by side."""

    def patches(x: Tensor) -> Tensor:
        return x.float().view(-1, 1, side, side).repeat_interleave(SIDE // side, 2).repeat_interleave(SIDE // side, 3)

    bright = scores / scores.amax(1, keepdim=True)
    rows = torch.cat([images, patches(bright).expand(-1, 3, -1, -1), images * (1 - patches(hidden))], 3)
    return to_pil_image(torch.cat(list(rows), 1))


def main(pictures: list[Path], output: Path, policy: str, ratio: float, name: str, weights: bool) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name, pretrained=weights).eval()
    images = torch.stack([load(picture) for picture in pictures])
    scores = looked_at(model, images)
    grid = model.patch_embed.grid_size
    seen = {"image_attention": scores, "similarities": scores, "caption_similarity": scores}
    plan = choose_masks(policy, grid=grid, image_ratio=ratio, **seen)
    draw(images, scores, plan.image, grid[0]).save(output)
    print(f"{policy} hides {plan.image.float().mean():.0%} of {len(pictures)} pictures: {output}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pictures", type=Path, nargs="+")
    parser.add_argument("--output", type=Path, default=Path("masks.png"))
    parser.add_argument("--policy", default="sycoca")
    parser.add_argument("--ratio", type=float, default=0.5)
    parser.add_argument("--model", default="vit_tiny_patch16_224")
    parser.add_argument("--weights", action="store_true", help="download timm's weights")
    given = parser.parse_args()
    if absent := [file for file in given.pictures if not file.is_file()]:
        parser.error(f"there is no picture {absent[0]}")
    main(given.pictures, given.output, given.policy, given.ratio, given.model, given.weights)
