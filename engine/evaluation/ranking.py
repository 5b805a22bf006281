"""Ranks of the right candidates, recalls and their sum, and what chance would reach.

TR, text retrieval, is ``i2t``: an image asks and captions are ranked. IR, image retrieval, is ``t2i``: a caption asks.
A query is answered by any candidate of its group: an image by each of its captions, a caption by each image that it
describes. Queries without a right candidate ask nothing.

Ties are counted against the model: a wrong candidate whose score is not strictly below the right one's stands before
it. A collapsed model, or one that returns NaN, therefore scores 0 and not 100.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..beats import beat

CUTS = (1, 5, 10)
DIRECTIONS = ("i2t", "t2i")  # TR, IR
BLOCK = 2**22  # scores held at once: no matrix of all queries and candidates is ever whole


@dataclass(frozen=True)
class Ranked:
    """What one pass over all scores keeps of Q queries; on the CPU."""

    rank: Tensor  # (Q,) int64, from 1, of the best right candidate; 0 where there is none
    top: Tensor  # (Q, k) int64, the k best candidates
    score: Tensor  # (Q, k) float32, their scores


@torch.no_grad()
def rank_all(queries: Tensor, keys: Tensor, query_group: Tensor, key_group: Tensor, k: int = 0) -> Ranked:
    """Rank every key for every query by their product, in blocks of queries.

    Products are taken in float64 and rounded to float32, so that equal features tie wherever they stand in a block.

    Args:
        queries, keys: (Q, E) and (C, E) features on one device.
        query_group, key_group: (Q,) and (C,) int64 on the CPU.
        k: how many candidates to keep for re-ranking. A right one that ties with a wrong one gives way to it.
    """
    k, wide = min(k, len(keys)), keys.double().T
    groups = key_group.to(keys.device)
    found = Ranked(
        torch.zeros(len(queries), dtype=torch.long),
        torch.zeros(len(queries), k, dtype=torch.long),
        torch.zeros(len(queries), k),
    )
    for rows in blocks(len(queries), len(keys)):
        beat("evaluation: ranking")
        scores = (queries[rows].double() @ wide).float()
        right = query_group[rows].to(keys.device)[:, None] == groups
        found.rank[rows] = ranks(scores, right).cpu()
        if k:
            # one step of float32 down: only enough to lose a tie
            lowered = scores.nextafter(torch.full_like(scores, -torch.inf))
            top = torch.where(right, lowered, scores).topk(k, dim=1).indices
            found.top[rows], found.score[rows] = top.cpu(), scores.gather(1, top).cpu()
    return found


def blocks(rows: int, columns: int) -> Iterator[slice]:
    """All of ``rows`` in slices of at most BLOCK numbers, but of one row at least."""
    size = max(1, BLOCK // max(1, columns))
    return (slice(start, start + size) for start in range(0, rows, size))


def ranks(scores: Tensor, right: Tensor) -> Tensor:
    """Rank from 1 of the best right candidate in each row of (Q, C) scores; 0 where none of ``right`` (Q, C) is."""
    best = scores.masked_fill(~right, -torch.inf).amax(1, keepdim=True)
    before = (~(scores < best) & ~right).sum(1)  # "not below" also counts ties and NaN
    return torch.where(right.any(1), before + 1, 0)


def reranked_ranks(rank: Tensor, scores: Tensor, right: Tensor) -> Tensor:
    """Ranks after the first k candidates were put in a new order; the others keep their places behind them.

    Args:
        rank: (Q,) ranks before. scores: (Q, k) new scores of the candidates. right: (Q, k) bool, the right ones.
    """
    new = ranks(scores, right)
    return torch.where((new > 0) & (rank > 0), new, rank)


def recalls(rank: Tensor) -> dict[str, float]:
    """Percent of queries answered within the first 1, 5 and 10; those without a right candidate (0) are left out."""
    asked = rank[rank > 0]
    return {f"r{k}": 100.0 * float((asked <= k).double().mean()) if len(asked) else 0.0 for k in CUTS}


def rsum(found: Mapping[str, Mapping[str, float]]) -> float:
    """RSum: R@1, R@5 and R@10 of both directions together, of 600 at most."""
    return sum(found[direction][f"r{k}"] for direction in DIRECTIONS for k in CUTS)


def chance(query_group: Tensor, candidate_group: Tensor) -> dict[str, float]:
    """The recalls a random order would reach on average, exactly: 1 - C(n - m, k) / C(n, k) for m right of n."""
    groups, counts = candidate_group.unique(return_counts=True)
    place = torch.searchsorted(groups, query_group).clamp(max=max(0, len(groups) - 1))
    right = torch.where(groups[place] == query_group, counts[place], 0) if len(groups) else query_group * 0
    return chance_of(right[right > 0].double(), torch.tensor(float(len(candidate_group))))


def chance_of(right: Tensor, candidates: Tensor) -> dict[str, float]:
    """The same of queries with ``right`` (Q,) right ones among ``candidates``, (Q,) or one number."""
    found, right, candidates = {}, right.double(), candidates.double().expand(len(right))
    for k in CUTS:
        miss = torch.ones_like(right)
        for i in range(k):
            left = candidates - i
            miss = miss * torch.where(left > 0, (left - right).clamp(min=0) / left.clamp(min=1), miss)
        found[f"r{k}"] = 100.0 * float((1 - miss).mean()) if len(right) else 0.0
    return found
