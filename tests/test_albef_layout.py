"""ALBEF's official checkpoints as folders and back: bit by bit where they fit, one line where they do not."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from albef_official import BASE, Size, official
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

from crossmask.engine.cli import app
from crossmask.engine.convert import convert_albef, read_state_dict
from crossmask.engine.data import CaptionTokenizer
from crossmask.engine.errors import CheckpointError, DataError
from crossmask.engine.exported import describe_export, load_exported, prepare_images, prepare_texts, save_exported
from crossmask.engine.models import PretrainingModel
from crossmask.engine.models.positions import resize_table
from crossmask.engine.recipe import Recipe
from crossmask.engine.teacher import FeatureQueue

WORDS = ["[PAD]", "[unused0]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "square", "##s"]


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    return official()


@pytest.fixture
def pth(tmp_path: Path, state: dict[str, Tensor]) -> Path:
    torch.save({"model": state}, tmp_path / "ALBEF.pth")
    return tmp_path / "ALBEF.pth"


@pytest.fixture
def vocabulary(tmp_path: Path) -> Path:
    words = [*WORDS, *(f"word{n}" for n in range(Size.words - len(WORDS)))]
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n")
    return tmp_path / "vocab.txt"


def read(path: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = torch.load(path, weights_only=True)["model"]
    return found


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert found[name].dtype == value.dtype, name
        assert found[name].shape == value.shape, name
        assert torch.equal(found[name], value), name


def without(*begins: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda state: {name: value for name, value in state.items() if not name.startswith(begins)}


VERSIONS: dict[str, Callable[[dict[str, Tensor]], dict[str, Tensor]]] = {
    "pre-training": lambda state: state,
    "retrieval": lambda state: official(retrieval=True),
    "no position_ids": lambda state: {n: x for n, x in state.items() if not n.endswith("position_ids")},
    "no decoder": lambda state: {n: x for n, x in state.items() if ".decoder." not in n},
    "no momentum": lambda state: {n: x for n, x in state.items() if not n.partition(".")[0].endswith("_m")},
    "no queue": without("image_queue", "text_queue", "queue_ptr"),
    "half precision": lambda state: {n: x.bfloat16() if x.is_floating_point() else x for n, x in state.items()},
}


@pytest.mark.parametrize("version", VERSIONS)
def test_there_and_back(tmp_path: Path, state: dict[str, Tensor], version: str) -> None:
    given = VERSIONS[version](state)
    torch.save({"model": given}, tmp_path / "in.pth")
    lines: list[str] = []
    convert_albef(tmp_path / "in.pth", tmp_path / "folder", tell=lines.append)
    convert_albef(tmp_path / "folder", tmp_path / "out.pth", tell=lines.append)
    assert_same(read(tmp_path / "out.pth"), given)
    new = "image.mask_token, patch_decoder" + (", word_bias, word_head" if version == "retrieval" else "")
    assert lines[0] == f"new, in.pth has none: {new}"
    assert lines[2:] == [f"left out, ALBEF's layout has no place for it: {new}"]
    tied = (tmp_path / "out.pth").stat().st_size - (tmp_path / "in.pth").stat().st_size
    assert tied < 40_000, "what is tied is written once"


def test_a_folder_is_an_export(pth: Path, tmp_path: Path, state: dict[str, Tensor], vocabulary: Path) -> None:
    """Student and teacher load, each with its own weights; words, pixels and shape are ALBEF's."""
    said = convert_albef(pth, tmp_path / "folder", vocabulary)
    assert "images of 32 × 32 in 2 blocks, 97 words in 2 + 2 layers; start a run from it with model.initial=" in said
    student, tokenizer, config = load_exported(tmp_path / "folder", whole=True)
    teacher, _, _ = load_exported(tmp_path / "folder", weights="teacher")
    assert isinstance(student, PretrainingModel)
    assert tokenizer is not None
    assert student.temperature.item() == 0.0625
    for model, m in ((student.model, ""), (teacher, "_m")):
        assert torch.equal(model.image_projection.weight, state[f"vision_proj{m}.weight"])
        layer = f"text_encoder{m}.bert.encoder.layer.3.crossattention.self"
        both = torch.cat([state[f"{layer}.key.weight"], state[f"{layer}.value.weight"]])
        assert torch.equal(model.fusion.layers[1].cross_attention.key_value.weight, both)
        assert torch.equal(model.match_head.weight, state["itm_head.weight"])
        assert model.text.mask_id == tokenizer.mask_id == 5
        assert model.text.word_embeddings.padding_idx == 0
    assert torch.equal(student.model.image.mask_token, teacher.image.mask_token)
    assert (config.max_length, config.max_words, config.normalisation) == (20, 30, "clip")
    section = config.model
    assert (section.image.heads, section.text.heads, section.fusion.heads) == (2, 3, 3)
    assert (section.text.depth, section.fusion.depth, section.fusion.norm) == (2, 2, "post")
    ids, _ = prepare_texts(["A red, red squares!", "square"], tokenizer, config)
    assert ids.tolist() == [[3, 6, 7, 7, 8, 9, 4], [3, 8, 4, 0, 0, 0, 0]]
    from PIL import Image

    pixels = prepare_images([Image.new("RGB", (40, 30), (255, 0, 51))], config)
    expected = [(1 - 0.48145466) / 0.26862954, -0.4578275 / 0.26130258, (0.2 - 0.40821073) / 0.27577711]
    torch.testing.assert_close(pixels[0, :, 5, 5], torch.tensor(expected))
    queue = FeatureQueue(Size.queue, Size.projection)
    queue.load_state_dict(load_file(tmp_path / "folder" / "queue.safetensors"))
    assert torch.equal(queue.image, state["image_queue"].T)
    assert torch.equal(queue.text, state["text_queue"].T)
    assert int(queue.pointer) == 4
    assert (queue.group_id == -1).all()


