"""What every data source offers the training loop and the evaluation."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor

from .batch import Batch
from .classes import TrainingClasses
from .normalisation import HALF, Normalisation
from .tokenizer import CaptionTokenizer

ALL = "all"  # the split with every pair of a source that has no splits


@dataclass(frozen=True)
class CaptionBatch:
    """Captions without images, for a retrieval gallery. C captions, L tokens."""

    token_ids: Tensor  # (C, L) int64
    token_mask: Tensor  # (C, L) bool
    maskable: Tensor  # (C, L) bool
    group_id: Tensor  # (C,) int64
    index: Tensor  # (C,) int64, position in the gallery

    def __len__(self) -> int:
        return len(self.token_ids)

    def to(self, device: torch.device | str) -> CaptionBatch:
        return CaptionBatch(**{f.name: getattr(self, f.name).to(device, non_blocking=True) for f in fields(self)})


class EvaluationSplit(ABC):
    """Held-out images and the distinct captions they are ranked against. Ids, flags and batches share one order."""

    title: str
    kind: str = "drawing"  # what its images are: one thing each, or composed scenes
    image_group_id: np.ndarray  # (N,) int64
    gallery_group_id: np.ndarray  # (C,) int64
    image_is_flag: np.ndarray  # (N,) bool; all False where a source has no flags
    gallery_is_flag: np.ndarray  # (C,) bool
    image_category: np.ndarray | None = None  # (N,) int64, equal numbers are alike, -1 = unknown; None: no categories
    gallery_category: np.ndarray | None = None  # (C,) int64, likewise
    labels: Mapping[str, np.ndarray] = MappingProxyType({})  # level -> (N,) text, each image's class; "" = unknown
    names: np.ndarray | None = None  # (N,) text, what each image shows; None where captions are all that is known

    @property
    def image_count(self) -> int:
        return len(self.image_group_id)

    @property
    def caption_count(self) -> int:
        return len(self.gallery_group_id)

    def describe(self) -> str:
        return f"{self.title}: {self.image_count} images, {self.caption_count} captions"

    @abstractmethod
    def take(self, rows: np.ndarray) -> Batch:
        """The images at some positions of the split, (N,) int64, without augmentation, each with one caption."""

    def images(self, batch_size: int) -> Iterator[Batch]:
        """Every image once, in order; ``index`` is the position in the split."""
        for start in range(0, self.image_count, batch_size):
            yield self.take(np.arange(start, min(start + batch_size, self.image_count)))

    @abstractmethod
    def gallery(self, batch_size: int) -> Iterator[CaptionBatch]:
        """Every caption once."""

    def texts(self, tokenizer: CaptionTokenizer) -> list[str]:
        """The gallery's captions, C, in words: as far as a model reads them, unless a source says more."""
        return [tokenizer.text(ids) for captions in self.gallery(1024) for ids in captions.token_ids]


@dataclass(frozen=True)
class Request:
    """What is asked in text-guided retrieval: images, and in words how another image differs. B requests, L tokens."""

    images: Tensor  # (B, 3, H, W) float32, normalised: the references
    token_ids: Tensor  # (B, L) int64
    token_mask: Tensor  # (B, L) bool


class ComposedSplit(ABC):
    """Held-out triplets of a reference, words and a target, and the gallery that targets are looked for in."""

    title: str
    target: np.ndarray  # (T,) int64, which image is asked for; equal numbers are one picture
    gallery: np.ndarray  # (G,) int64, likewise
    reference: np.ndarray  # (T,) int64, place in the gallery that a request leaves out, as it is its own; -1 = none
    averaged: bool = False  # whether the tables of its source have the mean of its sets

    @abstractmethod
    def requests(self, rows: np.ndarray) -> Request:
        """Triplets at some positions, (B,) int64, without augmentation."""

    @abstractmethod
    def candidates(self, rows: np.ndarray) -> Tensor:
        """Images of the gallery at some positions, (B,) int64 -> (B, 3, H, W)."""


class PairData(ABC):
    """Image-caption pairs: a training set, its evaluation splits and the tokenizer of their captions."""

    tokenizer: CaptionTokenizer
    max_tokens: int  # no batch is longer than this: the least size of a position table
    normalisation: Normalisation = HALF  # of its images
    train_size: int
    train_group_id: np.ndarray  # (train_size,) int64
    splits: Mapping[str, EvaluationSplit]
    composed: Mapping[str, ComposedSplit] = MappingProxyType({})  # text-guided retrieval, where a source has triplets
    classes: TrainingClasses | None = None  # of the training samples, where ``objectives.recognition`` is on

    @abstractmethod
    def train_batch(self, indices: np.ndarray, epoch: int, truth: bool = False) -> Batch:
        """Augmented samples. Each depends only on (seed, epoch, its index), whatever else is in the batch.

        ``indices`` (B,) int64 in ``range(train_size)``; ``truth`` adds ``things`` and ``words`` where they are known.
        """

    def scene_batch(self, split: str, count: int, seed: int) -> Batch | None:
        """``count`` composed scenes of held-out drawings with their truth, or None where a source has none."""
        return None

    def training_split(self) -> EvaluationSplit | None:
        """What is trained on as it is evaluated: each training image once, whole and unaugmented, with a caption. None
        where a source was opened for evaluation alone."""
        return None

    def train_labels(self) -> Mapping[str, np.ndarray]:
        """Level -> (train_size,) text, each training sample's class, "" = unknown; as ``EvaluationSplit.labels``."""
        return {}

    @abstractmethod
    def training_captions(self) -> list[str]:
        """The distinct captions that are trained on, in an order that every rank finds."""

    @abstractmethod
    def name_of(self, index: int) -> str:
        """Training sample ``index`` in words that its owner can look up."""

    def fingerprint(self) -> str:
        """Changes when the training samples, their order, their vocabulary or, where they are learned, their classes
        do: a resumed run must find the same."""
        digest = hashlib.sha256(self.tokenizer.to_json().encode())
        digest.update(np.ascontiguousarray(self.train_group_id, np.int64).tobytes())
        if self.classes is not None:
            digest.update(self.classes.digest().encode())
        return digest.hexdigest()

    def notices(self) -> list[str]:
        """Lines for the start of a run: what was left out of the data, and why."""
        return []

    @abstractmethod
    def describe(self) -> dict[str, object]:
        """Plain facts for a person: sizes, splits, vocabulary, licences."""
