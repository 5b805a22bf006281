"""Pre-training with momentum teachers on DeepSpeed. Importing this costs nothing: names are looked up on first use."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .errors import UserError
    from .recipe import Recipe
    from .recipe_files import dump_recipe, load_recipe

__all__ = ["Recipe", "UserError", "dump_recipe", "load_recipe"]

_homes = {"UserError": ".errors", "Recipe": ".recipe", "dump_recipe": ".recipe_files", "load_recipe": ".recipe_files"}


def __getattr__(name: str) -> Any:
    if name not in _homes:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_homes[name], __name__), name)
