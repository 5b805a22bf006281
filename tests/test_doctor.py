"""crossmask doctor: every gap is named with its remedy, and the exit code says whether training can run."""

from __future__ import annotations

import io
import subprocess
import sys
from importlib import metadata

import pytest
from rich.console import Console

from crossmask.engine import doctor
from crossmask.kernels import native


def report() -> tuple[int, str]:
    """Exit code and text, on one line each so that wrapping cannot split what is looked for."""
    stream = io.StringIO()
    code = doctor.run_doctor(Console(file=stream, width=1000, color_system=None))
    return code, stream.getvalue()


def line(text: str, what: str) -> str:
    return next(line for line in text.splitlines() if f" {what} " in line)


def test_here_training_can_run() -> None:
    code, text = report()
    assert code == 0, text
    assert "Training can run here" in text
    for what in ("Python", "torch", "deepspeed", "devices", "C++ compiler", "native extension", "ema", "recipes"):
        assert line(text, what)
    assert "syncmask-emoji" in line(text, "recipes")


def test_missing_extension_is_a_gap_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    absent = native.NativeStatus(loaded=False, reason="no working C++ compiler was found (install g++, or set CXX)")
    monkeypatch.setattr(native, "status", lambda: absent)
    code, text = report()
    assert code == 0, text
    assert "plain PyTorch runs instead" in line(text, "native extension")
    assert "→ no working C++ compiler was found (install g++, or set CXX)" in text
    assert "plain PyTorch on cpu" in line(text, "ema")


def test_missing_library_stops_training(monkeypatch: pytest.MonkeyPatch) -> None:
    version = metadata.version

    def without_timm(name: str) -> str:
        if name == "timm":
            raise metadata.PackageNotFoundError(name)
        return "0.18.0" if name == "deepspeed" else version(name)

    monkeypatch.setattr(doctor.metadata, "version", without_timm)
    code, text = report()
    assert code == 1
    assert "✗" in line(text, "timm")
    assert "0.18.0, wanted" in line(text, "deepspeed")
    assert "2 things missing" in text
    assert "→ make install" in text


def test_library_that_does_not_import_stops_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchvision", None)
    code, text = report()
    assert code == 1
    assert "does not import" in line(text, "torchvision")


def test_missing_tools_are_gaps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_folders", lambda: "/nonexistent")
    monkeypatch.setattr(doctor.shutil, "which", lambda name, path=None: None)
    findings = {finding.what: finding for finding in doctor._tools()}
    assert {finding.level for finding in findings.values()} == {"gap"}
    assert "apt install g++" in findings["C++ compiler"].remedy


def test_a_look_that_fails_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise OSError("disk\non fire")

    monkeypatch.setattr(doctor, "_recipes", broken)
    findings = [finding for section in doctor.examine() for finding in section]
    assert doctor.Finding("recipes", "OSError: disk on fire", "broken", doctor.INSTALL) in findings


def test_importing_asks_no_gpu() -> None:
    """The kernels initialise no CUDA, and the doctor is imported without torch."""
    code = (
        "import sys, crossmask.engine.doctor; assert 'torch' not in sys.modules\n"
        "import crossmask.kernels, torch; assert not torch.cuda.is_initialized()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
