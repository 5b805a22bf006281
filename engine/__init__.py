"""Pre-training with momentum teachers on DeepSpeed. Importing this costs nothing: names are looked up on first use."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .data import Batch, CaptionTokenizer, EvaluationSplit, PairData, PairList, load_data
    from .errors import CheckpointError, DataError, NonFiniteLossError, RecipeError, UserError
    from .exported import load_exported, prepare_images, prepare_texts
    from .masking import Policy, choose_masks, register_policy
    from .models import Encoded
    from .models.system import Sizes, System
    from .objectives import ObjectiveView
    from .recipe import Recipe
    from .recipe_files import dump_recipe, load_recipe
    from .recipe_section import Section
    from .registry import register_objective, register_source, register_system
    from .teacher import EmaTeacher, Teacher
    from .training.loop import pretrain
    from .training.pretrainer import Pretrainer, StepDetails

_homes = {
    ".data": ("Batch", "CaptionTokenizer", "EvaluationSplit", "PairData", "PairList", "load_data"),
    ".errors": ("CheckpointError", "DataError", "NonFiniteLossError", "RecipeError", "UserError"),
    ".exported": ("load_exported", "prepare_images", "prepare_texts"),
    ".masking": ("Policy", "choose_masks", "register_policy"),
    ".models": ("Encoded",),
    ".models.system": ("Sizes", "System"),
    ".objectives": ("ObjectiveView",),
    ".recipe": ("Recipe",),
    ".recipe_files": ("dump_recipe", "load_recipe"),
    ".recipe_section": ("Section",),
    ".registry": ("register_objective", "register_source", "register_system"),
    ".teacher": ("EmaTeacher", "Teacher"),
    ".training.loop": ("pretrain",),
    ".training.pretrainer": ("Pretrainer", "StepDetails"),
}
_home = {name: module for module, names in _homes.items() for name in names}

__all__ = [
    "Batch",
    "CaptionTokenizer",
    "CheckpointError",
    "DataError",
    "EmaTeacher",
    "Encoded",
    "EvaluationSplit",
    "NonFiniteLossError",
    "ObjectiveView",
    "PairData",
    "PairList",
    "Policy",
    "Pretrainer",
    "Recipe",
    "RecipeError",
    "Section",
    "Sizes",
    "StepDetails",
    "System",
    "Teacher",
    "UserError",
    "choose_masks",
    "dump_recipe",
    "load_data",
    "load_exported",
    "load_recipe",
    "prepare_images",
    "prepare_texts",
    "pretrain",
    "register_objective",
    "register_policy",
    "register_source",
    "register_system",
]


def __getattr__(name: str) -> Any:
    if name not in _home:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_home[name], __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
