"""The engine in a loop of one's own: the model, objective and data of examples/own_model.py, by one rank and by two."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent / "distributed"))
sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import own_model
import ranks

from crossmask.engine import Pretrainer, Recipe, pretrain, registry
from crossmask.engine.errors import CheckpointError, UserError
from crossmask.engine.export import export_run
from crossmask.engine.exported import load_exported, prepare_texts
from crossmask.engine.model_evaluation import open_model
from crossmask.engine.training.run_lock import run_lock

STEPS, STOP = 30, 12


def changed(recipe: Recipe, **training: Any) -> Recipe:
    return recipe.model_copy(update={"training": recipe.training.model_copy(update=training)})


def losses(pretrainer: Pretrainer, until: int) -> list[float]:
    found = []
    for batch in pretrainer.batches():
        found.append(pretrainer.step(batch).item())
        if pretrainer.next_step == until:
            break
    return found


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[float], dict[str, Any]]:
    """A run's folder saved at STOP, its losses to the end, and its evaluation."""
    folder = tmp_path_factory.mktemp("library") / "run"
    with Pretrainer(own_model.recipe(STEPS)) as pretrainer:
        found = losses(pretrainer, STOP)
        assert pretrainer.save(folder).name == f"step-{STOP:06d}"
        found += losses(pretrainer, STEPS)
        assert not list(pretrainer.batches())
        evaluation = pretrainer.evaluate()
    return folder, found, evaluation


def test_an_interrupted_run_goes_on_to_the_same_losses(run: Any) -> None:
    folder, whole, evaluation = run
    assert all(map(math.isfinite, whole))
    with Pretrainer(own_model.recipe(STEPS), resumed=True) as again:
        assert again.load(folder) == STOP
        assert losses(again, STEPS) == whole[STOP:]
        assert again.evaluate()["splits"]["held-out"]["i2t"] == evaluation["splits"]["held-out"]["i2t"]
        assert again.last is not None
        assert again.last.step == STEPS
        assert not again.last.skipped
        assert {"itc", "uniformity", "mean_distance", "loss", "temperature"} == set(again.last.terms)
        weighed = again.last.terms["itc"] + 0.1 * again.last.terms["uniformity"]
        assert again.last.terms["loss"].item() == pytest.approx(weighed.item(), rel=1e-6)


def test_the_model_learns(run: Any) -> None:
    _, whole, evaluation = run
    assert sum(whole[-5:]) < sum(whole[:5]) - 0.5
    split = evaluation["splits"]["held-out"]
    assert split["i2t"]["r1"] > split["chance"]["i2t"]["r1"]
    assert split["reranked"] is None


def test_the_loop_goes_on_from_what_a_users_loop_has_saved(run: Any, tmp_path: Path) -> None:
    import shutil

    _, whole, evaluation = run
    folder = tmp_path / "run"
    shutil.copytree(run[0], folder)
    assert pretrain(changed(own_model.recipe(STEPS), log_every=1), folder, resume=True) == 0
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    logged = {r["step"]: r for r in records if r["kind"] == "train"}
    assert [logged[step]["loss"] for step in range(STOP + 1, STEPS + 1)] == whole[STOP:]
    assert "uniformity" in logged[STEPS]
    measured = json.loads((folder / "evaluation.json").read_text())
    assert measured["splits"]["held-out"]["i2t"] == evaluation["splits"]["held-out"]["i2t"]
    assert "uniformity" in (folder / "report.html").read_text()
    model, tokenizer, config = load_exported(folder / "export")
    assert config.model.system == "vit_bert"
    assert model.encode_text(*prepare_texts(["a red square"], tokenizer, config)).shape == (1, 16)


