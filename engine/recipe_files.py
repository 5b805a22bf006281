"""Recipes as files: reading them, overriding single fields, and saying in one line what is wrong with them."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from .errors import CheckpointError, RecipeError, nearest
from .plugins import import_plugins
from .recipe import Recipe
from .recipe_fields import describe, dotted_paths, section_at
from .registry import objectives, sources, systems, unknown_parts

SHIPPED = Path(__file__).resolve().parent.parent / "recipes"  # in a checkout and in an installation alike
WEIGHT_FIELDS = ("model.initial", "model.image.weights", "model.text.weights")
# in a file: relative to it; in an override: to where you stand
PATH_FIELDS = (
    *("data.path", "data.validation_path", "data.image_root", "data.vocabulary", "masking.prior", "evaluation.prompts"),
    *WEIGHT_FIELDS,
)
PATH_SUFFIXES = {
    "masking.prior": (".npy",),
    "evaluation.prompts": (".json",),
    "data.vocabulary": (".txt", ".gz"),
    "model.image.weights": (".safetensors", ".pth"),
    **dict.fromkeys(("model.initial", "model.text.weights", "data.image_root"), ("",)),
}  # of what may stand there; "" = a folder
PRIORS = ("contrast", "centre")  # values of masking.prior that are no path
# What may change when a run is resumed without changing the losses that an uninterrupted run would have had.
RESUMABLE_FIELDS = (
    *("training.checkpoint_every", "training.keep_checkpoints", "training.log_every"),
    *("training.rank_timeout", "data.workers", "data.prefetch"),
)


class _Loader(yaml.SafeLoader):
    """Safe YAML that refuses duplicate keys and reads ``1e-4`` as the number it is in YAML 1.2."""


def _unique_mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        if key_node.tag == "tag:yaml.org,2002:merge":  # <<: *anchor
            continue
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, str):
            raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is not text", key_node.start_mark)
        if key in seen:
            raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", key_node.start_mark)
        seen.add(key)
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _unique_mapping)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def load_recipe(
    path: str | os.PathLike[str], overrides: Sequence[str] = (), *, begun: bool = False, trusted: bool = True
) -> Recipe:
    """Read a recipe, apply overrides, check everything that can be checked without data or a device.

    Args:
        path: a YAML file, or the name of a shipped recipe (``syncmask-emoji``).
        overrides: ``section.field=value``, the value in YAML; a later one wins.
        begun: of a run that has its first weights, so that those which it started from may be gone.
        trusted: import the modules that ``plugins`` names in the file; those in an override are in any case.

    Returns:
        The recipe. ``deepspeed`` is a mapping, inlined when the recipe names a JSON file, its keys checked;
        paths to data are absolute.

    Raises:
        RecipeError: one line that names the culprit and the nearest thing that would have been right.
    """
    file = find_recipe(path)
    source = os.fspath(path)
    values = read_yaml(file, source)
    origins: dict[str, str] = {}  # dotted path -> what set it, where that is not the recipe file
    _import_plugins(values, source, overrides, trusted)
    _inline_deepspeed(values, source, file.parent, origins)
    for name in PATH_FIELDS:
        _absolute(values, name, file.parent)
    _absolute_options(values, file.parent)
    for field in ("data.path", "data.validation_path"):
        shards = [given for given in overrides if given.startswith(f"{field}=") and given.endswith(".tar")]
        if len(shards) > 1:  # of which only the last would be read
            remedy = "quote a pattern, for the shell takes it apart"
            raise RecipeError(f"override {shards[1]}: {field} is given {len(shards)} times; {remedy}")
    for override in overrides:
        name = _apply(values, override)
        origins[name] = f"override {override}"
        if name in PATH_FIELDS:
            _absolute(values, name, Path.cwd())
        elif name.startswith(("masking.", "model.", "data.", "objectives.")):
            _absolute_options(values, Path.cwd())
        elif name == "deepspeed":
            _inline_deepspeed(values, origins[name], Path.cwd(), origins)
    try:
        recipe = Recipe.model_validate(values)
    except ValidationError as error:
        raise RecipeError(_one_line(error, source, origins)) from None
    _check(recipe, source, origins, begun)
    return recipe


def load_run_recipe(run_dir: Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of an existing run, to resume it.

    Raises:
        CheckpointError: no such run folder.
        RecipeError: an override of a field that would change the losses.
    """
    file = check_run_dir(run_dir)
    for override in overrides:
        name = override.partition("=")[0].strip()
        if name not in RESUMABLE_FIELDS:
            raise RecipeError(
                f"override {override}: a resumed run keeps its recipe, or its losses would not be those of an "
                f"uninterrupted run; only {', '.join(RESUMABLE_FIELDS)} may change"
            )
    return load_recipe(file, overrides, begun=True)


