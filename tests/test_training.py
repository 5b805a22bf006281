"""Whole runs through the real ``deepspeed`` launcher: two ranks, a model of a few thousand weights, sixty pictures."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import yaml
from PIL import Image
from safetensors.torch import load_file

from crossmask.engine.training.watch import HANG_MARGIN

pytestmark = pytest.mark.slow

CROSSMASK = [sys.executable, "-m", "crossmask.engine.cli"]
COLOURS = {"red": (220, 30, 30), "green": (30, 200, 60), "blue": (40, 60, 220), "yellow": (230, 220, 40)}
SHAPES = ("square", "bar", "frame", "corner", "dot")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Coloured shapes with captions, three pictures a caption."""
    folder = tmp_path_factory.mktemp("pairs")
    random = np.random.default_rng(0)
    rows = []
    for i in range(3 * len(COLOURS) * len(SHAPES)):
        colour, shape = list(COLOURS)[i % 4], SHAPES[i // 4 % 5]
        pixels = np.full((32, 32, 3), 255, np.uint8)
        x, y = random.integers(2, 10, 2)
        pixels[y : y + 16, x : x + (6 if shape == "bar" else 16)] = COLOURS[colour]
        if shape == "frame":
            pixels[y + 4 : y + 12, x + 4 : x + 12] = 255
        Image.fromarray(pixels).save(folder / f"{i}.png")
        rows.append({"image": f"{i}.png", "caption": f"a {colour} {shape} on white paper"})
    (folder / "pairs.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return folder


@pytest.fixture(scope="module")
def recipe(pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    tower = {"width": 32, "depth": 1, "heads": 2, "mlp_ratio": 2.0}
    values = {
        "name": "tiny",
        "data": {"source": "pairs", "path": str(pairs / "pairs.jsonl"), "vocabulary_size": 64, "max_words": 8},
        "model": {
            "image": {"size": 32, "patch_size": 8, "stem": "conv", **tower},
            "text": tower,
            "fusion": {"depth": 2, "heads": 2, "mlp_ratio": 2.0},
            "projection_width": 16,
        },
        "objectives": {"itc": {"queue_length": 50}},
        "teacher": {"momentum": 0.9},
        "optimizer": {"lr": 1e-3, "warmup_steps": 2},
        "training": {"max_steps": 8, "batch_size": 12, "checkpoint_every": 4, "log_every": 3, "evaluate_every": 4},
        "evaluation": {"rerank": 4, "mask_samples": 16, "gallery_pairs": 2},
        "deepspeed": {"zero_optimization": {"stage": 2}},
    }
    path = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def run(*arguments: object, timeout: float = 200) -> subprocess.CompletedProcess[str]:
    command = [*CROSSMASK, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)


def losses(folder: Path) -> dict[int, dict[str, Any]]:
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    wall = ("time_s", "samples_per_s", "memory_mb")
    return {r["step"]: {k: v for k, v in r.items() if k not in wall} for r in records if r["kind"] == "train"}


@pytest.fixture(scope="module")
def finished(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A finished run and what it printed."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    done = run("train", recipe, "--output", folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, done.stdout + done.stderr


def test_a_run_leaves_everything_a_person_needs(finished: tuple[Path, str]) -> None:
    folder, printed = finished
    for name in ("recipe.yaml", "tokenizer.json", "metrics.jsonl", "evaluation.json", "gallery.json", "report.html"):
        assert (folder / name).stat().st_size, name
    assert json.loads((folder / "status.json").read_text())["state"] == "finished"
    assert list((folder / "tensorboard").iterdir())
    assert (folder / "checkpoints" / "latest").read_text().strip() == "step-000008"
    evaluation = json.loads((folder / "evaluation.json").read_text())
    assert evaluation["steps"] == 8
    assert 0 <= evaluation["splits"]["held-out"]["i2t"]["r1"] <= 100
    weights = load_file(folder / "export" / "model.safetensors")
    assert "image.vit.cls_token" in weights
    assert all(np.isfinite(w.float().numpy()).all() for w in weights.values())
    assert "report.html" in printed
    for noise in ("Warning", "WARNING", "[INFO]", "Traceback", "deprecated"):
        assert noise not in printed, printed


def test_every_objective_is_on_and_its_loss_is_a_number(finished: tuple[Path, str]) -> None:
    steps = losses(finished[0])
    assert sorted(steps) == [3, 6, 8]
    for record in steps.values():
        for name in ("loss", "itc", "itm", "mlm", "mim"):
            assert np.isfinite(record[name]), (name, record)
            assert record[name] > 0, (name, record)
        assert record["image_mask_ratio"] == pytest.approx(0.5)
        assert 0 < record["text_mask_ratio"] < 0.5


def test_a_resumed_run_equals_an_uninterrupted_one(finished: tuple[Path, str], tmp_path: Path) -> None:
    folder = tmp_path / "resumed"
    shutil.copytree(finished[0], folder)
    shutil.rmtree(folder / "checkpoints" / "step-000008")
    (folder / "checkpoints" / "latest").write_text("step-000004")
    whole = losses(folder)
    (folder / "stacks-rank1.txt").write_text("of an earlier end")
    done = run("train", "--resume", folder)
    assert not (folder / "stacks-rank1.txt").exists()
    assert done.returncode == 0, done.stdout + done.stderr
    assert losses(folder) == whole
    first = load_file(finished[0] / "export" / "model.safetensors")
    second = load_file(folder / "export" / "model.safetensors")
    assert all((first[name] == second[name]).all() for name in first)


def test_a_resharded_run_goes_on_with_another_number_of_ranks(finished: tuple[Path, str], tmp_path: Path) -> None:
    folder = tmp_path / "resharded"
    shutil.copytree(finished[0], folder)
    shutil.rmtree(folder / "checkpoints" / "step-000008")
    (folder / "checkpoints" / "latest").write_text("step-000004")
    done = run("reshard", folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1].endswith(
        f"step-000004-universal is the latest; continue with: crossmask train --resume {folder} --ranks N"
    )
    assert done.stderr == ""
    done = run("train", "--resume", folder, "--ranks", 1)
    assert done.returncode == 0, done.stdout + done.stderr
    whole, alone = losses(finished[0]), losses(folder)
    assert alone[3] == whole[3]
    for name in ("itc", "mim"):  # smooth in the weights; ITM and MLM draw negatives and masks, by rank
        assert alone[6][name] == pytest.approx(whole[6][name], rel=0.05)
        assert alone[8][name] == pytest.approx(whole[8][name], rel=0.1)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_every_rank_with_a_checkpoint(recipe: Path, tmp_path: Path, number: int) -> None:
    folder = tmp_path / "stopped"
    command = [*CROSSMASK, "train", str(recipe), "--output", str(folder), "training.max_steps=100000"]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # a shell's background job, such as these tests may be, is told to ignore Ctrl-C, and so would the run be
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    metrics = folder / "metrics.jsonl"
    deadline = time.monotonic() + 120
    try:
        while not (metrics.is_file() and metrics.read_text().count('"train"') > 1):
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.2)
        process.send_signal(number)
        sent = time.monotonic()
        printed, _ = process.communicate(timeout=60)
    finally:
        process.terminate()
    assert time.monotonic() - sent < 30
    assert process.returncode == 130, printed
    assert "--resume" in printed
    assert "Traceback" not in printed, printed
    status = json.loads((folder / "status.json").read_text())
    assert status["state"] == "stopped"
    assert (folder / "checkpoints" / "latest").read_text().strip() == f"step-{status['step']:06d}"
    time.sleep(1)
    left = [p for p in psutil.process_iter(["cmdline"]) if str(folder) in " ".join(p.info["cmdline"] or [])]
    assert not left, left


def test_a_rank_that_is_stopped_ends_the_run_within_the_stated_time(recipe: Path, tmp_path: Path) -> None:
    folder, timeout = tmp_path / "stopped", 8
    values = ("training.max_steps=100000", "training.evaluate_every=0", f"training.rank_timeout={timeout}")
    command = [*CROSSMASK, "train", str(recipe), "--output", str(folder), *values]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    latest = folder / "checkpoints" / "latest"
    deadline = time.monotonic() + 120
    while not latest.is_file():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.2)
    started = [p for p in psutil.process_iter(["cmdline"]) if str(folder) in (p.info["cmdline"] or [])]
    ranks = [p for p in started if "--local_rank=1" in p.info["cmdline"]]
    ranks[0].suspend()
    stopped = time.monotonic()
    _, err = process.communicate(timeout=120)
    assert time.monotonic() - stopped < timeout + HANG_MARGIN
    assert process.returncode == 1
    assert err.startswith("rank 1 has not answered for 8 s (last seen in step ")
    assert err.rstrip().endswith(
        f"stopped/stacks-rank0.txt; continue with: crossmask train --resume {os.path.relpath(folder)}"
    )
    assert len(err.splitlines()) == 1, err
    assert json.loads((folder / "status.json").read_text())["state"] == "failed"
    assert not any(p.is_running() for p in started)


def test_every_way_of_hiding_runs_under_sharded_weights(recipe: Path, tmp_path: Path) -> None:
    """ZeRO-3 gathers a module's parameters around its forward and backward, wherever masking reaches into the model."""
    done = run(
        *("train", recipe, "--output", tmp_path / "run", "deepspeed.zero_optimization.stage=3", "model.pool=mean"),
        *("masking.policy=hard_patches", "masking.text_policy=pmi", "masking.hidden_patches=drop"),
        *("masking.hidden_words=later", "masking.links.kind=token_level", "masking.heads.kind=importance"),
        *("objectives.itc.patch_drop=0.5", "training.max_steps=4", "training.evaluate_every=0"),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    last = losses(tmp_path / "run")[4]
    assert math.isfinite(last["mask_network"])
    assert math.isfinite(last["mim"])


def test_sharding_the_weights_changes_nothing_but_rounding(
    recipe: Path, finished: tuple[Path, str], tmp_path: Path
) -> None:
    """ZeRO-3 keeps student and teacher in shards, and gathers them only inside a forward pass."""
    done = run("train", recipe, "--output", tmp_path / "run", "deepspeed.zero_optimization.stage=3")
    assert done.returncode == 0, done.stdout + done.stderr
    whole, sharded = losses(finished[0]), losses(tmp_path / "run")
    for name in ("itc", "mim"):  # smooth in the weights; ITM and MLM draw negatives and masks
        assert sharded[3][name] == pytest.approx(whole[3][name], rel=0.05)
        assert sharded[8][name] == pytest.approx(whole[8][name], rel=0.1)


def test_torchrun_starts_the_same_job(recipe: Path, finished: tuple[Path, str], tmp_path: Path) -> None:
    folder = tmp_path / "torchrun"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=29871"]
    command += ["-m", "crossmask.engine.train", str(recipe), "--output", str(folder)]
    environment = dict(os.environ, OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu")
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert losses(folder) == losses(finished[0])
