"""Ablations: what is refused before anything runs, what is trained again, and what the table says of fixed numbers.

The training itself is a stand-in, but for one test at the end.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from crossmask.engine import cli
from crossmask.engine.ablation import Ablation, ablate, load_ablation, running, shipped_ablations
from crossmask.engine.ablation.plan import PlannedRun, Start, choose, plan_runs
from crossmask.engine.ablation.running import run_all
from crossmask.engine.errors import CheckpointError, RecipeError, UserError
from crossmask.engine.recipe_files import dump_recipe, load_recipe
from crossmask.engine.training.run_lock import run_lock

TOY: dict[str, Any] = {
    "recipe": "small.yaml",
    "metrics": [
        {"path": "splits.*.i2t.r1", "title": "TR R@1"},
        {"path": "itm.loss", "title": "ITM loss", "higher_is_better": False, "digits": 3},
    ],
    "variants": [
        {"name": "plain", "overrides": ["objectives.itc.distillation=0"]},
        {"name": "taught", "title": "with a teacher"},
        {"name": "tuned", "from": "taught", "recipe": "fine.yaml"},
    ],
}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "small.yaml").write_text("name: small\ntraining: {batch_size: 32, max_steps: 20}\n")
    (tmp_path / "fine.yaml").write_text("name: fine\ntraining: {batch_size: 32, max_steps: 10}\n")
    (tmp_path / "toy.yaml").write_text(yaml.safe_dump(TOY))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    return tmp_path


def toy(**changes: Any) -> Ablation:
    Path("changed.yaml").write_text(yaml.safe_dump({**TOY, **changes}))
    return load_ablation("changed.yaml")


def write_run(run: PlannedRun, state: str = "finished", **evaluation: Any) -> None:
    """What a run leaves behind."""
    (run.folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    (run.folder / "checkpoints/latest").write_text("step-000010")
    recipe = run.recipe.model_copy(update={"output": run.folder})
    (run.folder / "recipe.yaml").write_text(dump_recipe(recipe))
    (run.folder / "status.json").write_text(json.dumps({"state": state, "step": 10}))
    if state == "finished":
        (run.folder / "evaluation.json").write_text(json.dumps({"minutes": 2.0, **evaluation}))


def measured(tr: float, loss: float) -> dict[str, Any]:
    return {"splits": {"a": {"i2t": {"r1": tr - 1}}, "b": {"i2t": {"r1": tr + 1}}}, "itm": {"loss": loss}}


class Trainer:
    """Notes what it was asked for; ends with the code given for a run's name, by default 0."""

    def __init__(self, **codes: int) -> None:
        self.codes, self.asked = codes, list[tuple[str, Start]]()

    def __call__(self, run: PlannedRun, start: Start) -> int:
        self.asked.append((run.name, start))
        code = self.codes.get(run.name.replace("-", "_"), 0)
        if not code:
            write_run(run, **measured(10.0 * len(self.asked), 0.6))
        return code


def run_toy(train: Callable[..., int], *overrides: str, **options: Any) -> tuple[int, list[str]]:
    said: list[str] = []
    given = {"seeds": None, "only": None, **options}
    code = ablate("toy.yaml", overrides, Path("out"), tell=said.append, train=train, **given)
    return code, said


