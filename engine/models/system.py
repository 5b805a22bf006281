"""A model from outside in the place of crossmask's own: what it has to offer, and nothing more.

::

    @register_system("my_clip")
    class MyClip(System):
        class Options(Section):
            depth: int = 4

        def build(self) -> nn.Module:
            return TwoTowers(self.options.depth, self.sizes.vocabulary_size, self.sizes.feature_width)

The module has two methods; whatever else it is and holds is its own affair:

=======================================================  ===============================================================
``encode_image(images)``  (B, 3, H, W)                   -> (B, E), or anything whose ``feature`` is that, such as
``encode_text(token_ids, token_mask)``  (B, L) each         :class:`Encoded` with tokens for objectives to read
=======================================================  ===============================================================

E is ``model.projection_width``; features need not have length 1. Images come in the dtype of the module's parameters.
At ZeRO stage 3 parameters should belong to submodules that are called, as DeepSpeed gathers them there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..recipe import ModelSection
from ..recipe_section import Section
from ..registry import NoOptions, systems
from .vision_language import Encoded

if TYPE_CHECKING:
    from ..data import CaptionTokenizer

T = TypeVar("T")


@dataclass(frozen=True)
class Sizes:
    """What a model must fit."""

    vocabulary_size: int
    max_tokens: int  # of the longest text, [CLS] and [SEP] included
    image_size: int  # pixels a side
    feature_width: int  # E, model.projection_width
    pad_id: int
    mask_id: int

    @classmethod
    def of(cls, section: ModelSection, tokenizer: CaptionTokenizer, max_tokens: int) -> Sizes:
        """Of a recipe's section and its data's tokenizer."""
        words = (tokenizer.pad_id, tokenizer.mask_id)
        return cls(tokenizer.vocabulary_size, max_tokens, section.image.size, section.projection_width, *words)


class System:
    """Base of the systems that plugins register: builds the model and may add losses of its own.

    Attributes:
        sizes: what the model must fit.
        options: ``model.options`` of the recipe, as ``Options``.
    """

    Options: ClassVar[type[Section]] = NoOptions
    reads_teacher: ClassVar[bool] = False  # whether losses() reads view.teacher, where ITC does not

    def __init__(self, sizes: Sizes, options: Any) -> None:
        self.sizes, self.options = sizes, options

    def build(self) -> nn.Module:
        """The model, fresh by torch's global random generator. Called for the student and again for the teacher."""
        raise NotImplementedError(f"{type(self).__name__} needs a method build() that gives its model")

    def losses(self, view: Any) -> Mapping[str, Tensor]:
        """Further losses by name, scalars, each of weight 1, beside ITC and the recipe's objectives; default none.

        ``view`` is an :class:`~crossmask.engine.objectives.ObjectiveView`.
        """
        return {}


class OwnStudent(nn.Module):
    """A system's model, and the temperature of ITC. ``model`` is paired by name with the teacher."""

    def __init__(self, model: nn.Module, temperature: float) -> None:
        super().__init__()
        self.model = model
        # One element, not none: DeepSpeed cannot broadcast a 0-d parameter.
        self.temperature = nn.Parameter(torch.tensor([temperature]))

    def forward(self, visit: Callable[[OwnStudent], T]) -> T:
        """Run ``visit(self)`` inside this module's forward, where DeepSpeed's hooks see it."""
        return visit(self)


def build_own(name: str, options: Mapping[str, Any], sizes: Sizes) -> System:
    """The system that a recipe names. RecipeError, one line, where nobody registered it, or for its options."""
    system: System = systems.find(name, "model.system").made(sizes, systems.options(name, options, "model.options"))
    if not isinstance(system, System):
        raise TypeError(f"system {name!r} is a {type(system).__name__}: derive it from crossmask.engine.System")
    return system


def build_model(system: System) -> nn.Module:
    """A system's model; TypeError where it is none that can be trained."""
    model = system.build()
    missing = [method for method in ("encode_image", "encode_text") if not hasattr(model, method)]
    if not isinstance(model, nn.Module) or missing:
        lack = f"has no {missing[0]}" if missing else "is no torch.nn.Module"
        raise TypeError(f"{type(system).__name__}.build() gives a {type(model).__name__}, which {lack}")
    return model


def encode_image(model: Any, images: Tensor) -> Encoded:
    """Images through any model with that method; the feature is float32 and of length 1."""
    return _encoded(model.encode_image(_in_its_dtype(model, images)), images.shape[:1])


def encode_text(model: Any, token_ids: Tensor, token_mask: Tensor) -> Encoded:
    """Captions, likewise."""
    return _encoded(model.encode_text(token_ids, token_mask), token_ids.shape)


def _in_its_dtype(model: Any, images: Tensor) -> Tensor:
    if hasattr(model, "patch_grid") or not isinstance(model, nn.Module):  # ours do it themselves
        return images
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), images.dtype)
    return images.to(dtype)


def _encoded(found: Any, rows: torch.Size) -> Encoded:
    """``rows``: of the tokens that there are none of, where a model gives its feature alone."""
    if isinstance(found, Encoded):
        return found
    feature = found if isinstance(found, Tensor) else getattr(found, "feature", None)
    if not isinstance(feature, Tensor):
        raise TypeError(f"a model's encode_image and encode_text give a tensor of features, not {type(found).__name__}")
    tokens = getattr(found, "tokens", None)
    empty = feature.new_empty((*rows, 0) if len(rows) > 1 else (*rows, 0, 0))
    return Encoded(empty if tokens is None else tokens, F.normalize(feature.float(), dim=-1))
