"""Whole training steps, end to end: recipes of this package, the same steps as others write them, several ranks.

Each entry of ``STEPS`` is measured in a process of its own (``one.py``), so that its memory is its own and neither its
end nor its length is the suite's. A recipe's step is that of one rank, with its share of the batch and all cores of the
machine: several ranks are what ``scaling`` is for. ``syncmask-emoji-long`` is left out, whose step is the one of
``syncmask-emoji``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from ..results import Row
from .planned import Options
from .process import in_own_process

__all__ = ["RECIPES", "STEPS", "Options"]

RECIPES = (
    *("albef-emoji", "syncmask-emoji", "syncmask-scenes", "sycoca-emoji"),
    *("albef-retrieval-emoji", "composed-emoji", "recognition-emoji"),
)
NAMES = (*(f"recipe {name}" for name in RECIPES), "albef-base", "coca", "scaling")
STEPS: dict[str, Callable[[Options], list[Row]]] = {name: partial(in_own_process, name) for name in NAMES}
