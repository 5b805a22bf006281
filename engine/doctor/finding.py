"""One line of the doctor's report, and how what was found is told in few words."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Level = Literal["fine", "optional", "gap", "broken"]
INSTALL = "make install, or pip install -c constraints.txt -e ."
GIB = 2**30


@dataclass(frozen=True)
class Finding:
    """``gap``: something is slower, absent or silently changed; ``broken``: training cannot run. Both have a remedy."""

    what: str
    here: str
    level: Level = "fine"
    remedy: str = ""


def size(count: float) -> str:
    """A number of bytes in words, with a digit behind the point where it is small."""
    gib = count / GIB
    if gib < 1:
        return f"{count / 2**20:.0f} MiB"
    return f"{gib:,.0f} GiB" if gib >= 10 else f"{gib:.1f} GiB"


def one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def quietly(call: Callable[[], object]) -> object:
    """What a call returns, or its error as one line; nothing it logs, warns of or prints reaches the screen."""
    logging.disable(logging.CRITICAL)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            return call()
    except (Exception, SystemExit) as error:  # a broken library may raise anything, and some end the process
        return one_line(error)
    finally:
        logging.disable(logging.NOTSET)
