"""Where do the masks lie? Measured where the truth is known: composed scenes and single drawings.

A patch lies *on* a thing when the thing covers at least ``COVERAGE`` (10 %) of its pixels; it can lie on two things.
``things`` (B, H, W) says which drawing each pixel belongs to, ``words`` (B, L) which drawing each token names.

Against random masks: a random mask that hides as many patches of the same picture lies on the drawing, on average, with
exactly the share of the picture's patches that do. This expectation is computed, not sampled.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from crossmask.kernels import AttentionStatistics

from ..beats import beat
from ..data.batch import Batch
from ..masking import MaskPlan
from ..objectives import Seen

COVERAGE = 0.1
NOT_DRAWN = 255  # in ``Batch.words``: names a thing that is not in the picture
CHUNK = 128  # pictures looked at at once
POINTING_CHUNK = 512  # words whose attention is read at once

# What the teacher sees of a batch, and what the run's policy makes of it
Look = Callable[[Any, Batch], tuple[Seen, MaskPlan]]


@dataclass
class Shares:
    """Numerators and denominators by name, summed over batches."""

    parts: dict[str, tuple[float, float]] = field(default_factory=dict)

    def add(self, name: str, numerator: Tensor, denominator: Tensor) -> None:
        n, d = self.parts.get(name, (0.0, 0.0))
        self.parts[name] = (n + float(numerator.double().sum()), d + float(denominator.double().sum()))

    def result(self) -> dict[str, float]:
        return {name: n / d for name, (n, d) in self.parts.items() if d > 0}


def patch_coverage(things: Tensor, grid: tuple[int, int]) -> Tensor:
    """(B, K, P) float32: the share of each patch's pixels that thing k + 1 covers; patches row by row."""
    count = max(int(things.max()), 1)
    planes = (things[:, None] == torch.arange(1, count + 1, device=things.device)[None, :, None, None]).float()
    return F.adaptive_avg_pool2d(planes, grid).flatten(2)


def named_and_drawn(words: Tensor, count: int) -> Tensor:
    """(B, count) bool: is thing k + 1 named by a word of the caption?"""
    return torch.stack([(words == k).any(1) for k in range(1, count + 1)], 1)


def add_mask_shares(shares: Shares, plan: MaskPlan, batch: Batch, grid: tuple[int, int]) -> None:
    """Add a batch's masks to ``on_drawing``, ``on_named``, ``named_of_drawn``, ``word_visible`` and their ``_random``
    expectations. ``named_of_drawn``: of the masked patches that lie on a drawing, those on a named one, which paper
    between the drawings has no part in."""
    if batch.things is None:
        return
    hidden = plan.image.float()
    per_picture = hidden.sum(1)
    on_thing = patch_coverage(batch.things, grid) >= COVERAGE  # (B, K, P)
    kinds = {"on_drawing": on_thing.any(1)}
    if batch.words is not None:
        named = named_and_drawn(batch.words, on_thing.shape[1])
        kinds["on_named"] = (on_thing & named[:, :, None]).any(1)
    for name, on in kinds.items():
        shares.add(name, (hidden * on).sum(1), per_picture)
        shares.add(f"{name}_random", per_picture * on.float().mean(1), per_picture)
    if batch.words is not None:
        drawn, named = kinds["on_drawing"].float(), kinds["on_named"].float()
        found = (hidden * drawn).sum(1)
        shares.add("named_of_drawn", (hidden * named).sum(1), found)
        shares.add("named_of_drawn_random", found * named.sum(1) / drawn.sum(1).clamp(min=1), found)
        visible = (batch.words > 0) & (batch.words != NOT_DRAWN) & batch.maskable
        hidden_words = (plan.text & batch.maskable).float()
        count = hidden_words.sum(1)
        shares.add("word_visible", (hidden_words * visible).sum(1), count)
        share = visible.float().sum(1) / batch.maskable.float().sum(1).clamp(min=1)
        shares.add("word_visible_random", count * share, count)


