"""What a run starts from: a converted checkpoint, an export, a ViT, a BERT; and what it does not start from."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from albef_official import Size, official
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import BertConfig, BertForPreTraining

from crossmask.engine.convert import convert_albef
from crossmask.engine.data import CaptionTokenizer
from crossmask.engine.errors import CheckpointError, RecipeError
from crossmask.engine.exported import describe_export, save_exported
from crossmask.engine.models import PretrainingModel
from crossmask.engine.models.positions import resize_table
from crossmask.engine.recipe import Recipe
from crossmask.engine.training import stored
from crossmask.engine.training.initial import Initial
from crossmask.engine.training.stored import RunModel

SIZE = Size(32, 16, 64, 1, 40, 20, 64, 1, 1, 2, 8, 6)
MODEL: dict[str, Any] = {
    "image": {"size": 32, "patch_size": 16, "width": 64, "depth": 1, "heads": 1, "mlp_ratio": 2.0},
    "text": {"width": 64, "depth": 1, "heads": 1, "mlp_ratio": 2.0, "positions": 20, "segments": 2},
    "fusion": {"depth": 1, "heads": 1, "mlp_ratio": 2.0, "norm": "post"},
    "projection_width": 8,
}
SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "x", "[MASK]"]
NOTHING_NEW: list[str] = []


def words(folder: Path, first: str = "word") -> Path:
    file = folder / "vocab.txt"
    file.write_text("\n".join([*SPECIALS, *(f"{first}{n}" for n in range(SIZE.words - len(SPECIALS)))]))
    return file


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    folder = tmp_path_factory.mktemp("home")
    state = official(SIZE)
    torch.save({"model": state}, folder / "ALBEF.pth")
    vocabulary = words(folder)
    convert_albef(folder / "ALBEF.pth", folder / "albef", vocabulary)
    return SimpleNamespace(folder=folder, state=state, tokenizer=CaptionTokenizer.from_vocabulary(vocabulary))


def recipe(**changes: Any) -> Recipe:
    model: dict[str, Any] = {name: dict(x) if isinstance(x, dict) else x for name, x in MODEL.items()}
    for name, value in changes.pop("model", {}).items():
        model[name] = {**model[name], **value} if isinstance(value, dict) else value
    itc = {"queue_length": changes.pop("queue", 6)}
    return Recipe.model_validate({"data": {"max_tokens": 12}, "model": model, "objectives": {"itc": itc}} | changes)


def build(described: Recipe, seed: int = 3, length: int = 12) -> PretrainingModel:
    torch.manual_seed(seed)
    return PretrainingModel(described.model, described.objectives, SIZE.words, length, mask_id=5)


def start(described: Recipe, tokenizer: CaptionTokenizer, **options: Any) -> tuple[PretrainingModel, Initial]:
    student = build(described, **options)
    before = torch.get_rng_state()
    initial = Initial(student, described, tokenizer)
    assert torch.equal(torch.get_rng_state(), before), "starting draws no random numbers"
    return student, initial


def test_a_recipe_that_names_nothing_starts_as_it_always_did(home: SimpleNamespace) -> None:
    student, initial = start(recipe(), home.tokenizer)
    fresh = build(recipe()).state_dict()
    assert all(torch.equal(x, fresh[name]) for name, x in student.state_dict().items())
    assert (initial.teacher, initial.queue, initial.notices) == (None, None, [])


def test_a_converted_checkpoint_gives_student_teacher_and_queue(home: SimpleNamespace) -> None:
    student, initial = start(recipe(model={"initial": str(home.folder / "albef")}), home.tokenizer)
    wanted = load_file(home.folder / "albef" / "model.safetensors")
    assert all(torch.equal(x, wanted[name]) for name, x in student.state_dict().items())
    teacher = load_file(home.folder / "albef" / "teacher.safetensors")
    assert initial.teacher is not None
    assert initial.teacher.keys() == teacher.keys()
    assert all(torch.equal(x, teacher[name]) for name, x in initial.teacher.items())
    assert initial.queue is not None
    pointer = int(home.state["queue_ptr"])
    assert pointer == 2
    order = [2, 3, 4, 5, 0, 1]  # oldest first
    assert torch.equal(initial.queue["image"], home.state["image_queue"].T[order])
    assert initial.queue["position"].tolist() == [6, 0]
    assert initial.notices == NOTHING_NEW


@pytest.mark.parametrize(("length", "kept", "position"), [(4, [4, 5, 0, 1], [4, 0]), (9, [2, 3, 4, 5, 0, 1], [9, 6])])
def test_a_queue_of_another_length_keeps_the_latest(
    home: SimpleNamespace, length: int, kept: list[int], position: list[int]
) -> None:
    _, initial = start(recipe(model={"initial": str(home.folder / "albef")}, queue=length), home.tokenizer)
    assert initial.queue is not None
    assert torch.equal(initial.queue["text"], home.state["text_queue"].T[kept])
    assert initial.queue["position"].tolist() == position
    assert (initial.queue["group_id"] == -1).all(), "whose they were says nothing among other data"
    _, without = start(recipe(model={"initial": str(home.folder / "albef")}, queue=0), home.tokenizer)
    assert without.queue is None


def test_sizes_that_may_differ_are_adapted(home: SimpleNamespace) -> None:
    """Images of another size, more or fewer positions of words, another decoder of patches."""
    changed = {"initial": str(home.folder / "albef"), "image": {"size": 48}, "text": {"positions": None, "segments": 1}}
    described = recipe(model=changed)
    student, initial = start(described, home.tokenizer)
    table = student.model.image.vit.pos_embed
    assert torch.equal(table, resize_table(home.state["visual_encoder.pos_embed"], 3))
    embeddings = student.model.text.bert.embeddings
    name = "text_encoder.bert.embeddings.position_embeddings.weight"
    assert torch.equal(embeddings.position_embeddings.weight, home.state[name][:12])
    assert embeddings.token_type_embeddings.weight.shape == (1, 64)
    assert initial.teacher is not None
    of_teacher = resize_table(home.state["visual_encoder_m.pos_embed"], 3)
    assert torch.equal(initial.teacher["image.vit.pos_embed"], of_teacher)
    assert initial.notices == NOTHING_NEW

    changed["text"] = {"positions": 25}
    student, initial = start(recipe(model=changed), home.tokenizer)
    fresh = build(recipe(model=changed))
    rows = student.model.text.bert.embeddings.position_embeddings.weight
    assert torch.equal(rows[:20], home.state[name])
    assert torch.equal(rows[20:], fresh.model.text.bert.embeddings.position_embeddings.weight[20:])
    assert initial.teacher is not None
    assert torch.equal(initial.teacher["text.bert.embeddings.position_embeddings.weight"][20:], rows[20:])
    assert "5 of 25 rows of text.bert.embeddings.position_embeddings.weight" in initial.notices[0]

    described = recipe(model={"initial": str(home.folder / "albef")})
    pixels = described.objectives.model_copy(
        update={"mim": described.objectives.mim.model_copy(update={"target": "pixel"})}
    )
    described = described.model_copy(update={"objectives": pixels})
    student, initial = start(described, home.tokenizer)
    assert student.patch_decoder.head.weight.shape == (768, 64)
    assert initial.notices == ["model.initial: new, as they were not to be had there: patch_decoder"]


@pytest.mark.parametrize("weights", ["student", "teacher"])
def test_an_export_gives_what_it_has(home: SimpleNamespace, tmp_path: Path, weights: str) -> None:
    source = build(recipe(), seed=8)
    with torch.no_grad():
        source.temperature.fill_(0.3)
    tensors = (source if weights == "student" else source.model).state_dict()
    config = describe_export(recipe(), weights, tensors, 5)  # type: ignore[arg-type]
    save_exported(tmp_path / "export", tensors, config, home.tokenizer)
    student, initial = start(recipe(model={"initial": str(tmp_path / "export")}), home.tokenizer)
    assert all(torch.equal(x, source.model.state_dict()[name]) for name, x in student.model.state_dict().items())
    assert initial.queue is None
    if weights == "student":
        assert student.temperature.item() == pytest.approx(0.3)
        assert initial.teacher is None
    else:
        assert student.temperature.item() == pytest.approx(0.07)
        assert initial.notices == ["model.initial: new, as they were not to be had there: patch_decoder, temperature"]
        assert initial.teacher is not None
        assert all(torch.equal(x, tensors[name]) for name, x in initial.teacher.items())


def test_a_run_with_a_given_vocabulary(home: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """[MASK] is where the run's own tokenizer has it, not where a trained vocabulary would."""
    source = build(recipe(), seed=8)
    (tmp_path / "recipe.yaml").touch()
    found = RunModel(home.tokenizer, source.model.state_dict(), source.state_dict(), None)
    monkeypatch.setattr(stored, "read_run", lambda *_, **__: (recipe(), 7, found))
    student, initial = start(recipe(model={"initial": str(tmp_path)}), home.tokenizer)
    assert all(torch.equal(x, source.state_dict()[name]) for name, x in student.state_dict().items())
    assert initial.teacher is not None
    config = stored.read_stored(tmp_path).config
    assert (config.mask_id, config.pad_id, config.step, config.weights) == (5, 0, 7, "student")


