"""Text-guided image retrieval: a reference image and words that say how another image differs ask for that image.

The query is the feature of image and text fused: the fusion encoder reads the words with the reference as context, and
what ITM reads of it ([CLS], or the mean) goes through the text projection. SyncMask reports R@10 and R@50 and does not
say how its query is made: this is our reconstruction. Beside it stand what needs no such training: the reference's
feature alone, the words' alone, and their sum.

Ranked is the whole gallery. Where a request leaves its own reference out (:attr:`ComposedSplit.reference`) it is no
candidate. Pictures that are the same, pixel by pixel, count as one. Ties are counted against the model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..beats import beat
from ..data.base import ComposedSplit
from .embedding import BATCH, Progress
from .ranking import blocks, ranks

COMPOSED_CUTS = (1, 10, 50)
QUERIES = ("query", "image", "text", "sum")
EXAMPLES, FIRST = 6, 5  # requests of a set that the report shows, and leading candidates of each


def composed_retrieval(
    model: Any,
    splits: Mapping[str, ComposedSplit],
    device: torch.device | str,
    progress: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """``composed`` of ``evaluation.json``: by split the recalls of each of :data:`QUERIES` as ``r1``, ``r10`` and
    ``r50``, percentages, what a random order reaches (``chance``), some requests with what was found (``examples``),
    and under ``average`` the mean of splits, where the tables of their source have it. The model must be in evaluation
    mode."""
    found: dict[str, Any] = {}
    for name, split in splits.items():
        heading = f"text-guided retrieval: {split.title}"
        progress(heading)
        told = Progress(lambda text, heading=heading: progress(f"{heading}: {text}"))  # type: ignore[misc]
        found[name] = evaluate_composed(model, split, device, told)
    averaged = [f for name, f in found.items() if splits[name].averaged]
    if averaged:
        kinds = (*QUERIES, "chance")
        found["average"] = {
            "title": f"mean of the {len(averaged)} sets",
            **{kind: {cut: sum(f[kind][cut] for f in averaged) / len(averaged) for cut in _names()} for kind in kinds},
        }
    return found


def evaluate_composed(
    model: Any, split: ComposedSplit, device: torch.device | str, progress: Progress | None = None
) -> dict[str, Any]:
    """One split's entry of :func:`composed_retrieval`."""
    progress = progress or Progress()
    gallery, asked = len(split.gallery), len(split.target)
    keys = torch.cat([
        _candidates(model, split, rows, device, progress) for rows in _batches(gallery)
    ])  # fmt: skip
    parts = [_queries(model, split, rows, device, progress) for rows in _batches(asked)]
    queries = {kind: torch.cat([part[kind] for part in parts]) for kind in QUERIES}
    right = torch.from_numpy(split.target)[:, None] == torch.from_numpy(split.gallery)
    own = torch.from_numpy(split.reference)
    left = gallery - (own >= 0).long()
    return {
        "title": split.title,
        "triplets": asked,
        "candidates": gallery,
        **{kind: _recalls(_ranked(of, keys, right, own)) for kind, of in queries.items()},
        "chance": _chance(right, left, own),
        "examples": _examples(queries["query"], keys, right, own),
    }


def _candidates(
    model: Any, split: ComposedSplit, rows: np.ndarray, device: torch.device | str, progress: Progress
) -> Tensor:
    beat("evaluation: encoding images")
    progress("candidates encoded", int(rows[0]), len(split.gallery))
    with torch.no_grad():
        feature: Tensor = model.encode_image(split.candidates(rows).to(device)).feature.float()
    return feature


@torch.no_grad()
def _queries(
    model: Any, split: ComposedSplit, rows: np.ndarray, device: torch.device | str, progress: Progress
) -> dict[str, Tensor]:
    beat("evaluation: encoding requests")
    progress("requests encoded", int(rows[0]), len(split.target))
    asked = split.requests(rows)
    mask = asked.token_mask.to(device)
    image, text = model.encode_image(asked.images.to(device)), model.encode_text(asked.token_ids.to(device), mask)
    return {
        "query": model.composed_feature(image.tokens, text.tokens, mask),
        "image": image.feature.float(),
        "text": text.feature.float(),
        "sum": F.normalize(image.feature.float() + text.feature.float(), dim=-1),
    }


def _batches(count: int) -> list[np.ndarray]:
    return [np.arange(start, min(start + BATCH, count)) for start in range(0, count, BATCH)]


@torch.no_grad()
def _ranked(queries: Tensor, keys: Tensor, right: Tensor, own: Tensor) -> Tensor:
    """(T,) ranks from 1 of the best right candidate, on the CPU; the reference's own place is behind all."""
    found, wide = torch.zeros(len(queries), dtype=torch.int64), keys.double().T
    for rows in blocks(len(queries), len(keys)):
        beat("evaluation: ranking")
        scores, place = (queries[rows].double() @ wide).float().cpu(), own[rows]
        has = place >= 0
        scores[has.nonzero()[:, 0], place[has]] = -torch.inf
        answers = right[rows].clone()
        answers[has.nonzero()[:, 0], place[has]] = False
        found[rows] = ranks(scores, answers)
    return found


def _examples(queries: Tensor, keys: Tensor, right: Tensor, own: Tensor) -> list[dict[str, Any]]:
    """At most :data:`EXAMPLES` requests, evenly spread over those that have an answer and so not chosen by how they
    turned out: ``row``, ``rank`` of the best right candidate from 1, its place in the gallery (``right``), and the
    places of the candidates that come first (``first``), best first. Further copies of the right picture are left out,
    so that it stands where its rank says."""
    candidate = torch.arange(len(keys)) != own[:, None]
    answers = right & candidate
    asked = answers.any(1).nonzero()[:, 0]
    count, wide, found = min(EXAMPLES, len(asked)), keys.double().T, []
    for row in (int(asked[(2 * i + 1) * len(asked) // (2 * count)]) for i in range(count)):
        scores = (queries[row].double() @ wide).float().cpu()
        rights, wrong = answers[row].nonzero()[:, 0], (candidate[row] & ~right[row]).nonzero()[:, 0]
        best = int(rights[scores[rights].argmax()])
        order = wrong[scores[wrong].argsort(descending=True, stable=True)].tolist()
        before = int((~(scores[wrong] < scores[best])).sum())  # as ranks(): ties and NaN are lost
        order.insert(before, best)
        found.append({"row": row, "rank": before + 1, "right": best, "first": order[:FIRST]})
    return found


def _recalls(rank: Tensor) -> dict[str, float]:
    answered = rank[rank > 0]
    return {f"r{k}": 100.0 * float((answered <= k).double().mean()) if len(answered) else 0.0 for k in COMPOSED_CUTS}


def _chance(right: Tensor, left: Tensor, own: Tensor) -> dict[str, float]:
    """1 - C(n - m, k) / C(n, k) for m right of n, the mean over requests that have an answer."""
    has = own >= 0
    counts = right.sum(1)
    counts[has] -= right[has.nonzero()[:, 0], own[has]].long()
    pairs, weight = torch.stack([left, counts], 1)[counts > 0].unique(dim=0, return_counts=True)
    total = int(weight.sum())
    return {
        f"r{k}": 100.0
        * sum(
            w * (1 - math.comb(n - m, k) / math.comb(n, k) if k < n else 1.0)
            for (n, m), w in zip(pairs.tolist(), weight.tolist(), strict=True)
        )
        / max(1, total)
        for k in COMPOSED_CUTS
    }


def _names() -> list[str]:
    return [f"r{k}" for k in COMPOSED_CUTS]
