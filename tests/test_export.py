"""Exported folders: what is written is what is loaded, without DeepSpeed, and what is wrong is said in one line."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from crossmask.engine import exported
from crossmask.engine.data import CaptionTokenizer, load_data
from crossmask.engine.errors import CheckpointError
from crossmask.engine.export import export_run
from crossmask.engine.exported import describe_export, load_exported, prepare_images, prepare_texts, save_exported
from crossmask.engine.models import PretrainingModel, VisionLanguageModel
from crossmask.engine.recipe import Recipe
from crossmask.engine.training.reshard import reshard

TOWER = {"width": 32, "depth": 1, "heads": 2, "mlp_ratio": 2.0}
VALUES: dict[str, Any] = {
    "name": "tiny",
    "model": {
        "image": {"size": 32, "patch_size": 8, "stem": "conv", **TOWER},
        "text": TOWER,
        "fusion": {"depth": 2, "heads": 2, "mlp_ratio": 2.0},
        "projection_width": 16,
    },
    "masking": {"policy": "hard_patches", "options": {"start": 0.1}, "hidden_patches": "drop"},
    "objectives": {"itc": {"queue_length": 50}, "mim": {"weight": 1.0}},
    "teacher": {"momentum": 0.9},
}
CAPTIONS = ["a red square", "Two blue bars, and a DOT!", "l'écran", "", "red " * 40]
WITHOUT_DEEPSPEED = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "deepspeed":
            raise ModuleNotFoundError("deepspeed was asked for")
sys.meta_path.insert(0, Refuse())
"""


@pytest.fixture(scope="module")
def tokenizer() -> CaptionTokenizer:
    return CaptionTokenizer.train(["a red square", "two blue bars and a dot", "a green frame on white paper"], 80)


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return Recipe.model_validate(VALUES)


def build(recipe: Recipe, tokenizer: CaptionTokenizer, weights: str, seed: int = 0) -> nn.Module:
    from crossmask.engine.masking import build_policy

    torch.manual_seed(seed)
    network = build_policy(recipe.masking).network(recipe.model.image.width)
    sizes = (tokenizer.vocabulary_size, 18)
    if weights == "teacher":
        return VisionLanguageModel(recipe.model, *sizes, mask_network=network)
    return PretrainingModel(recipe.model, recipe.objectives, *sizes, masking=recipe.masking, mask_network=network)


def save(folder: Path, model: nn.Module, recipe: Recipe, tokenizer: CaptionTokenizer, **settings: Any) -> None:
    tensors = model.state_dict()
    weights = "student" if isinstance(model, PretrainingModel) else "teacher"
    config = describe_export(recipe, weights, tensors, 7, settings.pop("dtype", "fp32"))
    save_exported(folder, tensors, config, tokenizer, **settings)


@pytest.fixture
def folder(tmp_path: Path, recipe: Recipe, tokenizer: CaptionTokenizer) -> Path:
    save(tmp_path / "exported", build(recipe, tokenizer, "teacher"), recipe, tokenizer)
    return tmp_path / "exported"


def features(model: Any, tokenizer: CaptionTokenizer, config: Any) -> Tensor:
    with torch.no_grad():
        image = model.encode_image(prepare_images([Image.new("RGB", (40, 50), "red")], config)).feature
        return torch.cat([image, model.encode_text(*prepare_texts(CAPTIONS, tokenizer, config)).feature])


# ---- what is written is what is loaded


