"""The image tower: a timm Vision Transformer whose patches can be masked."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from timm.layers import GroupNormAct, HybridEmbed
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer_hybrid import ConvStem
from torch import Tensor, nn

from ..recipe import ImageTowerSection


class ImageTower(nn.Module):
    """ViT (Dosovitskiy et al. 2021) with a learned mask token; ``stem: conv`` replaces the patch projection by
    stride-2 convolutions (Xiao et al. 2021, "Early convolutions help transformers see better")."""

    def __init__(self, section: ImageTowerSection) -> None:
        super().__init__()
        self.patch_size = section.patch_size
        side = section.size // section.patch_size
        self.patch_grid = (side, side)
        extra = {}
        if section.stem == "conv":
            extra = {"embed_layer": partial(HybridEmbed, backbone=_conv_stem(section.patch_size))}
        self.vit = VisionTransformer(
            img_size=section.size,
            patch_size=1 if extra else section.patch_size,
            embed_dim=section.width,
            depth=section.depth,
            num_heads=section.heads,
            mlp_ratio=section.mlp_ratio,
            num_classes=0,
            global_pool="",
            **extra,
        )
        self.mask_token = nn.Parameter(torch.zeros(section.width))
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, images: Tensor, patch_mask: Tensor | None = None) -> Tensor:
        """(B, 3, H, W) images, (B, P) bool mask of hidden patches or None -> (B, 1 + P, width) tokens, CLS first."""
        vit = self.vit
        if patch_mask is not None:
            # A convolutional stem sees across patch borders, so hidden patches lose their pixels before it as well.
            images = images.masked_fill(self._pixels(patch_mask), 0.0)
        tokens = vit.patch_embed(images)
        if patch_mask is not None:
            tokens = torch.where(patch_mask[..., None], self.mask_token.to(tokens.dtype), tokens)
        tokens = vit.norm_pre(vit._pos_embed(tokens))
        # PyTorch's fused CPU attention is several times slower than plain products in half precision (backward).
        fused = tokens.device.type != "cpu" or tokens.dtype == torch.float32
        for block in vit.blocks:
            block.attn.fused_attn = fused
        return vit.norm(vit.blocks(tokens))

    def _pixels(self, patch_mask: Tensor) -> Tensor:
        """(B, P) patches -> (B, 1, H, W) pixels."""
        grid = patch_mask.reshape(-1, 1, *self.patch_grid)
        return F.interpolate(grid.to(torch.uint8), scale_factor=self.patch_size, mode="nearest").bool()


def _conv_stem(patch_size: int) -> ConvStem:
    """Stride-2 convolutions down to one position a patch. Group norm keeps samples independent of their batch."""
    depth = patch_size.bit_length() - 1
    channels = tuple(min(256, 32 * 2**i) for i in range(depth))
    norm = partial(GroupNormAct, group_size=16)
    return ConvStem(depth=depth, channels=channels, stride=(2,) * depth, norm_layer=norm, act_layer=nn.ReLU)
