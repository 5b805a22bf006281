"""crossmask doctor here: it never crashes, prints what it finds, and its exit code says whether training can run."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import time
from importlib import metadata

import pytest
from rich.console import Console

from crossmask.engine import doctor
from crossmask.engine.doctor import Finding, building, examination, libraries, programs, report
from crossmask.kernels import native


def run(command: list[str] | None = None, width: int = 200, as_json: bool = False) -> tuple[int, str]:
    stream = io.StringIO()
    code = doctor.run_doctor(Console(file=stream, width=width, color_system=None), as_json, command)
    return code, stream.getvalue()


def examined() -> dict[str, Finding]:
    return {finding.what: finding for section in examination.examine() for finding in section.findings}


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_here_training_can_run() -> None:
    began = time.monotonic()
    code, text = run(as_json=True)
    took = time.monotonic() - began
    told = json.loads(text)
    assert code == 0, text
    assert told["can_train"]
    found = {finding["what"]: finding for section in told["sections"] for finding in section["findings"]}
    for what in ("Python", "torch", "deepspeed", "GPUs", "CPU", "memory", "C++ compiler", "native extension", "ema"):
        assert found[what]["level"] in ("fine", "optional", "gap")
    assert "syncmask-emoji" in found["recipes"]["here"]
    assert [section["title"] for section in told["sections"]] == list(examination.sections())
    assert took < 60, f"{took:.0f} s"  # a few seconds where nothing else runs
    gaps = [finding for finding in found.values() if finding["level"] in ("gap", "broken")]
    assert all(finding["remedy"] for finding in gaps)


@pytest.mark.parametrize("width", [80, 120])
def test_lines_fit_the_terminal_and_the_verdict_counts(width: int) -> None:
    findings = [
        Finding("GPUs", "none; training runs as CPU ranks"),
        Finding("a name of exactly", "[x] " + "very long " * 30, "gap", "do " + "this " * 30),
        Finding("timm", "not installed", "broken", "make install"),
    ]
    lines = [json.dumps({"title": "GPUs", "findings": [vars(f) for f in findings[:count]]}) for count in (1, 2, 3)]
    for count, verdict in (
        (1, "here, on CPU ranks."),
        (2, "here, on CPU ranks. 1 gap, marked"),
        (3, "1 thing missing"),
    ):
        said = "\n".join([lines[count - 1], '{"title": "", "findings": []}'])
        code, text = run(python(f"print({said!r})"), width)
        assert code == (1 if count == 3 else 0)
        assert max(map(len, text.splitlines())) <= width
        assert verdict in " ".join(text.split())
        assert count == 1 or "[x] very long" in text


@pytest.mark.parametrize(
    ("code", "why"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "ended by SIGSEGV: a library crashed"),
        ("raise SystemExit('no torch')", "ended with exit code 1: no torch"),
        ("print('not json')", "ended with exit code 0"),
        ("import time; time.sleep(60)", "took longer than 0 s"),
    ],
)
def test_what_ends_the_examination_is_a_finding(code: str, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if "sleep" in code:
        monkeypatch.setattr(report, "PATIENCE", 0.2)
    done = "import json; print(json.dumps({'title': 'Python and libraries', 'findings': []}), flush=True)\n"
    failed, text = run(python(done + code))
    assert failed == 1
    assert why in text
    assert "→ import the libraries above one by one" in text
    assert text.index("Python and libraries") < text.index("GPUs") < text.index(why)  # in the section that was next


def test_missing_libraries_stop_training(monkeypatch: pytest.MonkeyPatch) -> None:
    version = metadata.version

    def changed(name: str) -> str:
        if name == "timm":
            raise metadata.PackageNotFoundError(name)
        return "0.18.0" if name == "deepspeed" else version(name)

    monkeypatch.setattr(libraries.metadata, "version", changed)
    monkeypatch.setitem(sys.modules, "torchvision", None)
    found = {finding.what: finding for finding in libraries.libraries()}
    assert found["timm"] == Finding("timm", "not installed", "broken", doctor.INSTALL)
    assert found["deepspeed"].here.startswith("0.18.0, wanted")
    assert found["deepspeed"].level == "broken"
    assert "does not import" in found["torchvision"].here
    assert found["torchvision"].level == "broken"
    assert found["transformers"].here.endswith("(tested: >=5.20,<6)")


def test_without_torch_one_line_is_broken_and_nothing_crashes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setattr(libraries, "IMPORTED", {"torch": "torch"})  # the others have torch in them already
    found = examined()
    assert [what for what, finding in found.items() if finding.level == "broken"] == ["torch"]
    assert found["GPUs"] == Finding("GPUs", "not looked at: torch does not import", "gap", "mend torch, named above")
    assert "recipes" in found


def test_missing_extension_is_a_gap_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    reason = "no working C++ compiler was found (install g++, or set CXX)"
    monkeypatch.setattr(native, "status", lambda: native.NativeStatus(loaded=False, reason=reason))
    found = examined()
    wanted = Finding("native extension", "not loaded; plain PyTorch runs instead", "gap", reason)
    assert found["native extension"] == wanted
    assert "plain PyTorch on cpu" in found["ema"].here


def test_missing_tools_are_gaps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(programs, "find", lambda names: None)
    found = {finding.what: finding for finding in building.judge_tools(building.look_tools(), gpus=True)}
    assert {finding.level for finding in found.values()} == {"gap"}
    assert "apt install g++" in found["C++ compiler"].remedy


def test_a_look_that_fails_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise OSError("disk\non fire")

    monkeypatch.setattr(examination, "recipes", broken)
    monkeypatch.setattr(libraries, "libraries", list)
    assert examined()["recipes"] == Finding("recipes", "OSError: disk on fire", "broken", doctor.INSTALL)


def test_a_program_that_hangs_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(programs, "PATIENCE", 0.1)
    assert programs.ask("sleep", "5") == ""
    assert programs.ask("/nonexistent") == ""
    assert programs.ask("false") == ""


def test_importing_asks_no_gpu() -> None:
    """The kernels initialise no CUDA, and the doctor is imported without torch."""
    code = (
        "import sys, crossmask.engine.doctor; assert 'torch' not in sys.modules\n"
        "import crossmask.kernels, torch; assert not torch.cuda.is_initialized()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