def test_a_folder_of_an_own_model_imports_nothing(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "export"
    with Pretrainer(own_model.recipe(STEPS), resumed=True) as pretrainer:
        pretrainer.load(run[0])
        pretrainer.export(folder)
        with pytest.raises(CheckpointError, match="holds an export already"):
            pretrainer.export(folder)
    monkeypatch.delitem(registry.systems._parts, "vit_bert")
    monkeypatch.delitem(sys.modules, "own_model", raising=False)
    with pytest.raises(CheckpointError) as caught:
        load_exported(folder)
    with pytest.raises(CheckpointError, match="not registered here"):
        export_run(run[0], tmp_path / "of-run")
    assert "own_model" not in sys.modules
    line = str(caught.value)
    assert line.startswith("the model is of system 'vit_bert', which is not registered here; import the module")
    assert "own_model" in line
    assert "\n" not in line
    with pytest.raises(CheckpointError, match="not registered here"):
        open_model(run[0], None, torch.device("cpu"), print)
    assert "own_model" not in sys.modules
    assert "vit_bert" not in registry.systems.names()
    assert "after 12 steps" in export_run(run[0], tmp_path / "of-run", plugins=["own_model"])


@pytest.mark.parametrize("accumulation", [1, 2])
def test_own_batches_are_the_datas_own(accumulation: int) -> None:
    recipe = changed(own_model.recipe(4), accumulation_steps=accumulation)
    with Pretrainer(recipe) as one, Pretrainer(recipe) as other:
        for batch in one.batches():
            torch.manual_seed(one.next_step)  # they draw dropout from one generator
            mine = one.step(batch).item()
            torch.manual_seed(other.next_step)
            assert other.step().item() == mine
        with pytest.raises(ValueError, match="a batch of 3 pairs, a rank's share is 20"):
            one.step(batch.rows(slice(3)))


def test_a_batch_that_was_not_taken_is_no_step() -> None:
    with Pretrainer(own_model.recipe(4)) as pretrainer:
        coming = pretrainer.batches()
        next(coming)
        with pytest.raises(RuntimeError, match="step 0 has not been taken"):
            next(coming)


def test_a_process_group_is_ended_by_the_last_who_has_it_and_one_that_was_there_is_left() -> None:
    """In a process of its own: another test's training may have left this one a group."""
    code = "import test_library; test_library.begin_and_end_groups()"
    launchers = ("MASTER_", "RANK", "LOCAL_", "WORLD_", "CROSS_")  # what such a training leaves in the environment
    alone = {name: value for name, value in os.environ.items() if not name.startswith(launchers)}
    command = [sys.executable, "-c", code]
    ran = subprocess.run(command, cwd=Path(__file__).parent, env=alone, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr


def begin_and_end_groups() -> None:
    assert not dist.is_initialized()
    first, second = Pretrainer(own_model.recipe(2)), Pretrainer(own_model.recipe(2))
    beside = "from crossmask.engine.training.distributed import join, part; join(); part()"
    subprocess.run([sys.executable, "-c", beside], check=True)  # which inherits this environment, and no port in use
    first.close()
    assert dist.is_initialized()
    second.step()
    second.close()
    assert not dist.is_initialized()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with Pretrainer(own_model.recipe(2)) as third:
            third.step()
        assert dist.is_initialized()
    finally:
        dist.destroy_process_group()
    with Pretrainer(own_model.recipe(2)) as fourth:
        fourth.step()


def test_a_folder_of_another_run_is_left_alone(run: Any, tmp_path: Path) -> None:
    with Pretrainer(own_model.recipe(STEPS)) as other:
        with pytest.raises(CheckpointError, match="holds another run: go on from it with Pretrainer"):
            other.save(run[0])
        with run_lock(tmp_path / "run", "trained"), pytest.raises(CheckpointError, match="is being trained by process"):
            other.save(tmp_path / "run")
        with pytest.raises(UserError, match="no checkpoints yet"):
            other.load(tmp_path / "run")


def test_the_loop_trains_on_in_the_folder_of_its_own_and_in_no_other(run: Any, tmp_path: Path) -> None:
    before = (run[0] / "recipe.yaml").read_text()
    with Pretrainer(own_model.recipe(1)) as other, pytest.raises(CheckpointError, match="holds another run"):
        other.train(run[0])
    assert (run[0] / "recipe.yaml").read_text() == before
    with Pretrainer(own_model.recipe(1)) as mine:
        mine.save(tmp_path / "run")
        assert mine.train(tmp_path / "run") == 0  # whose lock it holds


def test_what_is_no_recipe_no_data_or_no_dtype_is_told(tmp_path: Path) -> None:
    recipe = own_model.recipe(2)
    with pytest.raises(TypeError, match=r"takes a Recipe, not a str; load_recipe\(NAME\) gives one"):
        Pretrainer("syncmask-emoji")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="a list is no PairData; PairList"):
        Pretrainer(recipe, data=[])  # type: ignore[arg-type]
    with Pretrainer(recipe) as pretrainer, pytest.raises(CheckpointError, match="dtype 'int8': choose fp32, bf16"):
        pretrainer.export(tmp_path / "model", dtype="int8")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("method", "change", "words"),
    [
        ("encode_image", lambda x: x[:-1], r"encode_image gives \(19, 16\), not \(20, 16\): give one feature"),
        ("encode_text", lambda x: x[:, :8], r"encode_text gives \(20, 8\), not \(20, 16\): set model.projection_width"),
        ("encode_text", lambda x: (x, x), "encode_text give a tensor of features, not tuple"),
    ],
)
def test_features_that_do_not_fit_are_told(
    method: str, change: Any, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Pretrainer(own_model.recipe(2)) as pretrainer:
        model = pretrainer.engine.module.model
        encode = getattr(model, method)
        monkeypatch.setattr(model, method, lambda *inputs: change(encode(*inputs)))
        with pytest.raises((ValueError, TypeError), match=words):
            pretrainer.step()


def test_a_system_names_no_term_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("itc", "loss", "uniformity"):
        with Pretrainer(own_model.recipe(2)) as pretrainer:
            system = pretrainer.system.system  # type: ignore[attr-defined]
            monkeypatch.setattr(system, "losses", lambda view, name=name: {name: view.image.feature.sum()})
            with pytest.raises(ValueError, match=f"returned '{name}', another term's name"):
                pretrainer.step()


@pytest.mark.slow
def test_two_ranks_do_as_one(tmp_path: Path) -> None:
    output = tmp_path / "seen"
    for code, log in ranks.start("library_steps.py", output, "1", "3"):
        assert code == 0, log
    both = [json.loads(Path(f"{output}.{rank}.json").read_text()) for rank in (0, 1)]
    for stage in ("1", "3"):
        for seen in (one[stage] for one in both):
            assert seen["stage"] == int(stage)
            assert seen["step"] == 3
            assert seen["resumed"] == seen["rest"], stage
            assert seen["same"]
            assert seen["left"]
        assert both[0][stage]["r1"] == both[1][stage]["r1"]
        assert both[0][stage]["first"] != both[1][stage]["first"]  # their own shares
    assert both[0]["1"]["rest"] == pytest.approx(both[0]["3"]["rest"], rel=1e-3)
