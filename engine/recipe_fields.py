"""A recipe's fields in words: which exist, and what each accepts."""

from __future__ import annotations

import types
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

Model = type[BaseModel]


def as_model(annotation: Any) -> Model | None:
    """The pydantic model an annotation holds, ``Optional`` looked through."""
    for part in (annotation, *get_args(annotation)):
        if isinstance(part, type) and issubclass(part, BaseModel):
            return part
    return None


def section_at(model: Model, path: str) -> Model | None:
    """The section a dotted path leads to; None where it leads nowhere."""
    found: Model | None = model
    for name in path.split(".") if path else ():
        field = found.model_fields.get(name) if found else None
        found = as_model(field.annotation) if field else None
    return found


def dotted_paths(model: Model, prefix: str = "") -> Iterator[str]:
    """Every field below a section: ``training.max_steps``."""
    for name, field in model.model_fields.items():
        yield prefix + name
        inner = as_model(field.annotation)
        if inner:
            yield from dotted_paths(inner, f"{prefix}{name}.")


def describe(model: Model, path: str) -> str:
    """What the field at a dotted path accepts, in words: ``a whole number ≥ 1``."""
    section, _, name = path.rpartition(".")
    owner = section_at(model, section)
    if owner is None or name not in owner.model_fields:  # an item of a list: describe the list
        return describe(model, section) if section else "a mapping of sections"
    return describe_field(owner.model_fields[name])


def describe_field(field: FieldInfo) -> str:
    return _words(field.annotation, field.metadata)


def _words(annotation: Any, metadata: list[Any] | tuple[Any, ...] = ()) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        extra = [m for a in annotation.__metadata__ for m in (a.metadata if isinstance(a, FieldInfo) else [a])]
        return _words(arguments[0], extra)
    if origin in (Union, types.UnionType):
        return " or ".join("null" if a is type(None) else _words(a, metadata) for a in arguments)
    if origin is Literal:
        return f"one of {', '.join(map(str, arguments))}"
    if origin is tuple:
        return f"a list of {len(arguments)}, each {_words(arguments[0])}"
    if as_model(annotation):
        return "a section with keys of its own"
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return f"one of {', '.join(str(member.value) for member in annotation)}"
    names = {int: "a whole number", float: "a number", str: "text", bool: "true or false", Path: "a path"}
    bounds = [
        f"{sign} {getattr(m, name):g}"
        for m in metadata
        for name, sign in (("ge", "≥"), ("gt", ">"), ("le", "≤"), ("lt", "<"))
        if getattr(m, name, None) is not None
    ]
    pattern = next((f" like {m.pattern}" for m in metadata if getattr(m, "pattern", None)), "")
    words = names.get(annotation) or str(getattr(annotation, "__name__", annotation))
    return words + (f" {' and '.join(bounds)}" if bounds else "") + pattern
