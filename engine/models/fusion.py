"""The fusion encoder: words that read the image, and say where they looked."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crossmask.kernels import AttentionStatistics, cross_attention

from ..masking.heads import head_importance
from ..recipe import FusionSection
from .dropout import Dropout
from .dropping import Visible, gather
from .packing import Packing

KeyValue = tuple[Tensor, Tensor]  # each (B, H, P, D)
ImageIndex = Sequence[Tensor | None]  # of equal parts of the texts: which images they read; None = text i reads image i
Rows = Tensor | Callable[[AttentionStatistics], Tensor]  # (B, M) int64, or what makes them of the statistics
BERT_EPS = 1e-12  # of BERT's layer norms (Devlin et al. 2019)
TEACHER_STATISTICS = ("entropy", "key_attention", "query_attention")
INITIAL_SHARPNESS = 8.0  # cosines of unrelated directions scatter by D ** -0.5, logits then by about one


@dataclass(frozen=True)
class Fused:  # of modules without parameters of their own, so ZeRO-3 needs no hook on it
    tokens: Tensor  # (B, L, width), or (B, M, width) of the rows that were asked for
    statistics: AttentionStatistics | None  # of the patches only, the image's CLS left out


class Attention(nn.Module):
    """Multi-head attention whose keys and values are projected separately, so that pairs can share them.

    ``qk_norm`` compares directions only, times a learned scale per head (query-key normalisation, Henry et al. 2020):
    attention can then be selective before its projections have grown.
    """

    def __init__(self, width: int, key_width: int, heads: int, qk_norm: bool = False, *, dropout: float = 0.0) -> None:
        """``dropout``: probability that a weight is dropped while training."""
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(key_width, 2 * width)
        self.output = nn.Linear(width, width)
        # In units of the softmax's logits, before the D ** -0.5 that every attention applies.
        self.sharpness = nn.Parameter(torch.full((heads,), INITIAL_SHARPNESS)) if qk_norm else None
        # Of each head, (H,) float32, from the backwards through what ran while recording; a buffer would change dtype.
        self.importance: Tensor | None = None
        self.recording = False
        self.anew = False  # the next backward replaces what was recorded before

    def split(self, x: Tensor) -> Tensor:
        """(B, N, width) -> (B, H, N, D)"""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def ask(self, x: Tensor, packing: Packing | None = None) -> Tensor:
        """(B, S, width), or (N, width) where ``packing`` says which words these are -> queries (B, H, S, D)"""
        q = self.query(x)
        q = self.split(q if packing is None else packing.pad(q))
        if self.sharpness is None:
            return q
        return F.normalize(q, dim=-1) * (self.sharpness * q.shape[-1] ** 0.5)[:, None, None].to(q.dtype)

    def project(self, tokens: Tensor, packing: Packing | None = None) -> KeyValue:
        """(B, P, key width), or (N, key width) packed -> keys and values, each (B, H, P, D)"""
        both = self.key_value(tokens)
        key, value = (both if packing is None else packing.pad(both)).chunk(2, dim=-1)
        key = self.split(key)
        return key if self.sharpness is None else F.normalize(key, dim=-1), self.split(value)

    def forward(
        self,
        x: Tensor,
        key_value: KeyValue,
        key_mask: Tensor | None = None,
        link_mask: Tensor | None = None,
        head_mask: Tensor | None = None,
        packing: Packing | None = None,
    ) -> Tensor:
        """(B, S, width) -> (B, S, width), or (N, width) -> (N, width) packed."""
        found = self.attend(self.ask(x, packing), key_value, key_mask, link_mask, head_mask)
        return self.give(found, packing)

    def give(self, found: Tensor, packing: Packing | None = None) -> Tensor:
        """What queries (B, H, S, D) found -> (B, S, width), or (N, width) packed."""
        found = found.transpose(1, 2)
        return self.output((found if packing is None else packing.pack(found)).flatten(-2))

    def attend(
        self,
        queries: Tensor,
        key_value: KeyValue,
        key_mask: Tensor | None = None,
        link_mask: Tensor | None = None,
        head_mask: Tensor | None = None,
        *,
        texts: int = 1,
        share: float = 1.0,
    ) -> Tensor:
        """(B, H, S, D) -> (B, H, S, D). For the importance of heads: ``texts`` are side by side in S, and the call has
        this ``share`` of the samples."""
        # Values that are not finite reach the loss, where the loop leaves the step out on every rank together.
        out = cross_attention(
            queries,
            *key_value,
            key_mask=key_mask,
            head_mask=head_mask,
            link_mask=link_mask,
            dropout_p=self.dropout if self.training else 0.0,
            check_finite=False,
        ).output
        if self.recording and out.requires_grad:
            # detached: a hook that held the tensor it hangs on would never be freed
            out.register_hook(self._recorder(out.detach(), head_mask, texts, share))
        return out

    def _recorder(self, output: Tensor, head_mask: Tensor | None, texts: int, share: float) -> Callable[[Tensor], None]:
        """A tensor hook that adds up the heads' importance. One that is off, and so moves nothing, keeps its last."""

        def record(gradient: Tensor) -> None:
            of_texts = (x.unflatten(2, (texts, -1)).transpose(1, 2).flatten(0, 1) for x in (output, gradient))
            found, before = share * head_importance(*of_texts), self.importance
            if before is not None and self.anew and head_mask is not None:
                on = head_mask if head_mask.ndim == 1 else head_mask.any(0)
                before = before.where(~on, 0.0)
            elif self.anew:
                before = None
            self.importance, self.anew = found if before is None else before + found, False

        return record

    @torch.no_grad()
    def statistics(
        self,
        x: Tensor,
        key_value: KeyValue,
        query_mask: Tensor,
        key_mask: Tensor | None = None,
        head_mask: Tensor | None = None,
    ) -> AttentionStatistics:
        """Where ``x`` looks among the keys. Valid queries are those of ``query_mask`` (B, L)."""
        return cross_attention(
            self.ask(x),
            *key_value,
            key_mask=key_mask,
            query_mask=query_mask,
            head_mask=head_mask,
            statistics=TEACHER_STATISTICS,
            check_finite=False,
        ).statistics


