"""Every field of a recipe: its dotted path, what it accepts, its default, what it does, and which recipes set it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined
from rooms import ROOT

from crossmask.engine.recipe import Recipe
from crossmask.engine.recipe_fields import Model, as_model, describe_field

EVERYWHERE = ("name", "note", "seed", "deepspeed")  # which every recipe sets, or which say nothing in another

HEAD = """# Recipe fields

A recipe is a YAML file. **Every field below can also be given on the command line by its dotted path**, after the
recipe's name:

```bash
crossmask train syncmask-emoji training.max_steps=20 model.fusion.depth=4
```

Each field has a default. A key that is not in this list is an error that names the nearest one, and so is a value that
is not what the field accepts. `recipe.yaml` in a run's folder has all of them spelled out.

Below a field's description stand the [shipped recipes](cli.md#crossmask-recipes) that depart from its default, with
their value.
"""


def page() -> str:
    return HEAD + "\n".join(section_lines(Recipe, "", shipped())) + "\n"


def shipped() -> dict[str, dict[str, Any]]:
    """What each shipped recipe sets, by dotted path."""
    return {path.stem: flat(yaml.safe_load(path.read_text())) for path in sorted((ROOT / "recipes").glob("*.yaml"))}


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in values.items():
        found[prefix + name] = value
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{name}.")
    return found


def section_lines(model: Model, path: str, recipes: dict[str, dict[str, Any]]) -> list[str]:
    fields = {name: field for name, field in model.model_fields.items() if not as_model_alone(field)}
    inner = {name: as_model_alone(field) for name, field in model.model_fields.items() if as_model_alone(field)}
    depth = path.count(".") + 2 if path else 2
    lines = ["", f"{'#' * min(depth, 4)} {f'`{path}`' if path else 'At the top'} {{ #{path or 'top'} }}", ""]
    if path and model.__doc__ and not model.__doc__.startswith("!!!"):
        lines += [" ".join(model.__doc__.split()), ""]
    if fields:
        lines += ["| field | accepts | default | what it is |", "|---|---|---|---|"]
        lines += [row(f"{path}.{name}".lstrip("."), name, field, recipes) for name, field in fields.items()]
    for name, section in inner.items():
        assert section is not None
        lines += section_lines(section, f"{path}.{name}".lstrip("."), recipes)
    return lines


def as_model_alone(field: FieldInfo) -> Model | None:
    """The section that a field is; a number or a section, such as a ratio and its schedule, is a field."""
    section = as_model(field.annotation)
    return None if section is None or "or" in describe_field(field).replace("or null", "").split() else section


def row(path: str, name: str, field: FieldInfo, recipes: dict[str, dict[str, Any]]) -> str:
    told = escaped(field.description or "")
    schedule = as_model(field.annotation)
    if schedule is not None:
        told += f"{'; ' if told else ''}a section has `{'`, `'.join(schedule.model_fields)}`"
    by: dict[str, list[str]] = {}
    for recipe, values in recipes.items():
        if path in values and short(values[path]) != default_of(field).strip("`"):
            by.setdefault(short(values[path]), []).append(recipe)
    if by and path not in EVERYWHERE:
        values = "; ".join(f"`{value}` {', '.join(names)}" for value, names in by.items())
        told += f'<span class="set-by">{values}</span>'
    return f'| <span id="{path}"></span>`{name}` | {accepts(field)} | {default_of(field)} | {told} |'


def accepts(field: FieldInfo) -> str:
    words = describe_field(field).replace("a section with keys of its own", "a section")
    words, like, pattern = escaped(words).partition(" like ")
    choices = words.removeprefix("one of ")
    if choices != words:
        choices, *null = choices.split(" or null")
        words = ", ".join(f"`{each}`" for each in choices.split(", ")) + " or null" * len(null)
    return f"{words} like `{pattern}`" if like else words


def default_of(field: FieldInfo) -> str:
    value = field.get_default(call_default_factory=True)
    return "*required*" if value is PydanticUndefined else f"`{short(value)}`"


def short(value: Any) -> str:
    if isinstance(value, Path):
        return str(value)
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if hasattr(value, "model_dump"):
        value = value.model_dump(mode="json")
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    text = text or '""'
    return escaped(text if len(text) <= 40 else text[:38] + "…")


def escaped(text: str) -> str:
    return " ".join(text.replace("|", "\\|").replace("<", "&lt;").split())
