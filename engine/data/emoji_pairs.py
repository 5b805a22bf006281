"""The embedded emoji as a training set with three held-out splits, and composed scenes with known truth."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch

from ..errors import DataError, RecipeError
from ..recipe import Recipe
from .base import CaptionBatch, EvaluationSplit, PairData
from .batch import Batch
from .canvas import Placements, paint
from .captions import CaptionTable, merge, token_limit
from .emoji import HELD_OUT_DESIGNER, load_art
from .normalisation import NORMALISATIONS
from .randomness import Draws
from .scenes import plan_scenes, scene_phrases
from .tokenizer import CaptionTokenizer, open_tokenizer

_EVALUATION = 1 << 40  # in place of an epoch: evaluation never shares random numbers with training


class EmojiSplit(EvaluationSplit):
    """One of the held-out splits; ``drawings`` are rows of the art, ``captions`` rows of its captions."""

    def __init__(self, title: str, data: EmojiPairs, drawings: np.ndarray, captions: np.ndarray) -> None:
        self.title, self._data, self.drawings = title, data, drawings
        self.image_group_id, self.gallery_group_id = data.art.caption[drawings], captions
        flags = np.array([c.is_flag for c in data.art.captions])
        self.image_is_flag, self.gallery_is_flag = flags[self.image_group_id], flags[captions]
        kinds = {kind: i for i, kind in enumerate(dict.fromkeys(c.subgroup for c in data.art.captions))}
        category = np.array([kinds[c.subgroup] for c in data.art.captions], np.int64)
        self.image_category, self.gallery_category = category[self.image_group_id], category[captions]
        self.names = np.array([c.name for c in data.art.captions], object)[self.image_group_id]
        self.labels = data.labels_of(drawings)

    def take(self, rows: np.ndarray) -> Batch:
        return self._data.plain_batch(self.drawings[rows], np.asarray(rows, np.int64))

    def gallery(self, batch_size: int) -> Iterator[CaptionBatch]:
        table = self._data.table
        for start in range(0, len(self.gallery_group_id), batch_size):
            ids = self.gallery_group_id[start : start + batch_size]
            texts = table.assemble(table.whole(ids), len(ids))
            index = torch.arange(start, start + len(ids))
            yield CaptionBatch(texts.token_ids, texts.token_mask, texts.maskable, torch.from_numpy(ids.copy()), index)


class EmojiPairs(PairData):
    """Group = caption. A training scene is a group of its own, in every epoch a new one."""

    splits: dict[str, EmojiSplit]

    def __init__(self, recipe: Recipe, tokenizer: CaptionTokenizer | None = None) -> None:
        section = recipe.data
        token_limit(recipe)
        if section.rand_augment.operations:
            raise RecipeError("data.rand_augment is only for data.source: pairs; set data.rand_augment.operations to 0")
        self.section, self.seed, self.size = section, recipe.seed, recipe.model.image.size
        self.normalisation = NORMALISATIONS[section.normalisation]
        self.art = load_art(self.size)
        captions, art = self.art.captions, self.art
        held = np.array([c.held_out for c in captions])
        foreign = art.style == art.styles.index(HELD_OUT_DESIGNER)
        unseen = held[art.caption]
        self.train = np.flatnonzero(~foreign & ~unseen)
        self.train_size, self.train_group_id = len(self.train), art.caption[self.train]
        self._may_mirror = np.array([c.may_mirror for c in captions])
        self._names_colour = np.array([c.names_colour for c in captions])

        self.tokenizer = tokenizer or open_tokenizer(section, self.training_captions())
        split = self.tokenizer.split
        names, tags = [split(c.name) for c in captions], [split(" ".join(c.tags)) for c in captions]
        self.table = CaptionTable(self.tokenizer, names, tags, section.max_words, token_limit(recipe))
        self.max_tokens = self.table.max_tokens
        known, new = np.flatnonzero(~held), np.flatnonzero(held)
        self.splits = {
            "a": EmojiSplit("known captions, held-out designer", self, np.flatnonzero(foreign & ~unseen), known),
            "b": EmojiSplit("held-out captions, known designers", self, np.flatnonzero(~foreign & unseen), new),
            "c": EmojiSplit("held-out captions, held-out designer", self, np.flatnonzero(foreign & unseen), new),
        }
        self.pools = {name: split.drawings for name, split in self.splits.items()}

    def train_batch(self, indices: np.ndarray, epoch: int, truth: bool = False) -> Batch:
        indices = np.array(indices, np.int64)
        draws = Draws(self.seed, epoch, indices)
        scene = draws.uniform("scene", 1)[:, 0] < self.section.scenes.fraction
        fresh = len(self.art.captions) + epoch * self.train_size + indices
        group = np.where(scene, fresh, self.train_group_id[indices])
        return self._compose(self.train[indices], self.train, scene, draws, group, self.section.augment, truth)

    def training_split(self) -> EmojiSplit:
        return EmojiSplit("training drawings", self, self.train, np.unique(self.art.caption[self.train]))

    def train_labels(self) -> dict[str, np.ndarray]:
        return self.labels_of(self.train) if self.section.source == "emoji" else {}  # other samples are no drawings

    def labels_of(self, drawings: np.ndarray) -> dict[str, np.ndarray]:
        """Group and subgroup of some rows of the art, (N,) text each."""
        captions = [self.art.captions[row] for row in self.art.caption[drawings].tolist()]
        return {
            "category": np.array([caption.group for caption in captions], object),
            "subcategory": np.array([caption.subgroup for caption in captions], object),
        }

    def training_captions(self) -> list[str]:
        captions = [self.art.captions[i] for i in np.unique(self.art.caption[self.train]).tolist()]
        return [" ".join((caption.name, *caption.tags)) for caption in captions]

    def name_of(self, index: int) -> str:
        row = self.train[index]
        return f"{self.art.captions[self.art.caption[row]].name} by {self.art.styles[self.art.style[row]]}"

    def scene_batch(self, split: str, count: int, seed: int) -> Batch:
        """Scenes of one split's drawings only, upright and uncoloured on white; ``index`` counts from 0."""
        if split not in self.splits:
            raise DataError(f"no split '{split}'; use one of {', '.join(self.splits)}")
        return self.held_out_scenes(split, np.arange(count, dtype=np.int64), seed)

    def held_out_scenes(self, split: str, rows: np.ndarray, seed: int) -> Batch:
        """Those of a split's scenes with the numbers ``rows`` (B,) int64, of which there is no end."""
        pool, draws = self.pools[split], Draws(seed, _EVALUATION, rows)
        anchors = pool[(draws.uniform("anchor", 1)[:, 0] * len(pool)).astype(np.int64)]
        group = len(self.art.captions) + draws.indices
        return self._compose(anchors, pool, np.ones(len(rows), bool), draws, group, augment=0.0, truth=True)

    def plain_batch(self, drawings: np.ndarray, index: np.ndarray) -> Batch:
        """Single drawings on white, centred, 0.9 of the canvas, with their whole caption."""
        draws, single = Draws(self.seed, _EVALUATION, index), np.zeros(len(drawings), bool)
        group = self.art.caption[drawings]
        return self._compose(drawings, drawings, single, draws, group, augment=0.0, truth=True)

    def describe(self) -> dict[str, object]:
        return {
            "source": "emoji: 8 styles of 7 designers, one caption per emoji",
            "drawings": len(self.art.caption),
            "captions": len(self.art.captions),
            "training drawings": self.train_size,
            "training captions": len(set(self.train_group_id.tolist())),
            "captions cut": int(self.table.is_cut.sum()),
            "vocabulary": self.tokenizer.vocabulary_size,
            "splits": {name: split.describe() for name, split in self.splits.items()},
            "licences": "Apache-2.0, MIT, CC-BY-4.0, Unicode-3.0; see engine/data/emoji_set/LICENSES.md",
        }

    def _compose(
        self, anchors: np.ndarray, pool: np.ndarray, scene: np.ndarray, draws: Draws, group: np.ndarray,
        augment: float, truth: bool, composition: Draws | None = None,
    ) -> Batch:  # fmt: skip
        """One sample for each anchor (B,): a scene with others from ``pool`` where ``scene`` (B,) says so, or alone.

        ``augment`` scales how far placement, rotation and colour stray from the plain drawing, 0 = not at all.
        ``composition``: what is in a scene and where, in place of ``draws``.
        """
        count, caption, section = len(anchors), self.art.caption, self.section
        alone, together = np.flatnonzero(~scene), np.flatnonzero(scene)
        sample, slot, drawing = alone, np.zeros_like(alone), anchors[alone]
        luck = draws.take(alone).uniform("place", 3)
        scale = 0.9 + augment * (0.35 * luck[:, 0] - 0.2)
        if section.scenes.single_side is not None and draws.epoch != _EVALUATION:
            scale = 0.95 + (min(section.scenes.single_side, 0.95) - 0.95) * luck[:, 0]
        room = np.abs(1 - scale)[:, None] / 2 + 0.03 * augment  # a little over the edge
        centre = 0.5 + (2 * luck[:, 1:] - 1) * room * min(1.0, 2 * augment)
        phrases = self.table.whole(caption[drawing])
        phrases = replace(phrases, sample=alone)
        if len(together):
            chosen = (composition or draws).take(together)
            plan = plan_scenes(anchors[together], pool, caption, self.art.style, section.scenes, chosen)
            phrases = merge(phrases, scene_phrases(plan, together, caption, self.table, chosen))
            row, column = np.nonzero(plan.drawn[:, : section.scenes.max_things])
            sample, slot = np.concatenate([sample, together[row]]), np.concatenate([slot, column])
            drawing = np.concatenate([drawing, plan.drawing[row, column]])
            centre = np.concatenate([centre, plan.centre[row, column]])
            scale = np.concatenate([scale, plan.scale[row, column]])

        places = Placements.plain(sample, slot, drawing, centre, scale)
        paper = np.ones((count, 3))
        if augment:  # at full strength half of the canvases stay white, the others get a light tint
            places = self._vary(places, draws, augment)
            luck = draws.uniform("paper", 4)
            paper = np.where(luck[:, :1] > 0.5 * augment, 1.0, 0.82 + 0.18 * luck[:, 1:])
        images, things = paint(self.art.rgba, places, self.size, torch.from_numpy(paper.astype(np.float32)), truth)
        drop = 0.0 if draws.epoch == _EVALUATION else section.word_drop
        texts = self.table.assemble(phrases, count, drop, lambda n: draws.uniform("words", n))
        return Batch(
            images=self.normalisation.apply_(images),
            token_ids=texts.token_ids,
            token_mask=texts.token_mask,
            maskable=texts.maskable,
            group_id=torch.from_numpy(group),
            index=torch.from_numpy(draws.indices),
            things=things,
            words=texts.words if truth else None,
            kind=torch.from_numpy(scene),
        )

    def _vary(self, places: Placements, draws: Draws, strength: float) -> Placements:
        """Small rotations, mirroring where the caption allows it, and colour changes that leave named colours true."""
        things, caption = self.section.scenes.max_things, self.art.caption[places.drawing]
        luck = draws.uniform("look", 8 * things).reshape(-1, things, 8)[places.sample, places.slot]
        fixed = self._names_colour[caption]
        tint = np.where(fixed[:, None], 1.0, 1 + strength * (0.3 * luck[:, 3:6] - 0.15))
        return replace(
            places,
            angle=strength * math.radians(12) * (2 * luck[:, 0] - 1),
            mirror=(luck[:, 1] < 0.5) & self._may_mirror[caption] & self.section.mirror,
            gain=(1 + strength * (0.4 * luck[:, 2:3] - 0.2)) * tint,
            saturation=np.where(
                fixed, 1.0, np.where(luck[:, 6] < 0.12 * strength, 0.0, 1 + strength * (0.7 * luck[:, 7] - 0.4))
            ),
        )
