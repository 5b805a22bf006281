"""A user's own pairs of images and captions: what is trained on and what is evaluated.

Everything cheap is checked when the pairs are read; images are decoded when they are needed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping

import numpy as np
import torch
from PIL import Image

from ..beats import beat
from ..errors import DataError, RecipeError
from ..recipe import DataSection, Recipe
from . import fashion_gen
from .base import ALL, CaptionBatch, EvaluationSplit, PairData
from .batch import Batch
from .captions import CaptionTable, token_limit
from .decoders import Decoders
from .normalisation import NORMALISATIONS
from .pair_files import SPLITS, UNDECIDED, PairTable, read_pairs
from .pair_groups import held_out, true_matches
from .pair_pictures import read_pair_picture
from .pictures import Chances, augmented, lights, square
from .randomness import Draws
from .tokenizer import FUNCTION_WORDS, CaptionTokenizer, split_words

TRAIN, VAL, TEST = SPLITS["train"], SPLITS["val"], SPLITS["test"]
VALIDATION, HELD_OUT, UNUSED, WHOLE = 3, 4, 5, 6  # further parts of the pairs
_SIDES = frozenset({"left", "right", "leftmost", "rightmost", "text", "letter", "letters", "sign", "clock", "logo"})
UNKNOWN_SHARE = 0.2  # of the captions' words: from there on the vocabulary is named; bert-base-uncased's misses few
_BEAT_EVERY = 4096  # captions
_BENCHMARKS = {"karpathy": "Karpathy's", fashion_gen.LAYOUT: "FashionGen's"}  # whose val split it is


class FilePairs(PairData):
    """Each image with each of its captions is a pair; images are squeezed to a square, as ALBEF does.

    What matches what: :func:`true_matches`. Evaluated is the first that there is of ``data.validation_path``, the val
    and test splits of Karpathy's layout, and the share ``data.validation_fraction`` of the groups. With the tokenizer
    of a trained model nothing is trained on: training pairs are not read, nor are their images needed, and in place of
    that share all of ``data.path`` is evaluated.
    """

    def __init__(self, recipe: Recipe, tokenizer: CaptionTokenizer | None = None, training: bool | None = None) -> None:
        """``tokenizer``: of a trained model; the pairs are then only evaluated on, but with ``training`` split and read
        as for a run."""
        training = tokenizer is None if training is None else training
        section, limit = recipe.data, token_limit(recipe)
        _check(section)
        self.section, self.seed, self.size = section, recipe.seed, recipe.model.image.size
        self.normalisation = NORMALISATIONS[section.normalisation]
        given = tokenizer
        if given is None and section.vocabulary is not None:
            given = CaptionTokenizer.from_vocabulary(section.vocabulary)
        self.pairs, part, notices = _read(section) if training else _read_evaluated(section)
        texts = _words(self.pairs, given)
        self._group, names = true_matches(self.pairs, texts)
        undecided = np.flatnonzero(part == UNDECIDED)
        out = held_out(self._group[undecided], [names[row] for row in undecided.tolist()], section.validation_fraction)
        decided = bool(np.isin(part, (VAL, TEST, VALIDATION)).any())
        part[undecided] = np.where(out & (not decided), HELD_OUT, TRAIN)
        own = np.array([source.editable for source in self.pairs.sources])[self.pairs.source]
        if tokenizer is None:
            self._refuse_wordless(np.flatnonzero(own & np.isin(part, (TRAIN, HELD_OUT))), texts, given)
        train = np.flatnonzero(part == TRAIN)

        self._texts = sorted({texts[row] for row in train.tolist()})
        self.tokenizer = given or CaptionTokenizer.train(self._texts, section.vocabulary_size)
        words = (text.split(" ") if text else [] for text in texts)
        self.table = CaptionTable(self.tokenizer, words, None, section.max_words, limit)
        self.max_tokens = self.table.max_tokens
        self._sided = np.array([not _SIDES.isdisjoint(text.split(" ")) for text in texts])
        left_out: list[str] = []
        if tokenizer is None:
            meant = train
            train, left_out = self._with_words(meant, own)
            if not len(train):
                raise self._nothing_left(len(meant), decided)
            left_out += self._unknown(meant)
        self.train = train
        self.train_size, self.train_group_id = len(self.train), self._group[self.train]
        self._category = _numbered(self.pairs.categories)
        levels = {"category": self.pairs.categories, "subcategory": self.pairs.subcategories}
        self._labels = {k: np.array([x or "" for x in names], object) for k, names in levels.items() if any(names)}
        self._decoders = Decoders(section.workers)
        self.splits = splits = {
            name: FileSplit(title, self, np.flatnonzero(part == number))
            for number, name, title in (
                (VALIDATION, "validation", str(section.validation_path)),
                (VAL, "val", f"{_BENCHMARKS.get(self.pairs.sources[-1].layout, '')} val split".strip()),
                (TEST, "test", f"{_BENCHMARKS.get(self.pairs.sources[-1].layout, '')} test split".strip()),
                (HELD_OUT, "held-out", "held-out captions"),
                (WHOLE, ALL, f"all {len(self.pairs):,} pairs of {section.path}"),
            )
            if (part == number).any()
        }
        overlap = self._overlap(splits) if tokenizer is None else []
        self._notices = [*self.pairs.notices, *notices, *left_out, *overlap]

    def _refuse_wordless(self, rows: np.ndarray, texts: list[str], given: CaptionTokenizer | None) -> None:
        words = FUNCTION_WORDS if given is None else given.function_words
        count = self.section.max_words
        for row in rows.tolist():
            if not texts[row] or (words and words.issuperset(texts[row].split(" ", count)[:count])):
                raise self._wordless(row, "; write a longer one or remove it")

    def _wordless(self, row: int, remedy: str) -> DataError:
        caption = f"{self.pairs.where(row)}: the caption {self.pairs.captions[row][:40]!r}"
        return DataError(f"{caption} has no word that can be masked{remedy}")

    def _with_words(self, train: np.ndarray, own: np.ndarray) -> tuple[np.ndarray, list[str]]:
        """The rows of ``train`` whose caption has a word that can be masked. Without one, a line of a user's ``own``
        (N,) is an error; a benchmark's, which nobody would edit, is left out with a notice."""
        bare = train[self.table.maskable_words()[train] == 0]
        for row in bare[own[bare]][:1].tolist():
            size, given = self.tokenizer.vocabulary_size, self.section.vocabulary
            of, remedy = "the vocabulary", "raise data.vocabulary_size"
            if given is not None:
                of, remedy = str(given), "set data.vocabulary to one that knows its words"
            raise self._wordless(row, f" with the {size} tokens of {of}, or not before it is cut; {remedy} or raise"
                                 " data.max_tokens")  # fmt: skip
        if not len(bare):
            return train, []
        first = self.pairs.where(int(bare[0]))
        line = f"pairs left out of the training, without a word that can be masked: {len(bare)}, the first {first}"
        return np.setdiff1d(train, bare), [line]

    def _nothing_left(self, found: int, decided: bool) -> DataError:
        """``found`` pairs were to be trained on; ``decided``: by the file, not by a share that is held out."""
        path, given = self.section.path, self.section.vocabulary
        problem, remedy = "nothing is left to train on", "add pairs or set data.validation_fraction to 0"
        if found and given is not None:
            remedy = "set data.vocabulary to a vocab.txt of their language"
            problem = f"{given} knows no word of its {found:,} training captions"
        elif found:
            problem = f"none of its {found:,} training captions has a word that can be masked"
            remedy = "raise data.vocabulary_size or data.max_tokens"
        elif decided and self.pairs.sources[0].layout == "karpathy":
            problem += ", all of its images are in the splits val and test"
            remedy = "give a file with images in the split train or restval"
        return DataError(f"{path}: {problem}; {remedy}")

    def _unknown(self, train: np.ndarray) -> list[str]:
        """A given vocabulary that fits the captions badly is most likely another one than was meant."""
        share = self.table.unknown_share(train)
        if self.section.vocabulary is None or share < UNKNOWN_SHARE:
            return []
        line = f"{100 * share:.0f} % of the words of the training captions are unknown to {self.section.vocabulary}"
        return [f"{line}: is data.vocabulary of their language?"]

    def _overlap(self, splits: Mapping[str, FileSplit]) -> list[str]:
        trained = np.zeros(len(self.pairs.images), bool)
        trained[self.pairs.image[self.train]] = True
        lines = []
        for name, split in splits.items():
            if count := int(trained[split.images_of].sum()):
                share = f"{count} of the {split.image_count} images of split {name}"
                lines.append(f"{share} are trained on, too: their recalls do not speak of new images")
        return lines

    def train_batch(self, indices: np.ndarray, epoch: int, truth: bool = False) -> Batch:
        indices = np.asarray(indices, np.int64)
        draws = Draws(self.seed, epoch, indices)
        chances = Chances(draws, self.section) if self.section.augment else None
        batch = self.load(self.train[indices], indices, chances)
        if self.section.word_drop > 0:
            phrases = self.table.whole(self.train[indices])
            draw = lambda n: draws.uniform("words", n)  # noqa: E731
            texts = self.table.assemble(phrases, len(indices), self.section.word_drop, draw)
            batch = Batch(batch.images, texts.token_ids, texts.token_mask, texts.maskable, batch.group_id, batch.index)
        return batch

    def training_split(self) -> FileSplit | None:
        return FileSplit("training pairs", self, self.train) if len(self.train) else None

    def train_labels(self) -> dict[str, np.ndarray]:
        return {level: names[self.train] for level, names in self._labels.items()}

    def training_captions(self) -> list[str]:
        return self._texts

    def name_of(self, index: int) -> str:
        return self.pairs.where(int(self.train[index]), short=True)

    def fingerprint(self) -> str:
        images = "\n".join(self.pairs.names[image] for image in self.pairs.image[self.train].tolist())
        return hashlib.sha256((super().fingerprint() + images).encode()).hexdigest()

    def notices(self) -> list[str]:
        return self._notices

    def describe(self) -> dict[str, object]:
        return {
            "source": "pairs: " + ", ".join(str(source.path) for source in self.pairs.sources),
            "pairs": len(self.pairs),
            "images": len(self.pairs.images),
            "groups": int(self._group.max()) + 1,
            "training pairs": self.train_size,
            "captions cut": int(self.table.is_cut.sum()),
            "vocabulary": self.tokenizer.vocabulary_size,
            "splits": {name: split.describe() for name, split in self.splits.items()},
            "notices": self._notices,
        }

    def load(self, rows: np.ndarray, index: np.ndarray, chances: Chances | None) -> Batch:
        """Pairs ``rows`` of the table; ``chances`` augments them, None takes the whole images as they are."""
        light = None if chances is None else lights(self.section, chances)
        read = lambda at: self._picture(int(rows[at]), at, chances)  # noqa: E731
        images = self._decoders.images(read, len(rows), self.size, self.normalisation, light)
        texts = self.table.assemble(self.table.whole(rows), len(rows))
        return Batch(
            images=images,
            token_ids=texts.token_ids,
            token_mask=texts.token_mask,
            maskable=texts.maskable,
            group_id=torch.from_numpy(self._group[rows]),
            index=torch.from_numpy(index.copy()),
        )

    def _picture(self, row: int, at: int, chances: Chances | None) -> Image.Image:
        """The image of pair ``row``, S pixels a side, augmented by the chances of sample ``at``."""
        source = self.pairs.sources[self.pairs.source[row]]
        image = read_pair_picture(source, self.pairs.images[self.pairs.image[row]], self.pairs.where(row))
        if chances is None:
            return square(image, self.size)
        return augmented(image, self.size, self.section, chances, at, may_mirror=not self._sided[row])


