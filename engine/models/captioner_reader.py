"""A captioner that writes: one token at a time, with what it has computed of those before kept."""

from __future__ import annotations

from torch import Tensor

from .captioner import CaptioningModel, Context
from .captioner_blocks import Block


class CaptionReader:
    """Keys and values of every self-attention grow by a token a step; those of the images are computed once, and the
    captions of one image read them where they lie, side by side."""

    def __init__(self, model: CaptioningModel, context: Context, captions: int, longest: int) -> None:
        """``captions`` of each of B images are read together, R = B x captions, at most ``longest`` tokens of them."""
        self.model, self.mask, self.captions, self.place = model, context.mask, captions, 0
        self.images = model.text_decoder.project(context.tokens)
        self.rows, tokens = len(context.tokens) * captions, context.tokens
        blocks = [*model.text.blocks, *model.text_decoder.self_blocks]
        self.kept: dict[Block, tuple[Tensor, Tensor]] = {}
        for block in blocks:
            assert isinstance(block, Block)
            heads, width = block.attention.heads, block.attention.query.out_features
            shape = (self.rows, heads, longest, width // heads)
            self.kept[block] = (tokens.new_empty(shape), tokens.new_empty(shape))

    def step(self, last: Tensor) -> Tensor:
        """(R,) int64, the next token of every caption -> (R, V): logits of the one behind it."""
        x = self.model.text.embed(last[:, None], self.place)
        for block in self.model.text.blocks:
            assert isinstance(block, Block)
            x = self._extend(block, x)
        for (own, cross), image in zip(self.model.text_decoder.layers(), self.images, strict=True):
            x = self._extend(own, x)
            beside = x.view(-1, self.captions, x.shape[-1])
            x = cross(beside, image, self.mask).view(self.rows, 1, -1)
        self.place += 1
        logits: Tensor = self.model.vocabulary(self.model.text_decoder.norm(x[:, 0]))
        return logits

    def _extend(self, block: Block, x: Tensor) -> Tensor:
        keys, values = self.kept[block]
        keys[:, :, self.place : self.place + 1], values[:, :, self.place : self.place + 1] = block.project(x)
        read: Tensor = block(x, (keys[:, :, : self.place + 1], values[:, :, : self.place + 1]))
        return read

    def choose(self, rows: Tensor) -> None:
        """Go on from other captions: (R,) int64, which of the R each place takes over; each one of the same image."""
        for both in self.kept.values():
            for kept in both:
                kept[:, :, : self.place] = kept[rows, :, : self.place]
