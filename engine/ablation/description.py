"""An ablation as a YAML file: a base recipe, what each variant changes in it, seeds, and the metrics of the table."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, StringConstraints, ValidationError, model_validator

from ..errors import RecipeError, nearest
from ..recipe import Section
from ..recipe_fields import section_at
from ..recipe_files import PATH_FIELDS, PRIORS, SHIPPED, find_recipe, read_yaml

ABLATIONS = SHIPPED / "ablations"
Seed = Annotated[int, Field(ge=0, strict=True)]
Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
NAME = "letters, digits and ._- only, as it becomes a folder's name"
OVERRIDES = "a list of section.field=value, each as on the command line"


class MetricSection(Section):
    """A column of the table: where the number stands in a run's ``evaluation.json``."""

    path: Annotated[str, StringConstraints(pattern=r"^[\w*?-]+(\.[\w*?-]+)*$")] = Field(
        description="a dotted path into evaluation.json; * and ? match as in file names, the matches' mean is taken"
    )
    title: str = Field(min_length=1, description="the column's heading")
    higher_is_better: bool = Field(True, description="true or false")
    digits: int = Field(1, ge=0, le=6, description="a whole number of decimals, 0 to 6")


class VariantSection(Section):
    """A row of the table."""

    name: Name = Field(description=NAME)
    title: str = Field("", description="text; default: the name")
    overrides: list[str] = Field([], description=OVERRIDES)
    recipe: str | None = Field(None, description="a recipe of its own, in place of the ablation's")
    source: str | None = Field(
        None, alias="from", description="the name of an earlier variant whose run of the same seed gives the weights"
    )
    against: str | None = Field(None, description="the name of the variant that differences are taken to")

    @property
    def heading(self) -> str:
        return self.title or self.name


class Ablation(Section):
    name: Name = Field(description=NAME)
    title: str = Field("", description="text over the table; default: the name")
    note: str = Field("", description="text below the table")
    recipe: str = Field(min_length=1, description="a recipe file, relative to this file, or a shipped recipe's name")
    overrides: list[str] = Field([], description=f"{OVERRIDES}; of all variants, before their own")
    seeds: list[Seed] = Field([0], min_length=1, description="a list of whole numbers ≥ 0")
    compare: Literal["previous", "first"] = Field(
        "previous", description="previous or first: the row that differences are taken to"
    )
    metrics: list[MetricSection] = Field(min_length=1, description="a list of metrics, each with path and title")
    variants: list[VariantSection] = Field(min_length=1, description="a list of variants, each with a name")

    @model_validator(mode="after")
    def _names_agree(self) -> Ablation:
        for what, values in (
            ("seeds", self.seeds),
            ("variants: name", [v.name for v in self.variants]),
            ("variants: title", [v.heading for v in self.variants]),
            ("metrics: path", [m.path for m in self.metrics]),
            ("metrics: title", [m.title for m in self.metrics]),
        ):
            twice = [value for value, count in Counter(values).items() if count > 1]
            if twice:
                raise ValueError(f"{what} {twice[0]} is given twice")
        known = [v.name for v in self.variants]
        for i, variant in enumerate(self.variants):
            if variant.source is not None and variant.source not in known[:i]:
                raise ValueError(
                    f"variant {variant.name}: from: {_missing(variant.source, known[:i], 'earlier variant')}"
                )
            if variant.against is not None and variant.against not in set(known) - {variant.name}:
                others = [name for name in known if name != variant.name]
                raise ValueError(f"variant {variant.name}: against: {_missing(variant.against, others, 'variant')}")
        return self

    def variant(self, name: str) -> VariantSection:
        """RecipeError, with the nearest name, where there is none."""
        found = next((v for v in self.variants if v.name == name), None)
        if found is None:
            raise RecipeError(f"--only: {_missing(name, [v.name for v in self.variants], 'variant')}")
        return found

    def overridden(self, overrides: Sequence[str]) -> Ablation:
        """Every variant with further ``overrides`` after its own."""
        variants = [v.model_copy(update={"overrides": [*v.overrides, *overrides]}) for v in self.variants]
        return self.model_copy(update={"variants": variants})

    def changes(self, variant: VariantSection) -> list[str]:
        """All overrides of ``variant`` in their order, the last of each field."""
        last: dict[str, str] = {}
        for override in (*self.overrides, *variant.overrides):
            name = override.partition("=")[0].strip()
            last.pop(name, None)  # its place, too, is the later one's: a section may have been set in between
            last[name] = override
        return list(last.values())

    def compared_with(self, variant: VariantSection) -> VariantSection | None:
        """The row that ``variant`` is compared with; None for the first."""
        if variant.against is not None:
            return self.variant(variant.against)
        place = self.variants.index(variant)
        return None if place == 0 else self.variants[0 if self.compare == "first" else place - 1]