def _check(section: DataSection) -> None:
    if section.scenes.fraction > 0:
        raise RecipeError("data.scenes.fraction is only for data.source: emoji; set it to 0")
    if section.rand_augment.operations and not section.augment:
        raise RecipeError(
            f"data.rand_augment.operations is {section.rand_augment.operations}, but data.augment: 0 leaves images as"
            " they are; set one of them to 0 and the other not"
        )


def _read(section: DataSection) -> tuple[PairTable, np.ndarray, list[str]]:
    """The pairs of all files, (N,) which part each belongs to, and what the user should know."""
    pairs = read_pairs(section.path, section.image_root)
    notices: list[str] = []
    part = pairs.split.copy()
    if section.validation_path is None:
        return pairs, part, notices
    field = "data.validation_path"
    other = read_pairs(section.validation_path, section.image_root, field)
    more = np.where(other.split == UNDECIDED, VALIDATION, other.split)
    if (more == TRAIN).all():
        raise DataError(f"{section.validation_path}: neither val nor test images in it; give another {field}")
    for whole, mine, unused, path in ((pairs, part, (VAL, TEST), section.path), (other, more, (TRAIN,), field)):
        left = np.isin(mine, unused)
        if left.any():
            images = len(np.unique(whole.image[left]))
            notices.append(f"not used, with {field}: {images} {'/'.join(_names(mine[left]))} images of {path}")
        mine[left] = UNUSED
    return pairs.joined(other), np.concatenate([part, more.astype(np.int8)]), notices


