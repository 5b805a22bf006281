"""An exported model: a folder that anyone can load who has this package, without DeepSpeed and without the run.

::

    model.safetensors   every weight by name, tied ones once; buffers
    config.json         ExportConfig: what the model is, so that it can be built, and what was exported
    tokenizer.json      in the format of the ``tokenizers`` library
    README.md           what this is and how to use it, with an example that runs

Nothing in it is a pickle. It is written under a ``.partial`` name, forced to the disk and renamed.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, ImageOps
from pydantic import Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .atomic import flush
from .data import IMAGE_MEAN, IMAGE_STD, CaptionTokenizer
from .data.pairs import on_white
from .data.tokenizer import split_words
from .errors import CheckpointError
from .masking import policies
from .models import PretrainingModel, VisionLanguageModel
from .recipe import MaskingSection, ModelSection, ObjectivesSection, Recipe, Section

FORMAT, VERSION = "crossmask-export", 1
MODEL, CONFIG, TOKENIZER, CARD = "model.safetensors", "config.json", "tokenizer.json", "README.md"
PARTIAL = ".partial"
PREFIX = "model."  # of the teacher's names within the student
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
DtypeName = Literal["fp32", "bf16", "fp16"]
Weights = Literal["teacher", "student"]

USE = """\
## Use

```python
import torch
from PIL import Image

from crossmask.engine.exported import load_exported, prepare_images, prepare_texts

model, tokenizer, config = load_exported(".")  # this folder

pictures = [Image.new("RGB", (64, 64), "red"), Image.new("RGB", (64, 64), "blue")]  # or Image.open("picture.png")
captions = ["a red square", "the blue sky"]
with torch.no_grad():
    images = model.encode_image(prepare_images(pictures, config)).feature
    texts = model.encode_text(*prepare_texts(captions, tokenizer, config)).feature
print(images @ texts.T)  # a row for each picture, a column for each caption
```

