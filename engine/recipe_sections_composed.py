"""What a recipe says of triplets: a reference image, words, and the image that they ask for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from .recipe_section import Section

if TYPE_CHECKING:
    from .recipe import Recipe

TRIPLET_SOURCES = ("composed_emoji", "fashioniq")


class ComposedSection(Section):
    """Contrast of image and words fused with the image that they ask for."""

    weight: float = Field(0.0, ge=0.0)


def check_composed(recipe: Recipe) -> None:
    """Raises ValueError where triplets and objectives do not fit."""
    objectives, source = recipe.objectives, recipe.data.source
    if source not in TRIPLET_SOURCES:
        if objectives.composed.weight > 0:
            raise ValueError(f"objectives.composed needs triplets: set data.source to {' or '.join(TRIPLET_SOURCES)}")
        return
    if recipe.model.captioner is not None:
        raise ValueError(f"data.source: {source} needs a fusion encoder, and model.captioner has none; leave it out")
    names = [name for name, section in objectives if hasattr(section, "weight")]
    on = [f"objectives.{name}.weight" for name in names if getattr(objectives, name).weight > 0 and name != "composed"]
    if on:
        raise ValueError(f"the words of data.source: {source} do not describe their image; set {', '.join(on)} to 0")
