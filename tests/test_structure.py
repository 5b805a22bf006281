"""How the house is built: imports run one way, files stay short, every folder with code is a package."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
WINGS = ("kernels", "engine")
MODULES = sorted(path for wing in WINGS for path in (ROOT / wing).rglob("*.py"))
# what a room may import lies in a line above its own; rooms in one line may import each other, but never in a circle
LAYERS = (
    {"kernels"},
    {"errors", "atomic", "failures", "beats", "plugins", "processor", "recipe", "recipe_fields"},
    {"masking", "teacher", "models", "data"},
    {"objectives", "evaluation", "recipe_files", "exported"},
    {"training", "mask_preview", "data_check", "model_evaluation", "caption_images", "export", "convert"},
    {"cli", "train", "doctor", "ablation", "planning"},
)
SAME_ROOM = {  # two files on one subject
    "deepspeed_config": "recipe_files",  # reading and checking what a user gave
    "export_config": "exported",
    "convert_open_clip": "convert",
    "conversion": "convert",
    "recipe_section": "recipe",
    "registry": "recipe",
    "recipe_sections_captioner": "recipe",
    "recipe_sections_masking": "recipe",
    "recipe_sections_own": "recipe",
    "recipe_sections_composed": "recipe",
    "recipe_sections_recognition": "recipe",
    "recipe_sections_grouping": "recipe",
    "recipe_sections_evaluation": "recipe",
}
RANK = {room: rank for rank, layer in enumerate(LAYERS) for room in layer}
KERNELS_MAY_IMPORT = {"torch", "triton", "crossmask", "__future__", *sys.stdlib_module_names}
INTEGRATIONS_MAY_IMPORT = {"transformers", "timm"}  # kernels/integrations alone, and never unless it is asked for
MAX_LINES = 450


def identify(module: Path) -> str:
    return str(module.relative_to(ROOT))


def imports(module: Path) -> Iterator[tuple[int, str]]:
    """Line and absolute name of everything a module imports, wherever the import stands and whatever guards it."""
    package = ("crossmask", *module.parent.relative_to(ROOT).parts)
    for node in ast.walk(ast.parse(module.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else ()
            name = ".".join((*start, *filter(None, [node.module])))
            # "from . import x" and "from crossmask import engine" name rooms in their list, not in their path
            yield from ((node.lineno, f"{name}.{alias.name}") for alias in node.names)


def room(module: str) -> str | None:
    """The room a module of ours lies in: crossmask.kernels.ema.api → kernels, crossmask.engine.data.batch → data."""
    parts = module.split(".")
    if parts[0] != "crossmask" or len(parts) < 2:
        return None
    name = parts[1] if parts[1] != "engine" else (parts[2] if len(parts) > 2 else None)
    return SAME_ROOM.get(name, name) if name else None


def own_room(module: Path) -> str | None:
    name = ".".join(("crossmask", *module.relative_to(ROOT).with_suffix("").parts))
    return None if name == "crossmask.engine.__init__" else room(name)


def test_modules_are_found() -> None:
    assert len(MODULES) > 20


@pytest.mark.parametrize("module", MODULES, ids=identify)
def test_every_room_has_its_place(module: Path) -> None:
    assert own_room(module) in {*RANK, None}, f"{identify(module)}: add its room to LAYERS"


@pytest.mark.parametrize("module", MODULES, ids=identify)
def test_imports_run_one_way(module: Path) -> None:
    here = own_room(module)
    for line, name in imports(module) if here in RANK else ():
        there = room(name)
        if there in RANK:
            assert RANK[there] <= RANK[here], f"{identify(module)}:{line} imports {name}, which lies above it"


def test_rooms_do_not_import_each_other_in_a_circle() -> None:
    graph: dict[str, set[str]] = {}
    for module in MODULES:
        if here := own_room(module):
            graph.setdefault(here, set()).update(
                there for _, name in imports(module) if (there := room(name)) in RANK and there != here
            )

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, f"a circle: {' → '.join((*path, name))}"
        for there in graph.get(name, ()):
            visit(there, (*path, name))

    for name in graph:
        visit(name, ())


@pytest.mark.parametrize("module", [m for m in MODULES if own_room(m) == "kernels"], ids=identify)
def test_kernels_import_torch_and_triton_alone(module: Path) -> None:
    integrates = module.parent == ROOT / "kernels" / "integrations"
    allowed = KERNELS_MAY_IMPORT | INTEGRATIONS_MAY_IMPORT if integrates else KERNELS_MAY_IMPORT
    for line, name in imports(module):
        assert name.split(".")[0] in allowed, f"{identify(module)}:{line} imports {name}"


def test_the_kernels_bring_neither_transformers_nor_timm_along() -> None:
    code = "import crossmask.kernels, crossmask.kernels.integrations.transformers, sys; "
    code += "print(*{'transformers', 'timm'} & {*sys.modules})"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == ""


def test_every_library_is_declared() -> None:
    """Whatever the code imports stands in pyproject.toml, optional peers among the extras."""
    text = (ROOT / "pyproject.toml").read_text().split("\ndev = [")[0]
    declared = set(re.findall(r'^\s*(?:\w+ = \[)?"([A-Za-z0-9-]+)(?:[<>=].*)?"', text, re.MULTILINE))
    distribution = {"PIL": "pillow", "yaml": "pyyaml", "flash_attn": "flash-attn"}
    comes_along = {"crossmask", "triton", "pydantic_core"}  # triton with torch, pydantic_core with pydantic
    for module in MODULES:
        for line, name in imports(module):
            top = name.split(".")[0]
            known = top in sys.stdlib_module_names or top in comes_along
            assert known or distribution.get(top, top) in declared, f"{identify(module)}:{line} imports {top}"


@pytest.mark.parametrize("module", MODULES, ids=identify)
def test_wings_import_by_full_name_and_rooms_by_relative_name(module: Path) -> None:
    """Absolute names between the wings, relative ones within a wing; a bare ``kernels`` is someone else's package."""
    wing = module.relative_to(ROOT).parts[0]
    for node in ast.walk(ast.parse(module.read_text())):
        if isinstance(node, ast.ImportFrom) and not node.level:
            assert not (node.module or "").startswith(f"crossmask.{wing}"), f"{identify(module)}:{node.lineno}"
            assert (node.module or "").split(".")[0] not in WINGS, f"{identify(module)}:{node.lineno}"


@pytest.mark.parametrize("path", [*MODULES, *sorted((ROOT / "csrc").iterdir())], ids=identify)
def test_files_stay_short(path: Path) -> None:
    lines = len(path.read_text().splitlines())
    assert lines <= MAX_LINES, f"{identify(path)} has {lines} lines, more than {MAX_LINES}: split it by subject"


@pytest.mark.parametrize("folder", sorted({module.parent for module in MODULES}), ids=identify)
def test_every_folder_with_code_is_a_package_with_a_telling_name(folder: Path) -> None:
    assert (folder / "__init__.py").is_file(), f"{identify(folder)} has no __init__.py"
    assert folder.name not in {"utils", "common", "helpers", "misc"}


@pytest.mark.parametrize("module", [m for m in MODULES if m.name != "__init__.py"], ids=identify)
def test_every_module_says_what_it_is(module: Path) -> None:
    assert module.stem not in {"utils", "common", "helpers", "misc"}
    assert ast.get_docstring(ast.parse(module.read_text())), f"{identify(module)} has no docstring"
