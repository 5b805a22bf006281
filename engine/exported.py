"""An exported model: a folder that anyone can load who has this package, without DeepSpeed and without the run.

::

    model.safetensors   every weight by name, tied ones once; buffers
    config.json         ExportConfig: what the model is, so that it can be built, and what was exported
    tokenizer.json      in the format of the ``tokenizers`` library; a converted checkpoint may have none
    teacher.safetensors of a converted checkpoint: the momentum model,
    queue.safetensors   and its queue
    README.md           what this is and how to use it, with an example that runs

Nothing in it is a pickle. It is written under a ``.partial`` name, forced to the disk and renamed.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .atomic import flush
from .beats import beat
from .data import CaptionTokenizer, Normalisation
from .data.pictures import on_white, square, upright
from .errors import CheckpointError
from .export_config import (
    CONFIG,
    DTYPES,
    STUDENTS,
    ExportConfig,
    Model,
    Weights,
    build_model,
    describe_export,
    read_config,
    three,
)

__all__ = [
    "DTYPES",
    "ExportConfig",
    "Weights",
    "build_model",
    "describe_export",
    "load_exported",
    "prepare_images",
    "prepare_texts",
    "read_config",
    "refuse_occupied",
    "save_exported",
]

MODEL, TOKENIZER, CARD = "model.safetensors", "tokenizer.json", "README.md"
TEACHER, QUEUE = "teacher.safetensors", "queue.safetensors"
PARTIAL = ".partial"

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


def save_exported(
    folder: Path | str,
    tensors: Mapping[str, Tensor],
    config: ExportConfig,
    tokenizer: CaptionTokenizer | None,
    force: bool = False,
    *,
    teacher: Mapping[str, Tensor] | None = None,
    queue: Mapping[str, Tensor] | None = None,
) -> None:
    """Write the folder, whole or not at all. ``force`` replaces an earlier export that is there.

    ``teacher``, ``queue``: beside a student, in the config's dtype; no ``tokenizer``: of a converted checkpoint alone.

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
    files: dict[str, Mapping[str, Tensor]] = {MODEL: tensors}
    if teacher is not None:
        with torch.device("meta"):
            files[TEACHER] = _checked(build_model(teacher_of(config)), teacher, "the teacher")
    if queue is not None:
        files[QUEUE] = queue
    if tokenizer is not None and tokenizer.vocabulary_size != config.vocabulary_size:
        raise CheckpointError(
            f"the tokenizer has {tokenizer.vocabulary_size} tokens and {where} {config.vocabulary_size}; "
            "it is of another run"
        )
    if tokenizer is not None:
        config = config.model_copy(update={"pad_id": tokenizer.pad_id, "mask_id": tokenizer.mask_id})
    dtype = DTYPES[config.dtype]
    stored = {file: {name: _cast(name, x, dtype) for name, x in held.items()} for file, held in files.items()}
    partial, replaced = (folder.with_name(folder.name + ending) for ending in (PARTIAL, f".replaced{PARTIAL}"))
    for left_over in (partial, replaced):
        refuse_occupied(left_over, force=True)
    try:
        for left_over in (partial, replaced):
            shutil.rmtree(left_over, ignore_errors=True)
        partial.mkdir(parents=True)
        for file, held in stored.items():
            save_file(held, partial / file, metadata={"format": "pt"})
            beat(f"writing {file}")
        (partial / CONFIG).write_text(config.model_dump_json(indent=1) + "\n", encoding="utf-8")
        if tokenizer is not None:
            (partial / TOKENIZER).write_text(tokenizer.to_json(), encoding="utf-8")
        (partial / CARD).write_text(
            _card(config, (partial / MODEL).stat().st_size, tokenizer is not None), encoding="utf-8"
        )
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
    if foreign := present - {MODEL, CONFIG, TOKENIZER, CARD, TEACHER, QUEUE}:
        raise CheckpointError(f"{folder} holds {min(foreign)}, which is no part of an export; choose another folder")
    if not force:
        raise CheckpointError(f"{folder} holds an export already; replace it with --force, or choose another folder")


def load_exported(
    folder: Path | str,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    whole: bool = False,
    weights: Weights | None = None,
) -> tuple[nn.Module, CaptionTokenizer | None, ExportConfig]:
    """What :func:`save_exported` wrote: the model in eval mode, without gradients, its tokenizer and its config.

    The tokenizer is None where a checkpoint was converted without a vocabulary.

    Args:
        dtype: of the weights; default as they are stored.
        whole: of a student, the :class:`PretrainingModel` or :class:`CaptioningStudent`, with its temperature; else the
            model in it, which teacher and student share.
        weights: of a folder that holds both, which; default the student.

    Raises:
        CheckpointError: a folder that is no export, is of another format, or whose files do not fit together.
    """
    folder = Path(folder)
    config = read_config(folder)
    tokenizer = read_tokenizer(folder, config)
    built, tensors = read_weights(folder, config, weights or config.weights)
    if whole and not isinstance(built, STUDENTS):
        raise CheckpointError(f"{folder} is a teacher, which has no temperature: leave whole=True out")
    built.to(DTYPES[config.dtype] if dtype is None else dtype)
    built.load_state_dict(tensors, strict=False)  # names and shapes were compared; ties are loaded once
    model: nn.Module = built.model if isinstance(built, STUDENTS) and not whole else built
    return model.to(device).eval().requires_grad_(False), tokenizer, config


