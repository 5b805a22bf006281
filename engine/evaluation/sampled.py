"""Sampled galleries: each query against one right candidate and some wrong ones of its own category.

The protocol of fashion retrieval that SyncMask reports (Song et al., CVPR 2024): 1,000 queries, 100 wrong candidates
of the query's category, mean of 5 draws. Wrong candidates are drawn without repetition and never from the query's
group; where its category has too few, others fill up.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..beats import beat
from .ranking import CUTS, DIRECTIONS, blocks, chance_of, ranks, rsum


@dataclass(frozen=True)
class Sample:
    """One draw in one direction. Everything on the CPU."""

    query: Tensor  # (Q,) int64, places among the queries, in random order
    candidate: Tensor  # (Q, 1 + n) int64, the right one first; -1 where the whole gallery has no more wrong ones
    alike: float  # share of the wrong candidates that are of their query's category

    @property
    def right(self) -> Tensor:
        """(Q, 1 + n) bool."""
        found = torch.zeros_like(self.candidate, dtype=torch.bool)
        found[:, 0] = True
        return found


def draw_sample(
    query_group: np.ndarray,
    key_group: np.ndarray,
    query_category: np.ndarray | None,
    key_category: np.ndarray | None,
    queries: int,
    negatives: int,
    key: Sequence[int],
) -> Sample:
    """At most ``queries`` of those that have a right and a wrong candidate, each with its candidates.

    Args:
        query_group, key_group, query_category, key_category: (Q,) and (C,) int64; without categories all are alike.
        key: two numbers that say which draw it is; the same ones give the same draw, whatever the sizes of blocks.
    """
    luck = np.random.Generator(np.random.Philox(key=list(key)))
    groups, counts = np.unique(key_group, return_counts=True)
    place = np.searchsorted(groups, query_group).clip(max=len(groups) - 1)
    right = np.where(groups[place] == query_group, counts[place], 0)
    query = luck.permutation(np.flatnonzero((right > 0) & (right < len(key_group))))[:queries]
    wide = min(negatives, len(key_group) - 1)
    candidate = np.full((len(query), 1 + wide), -1, np.int64)
    alike = 0
    for rows in blocks(len(query), len(key_group)):
        beat("evaluation: sampling galleries")
        asked = query[rows]
        order = luck.random((len(asked), len(key_group)))
        own = query_group[asked, None] == key_group
        candidate[rows, 0] = np.where(own, order, np.inf).argmin(1)
        if query_category is not None and key_category is not None:
            order += query_category[asked, None] != key_category  # all others come behind
        order[own] = np.inf
        chosen = order.argpartition(wide - 1, axis=1)[:, :wide]
        value = np.take_along_axis(order, chosen, 1)
        candidate[rows, 1:] = np.where(np.isfinite(value), chosen, -1)
        alike += int((value < 1).sum())
    total = int((candidate[:, 1:] >= 0).sum())
    return Sample(torch.from_numpy(query), torch.from_numpy(candidate), alike / max(1, total))


def score_sample(sample: Sample, queries: Tensor, keys: Tensor) -> Tensor:
    """(Q, 1 + n) float32 products of (Q', E) and (C, E) features, as :func:`~.ranking.rank_all` takes them; -inf in
    empty places."""
    scores = torch.full(sample.candidate.shape, -torch.inf)
    for rows in blocks(len(scores), scores.shape[1] * keys.shape[1]):
        chosen = sample.candidate[rows].clamp(min=0).to(keys.device)
        asked = queries[sample.query[rows].to(queries.device)].double()
        scores[rows] = torch.einsum("qe,qce->qc", asked, keys[chosen].double()).float().cpu()
    return scores.masked_fill_(sample.candidate < 0, -torch.inf)


def sample_ranks(sample: Sample, scores: Tensor) -> Tensor:
    """(Q,) rank from 1 of the right candidate by (Q, 1 + n) ``scores``; empty places are behind everything."""
    scores, right = scores.masked_fill(sample.candidate < 0, -torch.inf), sample.right
    return ranks(scores, right) - ((sample.candidate < 0) & ~(scores < scores[:, :1])).sum(1)


def sample_chance(sample: Sample) -> dict[str, float]:
    """The recalls a random order reaches on average: k of 1 + n."""
    return chance_of(torch.ones(len(sample.query)), (sample.candidate >= 0).sum(1))


def summarise(draws: Sequence[dict[str, dict[str, float]]]) -> dict[str, Any]:
    """Recalls of several draws, each by direction -> their means, ``sum`` (RSum), and ``spread``: the standard
    deviation of all these from draw to draw, 0 for a single draw."""

    def spread(values: list[float]) -> float:
        return statistics.stdev(values) if len(values) > 1 else 0.0

    sums = [rsum(draw) for draw in draws]
    by_direction = {
        direction: {f"r{k}": [draw[direction][f"r{k}"] for draw in draws] for k in CUTS} for direction in DIRECTIONS
    }
    mean = {name: {k: statistics.fmean(v) for k, v in of.items()} for name, of in by_direction.items()}
    deviation: dict[str, Any] = {name: {k: spread(v) for k, v in of.items()} for name, of in by_direction.items()}
    return {**mean, "sum": statistics.fmean(sums), "spread": {**deviation, "sum": spread(sums)}}
