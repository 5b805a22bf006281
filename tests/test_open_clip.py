"""CoCas of open_clip as folders and back: bit by bit where they fit, one line where not, and the same numbers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

from crossmask.engine.cli import app
from crossmask.engine.convert_open_clip import convert_open_clip
from crossmask.engine.data import CaptionTokenizer
from crossmask.engine.errors import CheckpointError, DataError
from crossmask.engine.exported import load_exported
from crossmask.engine.models.captioner import CaptioningModel
from crossmask.engine.models.open_clip_recognition import recognise
from crossmask.engine.recipe_files import dump_recipe, load_recipe

open_clip = pytest.importorskip("open_clip")

WORDS, LENGTH = 97, 12
VISION = {"image_size": 32, "patch_size": 16, "width": 64, "layers": 2, "head_width": 32, "output_tokens": True}
TEXT = {"context_length": LENGTH, "vocab_size": WORDS, "width": 48, "heads": 3}
WIDE = {"width": 64, "heads": 4}
POOLED = {"attentional_pool": True, "attn_pooler_queries": 5, "attn_pooler_heads": 4}
CONFIGS: dict[str, dict[str, Any]] = {
    "pooler": {"vision_cfg": {**VISION, **POOLED}},
    "as wide as the image tower": {"embed_dim": 64, "vision_cfg": {**VISION, **POOLED}, "wide": WIDE},
    "no pooler": {"vision_cfg": VISION, "wide": WIDE},
    "quick GELU": {"vision_cfg": {**VISION, **POOLED, "mlp_ratio": 2.0}, "quick_gelu": True},
}  # fmt: skip


def config_of(name: str) -> dict[str, Any]:
    given = dict(CONFIGS[name])
    text = {**TEXT, **given.pop("wide", {})}
    return {
        "embed_dim": 48,
        "multimodal_cfg": {**text, "layers": 2},
        "text_cfg": {**text, "layers": 3, "embed_cls": True, "output_tokens": True},
        "custom_text": True,
        **given,
    }


def coca(config: dict[str, Any]) -> Any:
    """With weights that are all random: biases and layer norms too, so that none stands for another."""
    model = open_clip.CoCa(**{name: value for name, value in config.items() if name != "custom_text"})
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in model.named_parameters():
            value.normal_(std=0.15, generator=generator)
            if name.rpartition(".")[0].rpartition(".")[2].startswith("ln_") and name.endswith("weight"):
                value.add_(1.0)
        model.logit_scale.fill_(2.7182)
    return model.eval()


def pairs(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Images, and captions of other lengths, one without padding."""
    luck = torch.Generator().manual_seed(seed)
    text = torch.randint(1, WORDS, (4, LENGTH), generator=luck)
    text[1, 5:], text[2, 2:], text[3, 11:] = 0, 0, 0
    return torch.randn(4, 3, 32, 32, generator=luck), text


@pytest.fixture
def home(tmp_path: Path) -> Path:
    config = config_of("pooler")
    torch.save(coca(config).state_dict(), tmp_path / "in.pt")
    (tmp_path / "in.json").write_text(json.dumps(config))
    return tmp_path