@pytest.mark.parametrize(("model", "message"), [
    ({"image": {"depth": 2}}, r"was made with model.image.depth=1, the recipe has 2; set the recipe's to that"),
    ({"fusion": {"norm": "pre"}, "pool": "mean", "text": {"depth": 0}, "projection_width": 16},
     r"model.text.depth=1, model.fusion.norm=post, model.projection_width=8 and 1 more, the recipe has 0, pre, 16;"),
    ({"image": {"stem": "conv"}}, "model.image.stem=patch, the recipe has conv"),
])  # fmt: skip
def test_models_of_another_shape_are_refused(home: SimpleNamespace, model: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=f"^model.initial: .*{message}") as error:
        start(recipe(model={"initial": str(home.folder / "albef"), **model}), home.tokenizer)
    assert "\n" not in str(error.value)


def test_vocabularies_must_agree(home: SimpleNamespace, tmp_path: Path) -> None:
    described = recipe(model={"initial": str(home.folder / "albef")})
    other = CaptionTokenizer.from_vocabulary(words(tmp_path, "other"))
    with pytest.raises(CheckpointError, match=r"other words than the data: number 6 is 'word0', not 'other0'; set"):
        start(described, other)
    short = CaptionTokenizer.train(["a red square"], 64)
    with pytest.raises(CheckpointError, match=r"knows 40 words, the data have \d+; set data.vocabulary"):
        start(described, short)
    convert_albef(home.folder / "ALBEF.pth", tmp_path / "blind")
    with pytest.raises(CheckpointError, match=r"has \[MASK\] as word 4, the data as word 5; set data.vocabulary"):
        start(recipe(model={"initial": str(tmp_path / "blind")}), home.tokenizer)


