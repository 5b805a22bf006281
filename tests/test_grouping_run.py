"""Grouped epochs in real runs: killed at once and resumed, and on two ranks, of which one makes the orders."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from distributed import ranks
from safetensors.torch import load_file
from test_training import pairs as pairs

from crossmask.engine.data import StepSampler

pytestmark = pytest.mark.slow
STEPS = 35  # seven epochs of five


@pytest.fixture(scope="module")
def recipe(pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    tower = {"width": 16, "depth": 1, "heads": 2, "mlp_ratio": 2.0}
    values = {
        "name": "grouped",
        "data": {
            "source": "pairs",
            "path": str(pairs / "pairs.jsonl"),
            "vocabulary_size": 64,
            "max_words": 8,
            "grouping": {"search_space": 1920, "similar": 2, "lead": 0.3},
        },
        "model": {
            "image": {"size": 32, "patch_size": 8, "stem": "conv", **tower},
            "text": tower,
            "fusion": {"depth": 1, "heads": 2, "mlp_ratio": 2.0},
            "projection_width": 16,
        },
        "objectives": {"itc": {"queue_length": 0}},
        "optimizer": {"lr": 1e-3, "warmup_steps": 2},
        "training": {
            "max_steps": STEPS,
            "batch_size": 10,
            "checkpoint_every": 7,
            "log_every": 1,
            "accumulation_steps": 2,
        },
        "evaluation": {"rerank": 0, "mask_samples": 4, "gallery_pairs": 2},
        "deepspeed": {"zero_optimization": {"stage": 0}},
    }
    path = tmp_path_factory.mktemp("recipe") / "grouped.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def start(*arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "crossmask.engine.train", *map(str, arguments)]
    # without what a run in this very process has left there: its store may still listen on the port
    of_ranks = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")
    environment = {k: v for k, v in os.environ.items() if k not in of_ranks}
    return subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment)


def finish(process: subprocess.Popen[str]) -> str:
    printed, _ = process.communicate(timeout=600)
    assert process.returncode == 0, printed
    return printed


def records(folder: Path, kind: str) -> list[dict[str, Any]]:
    try:
        lines = (folder / "metrics.jsonl").read_text().splitlines()
    except FileNotFoundError:
        return []
    found = [json.loads(line) for line in lines if line.endswith("}")]
    wall = ("time_s", "samples_per_s", "memory_mb", "made_s", "waited_s")
    return [{k: v for k, v in r.items() if k not in wall} for r in found if r["kind"] == kind]


def test_a_grouped_run_that_was_killed_equals_one_that_was_not(recipe: Path, tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    printed = finish(start(recipe, "--output", whole))
    assert "data.grouping.search_space is cut from 1920" in printed
    process = start(recipe, "--output", cut)
    while process.poll() is None and not any(r["step"] > 16 for r in records(cut, "train")):
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert records(cut, "train")[-1]["step"] < STEPS, "killed too late to show anything"
    finish(start("--resume", cut))

    assert records(cut, "train") == records(whole, "train")
    assert records(cut, "order") == records(whole, "order")
    first, second = (load_file(folder / "export" / "model.safetensors") for folder in (whole, cut))
    assert all((first[name] == second[name]).all() for name in first)

    orders = records(whole, "order")
    assert [(r["step"], r["order_of_epoch"]) for r in orders] == [(5 * e + 1, e) for e in range(1, 7)]
    assert all(-1 <= r["similarity"] <= 1 and r["same_group"] < 1 and r["walked"] > 0.4 for r in orders)
    report = (whole / "report.html").read_text()
    assert "What a batch holds" in report
    assert report.count('alt="pictures of a grouped batch"') == report.count('alt="pictures of a plain batch"') == 2
    spent = json.loads((whole / "evaluation.json").read_text())["seconds_by_part"]
    assert 0 < spent["sampler"] < 0.5 * sum(spent.values())


def test_two_ranks_are_given_one_order_and_one_error(tmp_path: Path) -> None:
    told = ranks.start("grouping_ranks.py", tmp_path)
    seen = []
    for code, output in told:
        assert code == 0, output
        line = next(line for line in output.splitlines() if line.startswith("seen"))
        seen.append([int(number) for number in line.split()[1:]])
    for epoch in range(3):
        mine, other = (set(one[24 * epoch : 24 * epoch + 24]) for one in seen)
        assert len(mine) == len(other) == 24
        assert not mine & other
    plain = StepSampler(50, 8, 2, 0)
    assert seen[1][:24] == [i for step in range(6) for i in plain.indices(step, 1).tolist()]
    assert seen[1][24:48] != [i for step in range(6, 12) for i in plain.indices(step, 1).tolist()]
    assert "told DataError the order cannot be made: mend it" in told[0][1]
    assert "told CheckpointError rank 0: the order cannot be made: mend it" in told[1][1]
