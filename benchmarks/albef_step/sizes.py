"""How large the measured model and its batches are."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

PAD, CLS, SEP, MASK, FIRST_WORD = 0, 101, 102, 103, 999  # of bert-base-uncased's vocabulary
# Tokens of eight captions whose longest has 25, in 25ths: a quarter of the padded rectangle is padding. Image captions
# have 10 to 20 tokens with a tail, and a batch is as long as its longest.
CAPTIONS = (25, 22, 20, 19, 18, 17, 15, 14)


@dataclass(frozen=True)
class Sizes:
    """ALBEF-base (Li et al. 2021), unless said otherwise."""

    batch: int = 8
    image: int = 256
    patch: int = 16
    width: int = 768
    heads: int = 12
    image_depth: int = 12
    text_depth: int = 6
    fusion_depth: int = 6
    mlp_ratio: int = 4
    projection: int = 256
    queue: int = 65536
    vocabulary: int = 30522
    positions: int = 512
    dropout: float = 0.1
    masked: float = 0.15

    @property
    def image_tokens(self) -> int:
        """[CLS] included."""
        return (self.image // self.patch) ** 2 + 1


BASE = Sizes()
TINY = Sizes(4, 32, 16, 48, 4, 2, 2, 2, 4, 16, 40, 1100, 32)


@dataclass(frozen=True)
class Captioned:
    """B images and their captions."""

    images: Tensor  # (B, 3, H, W) float32
    token_ids: Tensor  # (B, L) int64
    token_mask: Tensor  # (B, L) bool

    @property
    def maskable(self) -> Tensor:
        """(B, L) bool: real tokens but [CLS] and [SEP]."""
        return self.token_mask & (self.token_ids != CLS) & (self.token_ids != SEP)

    def to(self, device: torch.device) -> Captioned:
        return Captioned(self.images.to(device), self.token_ids.to(device), self.token_mask.to(device))


def lengths(sizes: Sizes, longest: int) -> list[int]:
    """Tokens of each caption, [CLS] and [SEP] included."""
    return [max(3, round(CAPTIONS[row % len(CAPTIONS)] / CAPTIONS[0] * longest)) for row in range(sizes.batch)]


def random_batch(sizes: Sizes, longest: int, seed: int = 0) -> Captioned:
    """Noise for images, random words for captions; the captions' lengths are always the same."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(sizes.batch, 3, sizes.image, sizes.image, generator=generator)
    ids = torch.randint(FIRST_WORD, sizes.vocabulary, (sizes.batch, longest), generator=generator)
    mask = torch.zeros(sizes.batch, longest, dtype=torch.bool)
    ids[:, 0] = CLS
    for row, length in enumerate(lengths(sizes, longest)):
        ids[row, length - 1], ids[row, length:], mask[row, :length] = SEP, PAD, True
    return Captioned(images, ids, mask)