# Files


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"metric": []}, ["unknown key metric", "did you mean metrics?"]),
        (
            {"variants": [{"name": "a", "overides": []}]},
            ["unknown key variants[a].overides", "did you mean overrides?"],
        ),
        ({"variants": [{"name": "a", "fro": "b"}]}, ["unknown key variants[a].fro", "did you mean from?"]),
        ({"variants": [{"title": "a"}]}, ["variants.0.name is missing", "folder's name"]),
        ({"variants": [{"name": "a/b"}]}, ["variants[a/b].name", "'a/b' is not allowed", "folder's name"]),
        ({"variants": [{"name": "a"}, {"name": "a"}]}, ["variants: name a is given twice"]),
        ({"variants": [{"name": "a"}, {"name": "b", "title": "a"}]}, ["variants: title a is given twice"]),
        ({"variants": [{"name": "b", "from": "a"}, {"name": "a"}]}, ["variant b: from: no earlier variant a"]),
        ({"variants": [{"name": "full"}, {"name": "b", "from": "ful"}]}, ["did you mean full?"]),
        (
            {"variants": [{"name": "a"}, {"name": "b", "against": "b"}]},
            ["variant b: against: no variant b; there is a"],
        ),
        ({"variants": []}, ["variants: [] is not allowed", "expected a list of variants"]),
        ({"variants": [{"name": "a", "overrides": ["x.y=1", 3]}]}, ["variants[a].overrides.1: 3 is not allowed"]),
        ({"seeds": [0, 0]}, ["seeds 0 is given twice"]),
        ({"seeds": [True]}, ["seeds.0: True is not allowed", "whole numbers"]),
        ({"metrics": [{"path": "splits..r1", "title": "R"}]}, ["metrics.0.path", "dotted path"]),
        ({"metrics": [{"path": "r1", "title": "R", "digits": True}]}, ["metrics.0.digits", "whole number of decimals"]),
        ({"compare": "next"}, ["compare: 'next' is not allowed", "previous or first"]),
        ({"recipe": "smal.yaml"}, ["smal.yaml: no such recipe", "did you mean small.yaml?"]),
        ({"variants": [{"name": "a", "recipe": "fin.yaml"}]}, ["fin.yaml: no such recipe", "did you mean fine.yaml?"]),
    ],
)
def test_mistakes_in_a_file(changes: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(RecipeError) as error:
        toy(**changes)
    line = str(error.value)
    assert line.startswith("changed.yaml: ")
    assert "\n" not in line
    for word in words:
        assert word in line


@pytest.mark.parametrize(
    ("changes", "overrides", "words"),
    [
        ({}, ["training.max_stps=3"], ["variant plain: ", "did you mean training.max_steps?"]),
        (
            {"variants": [{"name": "a"}, {"name": "b", "overrides": ["objectives.itc.weigt=0"]}]},
            [],
            ["variant b: override objectives.itc.weigt=0", "did you mean objectives.itc.weight?"],
        ),
        ({}, ["training.batch_size=33"], ["variant plain: ", "33 is not divisible by 2 ranks"]),
        ({}, ["seed=3"], ["seed is given with --seeds"]),
        ({"overrides": ["output=x"]}, [], ["output is given with --output"]),
        ({}, ["model.initial=small.yaml"], ["variant tuned starts from taught"]),
        ({}, ["objectives.itc.distillation=0.2"], ["variants plain-seed0 and taught-seed0 would be the same run"]),
    ],
)
def test_every_variant_is_checked_before_anything_runs(
    changes: dict[str, Any], overrides: list[str], words: list[str], folder: Path
) -> None:
    (folder / "changed.yaml").write_text(yaml.safe_dump({**TOY, **changes}))
    trainer = Trainer()
    with pytest.raises(UserError) as error:
        ablate("changed.yaml", overrides, folder / "out", None, None, print, train=trainer)
    for word in words:
        assert word in str(error.value)
    assert not trainer.asked
    assert not (folder / "out").exists()


def test_paths_in_a_file_are_relative_to_it(folder: Path) -> None:
    inner = folder / "inner"
    inner.mkdir()
    (inner / "words.txt").write_text("[PAD]\n")
    (folder / "small.yaml").rename(inner / "small.yaml")
    changes = ["data.vocabulary=words.txt", "deepspeed=zero1.json", "optimizer.lr=1e-3"]
    (inner / "a.yaml").write_text(yaml.safe_dump({**TOY, "variants": [{"name": "a", "overrides": changes}]}))
    (run,) = plan_runs(load_ablation("inner/a.yaml"), Path("out"))
    assert run.recipe.data.vocabulary == inner / "words.txt"
    assert run.recipe.optimizer.lr == 1e-3
    assert run.recipe.training.max_steps == 20
    assert run.file == str(inner / "small.yaml")
    assert load_recipe(run.file, run.overrides).data.vocabulary == inner / "words.txt", "from wherever it is started"


def test_names_of_ablations() -> None:
    assert load_ablation("toy.yaml").name == "toy"
    with pytest.raises(RecipeError, match=r"toi\.yaml: no such ablation; did you mean toy\.yaml\?"):
        load_ablation("toi.yaml")
    Path("list.yaml").write_text("- a\n")
    with pytest.raises(RecipeError, match="an ablation is a mapping with the keys recipe, metrics and variants, not a"):
        load_ablation("list.yaml")


@pytest.mark.parametrize("name", shipped_ablations())
def test_shipped_ablations_can_be_planned(name: str, folder: Path) -> None:
    ablation = load_ablation(f"recipes/ablations/{name}.yaml")
    assert ablation == load_ablation(name)
    runs = plan_runs(ablation, folder / "out", [0, 1])
    assert len(runs) == 2 * len(ablation.variants)


# The plan


def test_the_plan() -> None:
    ablation = toy(seeds=[4, 7]).overridden(["optimizer.lr=1e-3"])
    runs = plan_runs(ablation, Path("o u:t"))
    assert [run.name for run in runs] == [
        *("plain-seed4", "taught-seed4", "tuned-seed4"),
        *("plain-seed7", "taught-seed7", "tuned-seed7"),
    ]
    plain, taught, tuned = runs[:3]
    assert (plain.recipe.objectives.itc.distillation, taught.recipe.objectives.itc.distillation) == (0.0, 0.4)
    assert {run.recipe.optimizer.lr for run in runs} == {1e-3}
    assert (taught.recipe.training.max_steps, tuned.recipe.training.max_steps) == (20, 10)
    assert [run.recipe.seed for run in runs] == [4] * 3 + [7] * 3
    assert (taught.source, tuned.source) == (None, Path("o u:t").absolute() / "taught-seed4")
    # what the ranks will read is what was planned
    tuned.source.mkdir(parents=True)
    assert load_recipe(tuned.file, tuned.overrides) == tuned.recipe
    assert tuned.recipe.model.initial == tuned.source
    assert tuned.arguments[-2:] == ["--output", str(tuned.folder)]


def test_the_last_override_of_a_field_counts_in_its_place() -> None:
    own = ["evaluation.sampled={draws: 2}", "evaluation.sampled.draws=3"]
    ablation = toy(overrides=["evaluation.sampled.draws=1", "seed=0"], variants=[{"name": "a", "overrides": own}])
    assert ablation.changes(ablation.variants[0]) == ["seed=0", *own]
    assert ablation.overridden(["seed=1"]).changes(ablation.overridden(["seed=1"]).variants[0]) == [*own, "seed=1"]


def test_only_names_variants_and_wants_their_sources() -> None:
    ablation = toy()
    runs = plan_runs(ablation, Path("out"))
    assert [run.name for run in choose(ablation, runs, ["plain"])] == ["plain-seed0"]
    assert [run.name for run in choose(ablation, runs, ["tuned", "taught"])] == ["taught-seed0", "tuned-seed0"]
    with pytest.raises(RecipeError, match="--only: no variant plan; did you mean plain"):
        choose(ablation, runs, ["plan"])
    with pytest.raises(RecipeError, match="tuned-seed0 starts from taught-seed0, which is not finished; add taught"):
        choose(ablation, runs, ["tuned"])
    write_run(runs[1])
    assert [run.name for run in choose(ablation, runs, ["tuned"])] == ["tuned-seed0"]


def test_what_a_folder_holds(folder: Path) -> None:
    (run, *_) = plan_runs(toy(), folder / "out")
    assert run.look() is Start.NEW
    run.folder.mkdir(parents=True)
    (run.folder / "lock").touch()
    assert run.look() is Start.AGAIN
    write_run(run, "stopped")
    assert run.look() is Start.RESUME
    write_run(run, "finished")
    assert run.look() is Start.FINISHED
    (run.folder / "evaluation.json").write_text("{")
    assert run.look() is Start.RESUME, "to be evaluated again"
    write_run(run, "failed")
    (run.folder / "checkpoints/latest").unlink()
    assert run.look() is Start.AGAIN
    (run.folder / "recipe.yaml").write_text("model: 3")
    with pytest.raises(CheckpointError, match="cannot be read as a recipe"):
        run.look()
    (run.folder / "recipe.yaml").unlink()
    with pytest.raises(CheckpointError, match="holds files but no run"):
        run.look()


def test_another_run_is_refused_and_named(folder: Path) -> None:
    plain, _, tuned = plan_runs(toy(), folder / "out")
    write_run(plain)
    assert plan_runs(toy().overridden(["training.log_every=1", "note=x"]), folder / "out")[0].look() is Start.FINISHED
    (other, *_) = plan_runs(toy().overridden(["training.max_steps=21", "optimizer.lr=1"]), folder / "out")
    with pytest.raises(CheckpointError) as error:
        other.look()
    assert "plain-seed0 is another run: optimizer.lr is 0.0001 there and 1.0 in the ablation (and 1 more" in str(
        error.value
    )
    # a folder that was moved with all its runs is still the same
    write_run(tuned)
    (folder / "out").rename(folder / "moved")
    assert plan_runs(toy(), folder / "moved")[2].look() is Start.FINISHED
    (elsewhere,) = choose(toy(), plan_runs(toy(), folder / "moved"), ["plain"])
    assert elsewhere.look() is Start.FINISHED


# Training


def test_all_runs_are_trained_in_order_and_kept_afterwards() -> None:
    trainer = Trainer()
    code, said = run_toy(trainer)
    assert code == 0
    names = ["plain-seed0", "taught-seed0", "tuned-seed0"]
    assert trainer.asked == [(name, Start.NEW) for name in names]
    assert said[0].startswith("run 1 of 3: plain, seed 0: new; 0 s so far")
    assert "to go" not in said[0]
    assert "about" in said[1]
    assert said[-3:] == [os.path.join("out", f"ablation.{kind}") for kind in ("md", "csv", "png")]
    assert Path("out/ablation.png").read_bytes().startswith(b"\x89PNG")
    assert not list(Path("out").glob("*.part"))

    again = Trainer()
    code, said = run_toy(again)
    assert (code, again.asked) == (0, [])
    assert said[0] == "run 1 of 3: plain, seed 0: finished before, kept"


def test_a_run_that_fails_ends_the_ablation_and_the_same_command_goes_on() -> None:
    trainer = Trainer(taught_seed0=1)
    code, said = run_toy(trainer)
    assert code == 1
    assert [name for name, _ in trainer.asked] == ["plain-seed0", "taught-seed0"]
    assert "the ablation ends here: taught-seed0 failed; the same command goes on from it" in said
    assert "| plain | 1 | 10.0 | 0.600 | 120 |" in Path("out/ablation.md").read_text()

    run = plan_runs(load_ablation("toy.yaml"), Path("out"))[1]
    write_run(run, "failed")
    trainer = Trainer(taught_seed0=130)
    code, said = run_toy(trainer)
    assert (code, trainer.asked) == (130, [("taught-seed0", Start.RESUME)])
    assert any("taught-seed0 stopped" in line for line in said)

    (run.folder / "checkpoints/latest").unlink()
    (run.folder / "metrics.jsonl").write_text("old")
    trainer = Trainer()
    code, said = run_toy(trainer)
    assert (code, trainer.asked) == (0, [("taught-seed0", Start.AGAIN), ("tuned-seed0", Start.NEW)])
    assert not (run.folder / "metrics.jsonl").exists(), "what ended before its first checkpoint begins anew"


def test_a_run_that_someone_trains_is_not_begun_again(folder: Path) -> None:
    run = plan_runs(load_ablation("toy.yaml"), folder / "out")[0]
    write_run(run, "running")
    (run.folder / "checkpoints/latest").unlink()
    with run_lock(run.folder, "trained"), pytest.raises(CheckpointError, match="plain-seed0 is being trained"):
        run_toy(Trainer())
    assert (run.folder / "recipe.yaml").exists()
    with run_lock(folder / "out", "filled by an ablation"), pytest.raises(CheckpointError, match="stop it first"):
        run_toy(Trainer())


def test_estimates_take_the_same_variant_else_the_mean(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = plan_runs(toy(seeds=[0, 1]), folder / "out")
    write_run(runs[0], minutes=10.0)
    write_run(runs[1], minutes=20.0)
    now = [0.0]
    monkeypatch.setattr(running.time, "monotonic", lambda: now[0])
    said: list[str] = []

    def train(run: PlannedRun, start: Start) -> int:
        now[0] += 3600.0
        write_run(run)
        return 0

    assert run_all(runs, said.append, train=train) == 0
    # tuned 15 (the mean), plain 10, taught 20, tuned 15
    assert said[2] == "run 3 of 6: tuned, seed 0: new; 0 s so far, about 1 h 00 min to go"
    # plain 10, taught 20, tuned now 60
    assert said[3] == "run 4 of 6: plain, seed 1: new; 1 h 00 min so far, about 1 h 30 min to go"


def test_training_goes_through_the_launcher_of_train(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def launch(arguments: list[str], run_dir: Path, plan: object, rank_timeout: float) -> int:
        seen.append((arguments, run_dir, plan, rank_timeout))
        return 130

    monkeypatch.setattr("crossmask.engine.training.launcher.launch", launch)
    overrides = ["training.rank_timeout=60", "training.cpu_ranks=1"]
    (run, *_) = plan_runs(load_ablation("toy.yaml").overridden(overrides), folder / "out")
    command = ["crossmask", "ablate", "toy.yaml", *overrides, "--output", "out"]
    for _ in range(2):
        monkeypatch.setattr(sys, "argv", command)
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert ended.value.code == 130
        write_run(run, "stopped")
    assert seen == [
        (run.arguments, run.folder, (1, ()), 60.0),
        (["--resume", str(run.folder)], run.folder, (1, ()), 60.0),
    ]


def test_dry_run_touches_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    command = ["crossmask", "ablate", "toy.yaml", "--output", "out", "--seeds", "3,5", "--only", "plain", "--dry-run"]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["new      plain-seed3", "new      plain-seed5"]
    assert "objectives.itc.distillation=0" in lines[0]
    assert not (folder / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["toy.yaml", "--seeds", "0,x"], "--seeds 0,x: write whole numbers"),
        (["toy.yaml", "--only", "plian"], "did you mean plain?"),
        (["nothing"], "nothing: no such ablation"),
        (["toy.yaml", "--output", "toy.yaml"], "toy.yaml is a file"),
        (["toy.yaml", "--table-only"], "no run is finished"),
    ],
)
def test_mistakes_on_the_command_line(
    arguments: list[str], words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["crossmask", "ablate", *arguments])
    before = sorted(os.listdir())
    with pytest.raises(SystemExit) as ended:
        cli.main()
    out, err = capsys.readouterr()
    assert (ended.value.code, out, len(err.splitlines())) == (2, "", 1)
    assert words in err
    assert sorted(os.listdir()) == before


# The real thing


def test_the_commit_is_of_this_checkout_or_none(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = {"ls-files": (0, ""), "describe": (0, "abc123-dirty\n")}

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        code, out = answers[command[3]]
        return subprocess.CompletedProcess(command, code, out, "")

    monkeypatch.setattr(running.subprocess, "run", run)
    assert running.commit() == "abc123-dirty"
    answers["ls-files"] = (1, "")
    assert running.commit() is None, "installed inside a checkout of something else"

    def missing(*_: Any, **__: Any) -> None:
        raise FileNotFoundError("git")

    monkeypatch.setattr(running.subprocess, "run", missing)
    assert running.commit() is None


@pytest.mark.slow
def test_a_variant_is_really_trained(folder: Path) -> None:
    """One rank, two steps, through the launcher; afterwards the run is kept."""
    for i in range(12):
        Image.new("RGB", (16, 16), (20 * i, 255 - 20 * i, 90)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"a square of shade number {i}")
    tower = {"width": 16, "depth": 1, "heads": 2}
    recipe = {
        "data": {"source": "pairs", "path": ".", "vocabulary_size": 64, "validation_fraction": 0.3},
        "model": {
            "image": {"size": 16, "patch_size": 8, **tower},
            "text": tower,
            "fusion": {"depth": 1, "heads": 2},
            "projection_width": 16,
        },
        "masking": {"policy": "random"},
        "training": {"max_steps": 2, "batch_size": 4, "cpu_ranks": 1, "precision": "fp32"},
        "evaluation": {"rerank": 2, "mask_samples": 4, "gallery_pairs": 1},
    }
    (folder / "small.yaml").write_text(yaml.safe_dump(recipe))
    variants = [{"name": "plain", "overrides": ["objectives.itc.weight=0"]}, {"name": "full"}]
    toy(variants=variants, metrics=[{"path": "splits.*.i2t.r10", "title": "R@10"}])
    command = [sys.executable, "-m", "crossmask.engine.cli", "ablate", "changed.yaml", "--output", "out"]
    done = subprocess.run([*command, "--only", "full"], capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.index("run 1 of 1: full, seed 0: new") < done.stdout.index("report:")
    assert json.loads((folder / "out/full-seed0/status.json").read_text())["state"] == "finished"
    assert re.search(r"\n\| full \| 1 \| \d+\.\d \| \d+ \|\n", (folder / "out/ablation.md").read_text())
    trainer = Trainer()
    assert ablate("changed.yaml", [], folder / "out", None, None, print, train=trainer) == 0
    assert trainer.asked == [("plain-seed0", Start.NEW)], "the real one is kept"
