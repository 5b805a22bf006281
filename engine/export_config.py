"""``config.json`` of an exported model: what it is, so that it can be built, and how its inputs are made."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, ValidationError, model_validator
from torch import Tensor, nn

from .data import NORMALISATIONS, CaptionTokenizer
from .data.captions import token_limit
from .data.classes import Classes
from .errors import CheckpointError, RecipeError
from .masking.registry import find_policy
from .models import PretrainingModel, VisionLanguageModel, build_word_reader
from .models.albef_layout import AlbefFile
from .models.captioner import CaptioningModel
from .models.captioner_student import CaptioningStudent
from .models.classifier import read_classes
from .models.open_clip_layout import OpenClipFile
from .models.system import OwnStudent, Sizes, build_own
from .models.system import build_model as build_model_of
from .recipe import MaskingSection, ModelSection, ObjectivesSection, Recipe, Section
from .registry import systems

FORMAT, VERSION = "crossmask-export", 1
CONFIG = "config.json"
PREFIX = "model."  # of the teacher's names within the student
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
DtypeName = Literal["fp32", "bf16", "fp16"]
Weights = Literal["teacher", "student"]
Model = nn.Module  # one of crossmask's own four, a system's, or an OwnStudent around it
STUDENTS = (PretrainingModel, CaptioningStudent, OwnStudent)
Channels = float | tuple[float, float, float]
_TABLES = ("word_bias", "text.bert.embeddings.position_embeddings.weight")  # rows: words, positions


class MaskNetwork(Section):
    """A mask policy's own module, which the model carries."""

    policy: str
    options: dict[str, Any]


class ExportConfig(Section):
    """``config.json``: strict about its keys."""

    format: Literal["crossmask-export"] = "crossmask-export"
    format_version: Literal[1] = 1
    crossmask: str = Field(description="the version that wrote it")
    recipe: str = Field(description="the recipe's name")
    weights: Weights
    dtype: DtypeName = Field(description="of the floating-point tensors in model.safetensors")
    step: int = Field(ge=0, description="optimizer steps before it was exported")
    parameters: int = Field(ge=1)
    vocabulary_size: int = Field(ge=6)
    max_length: int = Field(ge=3, description="tokens of the longest text, [CLS] and [SEP] included")
    max_words: int | None = Field(None, ge=1, description="words of the longest text; None: half of its tokens")
    pad_id: int = Field(0, ge=0)
    mask_id: int = Field(4, ge=0)
    normalisation: Literal["half", "clip"] = Field("half", description="data.normalisation of the recipe")
    image_mean: Channels = Field(description="taken from pixels in 0..1, which are then divided by image_std")
    image_std: Channels
    model: ModelSection
    plugins: list[str] = Field([], description="of the recipe, told to who looks for model.system; never imported")
    mask_network: MaskNetwork | None = None
    hidden_patches: Literal["token", "drop"] = Field(description="what the student's patch decoder was built for")
    word_reader: bool = Field(False, description="whether it has a block in which patches read the words")
    classes: Classes | None = Field(None, description="what its classifier tells apart, in the order of its outputs")
    objectives: ObjectivesSection = Field(description="likewise, and the temperature that training began with")
    albef: AlbefFile | None = Field(None, description="of a converted checkpoint: what its file had")
    open_clip: OpenClipFile | None = Field(None, description="of a converted CoCa of open_clip, likewise")

    @model_validator(mode="after")
    def _pixels_agree(self) -> ExportConfig:
        known = NORMALISATIONS[self.normalisation]
        if (three(self.image_mean), three(self.image_std)) != (known.mean, known.std):
            raise ValueError(f"image_mean and image_std are not those of normalisation {self.normalisation!r}")
        return self


def three(channels: Channels) -> tuple[float, float, float]:
    """Of each channel."""
    return channels if isinstance(channels, tuple) else (channels,) * 3


def pixel_fields(normalisation: str) -> dict[str, Any]:
    """The fields of :class:`ExportConfig` that tell it; one number where channels do not differ."""
    known = NORMALISATIONS[normalisation]
    mean, std = (values[0] if len(set(values)) == 1 else values for values in (known.mean, known.std))
    return {"normalisation": normalisation, "image_mean": mean, "image_std": std}


def describe_export(
    recipe: Recipe,
    weights: Weights,
    tensors: Mapping[str, Tensor],
    step: int,
    dtype: str = "fp32",
    tokenizer: CaptionTokenizer | None = None,
) -> ExportConfig:
    """The config of a recipe's trained ``tensors``: the teacher's, or all of the student's. ``tokenizer``: of its data;
    the tensors of a registered system do not tell its size.

    Raises:
        CheckpointError: tensors that are not of such a model, or no such dtype.
    """
    if dtype not in DTYPES:
        raise CheckpointError(f"dtype {dtype!r}: choose {', '.join(DTYPES)}")
    prefix = PREFIX if weights == "student" else ""
    ids = {} if tokenizer is None else {"pad_id": tokenizer.pad_id, "mask_id": tokenizer.mask_id}
    if recipe.model.system is not None:
        assert tokenizer is not None
        vocabulary_size, rows = tokenizer.vocabulary_size, token_limit(recipe)
    else:
        vocabulary_size, rows = _table_rows(recipe, weights, tensors)
    has_network = any(name.startswith(f"{prefix}mask_network.") for name in tensors)
    network = MaskNetwork(policy=recipe.masking.policy, options=recipe.masking.options) if has_network else None
    model = recipe.model
    free = {"initial": None, "image": model.image.model_copy(update={"weights": None}),
            "text": model.text.model_copy(update={"weights": None})}  # fmt: skip
    config = ExportConfig(
        crossmask=version(),
        recipe=recipe.name,
        weights=weights,
        dtype=dtype,
        step=step,
        parameters=1,
        vocabulary_size=vocabulary_size,
        max_length=rows if model.text.positions is None else min(rows, token_limit(recipe)),
        max_words=recipe.data.max_words,
        **ids,
        plugins=recipe.plugins,
        **pixel_fields(recipe.data.normalisation),
        model=model.model_copy(update=free),  # where weights came from is no part of what the model is
        mask_network=network,
        hidden_patches=recipe.masking.hidden_patches,
        word_reader=any(name.startswith(f"{prefix}word_reader.") for name in tensors),
        classes=_classes(tensors.get(f"{prefix}classifier.names"), weights),
        objectives=recipe.objectives,
    )
    return with_parameters(config)


