"""Files of weights that other code wrote, opened without running any of it."""

from __future__ import annotations

import pickle
import re
import textwrap
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..beats import beat
from ..errors import CheckpointError, nearest

Tell = Callable[[str], None]


def read_state_dict(path: Path, tell: Tell = lambda line: None, under: Sequence[str] = ("model",)) -> dict[str, Any]:
    """The state dict of a safetensors file, or of one of ``torch.save``, there or under the first of ``under`` that is
    in it, mapped into memory.

    Nothing but data is unpickled. ``tell`` takes a line on what else is in the file.

    Raises:
        CheckpointError: no such file, or one that is no checkpoint, is cut off, or holds more than data.
    """
    try:
        with path.open("rb") as file:
            begin = file.read(200)
    except OSError as error:
        beside = path.parent.glob("*.pt*") if path.parent.is_dir() else ()
        close = nearest(path.name, [other.name for other in beside])
        hint = f"did you mean {path.parent / close}?" if close else "check the path"
        raise CheckpointError(f"{path} cannot be read: {error.strerror}; {hint}") from None
    if begin.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{path} is a Git LFS pointer, not the file it stands for; fetch that with: git lfs pull")
    if begin.lstrip()[:1] == b"<":
        raise CheckpointError(f"{path} is a web page, not a checkpoint; download the file itself")
    beat("reading weights")
    if path.suffix == ".safetensors":
        return dict(_load_safetensors(path))
    loaded = _load(path)
    found = loaded if isinstance(loaded, Mapping) else {}
    place = next((name for name in under if isinstance(found.get(name), Mapping)), None)
    if place is not None:
        if others := [str(name) for name in loaded if name != place]:
            tell(f"left out, beside the model: {', '.join(sorted(others))}")
        loaded = loaded[place]
    if not isinstance(loaded, Mapping) or not any(isinstance(value, Tensor) for value in loaded.values()):
        what = f"a {type(loaded).__name__}"
        if isinstance(loaded, (Mapping, Sequence)):
            what += f" of {len(loaded)} entries"
        raise CheckpointError(f"{path} holds {what}, not a state dict, nor one under '{under[0]}'")
    return {str(name): value for name, value in loaded.items()}


def _load(path: Path) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what is refused below
            try:
                return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
            except RuntimeError as error:
                if "mmap can only be used" not in str(error):
                    raise
                return torch.load(path, map_location="cpu", weights_only=True)  # the format of before torch 1.6
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))
        if named:
            raise CheckpointError(
                f"{path} holds more than data: it names {named[1]}, which could run code; it was not opened"
            ) from None
        raise CheckpointError(f"{path} is no checkpoint of torch.save, or is cut off; download it again") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from None
    except Exception as error:  # whatever a strange file makes the reader stumble over
        raise CheckpointError(
            f"{path} is no checkpoint of torch.save, or is cut off{_reason(error)}; download it again"
        ) from None


def _load_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{path} is no safetensors file, or is cut off{_reason(error)}; download it again"
        ) from None


def _reason(error: Exception) -> str:
    """In brackets, cut between words; nothing where the reader says nothing."""
    said = textwrap.shorten(str(error), 120, placeholder=" …")
    return f" ({said})" if said else ""
