"""Which attention layers of a model a user's names and patterns select; where they select none, what is closest."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Mapping
from fnmatch import fnmatchcase

from torch import nn

WRAPPERS = {"DistributedDataParallel", "DataParallel", "DeepSpeedEngine"}


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside torch.compile's and data parallelism's wrappers, whose names carry no prefix."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and type(model).__name__ in WRAPPERS:
            inner = model.module
        if inner is None:
            return model
        model = inner


def select_layers(
    model: nn.Module,
    layers: Collection[str],
    wanted: str | Collection[str],
    kinds: Mapping[str, Collection[str]] | None = None,
) -> list[str]:
    """Those of ``layers`` that ``wanted`` selects, in their order.

    Args:
        layers: names of the model's attention layers, at least one.
        wanted: one or several names of layers or of modules that contain some, ``fnmatch`` patterns of either, or keys
            of ``kinds``.
        kinds: names of sets of layers, such as "cross"; a module of the same name goes first.

    Raises:
        ValueError: nothing wanted, or something that selects no layer, with the closest names.
        TypeError: a name that is no str.
    """
    every = {name for name, _ in unwrap(model).named_modules(remove_duplicate=False) if name}
    patterns = [wanted] if isinstance(wanted, str) else list(wanted)
    chosen: set[str] = set()
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(f"layers must be names or patterns, got {pattern!r}")
        kind = kinds is not None and pattern in kinds and pattern not in every
        found = kinds[pattern] if kinds and kind else [name for name in layers if _matches(name, pattern)]
        if not found:
            raise ValueError(_nothing(pattern, list(layers), kind, pattern in every))
        chosen.update(found)
    if not chosen:
        also = "".join(f", {kind!r}" for kind in kinds or ())
        raise ValueError(f"layers is empty: name attention layers, or a pattern of names{also}")
    return [name for name in layers if name in chosen]


def some(names: Iterable[str]) -> str:
    """The first few of many names."""
    listed = list(names)
    return ", ".join(listed[:4]) + (f" and {len(listed) - 4} more" if len(listed) > 4 else "")


def _matches(name: str, pattern: str) -> bool:
    """Whether a layer or a module that contains it is of that name or fits the pattern."""
    return any(pattern == x or fnmatchcase(x, pattern) for x in _with_parents(name))


def _with_parents(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:length]) for length in range(1, len(parts) + 1)]


def _nothing(pattern: str, layers: list[str], kind: bool, module: bool) -> str:
    if kind:
        return f"the model has no {pattern}-attention layer; its attention layers are {some(layers)}"
    if module:
        return f"there is no attention layer in {pattern!r}; the model's are {some(layers)}"
    bare = pattern.strip("*")
    close = difflib.get_close_matches(
        bare, sorted({x for name in layers for x in _with_parents(name)}), n=3, cutoff=0.5
    )
    close = close or [name for name in layers if bare and bare in name][:3]
    # names are long and alike: compare by the last parts too, and then by what is there at all
    close = close or [name for name in layers if difflib.get_close_matches(bare, name.split("."), n=1)][:3]
    near = f"the closest names are {', '.join(close)}" if close else f"the attention layers are {some(layers)}"
    return f"no attention layer matches {pattern!r}: {near}"
