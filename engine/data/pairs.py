"""A user's own pairs: a JSONL or CSV file with the columns image and caption, and a folder of images.

Optional columns: ``group`` (pairs that are true matches of one another; without it, pairs with the same caption) and
``category``. Everything cheap is checked when the file is read; images are decoded when they are needed.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import warnings
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ..beats import beat
from ..errors import DataError, RecipeError, nearest
from ..recipe import Recipe
from .base import IMAGE_MEAN, IMAGE_STD, CaptionBatch, EvaluationSplit, PairData
from .batch import Batch
from .captions import CaptionTable
from .randomness import uniform
from .tokenizer import FUNCTION_WORDS, CaptionTokenizer, split_words

MAX_PIXELS = 64 * 2**20  # a larger image is refused before it is decoded
MIN_CROP_AREA = 0.5  # captions name whole things; ALBEF's 0.2 would often cut them away
_SIDES = frozenset({"left", "right", "leftmost", "rightmost", "text", "letter", "letters", "sign", "clock", "logo"})
# An oversized image is an error of ours (MAX_PIXELS), so Pillow's warning would only be a second, less useful line.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


@dataclass(frozen=True)
class Pair:
    line: int  # in the file, from 1
    image: Path  # resolved
    caption: str
    group: str | None
    category: str | None


def read_pairs(path: Path | None, image_root: Path | None) -> list[Pair]:
    """Read and check the file. DataError names the line and what to do; image contents are not looked at."""
    if path is None:
        raise DataError("data.path is not set; set it to a .jsonl or .csv file with the columns image and caption")
    if path.suffix.lower() not in (".jsonl", ".csv"):
        raise DataError(f"{path}: data.path must end in .jsonl or .csv")
    if not path.is_file():
        raise DataError(
            f"{path}: no such file; set data.path to a .jsonl or .csv file with the columns image and caption"
        )
    root = (image_root or path.parent).resolve()
    if not root.is_dir():
        raise DataError(f"{root}: no such folder; set data.image_root to the folder the image paths are relative to")
    pairs: list[Pair] = []
    first_line: dict[tuple[Path, str], int] = {}
    try:
        for line, row in _rows(path):
            beat("reading the captions")
            pair = _pair(path, root, line, row)
            earlier = first_line.setdefault((pair.image, pair.caption), line)
            if earlier != line:
                raise DataError(f"{path} line {line}: the same image and caption as line {earlier}; remove one of them")
            pairs.append(pair)
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 at byte {error.start}; save the file as UTF-8") from None
    except csv.Error as error:
        raise DataError(f"{path}: not readable as CSV ({error}); check its quotes") from None
    if not pairs:
        raise DataError(f"{path}: no pairs in it; each line needs an image and a caption")
    return pairs


def _rows(path: Path) -> Iterator[tuple[int, dict[str, object]]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        if path.suffix.lower() == ".csv":
            reader = csv.DictReader(file)
            _columns(path, 1, list(reader.fieldnames or []))
            for row in reader:
                yield reader.line_num, {str(k): v for k, v in row.items()}
            return
        for line, text in enumerate(file, 1):
            if not text.strip():
                continue
            try:
                row = json.loads(text)
            except (ValueError, RecursionError) as error:
                reason = getattr(error, "msg", type(error).__name__)
                raise DataError(
                    f'{path} line {line}: not JSON ({reason}); expected {{"image": ..., "caption": ...}}'
                ) from None
            if not isinstance(row, dict):
                raise DataError(f'{path} line {line}: not a JSON object; expected {{"image": ..., "caption": ...}}')
            _columns(path, line, list(row))
            yield line, row


def _columns(path: Path, line: int, present: list[str]) -> None:
    for column in ("image", "caption"):
        if column not in present:
            near = nearest(column, [str(name) for name in present])
            remedy = f"rename '{near}' to '{column}'" if near else f"add it (found: {', '.join(present) or 'nothing'})"
            raise DataError(f"{path} line {line}: no column '{column}'; {remedy}")


def _pair(path: Path, root: Path, line: int, row: dict[str, object]) -> Pair:
    where = f"{path} line {line}"
    value: dict[str, str | None] = {}
    for column in ("image", "caption", "group", "category"):
        content = row.get(column)
        if isinstance(content, int) and not isinstance(content, bool) and column in ("group", "category"):
            content = str(content)
        if content is not None and not isinstance(content, str):
            raise DataError(f"{where}: '{column}' is {json.dumps(content)[:40]}; it must be text")
        value[column] = content.strip() or None if content else None
    name, caption = value["image"], value["caption"]
    if name is None:
        raise DataError(f"{where}: the image is empty; give its path relative to {root}")
    if caption is None:
        raise DataError(f"{where}: the caption is empty; write one or remove the line")
    try:
        image = (root / name).resolve()
        exists = image.is_file()
    except (OSError, ValueError, RuntimeError):  # a name with NUL, too long, or a loop of links
        raise DataError(f"{where}: {name[:80]!r} is not a usable file name; correct it or remove the line") from None
    if not image.is_relative_to(root):
        raise DataError(f"{where}: image {name} lies outside {root}; move it there or set data.image_root")
    if not exists:
        raise DataError(f"{where}: no image {image}; correct the path or set data.image_root (now {root})")
    return Pair(line, image, caption, value["group"], value["category"])


def held_out(pairs: list[Pair], keys: list[str], fraction: float) -> np.ndarray:
    """(N,) bool: which pairs are held out, decided by the CRC-32 of their key (the group, or else the caption).

    Pairs that share a key or an image stay on one side. Neither side is left empty by chance.
    """
    parent: dict[object, object] = {}

    def find(node: object) -> object:
        while parent.setdefault(node, node) != node:
            parent[node] = parent[parent[node]]
            node = parent[node]
        return node

    for pair, key in zip(pairs, keys, strict=True):
        parent[find(pair.image)] = find(key)
    lowest: dict[object, str] = {}
    roots = [find(key) for key in keys]
    for root, key in zip(roots, keys, strict=True):
        lowest[root] = min(key, lowest.get(root, key))
    chance = {root: zlib.crc32(key.encode()) / 2**32 for root, key in lowest.items()}
    out = np.array([chance[root] < fraction for root in roots])
    if fraction > 0 and len(chance) > 1 and (not out.any() or out.all()):
        extreme = (max if out.all() else min)(chance, key=lambda root: chance[root])
        out = np.array([(root == extreme) != out.all() for root in roots])
    return out


class FilePairs(PairData):
    """Whole images, resized to a square as ALBEF does; training crops, mirrors and changes the light."""

    def __init__(self, recipe: Recipe) -> None:
        section = recipe.data
        if section.scenes.fraction > 0:
            raise RecipeError("data.scenes.fraction is only for data.source: emoji; set it to 0")
        self.section, self.seed, self.size = section, recipe.seed, recipe.model.image.size
        self.pairs = read_pairs(section.path, section.image_root)
        words = [split_words(pair.caption) for pair in self.pairs]
        for pair, caption in zip(self.pairs, words, strict=True):
            if FUNCTION_WORDS.issuperset(caption[: section.max_words]):
                raise DataError(
                    f"{section.path}: the caption of line {pair.line} ({pair.caption[:40]!r}) has no word that can be"
                    " masked; write a longer one or remove the line"
                )
        keys = [f"group {p.group}" if p.group else " ".join(w) for p, w in zip(self.pairs, words, strict=True)]
        number = {key: i for i, key in enumerate(dict.fromkeys(keys))}
        self._group = np.array([number[key] for key in keys], np.int64)
        out = held_out(self.pairs, keys, section.validation_fraction)
        self.train = np.flatnonzero(~out)
        if not len(self.train):
            raise DataError(
                f"{section.path}: nothing is left to train on; add pairs or set data.validation_fraction to 0"
            )
        self.train_size, self.train_group_id = len(self.train), self._group[self.train]
        self._texts = sorted({" ".join(words[i]) for i in self.train.tolist()})
        self.tokenizer = CaptionTokenizer.train(self._texts, section.vocabulary_size)
        self.table = CaptionTable(self.tokenizer, words, [()] * len(words), section.max_words)
        self.max_tokens = self.table.max_tokens
        bare = self.train[self.table.maskable_words()[self.train] == 0]
        if len(bare):
            line, size = self.pairs[bare[0]].line, section.vocabulary_size
            raise DataError(
                f"{section.path}: caption of line {line} has no word that can be masked: its letters are not among"
                f" the {size} tokens of the vocabulary; raise data.vocabulary_size"
            )
        self._sided = np.array([not _SIDES.isdisjoint(w) for w in words])
        self._decoders: ThreadPoolExecutor | None = None
        self.splits = {"held-out": FileSplit("held-out captions", self, np.flatnonzero(out))} if out.any() else {}

    def train_batch(self, indices: np.ndarray, epoch: int, truth: bool = False) -> Batch:
        indices = np.asarray(indices, np.int64)
        luck = uniform(self.seed, epoch, indices, "crop", 7)
        batch = self.load(self.train[indices], indices, luck if self.section.augment else None)
        if self.section.word_drop > 0:
            phrases = self.table.whole(self.train[indices])
            draw = lambda n: uniform(self.seed, epoch, indices, "words", n)  # noqa: E731
            texts = self.table.assemble(phrases, len(indices), self.section.word_drop, draw)
            batch = Batch(batch.images, texts.token_ids, texts.token_mask, texts.maskable, batch.group_id, batch.index)
        return batch

    def training_captions(self) -> list[str]:
        return self._texts

    def name_of(self, index: int) -> str:
        assert self.section.path is not None
        return f"{self.section.path.name} line {self.pairs[self.train[index]].line}"

    def fingerprint(self) -> str:
        images = "\n".join(str(self.pairs[row].image) for row in self.train.tolist())
        return hashlib.sha256((super().fingerprint() + images).encode()).hexdigest()

    def describe(self) -> dict[str, object]:
        return {
            "source": f"pairs: {self.section.path}",
            "pairs": len(self.pairs),
            "images": len({pair.image for pair in self.pairs}),
            "groups": int(self._group.max()) + 1,
            "training pairs": self.train_size,
            "vocabulary": self.tokenizer.vocabulary_size,
            "splits": {name: split.describe() for name, split in self.splits.items()},
        }

    def load(self, rows: np.ndarray, index: np.ndarray, luck: np.ndarray | None) -> Batch:
        """Pairs ``rows`` of the file; ``luck`` (B, 7) in [0, 1) augments, None takes the whole image as it is."""
        if self._decoders is None:
            self._decoders = ThreadPoolExecutor(min(4, os.cpu_count() or 1), "decode")
        chances = [None] * len(rows) if luck is None else list(luck)
        pixels = torch.stack(list(self._decoders.map(self._picture, rows.tolist(), chances)))
        images = pixels.permute(0, 3, 1, 2).float().div_(255)
        if luck is not None:
            contrast, brightness = (
                torch.from_numpy(1 + self.section.augment * (0.4 * luck[:, i] - 0.2)).float()[:, None, None, None]
                for i in (5, 6)
            )
            images = (((images - 0.5) * contrast + 0.5) * brightness).clamp_(0, 1)
        texts = self.table.assemble(self.table.whole(rows), len(rows))
        return Batch(
            images=images.sub_(IMAGE_MEAN).div_(IMAGE_STD).contiguous(),
            token_ids=texts.token_ids,
            token_mask=texts.token_mask,
            maskable=texts.maskable,
            group_id=torch.from_numpy(self._group[rows]),
            index=torch.from_numpy(index.copy()),
        )

    def _picture(self, row: int, luck: np.ndarray | None) -> Tensor:
        """(S, S, 3) uint8."""
        pair, size = self.pairs[row], (self.size, self.size)
        where = f"{self.section.path} line {pair.line}"
        try:
            with Image.open(pair.image) as file:
                if file.width * file.height > MAX_PIXELS:
                    raise DataError(f"{where}: image {pair.image} has {file.width} x {file.height} pixels, more than"
                                    f" {MAX_PIXELS >> 20} million; make it smaller or remove the line")  # fmt: skip
                image: Image.Image = ImageOps.exif_transpose(file)
                image = on_white(image)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            reason = (
                "it is not an image" if isinstance(error, Image.UnidentifiedImageError) else str(error).split("\n")[0]
            )
            raise DataError(
                f"{where}: cannot read image {pair.image}: {reason}; replace it, or remove the line and start again"
            ) from None
        width, height, box = *image.size, None
        if luck is not None:
            strength = self.section.augment
            area = 1 - strength * (1 - MIN_CROP_AREA) * (1 - luck[0])
            aspect = (4 / 3) ** (strength * (2 * luck[1] - 1))
            w, h = width * min(1.0, (area * aspect) ** 0.5), height * min(1.0, (area / aspect) ** 0.5)
            x, y = luck[2] * (width - w), luck[3] * (height - h)
            box = (x, y, x + w, y + h)
        image = image.resize(size, Image.Resampling.BICUBIC, box=box, reducing_gap=3.0)
        if luck is not None and luck[4] < 0.5 and self.section.mirror and not self._sided[row]:
            image = ImageOps.mirror(image)
        return torch.from_numpy(np.array(image))


def on_white(image: Image.Image) -> Image.Image:
    """RGB, transparency on white; 16-bit greys are scaled, not clipped."""
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


class FileSplit(EvaluationSplit):
    """Held-out pairs; the gallery is their distinct captions."""

    def __init__(self, title: str, data: FilePairs, rows: np.ndarray) -> None:
        self.title, self._data, self.rows = title, data, rows
        distinct = {(data._group[row], data.pairs[row].caption.lower()): row for row in rows.tolist()[::-1]}
        self._captions = np.array(sorted(distinct.values()), np.int64)
        self.image_group_id, self.gallery_group_id = data._group[rows], data._group[self._captions]
        self.image_is_flag = np.zeros(len(rows), bool)
        self.gallery_is_flag = np.zeros(len(self._captions), bool)

    def take(self, rows: np.ndarray) -> Batch:
        return self._data.load(self.rows[rows], np.asarray(rows, np.int64), None)

    def gallery(self, batch_size: int) -> Iterator[CaptionBatch]:
        table = self._data.table
        for start in range(0, len(self._captions), batch_size):
            rows = self._captions[start : start + batch_size]
            texts = table.assemble(table.whole(rows), len(rows))
            group, index = torch.from_numpy(self._data._group[rows]), torch.arange(start, start + len(rows))
            yield CaptionBatch(texts.token_ids, texts.token_mask, texts.maskable, group, index)
