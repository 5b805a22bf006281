"""``crossmask convert open-clip``: open_clip's CoCa as a folder of ours, and back.

::

    IN.pt, IN.safetensors -> OUT/    what crossmask export writes, of the student
    IN/ -> OUT.pt, OUT.safetensors   IN: such a folder, another export, or a run; beside it OUT.json, the model's shape
                                     in open_clip's terms
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from .beats import beat
from .conversion import (
    Tell,
    dtype_name,
    open_vocabulary,
    refuse_existing,
    refuse_other_layouts,
    replacing,
    tell_of_odd_numbers,
)
from .errors import CheckpointError
from .export_config import ExportConfig, pixel_fields, version, with_parameters
from .exported import refuse_occupied, save_exported
from .models.albef_layout import STUDENT
from .models.open_clip_layout import DECODER_RATIO, SCALE, OpenClipFile, OpenClipLayout
from .models.open_clip_recognition import recognise
from .models.weight_files import read_state_dict
from .recipe import ModelSection, ObjectivesSection
from .training.stored import StoredModel, read_section, read_stored

ENDINGS = (".pt", ".pth", ".bin", ".safetensors")
PARALLEL = "module."  # that DistributedDataParallel puts before a name
MASKS = ("text.attn_mask", "text_decoder.attn_mask")  # constants that older versions saved
MASK_TOKEN = f"{STUDENT}image.mask_token"


def convert_open_clip(
    source: Path,
    target: Path,
    config: Path | None = None,
    vocabulary: Path | None = None,
    force: bool = False,
    tell: Tell = lambda line: None,
) -> str:
    """Convert in the direction that ``source``, a file or a folder, asks for; returns a line that says what came out.

    Args:
        config: one of open_clip's model configurations (``coca_ViT-B-32.json``, ``open_clip_config.json``): heads and
            activation, which no tensor tells; default those of open_clip's own CoCas.
        vocabulary: ``bpe_simple_vocab_16e6.txt.gz``; without it the folder can neither read captions nor write them.
        force: replace what an earlier conversion wrote.
        tell: takes one line at a time.

    Raises:
        CheckpointError: a source that is not in that layout or cannot be read, a target that is in the way.
        DataError: a vocabulary that cannot be read.
    """
    if not source.is_dir():
        return _read_state_dict(source, target, config, vocabulary, force, tell)
    for name, given in (("--config", config), ("--vocabulary", vocabulary)):
        if given is not None:
            raise CheckpointError(f"{name} is for a state dict that becomes a folder; leave it out")
    return _write_state_dict(source, target, force, tell)


# ---- from open_clip


def _read_state_dict(
    source: Path, target: Path, config: Path | None, vocabulary: Path | None, force: bool, tell: Tell
) -> str:
    if target.suffix in ENDINGS:
        raise CheckpointError(f"{target}: a state dict becomes a folder; name one without {target.suffix}")
    refuse_occupied(target, force)
    state = read_state_dict(source, tell, under=("state_dict", "model"))
    if state and all(name.startswith(PARALLEL) for name in state):
        state = {name.removeprefix(PARALLEL): value for name, value in state.items()}
    state = {name: value for name, value in state.items() if name not in MASKS}
    layout = recognise(state, _read_config(config), str(source))
    tokenizer = open_vocabulary(vocabulary, layout.vocabulary_size, source)
    student = layout.to_ours(state)
    dtype = student["temperature"].dtype
    student[MASK_TOKEN] = _mask_token(layout.section, dtype)
    positions = layout.section.text.positions
    assert positions is not None
    described = ExportConfig(
        crossmask=version(),
        recipe=source.name,
        weights="student",
        dtype=dtype_name(dtype, source),
        step=0,
        parameters=1,
        vocabulary_size=layout.vocabulary_size,
        max_length=positions,
        max_words=positions - 2,
        **pixel_fields("clip"),
        model=layout.section,
        hidden_patches="token",
        objectives=ObjectivesSection.model_validate(
            {"itc": {"queue_length": 0, "distillation": 0.0}, "caption": {"weight": 2.0}}
            | {name: {"weight": 0.0} for name in ("itm", "mlm", "mim", "tg_mim")}
        ),
        open_clip=OpenClipFile(logit_scale=float(state[SCALE]), scalar=state[SCALE].ndim == 0),
    )
    described = with_parameters(described)
    if config is None:
        tell("heads are taken to be those of open_clip's own CoCas; where they are not, give --config")
    tell(f"new, {source.name} has none: image.mask_token; an image decoder is added where a run trains one")
    tell_of_odd_numbers(state, tell)
    if tokenizer is None:
        tell(
            "without a vocabulary it can neither read captions nor write them: convert again with "
            "--vocabulary bpe_simple_vocab_16e6.txt.gz for that"
        )
    save_exported(target, student, described, tokenizer, force)
    return (
        f"{target}: {described.parameters:,} parameters in {described.dtype}, {_shape(layout)}; "
        f"start a run from it with model.initial={target}"
    )


def _read_config(file: Path | None) -> Mapping[str, Any]:
    if file is None:
        return {}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"--config {file} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    found = found.get("model_cfg", found) if isinstance(found, dict) else None
    if not isinstance(found, dict) or not isinstance(found.get("vision_cfg"), dict):
        raise CheckpointError(f"--config {file} is no model configuration of open_clip: it has no vision_cfg")
    return found


def _mask_token(section: ModelSection, dtype: torch.dtype) -> Tensor:
    """Always the same."""
    return (0.02 * torch.randn(section.image.width, generator=torch.Generator().manual_seed(0))).to(dtype)


# ---- to open_clip


def _write_state_dict(source: Path, target: Path, force: bool, tell: Tell) -> str:
    if target.suffix not in ENDINGS:
        raise CheckpointError(
            f"{target}: a folder becomes a state dict; give it a name that ends in .pt or .safetensors"
        )
    beside = target.with_suffix(".json")
    refuse_existing(target, beside, force=force)
    refuse_other_layouts(source, "open_clip's", _compared(read_section(source), source))
    stored = read_stored(source, tell)
    student = _student_of(stored, tell)
    positions = student[f"{STUDENT}text.position_embeddings"].shape[0] - 1
    text = stored.config.model.text.model_copy(update={"positions": positions})
    section = stored.config.model.model_copy(update={"text": text})
    layout = OpenClipLayout(section, stored.config.vocabulary_size)
    state = layout.to_theirs(student, stored.config.open_clip)
    has_place = {STUDENT + name for group in layout.groups() for name in group.ours} | {"temperature"}
    if left := sorted({name.removeprefix(STUDENT).split(".")[0] for name in student if name not in has_place}):
        names = ", ".join("image.mask_token" if name == "image" else name for name in left)
        tell(f"left out, open_clip's layout has no place for it: {names}")
    assert section.captioner is not None
    if section.captioner.cls_mask == "words":
        tell("model.captioner.cls_mask is words: open_clip's [CLS] sees padding as well, so features of texts differ")
    beat("writing the state dict")
    with replacing(target) as part:
        if target.suffix == ".safetensors":
            save_file(state, part, metadata={"format": "pt"})
        else:
            torch.save(state, part)
    with replacing(beside) as part:
        part.write_text(json.dumps(layout.describe(), indent=1) + "\n", encoding="utf-8")
    return (
        f"{target} and {beside.name}: {len(state)} tensors in open_clip's layout, {_shape(layout)}, "
        f"{target.stat().st_size / 1e6:,.1f} MB"
    )


def _compared(model: ModelSection, source: Path) -> dict[str, tuple[Any, Any]]:
    """Fields that the layout fixes: a model's own value and what it is there. CheckpointError: it is no captioner."""
    captioner = model.captioner
    if captioner is None:
        raise CheckpointError(
            f"{source} is no captioner, so not of CoCa's layout: it has no model.captioner; give a model that has, such"
            " as one of the recipe sycoca"
        )
    pooler, width = captioner.pooler, model.text.width
    context = model.image.width if pooler is None else model.projection_width
    same_ratio = int(captioner.mlp_ratio * width) == int(DECODER_RATIO * width)
    return {
        "model.pool": (model.pool, "cls"),
        "model.image.stem": (model.image.stem, "patch"),
        "model.captioner.norm_pre": (captioner.norm_pre, True),
        "model.captioner.qk_norm": (captioner.qk_norm, False),
        "model.captioner.pooler.kind": (pooler.kind if pooler else "single", "single"),
        "model.captioner.mlp_ratio": (captioner.mlp_ratio, captioner.mlp_ratio if same_ratio else DECODER_RATIO),
        "model.text.width": (width, context),
        "model.text.depth": (model.text.depth, model.text.depth or "1 or more"),  # open_clip cannot build a tower of 0
    }


def _student_of(stored: StoredModel, tell: Tell) -> dict[str, Tensor]:
    if stored.student is not None:
        return stored.student
    assert stored.teacher is not None
    tell("it is a teacher: its temperature is the one that training began with")
    student = {STUDENT + name: value for name, value in stored.teacher.items()}
    like = student[f"{STUDENT}vocabulary.weight"]
    return student | {"temperature": torch.tensor([stored.config.objectives.itc.temperature]).to(like)}


def _shape(layout: OpenClipLayout) -> str:
    image, text, captioner = layout.section.image, layout.section.text, layout.section.captioner
    assert captioner is not None
    return (
        f"images of {image.size} × {image.size} in {image.depth} blocks, {layout.vocabulary_size:,} tokens in "
        f"{text.depth} + {captioner.depth} layers"
    )
