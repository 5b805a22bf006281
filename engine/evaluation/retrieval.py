"""Image–text retrieval: recall at 1, 5 and 10, from features alone and after re-ranking by the match head.

A caption can belong to several images, so hits are counted by ``group_id``: an image's query is answered by any caption
of its group, a caption's query by any image of its group. Captions without an image are candidates but ask nothing.

Ties are counted against the model: a wrong candidate whose score is not strictly below the right one's stands before
it. A collapsed model, or one that returns NaN, therefore scores 0 and not 100.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..beats import beat
from ..data.base import EvaluationSplit

CUTS = (1, 5, 10)
RERANK_SCORE = "sum"  # "sum": feature similarity / temperature + ITM log-odds; "itm": the log-odds alone
RERANK_QUERIES = 1000  # at most this many queries a direction are re-ranked, a fixed random sample of a larger split
CHUNK = 256  # queries, or image–caption pairs, scored at once


@dataclass(frozen=True)
class Embedded:
    """A split's images and captions as features; captions keep their tokens for the fusion encoder."""

    image: Tensor  # (N, E) float32
    image_group: Tensor  # (N,) int64, on the CPU like everything that counts
    text: Tensor  # (G, E) float32
    text_group: Tensor  # (G,) int64
    text_tokens: Tensor  # (G, L, width)
    token_mask: Tensor  # (G, L) bool


@torch.no_grad()
def embed(model: Any, split: EvaluationSplit, device: torch.device | str, batch_size: int = CHUNK) -> Embedded:
    """Encode every image and every gallery caption once. Image tokens are not kept: they would fill the memory."""
    features, groups = [], []
    for batch in split.images(batch_size):
        beat("evaluation: encoding images")
        features.append(model.encode_image(batch.images.to(device)).feature.float())
        groups.append(batch.group_id.cpu())
    texts, tokens, masks, text_groups = [], [], [], []
    for captions in split.gallery(batch_size):
        beat("evaluation: encoding captions")
        mask = captions.token_mask.to(device)
        encoded = model.encode_text(captions.token_ids.to(device), mask)
        texts.append(encoded.feature.float())
        tokens.append(encoded.tokens)
        masks.append(mask)
        text_groups.append(captions.group_id.cpu())
    length = max(m.shape[1] for m in masks)
    padded = [F.pad(t, (0, 0, 0, length - t.shape[1])) for t in tokens]
    padded_masks = [F.pad(m, (0, length - m.shape[1])) for m in masks]
    return Embedded(
        torch.cat(features), torch.cat(groups), torch.cat(texts), torch.cat(text_groups),
        torch.cat(padded), torch.cat(padded_masks),
    )  # fmt: skip


def ranks(scores: Tensor, query_group: Tensor, candidate_group: Tensor) -> Tensor:
    """Rank (from 1) of the best right candidate of each row of ``scores`` (Q, C); 0 where there is no right one."""
    found = torch.zeros(len(scores), dtype=torch.long)
    for start in range(0, len(scores), CHUNK):
        beat("evaluation: ranking")
        rows = slice(start, start + CHUNK)
        part, right = scores[rows], query_group[rows, None] == candidate_group[None, :]
        best = part.masked_fill(~right, -torch.inf).amax(1, keepdim=True)
        before = (~(part < best) & ~right).sum(1)  # "not below" also counts ties and NaN
        found[rows] = torch.where(right.any(1), before + 1, 0)
    return found


def recalls(rank: Tensor) -> dict[str, float]:
    """Percent of queries answered within the first 1, 5 and 10; those without a right candidate (0) are left out."""
    asked = rank[rank > 0]
    return {f"r{k}": 100.0 * float((asked <= k).double().mean()) if len(asked) else 0.0 for k in CUTS}


def chance(query_group: Tensor, candidate_group: Tensor) -> dict[str, float]:
    """The recalls a random order would reach on average, exactly: 1 - C(n - m, k) / C(n, k) for m right of n."""
    right = (query_group[:, None] == candidate_group[None, :]).sum(1).double()
    right, n = right[right > 0], len(candidate_group)
    found = {}
    for k in CUTS:
        miss = torch.ones_like(right)
        for i in range(min(k, n)):
            miss = miss * ((n - right - i).clamp(min=0) / (n - i))
        found[f"r{k}"] = 100.0 * float((1 - miss).mean()) if len(right) else 0.0
    return found


@torch.no_grad()
def match_scores(
    model: Any, split: EvaluationSplit, embedded: Embedded, pairs: Tensor, device: torch.device | str,
    batch_size: int = CHUNK,
) -> Tensor:  # fmt: skip
    """ITM log-odds (N,) of image–caption ``pairs`` (N, 2), each an image's and a caption's position in the split.

    The images among them are encoded again and their keys and values projected once, however many captions each meets;
    within a batch pairs go in order of caption length, so that little padding is computed.
    """
    scores = torch.empty(len(pairs))
    lengths = embedded.token_mask.sum(1).cpu()
    order = torch.argsort(pairs[:, 0], stable=True)
    images, counts = torch.unique(pairs[:, 0], return_counts=True)
    for rows, mine in zip(images.split(batch_size), order.split(_sums(counts, batch_size)), strict=True):
        image = model.project_image(model.encode_image(split.take(rows.numpy()).images.to(device)).tokens)
        mine = mine[torch.argsort(lengths[pairs[mine, 1]])]
        for part in mine.split(CHUNK):
            beat("evaluation: re-ranking")
            which = torch.searchsorted(rows, pairs[part, 0]).to(device)
            caption = pairs[part, 1].to(device)
            length = int(lengths[pairs[part, 1]].max())
            mask = embedded.token_mask[caption, :length]
            fused = model.fuse(embedded.text_tokens[caption, :length], mask, [(k[which], v[which]) for k, v in image])
            logits = model.match_logits(fused.tokens, mask)
            scores[part] = (logits[:, 1] - logits[:, 0]).float().cpu()
    return scores


