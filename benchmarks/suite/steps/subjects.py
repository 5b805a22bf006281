"""What measures the entries, by name. Apart from the names, since this imports the whole engine."""

from __future__ import annotations

from . import RECIPES
from .albef import AlbefBase
from .coca import Coca
from .planned import Subject
from .recipes import RecipeStep
from .scaling import Scaling

SUBJECTS: dict[str, Subject] = {
    **{f"recipe {name}": RecipeStep(name) for name in RECIPES},
    "albef-base": AlbefBase(),
    "coca": Coca(),
    "scaling": Scaling(),
}
