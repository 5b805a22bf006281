"""The package as others get it: sdist → wheel → an environment of its own; with a compiler and without one."""

from __future__ import annotations

import json
import os
import re
import shutil
import site
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILES = "pyproject.toml setup.py CMakeLists.txt MANIFEST.in LICENSE README.md CHANGELOG.md CONTRIBUTING.md Makefile"
SHIPPED = [*FILES.split(), "constraints.txt", "kernels", "engine", "recipes", "csrc", "tests"]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="the extension is built on Linux only"),
]


def run(*command: str | Path, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run with this environment on top of ours, but nothing of ours that could make the checkout importable."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "CROSSMASK", "CXX", "CUDACXX"))}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**inherited, **environment},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done


def build_wheel(source: Path, into: Path, **environment: str) -> Path:
    run(
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-build-isolation",
        "--no-deps",
        "-w",
        into,
        source,
        cwd=into,
        **{"CROSSMASK_CUDA": "0", **environment},
    )
    (wheel,) = into.glob("*.whl")
    return wheel


def install(wheel: Path, folder: Path) -> Path:
    """A new environment that holds the wheel and sees the libraries of ours, but not our own crossmask."""
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
    python = folder / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel, cwd=folder.parent)
    (packages,) = folder.glob("lib/python*/site-packages")
    # a plain path in a .pth file: the .pth files of that folder, the editable install's among them, are not read
    (packages / "libraries.pth").write_text("\n".join(site.getsitepackages()) + "\n")
    return python


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Unpacked, from a copy of the checkout: a build in place would meet the leftovers of others."""
    folder = tmp_path_factory.mktemp("sdist")
    source = folder / "source"
    source.mkdir()
    for name in SHIPPED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "_C.*"))
        elif (ROOT / name).exists():
            shutil.copy(ROOT / name, source)
    run(sys.executable, "-m", "build", "--sdist", "--no-isolation", "-x", "--outdir", folder, source, cwd=folder)
    (archive,) = folder.glob("*.tar.gz")
    shutil.unpack_archive(archive, folder / "unpacked")
    (unpacked,) = (folder / "unpacked").iterdir()
    return unpacked


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(sdist, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return install(wheel, tmp_path_factory.mktemp("installed") / "environment")


def test_sdist_holds_what_a_build_needs(sdist: Path) -> None:
    for name in ("CMakeLists.txt", "LICENSE", "constraints.txt", "csrc/ema_cuda.cu", "csrc/ema.h", "tests/conftest.py"):
        assert (sdist / name).is_file(), name


def test_wheel_holds_all_code_and_data(wheel: Path) -> None:
    assert wheel.name.startswith("crossmask-0.1.0-cp310-abi3-linux")
    with zipfile.ZipFile(wheel) as archive:
        inside = set(archive.namelist())
        metadata = archive.read("crossmask-0.1.0.dist-info/METADATA").decode()
    expected = {
        f"crossmask/{path.relative_to(ROOT)}"
        for room in ("kernels", "engine", "recipes")
        for path in (ROOT / room).rglob("*")
        if path.is_file()
        and "__pycache__" not in path.parts
        and not path.name.startswith("_C.")
        and path.suffix != ".pyc"
    }
    native = {"crossmask/kernels/_C.abi3.so", "crossmask/kernels/_C.json"}
    code_and_data = {name for name in inside if ".dist-info/" not in name}
    assert code_and_data == expected | native
    assert any(name.endswith("emoji_set/captions.jsonl") for name in inside)
    assert "crossmask-0.1.0.dist-info/licenses/LICENSE" in inside
    assert "License-Expression: Apache-2.0" in metadata
    assert "Requires-Python: <3.14,>=3.10" in metadata
    assert re.search(r"Requires-Dist: torch<2\.15,>=2\.14\n", metadata)


def test_one_extension_for_every_python_and_torch(wheel: Path, tmp_path: Path) -> None:
    """Only Python's limited API and torch's stable ABI, both C: no mangled C++ symbol of torch may be needed."""
    with zipfile.ZipFile(wheel) as archive:
        library = archive.extract("crossmask/kernels/_C.abi3.so", tmp_path)
    if shutil.which("nm") is None:
        pytest.skip("nm (binutils) is not installed")
    needed = run("nm", "-D", "--undefined-only", library, cwd=tmp_path).stdout.split()
    torch_cpp = [
        name for name in needed if name.startswith("_Z") and ("c10" in name or "at6Tensor" in name or "5torch" in name)
    ]
    assert not torch_cpp
    assert any(name.startswith(("torch_", "aoti_torch_")) for name in needed)
    python = {name for name in needed if name.startswith(("Py", "_Py"))}
    counting = {"Py_DecRef", "_Py_Dealloc", "_Py_DecRef"}
    module = {"PyModule_Create2", "PyModule_AddStringConstant", "PyList_Size", "PyList_GetItem", "PyBool_FromLong"}
    assert python <= counting | module | {"_Py_NoneStruct"}, python


USE = """
import importlib.resources as resources, json, sys, warnings
warnings.simplefilter("error")
import torch
import crossmask.engine, crossmask.kernels
captions = resources.files("crossmask.engine.data") / "emoji_set" / "captions.jsonl"
from crossmask.kernels import ema_update_, native
teacher, student = [torch.zeros(3), torch.ones(2, 2)], [torch.ones(3, dtype=torch.bfloat16), torch.zeros(2, 2)]
ema_update_(teacher, student, 0.75)
print(json.dumps({
    "files": [crossmask.kernels.__file__, crossmask.engine.__file__, str(native.status().path)],
    "loaded": native.status().loaded, "cuda_reason": native.status().cuda_reason,
    "teacher": [t.flatten().tolist() for t in teacher],
    "recipes": sorted(f.name for f in resources.files("crossmask.recipes").iterdir()),
    "captions": len(captions.read_text().splitlines()),
}))
"""


def test_installed_package_works_from_another_directory(installed: Path, tmp_path: Path) -> None:
    told = json.loads(run(installed, "-c", USE, cwd=tmp_path).stdout.splitlines()[-1])
    environment = installed.parents[1]
    assert all(Path(file).is_relative_to(environment) for file in told["files"]), told["files"]
    assert told["loaded"]
    assert told["teacher"] == [[0.25] * 3, [0.75] * 4]
    assert "CROSSMASK_CUDA=0 was set at installation" in told["cuda_reason"]
    assert sorted(path.name for path in (ROOT / "recipes").glob("*.yaml")) == [
        r for r in told["recipes"] if r.endswith(".yaml")
    ]
    assert told["captions"] > 1000


def test_installed_command_works_from_another_directory(installed: Path, tmp_path: Path) -> None:
    assert "train" in run(installed.with_name("crossmask"), "--help", cwd=tmp_path).stdout
    assert run(installed.with_name("crossmask"), "--version", cwd=tmp_path).stdout.split() == ["crossmask", "0.1.0"]


def test_without_a_compiler_the_install_succeeds_and_says_what_runs(sdist: Path, tmp_path: Path) -> None:
    source = shutil.copytree(
        sdist, tmp_path / "source", ignore=shutil.ignore_patterns("build")
    )  # no remembered compiler
    wheel = build_wheel(source, tmp_path, CXX="/nonexistent")
    with zipfile.ZipFile(wheel) as archive:
        assert "crossmask/kernels/_C.abi3.so" not in archive.namelist()
        report = json.loads(archive.read("crossmask/kernels/_C.json"))
    reason = "the native extension was not built: no working C++ compiler was found (install g++, or set CXX)"
    assert report["reason"] == reason
    python = install(wheel, tmp_path / "environment")

    calm = USE.replace('simplefilter("error")', 'simplefilter("default")')
    done = run(python, "-c", calm, cwd=tmp_path)
    told = json.loads(done.stdout.splitlines()[-1])
    assert not told["loaded"]
    assert told["teacher"] == [[0.25] * 3, [0.75] * 4]
    assert done.stderr.count(f"ema_update_ runs in plain PyTorch on cpu: {reason}") == 1

    doctor = (
        "from crossmask.engine.doctor import building, ops\n"
        "for finding in [*building.judge_extension(building.look_extension()), *ops.kernels()]:\n"
        "    print(finding.what, finding.level, finding.here, finding.remedy)"
    )
    said = run(python, "-c", doctor, cwd=tmp_path).stdout
    assert f"native extension gap not loaded; plain PyTorch runs instead {reason}" in said
    assert "ema fine plain PyTorch on cpu" in said