@pytest.mark.parametrize("weights", ["teacher", "student"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_there_and_back(tmp_path: Path, recipe: Recipe, tokenizer: CaptionTokenizer, weights: str, dtype: str) -> None:
    model = build(recipe, tokenizer, weights)
    save(tmp_path / "out", model, recipe, tokenizer, dtype=dtype)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    before = torch.get_rng_state()
    loaded, words, config = load_exported(tmp_path / "out", whole=weights == "student")
    assert torch.equal(torch.get_rng_state(), before), "loading drew random numbers"
    assert words.to_json() == tokenizer.to_json()
    assert (config.weights, config.dtype, config.step, config.recipe) == (weights, dtype, 7, "tiny")
    assert (config.vocabulary_size, config.max_length) == (tokenizer.vocabulary_size, 18)
    assert config.parameters == sum(p.numel() for p in model.parameters())
    assert type(loaded) is type(model)
    assert not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())
    kept = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    mine, theirs = model.state_dict(), loaded.state_dict()
    assert mine.keys() == theirs.keys()
    assert "mask_network.1.weight" in {name.removeprefix("model.") for name in mine}
    for name, value in mine.items():
        expected = value.to(kept) if value.is_floating_point() else value
        assert theirs[name].dtype == expected.dtype
        assert torch.equal(theirs[name], expected), name


def test_a_student_is_used_like_a_teacher(tmp_path: Path, recipe: Recipe, tokenizer: CaptionTokenizer) -> None:
    student = build(recipe, tokenizer, "student").eval()
    save(tmp_path / "out", student, recipe, tokenizer)
    loaded, words, config = load_exported(tmp_path / "out")
    assert isinstance(loaded, VisionLanguageModel)
    assert torch.equal(features(student.model, words, config), features(loaded, words, config))
    assert load_exported(tmp_path / "out", dtype=torch.bfloat16)[0].dtype is torch.bfloat16


def test_pictures_and_captions_are_prepared_as_in_training(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    modes = ["RGB", "RGBA", "L", "P"]
    rows = []
    for i in range(24):
        pixels = random.integers(0, 255, (37, 50, 4), dtype=np.uint8)
        Image.fromarray(pixels, "RGBA").convert(modes[i % 4]).save(tmp_path / f"{i}.png")
        rows.append(
            {"image": f"{i}.png", "caption": f"{CAPTIONS[i % 3]} and number {i} " + "on white paper " * (i % 5)}
        )
    (tmp_path / "pairs.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    source = {"source": "pairs", "path": str(tmp_path / "pairs.jsonl"), "max_words": 8, "vocabulary_size": 70}
    recipe = Recipe.model_validate(VALUES | {"data": {**source, "validation_fraction": 0.5}})
    data = load_data(recipe)
    torch.manual_seed(0)
    model = VisionLanguageModel(recipe.model, data.tokenizer.vocabulary_size, data.max_tokens)
    config = describe_export(recipe, "teacher", model.state_dict(), 0)
    (split,) = data.splits.values()
    batch = split.take(np.arange(split.image_count))
    held_out = [data.pairs[row] for row in split.rows]  # type: ignore[attr-defined]
    ids, mask = prepare_texts([pair.caption for pair in held_out], data.tokenizer, config)
    assert torch.equal(ids, batch.token_ids)
    assert torch.equal(mask, batch.token_mask)
    images = prepare_images([Image.open(pair.image) for pair in held_out], config)
    torch.testing.assert_close(images, batch.images, rtol=0, atol=1e-6)


def test_the_example_of_the_card_runs_without_deepspeed(folder: Path) -> None:
    card = (folder / "README.md").read_text()
    assert "| parameters | " in card
    (example,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    code = WITHOUT_DEEPSPEED + example + "\nassert not [m for m in sys.modules if m.startswith('deepspeed')]\n"
    ran = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    assert re.fullmatch(r"tensor\(\[\[.*\]\]\)\n", ran.stdout, re.DOTALL)
    assert np.array(re.findall(r"-?\d\.\d+", ran.stdout), float).shape == (4,)


# ---- what does not fit


def change(folder: Path, **values: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    config |= values
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))


def change_tensors(folder: Path, **tensors: Any) -> None:
    kept = load_file(folder / "model.safetensors") | tensors
    save_file({name: t for name, t in kept.items() if t is not None}, folder / "model.safetensors")


WRONG = {
    "no folder": (shutil.rmtree, "not an exported model, config.json is not in it; make one with: crossmask export"),
    "no json": (lambda f: (f / "config.json").write_text("{"), r"config.json cannot be read: .*; export it again"),
    "other": (lambda f: change(f, format="bert"), "is not the config of a crossmask export"),
    "newer": (lambda f: change(f, format_version=2, crossmask="9.0"), "has format version 2, .* use crossmask 9.0"),
    "unknown key": (lambda f: change(f, colour=1), "config.json: colour: extra inputs are not permitted"),
    "missing key": (lambda f: change(f, step=...), "config.json: step: field required"),
    "wrong value": (lambda f: change(f, model={"pool": "max"}), "config.json: model.pool: input should be 'cls' or 'm"),
    "policy": (lambda f: change(f, mask_network={"policy": "no", "options": {}}), "network of mask policy 'no'"),
    "tokenizer": (lambda f: change(f, vocabulary_size=4000), r"tokenizer.json has \d+ tokens and the model 4000"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "cannot read tokenizer"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "model.safetensors cannot be read"),
    "cut": (lambda f: (f / "model.safetensors").write_bytes(b"x" * 99), "model.safetensors cannot be read: "),
    "dtype": (lambda f: change(f, dtype="bf16"), "is not in bf16, as config.json says"),
    "shape": (
        lambda f: change(f, max_length=20),
        r"embeddings.weight is \(18, 32\), its model's is \(20, 32\)",
    ),
    "missing": (lambda f: change_tensors(f, word_bias=None), "has no word_bias, which its model needs"),
    "extra": (lambda f: change_tensors(f, more=torch.zeros(1)), "has more, which its model has not"),
}


@pytest.mark.parametrize(("spoil", "message"), WRONG.values(), ids=WRONG)
def test_what_cannot_be_loaded(folder: Path, spoil: Any, message: str) -> None:
    spoil(folder)
    with pytest.raises(CheckpointError, match=message) as error:
        load_exported(folder)
    assert "\n" not in str(error.value)


def test_configs_of_before_there_were_other_vocabularies_and_pixels_are_read(folder: Path) -> None:
    before = load_exported(folder)
    change(folder, normalisation=..., pad_id=..., mask_id=..., max_words=..., albef=...)
    model, tokenizer, config = load_exported(folder)
    assert (config.normalisation, config.image_mean, config.mask_id, config.max_words) == ("half", 0.5, 4, None)
    found, wanted = features(model, tokenizer, config), features(*before)
    torch.testing.assert_close(found[:-1], wanted[:-1])  # the last caption is longer than the eight words of before


def test_what_cannot_be_written(
    folder: Path, recipe: Recipe, tokenizer: CaptionTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(recipe, tokenizer, "teacher", seed=1)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(CheckpointError, match="holds an export already; replace it with --force"):
        save(folder, model, recipe, tokenizer)
    with pytest.raises(CheckpointError, match=r"cannot be made, .*config.json is a file; choose another folder"):
        save(folder / "config.json" / "out", model, recipe, tokenizer)
    with pytest.raises(CheckpointError, match="whole=True"):
        load_exported(folder, whole=True)
    other = CaptionTokenizer.train(["other words"], 70)
    with pytest.raises(CheckpointError, match=r"the tokenizer has \d+ tokens and the teacher \d+"):
        save(folder, model, recipe, other, force=True)
    with torch.no_grad():
        model.word_bias[0] = 1e6
    with pytest.raises(CheckpointError, match="word_bias has numbers that float16 cannot hold: export in bf16 or fp32"):
        save(folder, model, recipe, tokenizer, force=True, dtype="fp16")
    for error in (OSError(28, "No space left on device"), SafetensorError("I/O error: No space left on device")):

        def full(tensors: Any, path: Path, metadata: Any = None, error: Exception = error) -> None:
            Path(path).write_bytes(b"half")
            raise error

        with monkeypatch.context() as patch:
            patch.setattr(exported, "save_file", full)
            with pytest.raises(CheckpointError, match=r"cannot be written: .*No space left on device; make room"):
                save(folder, model, recipe, tokenizer, force=True)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in folder.parent.iterdir()] == ["exported"]

    save(folder, model, recipe, tokenizer, force=True)
    assert load_file(folder / "model.safetensors")["word_bias"][0] == 1e6
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match=r"holds notes.txt, which is no part of an export; choose another folder"):
        save(folder, model, recipe, tokenizer, force=True)
    mine = folder.with_name("other.partial")
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    with pytest.raises(CheckpointError, match=r"other.partial holds thesis.txt"):
        save(folder.with_name("other"), model, recipe, tokenizer)
    empty = folder.parent / "empty"
    empty.mkdir()
    save(empty, model, recipe, tokenizer)
    assert len(list(empty.iterdir())) == 4


# ---- a run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six steps on two ranks with sharded bf16 weights."""
    folder = tmp_path_factory.mktemp("run")
    random = np.random.default_rng(0)
    rows = []
    for i in range(24):
        Image.fromarray(random.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(folder / f"{i}.png")
        rows.append({"image": f"{i}.png", "caption": f"a red square number {i}"})
    (folder / "pairs.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    source = {"source": "pairs", "path": str(folder / "pairs.jsonl"), "max_words": 8, "vocabulary_size": 70}
    values = VALUES | {
        "data": {**source, "validation_fraction": 0.0},
        "training": {"max_steps": 4, "batch_size": 8, "checkpoint_every": 2, "evaluate_every": 0, "precision": "bf16"},
        "deepspeed": {"zero_optimization": {"stage": 3}},
    }
    (folder / "tiny.yaml").write_text(yaml.safe_dump(values))
    done = crossmask("train", folder / "tiny.yaml", "--output", folder / "run", "--ranks", 2)
    assert done.returncode == 0, done.stdout + done.stderr
    shutil.rmtree(folder / "run" / "tensorboard", ignore_errors=True)
    for path in folder.glob("*.png"):  # an export needs no data
        path.unlink()
    (folder / "pairs.jsonl").unlink()
    return folder / "run"


def crossmask(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "crossmask.engine.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=200)


def same_files(a: Path, b: Path) -> bool:
    return {p.name: p.read_bytes() for p in a.iterdir()} == {p.name: p.read_bytes() for p in b.iterdir()}


@pytest.mark.slow
def test_a_run_is_exported(run: Path, tmp_path: Path) -> None:
    """The end of a run, its last checkpoint and the command give the same folder; the student is the masters."""
    done = crossmask("export", run, "--to", tmp_path / "teacher")
    assert done.returncode == 0, done.stdout + done.stderr
    assert same_files(tmp_path / "teacher", run / "export")
    assert re.search(
        r"the teacher after 4 steps, [\d,]+ parameters in fp32, 0\.\d MB; load it with load_ex", done.stdout
    )
    model, _, config = load_exported(tmp_path / "teacher")
    assert config.step == 4
    saved = load_file(run / "checkpoints" / "step-000004" / "teacher.safetensors")
    assert all(torch.equal(model.state_dict()[name], value) for name, value in saved.items())

    lines: list[str] = []
    export_run(run, tmp_path / "student", "student", tell=lines.append)
    assert [re.sub(r"\d\.\d", "N", line) for line in lines] == [
        "verifying N MB of step-000004",
        "putting the student together: ZeRO stage 3, saved by 2 ranks",
    ]
    student, _, _ = load_exported(tmp_path / "student", whole=True)
    assert all(torch.isfinite(value).all() for value in student.state_dict().values())
    drift = [(value - model.state_dict()[name]).abs().max() for name, value in student.model.state_dict().items()]
    assert 0 < max(drift) < 0.1, "the student is near its teacher"

    copied = tmp_path / "copied"
    shutil.copytree(run, copied)
    reshard(copied)
    export_run(copied, tmp_path / "resharded", "student")
    assert same_files(tmp_path / "resharded", tmp_path / "student")


@pytest.mark.slow
def test_which_checkpoint(run: Path, tmp_path: Path) -> None:
    export_run(run, tmp_path / "two", step=2, dtype="bf16")
    assert load_exported(tmp_path / "two")[2].step == 2
    copied = tmp_path / "copied"
    shutil.copytree(run, copied)
    damaged = copied / "checkpoints" / "step-000004" / "teacher.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    lines: list[str] = []
    export_run(copied, tmp_path / "before", dtype="bf16", tell=lines.append)
    assert "step-000004 is damaged (teacher.safetensors: contents changed): trying the one before it" in lines[1]
    assert same_files(tmp_path / "before", tmp_path / "two")
    with pytest.raises(CheckpointError, match=r"step-000004 is damaged \(teacher.safetensors: .*: take another step"):
        export_run(copied, tmp_path / "out", step=4)
    with pytest.raises(CheckpointError, match="has no checkpoint of step 3; there are 2, 4"):
        export_run(run, tmp_path / "out", step=3)
    shutil.rmtree(copied / "checkpoints")
    with pytest.raises(CheckpointError, match="has no checkpoints yet: there is nothing to resume or export"):
        export_run(copied, tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"not a run folder, recipe.yaml is not in it; did you mean .*/run\?"):
        export_run(run.with_name("runs"), tmp_path / "out")
    with pytest.raises(CheckpointError, match="--dtype int8: choose fp32, bf16, fp16"):
        export_run(run, tmp_path / "out", dtype="int8")
    assert not (tmp_path / "out").exists()
    done = crossmask("export", tmp_path, "--to", tmp_path / "out")
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1, done.stderr