`model.safetensors` has the weights, `config.json` what the model is, `tokenizer.json` the vocabulary in the format of
the `tokenizers` library. None of them can run code, and DeepSpeed is not needed.
"""


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
    image_mean: float = Field(
        description="taken from pixels in 0..1, all channels, which are then divided by image_std"
    )
    image_std: float = Field(gt=0)
    model: ModelSection
    mask_network: MaskNetwork | None = None
    hidden_patches: Literal["token", "drop"] = Field(description="what the student's patch decoder was built for")
    objectives: ObjectivesSection = Field(description="likewise, and the temperature that training began with")


def describe_export(
    recipe: Recipe, weights: Weights, tensors: Mapping[str, Tensor], step: int, dtype: str = "fp32"
) -> ExportConfig:
    """The config of a recipe's trained ``tensors``: the teacher's, or all of the student's.

    Raises:
        CheckpointError: tensors that are not of such a model.
    """
    prefix = PREFIX if weights == "student" else ""
    names = "word_bias", "text.bert.embeddings.position_embeddings.weight"
    for name in names:
        if prefix + name not in tensors:
            raise CheckpointError(f"the {weights} has no {prefix + name}, so it is not of this version of crossmask")
    vocabulary_size, max_length = (tensors[prefix + name].shape[0] for name in names)
    has_network = any(name.startswith(f"{prefix}mask_network.") for name in tensors)
    network = MaskNetwork(policy=recipe.masking.policy, options=recipe.masking.options) if has_network else None
    try:
        version = metadata.version("crossmask")
    except metadata.PackageNotFoundError:
        version = "unknown"
    config = ExportConfig(
        crossmask=version,
        recipe=recipe.name,
        weights=weights,
        dtype=dtype,
        step=step,
        parameters=1,
        vocabulary_size=vocabulary_size,
        max_length=max_length,
        image_mean=IMAGE_MEAN,
        image_std=IMAGE_STD,
        model=recipe.model,
        mask_network=network,
        hidden_patches=recipe.masking.hidden_patches,
        objectives=recipe.objectives,
    )
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in build_model(config).parameters())
    return config.model_copy(update={"parameters": count})


def save_exported(
    folder: Path | str,
    tensors: Mapping[str, Tensor],
    config: ExportConfig,
    tokenizer: CaptionTokenizer,
    force: bool = False,
) -> None:
    """Write the folder, whole or not at all. ``force`` replaces an earlier export that is there.

    Raises:
        CheckpointError: tensors that do not fit the config, a number too large for the dtype, a folder that is in the
            way, a disk that is full.
    """
    folder = Path(os.path.abspath(folder))
    refuse_occupied(folder, force)
    with torch.device("meta"):
        model = build_model(config)
    where = f"the {config.weights}"
    tensors = _checked(model, tensors, where)
    if tokenizer.vocabulary_size != config.vocabulary_size:
        raise CheckpointError(
            f"the tokenizer has {tokenizer.vocabulary_size} tokens and {where} {config.vocabulary_size}; "
            "it is of another run"
        )
    stored = {name: _cast(name, tensor, DTYPES[config.dtype]) for name, tensor in tensors.items()}
    partial, replaced = (folder.with_name(folder.name + ending) for ending in (PARTIAL, f".replaced{PARTIAL}"))
    for left_over in (partial, replaced):
        refuse_occupied(left_over, force=True)
    try:
        for left_over in (partial, replaced):
            shutil.rmtree(left_over, ignore_errors=True)
        partial.mkdir(parents=True)
        save_file(stored, partial / MODEL, metadata={"format": "pt"})
        (partial / CONFIG).write_text(config.model_dump_json(indent=1) + "\n", encoding="utf-8")
        (partial / TOKENIZER).write_text(tokenizer.to_json(), encoding="utf-8")
        (partial / CARD).write_text(_card(config, (partial / MODEL).stat().st_size), encoding="utf-8")
        for path in (*partial.iterdir(), partial):
            flush(path)
        if folder.exists():
            os.replace(folder, replaced)
        os.replace(partial, folder)
        flush(folder.parent)
        shutil.rmtree(replaced, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:200]
        raise CheckpointError(f"{folder} cannot be written: {reason}; make room, or choose another folder") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def refuse_occupied(folder: Path, force: bool) -> None:
    """CheckpointError where the folder cannot be made or holds files; with ``force``, where they are no export."""
    parent = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not parent.is_dir():
        raise CheckpointError(f"{folder} cannot be made, {parent} is a file; choose another folder")
    if parent != folder or not (present := {path.name for path in folder.iterdir()}):
        return
    if foreign := present - {MODEL, CONFIG, TOKENIZER, CARD}:
        raise CheckpointError(f"{folder} holds {min(foreign)}, which is no part of an export; choose another folder")
    if not force:
        raise CheckpointError(f"{folder} holds an export already; replace it with --force, or choose another folder")


def load_exported(
    folder: Path | str,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    whole: bool = False,
) -> tuple[nn.Module, CaptionTokenizer, ExportConfig]:
    """What :func:`save_exported` wrote: the model in eval mode, without gradients, its tokenizer and its config.

    Args:
        dtype: of the weights; default as they are stored.
        whole: of a student, the :class:`PretrainingModel` with its temperature and patch decoder; else the
            :class:`VisionLanguageModel`, which teacher and student share.

    Raises:
        CheckpointError: a folder that is no export, is of another format, or whose files do not fit together.
    """
    folder = Path(folder)
    config = read_config(folder)
    tokenizer = CaptionTokenizer.load(folder / TOKENIZER)
    if tokenizer.vocabulary_size != config.vocabulary_size:
        raise CheckpointError(
            f"{folder / TOKENIZER} has {tokenizer.vocabulary_size} tokens and the model {config.vocabulary_size}; "
            "export it again"
        )
    if whole and config.weights != "student":
        raise CheckpointError(f"{folder} is a teacher, which has no patch decoder: leave whole=True out")
    try:
        tensors = load_file(folder / MODEL)
    except (OSError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{folder / MODEL} cannot be read: {reason}; export it again") from None
    with torch.random.fork_rng(devices=[]):  # the fresh weights are overwritten
        built = build_model(config)
    tensors = _checked(built, tensors, str(folder / MODEL))
    for tensor in tensors.values():
        if tensor.is_floating_point() and tensor.dtype is not DTYPES[config.dtype]:
            raise CheckpointError(f"{folder / MODEL} is not in {config.dtype}, as {CONFIG} says; export it again")
    built.to(DTYPES[config.dtype] if dtype is None else dtype)
    built.load_state_dict(tensors, strict=False)  # names and shapes were compared; ties are loaded once
    model: nn.Module = built if whole or isinstance(built, VisionLanguageModel) else built.model
    return model.to(device).eval().requires_grad_(False), tokenizer, config


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


def prepare_images(images: Sequence[Image.Image], config: ExportConfig) -> Tensor:
    """Pictures of any size and mode -> (B, 3, S, S) float32, as training saw held-out ones: whole, on white."""
    size = (config.model.image.size,) * 2
    upright = (on_white(ImageOps.exif_transpose(image)) for image in images)
    pixels = [image.resize(size, Image.Resampling.BICUBIC, reducing_gap=3.0) for image in upright]
    stacked = torch.from_numpy(np.stack([np.array(image) for image in pixels])).permute(0, 3, 1, 2)
    return ((stacked.float() / 255 - config.image_mean) / config.image_std).contiguous()


def prepare_texts(captions: Sequence[str], tokenizer: CaptionTokenizer, config: ExportConfig) -> tuple[Tensor, Tensor]:
    """Captions -> (B, L) int64 token ids and (B, L) bool, True where there is a token; long ones are cut."""
    room = config.max_length - 2
    rows = []
    for caption in captions:
        pieces = [piece for word in split_words(caption)[: room // 2] for piece in tokenizer.pieces(word)]
        rows.append(torch.tensor([tokenizer.cls_id, *pieces[:room], tokenizer.sep_id]))
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=tokenizer.pad_id)
    lengths = torch.tensor([len(row) for row in rows])
    return ids, torch.arange(ids.shape[1]) < lengths[:, None]


def build_model(config: ExportConfig) -> VisionLanguageModel | PretrainingModel:
    """The module whose weights an export has, freshly initialised: all of the student, or the teacher."""
    network = None
    if config.mask_network is not None:
        kind = policies().get(config.mask_network.policy)
        if kind is None:
            raise CheckpointError(
                f"the model carries the network of mask policy {config.mask_network.policy!r}, unknown here"
            )
        options = kind.Options.model_validate(config.mask_network.options)
        network = kind(options=options).network(config.model.image.width)
    sizes = (config.vocabulary_size, config.max_length)
    if config.weights == "teacher":
        return VisionLanguageModel(config.model, *sizes, mask_network=network)
    masking = MaskingSection(hidden_patches=config.hidden_patches)
    return PretrainingModel(config.model, config.objectives, *sizes, masking=masking, mask_network=network)


def _checked(model: nn.Module, tensors: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """In the model's order; CheckpointError names what is missing, unknown or of another shape."""
    expected: dict[str, Tensor] = dict(model.named_parameters())
    persistent = model.state_dict().keys()
    expected |= {name: buffer for name, buffer in model.named_buffers() if name in persistent}
    for name, own in expected.items():
        if name not in tensors:
            raise CheckpointError(f"{where} has no {name}, which its model needs")
        if tensors[name].shape != own.shape:
            raise CheckpointError(f"{where}: {name} is {tuple(tensors[name].shape)}, its model's is {tuple(own.shape)}")
    for name in sorted(tensors.keys() - expected.keys()):
        raise CheckpointError(f"{where} has {name}, which its model has not")
    return {name: tensors[name] for name in expected}


