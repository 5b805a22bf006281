"""Image–text retrieval on one split: full and sampled galleries, by features and after re-ranking by the match head.

Re-ranking takes a query's best candidates by feature similarity and orders them by what the fusion encoder and its
match head say of each pair. ``evaluation.rerank_score`` chooses by what exactly, and one choice is as published:

=============  ==========================================================================================
sum            similarity / temperature + ITM log-odds: two estimates of the same log-odds, added
itm            the log-odds alone: log p(match) - log p(no match)
match_logit    the match class's logit alone, not compared with the other's: ALBEF's public evaluation
=============  ==========================================================================================

One process evaluates, rank 0 of a run; the others wait for it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data.base import EvaluationSplit
from ..recipe import EvaluationSection
from .embedding import Embedded, Progress, embed, match_logits
from .ranking import DIRECTIONS, Ranked, chance, rank_all, recalls, reranked_ranks, rsum
from .sampled import Sample, draw_sample, sample_chance, sample_ranks, score_sample, summarise


@dataclass(frozen=True)
class Direction:
    """Who asks and who is ranked."""

    query: Tensor  # (Q, E)
    key: Tensor  # (C, E)
    query_group: Tensor  # (Q,) int64
    key_group: Tensor  # (C,) int64
    query_category: np.ndarray | None  # (Q,) int64
    key_category: np.ndarray | None  # (C,) int64


@dataclass(frozen=True)
class Question:
    """Candidates (Q, k) of some queries (Q,), with their similarities, that the match head is to order."""

    direction: str
    query: Tensor
    candidate: Tensor  # -1 = none
    similarity: Tensor

    def pairs(self) -> Tensor:
        """(Q * k, 2) int64: images and captions; an empty place repeats the query's first candidate."""
        own = self.query[:, None].expand_as(self.candidate)
        other = torch.where(self.candidate < 0, self.candidate[:, :1], self.candidate)
        return torch.stack([own, other] if self.direction == "i2t" else [other, own], -1).flatten(0, 1)


