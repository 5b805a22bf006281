"""Errors that a user can cause and mend.

The command line turns every :class:`UserError` into one line on the screen and a non-zero exit code;
anything else is a programming error and keeps its traceback.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f]")


class UserError(Exception):
    """A mistake in what the user gave us. The message is one line: the culprit, then the remedy."""


class RecipeError(UserError):
    """A recipe, an override or a DeepSpeed configuration that cannot be used."""


class DataError(UserError):
    """A data source, an image or a caption that cannot be used."""


class CheckpointError(UserError):
    """A run folder or a checkpoint that cannot be used."""


class NonFiniteLossError(UserError):
    """Too many steps in a row had a loss that is not a finite number."""


def printable(line: str) -> str:
    """With control characters spelt out: the name of a file may have some, and a terminal would obey them."""
    return _CONTROL.sub(lambda found: ascii(found.group())[1:-1], line)


def nearest(word: str, candidates: Iterable[str]) -> str | None:
    """The candidate most like ``word``, or None when nothing comes close."""
    found = difflib.get_close_matches(word, list(candidates), n=1, cutoff=0.5)
    return found[0] if found else None