def _read_evaluated(section: DataSection) -> tuple[PairTable, np.ndarray, list[str]]:
    """As :func:`_read`, but only what a trained model is evaluated on."""
    path, rest, field = section.path, WHOLE, "data.path"
    if section.validation_path is not None:
        path, rest, field = section.validation_path, VALIDATION, "data.validation_path"
    pairs = read_pairs(path, section.image_root, field, training=False)
    return pairs, np.where(pairs.split == UNDECIDED, rest, pairs.split).astype(np.int8), []


def _names(parts: np.ndarray) -> list[str]:
    return [name for name, number in SPLITS.items() if number in parts]


def _words(pairs: PairTable, tokenizer: CaptionTokenizer | None) -> list[str]:
    """Every caption's words with a space between; equal ones are one string."""
    split = split_words if tokenizer is None else tokenizer.split
    known: dict[str, str] = {}
    texts = []
    for row, caption in enumerate(pairs.captions):
        if row % _BEAT_EVERY == 0:
            beat("splitting the captions into words")
        words = " ".join(split(caption))
        texts.append(known.setdefault(words, words))
    return texts


def _numbered(categories: list[str | None]) -> np.ndarray | None:
    """(N,) int64 from 0, -1 for None; None where there is no category at all."""
    number = {name: i for i, name in enumerate(dict.fromkeys(name for name in categories if name is not None))}
    if not number:
        return None
    return np.array([-1 if name is None else number[name] for name in categories], np.int64)


