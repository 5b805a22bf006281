"""The embedded emoji as triplets: a drawing, words that say how another drawing differs, and that drawing.

Two kinds. **Style**: the same emoji in another designer's hand ("in the style of noto"). **Variant**: by the same
designer the same emoji of another person ("as a woman"), for emoji whose names differ in one word for a person; skin
tones are not in the set. What is held out stays held out: no target and no reference of training is of a held-out
caption or by the held-out designer, whose style is never asked for.
"""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ..errors import RecipeError
from ..recipe import Recipe
from .base import ComposedSplit, Request
from .batch import Batch
from .captions import CaptionTable, token_limit
from .emoji import HELD_OUT_DESIGNER, Caption, EmojiArt
from .emoji_pairs import EmojiPairs
from .randomness import Draws
from .tokenizer import CaptionTokenizer

_REFERENCES = 1 << 39  # added to the epoch: a reference is placed and coloured by random numbers of its own
_PERSON = re.compile(r"\b(man|woman|person|men|women|people|boy|girl|child)\b")
_MANY = ("men", "women", "people")


@dataclass(frozen=True)
class Triplets:
    """T triplets; drawings are rows of the art, ``text`` of the wordings."""

    reference: np.ndarray  # (T,) int64
    text: np.ndarray  # (T,) int64
    target: np.ndarray  # (T,) int64
    style: np.ndarray  # (T,) bool: another hand, else another person

    def __len__(self) -> int:
        return len(self.target)

    def where(self, chosen: np.ndarray) -> Triplets:
        return Triplets(*(values[chosen] for values in vars(self).values()))


def wording(style: str) -> str:
    """How a designer's hand is asked for."""
    return f"in the style of {'flat fluent' if style == 'fluentflat' else style}"


def variants(captions: list[Caption]) -> list[tuple[int, int, str]]:
    """(reference, target, words) for each two captions whose names differ in the one word for a person."""
    families: dict[str, dict[str, int]] = defaultdict(dict)
    for number, caption in enumerate(captions):
        people = _PERSON.findall(caption.name)
        if len(people) == 1:
            families[_PERSON.sub("*", caption.name)].setdefault(people[0], number)
    return [
        (reference, target, f"as {person}" if person in _MANY else f"as a {person}")
        for family in families.values()
        for person, target in family.items()
        for reference in family.values()
        if reference != target
    ]


def all_triplets(art: EmojiArt) -> tuple[Triplets, list[str]]:
    """Every triplet of the art in a fixed order, and the wordings."""
    texts = [wording(style) for style in art.styles]
    place = {text: number for number, text in enumerate(texts)}
    by_caption: dict[int, dict[int, int]] = defaultdict(dict)  # caption -> style -> drawing
    for drawing, (caption, style) in enumerate(zip(art.caption.tolist(), art.style.tolist(), strict=True)):
        by_caption[caption].setdefault(style, drawing)
    found = [
        (reference, style, target, True)
        for drawings in by_caption.values()
        for style, target in drawings.items()
        for reference in drawings.values()
        if reference != target
    ]
    for one, other, text in variants(art.captions):
        number = place.setdefault(text, len(place))
        for style, reference in by_caption[one].items():
            if style in by_caption[other]:
                found.append((reference, number, by_caption[other][style], False))
    reference, text, target, style = np.array(found, np.int64).T
    return Triplets(reference, text, target, style.astype(bool)), list(place)


def pictures(rgba: Tensor) -> np.ndarray:
    """(N, 4, R, R) uint8 -> (N,) int64 from 0, equal for drawings that are the same pixel by pixel."""
    number: dict[bytes, int] = {}
    digests = (hashlib.blake2b(drawing.numpy().tobytes(), digest_size=16).digest() for drawing in rgba)
    return np.array([number.setdefault(digest, len(number)) for digest in digests], np.int64)


