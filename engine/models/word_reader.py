"""The image-query block: patches that read the words, and say which ones they read."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from crossmask.kernels import cross_attention

from ..masking import reads_words
from ..recipe import MaskingSection, ModelSection
from .fusion import Attention


class WordReader(nn.Module):
    """Image tokens read the words by cross-attention, with a residual; the front of the patch decoder.

    Patches that were left out of the encoder come as placeholders that know of no other patch: with ``self_attention``
    image tokens look at each other before they read the words, as in MAE's decoder (He et al. 2022).
    """

    def __init__(
        self, width: int, text_width: int, heads: int, self_attention: bool = False, qk_norm: bool = False
    ) -> None:
        """``qk_norm``: cosine attention to the words, see :class:`Attention`."""
        super().__init__()
        self.self_norm = nn.LayerNorm(width) if self_attention else None
        self.self_attention = Attention(width, width, heads) if self_attention else None
        self.norm = nn.LayerNorm(width)
        self.attention = Attention(width, text_width, heads, qk_norm)

    def read(self, image_tokens: Tensor, text_tokens: Tensor, token_mask: Tensor) -> Tensor:
        """(B, 1 + P, width) image tokens and (B, L, text width) words -> (B, 1 + P, width)."""
        x = self._look_around(image_tokens)
        return x + self.attention(self.norm(x), self.attention.project(text_tokens), token_mask)

    def forward(self, image_tokens: Tensor, text_tokens: Tensor, token_mask: Tensor) -> Tensor:
        """See :meth:`read`."""
        return self.read(image_tokens, text_tokens, token_mask)

    @torch.no_grad()
    def word_attention(self, image_tokens: Tensor, text_tokens: Tensor, words: Tensor) -> Tensor:
        """(B, L) float32: the mean over heads and patches of the patches' softmax over ``words`` (B, L) bool.

        The image's CLS asks nothing here. A caption without a word that counts gives zeros.
        """
        x = self.norm(self._look_around(image_tokens)[:, 1:])
        found = cross_attention(
            self.attention.ask(x),
            *self.attention.project(text_tokens),
            key_mask=words,
            statistics=("key_attention",),
            check_finite=False,
        ).statistics.key_attention
        assert found is not None
        return found

    def _look_around(self, x: Tensor) -> Tensor:
        if self.self_norm is None or self.self_attention is None:
            return x
        y = self.self_norm(x)
        return x + self.self_attention(y, self.self_attention.project(y))


def build_word_reader(section: ModelSection, masking: MaskingSection | None) -> WordReader | None:
    """Fresh: the block of a recipe whose masks read it (``direction: two_blocks`` of the policy syncmask), else None.

    As wide as the image tower, with its heads; cosine attention where the fusion encoder's is (``fusion.qk_norm``).
    """
    if masking is None or not reads_words(masking):
        return None
    image, drops = section.image, masking.hidden_patches == "drop"
    with torch.random.fork_rng(devices=[]):  # so that the rest begins as it does without the block
        return WordReader(image.width, section.text.width, image.heads, drops, section.fusion.qk_norm)
