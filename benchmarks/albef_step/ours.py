"""The same step as this package takes it: ``recipes/albef.yaml`` on one rank, on a batch that is handed over."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from crossmask.engine.data import PairData
from crossmask.engine.data.batch import Batch
from crossmask.engine.data.tokenizer import CaptionTokenizer
from crossmask.engine.recipe import Recipe
from crossmask.engine.recipe_files import load_recipe
from crossmask.engine.training.distributed import init_distributed
from crossmask.engine.training.pretrainer import Pretrainer

from .sizes import CLS, MASK, PAD, SEP, Captioned, Sizes

Precision = Literal["fp32", "bf16", "autocast"]  # autocast: fp32 parameters, torch_autocast's products in bf16


def recipe(sizes: Sizes, precision: Precision = "fp32", stage: int = 0, overrides: Sequence[str] = ()) -> Recipe:
    """The published recipe at these sizes, with alpha past its ramp and a full queue, as they are most of the time.

    ``stage``: of ZeRO. One rank has nothing to share out, so the default is 0.
    """
    autocast = ", torch_autocast: {enabled: true, dtype: bfloat16}" if precision == "autocast" else ""
    values = {
        "data.source": "emoji",  # not read: batches are handed over,
        "data.prefetch": 0,  # each when its step begins
        "data.max_tokens": "null",
        "model.image.size": sizes.image,
        "model.image.patch_size": sizes.patch,
        "model.image.width": sizes.width,
        "model.image.depth": sizes.image_depth,
        "model.image.heads": sizes.heads,
        "model.text.width": sizes.width,
        "model.text.depth": sizes.text_depth,
        "model.text.heads": sizes.heads,
        "model.text.positions": sizes.positions,
        "model.text.dropout": sizes.dropout,
        "model.fusion.depth": sizes.fusion_depth,
        "model.fusion.heads": sizes.heads,
        "model.fusion.dropout": sizes.dropout,
        "model.projection_width": sizes.projection,
        "masking.text_ratio": sizes.masked,
        "objectives.itc.queue_length": sizes.queue,
        "objectives.itc.queue_initial": "random",
        "objectives.distillation_ramp": 0.0,
        "training.batch_size": sizes.batch,
        "training.precision": "bf16" if precision == "bf16" else "fp32",
        "deepspeed": f"{{zero_optimization: {{stage: {stage}}}{autocast}}}",
    }
    return load_recipe("albef", [*(f"{name}={value}" for name, value in values.items()), *overrides])


def tokenizer(sizes: Sizes) -> CaptionTokenizer:
    """BERT's layout: the special tokens where bert-base-uncased has them, words from 999 on."""
    words = {PAD: "[PAD]", 100: "[UNK]", CLS: "[CLS]", SEP: "[SEP]", MASK: "[MASK]"}
    lines = [words.get(i, f"[unused{i}]" if i < 999 else f"w{i}") for i in range(sizes.vocabulary)]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "vocab.txt")
        file.write_text("\n".join(lines) + "\n")
        return CaptionTokenizer.from_vocabulary(file)


class HandedOver(PairData):
    """Training data of one batch of ``rows``, whichever was put into ``batch`` last."""

    def __init__(self, words: CaptionTokenizer, max_tokens: int, rows: int) -> None:
        self.tokenizer, self.max_tokens, self.train_size = words, max_tokens, rows
        self.train_group_id = np.arange(rows)
        self.splits = {}
        self.batch: Captioned | None = None

    def train_batch(self, indices: np.ndarray, epoch: int, truth: bool = False) -> Batch:
        assert self.batch is not None
        given, rows = self.batch, torch.arange(len(indices))
        return Batch(given.images, given.token_ids, given.token_mask, given.maskable, rows, rows)

    def training_captions(self) -> list[str]:
        return []

    def name_of(self, index: int) -> str:
        return f"row {index}"

    def describe(self) -> dict[str, object]:
        return {}


class OurStep:
    """The whole step: teacher, student, backward, optimizer, average and queue."""

    def __init__(
        self, sizes: Sizes, precision: Precision = "fp32", stage: int = 0, overrides: Sequence[str] = ()
    ) -> None:
        os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))
        world = init_distributed()
        self.data = HandedOver(tokenizer(sizes), sizes.positions, sizes.batch)
        self.pretrainer = Pretrainer(recipe(sizes, precision, stage, overrides), self.data, 0, 1, world.device)

    def __call__(self, batch: Captioned) -> dict[str, float]:
        self.data.batch = batch
        self.pretrainer.step()
        assert self.pretrainer.last is not None
        terms = self.pretrainer.last.terms
        return {name: float(terms[name]) for name in ("itc", "itm", "mlm")}
