"""The layout of ALBEF's official checkpoints (Li et al. 2021): names and shapes of its state dict, and ours, bitwise.

Theirs has a BERT whose first layers are the text tower and whose others, with cross-attention, are the fusion encoder;
queries, keys and values of its attentions are apart, and each part that has a momentum model is there again as ``*_m``.
Pre-training and retrieval differ: the latter has no ``bert.`` in its names and no word head, and its queue has ids.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from ..recipe import ModelSection, ObjectivesSection, Section
from .pretraining import build_patch_decoder
from .vision_language import VisionLanguageModel, build_word_head

QUEUES = ("image_queue", "text_queue", "queue_ptr")
QUEUE_IDS, NO_ID = "idx_queue", -1
STUDENT = "model."  # before what the teacher has as well, in the student's names
PARTS = ("visual_encoder", "text_encoder", "vision_proj", "text_proj", "itm_head")
WORDS = "text_encoder.cls.predictions."
_NAMES = {  # ours -> theirs, by how a name begins
    "image.vit.": "visual_encoder.",
    "image_projection.": "vision_proj.",
    "text_projection.": "text_proj.",
    "match_head.": "itm_head.",
    "word_head.0.": f"{WORDS}transform.dense.",
    "word_head.2.": f"{WORDS}transform.LayerNorm.",
    "word_bias": f"{WORDS}bias",
}
_LAYER_NAMES = {  # the same within a layer of the fusion encoder
    "self_attention.query.": ("attention.self.query.",),
    "self_attention.key_value.": ("attention.self.key.", "attention.self.value."),
    "self_attention.output.": ("attention.output.dense.",),
    "self_norm.": ("attention.output.LayerNorm.",),
    "cross_attention.query.": ("crossattention.self.query.",),
    "cross_attention.key_value.": ("crossattention.self.key.", "crossattention.self.value."),
    "cross_attention.output.": ("crossattention.output.dense.",),
    "cross_norm.": ("crossattention.output.LayerNorm.",),
    "feed_forward.0.": ("intermediate.dense.",),
    "feed_forward.2.": ("output.dense.",),
    "feed_norm.": ("output.LayerNorm.",),
}


class AlbefFile(Section):
    """What a checkpoint in ALBEF's layout has; not all have all."""

    bert: bool = Field(True, description="names begin text_encoder.bert., in retrieval text_encoder.")
    words: bool = Field(True, description="the word head")
    decoder_weight: bool = Field(True, description="the word embeddings once more")
    decoder_bias: bool = Field(True, description="the bias of the word head once more")
    position_ids: bool = Field(True, description="0, 1, 2 …")
    momentum: bool = Field(True, description="the momentum model")
    queue: bool = Field(True, description="the momentum queue")
    queue_ids: bool = Field(False, description="ids of the queue's columns")


class Ours(NamedTuple):
    """What a checkpoint holds, by our names."""

    student: dict[str, Tensor]  # of PretrainingModel, as far as the layout has it
    teacher: dict[str, Tensor] | None  # of VisionLanguageModel, likewise
    queue: dict[str, Tensor] | None  # of FeatureQueue.state_dict


def official_names(name: str, text_depth: int, file: AlbefFile) -> tuple[str, ...]:
    """ALBEF's names for a parameter of :class:`VisionLanguageModel` with ``text_depth`` layers of BERT in the text
    tower; () = it has no place there."""
    bert = "text_encoder.bert." if file.bert else "text_encoder."
    layer = re.fullmatch(r"fusion\.layers\.(\d+)\.(.+)", name)
    if layer:
        number = text_depth + int(layer[1])
        begin, parts = next((ours, theirs) for ours, theirs in _LAYER_NAMES.items() if layer[2].startswith(ours))
        return tuple(f"{bert}encoder.layer.{number}.{part}{layer[2].removeprefix(begin)}" for part in parts)
    if name.startswith("text.bert."):
        return (bert + name.removeprefix("text.bert."),)
    for begin, theirs in _NAMES.items():
        if name.startswith(begin):
            return (theirs + name.removeprefix(begin),) if file.words or not theirs.startswith(WORDS) else ()
    return ()


