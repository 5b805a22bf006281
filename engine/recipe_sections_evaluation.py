"""The parts of a recipe that say how captions are generated and measured."""

from __future__ import annotations

from pydantic import Field, model_validator

from .recipe_section import Section


class CaptioningSection(Section):
    """Captions of held-out images, of models that can write them (``model.captioner``)."""

    samples: int = Field(256, ge=0, description="images of each split that are captioned; 0 = none")
    beams: int = Field(3, ge=1, description="beginnings that a search keeps; 1 = greedy")
    length_penalty: float = Field(
        1.0, ge=0.0, description="a beam's log-probability is divided by its length to this power, at the end"
    )
    top_p: float | None = Field(
        None, gt=0.0, le=1.0, description="draw each token from the fewest that have this probability together, instead"
    )
    temperature: float = Field(1.0, gt=0.0, description="of top_p")
    min_tokens: int = Field(2, ge=1, description="the shortest caption, [SEP] included")
    max_tokens: int | None = Field(None, ge=1, description="the longest, [SEP] included; default: the model's longest")
    batch_size: int = Field(64, ge=1, description="images that are captioned at once")
    shown: int = Field(12, ge=0, description="captioned images of each split in the report")

    @model_validator(mode="after")
    def _ordered(self) -> CaptioningSection:
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens ({self.min_tokens}) is more than max_tokens ({self.max_tokens})")
        if self.top_p is None and self.temperature != 1.0:
            raise ValueError(
                f"temperature ({self.temperature:g}) is of top_p, which is not set; set it, or leave it out"
            )
        return self
