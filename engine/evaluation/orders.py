"""The orders in which a split's candidates were ranked, with their recalls: the lines of every table of retrieval."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from .ranking import CUTS, DIRECTIONS, rsum

Recalls = Mapping[str, float]
SCORES = {"sum": "ITC + ITM", "itm": "ITM alone", "match_logit": "match logit"}  # by evaluation.rerank_score


@dataclass(frozen=True)
class Order:
    """One order in both directions."""

    name: str
    recalls: Mapping[str, Recalls]  # by direction
    sum: float  # RSum
    spread: Mapping[str, Any] | None = None  # over draws, with the same fields

    def values(self) -> list[float]:
        """TR and IR, each at 1, 5 and 10, then their sum."""
        return [*(self.recalls[direction][f"r{k}"] for direction in DIRECTIONS for k in CUTS), self.sum]

    def spreads(self) -> list[float | None]:
        """Of each of :meth:`values`."""
        if self.spread is None:
            return [None] * (len(DIRECTIONS) * len(CUTS) + 1)
        return [*(self.spread[direction][f"r{k}"] for direction in DIRECTIONS for k in CUTS), self.spread["sum"]]


def orders(split: Mapping[str, Any], flags: bool = True) -> Iterator[Order]:
    """Of an entry of ``evaluation.json``, also of runs before there were sums and sampled galleries.

    ``flags``: with the order without flags, where there is one.
    """
    yield _order("ITC", split)
    reranked = split.get("reranked")
    if reranked:
        score = reranked.get("score", "sum")
        before = reranked.get("before")
        if before and any(before[d] != split[d] for d in DIRECTIONS):  # a sample of the queries was re-ranked
            yield _order(f"ITC, {max(reranked[d].get('queries', 0) for d in DIRECTIONS):,} queries", before)
        yield _order(f"top {reranked.get('candidates', '')}: {SCORES[score]}", reranked)
        if "itm" in reranked and score == "sum":
            yield _order(f"top {reranked.get('candidates', '')}: {SCORES['itm']}", reranked["itm"])
    if split.get("without_flags") and flags:
        yield _order("ITC, without flags", split["without_flags"])
    if split.get("chance"):
        yield _order("chance", split["chance"])
    sampled = split.get("sampled")
    if sampled:
        size = f"1 of {1 + sampled['negatives']:,}"
        yield _order(f"{size}: ITC", sampled)
        if sampled.get("reranked"):
            yield _order(f"{size}: {SCORES[sampled['reranked']['score']]}", sampled["reranked"])
        yield _order(f"{size}: chance", sampled["chance"])


def _order(name: str, found: Mapping[str, Any]) -> Order:
    by_direction = {direction: found[direction] for direction in DIRECTIONS}
    return Order(name, by_direction, rsum(by_direction), found.get("spread"))