@dataclass(frozen=True)
class AlbefLayout:
    """One model in the layout."""

    section: ModelSection
    file: AlbefFile
    vocabulary_size: int
    positions: int
    queue_length: int
    shapes: dict[str, torch.Size] = field(init=False, repr=False)  # of our parameters, the shared half

    def __post_init__(self) -> None:
        with torch.device("meta"):
            model = VisionLanguageModel(self.section, self.vocabulary_size, self.positions)
        object.__setattr__(self, "shapes", {name: value.shape for name, value in model.named_parameters()})

    def official(self, name: str) -> tuple[str, ...]:
        """Their names for our shared parameter, whose rows they have one after another; () = it has no place there."""
        return official_names(name, self.section.text.depth, self.file)

    @property
    def _bert(self) -> str:
        return "text_encoder.bert." if self.file.bert else "text_encoder."

    @property
    def _word_embeddings(self) -> str:
        return f"{self._bert}embeddings.word_embeddings.weight"

    def copies(self) -> Iterator[tuple[str, str]]:
        """A name of theirs, and the name of the tensor that it repeats."""
        if self.file.words and self.file.decoder_weight:
            yield f"{WORDS}decoder.weight", self._word_embeddings
        if self.file.words and self.file.decoder_bias:
            yield f"{WORDS}decoder.bias", f"{WORDS}bias"

    def official_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every name of the file, with its shape, in the file's order."""
        queue: dict[str, tuple[int, ...]] = {}
        if self.file.queue:
            columns = (self.section.projection_width, self.queue_length)
            queue = dict(zip(QUEUES, (columns, columns, (1,)), strict=True))
            queue |= {QUEUE_IDS: (1, self.queue_length)} if self.file.queue_ids else {}
        found: dict[str, tuple[int, ...]] = {}
        for name, shape in self.shapes.items():
            parts = self.official(name)
            found |= {part: (shape[0] // len(parts), *shape[1:]) for part in parts}
        if self.file.position_ids:
            found[f"{self._bert}embeddings.position_ids"] = (1, self.positions)
        found |= {name: found[repeated] for name, repeated in self.copies()}
        student = dict(sorted(found.items(), key=lambda item: PARTS.index(item[0].partition(".")[0])))
        momentum = {twin(name): shape for name, shape in student.items() if not name.startswith("itm_head.")}
        return {"temp": ()} | queue | student | (momentum if self.file.momentum else {})

    def to_ours(self, state: Mapping[str, Tensor]) -> Ours:
        """Of a state dict that :func:`recognise` gave this layout for. New tensors, or ``state``'s own."""
        halves: list[dict[str, Tensor]] = []
        for of in (str, twin) if self.file.momentum else (str,):
            half = {}
            for name in self.shapes:
                if parts := self.official(name):
                    # the match head has no momentum: the student's
                    tensors = [state[part if part.startswith("itm_head.") else of(part)] for part in parts]
                    half[name] = torch.cat(tensors) if len(tensors) > 1 else tensors[0]
            halves.append(half)
        student = {STUDENT + name: value for name, value in halves[0].items()}
        student["temperature"] = state["temp"].reshape(1)
        queue = None
        if self.file.queue:
            image, text, pointer = (state[name] for name in QUEUES)
            ids = state[QUEUE_IDS][0] if self.file.queue_ids else torch.full((self.queue_length,), NO_ID)
            position = torch.tensor([self.queue_length, int(pointer)])
            queue = {"image": image.T.contiguous(), "text": text.T.contiguous(), "group_id": ids, "position": position}
        return Ours(student, halves[1] if self.file.momentum else None, queue)

    def to_official(self, ours: Ours) -> dict[str, Tensor]:
        """The state dict; what has no place in it is left out, and what a queue lacks becomes random directions."""
        found: dict[str, Tensor] = {"temp": ours.student["temperature"].reshape(())}
        for half, of in ((_shared(ours.student), str), (ours.teacher if self.file.momentum else None, twin)):
            if half is None:
                continue
            for name in self.shapes:
                parts = self.official(name)
                if parts and not (of is twin and name.startswith("match_head.")):
                    found |= zip(map(of, parts), half[name].chunk(len(parts)), strict=True)
            found |= {of(name): found[of(repeated)] for name, repeated in self.copies()}
            if self.file.position_ids:
                found[of(f"{self._bert}embeddings.position_ids")] = torch.arange(self.positions)[None]
        if self.file.queue:
            assert ours.queue is not None
            for name, mine in zip(QUEUES, ("image", "text"), strict=False):
                found[name] = _filled(ours.queue[mine], self.queue_length, name).T
            found["queue_ptr"] = ours.queue["position"][1:].clone()
            if self.file.queue_ids:
                found[QUEUE_IDS] = ours.queue["group_id"][None]
        return {name: _alone(found[name]) for name in self.official_shapes()}


def twin(name: str) -> str:
    """The momentum model's: visual_encoder.norm.bias -> visual_encoder_m.norm.bias"""
    part, dot, rest = name.partition(".")
    return f"{part}_m{dot}{rest}"


def _shared(student: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(STUDENT): value for name, value in student.items() if name.startswith(STUDENT)}


def _alone(tensor: Tensor) -> Tensor:
    """A file holds all of the memory that a tensor is a part of."""
    if tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes:
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


def _filled(rows: Tensor, length: int, name: str) -> Tensor:
    generator = torch.Generator().manual_seed(QUEUES.index(name))
    rest = torch.randn(length - len(rows), rows.shape[1], generator=generator)
    return torch.cat([rows, F.normalize(rest, dim=1).to(rows.dtype)])


def fresh(layout: AlbefLayout, objectives: ObjectivesSection, dtype: torch.dtype) -> dict[str, Tensor]:
    """Of the student what the layout, or the file, has no place for: always the same values."""
    found: dict[str, Tensor] = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        found[f"{STUDENT}image.mask_token"] = 0.02 * torch.randn(layout.section.image.width)
        decoder = build_patch_decoder(layout.section, objectives)
        found |= {f"patch_decoder.{name}": value for name, value in decoder.state_dict().items()}
        if not layout.file.words:
            head = build_word_head(layout.section)
            found |= {f"{STUDENT}word_head.{name}": value for name, value in head.state_dict().items()}
            found[f"{STUDENT}word_bias"] = torch.zeros(layout.vocabulary_size)
    return {name: value.to(dtype) for name, value in found.items()}