def _sums(counts: Tensor, size: int) -> list[int]:
    return [int(part.sum()) for part in counts.split(size)]


def reranked_ranks(rank: Tensor, scores: Tensor, right: Tensor) -> Tensor:
    """Ranks after the first k candidates were put in a new order; the others keep their places behind them.

    Args:
        rank: (Q,) ranks before. scores: (Q, k) new scores of the candidates. right: (Q, k) bool, the right ones.
    """
    best = scores.masked_fill(~right, -torch.inf).amax(1, keepdim=True)
    before = (~(scores < best) & ~right).sum(1)
    return torch.where(right.any(1) & (rank > 0), before + 1, rank)


def evaluate_split(
    model: Any,
    split: EvaluationSplit,
    device: torch.device | str,
    temperature: float,
    rerank: int = 0,
    rerank_queries: int = RERANK_QUERIES,
) -> dict[str, Any]:
    """Retrieval in both directions, as a split's entry of ``evaluation.json``; percentages.

    ``without_flags`` leaves the split's flags out, as queries and as candidates; ``None`` where there are none.
    ``reranked`` holds, besides the recalls, those of the same queries ``before`` and by the match head alone (``itm``).
    """
    found = embed(model, split, device)
    similarity = (found.image @ found.text.T).cpu()
    directions = {
        "i2t": (similarity, found.image_group, found.text_group),
        "t2i": (similarity.T, found.text_group, found.image_group),
    }
    by_direction = {name: ranks(*given) for name, given in directions.items()}
    result: dict[str, Any] = {
        "title": split.title,
        "images": len(found.image_group),
        "captions": len(found.text_group),
        "chance": {name: chance(asked, given) for name, (_, asked, given) in directions.items()},
        **{name: recalls(rank) for name, rank in by_direction.items()},
        "reranked": None,
        "without_flags": None,
    }
    result["chance_r1"] = result["chance"]["i2t"]["r1"]
    images, texts = torch.from_numpy(~split.image_is_flag), torch.from_numpy(~split.gallery_is_flag)
    if not (images.all() and texts.all()) and images.any() and texts.any():
        kept, i, t = similarity[images][:, texts], found.image_group[images], found.text_group[texts]
        result["without_flags"] = {
            "images": len(i),
            "captions": len(t),
            "i2t": recalls(ranks(kept, i, t)),
            "t2i": recalls(ranks(kept.T, t, i)),
        }
    if rerank > 0:
        result["reranked"] = _rerank(
            model, split, found, directions, by_direction, device, temperature, rerank, rerank_queries
        )
    return result


def _rerank(
    model: Any,
    split: EvaluationSplit,
    found: Embedded,
    directions: dict[str, tuple[Tensor, Tensor, Tensor]],
    by_direction: dict[str, Tensor],
    device: torch.device | str,
    temperature: float,
    k: int,
    limit: int,
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    queries, candidates = {}, {}
    for name, (scores, _, _) in directions.items():
        asking = (by_direction[name] > 0).nonzero()[:, 0]
        if len(asking) > limit:
            asking = asking[torch.randperm(len(asking), generator=generator)[:limit]].sort().values
        queries[name] = asking
        candidates[name] = scores[asking].topk(min(k, scores.shape[1]), dim=1).indices
    # Both directions often ask about the same pair: each is scored once.
    wide = len(found.text_group)
    keys = {
        "i2t": queries["i2t"][:, None] * wide + candidates["i2t"],
        "t2i": candidates["t2i"] * wide + queries["t2i"][:, None],
    }
    unique, inverse = torch.unique(torch.cat([keys["i2t"].flatten(), keys["t2i"].flatten()]), return_inverse=True)
    odds = match_scores(model, split, found, torch.stack([unique // wide, unique % wide], 1), device)[inverse]
    parts = dict(zip(("i2t", "t2i"), odds.split([keys["i2t"].numel(), keys["t2i"].numel()]), strict=True))
    result: dict[str, Any] = {"candidates": k, "pairs": len(unique), "before": {}, "itm": {}}
    for name, (scores, asked, given) in directions.items():
        query, candidate, rank = queries[name], candidates[name], by_direction[name][queries[name]]
        itm = parts[name].view(candidate.shape)
        right = asked[query, None] == given[candidate]
        total = itm + scores[query].gather(1, candidate) / temperature
        orders = {
            "itm": reranked_ranks(rank, itm, right),
            "sum": reranked_ranks(rank, total, right),
        }
        result[name] = {**recalls(orders[RERANK_SCORE]), "queries": len(query)}
        result["before"][name] = recalls(rank)
        result["itm"][name] = recalls(orders["itm"])
    return result
