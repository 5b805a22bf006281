"""The parts of a recipe that only contrastive captioners have: CoCa's model and SyCoCa's objectives."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from .recipe_section import Section

if TYPE_CHECKING:
    from .recipe import Recipe


class PoolerSection(Section):
    """Learned queries that read an image's patches and stand for them from there on."""

    kind: Literal["single", "parallel", "cascade"] = Field(
        "single",
        description="single: the first query is the feature for ITC and the others are what the text decoder reads, as"
        " in open_clip; parallel, cascade: a further query is the feature, which reads the patches, or the other"
        " queries",
    )
    queries: int = Field(256, ge=2)
    heads: int = Field(8, ge=1)


class CaptionerSection(Section):
    """A contrastive captioner (CoCa, Yu et al. 2022) in place of the fusion encoder: a causal text tower, a text
    decoder that reads the image and, for text-guided image modelling, an image decoder that reads the text (SyCoCa, Ma
    et al. 2024). Both decoders are layers of self-attention and, behind each, of cross-attention."""

    depth: int = Field(12, ge=1, description="layers of each kind in the text decoder")
    image_depth: int | None = Field(None, ge=1, description="the same of the image decoder; default: depth")
    heads: int = Field(12, ge=1, description="of both decoders")
    mlp_ratio: float = Field(4.0, gt=0)
    dropout: float = Field(0.0, ge=0.0, lt=1.0, description="of each part's output and of the attention weights")
    qk_norm: bool = Field(False, description="cosine cross-attention with a learned scale: selective early")
    pooler: PoolerSection | None = Field(
        None, description="between image tower and text decoder; none: the decoder reads the patches"
    )
    norm_pre: bool = Field(
        True, description="layer norm before the image tower's first block and no bias in its patches, as in CLIP"
    )
    quick_gelu: bool = Field(False, description="x sigmoid(1.702 x) in place of GELU, as in OpenAI's CLIP")
    cls_mask: Literal["words", "shifted"] = Field(
        "words",
        description="what the text's [CLS] sees: its words and itself, or as open_clip's weights were trained, where"
        " the mask is one place off: the first padding too, and itself only where there is none",
    )
    initial_std: float | None = Field(
        None, gt=0.0, description="deviation of the first weights; none: CLIP's, which differ by width and depth"
    )


class CaptionSection(Section):
    """Image captioning: each next word from the words before it and the image without its low patches."""

    weight: float = Field(2.0, ge=0.0)
    low_patches: Literal["encode", "drop", "keep"] = Field(
        "encode",
        description="the low patches are hidden from the image tower, in a pass of its own, or dropped from what the"
        " text decoder reads of the intact pass, or read like the others, as in CoCa",
    )


class TgMimSection(Section):
    """Text-guided masked image modelling: the pixels of the high patches from the others and the words."""

    weight: float = Field(1.0, ge=0.0)
    text: bool = Field(True, description="false: the image decoder reads no words, which is masked image modelling")


def check_captioner(recipe: Recipe) -> None:
    """What of a recipe does not go together with a captioner, or with its absence: a ValueError of one line."""
    model, o, masking = recipe.model, recipe.objectives, recipe.masking
    captioner = model.captioner
    if captioner is None:
        for name in ("caption", "tg_mim"):
            if getattr(o, name).weight > 0:
                raise ValueError(
                    f"objectives.{name} needs a captioner: add model.captioner, or set objectives.{name}.weight to 0"
                )
        return
    for name in ("itm", "mlm", "mim"):
        if getattr(o, name).weight > 0:
            raise ValueError(
                f"objectives.{name} needs a fusion encoder, which a captioner has none of: set objectives.{name}.weight"
                " to 0, or leave model.captioner out"
            )
    unused = {  # what only the fusion family reads, and the value that says so
        "objectives.itc.queue_length": (o.itc.queue_length, 0, "a captioner contrasts within the batch"),
        "objectives.itc.distillation": (o.itc.distillation, 0, "a captioner's teacher gives no labels"),
        "objectives.itc.patch_drop": (o.itc.patch_drop, 0, "a captioner's intact pass has all patches"),
        "masking.heads.kind": (masking.heads.kind, "none", "a captioner has no fusion encoder"),
        "masking.links.kind": (masking.links.kind, "none", "a captioner's words are causal"),
        "masking.hidden_words": (masking.hidden_words, "token", "a captioner hides no words"),
        "model.text.weights": (model.text.weights, None, "a captioner's text tower is no BERT"),
    }
    for field, (value, wanted, why) in unused.items():
        if value != wanted:
            raise ValueError(f"{field} ({value}): {why}; set it to {'null' if wanted is None else wanted}")
    widths = [("model.text.width", model.text.width, "model.captioner.heads", captioner.heads)]
    if o.tg_mim.weight > 0:  # of the image decoder
        widths.append(("model.image.width", model.image.width, "model.captioner.heads", captioner.heads))
    if captioner.pooler is not None:
        heads = captioner.pooler.heads
        widths.append(("model.projection_width", model.projection_width, "model.captioner.pooler.heads", heads))
    for field, width, by, heads in widths:
        if width % heads:
            raise ValueError(f"{field} ({width}) is not a multiple of {by} ({heads})")
