"""The attention layers of a Transformers model: which there are, what they attend to, and which a name selects."""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Callable, Collection, Iterator
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

IMPLEMENTATION = "crossmask"  # what the implementation is called in Transformers
ADAPTED: set[type[nn.Module]] = set()  # classes off the shared interface whose forward we replaced
_INTERFACE = "ALL_ATTENTION_FUNCTIONS"  # the name by which a model's code looks the implementation up
_CROSS = re.compile(r"cross|enc(oder)?_?attn|encoder_attention|EncDec", re.IGNORECASE)
_HOLDERS = {"self", "attention", "attn", "fn"}  # names that say nothing; the parent's does: crossattention.self


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside torch.compile's and data parallelism's wrappers, whose names carry no prefix."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and type(model).__name__ in {"DistributedDataParallel", "DataParallel", "DeepSpeedEngine"}:
            inner = model.module
        if inner is None:
            return model
        model = inner


def attention_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Name → module, in the model's order, of every layer that calls the shared interface or that we adapted."""
    return {name: module for name, module in unwrap(model).named_modules() if _is_attention(type(module))}


def _is_attention(kind: type[nn.Module]) -> bool:
    if kind in ADAPTED:
        return True
    forward: Callable[..., Any] = inspect.unwrap(kind.forward)
    code = getattr(forward, "__code__", None)
    return code is not None and _INTERFACE in code.co_names


def is_cross(name: str, module: nn.Module) -> bool:
    """Whether a layer attends to something else than its own input, by what its model calls it."""
    parts = name.split(".")
    while len(parts) > 1 and parts[-1] in _HOLDERS:
        parts.pop()
    return bool(_CROSS.search(parts[-1]) or re.search("Cross", type(module).__name__))


def config_of(model: nn.Module, name: str) -> Any:
    """The configuration nearest to a layer that names an attention implementation, or None."""
    model = unwrap(model)
    while True:
        config = getattr(model.get_submodule(name), "config", None)
        if hasattr(config, "_attn_implementation") or not name:
            return config
        name = name.rpartition(".")[0]


def foreign_attention(model: nn.Module) -> str:
    """Why nothing of a model can be used, in one line that names its attention."""
    own = unwrap(model)
    found = sorted({type(m).__name__ for m in own.modules() if re.search("Attention$|Attn$", type(m).__name__)})
    what = f"its attention is its own code ({', '.join(found[:4])})" if found else "it has no attention that we know"
    return (
        f"{type(own).__name__} is not on Transformers' shared attention interface: {what}, which crossmask cannot run"
    )


def select(model: nn.Module, wanted: str | Collection[str]) -> dict[str, nn.Module]:
    """The attention layers that names, parents' names, ``fnmatch`` patterns, ``"cross"`` or ``"self"`` select.

    Raises:
        ValueError: there is no such layer (with the closest names), or nothing in the model can be selected.
    """
    layers = attention_layers(model)
    if not layers:
        raise ValueError(foreign_attention(model))
    every = [name for name, _ in unwrap(model).named_modules() if name]
    patterns = [wanted] if isinstance(wanted, str) else list(wanted)
    if not patterns:
        raise ValueError("layers is empty: name attention layers, a pattern of names, 'cross' or 'self'")
    chosen: set[str] = set()
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(f"layers must be names or patterns, got {pattern!r}")
        found = set(_match(pattern, layers, every))
        if not found:
            raise ValueError(_nothing(pattern, layers, every))
        chosen |= found
    return {name: module for name, module in layers.items() if name in chosen}


def _match(pattern: str, layers: dict[str, nn.Module], every: list[str]) -> Iterator[str]:
    if pattern in {"cross", "self"} and pattern not in every:
        yield from (name for name, module in layers.items() if is_cross(name, module) == (pattern == "cross"))
        return
    matched = {name for name in every if name == pattern or fnmatchcase(name, pattern)}
    for name in layers:
        parents = name.split(".")
        if any(".".join(parents[:length]) in matched for length in range(1, len(parents) + 1)):
            yield name


def _nothing(pattern: str, layers: dict[str, nn.Module], every: list[str]) -> str:
    if pattern in {"cross", "self"}:
        return f"the model has no {pattern}-attention layer; its attention layers are {_some(layers)}"
    if pattern in every:
        return f"there is no attention layer in {pattern!r}; the model's are {_some(layers)}"
    parts = {".".join(parts[:n]) for parts in (name.split(".") for name in layers) for n in range(1, len(parts) + 1)}
    bare = pattern.strip("*")
    close = difflib.get_close_matches(bare, sorted(parts), n=3, cutoff=0.5)
    close = close or [name for name in layers if bare and bare in name][:3]
    # names are long and alike: compare by the last parts too, and then by what is there at all
    close = close or [name for name in layers if difflib.get_close_matches(bare, name.split("."), n=1)][:3]
    near = f"the closest names are {', '.join(close)}" if close else f"the attention layers are {_some(layers)}"
    return f"no attention layer matches {pattern!r}: {near}"


def _some(layers: dict[str, nn.Module]) -> str:
    names = list(layers)
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