def check_run_dir(run_dir: Path) -> Path:
    """The recipe's file in a run folder; CheckpointError, with the nearest one that is a run's, where there is none."""
    file = run_dir / "recipe.yaml"
    if not file.is_file():
        runs = sorted(f.parent.name for f in run_dir.parent.glob("*/recipe.yaml")) if run_dir.parent.is_dir() else []
        close = nearest(run_dir.name, runs)
        hint = f"did you mean {run_dir.parent / close}?" if close else "give the folder that a run named at its start"
        raise CheckpointError(f"{run_dir}: not a run folder, recipe.yaml is not in it; {hint}")
    return file


def dump_recipe(recipe: Recipe) -> str:
    """YAML with every value, defaults included; :func:`load_recipe` reads back an equal recipe."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)


def shipped_recipes() -> list[str]:
    """Names of the recipes that come with the package."""
    return sorted(f.stem for f in SHIPPED.glob("*.yaml"))


def find_recipe(path: str | os.PathLike[str]) -> Path:
    """The file of a recipe: a path, else a shipped recipe by bare name or as ``recipes/NAME.yaml``."""
    file = Path(path)
    if file.is_file():
        return file
    if file.is_dir():
        raise RecipeError(f"{path}: a folder, not a recipe; {_nearest_file(file / 'recipe.yaml', ('.yaml', '.yml'))}")
    shipped = SHIPPED / f"{file.stem}.yaml"
    if file.parent in (Path("."), Path("recipes")) and file.suffix in ("", ".yaml") and shipped.is_file():
        return shipped
    raise RecipeError(f"{path}: no such recipe; {_nearest_file(file, ('.yaml', '.yml'), shipped_recipes())}")


def check_world(recipe: Recipe, world_size: int) -> int:
    """Pairs of one rank's micro-batch.

    Raises:
        RecipeError: the batch does not divide evenly.
    """
    training = recipe.training
    parts = world_size * training.accumulation_steps
    if training.batch_size % parts:
        sizes = {max(training.batch_size // parts, 1) * parts, (training.batch_size // parts + 1) * parts}
        raise RecipeError(
            f"training.batch_size: {training.batch_size} is not divisible by {world_size} ranks × "
            f"{training.accumulation_steps} accumulation_steps; nearest sizes: {' or '.join(map(str, sorted(sizes)))}"
        )
    return training.batch_size // parts


def choose_run_dir(recipe: Recipe) -> Path:
    """The folder a new run will write to, not yet created: ``output``, or ``runs/NAME-YYYYMMDD-HHMMSS``.

    Raises:
        RecipeError: ``output`` is a file, holds files already, or cannot be created.
    """
    if recipe.output is None:
        name = f"{recipe.name}-{time.strftime('%Y%m%d-%H%M%S')}"
        candidates = (Path("runs") / (name if n == 1 else f"{name}-{n}") for n in range(1, 1000))
        run_dir = next(c for c in candidates if not c.exists())
    else:
        run_dir = recipe.output.expanduser()
        if run_dir.is_dir() and any(run_dir.iterdir()):
            how = f"continue it with --resume {run_dir}" if (run_dir / "recipe.yaml").is_file() else "choose another"
            raise RecipeError(f"output: folder {run_dir} already holds files; {how}")
    existing = next(p for p in (run_dir, *run_dir.absolute().parents) if p.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        what = "may not be written to" if existing.is_dir() else "is a file"
        raise RecipeError(f"output: {run_dir} cannot be created, {existing} {what}; choose another with --output")
    return run_dir.absolute()


def read_deepspeed_json(file: Path, source: str) -> dict[str, Any]:
    """The keys of a DeepSpeed JSON file, duplicates refused. ``source`` is who named the file."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        for key in keys:
            if keys.count(key) > 1:
                raise RecipeError(f"{file}: key {key!r} is given twice")
        return dict(pairs)

    shipped = SHIPPED / file.name
    if not file.is_file() and shipped.is_file():
        file = shipped
    try:
        found = json.loads(file.read_text("utf-8"), object_pairs_hook=unique)
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        names = sorted(f.name for f in SHIPPED.glob("*.json"))
        hint = _nearest_file(file, (".json",), names)
        raise RecipeError(f"{source}: deepspeed: no DeepSpeed configuration {file}; {hint}") from None
    except (OSError, ValueError) as error:
        raise RecipeError(
            f"{file}: not a JSON file: {error}; correct it, or name one of the shipped zero0.json to zero3.json"
        ) from None
    if not isinstance(found, dict):
        raise RecipeError(f"{file}: a DeepSpeed configuration is an object {{…}}, not {type(found).__name__}")
    return found


def origin_of(path: str, source: str, origins: Mapping[str, str]) -> str:
    """Who gave the value at a dotted path: an override of it, of a section around it or of a key in it; else a file."""
    around = path.split(".")
    for name in (".".join(around[:n]) for n in range(len(around), 0, -1)):
        if name in origins:
            return origins[name]
    return next((origin for name, origin in origins.items() if name.startswith(f"{path}.")), source)


