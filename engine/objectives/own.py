"""Objectives from outside: what they read, and how their terms join those of crossmask's own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..data.batch import Batch
from ..masking import Draws
from ..models import Encoded
from ..recipe import ObjectivesSection
from ..registry import objectives
from .views import TeacherView, Terms


@dataclass(frozen=True)
class ObjectiveView:
    """What an objective reads: intact pairs as the student sees them, with gradients, and as the teacher does, without.

    B pairs are this rank's; :func:`~crossmask.engine.teacher.all_gather_with_grad` brings those of the others.
    """

    model: nn.Module  # the student's, inside its forward
    batch: Batch
    image: Encoded  # ``feature`` (B, E) float32 of length 1, and ``tokens`` where the model gives them
    text: Encoded
    temperature: Tensor  # scalar, of ITC, within its bounds
    teacher: TeacherView | None  # ``image_feature``, ``text_feature``; of crossmask's own models the masks, too
    draws: Draws  # random numbers of seed, step and sample: a resumed run draws the same
    step: int
    progress: float  # share of the run, 0..1


def reads_teacher(section: ObjectivesSection) -> bool:
    """Whether an own objective that is on wants the teacher to look."""
    return any(
        own.weight > 0 and objectives.find(name, f"objectives.own.{name}").reads_teacher
        for name, own in section.own.items()
    )


def own_terms(section: ObjectivesSection, view: ObjectiveView) -> tuple[Terms, dict[str, float]]:
    """Every term of the recipe's own objectives that are on, and the weights of those that are losses."""
    terms: Terms = {}
    weights: dict[str, float] = {}
    for name, own in section.own.items():
        if own.weight == 0:
            continue
        where = f"objectives.own.{name}"
        options = objectives.options(name, own.options, f"{where}.options")
        found = named(name, objectives.find(name, where).made(view, options))
        if taken := found.keys() & {*terms, *objectives.built_in, "temperature"}:  # it would take their place
            raise ValueError(f"objective {name!r} returned {min(taken)!r}, which is the name of another term")
        terms |= found
        weights[name] = own.weight
    return terms, weights


def named(name: str, found: Any) -> Terms:
    """What an objective returned, as terms. ValueError where it is neither a scalar nor has one under its name."""
    terms: Mapping[str, Tensor] = {name: found} if isinstance(found, Tensor) else found
    scalars = isinstance(terms, Mapping) and all(isinstance(x, Tensor) and x.numel() == 1 for x in terms.values())
    if not scalars or name not in terms:
        raise ValueError(f"objective {name!r} has to return one scalar tensor, or named ones with {name!r} among them")
    return {key: term.reshape(()) for key, term in terms.items()}