def add_attention_shares(shares: Shares, statistics: AttentionStatistics, words: Tensor) -> None:
    """Entropies as a share of their maximum, log P: of each head's and word's row (``attention_entropy``), and of the
    mean over heads and words that picks the patches (``key_attention_entropy``). ``words`` (B, L): the rows that count.
    """
    weights = statistics.key_attention
    if weights is None or statistics.entropy is None:
        raise ValueError("mask measures need the statistics entropy and key_attention")
    maximum = math.log(weights.shape[1])
    rows = statistics.entropy.mean(1) / maximum  # (B, L)
    shares.add("attention_entropy", rows * words, words)
    mean = -torch.special.xlogy(weights, weights).sum(1) / maximum
    shares.add("key_attention_entropy", mean, torch.ones_like(mean))


def attention_maps(
    model: Any, image: Sequence[tuple[Tensor, Tensor]], text: Tensor, token_mask: Tensor, layer: int, words: Tensor
) -> Tensor:
    """(N, P) float32: the attention over patches, mean over heads, of N tokens given as (N, 2) row and position.

    The statistics average over words, so each row is fused once per word with that word alone counted.
    """
    maps = []
    for part in words.split(POINTING_CHUNK):
        row, position = part.unbind(1)
        alone = F.one_hot(position, token_mask.shape[1]).bool()
        found = model.fuse(
            text[row],
            token_mask[row],
            [(k[row], v[row]) for k, v in image],
            layer,
            query_mask=alone,
            rows=lambda found: token_mask.new_empty(len(found.key_attention), 0, dtype=torch.int64),  # statistics alone
        ).statistics
        maps.append(found.key_attention)
    return torch.cat(maps)


def visible_words(batch: Batch, limit: int) -> Tensor:
    """(N, 2) row and position of the tokens whose thing is in the picture, evenly thinned to at most ``limit``."""
    if batch.things is None or batch.words is None:
        return torch.empty(0, 2, dtype=torch.long)
    words = ((batch.words > 0) & (batch.words != NOT_DRAWN) & batch.maskable).nonzero()
    if len(words) > limit:
        words = words[torch.linspace(0, len(words) - 1, limit, device=words.device).long()]
    return words


def add_pointing(shares: Shares, batch: Batch, grid: tuple[int, int], words: Tensor, maps: Tensor) -> None:
    """Add ``pointing``: how often a word's strongest patch lies on the thing it names, and ``pointing_random``: the
    same for a patch drawn at random. ``words`` (N, 2) as :func:`visible_words`, ``maps`` (N, P) their attention."""
    assert batch.things is not None
    assert batch.words is not None
    on_thing = patch_coverage(batch.things, grid) >= COVERAGE
    strongest = maps.argmax(1)
    row, position = words.unbind(1)
    on = on_thing[row, batch.words[row, position].long() - 1]  # (N, P)
    one = torch.ones(len(words))
    shares.add("pointing", on.gather(1, strongest[:, None])[:, 0], one)
    shares.add("pointing_random", on.float().mean(1), one)


@torch.no_grad()
def mask_measures(
    model: Any, batch: Batch, look: Look, layer: int, device: torch.device | str, pointing_words: int = 2048
) -> dict[str, float]:
    """All measures of this file on one batch of held-out pairs; shares from 0 to 1.

    Without ``things`` only the entropies are known, without ``words`` nothing about names. A captioner, which has no
    attention between words and patches before its decoder, has no entropies, and points by similarity.
    """
    shares = Shares()
    starts = range(0, len(batch), CHUNK)
    for start in starts:
        beat("evaluation: masks")
        part = batch.rows(slice(start, start + CHUNK)).to(device)
        seen, plan = look(model, part)
        add_mask_shares(shares, plan, part, model.patch_grid)
        words = visible_words(part, max(pointing_words // len(starts), 1))
        if seen.statistics is not None:
            add_attention_shares(shares, seen.statistics, part.maskable)
            if len(words):
                image = model.project_image(seen.image.tokens)
                maps = attention_maps(model, image, seen.text.tokens, part.token_mask, layer, words)
                add_pointing(shares, part, model.patch_grid, words, maps)
        elif len(words):  # a captioner's words point by how similar patches are to them
            row, position = words.unbind(1)
            asked = model.word_features(seen.text.tokens)[row, position]
            maps = (model.patch_features(seen.image.tokens)[row] @ asked[:, :, None])[:, :, 0]
            add_pointing(shares, part, model.patch_grid, words, maps)
    return shares.result()
