"""Ablations: what is refused before anything runs, what is trained again, and what the table says of fixed numbers.

The training itself is a stand-in, but for one test at the end.
"""

from __future__ import annotations

import csv
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
from crossmask.engine.ablation.results import collect, difference, look_up, summarise
from crossmask.engine.ablation.running import run_all
from crossmask.engine.ablation.writing import picture, rows, table
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


# Results


def test_look_up() -> None:
    evaluation = {
        "splits": {"a": {"i2t": {"r1": 1, "r5": 4.0, "n": 7}}, "b": {"i2t": {"r1": 3.0}, "x": None}},
        "ok": True,
    }
    assert look_up(evaluation, "splits.a.i2t.r1") == 1.0
    assert look_up(evaluation, "splits.*.i2t.r1") == 2.0
    assert look_up(evaluation, "splits.a.i2t.r*") == 2.5
    assert look_up(evaluation, "splits.b.i2t") is None
    assert look_up(evaluation, "splits.b.x.r1") is None
    assert look_up(evaluation, "ok") is None
    assert look_up({"a": {"x": float("nan")}, "b": {"x": 1.0}}, "*.x") is None


def test_mean_spread_and_difference_by_hand() -> None:
    found = summarise([2.0, None, 4.0, 9.0])
    assert found is not None
    assert (found.mean, found.count) == (5.0, 3)
    assert found.deviation == pytest.approx((26 / 2) ** 0.5)
    assert summarise([3.0]).deviation is None  # type: ignore[union-attr]
    assert summarise([None]) is None
    paired = difference({0: 5.0, 1: 7.0, 2: 100.0}, {0: 4.0, 1: 4.0})
    assert paired is not None
    assert (paired.mean, paired.count) == (2.0, 2)
    assert paired.deviation == pytest.approx(2**0.5)
    assert difference({0: 1.0}, {1: 1.0}) is None


@pytest.fixture
def filled(folder: Path) -> Ablation:
    """plain: TR 10, 14; taught: 13, 15 and a third seed; tuned: one seed; the losses alike."""
    ablation = load_ablation("toy.yaml")
    machine = {"summary": "4 CPU cores (Abacus | 9)", "ranks": 2, "versions": {"python": "3.11.4", "torch": "2.14.1"}}
    for seed, numbers in enumerate((((10, 0.6), (13, 0.55), (20, 0.5)), ((14, 0.7), (15, 0.6), None))):
        for run, found in zip(plan_runs(ablation, folder / "out", [seed]), numbers, strict=True):
            if found:
                write_run(run, machine=machine, minutes=2.0 + seed, **measured(*found))
    taught = plan_runs(ablation, folder / "out", [2])[1]
    write_run(taught, machine=machine, **measured(50, 0.1))
    (taught.folder / "ablation.json").write_text('{"commit": "abc123"}')
    return ablation


def test_the_table_by_hand(filled: Ablation, folder: Path) -> None:
    results, lost = collect(filled, folder / "out")
    assert not lost
    text = table(filled, results)
    lines = text.splitlines()
    assert lines[0] == "# toy"
    assert lines[2] == "| variant | seeds | TR R@1 ↑ | ITM loss ↓ | s per run |"
    assert lines[4] == "| plain | 2 | 12.0 ± 2.8 | 0.650 ± 0.071 | 150 ± 42 |"
    # of 13, 15 and 50 the mean is 26; of the seeds that both have, 3 and 1 more than plain
    taught = "| with a teacher | 3 | 26.0 ± 20.8 (+2.0 ± 1.4) | 0.417 ± 0.275 (-0.075 ± 0.035) | 140 ± 35 |"
    assert lines[5] == taught
    assert lines[6] == "| tuned | 1 | 20.0 (+7.0) | 0.500 (-0.050) | 120 |"
    assert "Not all runs are finished." in text
    assert "Fewer than 3 seeds" in text
    assert "Machine: 4 CPU cores (Abacus | 9), 2 ranks. python 3.11.4, torch 2.14.1. Commit: abc123 / unknown." in text
    assert "TR R@1 = `splits.*.i2t.r1`" in text
    assert "| plain | small | – | – | 20 | `objectives.itc.distillation=0` |" in text
    assert "| tuned | fine | with a teacher | with a teacher | 10 | – |" in text