def read_yaml(
    file: Path, source: str, what: str = "a recipe is a mapping of sections such as 'training:'"
) -> dict[str, Any]:
    """A YAML mapping, duplicate keys refused. ``source`` is who named the file, ``what`` ought to be in it."""
    try:
        values = yaml.load(file.read_text("utf-8"), _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f", line {mark.line + 1}" if mark else ""
        raise RecipeError(f"{source}{where}: {error.problem or 'not YAML'}; mend the line") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{source}: not a YAML text file: {' '.join(str(error).split())}; name a recipe") from None
    except OSError as error:
        raise RecipeError(f"{source}: cannot be read: {error.strerror}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise RecipeError(f"{source}: {what}, not a {type(values).__name__}; see crossmask recipes")
    return {name: {} if value is None and section_at(Recipe, str(name)) else value for name, value in values.items()}


def _apply(values: dict[str, Any], override: str) -> str:
    """Set one field in place; returns its dotted path."""
    name, equals, text = override.partition("=")
    name = name.strip()
    if not equals or not re.fullmatch(r"\w+(\.\w+)*", name):
        raise RecipeError(f"override {override}: write it as section.field=value, such as training.max_steps=20")
    try:
        value = yaml.load(text, _Loader)
    except yaml.YAMLError:
        raise RecipeError(f"override {override}: {text!r} is not a YAML value; quote it") from None
    *sections, field = name.split(".")
    owner = section_at(Recipe, ".".join(sections))
    if owner and field in owner.model_fields and owner.model_fields[field].annotation is str and value is not None:
        value = value if isinstance(value, str) else text  # name=2024, note=hours: 3
    target = values
    for section in sections:
        inner = target.get(section)
        target[section] = target = dict(inner) if isinstance(inner, Mapping) else {}
    target[field] = value
    return name


def _import_plugins(values: Mapping[str, Any], source: str, overrides: Sequence[str], trusted: bool) -> None:
    """Before anything is validated, as what is known depends on it. Whatever is no list of names is reported later."""
    given: dict[str, Any] = {source: values.get("plugins") if trusted else None}
    for override in overrides:
        if override.partition("=")[0].strip() == "plugins":
            only: dict[str, Any] = {}
            _apply(only, override)
            given = {f"override {override}": only["plugins"]}
    for origin, modules in given.items():
        if isinstance(modules, list) and all(isinstance(name, str) for name in modules):
            import_plugins(modules, f"{origin}: plugins")


def _inline_deepspeed(values: dict[str, Any], source: str, folder: Path, origins: dict[str, str]) -> None:
    given = values.get("deepspeed")
    if isinstance(given, str):
        values["deepspeed"] = read_deepspeed_json(folder / Path(given).expanduser(), source)
        origins["deepspeed"] = given
    elif given is not None and not isinstance(given, dict):
        raise RecipeError(f"{source}: deepspeed: {given!r} is not allowed; expected a JSON file's path or a mapping")
    elif "deepspeed" in values and given is None:
        values["deepspeed"] = {}


def _absolute(values: dict[str, Any], name: str, folder: Path) -> None:
    *sections, field = name.split(".")
    for section in sections:
        inner = values.get(section)
        if not isinstance(inner, dict):
            return
        values[section] = values = dict(inner)
    given = values.get(field)
    if isinstance(given, str) and not (name == "masking.prior" and given in PRIORS):
        values[field] = os.path.abspath(folder / Path(given).expanduser())


def _absolute_options(values: dict[str, Any], folder: Path) -> None:
    """The same for what options of policies and of registered parts name; of an unknown part, which is reported later,
    nothing."""
    section = values.get("masking")
    for owner, field in (("policy", "options"), ("text_policy", "text_options")):
        if isinstance(section, dict) and isinstance(section.get(field), dict) and section[field]:
            from .masking.registry import find_policy

            policy = find_policy(str(section.get(owner)))
            _absolute_fields(section[field], policy.Options if policy else None, folder)
    for part, registry, owner in (("model", systems, "system"), ("data", sources, "source")):
        section = values.get(part)
        if isinstance(section, dict) and isinstance(section.get("options"), dict):
            _absolute_fields(section["options"], registry.options_of(section.get(owner)), folder)
    found = values.get("objectives")
    own = found.get("own") if isinstance(found, dict) else None
    for name, section in own.items() if isinstance(own, dict) else ():
        if isinstance(section, dict) and isinstance(section.get("options"), dict):
            _absolute_fields(section["options"], objectives.options_of(name), folder)


def _absolute_fields(options: dict[str, Any], kind: type[BaseModel] | None, folder: Path) -> None:
    for name, value in options.items():
        known = kind.model_fields.get(name) if kind else None
        kinds = (known.annotation, *get_args(known.annotation)) if known else ()
        if isinstance(value, str) and Path in kinds:
            options[name] = os.path.abspath(folder / Path(value).expanduser())


def _check(recipe: Recipe, source: str, origins: Mapping[str, str], begun: bool) -> None:
    for name in PATH_FIELDS:
        if begun and name in WEIGHT_FIELDS:
            continue
        path: Any = recipe
        for part in name.split("."):
            path = getattr(path, part)
        read = not name.startswith("data.") or name == "data.vocabulary" or recipe.data.source in ("pairs", "fashioniq")
        if name in ("data.path", "data.validation_path") and "{" in str(path):
            continue  # a pattern of shards, which their reader works out
        if read and isinstance(path, Path) and not path.exists():
            hint = _nearest_file(path, PATH_SUFFIXES.get(name, (".jsonl", ".csv", ".json")))
            raise RecipeError(f"{origins.get(name, source)}: {name}: no such file {path}; {hint}")
    for name, problem in unknown_parts(recipe):
        raise RecipeError(f"{origin_of(name, source, origins)}: {problem}")
    if recipe.masking != type(recipe.masking)():  # the defaults are known; asking for others imports torch
        from .masking import check_masking

        try:
            check_masking(recipe)
        except RecipeError as error:
            named = [name for name in origins if name.startswith("masking.") and name in str(error)]
            choice = [name for name in ("masking.policy", "masking.text_policy") if name in origins]
            origin = next((origins[name] for name in named + choice), source)
            raise RecipeError(f"{origin}: {error}") from None
    if recipe.deepspeed:
        from .deepspeed_config import check_deepspeed_keys

        assert isinstance(recipe.deepspeed, dict)  # inlined above
        check_deepspeed_keys(recipe, source, origins)


def _one_line(error: ValidationError, source: str, origins: Mapping[str, str]) -> str:
    problems = [problem for problem in error.errors(include_url=False) if _is_meant(problem)]
    first = problems[0]
    path = ".".join(str(part) for part in first["loc"] if not _is_member(part))
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    origin = origin_of(path, source, origins)
    if first["type"] == "extra_forbidden":
        return f"{origin}: {_unknown_key(path)}{more}"
    if first["type"] == "missing":
        return f"{origin}: {path} is missing; expected {describe(Recipe, path)}{more}"
    if first["type"] == "value_error":  # fields that disagree: an override the message names is the culprit
        message = str(first["ctx"]["error"])
        origin = next((o for name, o in origins.items() if name.rpartition(".")[2] in message), source)
        return f"{origin}: {path + ': ' if path else ''}{message}{more}"
    return f"{origin}: {path}: {_shown(first['input'])} is not allowed; expected {describe(Recipe, path)}{more}"


def _is_member(part: int | str) -> bool:
    """A ratio is a number or a section; pydantic puts the member of the union that it tried into the path."""
    return isinstance(part, str) and (part == "constrained-float" or "RatioSection" in part)


def _is_meant(problem: Any) -> bool:
    """A union reports once per member: of a mapping only what is wrong with the section, else only with the number."""
    member = problem["loc"][-1] if problem["loc"] else ""
    of_number = member == "constrained-float" and isinstance(problem["input"], dict)
    return not of_number and not (problem["type"] == "model_type" and _is_member(member))


def _unknown_key(path: str) -> str:
    section, _, word = path.rpartition(".")
    model = section_at(Recipe, section)
    keys = list(model.model_fields) if model else []
    close = nearest(word, keys)
    if close:
        return f"unknown key {path}; did you mean {section + '.' if section else ''}{close}?"
    elsewhere = [name for name in dotted_paths(Recipe) if name.rpartition(".")[2] == word]
    if elsewhere:
        return f"unknown key {path}; did you mean {elsewhere[0]}?"
    return f"unknown key {path}; known here: {', '.join(keys)}"


def _shown(value: Any) -> str:
    text = repr(value) if not isinstance(value, bool) else str(value).lower()
    return text if len(text) <= 60 else f"{text[:57]}…"


def _nearest_file(path: Path, suffixes: Iterable[str], also: Sequence[str] = ()) -> str:
    """A hint: the existing file, or the shipped name, that is most like ``path``."""
    try:
        here = [str(f) for f in path.parent.iterdir() if f.suffix in tuple(suffixes)]
    except OSError:
        here = []
    close = nearest(path.name, [Path(f).name for f in here])
    if close:
        return f"did you mean {path.parent / close}?"
    close = nearest(path.stem, [Path(name).stem for name in also])
    if close:
        return f"did you mean {next(name for name in also if Path(name).stem == close)}?"
    known = [*sorted(here)[:5], *also]
    return f"there is {', '.join(known)}" if known else "check the path"
