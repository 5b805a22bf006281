"""What the layouts of ``crossmask convert`` have in common: what is refused before any work, and how files appear."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .atomic import flush
from .data import CaptionTokenizer
from .errors import CheckpointError
from .export_config import DTYPES

Tell = Callable[[str], None]


def refuse_existing(*paths: Path, force: bool) -> None:
    """CheckpointError where one of the files to write is there already and may not be replaced."""
    for path in paths:
        if path.is_dir() or (path.exists() and not force):
            how = "choose another name" if path.is_dir() else "replace it with --force, or choose another name"
            raise CheckpointError(f"{path} is there already; {how}")


def refuse_other_layouts(source: Path, layout: str, fields: Mapping[str, tuple[Any, Any]]) -> None:
    """CheckpointError names every field in which a model is not of a ``layout``: each has its own value and that of the
    layout."""

    def shown(value: object) -> str:
        return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)

    if others := {name: values for name, values in fields.items() if values[0] != values[1]}:
        told = "; ".join(f"{name} is {shown(own)}, there it is {shown(there)}" for name, (own, there) in others.items())
        raise CheckpointError(
            f"{source} is not of {layout} layout: {told}; train with {'this' if len(others) == 1 else 'these'} for it,"
            " or use crossmask export, which keeps every model as it is"
        )


def open_vocabulary(file: Path | None, size: int, source: Path) -> CaptionTokenizer | None:
    """The tokenizer of ``--vocabulary``; CheckpointError where it has not as many tokens as ``source`` reads."""
    if file is None:
        return None
    tokenizer = CaptionTokenizer.from_vocabulary(file)
    if tokenizer.vocabulary_size != size:
        raise CheckpointError(
            f"--vocabulary {file} has {tokenizer.vocabulary_size:,} tokens and {source} {size:,}; give the one that it"
            " was trained with"
        )
    return tokenizer


def dtype_name(dtype: torch.dtype, source: Path) -> str:
    """As an export has it; CheckpointError where no export can be in it."""
    for name, known in DTYPES.items():
        if known is dtype:
            return name
    raise CheckpointError(f"{source} is in {str(dtype).removeprefix('torch.')}; give it in float32")


def tell_of_odd_numbers(state: Mapping[str, Tensor], tell: Tell) -> None:
    """A line where some are not finite."""
    if odd := [name for name, x in state.items() if x.is_floating_point() and not bool(x.isfinite().all())]:
        tell(f"infinite or no numbers, with which no run can start: {', '.join(odd[:3])}{', …' * (len(odd) > 3)}")


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """Give a file to write, which takes the place of ``target`` once it is whole and on the disk.

    Raises:
        CheckpointError: it cannot be written.
    """
    part = target.with_name(f"{target.name}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield part
        flush(part)
        os.replace(part, target)
        flush(target.parent)
    except (OSError, RuntimeError) as error:  # torch's zip writer turns a full disk into a RuntimeError
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:120]
        raise CheckpointError(f"{target} cannot be written: {reason}; make room, or choose another name") from None
    finally:
        if part.is_file():
            part.unlink()
