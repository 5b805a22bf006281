"""Every example runs, small, and does what its docstring says; a new one without a test here is found out."""

from __future__ import annotations

import importlib
import importlib.util
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image

from crossmask.engine.data import CaptionTokenizer
from crossmask.engine.exported import describe_export, save_exported
from crossmask.engine.masking import registry
from crossmask.engine.models import VisionLanguageModel
from crossmask.engine.recipe import Recipe

FOLDER = Path(__file__).resolve().parents[1] / "examples"
EXAMPLES = sorted(path.stem for path in FOLDER.glob("*.py"))
ELSEWHERE = {"own_model": "test_library"}  # example -> the beginning of the test files' names that run it


@pytest.fixture(autouse=True)
def _examples_can_be_imported(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As when they are started: their folder is searched first."""
    monkeypatch.syspath_prepend(str(FOLDER))
    yield
    for name in EXAMPLES:
        sys.modules.pop(name, None)


def example(name: str) -> ModuleType:
    return importlib.import_module(name)


@pytest.fixture
def pictures(tmp_path: Path) -> list[Path]:
    files = [tmp_path / "one.png", tmp_path / "two.png"]
    for file, colour in zip(files, ("red", "blue"), strict=True):
        Image.new("RGB", (40, 30), colour).save(file)
    return files


@pytest.mark.parametrize("name", EXAMPLES)
def test_every_example_is_tested_and_listed_and_says_its_command(name: str) -> None:
    text = (FOLDER / f"{name}.py").read_text()
    docstring = text.split('"""')[1]
    assert f"python examples/{name}.py" in docstring
    assert f"[`{name}.py`]({name}.py)" in (FOLDER / "README.md").read_text()
    if name in ELSEWHERE:
        files = Path(__file__).parent.glob(f"{ELSEWHERE[name]}*.py")
        assert any(name in file.read_text() for file in files), f"no test runs examples/{name}.py"
    else:
        assert f'example("{name}")' in Path(__file__).read_text(), f"no test runs examples/{name}.py"
        assert len(text.splitlines()) < 100


@pytest.mark.parametrize("name", EXAMPLES)
def test_every_example_explains_its_options(name: str) -> None:
    """Without running it: what a newcomer does first is --help."""
    text = (FOLDER / f"{name}.py").read_text()
    assert "argparse.RawDescriptionHelpFormatter" in text or "typer" in text
    compile(text, name, "exec")


def test_the_average_is_better_than_its_student(capsys: pytest.CaptureFixture[str]) -> None:
    student, teacher = example("ema_teacher").main(300)
    assert teacher > student
    assert "after 300 updates" in capsys.readouterr().out


def test_masks_on_pictures(tmp_path: Path, pictures: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "masks.png"
    example("masks_on_your_pictures").main(pictures, output, "sycoca", 0.5, "vit_tiny_patch16_224", False)
    drawn = Image.open(output)
    assert drawn.size == (3 * 224, 2 * 224)
    left = np.asarray(drawn.crop((2 * 224, 0, 3 * 224, 224)))
    assert 0.4 < (left.sum(2) == 0).mean() < 0.6  # half of the picture is hidden
    assert "hides 50% of 2 pictures" in capsys.readouterr().out


def test_a_words_map_is_that_of_eager_attention() -> None:
    blip = example("blip_attention")
    model = blip.tiny_blip(6).eval()
    pixels, words = torch.randn(1, 3, 64, 64), torch.arange(6)[None]
    maps = blip.word_maps(model, pixels, words)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        seen = model.vision_model(pixel_values=pixels).last_hidden_state
        weights: list[torch.Tensor] = []
        layer = model.text_encoder.encoder.layer[-1].crossattention.self
        hook = layer.register_forward_hook(lambda _module, _inputs, output: weights.append(output[1]))
        model.text_encoder(words, encoder_hidden_states=seen, output_attentions=True)
        hook.remove()
    torch.testing.assert_close(maps.flatten(1), weights[0][0].mean(0)[:, 1:], rtol=1e-4, atol=1e-6)


def test_blip_on_a_picture(tmp_path: Path, pictures: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    example("blip_attention").main(pictures[0], "a red square", tmp_path / "maps.png", None)
    assert Image.open(tmp_path / "maps.png").size == (4 * 160, 178)
    assert "3 tokens look (random weights: by chance)" in capsys.readouterr().out


def test_blip_of_a_folder(tmp_path: Path, pictures: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import BertTokenizer, BlipImageProcessor, BlipProcessor

    blip = example("blip_attention")
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "square"]
    (tmp_path / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    tokenizer = BertTokenizer(str(tmp_path / "vocab.txt"))
    images = BlipImageProcessor(size={"height": 64, "width": 64})
    BlipProcessor(images, tokenizer).save_pretrained(tmp_path / "model")
    blip.tiny_blip(len(vocabulary)).save_pretrained(tmp_path / "model")
    blip.main(pictures[0], "a red square", tmp_path / "maps.png", str(tmp_path / "model"))
    assert Image.open(tmp_path / "maps.png").size == (6 * 160, 178)  # the picture, [CLS], three words, [SEP]
    assert "where 5 tokens look: " in capsys.readouterr().out


def test_a_blip_that_learns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    share = example("blip_learns_to_look").main(tmp_path / "maps.png", steps=2, batch=4, looks=4)
    assert 0 <= share <= 1
    assert Image.open(tmp_path / "maps.png").size == (5 * 160, 4 * 178)
    assert "(chance 25%)" in capsys.readouterr().out


def test_a_new_policy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from crossmask.engine.masking import choose_masks

    monkeypatch.setattr(registry, "_policies", dict(registry._policies))
    module = example("new_policy")
    told = torch.rand(64, 36, generator=torch.Generator().manual_seed(0))
    from crossmask.kernels import AttentionStatistics

    seen = AttentionStatistics(key_attention=told, query_attention=torch.ones(64, 5))
    shares = []
    for temperature in (1e-3, 0.5, 100.0):
        plan = choose_masks(
            "soft_attention", grid=(6, 6), statistics=seen, image_ratio=0.5, options={"temperature": temperature}
        )
        assert plan.image.sum(1).tolist() == [18] * 64
        shares.append(float(told[plan.image].mean()))
    strongest = told.topk(18).values.mean()
    assert shares[0] == pytest.approx(float(strongest))  # cold: what is looked at most
    assert shares[0] > shares[1] > shares[2]
    assert shares[2] == pytest.approx(0.5, abs=0.03)  # hot: anything

    module.main(tmp_path / "policy.png", None, 2)
    assert re.search(r"soft_attention at step 0 hides 39% .* and \d+% of the words", capsys.readouterr().out)
    assert Image.open(tmp_path / "policy.png").width > 300


def test_an_exported_model_in_use(tmp_path: Path, pictures: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    tower = {"width": 16, "depth": 1, "heads": 2, "mlp_ratio": 2.0}
    recipe = Recipe.model_validate(
        {
            "name": "tiny",
            "data": {"source": "emoji", "max_words": 8},
            "model": {
                "image": {**tower, "size": 32, "patch_size": 8},
                "text": tower,
                "fusion": {"depth": 1, "heads": 2},
                "projection_width": 8,
            },
        }
    )
    tokenizer = CaptionTokenizer.train(["a red square", "the blue sky", "pizza"], 80)
    model = VisionLanguageModel(recipe.model, tokenizer.vocabulary_size, 18)
    save_exported(
        tmp_path / "model",
        model.state_dict(),
        describe_export(recipe, "teacher", model.state_dict(), 3, "fp32"),
        tokenizer,
    )

    code = "import sys, use_exported; from pathlib import Path; p = sys.argv[1:]\n"
    code += "use_exported.main(Path(p[0]), [Path(x) for x in p[1:3]], ['a red square', 'the blue sky'], Path(p[3]))"
    command = [sys.executable, "-c", code, str(tmp_path / "model"), *map(str, pictures), str(tmp_path / "out.png")]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=FOLDER, timeout=120)  # DeepSpeed is not imported
    assert ran.returncode == 0, ran.stderr
    assert "2 pictures, 2 captions, no DeepSpeed" in ran.stdout
    assert Image.open(tmp_path / "out.png").height == 2 * 104

    module = example("use_exported")
    names, captions = module.embedded()
    assert len(names) == len(captions) == len(module.EMOJI)
    scores = torch.tensor([[0.1, 0.9], [0.8, 0.2]])
    sheet = module.draw([Image.open(file) for file in pictures], ["red", "blue"], scores)
    assert sheet.getpixel((8, 8)) == (255, 0, 0)  # the pictures stand at the left, in their order
    best = 96 + 190 + 150 + 4
    assert [sheet.getpixel((best, y)) for y in (8, 112)] == [(0, 0, 255), (255, 0, 0)]  # and the best beside a caption