def test_what_is_no_beginning(home: SimpleNamespace, tmp_path: Path) -> None:
    for path, message in (
        (home.folder / "ALBEF.pth", r"is a file; make a folder of it with: crossmask convert albef"),
        (tmp_path, "neither config.json nor recipe.yaml is in it; give a folder of crossmask convert"),
        (tmp_path / "nothing", "no such folder"),
    ):
        with pytest.raises(CheckpointError, match=f"^model.initial: .*{message}"):
            start(recipe(model={"initial": str(path)}), home.tokenizer)
    both = {"initial": str(home.folder / "albef"), "image": {"weights": str(tmp_path / "vit.pth")}}
    with pytest.raises(RecipeError, match=r"^model.image.weights: model.initial gives all weights already"):
        start(recipe(model=both), home.tokenizer)


# ---- a ViT


def vit(home: SimpleNamespace, **changes: Any) -> dict[str, Tensor]:
    begin = "visual_encoder."
    state = {name.removeprefix(begin): x for name, x in home.state.items() if name.startswith(begin)}
    state |= {"head.weight": torch.ones(3, 64), "head.bias": torch.ones(3)}
    return {name: x for name, x in (state | changes).items() if x is not None}


@pytest.mark.parametrize("ending", ["pth", "safetensors"])
def test_a_vit_starts_the_image_tower(home: SimpleNamespace, tmp_path: Path, ending: str) -> None:
    file, given = tmp_path / f"vit.{ending}", vit(home)
    if ending == "pth":
        torch.save({"model": given}, file)  # DeiT's
    else:
        save_file(given, file)  # timm's
    student, initial = start(recipe(model={"image": {"weights": str(file), "size": 48}}), home.tokenizer)
    fresh = build(recipe(model={"image": {"size": 48}}))
    tower = student.model.image
    for name, x in tower.vit.state_dict().items():
        assert torch.equal(x, resize_table(given[name], 3) if name == "pos_embed" else given[name]), name
    assert torch.equal(tower.mask_token, fresh.model.image.mask_token)
    assert torch.equal(student.model.text.word_embeddings.weight, fresh.model.text.word_embeddings.weight)
    assert (initial.teacher, initial.queue) == (None, None)


