"""``crossmask convert albef``: ALBEF's official checkpoints as folders of ours, and back, without loss.

::

    IN.pth -> OUT/      what crossmask export writes, of the student, and its teacher and queue beside it
    IN/ -> OUT.pth      IN: such a folder, another export, or a run, of which the latest good checkpoint is taken
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
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
from .models.albef_layout import STUDENT, AlbefFile, AlbefLayout, Ours, fresh, twin
from .models.albef_recognition import HEAD_WIDTH, recognise
from .models.positions import resize_table
from .models.weight_files import read_state_dict
from .recipe import ModelSection, ObjectivesSection
from .training.stored import StoredModel, read_section, read_stored

POSITIONS = "visual_encoder.pos_embed"
CAPTION_WORDS = 30  # that ALBEF reads at most
BERT_MASK_ID = 103  # of [MASK] in bert-base-uncased, where no vocabulary says it
ENDINGS = (".pth", ".pt")


def convert_albef(
    source: Path,
    target: Path,
    vocabulary: Path | None = None,
    image_size: int | None = None,
    force: bool = False,
    tell: Tell = lambda line: None,
) -> str:
    """Convert in the direction that ``source``, a file or a folder, asks for; returns a line that says what came out.

    Args:
        vocabulary: the ``vocab.txt`` of a checkpoint's words; without it the folder cannot read captions.
        image_size: pixels a side, for which the position embeddings are resized as ALBEF does it.
        force: replace what an earlier conversion wrote.
        tell: takes one line at a time.

    Raises:
        CheckpointError: a source that is not in ALBEF's layout or cannot be read, a target that is in the way.
        DataError: a vocabulary that cannot be read.
    """
    if source.is_dir():
        return _write_checkpoint(source, target, vocabulary, image_size, force, tell)
    return _read_checkpoint(source, target, vocabulary, image_size, force, tell)


# ---- from ALBEF


def _read_checkpoint(
    source: Path, target: Path, vocabulary: Path | None, image_size: int | None, force: bool, tell: Tell
) -> str:
    if target.suffix in ENDINGS:
        raise CheckpointError(f"{target}: a checkpoint becomes a folder; name one without {target.suffix}")
    refuse_occupied(target, force)
    state = read_state_dict(source, tell)
    layout = recognise(state, str(source))
    if image_size is not None:
        side = _patches(image_size, layout.section)
        tables = {name: resize_table(state[name], side) for name in (POSITIONS, twin(POSITIONS)) if name in state}
        state = {**state, **tables}
        layout = recognise(state, str(source))
    tokenizer = open_vocabulary(vocabulary, layout.vocabulary_size, source)
    ours = layout.to_ours(state)
    dtype = ours.student["temperature"].dtype
    named = dtype_name(dtype, source)
    objectives = ObjectivesSection.model_validate({"itc": {"queue_length": layout.queue_length}})
    added = fresh(layout, objectives, dtype)
    teacher = ours.teacher
    if teacher is not None:
        shared = {name.removeprefix(STUDENT): x for name, x in added.items() if name.startswith(STUDENT)}
        teacher = teacher | shared
    config = ExportConfig(
        crossmask=version(),
        recipe=source.name,
        weights="student",
        dtype=named,
        step=0,
        parameters=1,
        vocabulary_size=layout.vocabulary_size,
        max_length=layout.positions,
        max_words=CAPTION_WORDS,
        mask_id=BERT_MASK_ID if layout.vocabulary_size > BERT_MASK_ID else ExportConfig.model_fields["mask_id"].default,
        **pixel_fields("clip"),
        model=layout.section,
        hidden_patches="token",
        objectives=objectives,
        albef=layout.file,
    )
    config = with_parameters(config)
    tell(f"new, {source.name} has none: {_groups(added)}")
    tell_of_odd_numbers(state, tell)
    if tokenizer is None:
        tell("without a vocabulary it cannot read captions: convert again with --vocabulary vocab.txt for that")
    save_exported(target, ours.student | added, config, tokenizer, force, teacher=teacher, queue=ours.queue)
    parts = ["the student", *(["its momentum model"] if teacher else []), *(["its queue"] if ours.queue else [])]
    return (
        f"{target}: {', '.join(parts)}; {config.parameters:,} parameters in {config.dtype}, {_shape(layout)}; "
        f"start a run from it with model.initial={target}"
    )


# ---- to ALBEF


def _write_checkpoint(
    source: Path, target: Path, vocabulary: Path | None, image_size: int | None, force: bool, tell: Tell
) -> str:
    if target.suffix not in ENDINGS:
        raise CheckpointError(f"{target}: a folder becomes a checkpoint; give it a name that ends in .pth")
    refuse_existing(target, force=force)
    if vocabulary is not None:
        raise CheckpointError("--vocabulary is for a checkpoint that becomes a folder: ALBEF's has none; leave it out")
    refuse_other_layouts(source, "ALBEF's", _compared(read_section(source)))
    stored = read_stored(source, tell)
    layout, ours = _layout_of(stored, tell)
    if image_size is not None:
        layout, ours = _resized(layout, ours, _patches(image_size, layout.section))
    state = layout.to_official(ours)
    if left := [name for name in ours.student if not _has_place(layout, name)]:
        tell(f"left out, ALBEF's layout has no place for it: {_groups(left)}")
    beat("writing the checkpoint")
    with replacing(target) as part:
        torch.save({"model": state}, part)
    return f"{target}: {len(state)} tensors in ALBEF's layout, {_shape(layout)}, {target.stat().st_size / 1e6:,.1f} MB"


def _compared(model: ModelSection) -> dict[str, tuple[Any, Any]]:
    """Fields that the layout fixes: a model's own value and what it is there."""
    depth, multiple = model.text.depth, f"a multiple of {HEAD_WIDTH}"
    widths = {f"model.{name}.width": getattr(model, name).width for name in ("image", "text")}
    return {
        "model.captioner": ("set" if model.captioner else None, None),
        "model.fusion.norm": (model.fusion.norm, "post"),
        "model.image.stem": (model.image.stem, "patch"),
        "model.pool": (model.pool, "cls"),
        "model.fusion.qk_norm": (model.fusion.qk_norm, False),
        "model.image.heads": (model.image.heads, model.image.width // HEAD_WIDTH),
        "model.text.heads": (model.text.heads, model.text.width // HEAD_WIDTH),
        "model.fusion.heads": (model.fusion.heads, model.text.width // HEAD_WIDTH),
        "model.fusion.mlp_ratio": (model.fusion.mlp_ratio, model.text.mlp_ratio),
        "model.text.depth": (depth, depth or "1 or more"),
        **{name: (width, multiple if width % HEAD_WIDTH else width) for name, width in widths.items()},
    }


def _layout_of(stored: StoredModel, tell: Tell) -> tuple[AlbefLayout, Ours]:
    config, student, queue = stored.config, stored.student, stored.queue
    if student is None:
        assert stored.teacher is not None
        tell(
            "it is a teacher: ALBEF's model takes its weights, and its temperature is the one that training began with"
        )
        student = {STUDENT + name: value for name, value in stored.teacher.items()}
        student["temperature"] = torch.tensor([config.objectives.itc.temperature]).to(student[f"{STUDENT}word_bias"])
    teacher = None if stored.student is None else stored.teacher
    length = 0 if queue is None else int(queue["position"][0])
    had = config.albef or AlbefFile()
    file = had.model_copy(update={"momentum": had.momentum and teacher is not None, "queue": had.queue and length > 0})
    missing = [what for what, there in (("momentum model", file.momentum), ("queue", file.queue)) if not there]
    if config.albef is None and missing:
        tell(f"it has no {' and no '.join(missing)}, so the checkpoint has none")
    if file.queue and queue is not None and len(queue["image"]) < length:
        tell(
            f"the last {length - len(queue['image']):,} of the queue's {length:,} columns were not filled: random ones"
        )
    positions = len(student[f"{STUDENT}text.bert.embeddings.position_embeddings.weight"])
    text = config.model.text.model_copy(update={"positions": positions})
    section = config.model.model_copy(update={"text": text})
    layout = AlbefLayout(section, file, config.vocabulary_size, positions, length)
    return layout, Ours(student, teacher, queue)


def _resized(layout: AlbefLayout, ours: Ours, side: int) -> tuple[AlbefLayout, Ours]:
    name, image = "image.vit.pos_embed", layout.section.image
    student = ours.student | {STUDENT + name: resize_table(ours.student[STUDENT + name], side)}
    teacher = None if ours.teacher is None else ours.teacher | {name: resize_table(ours.teacher[name], side)}
    section = layout.section.model_copy(update={"image": image.model_copy(update={"size": side * image.patch_size})})
    return (
        AlbefLayout(section, layout.file, layout.vocabulary_size, layout.positions, layout.queue_length),
        ours._replace(student=student, teacher=teacher),
    )


# ---- both


def _patches(image_size: int, section: ModelSection) -> int:
    """A side."""
    patch = section.image.patch_size
    if image_size < patch or image_size % patch:
        below = max(1, image_size // patch) * patch
        raise CheckpointError(
            f"--image-size {image_size} is no multiple of {patch}, the patches' size; take {below} or {below + patch}"
        )
    return image_size // patch


def _has_place(layout: AlbefLayout, name: str) -> bool:
    """Of one of the student's parameters."""
    if not name.startswith(STUDENT):
        return name == "temperature"
    return bool(layout.official(name.removeprefix(STUDENT)))


def _groups(names: Mapping[str, Tensor] | list[str]) -> str:
    """Parameters in a few words: those of one module once."""
    whole = ("patch_decoder", "word_head", "mask_network", "word_reader")
    found = {next((part for part in whole if f"{part}." in name), name.removeprefix(STUDENT)) for name in names}
    return ", ".join(sorted(found))


def _shape(layout: AlbefLayout) -> str:
    image, text, fusion = layout.section.image, layout.section.text, layout.section.fusion
    return (
        f"images of {image.size} × {image.size} in {image.depth} blocks, {layout.vocabulary_size:,} words in "
        f"{text.depth} + {fusion.depth} layers"
    )
