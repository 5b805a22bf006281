"""Maximum similarity in plain PyTorch on any device, by tiles of similarities that fit a core's cache.

A tile is [words, patches] of some samples, or of a slice of one sample's patches: products are fastest with the longer
axis in the columns. Nothing of B*P*S elements is ever allocated, in neither direction.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..linear import bf16_products, linear

TILE = 2**20  # bytes of similarities
ALONE = 2**21  # multiply-adds from which a sample's float32 products are better multiplied alone, by ``linear``
COPY = 2**21  # bytes of tokens that are copied at a time where they have to be, but at least one sample
NARROWEST = 16  # patches of a tile, where a sample has very many words


@torch.no_grad()
def forward(image_tokens: Tensor, text_tokens: Tensor, text_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """score (B, P) float32 (float64) and argmax (B, P) int64 of (B, P, D) and (B, S, D); the mask is (B, S) bool."""
    (B, P, D), S, dtype = image_tokens.shape, text_tokens.shape[1], _accumulate(image_tokens.dtype)
    score, argmax = (image_tokens.new_empty((B, P), dtype=kind) for kind in (dtype, torch.int64))
    operand = _operand(image_tokens)
    fit = max(1, TILE // (S * torch.finfo(operand).bits // 8))  # columns of S similarities
    samples, patches = max(1, fit // P), min(P, max(fit, NARROWEST))
    if operand != image_tokens.dtype:
        samples = min(samples, _copied(image_tokens, text_tokens))
    if operand == torch.float32 and S * patches * D >= ALONE:
        samples = 1
    workspace = image_tokens.new_empty(min(samples, B) * S * patches, dtype=operand) if samples > 1 else None
    for b in range(0, B, samples):
        here = slice(b, min(b + samples, B))
        text = text_tokens[here].to(operand)
        masked = None if text_mask is None else ~text_mask[here, :, None]
        for p in range(0, P, patches):
            image = image_tokens[here, p : p + patches].to(operand)
            if workspace is None:
                s = linear(text[0], image[0])[None]
            else:
                shape = (len(text), S, image.shape[1])
                s = workspace[: shape[0] * shape[1] * shape[2]].view(shape)
                torch.bmm(text, image.mT, out=s)
            if masked is not None:
                s.masked_fill_(masked, -torch.inf)
            highest, found = s.max(1)
            score[here, p : p + patches], argmax[here, p : p + patches] = highest, found
    if text_mask is not None:
        # where nothing beat the -inf of masked words, the first of the allowed ones, which are -inf too
        first = text_mask.to(torch.uint8).argmax(1).where(text_mask.any(1), -1)
        argmax = argmax.where(score != -torch.inf, first[:, None])
        score.masked_fill_(argmax < 0, 0.0)
    return score, argmax


@torch.no_grad()
def backward(grad_score: Tensor, image_tokens: Tensor, text_tokens: Tensor, argmax: Tensor) -> tuple[Tensor, Tensor]:
    """d image (B, P, D) and d text (B, S, D), contiguous; grad_score as score, argmax as ``forward`` gave it."""
    B, dtype = len(argmax), grad_score.dtype
    if all(x.dtype == dtype and x.is_contiguous() for x in (image_tokens, text_tokens)):
        return _backward(grad_score, image_tokens, text_tokens, argmax)
    d_image, d_text = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (image_tokens, text_tokens))
    samples = _copied(image_tokens, text_tokens)
    for b in range(0, B, samples):
        some = slice(b, b + samples)
        image, text = (x[some].to(dtype).contiguous() for x in (image_tokens, text_tokens))
        d_image[some], d_text[some] = _backward(grad_score[some], image, text, argmax[some])
    return d_image, d_text


def _backward(g: Tensor, image: Tensor, text: Tensor, argmax: Tensor) -> tuple[Tensor, Tensor]:
    """For contiguous tokens in the dtype of scores. Both gradients are weighted sums of token rows, by one kernel.

    A word sums its patches in their order, so two runs agree bitwise; none of its terms is stored.
    """
    (B, P, D), S = image.shape, text.shape[1]
    g, image, text = g.reshape(-1), image.view(-1, D), text.view(-1, D)
    chosen = argmax >= 0
    # elsewhere than on a CPU a look at it would wait for the device
    everywhere = argmax.device.type == "cpu" and bool(chosen.all())
    words = argmax + S * torch.arange(B, device=argmax.device)[:, None]  # as rows of text
    if not everywhere:
        words = words.where(chosen, B * S)  # a row of its own, behind the others
    words = words.view(-1)

    rows = words if everywhere else words.clamp(max=B * S - 1)
    d_image = F.embedding_bag(rows[:, None], text, mode="sum", per_sample_weights=g[:, None]).view(B, P, D)
    if not everywhere:
        d_image.masked_fill_(~chosen[..., None], 0.0)
    words, patches = words.sort(stable=True)
    starts = torch.searchsorted(words, torch.arange(B * S + 1, device=words.device))
    d_text = F.embedding_bag(patches, image, starts, mode="sum", per_sample_weights=g[patches])
    return d_image, d_text[:-1].view(B, S, D)


def _copied(image_tokens: Tensor, text_tokens: Tensor) -> int:
    """How many samples' tokens are copied at a time."""
    (P, D), S = image_tokens.shape[1:], text_tokens.shape[1]
    return max(1, COPY // (4 * (P + S) * D))


def _operand(tokens: Tensor) -> torch.dtype:
    """What products are in: bfloat16 as it is where the processor can, each similarity rounded to it as PyTorch's own
    product is; else what scores are in."""
    if tokens.dtype == torch.bfloat16 and bf16_products(tokens.device.type):
        return tokens.dtype
    return _accumulate(tokens.dtype)


def _accumulate(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
