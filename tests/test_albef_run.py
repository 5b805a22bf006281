"""From an official checkpoint to a run, its resumption, and back to a checkpoint, by the commands."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from albef_official import Size, official
from PIL import Image
from safetensors.torch import load_file

from crossmask.engine.convert import convert_albef
from crossmask.engine.errors import RecipeError
from crossmask.engine.recipe_files import load_recipe

SIZE = Size(32, 16, 64, 1, 40, 20, 64, 1, 1, 2, 8, 6)
SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "x", "[MASK]"]


def crossmask(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "crossmask.engine.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_there_by_a_run_and_back(tmp_path: Path) -> None:
    """A learning rate of next to nothing: what comes out is what went in, student, teacher and queue."""
    state = official(SIZE)
    torch.save({"model": state}, tmp_path / "ALBEF.pth")
    (tmp_path / "vocab.txt").write_text("\n".join([*SPECIALS, *(f"w{n}" for n in range(SIZE.words - 6))]))
    convert_albef(tmp_path / "ALBEF.pth", tmp_path / "albef", tmp_path / "vocab.txt")
    random, rows = np.random.default_rng(0), []
    for i in range(8):
        Image.fromarray(random.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(tmp_path / f"{i}.png")
        rows.append({"image": f"{i}.png", "caption": f"w{i} w{i + 1} w{i + 2}"})
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    tower = {"width": 64, "depth": 1, "heads": 1, "mlp_ratio": 2.0}
    values = {
        "name": "tiny",
        "data": {
            "source": "pairs",
            "path": str(tmp_path / "pairs.jsonl"),
            "vocabulary": str(tmp_path / "vocab.txt"),
            "max_tokens": 12,
            "normalisation": "clip",
            "validation_fraction": 0.0,
        },
        "model": {
            "initial": str(tmp_path / "albef"),
            "image": {"size": 32, "patch_size": 16, **tower},
            "text": {**tower, "positions": 20, "segments": 2},
            "fusion": {"depth": 1, "heads": 1, "mlp_ratio": 2.0, "norm": "post"},
            "projection_width": 8,
        },
        "masking": {"policy": "random", "text_ratio": 0.4},
        "objectives": {"itc": {"queue_length": 6}, "mlm": {"teacher_reads": "masked"}, "mim": {"weight": 0.0}},
        "optimizer": {"lr": 1e-9, "final_lr": 0.0, "warmup_steps": 0, "weight_decay": 0.0},
        "training": {"max_steps": 1, "batch_size": 4, "precision": "fp32", "cpu_ranks": 1},
        "deepspeed": {"zero_optimization": {"stage": 2}},
    }
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(values))
    run = tmp_path / "run"
    done = crossmask("train", tmp_path / "tiny.yaml", "--output", run, "--ranks", 1)
    assert done.returncode == 0, done.stdout + done.stderr
    config = json.loads((run / "export" / "config.json").read_text())
    assert config["model"]["initial"] is None
    assert (config["mask_id"], config["max_length"], config["normalisation"]) == (5, 12, "clip")

    shutil.rmtree(tmp_path / "albef")
    done = crossmask("train", "--resume", run, "--ranks", 1)  # needs the weights that it began with no more
    assert done.returncode == 0, done.stdout + done.stderr

    lines: list[str] = []
    convert_albef(run, tmp_path / "out.pth", tell=lines.append)
    assert lines[-1] == "left out, ALBEF's layout has no place for it: image.mask_token, patch_decoder"
    found = torch.load(tmp_path / "out.pth", weights_only=True)["model"]
    assert found.keys() == state.keys()
    for name, value in state.items():
        if "_m." in name and value.is_floating_point():  # one step of the average
            value = 0.995 * value + 0.005 * state[name.replace("_m.", ".")]
        if "queue" not in name:
            torch.testing.assert_close(found[name], value, atol=1e-6, rtol=1e-6, msg=name)
    # the queue's two latest rows of six and the batch's four, in front of which it goes on
    (checkpoint,) = (run / "checkpoints").glob("step-*")
    queue = load_file(checkpoint / "queue.safetensors")
    assert torch.equal(found["image_queue"].T, queue["image"])
    assert torch.equal(queue["image"][4:], state["image_queue"].T[[0, 1]])
    assert queue["group_id"].tolist()[4:] == [-1, -1]
    assert found["queue_ptr"].tolist() == [4]
    assert "idx_queue" not in found

    with pytest.raises(RecipeError, match=r"model.initial: no such file .*albef"):
        load_recipe(tmp_path / "tiny.yaml")
