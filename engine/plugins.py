"""Modules that bring parts of their own: those that a recipe names, and those that installed packages announce.

Importing a module runs its code. So only what the user starts may name one: a recipe, an override, a run that is
resumed. A model's folder, which may be somebody else's, names parts and never leads to an import.
"""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from collections.abc import Sequence
from functools import cache

from .errors import RecipeError

GROUP = "crossmask.parts"  # of entry points: NAME = "module"


def import_plugins(modules: Sequence[str], where: str = "plugins") -> None:
    """Import each by its dotted name; the folder that one stands in is looked through last.

    Raises:
        RecipeError: it cannot be imported; one line with the module and the reason. CROSSMASK_VERBOSE=1 shows where.
    """
    for name in modules:
        if name in sys.modules:
            continue
        here = os.getcwd()
        if here not in sys.path and "" not in sys.path:
            sys.path.append(here)  # as under python -m; behind all that is installed
        try:
            importlib.import_module(name)
        except (KeyboardInterrupt, GeneratorExit):
            raise
        except BaseException as error:  # whatever another's code may raise, SystemExit too
            raise RecipeError(_reason(name, error, where)) from None


@cache
def import_announced() -> None:
    """Import the parts of installed packages, once a process. One that cannot be imported is a RecipeError."""
    from importlib.metadata import entry_points

    for entry in sorted(entry_points(group=GROUP), key=lambda entry: entry.name):
        import_plugins([entry.module], f"entry point {entry.name} of {GROUP}")


def _reason(name: str, error: BaseException, where: str) -> str:
    if os.environ.get("CROSSMASK_VERBOSE", "0") not in ("", "0"):
        traceback.print_exception(error)
    if isinstance(error, ModuleNotFoundError) and error.name is not None and f"{name}.".startswith(f"{error.name}."):
        return f"{where}: there is no module {name}; install it, or start where it lies (PYTHONPATH finds it, too)"
    said = " ".join(f"{type(error).__name__}: {error}".split()).removesuffix(":")
    return f"{where}: module {name} cannot be imported: {said[:200]}; mend it (CROSSMASK_VERBOSE=1 shows where)"