@pytest.mark.parametrize(("changes", "model", "message"), [
    ({"blocks.0.norm1.bias": None}, {}, "has no blocks.0.norm1.bias; set model.image"),
    ({"fc_norm.bias": torch.ones(1)}, {}, "has the foreign fc_norm.bias"),
    ({"dist_token": torch.ones(1, 1, 64)}, {}, "is a distilled DeiT, which has a token more"),
    ({"norm.bias": torch.ones(9)}, {}, r"has other shapes: norm.bias is \(9,\), not \(64,\)"),
    ({"pos_embed": torch.ones(1, 7, 64)}, {}, "6 patches are no square"),
    ({}, {"image": {"depth": 2}}, "has no blocks.1.norm1.weight, blocks.1.norm1.bias and 10 more"),
    ({}, {"image": {"stem": "conv"}}, "set model.image.stem to patch"),
])  # fmt: skip
def test_another_vit_is_refused(
    home: SimpleNamespace, tmp_path: Path, changes: dict[str, Any], model: dict[str, Any], message: str
) -> None:
    torch.save(vit(home, **changes), tmp_path / "vit.pth")
    image = {**model.get("image", {}), "weights": str(tmp_path / "vit.pth")}
    with pytest.raises(CheckpointError, match=f"^model.image.weights: .*{message}") as error:
        start(recipe(model={"image": image}), home.tokenizer)
    assert "\n" not in str(error.value)


def test_a_file_that_is_no_vit(home: SimpleNamespace, tmp_path: Path) -> None:
    (tmp_path / "vit.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid")
    with pytest.raises(CheckpointError, match=r"^model.image.weights: .*is a Git LFS pointer"):
        start(recipe(model={"image": {"weights": str(tmp_path / "vit.safetensors")}}), home.tokenizer)
    (tmp_path / "vit.safetensors").write_bytes(b"12345678")
    with pytest.raises(CheckpointError, match=r"^model.image.weights: .*is no safetensors file, or is cut off"):
        start(recipe(model={"image": {"weights": str(tmp_path / "vit.safetensors")}}), home.tokenizer)


# ---- a BERT


