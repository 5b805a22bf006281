"""What a recipe says of fine-tuning for category and sub-category recognition."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from .recipe_section import Section

if TYPE_CHECKING:
    from .recipe import Recipe


class RecognitionSection(Section):
    """Cross-entropy of a linear classifier on image and text fused."""

    weight: float = Field(0.0, ge=0.0)
    column: Literal["category", "subcategory"] = Field("category", description="which of the data's columns")


def check_recognition(recipe: Recipe) -> None:
    """Raises ValueError where images of one class each, a fusion encoder and the objective do not go together."""
    if recipe.objectives.recognition.weight == 0:
        return
    if recipe.model.captioner is not None:
        raise ValueError(
            "objectives.recognition needs a fusion encoder, which a captioner has none of: set"
            " objectives.recognition.weight to 0, or leave model.captioner out"
        )
    source = recipe.data.source
    if source not in ("emoji", "pairs"):
        raise ValueError(
            f"objectives.recognition needs pairs of an image and its text that are of one class, and data.source:"
            f" {source} has none; set data.source to emoji or pairs"
        )
    if recipe.data.scenes.fraction > 0:
        raise ValueError(
            "objectives.recognition: a scene shows several things and has no one class; set data.scenes.fraction to 0"
        )
