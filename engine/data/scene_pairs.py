"""Composed scenes with known truth as a data source of their own: all that is held out, and what is trained on."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from ..recipe import Recipe
from .base import CaptionBatch, EvaluationSplit
from .batch import Batch
from .emoji_pairs import EmojiPairs
from .randomness import Draws
from .tokenizer import CaptionTokenizer

_COMPOSITION = 1 << 41  # in place of an epoch: what lies in a scene that comes again in every epoch
_AT_ONCE = 256  # scenes composed together for their captions


class SceneSplit(EvaluationSplit):
    """Scenes of one split's drawings, each a group of its own; the gallery is their captions."""

    kind = "scene"

    def __init__(self, name: str, title: str, data: ScenePairs, count: int) -> None:
        self.name, self.title, self._data = name, title, data
        self.image_group_id = self.gallery_group_id = len(data.art.captions) + np.arange(count, dtype=np.int64)
        self.image_is_flag = self.gallery_is_flag = np.zeros(count, bool)

    def take(self, rows: np.ndarray) -> Batch:
        return self._data.held_out_scenes(self.name, np.asarray(rows, np.int64), self._data.seed)

    def gallery(self, batch_size: int) -> Iterator[CaptionBatch]:
        for start in range(0, self.caption_count, min(batch_size, _AT_ONCE)):
            rows = np.arange(start, min(start + min(batch_size, _AT_ONCE), self.caption_count))
            batch = self.take(rows)
            group = torch.from_numpy(self.gallery_group_id[rows])
            yield CaptionBatch(batch.token_ids, batch.token_mask, batch.maskable, group, batch.index)


class ScenePairs(EmojiPairs):
    """Two to four drawings of different captions on one canvas; some named things are not drawn, some drawn not named.

    A scene is a pure function of the seed and its index: of the epoch, too, where ``data.scenes.count`` is 0, so that
    no composition comes twice; else there are ``count`` of them, and epochs differ in augmentation alone. Training
    scenes have no drawing of a held-out caption or designer; each evaluation split is composed of its own drawings.

    ``data.scenes.fraction`` mixes single drawings into the training, which are easier to learn names from: it is the
    share of training samples that are scenes, 0 (the default) meaning all. What is held out are always scenes.
    """

    splits: dict[str, SceneSplit]  # type: ignore[assignment]

    def __init__(self, recipe: Recipe, tokenizer: CaptionTokenizer | None = None) -> None:
        scenes = recipe.data.scenes
        super().__init__(recipe, tokenizer)
        if scenes.count:
            self.train_size = scenes.count
            every = np.arange(scenes.count, dtype=np.int64)
            self.train_group_id = self._plan(every, Draws(self.seed, _COMPOSITION, every), 0)[2]
        else:  # a scene is a group of its own in every epoch, a single drawing its caption's
            self.train_group_id = self.art.caption[self.train]
        self.splits = {
            name: SceneSplit(name, f"scenes, {split.title}", self, scenes.held_out)
            for name, split in self.splits.items()
        }

    def train_batch(self, indices: np.ndarray, epoch: int, truth: bool = False) -> Batch:
        indices = np.array(indices, np.int64)
        draws = composition = Draws(self.seed, epoch, indices)
        if self.section.scenes.count:
            composition = Draws(self.seed, _COMPOSITION, indices)
        anchors, scene, group = self._plan(indices, composition, 0 if self.section.scenes.count else epoch)
        return self._compose(
            anchors, self.train, scene, draws, group, self.section.augment, truth, composition=composition
        )

    def _plan(self, indices: np.ndarray, composition: Draws, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of some samples, (B,) each: the drawing that each begins with, whether it is a scene, and its group."""
        section = self.section.scenes
        anchors = self.train[indices % len(self.train)]
        if section.count:
            anchors = self.train[(composition.uniform("anchor", 1)[:, 0] * len(self.train)).astype(np.int64)]
        scene = composition.uniform("scene", 1)[:, 0] < (section.fraction or 1.0)
        fresh = len(self.art.captions) + epoch * self.train_size + indices
        return anchors, scene, np.where(scene, fresh, self.art.caption[anchors])

    def name_of(self, index: int) -> str:
        if self.section.scenes.count:
            return f"scene {index}"
        return f"scene {index}, with {super().name_of(index)}"

    def describe(self) -> dict[str, object]:
        count = self.section.scenes.count
        facts = super().describe()
        known = len(set(self.art.caption[self.train].tolist()))
        return facts | {
            "source": "scenes of emoji: 8 styles of 7 designers, one caption per emoji",
            "training drawings": len(self.train),
            "training captions": known,
            "training scenes": f"{count:,}" if count else "others in every epoch",
            "training samples that are scenes": self.section.scenes.fraction or 1.0,
        }