class EmojiTriplets(ComposedSplit):
    """Triplets whose targets are looked for among ``drawings``. A request leaves its own reference out."""

    def __init__(self, title: str, data: ComposedEmoji, triplets: Triplets, drawings: np.ndarray) -> None:
        self.title, self._data, self.triplets, self.drawings = title, data, triplets, drawings
        self.target, self.gallery = data.picture[triplets.target], data.picture[drawings]
        place = {drawing: number for number, drawing in enumerate(drawings.tolist())}
        self.reference = np.array([place.get(drawing, -1) for drawing in triplets.reference.tolist()], np.int64)

    def requests(self, rows: np.ndarray) -> Request:
        texts = self._data.wordings.assemble(self._data.wordings.whole(self.triplets.text[rows]), len(rows))
        images = self._data.plain_batch(self.triplets.reference[rows], np.asarray(rows, np.int64)).images
        return Request(images, texts.token_ids, texts.token_mask)

    def candidates(self, rows: np.ndarray) -> Tensor:
        return self._data.plain_batch(self.drawings[rows], np.asarray(rows, np.int64)).images


class ComposedEmoji(EmojiPairs):
    """Trained on are triplets: a batch has the targets as ``images``, their references as ``reference`` and the words;
    group = picture of the target. The splits for retrieval are those of :class:`EmojiPairs`."""

    def __init__(self, recipe: Recipe, tokenizer: CaptionTokenizer | None = None) -> None:
        if recipe.data.scenes.fraction > 0:
            raise RecipeError("data.scenes.fraction is only for data.source: emoji; set it to 0")
        super().__init__(recipe, tokenizer)
        art = self.art
        found, texts = all_triplets(art)
        self.picture = pictures(art.rgba)
        split = self.tokenizer.split
        self.wordings = CaptionTable(
            self.tokenizer, [split(text) for text in texts], None, recipe.data.max_words, token_limit(recipe)
        )
        self.texts = texts
        foreign = art.style == art.styles.index(HELD_OUT_DESIGNER)
        held = np.array([caption.held_out for caption in art.captions])[art.caption]
        trained = np.zeros(len(art.caption), bool)
        trained[self.train] = True
        self.triplets = found.where(trained[found.reference] & trained[found.target])
        self.train_size, self.train_group_id = len(self.triplets), self.picture[self.triplets.target]
        new, by_foreign = held[found.target], foreign[found.reference]
        to_foreign, known = foreign[found.target], ~held[found.target] & ~held[found.reference]
        drawings = {name: split.drawings for name, split in self.splits.items()}
        style, variant = found.style & ~to_foreign & new, ~found.style
        self.composed = {
            name: EmojiTriplets(title, self, found.where(chosen), drawings[gallery])
            for name, title, chosen, gallery in (
                ("style-b", "held-out captions in another's style", style & ~by_foreign, "b"),
                ("style-c", "the same, from the held-out designer's drawing", style & by_foreign, "b"),
                ("variant-a", "another person, known captions by the held-out designer",
                 variant & to_foreign & known, "a"),
                ("variant-b", "another person, held-out captions", variant & ~to_foreign & new, "b"),
                ("variant-c", "another person, held-out captions by the held-out designer",
                 variant & to_foreign & new, "c"),
            )
        }  # fmt: skip

    def train_batch(self, indices: np.ndarray, epoch: int, truth: bool = False) -> Batch:
        indices = np.array(indices, np.int64)
        chosen = self.triplets.where(indices)
        texts = self.wordings.assemble(self.wordings.whole(chosen.text), len(indices))
        targets = self._drawn(chosen.target, Draws(self.seed, epoch, indices), truth)
        references = self._drawn(chosen.reference, Draws(self.seed, epoch + _REFERENCES, indices), False)
        return replace(
            targets,
            reference=references.images,
            token_ids=texts.token_ids,
            token_mask=texts.token_mask,
            maskable=texts.maskable,
            group_id=torch.from_numpy(self.picture[chosen.target]),
            words=None,
        )

    def _drawn(self, drawings: np.ndarray, draws: Draws, truth: bool) -> Batch:
        alone, group = np.zeros(len(drawings), bool), self.picture[drawings]
        return self._compose(drawings, drawings, alone, draws, group, self.section.augment, truth)

    def name_of(self, index: int) -> str:
        triplet = self.triplets.where(np.array([index]))
        row = int(triplet.reference[0])
        drawing = f"{self.art.captions[self.art.caption[row]].name} by {self.art.styles[self.art.style[row]]}"
        return f"{drawing} {self.texts[int(triplet.text[0])]}"

    def describe(self) -> dict[str, object]:
        return {
            **super().describe(),
            "training triplets": self.train_size,
            "wordings": len(self.texts),
            "text-guided": {
                name: f"{split.title}: {len(split.target)} triplets, {len(split.gallery)} candidates"
                for name, split in self.composed.items()
            },
        }
