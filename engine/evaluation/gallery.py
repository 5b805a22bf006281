"""Held-out pairs with their masks, saved for the report: what the teacher hides, and where it looked."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..data.base import PairData
from ..data.batch import Batch
from ..objectives import Seen
from ..recipe import Recipe
from .evaluate import frozen, sample
from .masks import COVERAGE, NOT_DRAWN, Look, named_and_drawn, patch_coverage

SPECIAL = ("[CLS]", "[SEP]", "[PAD]")


def write_gallery(
    run_dir: Path | str, model: Any, data: PairData, look: Look, recipe: Recipe, device: torch.device | str
) -> Path:
    """Write ``gallery.json`` and ``gallery/*.png``: half scenes, half single drawings where the source composes scenes.

    Pixels are shown as the model sees them. Patch and word weights are the teacher's ``key_attention`` and
    ``query_attention``. Files appear whole: pictures first, then ``gallery.json`` by rename.
    """
    count = recipe.evaluation.gallery_pairs
    with frozen(model, recipe.seed):
        name, split = next(iter(data.splits.items()))
        scenes = data.scene_batch(name, count - count // 2, recipe.seed + 1)
        looks = [] if scenes is None else [("scene", scenes)]
        looks.append((split.kind, sample(split, count - (0 if scenes is None else len(scenes)), recipe.seed + 1)))
        run = Path(run_dir)
        fresh = run / "gallery.tmp"
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(parents=True)
        pairs: list[dict[str, Any]] = []
        for kind, batch in looks:
            for pair in describe_pairs(model, batch, look, data, device):
                picture = f"{len(pairs):02d}.png"
                Image.fromarray(pair.pop("pixels")).save(fresh / picture)
                pairs.append({"kind": kind, "image": f"gallery/{picture}", **pair})
    rows, columns = model.patch_grid
    shutil.rmtree(run / "gallery", ignore_errors=True)
    os.replace(fresh, run / "gallery")
    text = json.dumps({"split": split.title, "grid": [rows, columns], "pairs": pairs}, indent=1)
    temporary = run / "gallery.json.tmp"
    temporary.write_text(text, "utf-8")
    os.replace(temporary, run / "gallery.json")
    return run / "gallery.json"


def describe_pairs(
    model: Any, batch: Batch, look: Look, data: PairData, device: torch.device | str
) -> list[dict[str, Any]]:
    """Each pair's ``pixels`` (H, W, 3) uint8, its words with their masks, and its patches' masks and attention."""
    if not len(batch):
        return []
    batch = batch.to(device)
    seen, plan = look(model, batch)
    of_patches, of_words = _weights(seen, batch)
    pixels = (data.normalisation.undo(batch.images) * 255).round().byte().permute(0, 2, 3, 1).contiguous().cpu().numpy()
    named = None
    if batch.things is not None:
        on = patch_coverage(batch.things, model.patch_grid) >= COVERAGE
        if batch.words is not None:
            on = on & named_and_drawn(batch.words, on.shape[1])[:, :, None]
        named = on.any(1)
    return [
        {
            "pixels": pixels[i],
            "words": _words(batch, i, plan.text[i], of_words[i], data),
            "masked_patches": plan.image[i].nonzero()[:, 0].tolist(),
            "named_patches": None if named is None else named[i].nonzero()[:, 0].tolist(),
            "attention": [round(v, 5) for v in of_patches[i].tolist()],
        }
        for i in range(len(batch))
    ]


def _weights(seen: Seen, batch: Batch) -> tuple[Tensor, Tensor]:
    """(B, P) and (B, L): what patches and words weigh for the masks. A captioner's patches weigh by how much nearer
    their nearest word is to them than that of the farthest patch is to it, its words nothing."""
    if seen.statistics is None:
        assert seen.similarities is not None
        above = seen.similarities - seen.similarities.amin(1, keepdim=True)
        return above / above.sum(1, keepdim=True).clamp(min=1e-6), torch.zeros(batch.token_ids.shape)
    of_words = seen.statistics.query_attention if seen.word_attention is None else seen.word_attention
    assert seen.statistics.key_attention is not None
    assert of_words is not None
    return seen.statistics.key_attention, of_words


def _words(batch: Batch, i: int, hidden: Tensor, weights: Tensor, data: PairData) -> list[dict[str, Any]]:
    """Words of one caption; the pieces of a word are joined, and a word counts as masked when any piece is."""
    names = data.tokenizer.words(batch.token_ids[i].tolist())
    found: list[dict[str, Any]] = []
    for j, name in enumerate(names):
        if not bool(batch.token_mask[i, j]) or name in SPECIAL:
            continue
        thing = 0 if batch.words is None else int(batch.words[i, j])
        word = {
            "text": name.removeprefix("##"),
            "masked": bool(hidden[j]),
            "weight": round(float(weights[j]), 5),
            "shown": None if batch.words is None or thing == 0 else thing != NOT_DRAWN,
        }
        if name.startswith("##") and found:
            last = found[-1]
            last["text"] += word["text"]
            last["masked"] = last["masked"] or word["masked"]
            last["weight"] = max(last["weight"], word["weight"])
        else:
            found.append(word)
    return found