def test_what_is_new_is_always_the_same_and_draws_nothing(pth: Path, tmp_path: Path) -> None:
    before = torch.get_rng_state()
    for name in ("a", "b"):
        convert_albef(pth, tmp_path / name)
    assert torch.equal(torch.get_rng_state(), before)
    for file in ("model.safetensors", "teacher.safetensors", "config.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_without_a_vocabulary_captions_cannot_be_read(pth: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    convert_albef(pth, tmp_path / "folder", tell=lines.append)
    assert any("convert again with --vocabulary" in line for line in lines)
    model, tokenizer, config = load_exported(tmp_path / "folder")
    assert tokenizer is None
    assert model.encode_text(torch.tensor([[1, 2]]), torch.ones(1, 2, dtype=torch.bool)).feature.shape == (1, 16)
    card = (tmp_path / "folder" / "README.md").read_text()
    assert "# ALBEF.pth\n\nA vision-language model converted from a checkpoint of ALBEF" in card
    assert "convert it again with `--vocabulary`" in card
    with pytest.raises(CheckpointError, match="convert it again with --vocabulary"):
        prepare_texts(["a"], tokenizer, config)


@pytest.mark.parametrize("way", ["in", "out", "both"])
def test_positions_are_resized_as_published(pth: Path, tmp_path: Path, state: dict[str, Tensor], way: str) -> None:
    """[CLS] as it is, the rest bicubic without aligned corners."""
    convert_albef(pth, tmp_path / "folder", image_size=48 if way != "out" else None)
    convert_albef(tmp_path / "folder", tmp_path / "out.pth", image_size={"in": None, "out": 48, "both": 32}[way])
    found = read(tmp_path / "out.pth")
    expected = dict(state)
    for name in ("visual_encoder.pos_embed", "visual_encoder_m.pos_embed"):
        for side in (3, 2) if way == "both" else (3,):
            table = expected[name]
            n = int((table.shape[1] - 1) ** 0.5)
            grid = table[0, 1:].T.reshape(1, -1, n, n)
            grid = F.interpolate(grid, size=(side, side), mode="bicubic", align_corners=False)
            expected[name] = torch.cat([table[:, :1], grid.reshape(1, -1, side * side).transpose(1, 2)], 1)
    assert_same(found, expected)
    if way == "in":
        model, _, config = load_exported(tmp_path / "folder")
        assert config.model.image.size == 48
        assert model.encode_image(torch.zeros(1, 3, 48, 48)).tokens.shape == (1, 10, 128)


def test_a_table_of_that_size_is_left_alone() -> None:
    table = torch.randn(1, 5, 8)
    assert resize_table(table, 2) is table
    with pytest.raises(ValueError, match="7 patches are no square"):
        resize_table(torch.randn(1, 8, 8), 2)


def test_other_entries_and_older_files(tmp_path: Path, state: dict[str, Tensor]) -> None:
    lines: list[str] = []
    torch.save({"epoch": 3, "model": OrderedDict(state), "optimizer": {"state": {}}}, tmp_path / "best.pth")
    assert read_state_dict(tmp_path / "best.pth", lines.append).keys() == state.keys()
    assert lines == ["left out, beside the model: epoch, optimizer"]
    torch.save(state, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert_same(read_state_dict(tmp_path / "old.pth"), state)


# ---- what does not fit


class Evil:
    def __reduce__(self) -> Any:
        return os.system, ("touch evil",)


def changed(**values: Any) -> Callable[[Path, dict[str, Tensor]], None]:
    """``values`` by name with __ for a dot; None takes it away."""

    def spoil(path: Path, state: dict[str, Tensor]) -> None:
        new = state | {name.replace("__", "."): value for name, value in values.items()}
        torch.save({"model": {name: value for name, value in new.items() if value is not None}}, path)

    return spoil


def cut(path: Path, state: dict[str, Tensor]) -> None:
    torch.save({"model": state}, path)
    path.write_bytes(path.read_bytes()[:-1000])


CLIP = {"visual.conv1.weight": torch.ones(1), "logit_scale": torch.ones(1), "transformer.resblocks.0.ln": torch.ones(1)}
WRONG: dict[str, tuple[Any, str]] = {
    "nothing": (lambda p, s: None, r"in.pth cannot be read: No such file or directory; did you mean .*inn.pth\?"),
    "empty": (lambda p, s: p.write_bytes(b""), "is no checkpoint of torch.save, or is cut off; download it again"),
    "text": (lambda p, s: p.write_text("hello"), "is no checkpoint of torch.save, or is cut off"),
    "cut off": (cut, "is no checkpoint of torch.save, or is cut off .*; download it again"),
    "LFS": (
        lambda p, s: p.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n"),
        "is a Git LFS pointer, not the file it stands for",
    ),
    "web page": (lambda p, s: p.write_text("\n<!DOCTYPE html><html>"), "is a web page, not a checkpoint"),
    "code": (lambda p, s: torch.save({"model": s, "x": Evil()}, p), "holds more than data: it names .*system"),
    "pickle": (lambda p, s: p.write_bytes(pickle.dumps({"a": Evil()})), "(holds more than data|is no checkpoint)"),
    "a list": (lambda p, s: torch.save([1, 2], p), "holds a list of 2 entries, not a state dict"),
    "a number": (lambda p, s: torch.save(torch.tensor(0.07), p), "in.pth holds a Tensor, not a state dict"),
    "no tensors": (lambda p, s: torch.save({"model": {"a": 1}}, p), "holds a dict of 1 entries, not a state dict"),
    "CLIP": (
        lambda p, s: torch.save(CLIP, p),
        r"of its names 9 or more missing \(visual_encoder.patch_embed.proj.weight, .*, …\), 3 foreign \(visual.conv1.*"
        "CLIP's names look like that",
    ),
    "BLIP": (
        lambda p, s: torch.save(official(Size(text_layers=0), retrieval=True), p),
        "its BERT has cross-attention from the first layer on, as BLIP's has",
    ),
    "VQA": (changed(text_decoder__bert=torch.ones(1)), r"1 foreign \(text_decoder.bert\); BLIP and ALBEF for question"),
    "wrapped": (
        lambda p, s: torch.save({"model": {f"module.{n}": x for n, x in s.items()}}, p),
        "take module. off the names",
    ),
    "a name": (
        changed(visual_encoder__blocks__1__attn__qkv__bias=None, queue_ptr=None),
        r"of its names 2 missing \(queue_ptr, visual_encoder.blocks.1.attn.qkv.bias\); give one of ALBEF",
    ),
    "a student's block": (
        lambda p, s: torch.save({n: x for n, x in s.items() if "visual_encoder.blocks.1" not in n}, p),
        r"of its names 12 missing \(visual_encoder.blocks.1.norm1.weight, .*, …\);",
    ),
    "a student's layer": (
        lambda p, s: torch.save({n: x for n, x in s.items() if "text_encoder.bert.encoder.layer.3" not in n}, p),
        r"of its names 26 missing \(text_encoder.bert.encoder.layer.3.attention.output.LayerNorm.weight, .*, …\);",
    ),
    "many": (
        lambda p, s: torch.save({n: x for n, x in s.items() if "encoder.layer.3.out" not in n}, p),
        r"8 missing \(text_encoder.bert.encoder.layer.3.output.LayerNorm.weight, .*, …\);",
    ),
    "a shape": (
        changed(visual_encoder__norm__bias=torch.ones(3)),
        r"1 of another shape or type \(visual_encoder.norm.bias is \(3,\), not \(128,\)\)",
    ),
    "queue's width": (
        changed(image_queue=torch.ones(8, 12)),
        r"of another shape or type \(image_queue is \(8, 12\), not \(16, 12\)\)",
    ),
    "queue's pointer": (changed(queue_ptr=torch.tensor([12])), "queue_ptr is 12, its queue has 12 columns"),
    "a queue alone": (changed(text_queue=None), r"1 missing \(text_queue\)"),
    "integers": (changed(temp=torch.tensor(1)), r"1 of another shape or type \(temp is int64\)"),
    "no tensor": (changed(temp=0.07), r"\(temp is no tensor\)"),
    "mixed": (changed(temp=torch.tensor(1.0).half()), "it mixes float16 and float32"),
    "double": (lambda p, s: torch.save({n: x.double() if x.is_floating_point() else x for n, x in s.items()}, p),
               "is in float64; give it in float32"),
    "untied": (
        changed(text_encoder__cls__predictions__decoder__weight=torch.ones(97, 192)),
        "cls.predictions.decoder.weight is not text_encoder.bert.embeddings.word_embeddings.weight, to which",
    ),
    "untied teacher": (
        changed(text_encoder_m__cls__predictions__decoder__bias=torch.ones(97)),
        "text_encoder_m.cls.predictions.decoder.bias is not text_encoder_m.cls.predictions.bias",
    ),
    "positions": (
        changed(text_encoder__bert__embeddings__position_ids=torch.arange(1, 21)[None]), "does not count from 0"
    ),
    "no square": (
        changed(visual_encoder__pos_embed=torch.ones(1, 7, 128)), "its 6 patches are no square"
    ),
    "heads": (lambda p, s: torch.save(official(Size(width=80)), p), "image tower's width 80 is no multiple of 64"),
    "no fusion": (
        lambda p, s: torch.save({n: x for n, x in s.items() if "crossattention" not in n}, p),
        "no layer of its BERT has a cross-attention",
    ),
    "ours": (lambda p, s: torch.save({"model.text.bert.x": torch.ones(1)}, p), "these are crossmask's own names"),
    "tiny": (lambda p, s: torch.save(official(Size(projection=4)), p), "model.projection_width is 4; input should be"),
}  # fmt: skip


@pytest.mark.parametrize(("spoil", "message"), WRONG.values(), ids=WRONG)
def test_what_is_no_checkpoint(tmp_path: Path, state: dict[str, Tensor], spoil: Any, message: str) -> None:
    (tmp_path / "inn.pth").touch()
    spoil(tmp_path / "in.pth", state)
    with pytest.raises(CheckpointError, match=message) as error:
        convert_albef(tmp_path / "in.pth", tmp_path / "out")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()
    assert not Path("evil").exists()


def test_weights_that_are_no_numbers_are_said(tmp_path: Path, state: dict[str, Tensor]) -> None:
    changed(temp=torch.tensor(float("nan")))(tmp_path / "in.pth", state)
    lines: list[str] = []
    convert_albef(tmp_path / "in.pth", tmp_path / "out", tell=lines.append)
    assert "infinite or no numbers, with which no run can start: temp" in lines


def test_what_cannot_be_converted_so(pth: Path, tmp_path: Path, vocabulary: Path) -> None:
    folder = tmp_path / "folder"
    wrong: list[tuple[tuple[Any, ...], dict[str, Any], str]] = [
        ((pth, tmp_path / "out.pth"), {}, "a checkpoint becomes a folder; name one without .pth"),
        ((pth, folder), {"image_size": 40}, "--image-size 40 is no multiple of 16, the patches' size; take 32 or 48"),
        ((pth, folder), {"vocabulary": tmp_path / "no.txt"}, "no.txt"),
        ((pth, pth / "x"), {}, "is a file; choose another folder"),
    ]
    short = tmp_path / "short.txt"
    short.write_text("\n".join(WORDS))
    wrong.append(((pth, folder), {"vocabulary": short}, "short.txt has 10 tokens and .* 97; give the one that it"))
    for arguments, options, message in wrong:
        with pytest.raises((CheckpointError, DataError), match=message) as error:
            convert_albef(*arguments, **options)
        assert "\n" not in str(error.value)
        assert not folder.exists()
    convert_albef(pth, folder, vocabulary)
    with pytest.raises(CheckpointError, match="holds an export already; replace it with --force"):
        convert_albef(pth, folder)
    convert_albef(pth, folder, force=True)
    assert not (folder / "tokenizer.json").exists()

    out = tmp_path / "out.pth"
    for arguments, options, message in (
        ((folder, tmp_path / "other"), {}, "a folder becomes a checkpoint; give it a name that ends in .pth"),
        ((folder, pth), {}, "is there already; replace it with --force"),
        ((folder, out), {"vocabulary": vocabulary}, "--vocabulary is for a checkpoint that becomes a folder"),
        ((tmp_path, out), {}, "neither config.json nor recipe.yaml is in it; give a folder of crossmask convert"),
        ((folder, pth / "out.pth"), {}, "cannot be written: "),
    ):
        before = pth.read_bytes()
        with pytest.raises(CheckpointError, match=message) as error:
            convert_albef(*arguments, **options)
        assert "\n" not in str(error.value)
        assert not out.exists()
        assert pth.read_bytes() == before
    convert_albef(folder, pth, force=True)
    assert not list(tmp_path.glob("*.part"))


def spoil_queue(folder: Path, **values: Any) -> None:
    save_file(load_file(folder / "queue.safetensors") | values, folder / "queue.safetensors")


def spoil_config(folder: Path, **values: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


@pytest.mark.parametrize(("spoil", "message"), {
    "queue's width": (lambda f: spoil_queue(f, image=torch.ones(12, 8)), "queue for features of width 16 .*12, 8"),
    "queue's end": (lambda f: spoil_queue(f, position=torch.tensor([12, 12])), "not a queue for features"),
    "queue cut off": (lambda f: (f / "queue.safetensors").write_bytes(b"123"), "queue.safetensors cannot be read"),
    "teacher": (lambda f: (f / "teacher.safetensors").write_bytes(b"123"), "teacher.safetensors cannot be read"),
    "pixels": (lambda f: spoil_config(f, image_mean=0.5), "image_mean and image_std are not those of normalisation"),
    "norm": (lambda f: spoil_config(f, model=our_recipe().model.model_dump(mode="json")), "has|its model"),
}.values())  # fmt: skip
def test_a_damaged_folder(pth: Path, tmp_path: Path, spoil: Any, message: str) -> None:
    convert_albef(pth, tmp_path / "folder")
    spoil(tmp_path / "folder")
    with pytest.raises(CheckpointError, match=message) as error:
        convert_albef(tmp_path / "folder", tmp_path / "out.pth")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out.pth").exists()


# ---- from exports and runs of our own


def our_recipe(**model: Any) -> Recipe:
    sections = {
        "image": {"size": 32, "patch_size": 16, "width": 128, "depth": 1, "heads": 2, "mlp_ratio": 2.0},
        "text": {"width": 64, "depth": 1, "heads": 1, "mlp_ratio": 2.0},
        "fusion": {"depth": 1, "heads": 1, "mlp_ratio": 2.0, "norm": "post"},
        "projection_width": 16,
    }
    for name, values in model.items():
        sections[name] = {**sections[name], **values} if isinstance(values, dict) else values  # type: ignore[dict-item]
    return Recipe.model_validate({"name": "tiny", "model": sections})


def export(folder: Path, recipe: Recipe, weights: str) -> dict[str, Tensor]:
    tokenizer = CaptionTokenizer.train(["a red square", "two blue bars"], 80)
    torch.manual_seed(0)
    model = PretrainingModel(recipe.model, recipe.objectives, tokenizer.vocabulary_size, 12)
    tensors = (model if weights == "student" else model.model).state_dict()
    save_exported(folder, tensors, describe_export(recipe, weights, tensors, 5), tokenizer)  # type: ignore[arg-type]
    return tensors


@pytest.mark.parametrize("weights", ["student", "teacher"])
def test_an_export_becomes_a_checkpoint(tmp_path: Path, weights: str) -> None:
    tensors = export(tmp_path / "export", our_recipe(), weights)
    lines: list[str] = []
    convert_albef(tmp_path / "export", tmp_path / "out.pth", tell=lines.append)
    found = read(tmp_path / "out.pth")
    prefix = "model." if weights == "student" else ""
    bias = tensors[f"{prefix}fusion.layers.0.self_attention.key_value.bias"]
    assert torch.equal(found["text_encoder.bert.encoder.layer.1.attention.self.value.bias"], bias[64:])
    assert found["temp"].shape == ()
    assert found["temp"].item() == pytest.approx(0.07)
    assert not any(name.startswith(("image_queue", "visual_encoder_m")) for name in found)
    assert "it has no momentum model and no queue, so the checkpoint has none" in lines
    again = tmp_path / "again"
    convert_albef(tmp_path / "out.pth", again)
    back = load_file(again / "model.safetensors")
    for name, value in tensors.items():
        if not name.startswith(("patch_decoder", "model.image.mask_token", "image.mask_token")):
            key = name if weights == "student" else f"model.{name}"
            assert torch.equal(back[key], value), name


@pytest.mark.parametrize(("model", "message"), [
    ({"fusion": {"norm": "pre"}}, "is not of ALBEF's layout: model.fusion.norm is pre, there it is post"),
    ({"image": {"stem": "conv"}}, "model.image.stem is conv, there it is patch"),
    ({"pool": "mean"}, "model.pool is mean, there it is cls"),
    ({"image": {"heads": 4}}, "model.image.heads is 4, there it is 2"),
    ({"fusion": {"mlp_ratio": 4.0}}, "model.fusion.mlp_ratio is 4.0, there it is 2.0"),
    ({"text": {"depth": 0}}, "model.text.depth is 0, there it is 1"),
    ({"text": {"width": 80, "heads": 1}}, "model.text.width is 80, there it is a multiple of 64"),
])  # fmt: skip
def test_models_of_another_layout_are_refused(tmp_path: Path, model: dict[str, Any], message: str) -> None:
    export(tmp_path / "export", our_recipe(**model), "teacher")
    with pytest.raises(CheckpointError, match=message):
        convert_albef(tmp_path / "export", tmp_path / "out.pth")


def test_the_command(pth: Path, tmp_path: Path, state: dict[str, Tensor], vocabulary: Path) -> None:
    run = CliRunner().invoke
    done = run(app, ["convert", "albef", str(pth), str(tmp_path / "f"), "--vocabulary", str(vocabulary)])
    assert done.exit_code == 0, done.output
    assert "model.initial=" in done.output
    done = run(app, ["convert", "albef", str(tmp_path / "f"), str(tmp_path / "out.pth"), "--image-size", "32"])
    assert done.exit_code == 0, done.output
    assert_same(read(tmp_path / "out.pth"), state)


@pytest.mark.skipif("CROSSMASK_LARGE" not in os.environ, reason="CROSSMASK_LARGE: 6 GB on the disk, half a minute")
def test_the_published_size(tmp_path: Path) -> None:
    """ViT-B/16 at 256, 6 + 6 layers of BERT, 30,522 words, a queue of 65,536."""
    block = torch.randn(2**22)

    def draw(*shape: int) -> Tensor:
        count = torch.Size(shape).numel()
        return block.repeat(-(-count // len(block)))[:count].reshape(shape).clone()

    given = official(BASE, draw=draw)
    torch.save({"model": given}, tmp_path / "ALBEF.pth")
    convert_albef(tmp_path / "ALBEF.pth", tmp_path / "folder")
    config = json.loads((tmp_path / "folder" / "config.json").read_text())
    assert config["model"]["image"]["depth"] == 12
    convert_albef(tmp_path / "folder", tmp_path / "out.pth")
    try:
        assert_same(torch.load(tmp_path / "out.pth", weights_only=True, mmap=True)["model"], given)
    finally:
        shutil.rmtree(tmp_path)
