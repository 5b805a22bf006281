"""Captions of held-out images, scored against all captions that were written for them.

BLEU-4 (Papineni et al. 2002) is sacrebleu's on the words of the tokenizer, without smoothing; CIDEr (Vedantam et al.
2015) that of COCO's evaluation code, as published. METEOR is not measured: its implementations need Java, or WordNet.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..beats import beat
from ..data.base import EvaluationSplit
from ..data.tokenizer import CaptionTokenizer
from ..models.captioner import CaptioningModel
from ..recipe import Recipe
from .embedding import Progress
from .generation import Generated, generate

PACKAGES = ("sacrebleu", "pycocoevalcap")
REMEDY = "pip install 'crossmask[captioning]'"


@dataclass(frozen=True)
class Captions:
    """Of some images of a split, in the order of the split."""

    rows: np.ndarray  # (N,) int64, their places in the split
    texts: list[str]  # N
    references: list[list[str]]  # N
    tokens: np.ndarray  # (N,) int64, length of what was written, [SEP] included
    ended: np.ndarray  # (N,) bool; False = cut at the greatest length
    log_probability: np.ndarray  # (N,) float64, of the whole caption

    def examples(self, count: int) -> list[dict[str, Any]]:
        """At most ``count`` of them, spread over the split."""
        chosen = np.unique(np.linspace(0, len(self.rows) - 1, min(count, len(self.rows))).round().astype(np.int64))
        return [
            {
                "row": int(self.rows[n]),
                "caption": self.texts[n],
                "references": self.references[n],
                "nats_per_token": float(-self.log_probability[n] / self.tokens[n]),
            }
            for n in chosen.tolist()
        ]


def write_captions(
    model: CaptioningModel,
    split: EvaluationSplit,
    tokenizer: CaptionTokenizer,
    recipe: Recipe,
    device: torch.device | str,
    progress: Callable[[str], None] = lambda text: None,
) -> Captions:
    """Caption a fixed random sample of a split's images: ``evaluation.captioning`` says how many, and how.

    An image's references are the captions of its group in the split's gallery.
    """
    section, told = recipe.evaluation.captioning, Progress(progress)
    rows = np.random.Generator(np.random.Philox(key=[recipe.seed, 0])).permutation(split.image_count)
    rows = np.sort(rows[: section.samples])
    found: list[Generated] = []
    texts: list[str] = []
    for start in range(0, len(rows), section.batch_size):
        beat("evaluation: captioning")
        told("images captioned", start, len(rows))
        batch = split.take(rows[start : start + section.batch_size]).to(device)
        context = model.context(model.encode_image(batch.images, feature=False))
        found.append(generate(model, context, section, tokenizer, recipe.seed, batch.index))
        texts += [tokenizer.text(ids) for ids in found[-1].token_ids.cpu()]
    references: dict[int, list[str]] = {}
    for group, text in zip(split.gallery_group_id.tolist(), split.texts(tokenizer), strict=True):
        references.setdefault(group, []).append(text)
    return Captions(
        rows,
        texts,
        [references[group] for group in split.image_group_id[rows].tolist()],
        torch.cat([one.length for one in found]).cpu().numpy(),
        torch.cat([one.ended for one in found]).cpu().numpy(),
        torch.cat([one.score.double() for one in found]).cpu().numpy(),
    )


def captioning(captions: Captions) -> dict[str, Any]:
    """A split's ``captioning`` of ``evaluation.json``: BLEU-4 and CIDEr x 100, and what can be counted. Without the
    packages that score, ``missing`` says what to install, and the scores are None."""
    count = len(captions.texts)
    exact = [text in written for text, written in zip(captions.texts, captions.references, strict=True)]
    return {
        "images": count,
        "references": sum(map(len, captions.references)) / count,
        **score(captions.texts, captions.references),
        "exact": 100 * sum(exact) / count,  # % that someone wrote in the same words
        "distinct": 100 * len(set(captions.texts)) / count,  # %
        "words": sum(len(text.split()) for text in captions.texts) / count,
        "cut": 100 * float(1 - captions.ended.mean()),  # %
        "nats_per_token": float(-(captions.log_probability / captions.tokens).mean()),
    }


def score(texts: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, Any]:
    """BLEU-4 and CIDEr x 100 of N captions in words, each against one or more of its own.

    Of fewer than two images CIDEr, which weighs words by how rare they are among them, is 0.
    """
    if gone := [name for name in PACKAGES if importlib.util.find_spec(name) is None]:
        return {"bleu4": None, "cider": None, "missing": f"{' and '.join(gone)} not installed: {REMEDY}"}
    from pycocoevalcap.cider.cider import Cider
    from sacrebleu.metrics.bleu import BLEU

    most = max(map(len, references))
    streams = [[own[n] if n < len(own) else None for own in references] for n in range(most)]
    # words are apart already, whatever the language
    bleu = BLEU(tokenize="none", smooth_method="none", force=True).corpus_score(texts, streams)  # type: ignore[arg-type]
    by_image = {n: list(own) for n, own in enumerate(references)}
    cider, _ = Cider().compute_score(by_image, {n: [text] for n, text in enumerate(texts)})
    return {"bleu4": float(bleu.score), "cider": 100 * float(cider)}