def _table_rows(recipe: Recipe, weights: Weights, tensors: Mapping[str, Tensor]) -> tuple[int, int]:
    """Words and positions that one of crossmask's own models has."""
    prefix = PREFIX if weights == "student" else ""
    captioner = recipe.model.captioner is not None
    names = ("vocabulary.weight", "text.position_embeddings") if captioner else _TABLES
    for name in names:
        if prefix + name not in tensors:
            raise CheckpointError(f"the {weights} has no {prefix + name}, so it is not of this version of crossmask")
    vocabulary_size, rows = (tensors[prefix + name].shape[0] for name in names)
    return vocabulary_size, rows - (captioner and recipe.model.pool == "cls")  # whose last position is [CLS]'s


def _classes(names: Tensor | None, weights: Weights) -> Classes | None:
    try:
        return None if names is None else read_classes(names)
    except (ValueError, TypeError):
        raise CheckpointError(f"the {weights}'s classifier.names are no names of classes") from None


def with_parameters(config: ExportConfig) -> ExportConfig:
    """``parameters`` counted."""
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in build_model(config).parameters())
    return config.model_copy(update={"parameters": count})


def version() -> str:
    """Of this package."""
    try:
        return metadata.version("crossmask")
    except metadata.PackageNotFoundError:
        return "unknown"


def read_config(folder: Path) -> ExportConfig:
    """CheckpointError where the folder is no export or is of a version that this one does not know."""
    file = folder / CONFIG
    if not file.is_file():
        raise CheckpointError(
            f"{folder}: not an exported model, {CONFIG} is not in it; make one with: crossmask export"
        )
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}; export it again") from None
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise CheckpointError(f"{file} is not the config of a crossmask export; give a folder of crossmask export")
    if values.get("format_version") != VERSION:
        raise CheckpointError(
            f"{file} has format version {values.get('format_version')}, this crossmask reads {VERSION}; "
            f"use crossmask {values.get('crossmask', 'of that time')}, or export again"
        )
    try:
        return ExportConfig.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise CheckpointError(f"{file}: {place}: {first['msg'].lower()}; export it again") from None


def build_model(config: ExportConfig) -> Model:
    """The module whose weights an export has, freshly initialised: all of the student, or the teacher."""
    if config.model.system is not None:
        return _build_own(config)
    network = None
    if config.mask_network is not None:
        kind = find_policy(config.mask_network.policy)
        if kind is None:
            raise CheckpointError(
                f"the model carries the network of mask policy {config.mask_network.policy!r}, unknown here"
            )
        options = kind.Options.model_validate(config.mask_network.options)
        network = kind(options=options).network(config.model.image.width)
    sizes, specials = (config.vocabulary_size, config.max_length), {"pad_id": config.pad_id, "mask_id": config.mask_id}
    if config.model.captioner is not None:
        if config.weights == "teacher":
            reconstructs = config.objectives.tg_mim.weight > 0
            return CaptioningModel(config.model, *sizes, reconstructs=reconstructs, **specials)
        return CaptioningStudent(config.model, config.objectives, *sizes, **specials)
    direction = "two_blocks" if config.word_reader else "dual_softmax"
    masking = MaskingSection(hidden_patches=config.hidden_patches, options={"direction": direction})
    if config.weights == "teacher":
        reader = build_word_reader(config.model, masking)
        return VisionLanguageModel(
            config.model, *sizes, mask_network=network, word_reader=reader, classes=config.classes, **specials
        )
    return PretrainingModel(
        config.model,
        config.objectives,
        *sizes,
        masking=masking,
        mask_network=network,
        classes=config.classes,
        **specials,
    )


def _build_own(config: ExportConfig) -> Model:
    """A registered system's. A folder names no code to be run: who registers it has been imported, or nothing is."""
    section = config.model
    words = (config.vocabulary_size, config.max_length)
    sizes = Sizes(*words, section.image.size, section.projection_width, config.pad_id, config.mask_id)
    assert section.system is not None
    if not systems.knows(section.system):
        named = f", as its recipe did: {', '.join(config.plugins)}" if config.plugins else ""
        raise CheckpointError(
            f"the model is of system {section.system!r}, which is not registered here; import the module that registers"
            f" it, or name it in plugins of your recipe or by --plugin{named}. A model's folder imports nothing"
        )
    try:
        system = build_own(section.system, section.options, sizes)
    except RecipeError as error:
        raise CheckpointError(f"the model is of another version of its system: {error}") from None
    if config.weights == "teacher":
        return build_model_of(system)
    return OwnStudent(build_model_of(system), config.objectives.itc.temperature)
