"""The attention layers of a Transformers model: which there are, what they attend to, and which a name selects."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Collection
from typing import Any

from torch import nn

from .names import select_layers, unwrap

IMPLEMENTATION = "crossmask"  # what the implementation is called in Transformers
ADAPTED: set[type[nn.Module]] = set()  # classes off the shared interface whose forward we replaced
_INTERFACE = "ALL_ATTENTION_FUNCTIONS"  # the name by which a model's code looks the implementation up
_CROSS = re.compile(r"cross|enc(oder)?_?attn|encoder_attention|EncDec", re.IGNORECASE)
_HOLDERS = {"self", "attention", "attn", "fn"}  # names that say nothing; the parent's does: crossattention.self


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
    crosses = {name: is_cross(name, module) for name, module in layers.items()}
    kinds = {kind: [name for name in layers if crosses[name] == (kind == "cross")] for kind in ("cross", "self")}
    return {name: layers[name] for name in select_layers(model, layers, wanted, kinds)}
