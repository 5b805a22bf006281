"""The image tower: a timm Vision Transformer whose patches can be masked or left out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import GroupNormAct, HybridEmbed
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer_hybrid import ConvStem
from torch import Tensor, nn

from crossmask.kernels import cross_attention

from ..errors import RecipeError
from ..recipe import ImageTowerSection
from .dropping import Visible, gather, keep_visible, restore


class ImageTokens(NamedTuple):  # a tuple: DeepSpeed's ZeRO-3 finds no tensor to hook in a dataclass
    tokens: Tensor  # (B, 1 + P, width), CLS first; (B, 1 + V, width) where patches were left out
    visible: Visible | None = None  # the patches that were kept; None = all
    attention: Tensor | None = None  # (B, P) float32, if it was asked for


class ImageTower(nn.Module):
    """ViT (Dosovitskiy et al. 2021) with a learned mask token; ``stem: conv`` replaces the patch projection by
    stride-2 convolutions (Xiao et al. 2021, "Early convolutions help transformers see better")."""

    def __init__(self, section: ImageTowerSection, **options: Any) -> None:
        """``options``: of timm's VisionTransformer, beyond what a recipe says."""
        super().__init__()
        self.patch_size = section.patch_size
        side = section.size // section.patch_size
        self.patch_grid = (side, side)
        extra: dict[str, Any] = {}
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
            **options,
        )
        self.mask_token = nn.Parameter(torch.zeros(section.width))
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(
        self,
        images: Tensor,
        patch_mask: Tensor | None = None,
        *,
        drop: bool = False,
        drop_after: int = 0,
        visible_count: int | None = None,
        attention_of: str | None = None,
    ) -> ImageTokens:
        """Encode (B, 3, H, W) images.

        Args:
            patch_mask: (B, P) bool, True = hidden: such a patch becomes the mask token, or leaves with ``drop``.
            drop: leave hidden patches out: the blocks cost what the visible ones cost. After the embedding, as in MAE
                (He et al. 2022), or
            drop_after: after so many blocks (deferred masking: Sehwag et al. 2024, "Stretching each dollar"), which
                still see every patch, so that what was hidden has already spoken to the rest.
            visible_count: with ``drop``, how many patches every row keeps; see ``keep_visible``.
            attention_of: ``"cls"`` or ``"mean"``: also tell where those queries of the last block look.

        Raises:
            RecipeError: attention is asked of a tower without blocks.
            ValueError: ``drop_after`` is more than there are blocks, or ``visible_count`` is wrong.
        """
        vit, blocks = self.vit, len(self.vit.blocks)
        if attention_of is not None and blocks == 0:
            raise RecipeError("masking policy needs image_attention: model.image.depth of at least 1")
        visible = None
        if drop and patch_mask is not None:
            if not 0 <= drop_after <= blocks:
                raise ValueError(f"drop_after must lie in 0 .. {blocks}, the tower's blocks, got {drop_after}")
            visible = keep_visible(patch_mask, visible_count)
        tokens = self._embed(images, patch_mask, visible is not None, drop_after)
        # PyTorch's fused CPU attention is several times slower than plain products in half precision (backward).
        half = tokens.dtype != torch.float32 or torch.is_autocast_enabled("cpu")
        fused = tokens.device.type != "cpu" or not half
        keys = attention = None  # keys (B, 1, 1, 1 + V) bool: where rows differ in length, what may be attended to
        for number, block in enumerate(vit.blocks):
            block.attn.fused_attn = fused
            if visible is not None and number == drop_after:
                tokens, keys = self._drop(tokens, visible)
            with _projected(block.attn, wanted=attention_of is not None and number == blocks - 1) as projected:
                tokens = block(tokens) if keys is None else block(tokens, attn_mask=keys)
            if attention_of is not None and projected:
                left = visible if number >= drop_after else None
                attention = _attended(block.attn, projected[0], attention_of, left, self.patch_grid)
        if visible is not None and drop_after == blocks:
            tokens, _ = self._drop(tokens, visible)
        return ImageTokens(vit.norm(tokens), visible, attention)

    def _embed(self, images: Tensor, patch_mask: Tensor | None, dropping: bool, drop_after: int) -> Tensor:
        """What the first block reads, or would if no patch had left: (B, 1 + P, width)."""
        vit = self.vit
        # A convolutional stem sees across patch borders, so hidden patches lose their pixels before it as well.
        spreads = isinstance(vit.patch_embed, HybridEmbed) and drop_after == 0
        if patch_mask is not None and (spreads or not dropping):
            images = images.masked_fill(self._pixels(patch_mask), 0.0)
        tokens = vit.patch_embed(images)
        if patch_mask is not None and not dropping:
            tokens = torch.where(patch_mask[..., None], self.mask_token.to(tokens.dtype), tokens)
        return vit.norm_pre(vit._pos_embed(tokens))

    @staticmethod
    def _drop(tokens: Tensor, visible: Visible) -> tuple[Tensor, Tensor | None]:
        """CLS and the visible patches, and which of them count as keys."""
        kept = visible.after(1)
        return gather(tokens, kept), None if kept.valid is None else kept.valid[:, None, None]

    def placeholders(self) -> Tensor:
        """(1 + P, width): the mask token at every position, to stand where a patch was left out. At CLS's place 0."""
        positions = self.vit.pos_embed[0]
        return torch.cat([torch.zeros_like(positions[:1]), self.mask_token + positions[1:]])

    def _pixels(self, patch_mask: Tensor) -> Tensor:
        """(B, P) patches -> (B, 1, H, W) pixels."""
        grid = patch_mask.reshape(-1, 1, *self.patch_grid)
        return F.interpolate(grid.to(torch.uint8), scale_factor=self.patch_size, mode="nearest").bool()