def converted(folder: Path, name: str) -> tuple[Any, CaptioningModel]:
    config = config_of(name)
    theirs = coca(config)
    torch.save(theirs.state_dict(), folder / "in.pt")
    (folder / "in.json").write_text(json.dumps(config))
    convert_open_clip(folder / "in.pt", folder / "ours", folder / "in.json")
    model, _, _ = load_exported(folder / "ours")
    assert isinstance(model, CaptioningModel)
    return theirs, model


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_the_same_features_and_caption_logits(tmp_path: Path, name: str) -> None:
    theirs, ours = converted(tmp_path, name)
    images, text = pairs()
    wanted = theirs(images, text, output_labels=False)
    image = ours.encode_image(images)
    close = {"atol": 1e-5, "rtol": 0.0}
    torch.testing.assert_close(image.feature, wanted["image_features"], **close)
    for length in (LENGTH, 11):  # and when a batch is no longer than its longest caption
        ids = text if length == LENGTH else text[1:, :length]
        mask = ids != 0
        rows = slice(0, None) if length == LENGTH else slice(1, None)
        read = ours.encode_text(ids, mask)
        torch.testing.assert_close(read.feature, wanted["text_features"][rows], **close)
        logits = ours.caption_logits(read.tokens, mask, ours.context(image.rows(rows)))
        torch.testing.assert_close(logits[mask], wanted["logits"][rows][:, :length][mask], **close)
    assert wanted["logits"].std() > 0.1, "logits that are all alike would prove nothing"
    assert (wanted["image_features"] @ wanted["image_features"].T - torch.eye(4)).max() < 0.999


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert (found[name].dtype, found[name].shape) == (value.dtype, value.shape), name
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_there_and_back(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    config = config_of(name)
    state = {key: value.to(dtype) for key, value in coca(config).state_dict().items()}
    state["logit_scale"] = torch.tensor(3.14159, dtype=dtype)
    torch.save(state, tmp_path / "in.pt")
    (tmp_path / "in.json").write_text(json.dumps(config))
    lines: list[str] = []
    convert_open_clip(tmp_path / "in.pt", tmp_path / "ours", tmp_path / "in.json", tell=lines.append)
    assert lines[0].startswith("new, in.pt has none: image.mask_token;")
    convert_open_clip(tmp_path / "ours", tmp_path / "out.pt", tell=lines.append)
    assert lines[-1] == "left out, open_clip's layout has no place for it: image.mask_token"
    assert_same(torch.load(tmp_path / "out.pt", weights_only=True), state)
    convert_open_clip(tmp_path / "ours", tmp_path / "again.safetensors")
    assert_same(load_file(tmp_path / "again.safetensors"), state)
    # and its own configuration builds a model that takes it
    written = json.loads((tmp_path / "out.json").read_text())
    again = open_clip.CoCa(**{key: value for key, value in written.items() if key != "custom_text"})
    again.load_state_dict({key: value.float() for key, value in state.items()}, strict=True)


def test_a_training_checkpoint_and_safetensors_are_read_alike(home: Path) -> None:
    state = torch.load(home / "in.pt", weights_only=True)
    wrapped = {"epoch": 3, "name": "x", "state_dict": {f"module.{name}": value for name, value in state.items()}}
    torch.save(wrapped, home / "epoch_3.pt")
    save_file({name: value.contiguous() for name, value in state.items()}, home / "in.safetensors")
    for number, file in enumerate(("in.pt", "epoch_3.pt", "in.safetensors")):
        convert_open_clip(home / file, home / f"{number}", home / "in.json")
    first = load_file(home / "0" / "model.safetensors")
    for number in ("1", "2"):
        assert_same(load_file(home / number / "model.safetensors"), first)


def test_a_temperature_that_was_trained_on_is_exported(home: Path) -> None:
    convert_open_clip(home / "in.pt", home / "ours", home / "in.json")
    tensors = load_file(home / "ours" / "model.safetensors")
    tensors["temperature"] = torch.tensor([0.03125])
    save_file(tensors, home / "ours" / "model.safetensors", metadata={"format": "pt"})
    convert_open_clip(home / "ours", home / "out.pt")
    scale = torch.load(home / "out.pt", weights_only=True)["logit_scale"]
    torch.testing.assert_close(scale.exp(), torch.tensor(32.0))


@pytest.mark.parametrize("name", ["coca_ViT-B-32", "coca_ViT-L-14"])
def test_the_published_shapes_are_known(name: str) -> None:
    """Without a configuration: heads are those of open_clip's own."""
    config = open_clip.get_model_config(name)
    with torch.device("meta"):
        model = open_clip.CoCa(**{key: value for key, value in config.items() if key != "custom_text"})
        state = model.state_dict()
        layout = recognise(state, {}, name)
    described = layout.describe()
    for part in ("vision_cfg", "text_cfg", "multimodal_cfg"):
        for key, value in config[part].items():
            if (part, key) != ("multimodal_cfg", "attn_pooler_heads"):  # which open_clip does not read
                assert described[part][key] == value, (part, key)
    assert {name: tuple(value.shape) for name, value in state.items()} == layout.their_shapes()


def without(*begins: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda state: {name: value for name, value in state.items() if not name.startswith(begins)}


LAST, FIRST = "text_decoder.cross_attn.1.ln_1_kv.bias", "visual.transformer.resblocks.0."
MISTAKES: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "one is missing": (without(LAST), f"1 missing ({LAST}); the file is not whole"),
    "a block is missing": (without(FIRST), f"1 or more missing ({FIRST}mlp.c_fc.weight)"),
    "a CLIP": (without("text_decoder."), "it is a CLIP, which has no text decoder"),
    "layer scales": (
        lambda state: state | {f"{FIRST}ls_1.gamma": torch.ones(64)},
        f"1 foreign ({FIRST}ls_1.gamma); it has layer scales",
    ),
    "a model of transformers": (
        lambda state: without("text.")(state) | {"text.transformer.embeddings.x": torch.ones(1)},
        "its text tower is a model of transformers",
    ),
    "SigLIP's bias": (lambda state: state | {"logit_bias": torch.ones(())}, "with a bias of its logits"),
    "another shape": (
        lambda state: state | {"visual.ln_pre.bias": torch.ones(65)},
        "1 of another shape or type (visual.ln_pre.bias is (65,), not (64,))",
    ),
    "mixed": (
        lambda state: state | {"visual.ln_pre.bias": torch.ones(64).half()},
        "it mixes float16 and float32",
    ),
    "not a square": (
        lambda state: state | {"visual.positional_embedding": torch.ones(7, 64)},
        "are no square",
    ),
    "ALBEF": (lambda state: {"visual_encoder.norm.bias": torch.ones(3)}, "crossmask convert albef"),
    "no tensors": (lambda state: {"state_dict": 3}, "not a state dict"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_one_line(home: Path, mistake: str) -> None:
    change, words = MISTAKES[mistake]
    torch.save(change(torch.load(home / "in.pt", weights_only=True)), home / "bad.pt")
    with pytest.raises(CheckpointError) as caught:
        convert_open_clip(home / "bad.pt", home / "ours", home / "in.json")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (home / "ours").exists()


def test_a_file_that_is_cut_off(home: Path) -> None:
    for name in ("in.pt", "in.safetensors"):
        if name.endswith("safetensors"):
            save_file(
                {n: v.contiguous() for n, v in torch.load(home / "in.pt", weights_only=True).items()}, home / name
            )
        whole = (home / name).read_bytes()
        (home / f"cut-{name}").write_bytes(whole[: len(whole) // 2])
        with pytest.raises(CheckpointError, match="is cut off"):
            convert_open_clip(home / f"cut-{name}", home / "ours", home / "in.json")


def test_heads_that_do_not_divide_ask_for_the_configuration(home: Path) -> None:
    with pytest.raises(CheckpointError, match=r"48 is no multiple of 64; give its configuration with --config"):
        convert_open_clip(home / "in.pt", home / "ours")
    (home / "no.json").write_text("[]")
    with pytest.raises(CheckpointError, match="it has no vision_cfg"):
        convert_open_clip(home / "in.pt", home / "ours", home / "no.json")


OTHERS = "; train with {} for it, or use crossmask export, which keeps every model as it is"


def test_a_run_of_another_layout_is_refused_before_its_weights_are_looked_for(tmp_path: Path) -> None:
    for name, others in {
        "sycoca-emoji": "is not of open_clip's layout: model.pool is mean, there it is cls; model.image.stem is conv,"
        " there it is patch; model.captioner.norm_pre is false, there it is true; model.captioner.qk_norm is true,"
        " there it is false; model.captioner.mlp_ratio is 2.0, there it is 4.0; model.text.depth is 0, there it is"
        " 1 or more" + OTHERS.format("these"),
        "albef-emoji": "is no captioner, so not of CoCa's layout: it has no model.captioner; give a model that has",
    }.items():
        own = ["image.stem=conv", "captioner.norm_pre=false", "captioner.qk_norm=true", "captioner.mlp_ratio=2.0"]
        fields = ["model.pool=mean", "model.text.depth=0", *(f"model.{field}" for field in own)]
        (tmp_path / "recipe.yaml").write_text(dump_recipe(load_recipe(name, fields if "sycoca" in name else [])))
        with pytest.raises(CheckpointError) as caught:
            convert_open_clip(tmp_path, tmp_path / "out.pt", tell=pytest.fail)
        assert str(caught.value).startswith(f"{tmp_path} {others}")
    (tmp_path / "recipe.yaml").write_text("model: 3")
    with pytest.raises(CheckpointError, match=r"recipe\.yaml is not a recipe of this version"):
        convert_open_clip(tmp_path, tmp_path / "out.pt")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: m["captioner"].update(qk_norm=True), "model.captioner.qk_norm is true, there it is false"),
        (lambda m: m["captioner"]["pooler"].update(kind="cascade"), "pooler.kind is cascade, there it is single"),
        (lambda m: m["text"].update(width=24), "model.text.width is 24, there it is 48"),
    ],
)
def test_an_export_of_another_layout_is_refused(home: Path, change: Callable[[Any], None], words: str) -> None:
    convert_open_clip(home / "in.pt", home / "ours", home / "in.json")
    config = json.loads((home / "ours" / "config.json").read_text())
    change(config["model"])
    (home / "ours" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError) as caught:
        convert_open_clip(home / "ours", home / "out.pt")
    assert str(caught.value).endswith(words + OTHERS.format("this"))
    assert not (home / "out.pt").exists()


def test_a_state_dict_that_cannot_be_written_leaves_nothing(home: Path) -> None:
    convert_open_clip(home / "in.pt", home / "ours", home / "in.json")
    with pytest.raises(CheckpointError, match=r"in\.pt/out\.pt cannot be written: .*; make room, or"):
        convert_open_clip(home / "ours", home / "in.pt" / "out.pt")
    (home / "out.json.part").mkdir()
    with pytest.raises(CheckpointError, match=r"out\.json cannot be written: Is a directory"):
        convert_open_clip(home / "ours", home / "out.pt")
    assert not (home / "out.pt.part").exists()


def test_on_the_command_line(home: Path) -> None:
    run = CliRunner().invoke
    made = run(
        app, ["convert", "open-clip", str(home / "in.pt"), str(home / "ours"), "--config", str(home / "in.json")]
    )
    assert made.exit_code == 0, made.output
    assert "97 tokens in 3 + 2 layers; start a run from it with model.initial=" in made.output
    back = run(app, ["convert", "open-clip", str(home / "ours"), str(home / "out.pt")])
    assert "tensors in open_clip's layout" in back.output
    assert_same(torch.load(home / "out.pt", weights_only=True), torch.load(home / "in.pt", weights_only=True))
    again = run(app, ["convert", "open-clip", str(home / "ours"), str(home / "out.pt")])
    assert isinstance(again.exception, CheckpointError)
    assert "replace it with --force" in str(again.exception)


# ---- CLIP's words

CAPTIONS = [
    "a red apple, two cats & a ferry!", "it's 2024: don't", "  Many   spaces\tand\nlines ",
    "crème brûlée, naïve Ünïcode", "日本 emoji 🍎", "a&amp;b", "half-way (yes) ... \"quoted\"", "",
]  # fmt: skip


@pytest.fixture(scope="module")
def clip() -> CaptionTokenizer:
    return CaptionTokenizer.from_vocabulary(Path(open_clip.tokenizer.default_bpe()))


def test_clips_byte_pairs(clip: CaptionTokenizer, tmp_path: Path) -> None:
    theirs = open_clip.SimpleTokenizer()
    assert clip.vocabulary_size == theirs.vocab_size == 49408
    assert (clip.cls_id, clip.sep_id, clip.pad_id) == (theirs.sot_token_id, theirs.eot_token_id, 0)
    clip.save(tmp_path / "tokenizer.json")
    for tokenizer in (clip, CaptionTokenizer.load(tmp_path / "tokenizer.json")):
        ids, mask = tokenizer.batch(CAPTIONS, 77)
        for caption, row, there in zip(CAPTIONS, ids, mask, strict=True):
            assert row[there].tolist() == [theirs.sot_token_id, *theirs.encode(caption), theirs.eot_token_id]
            # each of theirs is followed by one space, ours end without
            assert tokenizer.text(row) == " ".join(theirs.decode(theirs.encode(caption)).split())
    start, first, *rest, end = clip.words(clip.batch(["unbelievableness red"], 20)[0][0])
    assert (start, end, rest[-1]) == ("[CLS]", "[SEP]", "red")
    assert all(piece.startswith("##") for piece in rest[:-1])
    assert "".join([first, *(piece.removeprefix("##") for piece in rest[:-1])]) == "unbelievableness"


def test_a_vocabulary_that_is_no_list_of_byte_pairs(tmp_path: Path) -> None:
    import gzip

    (tmp_path / "x.txt.gz").write_bytes(gzip.compress(b"a b\n" * 10))
    with pytest.raises(DataError, match="is not CLIP's list of byte pairs"):
        CaptionTokenizer.from_vocabulary(tmp_path / "x.txt.gz")
    (tmp_path / "y.txt.gz").write_bytes(b"nothing")
    with pytest.raises(DataError, match="cannot read"):
        CaptionTokenizer.from_vocabulary(tmp_path / "y.txt.gz")
    whole = Path(open_clip.tokenizer.default_bpe()).read_bytes()
    (tmp_path / "z.txt.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="cut off"):
        CaptionTokenizer.from_vocabulary(tmp_path / "z.txt.gz")
