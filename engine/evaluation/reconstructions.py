"""Held-out pictures of a captioner for the report: as they are, without their high patches, painted back, and without
their low patches."""

from __future__ import annotations

import base64
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ..beats import beat
from ..data.base import PairData
from ..objectives.captioning import low_patches
from ..recipe import Recipe
from .captioner_measures import is_captioner, reconstruct
from .evaluate import frozen, sample
from .mask_pictures import SIDE, masked_image
from .masks import Look

FOLDER, FILE = "reconstructions", "reconstructions.json"
PANELS = ("picture", "without its high patches", "high patches painted back", "without its low patches")


@torch.no_grad()
def write_reconstructions(
    run_dir: Path | str, model: Any, data: PairData, look: Look, recipe: Recipe, device: torch.device | str
) -> Path | None:
    """Write ``reconstructions/*.png``, the panels of one picture side by side, then ``reconstructions.json`` by rename.

    Half scenes, half single drawings where the source composes scenes. None where the model paints nothing.
    """
    if not is_captioner(model) or model.image_decoder is None or not data.splits:
        return None
    count, run = recipe.evaluation.gallery_pairs, Path(run_dir)
    fresh = run / f"{FOLDER}.tmp"
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    pairs: list[dict[str, Any]] = []
    with frozen(model, recipe.seed):
        name, split = next(iter(data.splits.items()))
        scenes = data.scene_batch(name, count // 2, recipe.seed + 1)
        batches = [] if scenes is None else [scenes]
        batches.append(sample(split, count - sum(map(len, batches)), recipe.seed + 1))
        for batch in batches:
            if not len(batch):
                continue
            beat("drawing reconstructions")
            batch = batch.to(device)
            seen, plan = look(model, batch)
            guide = seen.text if recipe.objectives.tg_mim.text else None
            painted = paint(batch.images, reconstruct(model, batch, plan, guide, recipe), plan.image, model.patch_size)
            nothing = torch.zeros_like(plan.image)
            low = low_patches(plan) if plan.more_images else nothing
            shown = ((batch.images, nothing), (batch.images, plan.image), (painted, nothing), (batch.images, low))
            for i in range(len(batch)):
                sheet = Image.new("RGB", (len(shown) * SIDE, SIDE), "white")
                for j, (images, hidden) in enumerate(shown):
                    panel = masked_image(images[i], hidden[i], model.patch_grid, data.normalisation)
                    sheet.paste(panel, (j * SIDE, 0))
                picture = f"{len(pairs):02d}.png"
                sheet.save(fresh / picture)
                pairs.append({"image": f"{FOLDER}/{picture}", "caption": data.tokenizer.text(batch.token_ids[i])})
    shutil.rmtree(run / FOLDER, ignore_errors=True)
    os.replace(fresh, run / FOLDER)
    temporary = run / f"{FILE}.tmp"
    temporary.write_text(json.dumps({"split": split.title, "panels": PANELS, "pairs": pairs}, indent=1), "utf-8")
    os.replace(temporary, run / FILE)
    return run / FILE


def paint(images: Tensor, patches: Tensor, hidden: Tensor, size: int) -> Tensor:
    """(B, 3, H, W): ``images`` with their ``hidden`` (B, P) patches replaced by ``patches`` (B, P, 3 size²), clipped to
    the range of the images' own pixels."""
    whole = F.fold(patches.transpose(1, 2), images.shape[2:], size, stride=size)
    one = torch.ones(len(images), size * size, hidden.shape[1], device=images.device)
    where = F.fold(one * hidden[:, None], images.shape[2:], size, stride=size) > 0
    return torch.where(where, whole.to(images.dtype).clamp(images.min(), images.max()), images)


def read_reconstructions(run_dir: Path) -> dict[str, Any]:
    """For the report: the panels' names and, of each pair, its caption and its pictures as a data URL. Empty where a
    run has none, or they cannot be read."""
    try:
        found = json.loads((run_dir / FILE).read_text("utf-8"))
        pairs = [{**pair, "data": _data_url(run_dir / pair["image"])} for pair in found["pairs"]]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return {**found, "pairs": pairs}


def _data_url(file: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(file.read_bytes()).decode()