def read_tokenizer(folder: Path, config: ExportConfig) -> CaptionTokenizer | None:
    """None where a checkpoint was converted without one."""
    if (config.albef or config.open_clip) is not None and not (folder / TOKENIZER).exists():
        return None
    tokenizer = CaptionTokenizer.load(folder / TOKENIZER)
    if tokenizer.vocabulary_size != config.vocabulary_size:
        raise CheckpointError(
            f"{folder / TOKENIZER} has {tokenizer.vocabulary_size} tokens and the model {config.vocabulary_size}; "
            "export it again"
        )
    return tokenizer


def read_weights(folder: Path, config: ExportConfig, weights: Weights) -> tuple[Model, dict[str, Tensor]]:
    """A fresh model, and the tensors for it.

    Raises:
        CheckpointError: a folder without such weights, or that do not fit its config.
    """
    file = folder / MODEL
    if weights != config.weights:
        file, config = folder / TEACHER, teacher_of(config)
        if weights == "student" or not file.is_file():
            other = "student" if weights == "teacher" else "teacher"
            raise CheckpointError(f"{folder} has no {weights}, only the {other}; ask for that, or export it again")
    tensors = read_tensors(file)
    with torch.random.fork_rng(devices=[]):  # the fresh weights are overwritten
        built = build_model(config)
    tensors = _checked(built, tensors, str(file))
    for tensor in tensors.values():
        if tensor.is_floating_point() and tensor.dtype is not DTYPES[config.dtype]:
            raise CheckpointError(f"{file} is not in {config.dtype}, as {CONFIG} says; export it again")
    return built, tensors


def read_tensors(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{file} cannot be read: {reason}; export it again") from None


def teacher_of(config: ExportConfig) -> ExportConfig:
    """The config of the teacher beside a student."""
    return config.model_copy(update={"weights": "teacher"})


def prepare_images(images: Sequence[Image.Image], config: ExportConfig) -> Tensor:
    """Pictures of any size and mode -> (B, 3, S, S) float32, as training saw held-out ones: whole, on white."""
    pixels = [square(on_white(upright(image)), config.model.image.size) for image in images]
    stacked = torch.from_numpy(np.stack([np.array(image) for image in pixels])).permute(0, 3, 1, 2)
    normalisation = Normalisation(three(config.image_mean), three(config.image_std))
    return normalisation.apply_(stacked.float() / 255).contiguous()


def prepare_texts(
    captions: Sequence[str], tokenizer: CaptionTokenizer | None, config: ExportConfig
) -> tuple[Tensor, Tensor]:
    """Captions -> (B, L) int64 token ids and (B, L) bool, True where there is a token; long ones are cut.

    CheckpointError without a tokenizer.
    """
    if tokenizer is None:
        raise CheckpointError("the model was converted without a vocabulary: convert it again with --vocabulary")
    return tokenizer.batch(captions, config.max_length, config.max_words or (config.max_length - 2) // 2)


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


def _card(config: ExportConfig, size: int, words: bool) -> str:
    image, text, captioner = config.model.image, config.model.text, config.model.captioner
    fusion = captioner or config.model.fusion
    who = {
        "teacher": "the momentum teacher, an exponential moving average of the student's float32 master weights",
        "student": "the student, its float32 master weights",
    }[config.weights]
    towers = {
        "image tower": f"{image.size} × {image.size} pixels, patches of {image.patch_size}; {image.depth} blocks, "
        f"{image.width} wide",
        "text tower": f"{config.vocabulary_size:,} tokens, at most {config.max_length} a text; {text.depth} blocks, "
        f"{text.width} wide",
        "text decoder" if captioner else "fusion encoder": f"{fusion.depth} blocks, {fusion.heads} heads",
    }
    if config.model.system is not None:
        towers = {
            "system": f"{config.model.system}, registered by {', '.join(config.plugins) or 'a module of its own'}:"
            " import that before it is loaded",
            "inputs": f"{image.size} × {image.size} pixels; {config.vocabulary_size:,} tokens, at most"
            f" {config.max_length} a text",
        }
    facts = {
        **towers,
        "features": f"{config.model.projection_width} numbers, length 1: their products are cosine similarities",
        "parameters": f"{config.parameters:,} in {config.dtype}, {size / 1e6:,.1f} MB",
    }
    table = "\n".join(f"| {name} | {fact} |" for name, fact in facts.items())
    origin = f"pre-trained with crossmask {config.crossmask}: {who}, after {config.step:,} steps."
    if config.albef is not None:
        origin = (
            f"converted from a checkpoint of ALBEF (Li et al. 2021) by crossmask {config.crossmask}, bit by bit; "
            "the patch decoder and the image's mask token are new."
        )
        if not words:
            origin += "\nIt was converted without a vocabulary, so it cannot read captions: convert it again with "
            origin += "`--vocabulary` before the example below."
    if config.open_clip is not None:
        origin = (
            f"converted from a CoCa of open_clip by crossmask {config.crossmask}, bit by bit; "
            "the image's mask token is new."
        )
        if not words:
            origin += "\nIt was converted without a vocabulary, so it neither reads nor writes captions: convert it "
            origin += "again with `--vocabulary`."
    use = USE
    if config.model.system is not None:  # whose methods may give the features alone
        use = (
            use.replace(
                "model.encode_image(prepare_images(pictures, config)).feature",
                "encode_image(model, prepare_images(pictures, config)).feature",
            )
            .replace(
                "model.encode_text(*prepare_texts(captions, tokenizer, config)).feature",
                "encode_text(model, *prepare_texts(captions, tokenizer, config)).feature",
            )
            .replace(
                "\n\nmodel, tokenizer",
                "\nfrom crossmask.engine.models.system import encode_image, encode_text\n\nmodel, tokenizer",
            )
        )
    return f"""\
# {config.recipe}

A vision-language model {origin}

| | |
|---|---|
{table}

{use}"""
