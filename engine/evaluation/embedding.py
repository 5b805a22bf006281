"""A split through the towers, once, and the match head on chosen pairs of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..beats import beat
from ..data.base import EvaluationSplit
from ..models.system import encode_image, encode_text

BATCH = 256  # images or captions in a forward
PAIRS = 256  # image–caption pairs in a forward of the fusion encoder
KEYS_BYTES = 2**28  # of projected images that are held at once
KEPT_BYTES = 2**30  # of image tokens that are kept on the CPU; on a GPU a quarter of what is free
TELL_EVERY_S = 10.0


class Progress:
    """Tells how far a count has come, at most once in ten seconds."""

    def __init__(self, tell: Callable[[str], None] = lambda text: None, every: float = TELL_EVERY_S) -> None:
        self.tell, self.every, self.last = tell, every, time.monotonic()

    def __call__(self, what: str, done: int, total: int) -> None:
        now = time.monotonic()
        if now - self.last >= self.every:
            self.last = now
            self.tell(f"{what}, {done:,} of {total:,}")


@dataclass(frozen=True)
class Embedded:
    """A split's images and captions as features; captions keep their tokens for the fusion encoder, without padding."""

    image: Tensor  # (N, E) float32
    image_group: Tensor  # (N,) int64, on the CPU like everything that counts
    image_tokens: Tensor | None  # (N, 1 + P, width) where there is room for them
    text: Tensor  # (C, E) float32
    text_group: Tensor  # (C,) int64, on the CPU
    text_tokens: Tensor  # (all tokens, width)
    start: Tensor  # (C,) int64, on the CPU: where a caption's tokens begin
    length: Tensor  # (C,) int64, on the CPU

    def captions(self, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """(B,) int64 on the CPU -> tokens (B, L, width), 0 where padded, and (B, L) bool, True = a token."""
        length, device = self.length[chosen], self.text_tokens.device
        place = torch.arange(int(length.max()))
        mask = place < length[:, None]
        flat = torch.where(mask, self.start[chosen][:, None] + place, 0).to(device)
        mask = mask.to(device)
        tokens = self.text_tokens[flat].masked_fill(~mask[..., None], 0.0)
        return tokens, mask


@torch.no_grad()
def embed(
    model: Any, split: EvaluationSplit, device: torch.device | str, keep: bool = True, progress: Progress | None = None
) -> Embedded:
    """Encode every image and every gallery caption once. ``keep``: also the images' tokens, if the memory has room."""
    progress = progress or Progress()
    features, groups = [], []
    kept: Tensor | None = None
    for start, batch in zip(range(0, split.image_count, BATCH), split.images(BATCH), strict=True):
        beat("evaluation: encoding images")
        progress("images encoded", start, split.image_count)
        encoded = encode_image(model, batch.images.to(device))
        features.append(encoded.feature.float())
        groups.append(batch.group_id.cpu())
        if start == 0 and keep and split.image_count * encoded.tokens[0].nbytes <= _room(encoded.tokens.device):
            kept = encoded.tokens.new_empty(split.image_count, *encoded.tokens.shape[1:])
        if kept is not None:
            kept[start : start + len(batch)] = encoded.tokens
    texts, tokens, lengths, text_groups = [], [], [], []
    for start, captions in zip(range(0, split.caption_count, BATCH), split.gallery(BATCH), strict=True):
        beat("evaluation: encoding captions")
        progress("captions encoded", start, split.caption_count)
        mask = captions.token_mask.to(device)
        encoded = encode_text(model, captions.token_ids.to(device), mask)
        texts.append(encoded.feature.float())
        tokens.append(encoded.tokens[mask])
        lengths.append(captions.token_mask.sum(1).cpu())
        text_groups.append(captions.group_id.cpu())
    length = torch.cat(lengths)
    return Embedded(
        torch.cat(features), torch.cat(groups), kept, torch.cat(texts), torch.cat(text_groups), torch.cat(tokens),
        length.cumsum(0) - length, length,
    )  # fmt: skip


def _room(device: torch.device) -> int:
    return torch.cuda.mem_get_info(device)[0] // 4 if device.type == "cuda" else KEPT_BYTES


@torch.no_grad()
def match_logits(
    model: Any, split: EvaluationSplit, embedded: Embedded, pairs: Tensor, device: torch.device | str,
    progress: Progress | None = None,
) -> Tensor:  # fmt: skip
    """ITM logits (N, 2) float32, on the CPU, of ``pairs`` (N, 2), each an image's and a caption's place in the split.

    Each image's keys and values are projected once and never copied: the captions that it meets are laid side by side.
    Images with equally many captions go together, and an image's captions in order of length, so that little padding is
    computed. Images whose tokens were not kept are encoded again.
    """

    def project(images: Tensor) -> Any:
        if embedded.image_tokens is None:
            return model.project_image(model.encode_image(split.take(images.numpy()).images.to(device)).tokens)
        return model.project_image(embedded.image_tokens[images.to(device)])

    progress = progress or Progress()
    logits = torch.empty(len(pairs), 2)
    if not len(pairs):
        return logits
    size = sum(key.nbytes + value.nbytes for key, value in project(pairs[:1, 0]))
    first = model.pool == "cls"  # then the match head reads [CLS] alone
    done = 0
    for images, batches in _plan(pairs, embedded.length, min(PAIRS, max(1, KEYS_BYTES // size))):
        projected = project(images)
        for parts, chosen in batches:
            beat("evaluation: re-ranking")
            progress("pairs re-ranked", done, len(pairs))
            words, mask = embedded.captions(pairs[chosen, 1])
            rows = torch.zeros(len(words), 1, dtype=torch.long, device=device) if first else None
            fused = model.fuse(words, mask, projected, image_index=[None] * parts, rows=rows)
            logits[chosen] = model.match_logits(fused.tokens, mask).float().cpu()
            done += len(chosen.unique())  # of a pair that fills a part up, one
    return logits


def _plan(pairs: Tensor, length: Tensor, at_once: int) -> Iterator[tuple[Tensor, Iterator[tuple[int, Tensor]]]]:
    """In which order (N, 2) pairs are computed: images (U,), and for them batches of so many parts: each part has one
    caption of the first R of these images, as positions in ``pairs``. Some pairs may come twice to fill a part."""
    order = torch.argsort(pairs[:, 0] * (int(length.max()) + 1) + length[pairs[:, 1]], stable=True)
    images, counts = torch.unique(pairs[:, 0], return_counts=True)
    begin = counts.cumsum(0) - counts
    for group in torch.argsort(counts, descending=True, stable=True).split(at_once):
        yield images[group], _batches(order, begin[group], counts[group])


def _batches(order: Tensor, begin: Tensor, count: Tensor) -> Iterator[tuple[int, Tensor]]:
    done = 0
    while done < int(count[0]):
        rows = int((count > done).sum())  # images that still have captions: they come first
        parts = min(max(1, PAIRS // rows), int(count[0]) - done)
        column = torch.minimum(done + torch.arange(parts)[:, None], count[:rows] - 1)
        yield parts, order[(begin[:rows] + column).flatten()]
        done += parts
