"""The recipe's section on grouped batches, and what it must agree with."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field, model_validator

from .recipe_section import Section

if TYPE_CHECKING:
    from .recipe import Recipe


class GroupingSection(Section):
    """Batches of pairs that resemble each other, from the second epoch on (GRIT-VLP; the s-th: SyncMask)."""

    search_space: int = Field(
        0, ge=0, le=16384, description="samples that are ordered together (M, published: 1920), 8 M² bytes; 0 = none"
    )
    similar: int = Field(3, ge=1, description="each sample is followed by the s-th most similar one that is left")
    apart: int = Field(1, ge=1, description="samples before it whose groups come last; 1: of its neighbour alone")
    lead: float = Field(0.05, ge=0.0, le=0.9, description="share of an epoch that is left when the next is ordered")

    @model_validator(mode="after")
    def _something_to_choose(self) -> GroupingSection:
        if 0 < self.search_space <= self.similar:
            raise ValueError(f"similar ({self.similar}) is not below search_space ({self.search_space})")
        return self


def check_grouping(recipe: Recipe) -> None:
    """ValueError where batches would hold several groups each."""
    space, batch = recipe.data.grouping.search_space, recipe.training.batch_size
    if 0 < space < batch:
        raise ValueError(
            f"data.grouping.search_space ({space}) is smaller than training.batch_size ({batch}): batches are cut from"
            " what is ordered together; set it to 0 or to several batches"
        )