class FileSplit(EvaluationSplit):
    """Every image of some rows once, and their captions: all in a benchmark's layout, else the distinct of each group.

    A query's right answers are those of its group: in a benchmark's layout the captions that were written for the
    image, even where another image has one in the same words.
    """

    def __init__(self, title: str, data: FilePairs, rows: np.ndarray) -> None:
        pairs, group = data.pairs, data._group
        images, first = np.unique(pairs.image[rows], return_index=True)
        order = first.argsort()
        self.title, self._data = title, data
        self.images_of, self.rows = images[order], rows[first[order]]  # (N,) of the table, the pair each is first in
        kept: dict[tuple[int, str], int] = {}
        for row in rows.tolist():
            own = str(row) if pairs.sources[pairs.source[row]].by_image else f" {pairs.captions[row].lower()}"
            kept.setdefault((int(group[row]), own), row)
        self.caption_rows = np.array(sorted(kept.values()), np.int64)
        self.image_group_id, self.gallery_group_id = group[self.rows], group[self.caption_rows]
        self.image_is_flag = np.zeros(len(self.rows), bool)
        self.gallery_is_flag = np.zeros(len(self.caption_rows), bool)
        if data._category is not None:
            self.image_category, self.gallery_category = data._category[self.rows], data._category[self.caption_rows]
        self.labels = {level: names[self.rows] for level, names in data._labels.items()}

    def take(self, rows: np.ndarray) -> Batch:
        return self._data.load(self.rows[rows], np.asarray(rows, np.int64), None)

    def gallery(self, batch_size: int) -> Iterator[CaptionBatch]:
        table = self._data.table
        for start in range(0, len(self.caption_rows), batch_size):
            rows = self.caption_rows[start : start + batch_size]
            texts = table.assemble(table.whole(rows), len(rows))
            group, index = torch.from_numpy(self._data._group[rows]), torch.arange(start, start + len(rows))
            yield CaptionBatch(texts.token_ids, texts.token_mask, texts.maskable, group, index)

    def texts(self, tokenizer: CaptionTokenizer) -> list[str]:
        """Whole, however long, as published captioning scores want it."""
        return [" ".join(tokenizer.split(self._data.pairs.captions[row])) for row in self.caption_rows.tolist()]