def _cast(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    if not tensor.is_floating_point():
        return tensor.detach().cpu().contiguous()
    cast = tensor.detach().cpu().to(dtype).contiguous()
    if dtype is torch.float16 and (cast.isinf() & tensor.cpu().isfinite()).any():
        raise CheckpointError(f"{name} has numbers that float16 cannot hold: export in bf16 or fp32")
    return cast


def _card(config: ExportConfig, size: int) -> str:
    image, text, fusion = config.model.image, config.model.text, config.model.fusion
    who = {
        "teacher": "the momentum teacher, an exponential moving average of the student's float32 master weights",
        "student": "the student, its float32 master weights",
    }[config.weights]
    facts = {
        "image tower": f"{image.size} × {image.size} pixels, patches of {image.patch_size}; {image.depth} blocks, "
        f"{image.width} wide",
        "text tower": f"{config.vocabulary_size:,} tokens, at most {config.max_length} a text; {text.depth} blocks, "
        f"{text.width} wide",
        "fusion encoder": f"{fusion.depth} blocks, {fusion.heads} heads",
        "features": f"{config.model.projection_width} numbers, length 1: their products are cosine similarities",
        "parameters": f"{config.parameters:,} in {config.dtype}, {size / 1e6:,.1f} MB",
    }
    table = "\n".join(f"| {name} | {fact} |" for name, fact in facts.items())
    return f"""\
# {config.recipe}

A vision-language model pre-trained with crossmask {config.crossmask}: {who}, after {config.step:,} steps.

| | |
|---|---|
{table}

{USE}"""
