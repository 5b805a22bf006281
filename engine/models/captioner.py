"""The contrastive captioner: the part of SyCoCa's student that the momentum teacher mirrors.

The layout is open_clip's CoCa: a state dict of it maps to this model by renaming, splitting and joining tensors, apart
from the image tower's mask token and the image decoder, which SyCoCa adds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import torch
import torch.nn.functional as F
from timm.layers.activations import QuickGELU
from torch import Tensor, nn

from crossmask.kernels.linear import use_linear

from ..errors import RecipeError
from ..recipe import ModelSection
from .captioner_blocks import AttentionalPooler, Decoder
from .captioner_text import CausalTextTower
from .dropping import restore
from .fusion import KeyValue
from .vision import ImageTower
from .vision_language import Encoded, pool_patches

T = TypeVar("T")


@dataclass(frozen=True)
class Context:
    """What the text decoder reads of an image."""

    tokens: Tensor  # (B, C, width): patches, or what the pooler's queries read of them
    mask: Tensor | None = None  # (B, C) bool, True = may be looked at; None = all


class CaptioningModel(nn.Module):
    """CoCa (Yu et al. 2022): image tower, causal text tower, their projections, text decoder and vocabulary; for SyCoCa
    (Ma et al. 2024) an image decoder with a head of pixels.

    ``Encoded`` here: of an image the image tower's tokens (B, 1 + P, image width), CLS first, before any pooler, and
    with ``single`` one before the last layer norm, too; of a text the tokens (B, L, width) that go with ``token_ids``,
    not normalised. The text's learned [CLS] is in its feature alone.
    """

    def __init__(
        self,
        section: ModelSection,
        vocabulary_size: int,
        max_length: int,
        pad_id: int = 0,
        *,
        reconstructs: bool = False,
        mask_id: int = 4,
    ) -> None:
        """``max_length``: tokens of the longest caption. ``reconstructs``: with an image decoder. ``mask_id``: of
        the tokenizer, as every model is told it; no captioner reads that word.

        Raises:
            RecipeError: widths that the heads do not divide, or positions that are too few.
        """
        super().__init__()
        captioner = section.captioner
        if captioner is None:
            raise RecipeError("model.captioner is missing: a captioning model is described there")
        image, text, pooler = section.image, section.text, captioner.pooler
        self.pool, std = section.pool, captioner.initial_std
        of_image = {"norm_layer": partial(nn.LayerNorm, eps=1e-5), "pre_norm": captioner.norm_pre}
        if captioner.quick_gelu:
            of_image["act_layer"] = QuickGELU
        self.kind = None if pooler is None else pooler.kind
        self.image = ImageTower(image, **of_image, final_norm=self.kind != "single")
        self.text = CausalTextTower(text, captioner, vocabulary_size, max_length, pad_id, section.pool)
        width = image.width
        if pooler is not None:
            width = section.projection_width
            self.pooler = AttentionalPooler(width, image.width, pooler.queries, pooler.heads)
            if pooler.kind == "single":
                self.pooled_norm = nn.LayerNorm(width)
            else:
                keys = width if pooler.kind == "cascade" else image.width
                self.contrast_pooler = AttentionalPooler(width, keys, 1, pooler.heads)
        self.image_projection = nn.Linear(width, section.projection_width, bias=False)
        self.text_projection = nn.Linear(text.width, section.projection_width, bias=False)
        self.text_decoder = Decoder(text.width, width, captioner.depth, captioner)
        self.vocabulary = nn.Linear(text.width, vocabulary_size, bias=False)
        self.image_decoder: Decoder | None = None
        if reconstructs:
            self.image_decoder = Decoder(image.width, text.width, captioner.image_depth or captioner.depth, captioner)
            self.pixel_head = nn.Linear(image.width, 3 * image.patch_size**2)
        self._begin(std)
        use_linear(self)

    @torch.no_grad()
    def _begin(self, std: float | None) -> None:
        """First weights of what is no block of the text tower or of a decoder."""
        heads = [self.image_projection, self.text_projection, self.vocabulary]
        if self.image_decoder is not None:
            heads.append(self.pixel_head)
            nn.init.zeros_(self.pixel_head.bias)
        for head in heads:
            nn.init.normal_(head.weight, std=head.in_features**-0.5 if std is None else std)
        if std is not None:
            for layer in self.image.modules():
                if isinstance(layer, nn.Linear):
                    nn.init.normal_(layer.weight, std=std)

    @property
    def patch_grid(self) -> tuple[int, int]:
        return self.image.patch_grid

    @property
    def patch_size(self) -> int:
        return self.image.patch_size

    @property
    def dtype(self) -> torch.dtype:
        return self.vocabulary.weight.dtype

    def forward(self, visit: Callable[[CaptioningModel], T]) -> T:
        """Run ``visit(self)`` inside this module's forward: ZeRO-3 gathers parameters only there."""
        return visit(self)

    def encode_image(
        self,
        images: Tensor,
        patch_mask: Tensor | None = None,
        *,
        drop: bool = False,
        drop_after: int = 0,
        visible_count: int | None = None,
        attention: bool = False,
        feature: bool = True,
    ) -> Encoded:
        """(B, 3, H, W) -> tokens (B, 1 + P, image width), CLS first, and the feature. ``patch_mask`` (B, P) bool hides
        patches; ``drop``, ``drop_after``, ``visible_count``, ``attention`` as in ``VisionLanguageModel``.

        Without ``feature`` the tokens alone: no pooler runs, for who does not contrast."""
        seen = self.image(
            images.to(self.dtype),
            patch_mask,
            drop=drop,
            drop_after=drop_after,
            visible_count=visible_count,
            attention_of=self.pool if attention else None,
        )
        none = seen.tokens.new_zeros(len(seen.tokens), 0, dtype=torch.float32)
        encoded = Encoded(seen.tokens, none, seen.visible, seen.attention)
        if not feature:
            return encoded
        if self.kind in ("single", "cascade"):  # the text decoder may read what the feature is made of
            encoded = replace(encoded, pooled=self._read(encoded))
        return replace(encoded, feature=F.normalize(self.image_projection(self._pooled(encoded)).float(), dim=-1))

    def _pooled(self, encoded: Encoded) -> Tensor:
        """(B, width): what stands for the image in ITC, before its projection."""
        if self.kind == "parallel":
            return self.contrast_pooler(encoded.tokens, encoded.image_mask)[:, 0]
        if encoded.pooled is None:
            return pool_patches(encoded.tokens, encoded.visible, self.pool)
        read = encoded.pooled if self.kind == "single" else self.contrast_pooler(encoded.pooled)
        return read[:, 0]

    def _read(self, encoded: Encoded, mask: Tensor | None = None) -> Tensor:
        """(B, queries, width): what the pooler's queries read; ``mask`` (B, N) bool, default all that is visible."""
        read = self.pooler(encoded.tokens, encoded.image_mask if mask is None else mask)
        return self.pooled_norm(read) if self.kind == "single" else read

    def context(self, encoded: Encoded, hidden: Tensor | None = None) -> Context:
        """What the text decoder reads of an encoded image, the image's CLS never. ``hidden`` (B, P) bool: patches of an
        image whose patches were all encoded that are left out of it."""
        if hidden is not None and encoded.visible is not None:
            raise ValueError("hidden is for images whose patches were all encoded")
        if self.kind is not None:
            mask = None if hidden is None else F.pad(~hidden, (1, 0), value=True)
            read = self._read(encoded, mask) if mask is not None or encoded.pooled is None else encoded.pooled
            return Context(read[:, 1:] if self.kind == "single" else read)
        patches = encoded.tokens[:, 1:]
        if hidden is not None:
            return Context(patches, ~hidden)
        return Context(patches, None if encoded.visible is None else encoded.visible.valid)

    def encode_text(self, token_ids: Tensor, token_mask: Tensor) -> Encoded:
        """(B, L) ids and mask -> tokens (B, L, width), each of itself and those before it, and the feature."""
        seen = self.text(token_ids, token_mask)
        return Encoded(seen.tokens, F.normalize(self.text_projection(seen.pooled).float(), dim=-1))

    def patch_features(self, image_tokens: Tensor) -> Tensor:
        """(B, 1 + P, image width) -> (B, P, E) float32, length 1: the patches where features are compared, before any
        pooler. With one, what its query would read of that patch alone (a reconstruction)."""
        patches = image_tokens[:, 1:]
        if self.kind == "single":
            patches = self.pooled_norm(self.pooler.alone(patches))
        elif self.kind == "cascade":
            patches = self.contrast_pooler.alone(self.pooler.alone(patches))
        elif self.kind == "parallel":
            patches = self.contrast_pooler.alone(patches)
        return F.normalize(self.image_projection(patches).float(), dim=-1)

    def word_features(self, text_tokens: Tensor) -> Tensor:
        """(B, L, width) -> (B, L, E) float32, length 1: the words where features are compared."""
        return F.normalize(self.text_projection(self.text.norm(text_tokens)).float(), dim=-1)

    def caption_hidden(
        self, text_tokens: Tensor, token_mask: Tensor | None, context: Context | Sequence[KeyValue]
    ) -> Tensor:
        """(B, L, width) tokens of :meth:`encode_text` -> (B, L, width): what tells each word's next one.

        ``context``: of :meth:`context`, or the keys and values that ``text_decoder.project`` made of its tokens.
        """
        mask = context.mask if isinstance(context, Context) else None
        keys = self.text_decoder.project(context.tokens) if isinstance(context, Context) else context
        found: Tensor = self.text_decoder(text_tokens, keys, token_mask, mask, causal=True)
        return found

    def caption_logits(
        self, text_tokens: Tensor, token_mask: Tensor | None, context: Context | Sequence[KeyValue]
    ) -> Tensor:
        """(B, L, width) -> (B, L, V): of each place the word behind it, see :meth:`caption_hidden`."""
        logits: Tensor = self.vocabulary(self.caption_hidden(text_tokens, token_mask, context))
        return logits

    def reconstruct(self, encoded: Encoded, text: Encoded | None, token_mask: Tensor | None) -> Tensor:
        """An image whose patches were hidden in either way, and a caption or None -> (B, P, 3 patch²) pixels, each
        patch as ``F.unfold`` lays it out.

        Where patches were left out of the image tower, the mask token with the tower's position stands in for them.
        """
        if self.image_decoder is None:
            raise ValueError("the model has no image decoder: it was built without objectives.tg_mim")
        tokens = encoded.tokens
        if encoded.visible is not None:
            places = self.image.placeholders()
            tokens = restore(tokens, encoded.visible.after(1), places, len(places))
        keys = None if text is None else self.image_decoder.project(text.tokens)
        found = self.image_decoder(tokens[:, 1:], keys, None, token_mask if text is not None else None)
        pixels: Tensor = self.pixel_head(found)
        return pixels
