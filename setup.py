"""The two wings under one name, and the native extension by CMake. Everything else is in pyproject.toml.

``kernels/`` is installed as ``crossmask.kernels``, ``engine/`` as ``crossmask.engine``, recipes/ as crossmask.recipes.
The extension is wanted, not needed: where it cannot be built the install succeeds, says why in one line, and leaves the
reason in ``_C.json`` beside the missing library, for ``crossmask doctor`` and the first call.

Environment: CROSSMASK_NATIVE=0 skips the extension, CROSSMASK_CUDA=0 its CUDA kernels,
CROSSMASK_CUDA_ARCHITECTURES="80;90" chooses what they are compiled for.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


class CannotBuildError(Exception):
    """What keeps the extension, or its CUDA part, from being built: one line, with the remedy where there is one."""


class CMakeBuild(build_ext):
    def run(self):
        for extension in self.extensions:
            library = Path(self.get_ext_fullpath(extension.name)).absolute()  # in the source tree when editable
            library.parent.mkdir(parents=True, exist_ok=True)
            report = build(library, Path(self.build_temp).absolute())
            if not report["built"]:
                library.unlink(missing_ok=True)  # an older build would hide what is missing
            library.with_name("_C.json").write_text(json.dumps(report, indent=1) + "\n")
            for missing in filter(None, (report["reason"], report["cuda_reason"])):
                print(f"crossmask: {missing}", file=sys.stderr, flush=True)

    def get_outputs(self):
        return [path for path in super().get_outputs() if Path(path).exists()]

    def get_output_mapping(self):
        return {}  # built straight into place


def build(library: Path, scratch: Path) -> dict:
    """Build the library with CUDA if there is an nvcc, else without; the report says what is missing and why."""
    report = {"built": False, "reason": None, "cuda_reason": None, "torch": None}
    try:
        if os.environ.get("CROSSMASK_NATIVE") == "0":
            raise CannotBuildError("CROSSMASK_NATIVE=0 was set at installation")
        cmake, ninja = tool("cmake"), tool("ninja")
        torch_root, report["torch"] = find_torch()
        settings = [f"-DCMAKE_MAKE_PROGRAM={ninja}", f"-DPython_EXECUTABLE={sys.executable}"]
        settings += [f"-DTORCH_ROOT={torch_root}"]
        try:
            with_cuda = [f"-DCMAKE_CUDA_COMPILER={find_nvcc()}", "-DCROSSMASK_CUDA=ON"]
            with_cuda += [f"-DCROSSMASK_CUDA_ARCHITECTURES={os.environ.get('CROSSMASK_CUDA_ARCHITECTURES', '')}"]
            run_cmake(cmake, scratch / "cuda", settings + with_cuda, library)
        except CannotBuildError as error:
            run_cmake(cmake, scratch / "cpu", [*settings, "-DCROSSMASK_CUDA=OFF"], library)
            report["cuda_reason"] = f"its CUDA kernels were not built: {error}"
        report["built"] = True
    except CannotBuildError as error:
        report["reason"] = f"the native extension was not built: {error}"
    return report


def tool(name: str) -> str:
    """A build tool from this Python's own scripts folder or from PATH."""
    folders = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)])
    if found := shutil.which(name, path=folders):
        return found
    raise CannotBuildError(f"no {name} was found (pip install {name})")


def find_nvcc() -> str:
    if os.environ.get("CROSSMASK_CUDA") == "0":
        raise CannotBuildError("CROSSMASK_CUDA=0 was set at installation")
    candidates = (os.environ.get("CUDACXX"), "nvcc", "/usr/local/cuda/bin/nvcc")
    if found := next(filter(None, map(shutil.which, filter(None, candidates))), None):
        return found
    raise CannotBuildError("no nvcc was found (install the CUDA toolkit, or set CUDACXX)")


def find_torch() -> tuple[str, str]:
    """Folder and version of torch, not imported; in pip's isolated build, that of the environment it builds for."""
    look = "import importlib.util as u, runpy; s = u.find_spec('torch'); r = s.submodule_search_locations[0]; "
    look += "print(r); print(runpy.run_path(r + '/version.py')['__version__'])"
    for flags in ([], ["-E"]):  # -E: past PYTHONPATH, which is how pip isolates
        found = subprocess.run([sys.executable, *flags, "-c", look], capture_output=True, text=True, cwd=ROOT)
        if found.returncode == 0:
            root, version = found.stdout.splitlines()
            if tuple(map(int, re.findall(r"\d+", version)[:2])) < (2, 13):
                raise CannotBuildError(f"torch {version} is too old (2.13 or newer is needed)")
            return root, version
    raise CannotBuildError("torch was not there when crossmask was installed (install torch first)")


def run_cmake(cmake: str, folder: Path, settings: list[str], library: Path) -> None:
    """Configure, build and put the library in its place; on failure, say what the log says."""
    folder.mkdir(parents=True, exist_ok=True)
    for step in ([cmake, "-G", "Ninja", "-S", ROOT, "-B", folder, *settings], [cmake, "--build", folder]):
        ran = subprocess.run(list(map(str, step)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        print(ran.stdout, flush=True)  # pip shows it with -v
        if ran.returncode:
            raise CannotBuildError(cause(ran.stdout))
    shutil.copyfile(folder / library.name, partial := library.with_suffix(".partial"))
    os.replace(partial, library)  # a process that has the old one loaded keeps it


def cause(log: str) -> str:
    """What a CMake or compiler log says is wrong, in one line."""
    if re.search("CMAKE_CXX_COMPILER (not set|could be found)|is not able to compile a simple test program", log):
        return "no working C++ compiler was found (install g++, or set CXX)"
    if "Could NOT find Python" in log:
        return "Python.h was not found (install this Python's headers, e.g. python3-dev)"
    if said := re.search(r"^CMake Error.*?:\n((?: +\S.*\n)+)", log, re.MULTILINE):
        return " ".join(said[1].split())[:300]
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    return next((line for line in lines if "error" in line.lower()), (lines or ["cmake failed"])[-1])[:300]


def wing(folder: str) -> list[str]:
    """Every folder with Python in it is a package."""
    files = (ROOT / folder).rglob("*.py")
    return sorted({".".join(("crossmask", *path.parent.relative_to(ROOT).parts)) for path in files})


setup(
    packages=[*wing("kernels"), *wing("engine"), *wing("recipes")],
    package_dir={f"crossmask.{folder}": folder for folder in ("kernels", "engine", "recipes")},
    ext_modules=[Extension("crossmask.kernels._C", sources=[], py_limited_api=True)],
    cmdclass={"build_ext": CMakeBuild},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
