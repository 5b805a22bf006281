"""One typed description of a run.

A recipe is a YAML file; every field has a default, an unknown field is an error that names its nearest neighbour,
and any field can be overridden on the command line by its dotted path (``training.max_steps=20``).
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from .recipe_section import Section as Section
from .recipe_sections_captioner import CaptionerSection, CaptionSection, TgMimSection, check_captioner
from .recipe_sections_composed import ComposedSection, check_composed
from .recipe_sections_evaluation import CaptioningSection
from .recipe_sections_grouping import GroupingSection, check_grouping
from .recipe_sections_masking import CorruptionSection as CorruptionSection
from .recipe_sections_masking import HeadsSection as HeadsSection
from .recipe_sections_masking import LinksSection as LinksSection
from .recipe_sections_masking import MaskingSection
from .recipe_sections_masking import Ratio as Ratio
from .recipe_sections_masking import RatioSection as RatioSection
from .recipe_sections_own import OwnObjective, check_own, without_our_objectives
from .recipe_sections_recognition import RecognitionSection, check_recognition
from .registry import SOURCES

Beta = Annotated[float, Field(ge=0.0, lt=1.0)]


class SceneSection(Section):
    """Composed scenes: several drawings on one canvas; some named things not drawn, some drawn things not named."""

    fraction: float = Field(0.0, ge=0.0, le=1.0, description="share of training samples that are scenes")
    min_things: int = Field(2, ge=1, le=8)
    max_things: int = Field(4, ge=1, le=8)
    unnamed: float = Field(0.15, ge=0.0, le=1.0, description="chance that a drawn thing is not named")
    undrawn: float = Field(0.15, ge=0.0, le=1.0, description="chance that a further thing is named but not drawn")
    undrawn_things: int = Field(1, ge=1, le=8, description="how many such things there may be, each with that chance")
    single_side: float | None = Field(
        None,
        gt=0.0,
        le=1.0,
        description="smallest side of a training drawing that is alone, as a share of the canvas, up to 0.95; default"
        " about 0.9 for all; drawings in scenes have 0.3 to 0.6",
    )
    count: int = Field(0, ge=0, description="source scenes: compositions to train on; 0 = new ones in every epoch")
    held_out: int = Field(512, ge=2, description="source scenes: scenes of each evaluation split")

    @model_validator(mode="after")
    def _ordered(self) -> SceneSection:
        if self.min_things > self.max_things:
            raise ValueError(f"min_things ({self.min_things}) is larger than max_things ({self.max_things})")
        return self


class RandAugmentSection(Section):
    """Randomly chosen changes of an image, one after the other (RandAugment, Cubuk et al. 2020); ALBEF takes 2 of 7."""

    operations: int = Field(0, ge=0, le=10, description="changes of each image; 0 = none")
    magnitude: float = Field(7.0, ge=0.0, le=10.0)


class DataSection(Section):
    source: str = Field(
        "emoji",
        description="emoji, pairs, scenes, composed_emoji, fashioniq, or the name of one that a plugin registers",
    )
    options: dict[str, Any] = Field({}, description="of a source that a plugin registers")
    path: Path | None = Field(
        None,
        description="pairs: a .jsonl or .csv file with the columns image and caption, a .json file in Karpathy's or"
        " ALBEF's layout, a folder of images with a .txt caption beside each, webdataset's .tar shards (one, a folder"
        " of them, or a pattern such as shards-{000..011}.tar), or a folder that a Hugging Face data set was saved to",
    )
    validation_path: Path | None = Field(
        None, description="pairs: a file of the same kinds to evaluate on, instead of a share that is held out"
    )
    image_root: Path | None = Field(
        None, description="pairs: image paths are relative to it; default: the file's folder"
    )
    validation_fraction: float = Field(0.1, ge=0.0, lt=1.0, description="pairs: share of captions held out")
    scenes: SceneSection = SceneSection()
    grouping: GroupingSection = GroupingSection()
    augment: float = Field(
        1.0, ge=0.0, le=1.0, description="strength of placement, rotation and colour changes; 0 = none"
    )
    mirror: bool = Field(True, description="mirror drawings whose meaning survives it (no flags, letters, left/right)")
    crop_area: float = Field(0.5, gt=0.0, le=1.0, description="pairs: smallest share of an image that a crop keeps")
    rand_augment: RandAugmentSection = RandAugmentSection()
    normalisation: Literal["half", "clip"] = Field(
        "half", description="mean and deviation of pixels: 0.5 each, or the channels' that CLIP and ALBEF use"
    )
    word_drop: float = Field(0.0, ge=0.0, lt=1.0, description="chance that a caption word is left out while training")
    max_words: int = Field(30, ge=1, le=512)
    max_tokens: int | None = Field(
        None, ge=3, le=512, description="tokens of the longest caption, [CLS] and [SEP] included; longer ones are cut"
    )
    vocabulary_size: int = Field(4096, ge=64, description="of the WordPiece vocabulary that is trained on the captions")
    vocabulary: Path | None = Field(None, description="a vocab.txt to use instead, or CLIP's list of pairs (.txt.gz)")
    workers: int | None = Field(
        None,
        ge=1,
        le=512,
        description="threads of a rank that decode images; default: its share of the cores, up to 16",
    )
    prefetch: int | None = Field(
        None, ge=0, le=64, description="steps whose batches are made ahead; default: 2 beside a GPU, 0 on CPUs"
    )

    @model_validator(mode="after")
    def _pairs_need_a_file(self) -> DataSection:
        if self.options and self.source in SOURCES:
            raise ValueError(f"options are of a source that a plugin registers; source {self.source!r} has none")
        if self.source == "pairs" and self.path is None:
            raise ValueError(
                "path is missing: source 'pairs' reads a .jsonl, .csv or .json file, .tar shards, or a folder; give"
                " data.path=FILE"
            )
        scenes = SceneSection()
        if self.source != "scenes" and (self.scenes.count, self.scenes.held_out) != (scenes.count, scenes.held_out):
            raise ValueError("scenes.count and scenes.held_out are of source 'scenes'; remove them or set source to it")
        if self.source == "fashioniq" and self.path is None:
            raise ValueError("path is missing: source 'fashioniq' reads a folder; give data.path=FOLDER")
        return self


class ImageTowerSection(Section):
    size: int = Field(256, ge=8, description="pixels a side")
    patch_size: int = Field(16, ge=2)
    width: int = Field(768, ge=8)
    depth: int = Field(12, ge=0)
    heads: int = Field(12, ge=1)
    mlp_ratio: float = Field(4.0, gt=0)
    stem: Literal["patch", "conv"] = "patch"
    weights: Path | None = Field(
        None, description="a ViT of this shape to start from (.safetensors or .pth with timm's or DeiT's names)"
    )

    @model_validator(mode="after")
    def _divides(self) -> ImageTowerSection:
        if self.size % self.patch_size:
            raise ValueError(f"size ({self.size}) is not a multiple of patch_size ({self.patch_size})")
        if self.stem == "conv" and self.patch_size & (self.patch_size - 1):
            raise ValueError(f"stem: conv needs a patch_size that is a power of two, not {self.patch_size}")
        if self.width % self.heads:
            raise ValueError(f"width ({self.width}) is not a multiple of heads ({self.heads})")
        return self


class TextTowerSection(Section):
    width: int = Field(768, ge=8)
    depth: int = Field(6, ge=0)
    heads: int = Field(12, ge=1)
    mlp_ratio: float = Field(4.0, gt=0)
    dropout: float = Field(0.1, ge=0.0, lt=1.0)
    positions: int | None = Field(None, ge=3, description="rows of the position table; default: what the data need")
    segments: int = Field(1, ge=1, description="token types; BERT's checkpoints have 2, of which the first is used")
    weights: Path | None = Field(
        None,
        description="a folder of a transformers BERT of this width: its first layers start the text tower, the next"
        " the fusion encoder (norm: post)",
    )

    @model_validator(mode="after")
    def _divides(self) -> TextTowerSection:
        if self.width % self.heads:
            raise ValueError(f"width ({self.width}) is not a multiple of heads ({self.heads})")
        return self


class FusionSection(Section):
    depth: int = Field(6, ge=1)
    heads: int = Field(12, ge=1)
    mlp_ratio: float = Field(4.0, gt=0)
    dropout: float = Field(0.1, ge=0.0, lt=1.0, description="of each part's output and of the attention weights")
    qk_norm: bool = Field(
        False, description="cosine attention with a learned scale: selective early, for training from scratch"
    )
    norm: Literal["pre", "post"] = Field(
        "pre", description="layer norm before each part, which trains from scratch, or behind it as in BERT and ALBEF"
    )

    @model_validator(mode="after")
    def _bert_has_no_qk_norm(self) -> FusionSection:
        if self.norm == "post" and self.qk_norm:
            raise ValueError("qk_norm is not BERT's: set it to false, or norm to pre")
        return self


class ModelSection(Section):
    system: str | None = Field(
        None,
        description="a model that a plugin registers; of the sections below then only image.size, projection_width and"
        " initial count",
    )
    options: dict[str, Any] = Field({}, description="of system")
    image: ImageTowerSection = ImageTowerSection()
    text: TextTowerSection = TextTowerSection()
    fusion: FusionSection = FusionSection()
    captioner: CaptionerSection | None = Field(
        None, description="text decoder, and no fusion encoder: the model is a contrastive captioner, as in SyCoCa"
    )
    projection_width: int = Field(256, ge=8)
    pool: Literal["cls", "mean"] = Field("cls", description="how a tower's tokens become one feature for ITC")
    initial: Path | None = Field(
        None, description="a folder of crossmask convert, crossmask export or a run: the weights to start from"
    )


class ItcSection(Section):
    weight: float = Field(1.0, ge=0.0)
    temperature: float = Field(0.07, ge=0.001, le=0.5, description="initial value; learned within [0.001, 0.5]")
    queue_length: int = Field(65536, ge=0)
    queue_start: float = Field(0.0, ge=0.0, le=1.0, description="share of the run before the queue is contrasted with")
    queue_initial: Literal["empty", "random"] = Field(
        "empty", description="random: full of random directions at the start, which count as negatives, as in ALBEF"
    )
    distillation: float = Field(0.4, ge=0.0, le=1.0, description="weight of the teacher's soft targets (alpha)")
    patch_drop: float = Field(
        0.0, ge=0.0, lt=1.0, description="share of the student's patches left out at random before encoding (FLIP)"
    )
    patch_drop_until: float = Field(1.0, gt=0.0, le=1.0, description="share of the run after which all patches stay")


class ItmSection(Section):
    weight: float = Field(1.0, ge=0.0)
    hardness: float = Field(1.0, ge=0.0, le=1.0, description="negatives ~ softmax(hardness * similarity / temperature)")
    hardness_ramp: float = Field(0.0, ge=0.0, le=1.0, description="share of the run over which hardness rises from 0")


class MlmSection(Section):
    weight: float = Field(1.0, ge=0.0)
    distillation: float = Field(0.4, ge=0.0, le=1.0)
    teacher_reads: Literal["intact", "masked"] = Field(
        "intact", description="caption that the teacher's soft labels come from: intact as in SyncMask, masked in ALBEF"
    )


class MimSection(Section):
    weight: float = Field(1.0, ge=0.0)
    target: Literal["teacher_feature", "pixel", "normalised_pixel"] = "teacher_feature"


class ObjectivesSection(Section):
    itc: ItcSection = ItcSection()
    itm: ItmSection = ItmSection()
    mlm: MlmSection = MlmSection()
    mim: MimSection = MimSection()
    caption: CaptionSection = CaptionSection(weight=0.0)
    tg_mim: TgMimSection = TgMimSection(weight=0.0)
    composed: ComposedSection = ComposedSection()
    recognition: RecognitionSection = RecognitionSection()
    own: dict[str, OwnObjective] = Field({}, description="objectives that plugins register, by name")
    distillation_ramp: float = Field(0.03, ge=0.0, le=1.0, description="share of the run in which alpha rises from 0")
    fusion_start: float = Field(0.0, ge=0.0, lt=1.0, description="share of the run with ITC alone")
    fusion_rows: int | None = Field(None, ge=2, description="pairs of a rank's batch in all but ITC; default all")


class TeacherSection(Section):
    momentum: float = Field(0.995, ge=0.0, lt=1.0)
    schedule: Literal["constant", "warmup", "cosine"] = Field(
        "constant",
        description="warmup: momentum min(m, (1+t)/(10+t)) at update t; cosine: from m at the start to 1 at the end",
    )
    buffers: Literal["copy", "average"] = Field("copy", description="running means and the like, at each update")
    dropout: bool = Field(False, description="drop in the teacher too, as ALBEF's public code does")

    @model_validator(mode="before")
    @classmethod
    def _read_the_older_key(cls, values: Any) -> Any:
        """Recipes of earlier runs have ``warmup: true`` or ``false`` and can still be resumed."""
        if isinstance(values, dict) and isinstance(values.get("warmup"), bool) and "schedule" not in values:
            rest = {name: value for name, value in values.items() if name != "warmup"}
            return {**rest, "schedule": "warmup" if values["warmup"] else "constant"}
        return values


class OptimizerSection(Section):
    lr: float = Field(1e-4, gt=0.0)
    final_lr: float = Field(1e-5, ge=0.0)
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    weight_decay: float = Field(0.02, ge=0.0)
    temperature_lr_scale: float = Field(1.0, gt=0.0, description="factor on lr for the ITC temperature")
    warmup_steps: int = Field(1000, ge=0)
    warmup_lr: float = Field(0.0, ge=0.0, description="learning rate that the warm-up rises from")
    gradient_clip: float = Field(0.0, ge=0.0, description="0 = no clipping")


class TrainingSection(Section):
    max_steps: int = Field(1000, ge=1)
    batch_size: int = Field(64, ge=1, description="pairs in one optimizer step, all ranks together")
    accumulation_steps: int = Field(1, ge=1)
    checkpoint_every: int = Field(500, ge=1, description="steps between checkpoints")
    keep_checkpoints: int = Field(2, ge=1)
    log_every: int = Field(10, ge=1)
    evaluate_every: int = Field(
        0, ge=0, description="steps between mid-run looks at masks and ITM; 0 = only at the end"
    )
    max_nonfinite: int = Field(5, ge=1, description="non-finite losses in a row before the run stops")
    cpu_ranks: int = Field(2, ge=1, description="ranks to start where there is no GPU")
    rank_timeout: float = Field(
        600.0, ge=5.0, le=43200.0,
        description="seconds without progress on any rank that end a run as hung; 180 at least up to step 1",
    )  # fmt: skip
    precision: Literal["bf16", "fp16", "fp32"] = "bf16"


class SampledSection(Section):
    """Small galleries: each query against one right candidate and others of its category (SyncMask's protocol)."""

    draws: int = Field(0, ge=0, description="independent draws, of which the mean is told; 0 = none")
    queries: int = Field(1000, ge=1)
    negatives: int = Field(100, ge=1, description="wrong candidates of the query's category, others where it has fewer")


class EvaluationSection(Section):
    rerank: int = Field(16, ge=0, description="candidates re-ranked by ITM; 0 = none")
    rerank_queries: int = Field(1000, ge=0, description="queries of each direction that are re-ranked; 0 = all")
    rerank_score: Literal["sum", "itm", "match_logit"] = Field(
        "sum",
        description="what orders them: feature similarity / temperature + ITM log-odds, the log-odds alone, or ITM's"
        " match logit alone as in ALBEF's evaluation",
    )
    sampled: SampledSection = SampledSection()
    recognition: bool = Field(
        False, description="category and sub-category by linear probes, where the data have such columns"
    )
    captioning: CaptioningSection = CaptioningSection()
    prompts: Path | None = Field(None, description="a .json file of classes and templates for zero-shot classification")
    mask_samples: int = Field(512, ge=1)
    gallery_pairs: int = Field(12, ge=1, description="held-out pairs drawn in the report's mask grid")


class Recipe(Section):
    """All that a run is told, as :func:`load_recipe` reads it from YAML."""

    name: str = Field("run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    seed: int = Field(0, ge=0)
    output: Path | None = Field(None, description="run folder; default runs/NAME-YYYYMMDD-HHMMSS")
    note: str = Field("", description="one line shown at the start: how long the run takes, and where measured")
    plugins: list[str] = Field(
        [], description="modules that register parts of yours; imported first, on every rank: they run code"
    )
    data: DataSection = DataSection()
    model: ModelSection = ModelSection()
    masking: MaskingSection = MaskingSection()
    objectives: ObjectivesSection = ObjectivesSection()
    teacher: TeacherSection = TeacherSection()
    optimizer: OptimizerSection = OptimizerSection()
    training: TrainingSection = TrainingSection()
    evaluation: EvaluationSection = EvaluationSection()
    deepspeed: Path | dict[str, Any] = Field({}, description="a DeepSpeed JSON file, or its keys inline")

    @model_validator(mode="before")
    @classmethod
    def _own_systems_have_their_own_objectives(cls, values: Any) -> Any:
        return without_our_objectives(values)

    @model_validator(mode="after")
    def _sections_agree(self) -> Recipe:
        check_own(self)
        check_captioner(self)
        # The fusion encoder is as wide as the text; keys and values are projected from the image's own width.
        width, fused = self.model.text.width, self.model.fusion.heads
        if self.model.captioner is None and width % fused:
            raise ValueError(f"model: text.width ({width}) is not a multiple of fusion.heads ({fused})")
        check_grouping(self)
        check_composed(self)
        check_recognition(self)
        depth, layer = self.model.fusion.depth, self.masking.layer
        if not -depth <= layer < depth:
            raise ValueError(f"masking.layer ({layer}) is not one of the {depth} layers of model.fusion.depth")
        blocks = self.model.image.depth
        if self.masking.drop_after > blocks:
            raise ValueError(
                f"masking.drop_after ({self.masking.drop_after}) is more than model.image.depth ({blocks})"
            )
        heads = self.model.fusion.heads
        if self.masking.heads.kind != "none" and self.masking.heads.count >= heads:
            raise ValueError(
                f"masking.heads.count ({self.masking.heads.count}) leaves none of model.fusion.heads ({heads})"
            )
        o = self.objectives
        if not any(getattr(part, "weight", 0) for part in (*(part for _, part in o), *o.own.values())):
            raise ValueError("objectives: every weight is 0, which leaves nothing to train")
        return self

    @property
    def warmup_steps(self) -> int:
        """Warm-up steps of the learning rate: ``optimizer.warmup_steps``, at most half of the run."""
        return min(self.optimizer.warmup_steps, self.training.max_steps // 2)

    def notices(self) -> list[str]:
        """Lines for the start of a run: what it does that differs from the letter of the recipe."""
        asked, used, steps = self.optimizer.warmup_steps, self.warmup_steps, self.training.max_steps
        if used == asked:
            return []
        return [f"warm-up is cut to {used} of the {steps} steps (optimizer.warmup_steps is {asked})"]