@contextmanager
def _projected(attention: Any, wanted: bool) -> Iterator[list[Tensor]]:
    """Keeps the queries, keys and values (B, N, 3 * width) that an attention computes anyway."""
    found: list[Tensor] = []
    handle = (
        attention.qkv.register_forward_hook(lambda module, args, out: found.append(out.detach())) if wanted else None
    )
    try:
        yield found
    finally:
        if handle is not None:
            handle.remove()


@torch.no_grad()
def _attended(
    attention: Any, projected: Tensor, queries: str, visible: Visible | None, grid: tuple[int, int]
) -> Tensor:
    """(B, P) float32: how much attention each patch gets among the patches, mean over heads; a row sums to one.

    ``queries``: "cls" is AttMask's map (Kakogeorgiou et al. 2022; there the softmax runs over [CLS] as well, which
    weighs a head by how much of it goes to patches at all); "mean" takes the mean over every patch's query, for towers
    whose [CLS] no loss reaches. Patches that were left out get 0.
    """
    q, k, v = projected.unflatten(-1, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    q, k = attention.q_norm(q), attention.k_norm(k)
    cls, valid = queries == "cls", None if visible is None else visible.valid
    found = cross_attention(
        q[:, :, :1] if cls else q[:, :, 1:],
        k[:, :, 1:],
        v[:, :, 1:],
        key_mask=valid,
        query_mask=None if cls else valid,
        statistics=("key_attention",),
        check_finite=False,
    ).statistics.key_attention
    assert found is not None
    found = found.float()
    return (
        found if visible is None else restore(found[..., None], visible, found.new_zeros(1), grid[0] * grid[1])[..., 0]
    )


def _conv_stem(patch_size: int) -> ConvStem:
    """Stride-2 convolutions down to one position a patch. Group norm keeps samples independent of their batch."""
    depth = patch_size.bit_length() - 1
    channels = tuple(min(256, 32 * 2**i) for i in range(depth))
    norm = partial(GroupNormAct, group_size=16)
    return ConvStem(depth=depth, channels=channels, stride=(2,) * depth, norm_layer=norm, act_layer=nn.ReLU)
