"""docs/public.md against the code: every name and no other, with its signature, documented and typed."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import inspect
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
_spec = importlib.util.spec_from_file_location("write_public", ROOT / "docs/write_public.py")
assert _spec is not None
assert _spec.loader is not None
written = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(written)

PACKAGES = [package for _, packages in written.GROUPS.values() for package in packages]
PUBLIC = [(package, name) for package in PACKAGES for name in written.names(package)]


def test_the_page_is_what_the_code_says() -> None:
    assert (ROOT / "docs/public.md").read_text() == written.page(), "run: python docs/write_public.py"


# Packages whose names are the engine's own affair: what of them is public, crossmask.engine has.
INNER = {"ablation", "data_check", "doctor", "evaluation", "models", "objectives", "planning"}


def test_every_public_package_is_on_the_page() -> None:
    for wing in ("kernels", "engine"):
        for file in (ROOT / wing).glob("*/__init__.py"):
            name = f"crossmask.{wing}.{file.parent.name}"
            names = getattr(importlib.import_module(name), "__all__", [])
            if name in PACKAGES or not names or file.parent.name in INNER:
                continue
            # an op's own package: it is reached through crossmask.kernels
            assert wing == "kernels", f"{name} has an __all__ and is neither on the page nor in INNER"
            inside = {"roofline"}
            assert {*names} & {*written.names("crossmask.kernels")} or file.parent.name in inside, name


@pytest.mark.parametrize(("package", "name"), PUBLIC, ids=lambda value: value)
def test_a_public_name_is_documented_and_typed(package: str, name: str) -> None:
    value = getattr(importlib.import_module(package), name)
    assert written.told(value, package, name), f"{package}.{name} says nothing of itself"
    if inspect.isroutine(value):
        assert untyped(value) == []
    elif inspect.isclass(value):
        assert inspect.getdoc(value) != inspect.getdoc(object)
        methods = [(key, own) for key, own in vars(value).items() if inspect.isfunction(own)]
        for key, method in methods:
            generated = dataclasses.is_dataclass(value) or hasattr(value, "model_fields") or issubclass(value, tuple)
            if key.startswith("_") and (key != "__init__" or generated):
                continue
            assert untyped(method) == [], f"{package}.{name}.{key}"


def untyped(function: Any) -> list[str]:
    """Parameters without a type, and ``return``."""
    found = inspect.signature(function)
    empty = inspect.Parameter.empty
    missing = [p.name for p in found.parameters.values() if p.annotation is empty and p.name not in ("self", "cls")]
    return missing + ["return"] * (found.return_annotation is empty)


def test_importing_the_engine_costs_nothing() -> None:
    code = "import sys, crossmask.engine as e; d = dir(e); "
    code += "print(*({'torch', 'deepspeed', 'pydantic'} & {*sys.modules}), *({*e.__all__} - {*d}))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == ""


def test_the_type_checker_and_the_look_up_agree_on_where_names_live() -> None:
    import crossmask.engine as engine

    text = (ROOT / "engine/__init__.py").read_text().split("_homes")[0]
    told = {n.strip(): home for home, names in re.findall(r"from (\.\S+) import (.+)", text) for n in names.split(",")}
    assert told == engine._home
    assert sorted(engine.__all__) == sorted(told)


def test_a_registered_part_can_be_named_without_torch() -> None:
    code = "import sys; from crossmask.engine import register_system, register_objective, register_source, Section; "
    code += "print('torch' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "False"
