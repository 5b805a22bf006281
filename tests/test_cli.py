"""The command line: every mistake is one line and a non-zero exit, and leaves nothing behind."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from crossmask.engine import cli
from crossmask.engine.errors import UserError
from crossmask.engine.train import parse_arguments


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "small.yaml").write_text("name: small\ntraining: {batch_size: 32, max_steps: 20}\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    return tmp_path


def run(module: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", module, *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **environment},
    )


def assert_one_line(done: subprocess.CompletedProcess[str], *words: str) -> None:
    assert done.returncode == 2, done
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in done.stderr
    assert sorted(os.listdir()) == ["small.yaml"], "nothing is created on disk"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["small.yaml", "training.max_stps=3"], ["training.max_stps", "did you mean training.max_steps?"]),
        (["small.yaml", "training.max_steps=no"], ["training.max_steps", "expected a whole number ≥ 1"]),
        (["small.yaml", "data.scenes.fraction=2"], ["data.scenes.fraction", "≤ 1"]),
        (["smal.yaml"], ["smal.yaml: no such recipe", "did you mean small.yaml?"]),
        (["small.yaml", "training.batch_size=33"], ["33 is not divisible by 2 ranks"]),
        (["small.yaml", "--ranks", "3"], ["32 is not divisible by 3 ranks", "30 or 33"]),
        (["small.yaml", "--ranks", "0"], ["--ranks"]),
        (["small.yaml", "--rankz", "2"], ["--rankz", "--ranks"]),
        (["small.yaml", "training.precision=fp16"], ["fp16 does not run on a CPU"]),
        (["small.yaml", "deepspeed.zero_optimization.stge=1"], ["stge", "did you mean", "stage?"]),
        (["small.yaml", "deepspeed.zero_optimisation.stage=1"], ["did you mean deepspeed.zero_optimization?"]),
        (["small.yaml", "--output", "."], ["already holds files"]),
        (["--resume", "runs/nothing"], ["not a run folder"]),
        (["small.yaml", "--resume", "runs/nothing"], ["leave small.yaml out"]),
        ([], ["name a recipe"]),
    ],
)
def test_mistakes(
    folder: Path,
    arguments: list[str],
    words: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["crossmask", "train", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    out, err = capsys.readouterr()
    assert_one_line(subprocess.CompletedProcess(arguments, int(ended.value.code or 0), out, err), *words)


def test_a_mistake_on_the_real_command_line(folder: Path) -> None:
    assert_one_line(run("crossmask.engine.cli", "train", "small.yaml", "training.max_stps=3"), "training.max_steps?")
    assert_one_line(run("crossmask.engine.cli", "tran", "small.yaml"), "No such command 'tran'")


def test_the_rank_entry_point_refuses_unknown_launcher_arguments_once(folder: Path) -> None:
    """As ``deepspeed --module crossmask.engine.train`` starts it on rank 0."""
    done = run("crossmask.engine.train", "--local_rank=0", "small.yaml", "--resum", "runs/x", RANK="0", LOCAL_RANK="0")
    assert_one_line(done, "unknown argument --resum", "did you mean --resume?")
    done = run("crossmask.engine.train", "--local_rank=0", "small.yaml", "training.max_stps=3", RANK="0")
    assert_one_line(done, "did you mean training.max_steps?")


def test_what_launchers_pass_is_understood() -> None:
    found = parse_arguments(["--local_rank=1", "small.yaml", "a.b=1", "--output", "here", "c.d=2"])
    assert (found.recipe, found.overrides, found.output) == ("small.yaml", ["a.b=1", "c.d=2"], Path("here"))
    found = parse_arguments(["small.yaml", "--local-rank=1"])
    assert found.local_rank == 1
    found = parse_arguments(["--resume", "runs/x", "training.log_every=1"])
    assert (found.recipe, found.overrides, found.resume) == (None, ["training.log_every=1"], Path("runs/x"))
    for arguments in (["a.yaml", "--out", "x"], ["a.yaml", "--local_rank=x"], ["--resume", "r", "--output", "o"]):
        with pytest.raises(UserError):
            parse_arguments(arguments)


def test_train_hands_the_run_to_the_launcher(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[object] = []

    def launch(arguments: list[str], run_dir: Path, plan: object, rank_timeout: float) -> int:
        seen.append((arguments, run_dir, plan, rank_timeout))
        return 130

    monkeypatch.setattr("crossmask.engine.training.launcher.launch", launch)
    overrides = ["training.max_steps=4", "training.rank_timeout=60", "seed=3"]
    command = ["crossmask", "train", "small.yaml", *overrides, "--output", "out", "--ranks", "1"]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 130
    run_dir = folder / "out"
    assert seen == [(["small.yaml", *overrides, "--output", str(run_dir)], run_dir, (1, ()), 60.0)]
    assert not run_dir.exists(), "the ranks create it, once everything has been checked"


def test_recipes_and_version(folder: Path) -> None:
    done = run("crossmask.engine.cli", "recipes")
    assert done.returncode == 0
    for file in (Path(cli.__file__).resolve().parent.parent / "recipes").glob("*.yaml"):
        assert file.stem in done.stdout
    assert run("crossmask.engine.cli", "--version").stdout.startswith("crossmask ")


def test_starting_up_is_light() -> None:
    looks = "import sys, crossmask.engine.cli as _; print([m for m in ('torch', 'deepspeed') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", looks], capture_output=True, text=True).stdout.strip() == "[]"