class FusionLayer(nn.Module):
    """Self-attention over words, cross-attention into the image, feed-forward.

    ``norm: pre`` normalises what each part reads and trains from scratch at the learning rates small models want;
    ``post`` normalises the sum behind each part, which is BERT's layer and ALBEF's.
    """

    def __init__(self, width: int, image_width: int, section: FusionSection) -> None:
        super().__init__()
        heads, drop, self.post = section.heads, section.dropout, section.norm == "post"
        eps = BERT_EPS if self.post else 1e-5
        self.self_norm = nn.LayerNorm(width, eps)
        self.self_attention = Attention(width, width, heads, dropout=drop)
        self.cross_norm = nn.LayerNorm(width, eps)
        self.cross_attention = Attention(width, image_width, heads, section.qk_norm, dropout=drop)
        self.feed_norm = nn.LayerNorm(width, eps)
        hidden = int(width * section.mlp_ratio)
        self.feed_forward = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))
        self.dropout = Dropout(drop)

    def forward(
        self,
        x: Tensor,
        word_mask: Tensor | None,
        image: KeyValue,
        links: Tensor | None = None,
        head_mask: Tensor | None = None,
        image_mask: Tensor | None = None,
        image_index: ImageIndex | None = None,
        rows: Tensor | None = None,
        packing: Packing | None = None,
        choose: Callable[[Tensor], Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Returns the layer's output and the queries it put to the image, both (B, L, width) or, as ``x`` then is,
        (N, width) packed; or (B, M, width) of ``rows`` (B, M): all words are then still read, but the others are not
        computed any further. ``choose`` makes those rows of all words' queries (B, L, width), before they are put."""
        y = x if self.post else self.self_norm(x)
        words = self.self_attention.project(y, packing)
        if rows is not None:
            wanted = Visible(rows)
            x, y = (gather(z if packing is None else packing.pad(z), wanted) for z in (x, y))
            links = None if links is None else gather(links.expand(len(rows), -1, -1), wanted)
            packing = None
        x = x + self.dropout(self.self_attention(y, words, word_mask, links, packing=packing))
        asked = self.self_norm(x) if self.post else self.cross_norm(x)
        if choose is not None:
            wanted = Visible(choose(asked if packing is None else packing.pad(asked)))
            x, asked = (gather(z if packing is None else packing.pad(z), wanted) for z in (x, asked))
            packing = None
        read = self.dropout(self._read(asked, image, head_mask, image_mask, image_index, packing))
        if self.post:
            x = self.cross_norm(asked + read)
            return self.feed_norm(x + self.dropout(self.feed_forward(x))), asked
        x = x + read
        return x + self.dropout(self.feed_forward(self.feed_norm(x))), asked

    def _read(
        self,
        asked: Tensor,
        image: KeyValue,
        head_mask: Tensor | None,
        image_mask: Tensor | None,
        image_index: ImageIndex | None,
        packing: Packing | None,
    ) -> Tensor:
        """(B, S, width) -> (B, S, width), or (N, width) packed: what the words get from the images."""
        attention = self.cross_attention
        if image_index is None:
            return attention(asked, image, image_mask, head_mask=head_mask, packing=packing)
        own = [n for n, index in enumerate(image_index) if index is None]
        parts = attention.ask(asked, packing).unflatten(0, (len(image_index), -1))  # (parts, R, H, S, D)
        count = parts.shape[1]
        found: dict[int, Tensor] = {}
        if own:  # texts of one image side by side, as if they were one: its keys and values are read where they are
            together = torch.cat([parts[n] for n in own], 2)
            first = (image[0][:count], image[1][:count])
            mask = None if image_mask is None else image_mask[:count]
            share = len(own) / len(image_index)
            read = attention.attend(together, first, mask, head_mask=head_mask, texts=len(own), share=share)
            found |= zip(own, read.chunk(len(own), dim=2), strict=True)
        if others := {n: index for n, index in enumerate(image_index) if index is not None}:
            index = torch.cat(list(others.values()))
            gathered = (image[0].index_select(0, index), image[1].index_select(0, index))
            mask = None if image_mask is None else image_mask.index_select(0, index)
            together = torch.cat([parts[n] for n in others])
            share = len(others) / len(image_index)
            read = attention.attend(together, gathered, mask, head_mask=head_mask, share=share)
            found |= zip(others, read.chunk(len(others)), strict=True)
        return attention.give(torch.cat([found[n] for n in range(len(image_index))]), packing)


class FusionEncoder(nn.Module):
    def __init__(self, width: int, image_width: int, section: FusionSection) -> None:
        super().__init__()
        self.layers = nn.ModuleList(FusionLayer(width, image_width, section) for _ in range(section.depth))
        self.norm = nn.LayerNorm(width) if section.norm == "pre" else nn.Identity()

    def _layers(self) -> Iterator[FusionLayer]:
        for layer in self.layers:
            assert isinstance(layer, FusionLayer)
            yield layer

    def project_image(self, image_tokens: Tensor) -> list[KeyValue]:
        """Keys and values of every layer, once per image however many captions it meets."""
        return [layer.cross_attention.project(image_tokens) for layer in self._layers()]

    def forward(
        self,
        text_tokens: Tensor,
        token_mask: Tensor,
        image: Sequence[KeyValue],
        statistics_layer: int | None = None,
        query_mask: Tensor | None = None,
        *,
        links: Tensor | None = None,
        head_mask: Tensor | None = None,
        image_mask: Tensor | None = None,
        image_index: ImageIndex | None = None,
        rows: Rows | None = None,
    ) -> Fused:
        """Fuse (B, L, width) words with the projected images, U of them. What comes out at padding says nothing.

        Args:
            statistics_layer: (negative from the end) the layer whose cross-attention is described; the image's CLS
                token is left out before the softmax, so that a patch competes with patches only.
            query_mask: (B, L) bool, which words count in the statistics; default ``token_mask``.
            links: (B, L, L) bool, True = this word may look at that one.
            head_mask: (layers, H), or without ``image_index`` (layers, B, H), bool, True = this head of the
                cross-attention is on.
            image_mask: (U, 1 + P) bool, True = this token of the image, CLS first, may be looked at.
            image_index: which images the texts read; None: text i reads image i, and U = B. Else the texts are
                ``len(image_index)`` equal parts of R rows, one entry each: a tensor (R,) int64 of image numbers, whose
                keys and values are gathered, or None: row i of the part reads image i (R <= U). The latter share the
                images' keys and values, which are neither copied nor gathered.
            rows: (B, M) int64, positions whose output is wanted, if not all: the last layer then computes these alone.
                A position may come twice. Or what makes them of the statistics, as a mask policy does: of the last
                layer, too, which then goes on for these words alone from the queries that were described.

        Raises:
            ValueError: statistics together with ``image_index``, or of the last layer with fixed ``rows``; ``rows`` to
                make of statistics that no layer gives; texts that do not divide into ``image_index``; parts longer than
                the images; a head mask of samples with ``image_index``.
        """
        chosen = None if statistics_layer is None else range(len(self.layers))[statistics_layer]
        last = len(self.layers) - 1
        if image_index is not None:
            if chosen is not None:
                raise ValueError("attention statistics are of texts that read their own image: leave image_index out")
            _check_index(image_index, len(text_tokens), len(image[0][0]), head_mask)
        later = None if rows is None or isinstance(rows, Tensor) else rows
        places, count = _places(rows) if isinstance(rows, Tensor) else (None, None)
        if later is not None and chosen is None:
            raise ValueError("rows that are made of statistics need a statistics_layer")
        if places is not None and chosen == last:
            raise ValueError("statistics of the last layer are of all words: leave rows out")
        found: AttentionStatistics | None = None
        words = token_mask if query_mask is None else query_mask

        def describe(asked: Tensor) -> AttentionStatistics:
            assert chosen is not None
            layer, (key, value) = self.layers[chosen], image[chosen]
            assert isinstance(layer, FusionLayer)
            patches = None if image_mask is None else image_mask[:, 1:]
            heads = None if head_mask is None else head_mask[chosen]
            return layer.cross_attention.statistics(asked, (key[:, :, 1:], value[:, :, 1:]), words, patches, heads)

        def choose(asked: Tensor) -> Tensor:
            nonlocal found, places, count
            assert later is not None
            found = describe(asked)
            places, count = _places(later(found))
            return places

        packing = Packing.of(token_mask)
        x = text_tokens if packing is None else packing.pack(text_tokens)
        for i, layer in enumerate(self._layers()):
            heads = None if head_mask is None else head_mask[i]
            wanted = places if i == last else None
            within = choose if later is not None and i == chosen == last else None
            x, asked = layer(x, token_mask, image[i], links, heads, image_mask, image_index, wanted, packing, within)
            if i == chosen and within is None:
                asked = asked if packing is None else packing.pad(asked)
                if later is None:
                    found = describe(asked)
                else:
                    choose(asked)
        x = self.norm(x)
        if packing is not None and rows is None:
            x = packing.pad(x)
        return Fused(x[:, :count], found)

    def record_importance(self, on: bool = True) -> None:
        """From the next forward on, note in each backward how much every head of the cross-attentions matters. Call it
        anew at each step: what is noted then replaces what was noted before, but for heads that are off."""
        for layer in self._layers():
            layer.cross_attention.recording = layer.cross_attention.anew = on

    def head_importance(self) -> Tensor:
        """(layers, H) float32: what was noted since the last :meth:`record_importance`, summed over forwards; of a head
        that has been off, what was noted when it was last on; 0 before the first backward.

        Of this rank's batch, and of a loss that may be scaled: compare heads of a layer, not steps.
        """
        rows = []
        for layer in self._layers():
            attention = layer.cross_attention
            empty = torch.zeros(attention.heads, device=attention.output.weight.device)
            rows.append(empty if attention.importance is None else attention.importance)
        return torch.stack(rows)

    def restore_importance(self, importance: Tensor) -> None:
        """Take (layers, H) float32 for what was noted, as a resumed run does."""
        for layer, row in zip(self._layers(), importance, strict=True):
            layer.cross_attention.importance = row.clone()


def _places(rows: Tensor) -> tuple[Tensor, int]:
    """(B, M) as they are computed, and M. A layer runs even where there are none: under ZeRO stage 3 other ranks, which
    have rows, wait in it."""
    count = rows.shape[1]
    return (rows if count else rows.new_zeros(len(rows), 1)), count


def _check_index(image_index: ImageIndex, texts: int, images: int, head_mask: Tensor | None) -> None:
    rows, left = divmod(texts, max(1, len(image_index)))
    if left or not image_index:
        raise ValueError(f"{texts} texts are not {len(image_index)} equal parts: image_index needs an entry for each")
    for part in image_index:
        if part is None and rows > images:
            raise ValueError(f"a part of {rows} texts reads the first images, of which there are {images}")
        if part is not None and part.shape != (rows,):
            raise ValueError(f"a part of image_index is {tuple(part.shape)}, each has {rows} texts")
    if head_mask is not None and head_mask.ndim != 2:
        raise ValueError("head_mask is (layers, H) with image_index, the same for all samples")
