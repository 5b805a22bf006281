"""What a recipe says of parts from outside the package, and what they must agree with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pydantic import Field

from .recipe_section import Section

if TYPE_CHECKING:
    from .recipe import Recipe

# Objectives of crossmask's own models. A model from outside has none of their heads.
_OF_OURS = ("itm", "mlm", "mim", "caption", "tg_mim", "composed", "recognition")


class OwnObjective(Section):
    """An objective that a plugin registered."""

    weight: float = Field(1.0, ge=0.0)
    options: dict[str, Any] = Field({}, description="of the objective")


def without_our_objectives(values: Any) -> Any:
    """A recipe's values as they are given; with an own system, weights of what it cannot have are 0 unless given."""
    model = values.get("model") if isinstance(values, Mapping) else None
    if not isinstance(model, Mapping) or model.get("system") is None:
        return values
    given = values.get("objectives") or {}
    if not isinstance(given, Mapping):
        return values
    absent = {
        name: {**(given.get(name) or {}), "weight": (given.get(name) or {}).get("weight", 0.0)}
        for name in _OF_OURS
        if isinstance(given.get(name) or {}, Mapping)
    }
    return {**values, "objectives": {**given, **absent}}


def check_own(recipe: Recipe) -> None:
    """ValueError, one line, where a system from outside is asked for what only crossmask's own models have."""
    model, objectives = recipe.model, recipe.objectives
    if model.system is None:
        if model.options:
            raise ValueError("model.options are given but no model.system to read them; set model.system")
        return
    for name in _OF_OURS:
        if getattr(objectives, name).weight > 0:
            raise ValueError(
                f"objectives.{name} needs crossmask's own model, and model.system is {model.system}: set"
                f" objectives.{name}.weight to 0, or register an objective of yours"
            )
    unused = {  # and the value that says so
        "model.captioner": (model.captioner, "null"),
        "model.image.weights": (model.image.weights, "null"),
        "model.text.weights": (model.text.weights, "null"),
        "masking.heads.kind": (recipe.masking.heads.kind != "none", "none"),
        "objectives.itc.patch_drop": (objectives.itc.patch_drop, "0"),
        "evaluation.recognition": (recipe.evaluation.recognition, "false"),
    }
    for field, (used, value) in unused.items():
        if used:
            raise ValueError(
                f"{field} is of crossmask's own model, and model.system is {model.system}; set it to {value}"
            )
