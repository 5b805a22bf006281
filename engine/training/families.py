"""What every family of models that a run can train offers: student, teacher and a micro-step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ..data import PairData
from ..data.batch import Batch
from ..objectives import RunMasks, Terms
from ..recipe import Recipe
from ..teacher import FeatureQueue, Teacher
from .clock import Clock
from .step import Schedule


def check_kinds(recipe: Any, data: Any) -> None:
    """TypeError, with what would do, where a pretrainer was given something else."""
    if not isinstance(recipe, Recipe):
        raise TypeError(f"Pretrainer takes a Recipe, not a {type(recipe).__name__}; load_recipe(NAME) gives one")
    if data is not None and not hasattr(data, "train_batch"):
        raise TypeError(f"data: a {type(data).__name__} is no PairData; PairList(recipe, PAIRS) makes one")


@dataclass(frozen=True)
class MicroStep:
    """What a system's forward gives: the loss to run backwards, and what is left to do behind it."""

    loss: Tensor
    terms: Terms  # detached
    image_feature: Tensor  # (B, E), detached: of this rank's pairs
    text_feature: Tensor  # (B, E)
    enqueue: tuple[Tensor, Tensor, Tensor] | None = None  # every rank's features and groups, for the queue
    measures: Terms = field(default_factory=dict)  # terms that are no losses
    keep: Any = None  # what has to live until the backward


class Family(ABC):
    """One family of models. Everything it draws or decides depends on the recipe, the step and the batch alone."""

    def __init__(self, recipe: Recipe, data: PairData, masks: RunMasks) -> None:
        self.recipe, self.masks = recipe, masks
        tokenizer = data.tokenizer
        self.sizes = (tokenizer.vocabulary_size, data.max_tokens)
        self.specials = {"pad_id": tokenizer.pad_id, "mask_id": tokenizer.mask_id}
        self.classes = None if data.classes is None else data.classes.classes

    @abstractmethod
    def build_student(self) -> nn.Module:
        """Fresh, by the global random generator."""

    @abstractmethod
    def build_teacher(self) -> nn.Module:
        """Of the student's part ``model``, with other weights."""

    @abstractmethod
    def forward(
        self,
        engine: Any,
        teacher: Teacher,
        queue: FeatureQueue,
        batch: Batch,
        schedule: Schedule,
        heads: Tensor | None,
        clock: Clock,
    ) -> MicroStep:
        """One micro-batch of this rank through teacher and student. Collective."""