def evaluate_split(
    model: Any,
    split: EvaluationSplit,
    device: torch.device | str,
    temperature: float,
    section: EvaluationSection,
    seed: int = 0,
    progress: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Retrieval in both directions, as a split's entry of ``evaluation.json``; percentages.

    ``i2t`` is TR (text retrieval: an image asks), ``t2i`` is IR; each has R@1, R@5 and R@10 as ``r1``, ``r5`` and
    ``r10``, and ``sum`` is all six together (RSum). The same fields come again:

    * ``chance``: of a random order, exactly.
    * ``without_flags``: flags are left out, as queries and as candidates; ``None`` where there are none.
    * ``reranked``: by the recipe's ``score``, and for the same queries ``before`` and by the log-odds alone (``itm``).
    * ``sampled``: the mean over the draws, with its ``spread`` and a ``reranked`` of its own; ``None`` without draws.

    Args:
        section: what to evaluate. ``rerank_queries`` also limits the queries of a draw that are re-ranked.
        seed: of the sampled galleries.
        progress: is told in a few words how far it has come, at most every ten seconds.
    """
    told, sampled = Progress(progress), section.sampled
    found = embed(model, split, device, keep=section.rerank > 0, progress=told)
    directions = _directions(split, found)
    ranked = {
        name: rank_all(d.query, d.key, d.query_group, d.key_group, section.rerank) for name, d in directions.items()
    }
    samples = [
        {name: _sample(d, section, (seed, 2 * draw + n)) for n, (name, d) in enumerate(directions.items())}
        for draw in range(sampled.draws)
    ]
    result: dict[str, Any] = {
        "title": split.title,
        "images": len(found.image_group),
        "captions": len(found.text_group),
        "chance": _summed({name: chance(d.query_group, d.key_group) for name, d in directions.items()}),
        **_summed({name: recalls(r.rank) for name, r in ranked.items()}),
        "reranked": None,
        "sampled": None,
        "without_flags": _without_flags(split, found),
    }
    result["chance_r1"] = result["chance"]["i2t"]["r1"]
    similarities = [{n: score_sample(s, directions[n].query, directions[n].key) for n, s in d.items()} for d in samples]
    if samples:
        result["sampled"] = _sampled(samples, similarities, section)
    if section.rerank > 0:
        generator = torch.Generator().manual_seed(0)
        full = {name: _question(name, r, section, generator) for name, r in ranked.items()}
        limit = section.rerank_queries or sampled.queries
        drawn = [
            Question(n, s.query[:limit], s.candidate[:limit], found_[n][:limit])
            for draw, found_ in zip(samples, similarities, strict=True)
            for n, s in draw.items()
        ]
        logits, pairs = _ask(model, split, found, [*full.values(), *drawn], device, told)
        result["reranked"] = _reranked(full, ranked, directions, logits, pairs, temperature, section)
        if samples:
            result["sampled"]["reranked"] = _reranked_samples(samples, drawn, logits[2:], temperature, section)
    return result


def _directions(split: EvaluationSplit, found: Embedded) -> dict[str, Direction]:
    images = (found.image, found.image_group, split.image_category)
    captions = (found.text, found.text_group, split.gallery_category)
    pairs = {"i2t": (images, captions), "t2i": (captions, images)}
    return {
        name: Direction(query, key, query_group, key_group, query_category, key_category)
        for name, ((query, query_group, query_category), (key, key_group, key_category)) in pairs.items()
    }


def _summed(found: dict[str, dict[str, float]]) -> dict[str, Any]:
    return {**found, "sum": rsum(found)}


def _without_flags(split: EvaluationSplit, found: Embedded) -> dict[str, Any] | None:
    images, texts = torch.from_numpy(~split.image_is_flag), torch.from_numpy(~split.gallery_is_flag)
    if (images.all() and texts.all()) or not images.any() or not texts.any():
        return None
    image, text = found.image[images.to(found.image.device)], found.text[texts.to(found.text.device)]
    i, t = found.image_group[images], found.text_group[texts]
    ranked = {"i2t": rank_all(image, text, i, t), "t2i": rank_all(text, image, t, i)}
    return {"images": len(i), "captions": len(t), **_summed({name: recalls(r.rank) for name, r in ranked.items()})}


def _sample(direction: Direction, section: EvaluationSection, key: tuple[int, int]) -> Sample:
    d = direction
    groups, categories = (d.query_group.numpy(), d.key_group.numpy()), (d.query_category, d.key_category)
    return draw_sample(*groups, *categories, section.sampled.queries, section.sampled.negatives, key)


def _sampled(
    samples: list[dict[str, Sample]], similarities: list[dict[str, Tensor]], section: EvaluationSection
) -> dict[str, Any]:
    by_features = [
        {name: recalls(sample_ranks(sample, of[name])) for name, sample in draw.items()}
        for draw, of in zip(samples, similarities, strict=True)
    ]
    luck = summarise([{name: sample_chance(sample) for name, sample in draw.items()} for draw in samples])
    return {
        "draws": len(samples),
        "negatives": section.sampled.negatives,
        "queries": {name: len(samples[0][name].query) for name in DIRECTIONS},
        "same_category": {name: float(np.mean([draw[name].alike for draw in samples])) for name in DIRECTIONS},
        **summarise(by_features),
        "chance": {name: luck[name] for name in (*DIRECTIONS, "sum")},
        "reranked": None,
    }


def _question(name: str, ranked: Ranked, section: EvaluationSection, generator: torch.Generator) -> Question:
    """Which queries are re-ranked: all that ask, or a fixed random sample of them."""
    asking = (ranked.rank > 0).nonzero()[:, 0]
    limit = section.rerank_queries or len(asking)
    if len(asking) > limit:
        asking = asking[torch.randperm(len(asking), generator=generator)[:limit]].sort().values
    return Question(name, asking, ranked.top[asking], ranked.score[asking])


def _ask(
    model: Any, split: EvaluationSplit, found: Embedded, questions: list[Question], device: torch.device | str,
    told: Progress,
) -> tuple[list[Tensor], int]:  # fmt: skip
    """Logits (Q, k, 2) for each question and how many pairs that took: each is fused once, whoever asks."""
    wide = len(found.text_group)
    asked = [question.pairs() for question in questions]
    unique, place = torch.unique(torch.cat([pair[:, 0] * wide + pair[:, 1] for pair in asked]), return_inverse=True)
    logits = match_logits(model, split, found, torch.stack([unique // wide, unique % wide], 1), device, told)[place]
    parts = logits.split([len(pair) for pair in asked])
    return [part.view(*q.candidate.shape, 2) for part, q in zip(parts, questions, strict=True)], len(unique)


def order_by(score: str, logits: Tensor, similarity: Tensor, temperature: float) -> Tensor:
    """What candidates are ordered by: (..., 2) ITM logits and (...) similarities -> (...)."""
    if score == "match_logit":
        return logits[..., 1]
    odds = logits[..., 1] - logits[..., 0]
    return odds if score == "itm" else odds + similarity / temperature


def _reranked(
    questions: dict[str, Question],
    ranked: dict[str, Ranked],
    directions: dict[str, Direction],
    logits: list[Tensor],
    pairs: int,
    temperature: float,
    section: EvaluationSection,
) -> dict[str, Any]:
    new: dict[str, dict[str, Any]] = {score: {} for score in ("before", "itm", section.rerank_score)}
    for (name, q), found in zip(questions.items(), logits, strict=False):
        rank, d = ranked[name].rank[q.query], directions[name]
        right = d.query_group[q.query, None] == d.key_group[q.candidate]
        new["before"][name] = recalls(rank)
        for score in {"itm", section.rerank_score}:
            new[score][name] = recalls(reranked_ranks(rank, order_by(score, found, q.similarity, temperature), right))
    asked = {name: {**new[section.rerank_score][name], "queries": len(q.query)} for name, q in questions.items()}
    return {
        "score": section.rerank_score,
        "candidates": section.rerank,
        "pairs": pairs,
        **_summed(asked),
        "before": _summed(new["before"]),
        "itm": _summed(new["itm"]),
    }


def _reranked_samples(
    samples: list[dict[str, Sample]],
    questions: list[Question],
    logits: list[Tensor],
    temperature: float,
    section: EvaluationSection,
) -> dict[str, Any]:
    by_draw: list[dict[str, dict[str, float]]] = [{} for _ in samples]
    for number, (q, found) in enumerate(zip(questions, logits, strict=True)):
        sample = Sample(q.query, q.candidate, 0.0)
        scores = order_by(section.rerank_score, found, q.similarity, temperature)
        by_draw[number // 2][q.direction] = recalls(sample_ranks(sample, scores))
    queries = {q.direction: len(q.query) for q in questions[:2]}
    return {"score": section.rerank_score, "queries": queries, **summarise(by_draw)}
