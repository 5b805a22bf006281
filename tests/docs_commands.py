"""Whether a command that a page shows would be taken: options, arguments, recipes, fields, targets, files."""

from __future__ import annotations

import ast
import importlib.util
import re
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import typer
from docs_blocks import ROOT, Line

from crossmask.engine.ablation import shipped_ablations
from crossmask.engine.cli import app
from crossmask.engine.recipe import Recipe
from crossmask.engine.recipe_fields import as_model, section_at
from crossmask.engine.recipe_files import load_recipe, shipped_recipes
from crossmask.engine.train import parse_arguments

ANY_RECIPE = ("RECIPE", "RECIPE-OR-RUN", "RECIPE.yaml")
OF_A_RECIPE = ("train", "evaluate", "data masks", "data check", "plan", "ablate")
FREE = ("deepspeed", "masking.options", "masking.text_options", "data.options", "model.options", "objectives.own")


@cache
def command_line() -> Any:
    return typer.main.get_command(app)


def check_crossmask(line: Line) -> None:
    """Parsed as the command would, without running it; ``…`` and NAMES IN CAPITALS stand for something."""
    words = [word for word in line.words[1:] if word not in ("…", "COMMAND") and not word.startswith("[")]
    command, path = command_line(), []
    while hasattr(command, "commands") and words and words[0] in command.commands:
        path.append(words[0])
        command = command.commands[words.pop(0)]
    if hasattr(command, "commands"):  # crossmask --help, or a group that is named in passing
        assert not words or words[0].startswith("--"), f"{line.where}: crossmask has no {words[0]!r}"
        return
    options = {option for each in command.params for option in (*each.opts, *each.secondary_opts)}
    for word in words:
        if word.startswith("--"):
            assert word.partition("=")[0] in {*options, "--help"}, f"{line.where}: {line.text!r} has no {word}"
    fragment = "`" not in line.text and line.where.endswith(".md")  # in a sentence: arguments may be left out
    if fragment and not any(each.required and each.name for each in command.params if each.name in words):
        missing = [each for each in command.params if each.required]
        if len([word for word in words if not word.startswith("--")]) < len(missing):
            return
    context = command.make_context(" ".join(path), [re.sub("…", "x", word) for word in words], resilient_parsing=False)
    if " ".join(path) in OF_A_RECIPE:
        check_recipe(line, " ".join(path), context.params)


def check_recipe(line: Line, command: str, given: dict[str, Any]) -> None:
    name = given.get("ablation") if command == "ablate" else given.get("recipe")
    overrides = list(given.get("overrides") or [])
    if name and "=" in name:  # crossmask train --resume RUN field=value
        overrides, name = [name, *overrides], None
    for override in overrides:
        check_field(line, override.partition("=")[0])
    if name is None or name in ANY_RECIPE or re.search("[A-Z]{2}|^runs/", name):
        return
    if command == "ablate":
        assert name in shipped_ablations() or (ROOT / name).is_file(), f"{line.where}: no ablation {name}"
        return
    known = name in shipped_recipes() or (ROOT / name).is_file()
    assert known, f"{line.where}: no recipe {name}"
    path = str(ROOT / name) if (ROOT / name).is_file() else name
    with tempfile.TemporaryDirectory() as folder:
        given_path = any(each.startswith("data.path=") for each in overrides)
        needed = [] if given_path or not needs_a_path(path) else ["data.path=pairs.json"]
        kept = [each for each in (*needed, *overrides) if not each.startswith(("model.initial=", "data.vocabulary="))]
        load_recipe(path, [stand_in(each, Path(folder)) for each in kept])


def stand_in(override: str, folder: Path) -> str:
    """The reader's own files, as empty ones that are there."""
    name, _, value = override.partition("=")
    if name not in ("data.path", "data.validation_path", "data.image_root"):
        return override
    there = folder / Path(value).name.replace("…", "x")
    if name == "data.image_root" or "FOLDER" in value:
        there.mkdir(exist_ok=True)
    else:
        there = there if there.suffix else there.with_suffix(".jsonl")
        there.touch()
    return f"{name}={there}"


def needs_a_path(path: str) -> bool:
    file = Path(path) if Path(path).is_file() else ROOT / "recipes" / f"{path}.yaml"
    return "source: pairs" in file.read_text()


def check_field(line: Line, path: str) -> None:
    if path.startswith(FREE):
        return
    section, _, name = path.rpartition(".")
    owner = section_at(Recipe, section) if section else Recipe
    assert owner is not None, f"{line.where}: a recipe has no section {section}"
    assert name in owner.model_fields, f"{line.where}: a recipe has no field {path}"
    assert as_model(owner.model_fields[name].annotation) is None or name, path


def check_launcher(line: Line) -> None:
    words = line.words
    at = words.index("crossmask.engine.train")
    parse_arguments([word for word in words[at + 1 :] if word != "…"])
    options = [word.partition("=")[0] for word in words[1:at] if word.startswith("-")]
    package, file = {"deepspeed": ("deepspeed", "launcher/runner.py"), "torchrun": ("torch", "distributed/run.py")}[
        words[0]
    ]
    spec = importlib.util.find_spec(package)
    assert spec is not None
    assert spec.origin is not None
    text = (Path(spec.origin).parent / file).read_text()
    for option in options:
        spelled = {option, option.replace("_", "-"), option.replace("-", "_").replace("__", "--", 1)}
        assert any(f'"{each}"' in text for each in spelled), f"{line.where}: {words[0]} has no {option}"


def check_other(line: Line) -> None:
    first, *rest = line.words
    if first == "make":
        text = (ROOT / "Makefile").read_text()
        for word in rest:
            if "=" in word:
                name = word.partition("=")[0]
                assert f"$({name})" in text or f"{name} " in text or name.startswith("CROSSMASK_"), (
                    f"{line.where}: {word}"
                )
            else:
                assert re.search(rf"^{re.escape(word)}:", text, re.MULTILINE), f"{line.where}: make has no {word}"
    elif first == "pip":
        declared = (ROOT / "pyproject.toml").read_text()
        for extras in re.findall(r"(?:crossmask|\.)\[([\w,-]+)\]", line.text):
            for extra in extras.split(","):
                assert re.search(rf"^{extra} = \[", declared, re.MULTILINE), f"{line.where}: no extra {extra}"
    elif first == "python":
        check_script(line, rest)


def check_script(line: Line, words: list[str]) -> None:
    if not words or words[0] == "-c":
        ast.parse(words[1] if words else "")
        return
    if words[0] == "-m":
        module = words[1]
        known = importlib.util.find_spec(module) if not module.startswith("crossmask.") else module_file(module)
        assert known, f"{line.where}: no module {module}"
        paths = [word for word in words[2:] if word.startswith("tests/")]
        missing = [path for path in paths if not (ROOT / path.partition("::")[0]).exists()]
        assert not missing, f"{line.where}: {missing}"
        return
    script = ROOT / words[0]
    if not words[0].endswith(".py") or re.search("[A-Z]", script.stem):
        return
    if "/" not in words[0]:
        return  # a script of the reader's own
    assert script.is_file(), f"{line.where}: there is no {words[0]}"
    text = script.read_text()
    for word in words[1:]:
        if word.startswith("--"):
            option = word.partition("=")[0]
            assert f'"{option}"' in text, f"{line.where}: {words[0]} has no {option}"


def module_file(module: str) -> bool:
    path = ROOT / Path(*module.split(".")[1:])
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()
