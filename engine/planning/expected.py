"""The plan's bytes in the terms of :mod:`.measured`: what a rank holds between steps and gives to collectives."""

from __future__ import annotations

from typing import Any

from ..recipe import Recipe
from ..recipe_files import check_world
from .assumed import Assumed
from .trace import PRECISIONS, trace
from .zero import Layout, Zero, held, lasting_buffers, on_top, recipe_stage, wire


def queue_bytes(recipe: Recipe) -> int:
    """Image and text features in fp32, ids, and where the next row goes."""
    return recipe.objectives.itc.queue_length * (2 * 4 * recipe.model.projection_width + 8) + 8


def expected(recipe: Recipe, assumed: Assumed, ranks: int) -> dict[str, Any]:
    """Of the recipe at its own stage. Collective kinds as ``KIND OPERATION``; of the most that a step holds beyond what
    is held between steps only what does not come of activations, which a CPU has others of than a GPU."""
    element = PRECISIONS[recipe.training.precision].itemsize
    k = recipe.training.accumulation_steps
    seen = trace(recipe, assumed, check_world(recipe, ranks), ranks)
    zero = Zero.of(recipe, ranks, recipe_stage(recipe))
    layout = Layout.of(zero, seen.parameters, ranks)
    state = held(layout, seen, element)
    sent: dict[str, int] = {}
    for one in wire(layout, seen, element, k, follows=recipe.model.captioner is not None):
        name = f"{one.kind} {one.operation}"
        sent[name] = sent.get(name, 0) + one.count
    return {
        "held": {
            "student": state["weights"] + state["masters"] + lasting_buffers(layout, element),
            "moments": state["moments"],
            "teacher": state["teacher's average"] + state["teacher's weights"],
            "queue": queue_bytes(recipe),
        },
        "sent": sent,
        "most": {moment: sum(parts.values()) for moment, parts in on_top(layout, element, k > 1).items()},
    }