def load_ablation(path: str | os.PathLike[str]) -> Ablation:
    """Read and check an ablation; its recipe and the paths in its overrides are made absolute.

    Args:
        path: a YAML file, or the name of a shipped ablation (``albef-emoji``). In a file, paths are relative to it.

    Raises:
        RecipeError: one line that names the culprit and the nearest thing that would have been right.
    """
    file, source = find_ablation(path), os.fspath(path)
    values = read_yaml(file, source, "an ablation is a mapping with the keys recipe, metrics and variants")
    try:
        found = Ablation.model_validate({"name": file.stem, **values})
    except ValidationError as error:
        raise RecipeError(_one_line(error, source, values)) from None

    def recipe(given: str) -> str:
        near = file.parent / Path(given).expanduser()
        return os.path.abspath(near if near.is_file() and near.resolve() != file.resolve() else find_recipe(given))

    try:
        variants = [
            v.model_copy(
                update={
                    "recipe": None if v.recipe is None else recipe(v.recipe),
                    "overrides": [_from(o, file.parent) for o in v.overrides],
                }
            )
            for v in found.variants
        ]
        overrides = [_from(o, file.parent) for o in found.overrides]
        return found.model_copy(update={"recipe": recipe(found.recipe), "overrides": overrides, "variants": variants})
    except RecipeError as error:
        raise RecipeError(f"{source}: {error}") from None


def shipped_ablations() -> list[str]:
    """Names of the ablations that come with the package."""
    return sorted(f.stem for f in ABLATIONS.glob("*.yaml"))


def find_ablation(path: str | os.PathLike[str]) -> Path:
    """The file of an ablation: a path, else a shipped one by its bare name or as ``recipes/ablations/NAME.yaml``."""
    file = Path(path)
    if file.is_file():
        return file
    shipped = ABLATIONS / f"{file.stem}.yaml"
    where = (".", "ablations", "recipes/ablations")
    if file.suffix in ("", ".yaml") and str(file.parent) in where and shipped.is_file():
        return shipped
    try:
        here = [f.name for f in file.parent.iterdir() if f.suffix in (".yaml", ".yml")]
    except OSError:
        here = []
    close = nearest(file.name, here)
    hint = f"did you mean {file.parent / close}?" if close else f"shipped are {', '.join(shipped_ablations())}"
    close = None if close else nearest(file.stem, shipped_ablations())
    raise RecipeError(f"{path}: no such ablation; {f'did you mean {close}?' if close else hint}")


def _from(override: str, folder: Path) -> str:
    """An override whose path is relative to ``folder`` as one that means the same wherever you stand."""
    name, equals, text = override.partition("=")
    name = name.strip()
    if not equals or name not in (*PATH_FIELDS, "deepspeed"):
        return override
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        return override  # load_recipe says what is wrong with it
    if not isinstance(value, str) or (name == "masking.prior" and value in PRIORS):
        return override
    there = Path(os.path.abspath(folder / Path(value).expanduser()))
    if name == "deepspeed" and not there.is_file():  # a shipped one
        return override
    return f"{name}={quoted(str(there))}"


def quoted(text: str) -> str:
    """As a YAML string, whatever is in it."""
    return yaml.safe_dump(text, default_style='"', width=10**6, allow_unicode=True).strip()


def _missing(name: str, known: list[str], what: str) -> str:
    close = nearest(name, known)
    hint = f"did you mean {close}?" if close else f"there is {', '.join(known)}" if known else "there is none"
    return f"no {what} {name}; {hint}"


def _one_line(error: ValidationError, source: str, values: dict[str, Any]) -> str:
    problems = error.errors(include_url=False)
    first = problems[0]
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    steps = [part for part in first["loc"] if not isinstance(part, int)]
    model = section_at(Ablation, ".".join(map(str, steps[:-1])))
    fields = {field.alias or name: field for name, field in model.model_fields.items()} if model else {}
    where, key = _where(first["loc"], values), str(steps[-1]) if steps else ""
    if first["type"] == "extra_forbidden":
        close = nearest(key, fields)
        hint = f"did you mean {close}?" if close else f"known here: {', '.join(fields)}"
        return f"{source}: unknown key {where}; {hint}{more}"
    expected = fields[key].description if key in fields else "a mapping of keys"
    if first["type"] == "missing":
        return f"{source}: {where} is missing; expected {expected}{more}"
    if first["type"] == "value_error":
        return f"{source}: {first['ctx']['error']}{more}"
    shown = repr(first["input"])
    shown = shown if len(shown) <= 60 else f"{shown[:57]}…"
    return f"{source}: {where}: {shown} is not allowed; expected {expected}{more}"


def _where(path: tuple[int | str, ...], values: Any) -> str:
    """``variants.2.overides`` with the third variant's name in place of its number, where it has one."""
    words: list[str] = []
    for part in path:
        try:
            values = values[part]
        except (KeyError, IndexError, TypeError):
            values = None
        name = values.get("name") if isinstance(part, int) and isinstance(values, dict) else None
        words.append(str(part) if name is None else f"[{name}]")
    return ".".join(words).replace(".[", "[")