def test_what_all_variants_share_is_said_once(filled: Ablation, folder: Path) -> None:
    results, _ = collect(filled, folder / "out")
    text = table(filled.overridden(["optimizer.lr=1e-3"]), results)
    assert "All variants: `optimizer.lr=1e-3`\n\n| variant | recipe" in text
    assert "| plain | small | – | – | 20 | `objectives.itc.distillation=0` |" in text
    assert "All variants" not in table(filled, results)


def test_differences_to_the_first_row_or_a_named_one(filled: Ablation, folder: Path) -> None:
    first = filled.model_copy(update={"compare": "first"})
    results, _ = collect(first, folder / "out")
    assert "| tuned | 1 | 20.0 (+10.0) |" in table(first, results)
    plain, taught, tuned = filled.variants
    named = filled.model_copy(update={"variants": [plain.model_copy(update={"against": "taught"}), taught, tuned]})
    assert "| plain | 2 | 12.0 ± 2.8 (-2.0 ± 1.4) |" in table(named, results)
    bars = filled.model_copy(update={"variants": [plain.model_copy(update={"title": "a|b"}), taught, tuned]})
    assert "| a\\|b | 2 |" in table(bars, results)


def test_rows_and_picture(filled: Ablation, folder: Path) -> None:
    results, _ = collect(filled, folder / "out")
    found = list(csv.DictReader(rows(filled, results).splitlines()))
    assert [(r["variant"], r["seed"]) for r in found] == [
        *(("plain", "0"), ("plain", "1"), ("taught", "0"), ("taught", "1"), ("taught", "2"), ("tuned", "0")),
    ]
    assert (found[1]["splits.*.i2t.r1"], found[1]["itm.loss"], found[1]["seconds"]) == ("14.0", "0.7", "180.0")
    assert (found[4]["commit"], found[0]["commit"], found[0]["torch"]) == ("abc123", "", "2.14.1")
    panels = picture(filled, results).axes
    assert [ax.get_title(loc="left") for ax in panels] == ["TR R@1", "ITM loss"]
    assert [label.get_text() for label in panels[0].get_yticklabels()] == ["plain", "with a teacher", "tuned"]
    dots = [sorted(x for x, _ in part.get_offsets()) for part in panels[0].collections if hasattr(part, "get_sizes")]
    assert [10.0, 14.0] in dots
    assert [13.0, 15.0, 50.0] in dots
    assert [20.0] in dots
    bands = [(bar.get_x(), bar.get_x() + bar.get_width()) for bar in panels[0].patches]
    assert bands[0] == (pytest.approx(12 - 8**0.5), pytest.approx(12 + 8**0.5))
    assert len(bands) == 2, "a single seed has none"


def test_the_table_alone_and_a_metric_that_nobody_measured(filled: Ablation, folder: Path) -> None:
    said: list[str] = []
    (folder / "out/ablation.md").write_text("old")
    assert ablate("toy.yaml", [], folder / "out", "7", "plain", said.append, table_only=True) == 0
    assert "| with a teacher | 3 |" in (folder / "out/ablation.md").read_text(), "all that is finished, of any seed"
    metrics = [{"path": "splits.a.i2t.r2", "title": "R@2"}, {"path": "itm.loss", "title": "ITM", "digits": 2}]
    toy(metrics=metrics, name="toy")
    said.clear()
    assert ablate("changed.yaml", [], folder / "out", None, None, said.append, table_only=True) == 0
    assert said[-1] == "metric splits.a.i2t.r2: no run has measured it; did you mean splits.a.i2t.r1?"
    assert "| plain | 2 | – | 0.65 ± 0.07 | 150 ± 42 |" in (folder / "out/ablation.md").read_text()


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


# The real thing


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
