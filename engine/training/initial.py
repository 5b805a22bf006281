"""The weights that a new run starts from, where its recipe names some."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..beats import beat
from ..data import CaptionTokenizer
from ..errors import CheckpointError, RecipeError
from ..models import PretrainingModel
from ..models.captioner_student import CaptioningStudent
from ..models.initial import load_image_weights, load_text_weights
from ..models.positions import resize_table
from ..recipe import ModelSection, Recipe
from .stored import StoredModel, read_stored

SHARED = "model."  # before the teacher's names in the student
# Parameters that a run may have and its beginning not, or with another shape: they are new then.
_OPTIONAL = (
    *("temperature", "patch_decoder.", f"{SHARED}mask_network.", f"{SHARED}word_reader.", f"{SHARED}classifier."),
    *(f"{SHARED}image_decoder.", f"{SHARED}pixel_head."),
)
# What the shapes, and the meaning, of weights depend on. Sizes of images and tables may differ: they are adapted.
_FIELDS = {
    "image": ("patch_size", "width", "depth", "heads", "mlp_ratio", "stem"),
    "text": ("width", "depth", "heads", "mlp_ratio"),
    "fusion": ("depth", "heads", "mlp_ratio", "qk_norm", "norm"),
    "captioner": ("depth", "heads", "mlp_ratio", "qk_norm", "pooler", "norm_pre", "quick_gelu", "cls_mask"),
    "": ("projection_width", "pool"),
}
_IMAGE_TABLE = "image.vit.pos_embed"
_TEXT_TABLES = tuple(f"text.bert.embeddings.{table}_embeddings.weight" for table in ("position", "token_type"))
_CAPTION_TABLE = "text.position_embeddings"  # a captioner's; [CLS] has the last row, where there is one


class Initial:
    """Fills a fresh student, and keeps what teacher and queue start from."""

    def __init__(self, student: nn.Module, recipe: Recipe, tokenizer: CaptionTokenizer) -> None:
        """Draws no random numbers.

        Raises:
            RecipeError: fields that contradict each other.
            CheckpointError: files that cannot be read, or that are of another model or vocabulary; one line.
        """
        self.teacher: dict[str, Tensor] | None = None  # whole; None: the student's
        self.queue: dict[str, Tensor] | None = None  # FeatureQueue.state_dict; None: as the recipe says
        self.notices: list[str] = []  # lines on what is new all the same
        section = recipe.model
        fields = {"model.image.weights": section.image.weights, "model.text.weights": section.text.weights}
        if section.initial is not None:
            for name, path in fields.items():
                if path is not None:
                    raise RecipeError(f"{name}: model.initial gives all weights already; leave one of the two out")
            beat("reading model.initial")
            try:
                stored = self._read(recipe)
                self._check(stored, section, tokenizer)
            except CheckpointError as error:
                raise CheckpointError(f"model.initial: {error}") from None
            self._fill(student, stored, recipe)
        if section.image.weights is not None:
            assert isinstance(student, (PretrainingModel, CaptioningStudent))
            load_image_weights(student.model.image, section.image.weights)
        if section.text.weights is not None:
            assert isinstance(student, PretrainingModel)  # a captioner's recipe names no BERT
            self.notices += load_text_weights(student.model, section, section.text.weights)

    @staticmethod
    def _read(recipe: Recipe) -> StoredModel:
        path = recipe.model.initial
        assert path is not None
        if path.is_file():
            raise CheckpointError(f"{path} is a file; make a folder of it with: crossmask convert albef {path} FOLDER")
        return read_stored(path)

    @staticmethod
    def _check(stored: StoredModel, section: ModelSection, tokenizer: CaptionTokenizer) -> None:
        folder, theirs = section.initial, stored.config.model
        if theirs.system != section.system or theirs.options != section.options:
            has, asked = (f"{m.system or 'none'} with {m.options}" for m in (theirs, section))
            raise CheckpointError(f"{folder} is of model.system {has}, the recipe has {asked}; take another folder")
        if (theirs.captioner is None) != (section.captioner is None):
            kinds = ("a fusion model", "a captioner")
            their_kind, own_kind = kinds if theirs.captioner is None else kinds[::-1]
            raise CheckpointError(f"{folder} is {their_kind}, the recipe has {own_kind}; take another folder or recipe")
        found = []
        for part, names in _FIELDS.items():
            if part == ("fusion" if section.captioner is not None else "captioner") or (part and section.system):
                continue
            one, two = (getattr(model, part) if part else model for model in (theirs, section))
            found += [
                (f"model.{part}.{name}" if part else f"model.{name}", getattr(one, name), getattr(two, name))
                for name in names
                if getattr(one, name) != getattr(two, name)
            ]
        if found:
            shown = ", ".join(f"{name}={value}" for name, value, _ in found[:3])
            own = ", ".join(str(value) for _, _, value in found[:3])
            more = f" and {len(found) - 3} more" if len(found) > 3 else ""
            raise CheckpointError(
                f"{folder} was made with {shown}{more}, the recipe has {own}; set the recipe's to that, or take another"
            )
        config, size = stored.config, tokenizer.vocabulary_size
        remedy = "set data.vocabulary to the vocab.txt that it was trained with, or train on its own captions"
        if config.vocabulary_size != size:
            raise CheckpointError(f"{folder} knows {config.vocabulary_size:,} words, the data have {size:,}; {remedy}")
        if config.mask_id != tokenizer.mask_id:
            raise CheckpointError(
                f"{folder} has [MASK] as word {config.mask_id}, the data as word {tokenizer.mask_id}; {remedy}"
            )
        if stored.tokenizer is not None:
            both = zip(*(one.words(range(size)) for one in (stored.tokenizer, tokenizer)), strict=True)
            other = next(((i, a, b) for i, (a, b) in enumerate(both) if a != b), None)
            if other is not None:
                number, word, own_word = other
                raise CheckpointError(
                    f"{folder} has other words than the data: number {number} is {word!r}, not {own_word!r}; {remedy}"
                )

    def _fill(self, student: nn.Module, stored: StoredModel, recipe: Recipe) -> None:
        own = student.state_dict()
        given = stored.student
        if given is None:
            assert stored.teacher is not None
            given = {SHARED + name: x for name, x in stored.teacher.items()}
        student.load_state_dict(self._adapted(own, given, str(recipe.model.initial)))
        if stored.teacher is not None:
            now = {name: x for name, x in student.state_dict().items() if name.startswith(SHARED)}
            teacher = {SHARED + name: x for name, x in stored.teacher.items()}
            adapted = self._adapted(now, teacher, f"the teacher of {recipe.model.initial}", quiet=True)
            self.teacher = {name.removeprefix(SHARED): x for name, x in adapted.items()}
        length = recipe.objectives.itc.queue_length
        if stored.queue is not None and length and len(stored.queue["image"]):
            self.queue = _latest(stored.queue, length)

    def _adapted(
        self, own: dict[str, Tensor], given: dict[str, Tensor], where: str, quiet: bool = False
    ) -> dict[str, Tensor]:
        """``own`` with the values of ``given``, tables made to fit; what is new is noted, unless ``quiet``."""
        found, new, text = dict(own), set(), set()
        classifier = f"{SHARED}classifier."
        classes, others = (side.get(f"{classifier}names") for side in (own, given))
        if classes is None or others is None or not torch.equal(classes, others):  # a row is worth its own class alone
            given = {name: x for name, x in given.items() if not name.startswith(classifier)}
        for name, mine in own.items():
            value = given.get(name)
            if value is not None and name.endswith(_IMAGE_TABLE):
                value = resize_table(value, round((mine.shape[1] - 1) ** 0.5))
            elif value is not None and name.endswith(_TEXT_TABLES):
                if len(value) < len(mine):
                    text.add(f"{len(mine) - len(value)} of {len(mine)} rows of {name.removeprefix(SHARED)}")
                value = torch.cat([value[: len(mine)].to(mine), mine[len(value) :]])
            elif value is not None and name.endswith(_CAPTION_TABLE):
                cls = int(name.replace("position", "cls") in own)
                rows, theirs = len(mine) - cls, len(value) - cls
                if theirs < rows:
                    text.add(f"{rows - theirs} of {rows} rows of {name.removeprefix(SHARED)}")
                value = torch.cat([value[: min(rows, theirs)].to(mine), mine[theirs:rows], value[theirs:].to(mine)])
            if value is not None and value.shape == mine.shape:
                found[name] = value.to(mine, copy=True)
            elif name.startswith(_OPTIONAL):
                new.add(next(part for part in _OPTIONAL if name.startswith(part)).strip("."))
            else:
                shown = "missing" if value is None else f"{tuple(value.shape)}, not {tuple(mine.shape)}"
                raise CheckpointError(f"model.initial: {where}: {name} is {shown}; take another folder")
        for name in given.keys() - own.keys():
            if not name.startswith(_OPTIONAL):
                raise CheckpointError(
                    f"model.initial: {where} has {name}, which the model has not; take another folder"
                )
        if (new or text) and not quiet:
            names = sorted(name.removeprefix(SHARED) for name in new | text)
            self.notices.append(f"model.initial: new, as they were not to be had there: {', '.join(names)}")
        return found


def _latest(queue: dict[str, Tensor], length: int) -> dict[str, Tensor]:
    """The state of a queue of ``length`` rows with the latest of ``queue``'s. Whose they are is not known among other
    data, so they are nobody's match."""
    count, (before, pointer) = len(queue["image"]), (int(x) for x in queue["position"])
    oldest = pointer if count == before else 0
    order = (torch.arange(count) + oldest)[max(0, count - length) :] % count
    kept = len(order)
    return {
        "image": queue["image"][order].float(),
        "text": queue["text"][order].float(),
        "group_id": torch.full((kept,), -1, dtype=torch.int64),
        "position": torch.tensor([length, kept % length]),
    }
