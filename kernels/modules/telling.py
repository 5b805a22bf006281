"""Attention as a module calls it: masks of every form, statistics of what it did, and a record of them by name."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..cross_attention import AttentionStatistics, CrossAttentionOutput, cross_attention
from ..cross_attention.biased import biased_attention
from ..integrations.recording import SLOT, Slot

OF_KEYS = ("key_attention", "query_attention", "key_max")  # what compares positions with one another


@dataclass(frozen=True)
class Asked:
    """What a call of a module is to tell."""

    statistics: tuple[str, ...] = ()
    per_head: bool = False
    query_mask: Tensor | None = None  # (B, S) bool, True = counts
    causal: bool = False  # statistics of keys although late ones are seen by few queries


@dataclass(frozen=True)
class Allowed:
    """Which key a query may attend to, of whatever was given for it."""

    key: Tensor | None = None  # (B, P) bool, True = attend
    links: Tensor | None = None  # (B or 1, H or 1, S, P) bool, True = this query may attend to this key
    bias: Tensor | None = None  # broadcasts to (B, H, S, P), floating: added to the logits, finite
    causal: bool = False
    itself: bool = False  # queries and keys are one sequence, so that what is no key is no query that counts


def read_float(mask: Tensor) -> tuple[Tensor, Tensor | None]:
    """A mask that is added to the logits, as bool (True = attend) and what is left of it: None where it holds nothing
    but 0 and -inf.

    That takes a look at its values, which waits for a GPU. Where one cannot look (under torch.compile, while a CUDA
    graph is captured) the rest is returned whatever it holds.
    """
    allowed = mask != -torch.inf
    rest = mask.masked_fill(~allowed, 0.0)
    blind = torch.compiler.is_compiling() or (mask.is_cuda and torch.cuda.is_current_stream_capturing())
    return allowed, rest if blind or mask.requires_grad or bool(rest.any()) else None


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    allowed: Allowed,
    asked: Asked | Slot,
    dropout_p: float = 0.0,
    where: str = "attention",
) -> CrossAttentionOutput:
    """(B, H, S, D) queries, (B, H, P, D) keys and values -> output (B, H, S, D) and the statistics asked for.

    The weights are written down only where a bias is added to the logits.

    Raises:
        ValueError: statistics of keys asked of causal attention, or what :func:`cross_attention` refuses.
    """
    B, H, S, _ = q.shape
    P = k.shape[2]
    if isinstance(asked, Slot):
        where = asked.name
        asked = Asked(asked.statistics, asked.per_head, asked.query_mask(q), asked.causal)
    query_mask = allowed.key if asked.query_mask is None and allowed.itself else asked.query_mask
    links = allowed.links
    if allowed.causal:
        if not asked.causal:
            refuse_causal(asked.statistics, where)
        links = torch.ones(S, P, dtype=torch.bool, device=q.device).tril()[None, None]
    told: dict[str, Any] = {"statistics": asked.statistics, "per_head": asked.per_head, "dropout_p": dropout_p}
    if allowed.bias is not None:
        return biased_attention(q, k, v, allowed.bias, links, allowed.key, query_mask, **told)
    if links is None or links.shape[1] == 1:
        shared = None if links is None else links[:, 0].expand(-1, S, P)
        return cross_attention(q, k, v, allowed.key, query_mask, link_mask=shared, **told)
    # Links of each head: heads become samples of one head. What is a mean over heads is the mean of their means.
    mine = links.expand(B, H, S, P).flatten(0, 1)
    key, query = (None if x is None else x[:, None].expand(-1, H, -1).flatten(0, 1) for x in (allowed.key, query_mask))
    q, k, v = (x.flatten(0, 1).unsqueeze(1) for x in (q, k, v))
    found = cross_attention(q, k, v, key, query, link_mask=mine, **told)
    return CrossAttentionOutput(found.output.view(B, H, S, -1), _unfolded(found.statistics, B, H, asked.per_head))


def _unfolded(told: AttentionStatistics, B: int, H: int, per_head: bool) -> AttentionStatistics:
    """Statistics of B·H samples with one head as those of B samples with H heads."""
    found = {name: x.reshape(B, H, -1) for name, x in vars(told).items() if x is not None}
    if not per_head:
        found |= {name: x.amax(1) if name == "key_max" else x.mean(1) for name, x in found.items() if name in OF_KEYS}
    return AttentionStatistics(**found)


def refuse_causal(statistics: Collection[str], where: str) -> None:
    """Under a causal mask a key is seen by the queries behind it alone, so that such a mean tells positions apart by
    their place, not by what stands there."""
    unfit = [name for name in OF_KEYS if name in statistics]
    if unfit:
        raise ValueError(
            f"{where}: {', '.join(unfit)} of a causal self-attention tells early from late keys, not what is looked at;"
            " ask for lse, max_probability or entropy, or of other layers (record_attention has causal=True for it)"
        )


def slot_of(module: nn.Module) -> Slot | None:
    """Where a module's statistics go while :func:`.recording.record_attention` listens to it."""
    slot: Slot | None = getattr(module, SLOT, None)
    return slot


def squeezed(told: AttentionStatistics) -> AttentionStatistics:
    """Statistics of a batch of one without its first dimension."""
    return replace(told, **{name: x[0] for name, x in vars(told).items() if x is not None})