def bert(folder: Path, **changes: Any) -> BertForPreTraining:
    torch.manual_seed(2)
    config = BertConfig(
        **{
            "vocab_size": 40, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 1,
            "intermediate_size": 128, "max_position_embeddings": 30, "type_vocab_size": 2, **changes,
        }
    )  # fmt: skip
    model = BertForPreTraining(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return model


def old_names(folder: Path) -> None:
    """As bert-base-uncased came: gamma and beta, in a pickle."""
    state = load_file(folder / "model.safetensors")
    state = {n.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta"): x for n, x in state.items()}
    torch.save(state, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def encoder_alone(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    kept = {n.removeprefix("bert."): x for n, x in state.items() if n.startswith("bert.")}
    save_file(kept, folder / "model.safetensors")


@pytest.mark.parametrize("change", [lambda folder: None, old_names, encoder_alone])
def test_a_bert_starts_text_tower_and_fusion(
    home: SimpleNamespace, tmp_path: Path, change: Callable[[Path], None]
) -> None:
    source = bert(tmp_path / "bert")
    change(tmp_path / "bert")
    described = recipe(model={"text": {"weights": str(tmp_path / "bert")}})
    student, initial = start(described, home.tokenizer)
    fresh, model, state = build(described).model, student.model, source.state_dict()
    mine = model.text.bert.state_dict()
    for name, x in mine.items():
        wanted = state[f"bert.{name}"]
        assert torch.equal(x, wanted[: len(x)]), name
    layer, theirs = model.fusion.layers[0], "bert.encoder.layer.1"
    both = torch.cat([state[f"{theirs}.attention.self.{part}.weight"] for part in ("key", "value")])
    assert torch.equal(layer.self_attention.key_value.weight, both)
    assert torch.equal(layer.feed_forward[2].bias, state[f"{theirs}.output.dense.bias"])
    assert torch.equal(layer.feed_norm.weight, state[f"{theirs}.output.LayerNorm.weight"])
    assert torch.equal(layer.self_norm.weight, state[f"{theirs}.attention.output.LayerNorm.weight"])
    begun = fresh.fusion.layers[0]
    assert torch.equal(layer.cross_attention.key_value.weight, begun.cross_attention.key_value.weight)
    assert torch.equal(layer.cross_norm.weight, begun.cross_norm.weight)
    if change is encoder_alone:
        assert torch.equal(model.word_head[0].weight, fresh.word_head[0].weight)
        assert initial.notices == ["model.text.weights: the cross-attention is new, and so is the word head"]
    else:
        assert torch.equal(model.word_head[0].weight, state["cls.predictions.transform.dense.weight"])
        assert torch.equal(model.word_bias, state["cls.predictions.bias"])
        assert initial.notices == ["model.text.weights: the cross-attention is new"]
    ids = torch.randint(6, 40, (2, 9))
    mask = torch.arange(9) < torch.tensor([[9], [5]])
    source.eval()
    with torch.no_grad():
        hidden = source.bert(ids, attention_mask=mask, output_hidden_states=True).hidden_states
        torch.testing.assert_close(model.eval().text(ids, mask)[mask], hidden[1][mask])


def test_with_norms_before_a_bert_starts_the_text_tower_alone(home: SimpleNamespace, tmp_path: Path) -> None:
    source = bert(tmp_path / "bert", num_hidden_layers=1)
    described = recipe(model={"text": {"weights": str(tmp_path / "bert")}, "fusion": {"norm": "pre"}})
    student, initial = start(described, home.tokenizer)
    assert torch.equal(student.model.text.word_embeddings.weight, source.state_dict()["cls.predictions.decoder.weight"])
    fresh = build(described).model.fusion.state_dict()
    assert all(torch.equal(x, fresh[name]) for name, x in student.model.fusion.state_dict().items())
    assert initial.notices == ["model.text.weights: the fusion encoder is new, as model.fusion.norm is pre"]


def without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def kind(folder: Path, **values: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


def lacking(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    save_file({n: x for n, x in state.items() if "layer.1.output.dense" not in n}, folder / "model.safetensors")


@pytest.mark.parametrize(("changes", "spoil", "message"), [
    ({"hidden_size": 128}, None, "has hidden_size 128, and model.text.width is 64; make them the same"),
    ({"num_attention_heads": 2}, None, "has num_attention_heads 2, and model.text.heads is 1"),
    ({"num_hidden_layers": 1}, None, "has 1 layers, model.text.depth and model.fusion.depth want 2; lower them"),
    ({"vocab_size": 44}, None, "has 44 words, the data's vocabulary 40; set data.vocabulary to the vocab.txt beside"),
    ({"intermediate_size": 64}, None, r"other shapes: .*intermediate.dense.weight is \(64, 64\), not \(128, 64\)"),
    ({"max_position_embeddings": 10}, None, r"position_embeddings.weight is \(10, 64\), not \(20, 64\)"),
    ({"hidden_act": "relu"}, None, "has the activation relu, the model gelu"),
    ({}, without_weights, "neither model.safetensors nor pytorch_model.bin is in it"),
    ({}, lambda folder: kind(folder, model_type="roberta"), "is of type 'roberta', not 'bert'"),
    ({}, lambda folder: (folder / "config.json").unlink(), "config.json cannot be read: No such file"),
    ({}, lacking, r"has no encoder.layer.1.output.dense.weight, encoder.layer.1.output.dense.bias;"),
])  # fmt: skip
def test_another_bert_is_refused(
    home: SimpleNamespace, tmp_path: Path, changes: dict[str, Any], spoil: Callable[[Path], None] | None, message: str
) -> None:
    bert(tmp_path / "bert", **changes)
    if spoil is not None:
        spoil(tmp_path / "bert")
    with pytest.raises(CheckpointError, match=f"^model.text.weights: .*{message}") as error:
        start(recipe(model={"text": {"weights": str(tmp_path / "bert")}}), home.tokenizer)
    assert "\n" not in str(error.value)
