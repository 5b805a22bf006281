"""The recipe's section on masks: which policy, how much it hides, and what the student reads in its place."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from .recipe_section import Section


class RatioSection(Section):
    """A mask ratio that changes: over the run (linear, cosine, step), or from sample to sample (uniform, gaussian)."""

    kind: Literal["linear", "cosine", "step", "uniform", "gaussian"]
    start: float = Field(ge=0.0, le=1.0, description="at the beginning; uniform: the lowest; gaussian: the mean")
    end: float = Field(ge=0.0, le=1.0, description="at the end; uniform: the highest; gaussian: the highest kept")
    until: float = Field(1.0, gt=0.0, le=1.0, description="share of the run at which end is reached; step: switched to")
    spread: float = Field(0.25, gt=0.0, description="gaussian: standard deviation")
    low: float = Field(0.0, ge=0.0, le=1.0, description="gaussian: the lowest kept")

    @model_validator(mode="after")
    def _ordered(self) -> RatioSection:
        low = self.start if self.kind == "uniform" else self.low
        if self.kind in ("uniform", "gaussian") and low >= self.end:
            name = "start" if self.kind == "uniform" else "low"
            raise ValueError(f"{name} ({low:g}) is not below end ({self.end:g}), the highest ratio")
        return self


Ratio = Annotated[float, Field(ge=0.0, le=1.0)]


class CorruptionSection(Section):
    """What the student reads in place of a masked word; the rest of the words is kept (BERT: 80 / 10 / 10)."""

    mask: float = Field(0.8, ge=0.0, le=1.0, description="share that becomes [MASK]")
    random: float = Field(0.1, ge=0.0, le=1.0, description="share that becomes a random word")
    rate: Ratio | RatioSection | None = Field(
        None, description="share of words that is corrupted, where it is not the share that is predicted (text_ratio)"
    )

    @model_validator(mode="after")
    def _at_most_all(self) -> CorruptionSection:
        if self.mask + self.random > 1.0 + 1e-9:
            raise ValueError(f"mask ({self.mask:g}) and random ({self.random:g}) are more than 1 together")
        return self


class HeadsSection(Section):
    """Attention heads of the student's fusion encoder that are switched off for a step (HeadMask)."""

    kind: Literal["none", "random", "importance"] = "none"
    count: int = Field(1, ge=1, description="heads of every layer that are off")


class LinksSection(Section):
    """Which words may look at which in the student's masked pass."""

    kind: Literal["none", "token_level", "sequence_to_sequence", "segment"] = "none"
    rate: float = Field(0.1, ge=0.0, le=1.0, description="token_level: share of words whose links are cut")
    share: float = Field(0.75, ge=0.0, le=1.0, description="sequence_to_sequence: share of samples, the rest sees all")
    segment_words: int = Field(4, ge=1, description="segment: words of a segment")


class MaskingSection(Section):
    policy: str = Field("syncmask", description="see docs/policies.md")
    options: dict[str, Any] = Field({}, description="of the policy")
    text_policy: str | None = Field(None, description="chooses the words, where it is another policy than policy")
    text_options: dict[str, Any] = Field({}, description="of text_policy")
    image_ratio: Ratio | RatioSection = 0.5
    text_ratio: Ratio | RatioSection = 0.15
    image_threshold: float | None = Field(None, ge=0.0, le=1.0)
    text_threshold: float | None = Field(None, ge=0.0, le=1.0)
    layer: int = Field(-1, description="fusion layer of the teacher whose cross-attention is read")
    prior: Path | Literal["contrast", "centre"] | None = Field(
        None, description="weights of patches: a .npy file of shape (patches,) or (training samples, patches)"
    )
    corruption: CorruptionSection = CorruptionSection()
    hidden_patches: Literal["token", "drop"] = Field(
        "token", description="masked patches become a mask token, or are left out of the encoder (MAE)"
    )
    drop_after: int = Field(0, ge=0, description="drop: blocks of the image tower that still see all patches")
    hidden_words: Literal["token", "later"] = Field(
        "token", description="later: masked words skip the text tower and join as [MASK] in the fusion encoder"
    )
    heads: HeadsSection = HeadsSection()
    links: LinksSection = LinksSection()

    @model_validator(mode="after")
    def _text_options_have_an_owner(self) -> MaskingSection:
        if self.text_options and self.text_policy is None:
            raise ValueError("text_options are given but no text_policy to read them; set text_policy")
        return self
