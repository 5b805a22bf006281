"""The page and the examples on embedding: every block of code runs, in order, as somebody would type it."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "embedding.md").read_text()


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_pages_code_runs() -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    left_out = re.findall(r"^```python no-run\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    assert len(blocks) + len(left_out) == PAGE.count("```python")
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "docs/embedding.md", "exec"), names)
    for block in left_out:  # of libraries that are not installed
        compile(block, "docs/embedding.md", "exec")
    assert names["swap_attention"](names["decoder"]) == [  # type: ignore[operator]
        *(f"layers.{i}.{which}" for i in (0, 1) for which in ("self_attn", "multihead_attn"))
    ]
    assert names["plan"].image.sum(1).tolist() == [98, 98]  # type: ignore[attr-defined]
    assert names["teacher"].updates == 3  # type: ignore[attr-defined]
    assert names["found"].output.shape == (2, 30, 256)  # type: ignore[attr-defined]


def test_the_average_of_the_example_is_better_than_its_student(capsys: pytest.CaptureFixture[str]) -> None:
    student, teacher = example("ema_teacher").main(300)
    assert teacher > student
    assert "after 300 updates" in capsys.readouterr().out


def test_masks_on_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, colour in (("one", "red"), ("two", "blue")):
        Image.new("RGB", (40, 30), colour).save(tmp_path / f"{name}.png")
    pictures = [tmp_path / "one.png", tmp_path / "two.png"]
    output = tmp_path / "masks.png"
    example("masks_on_your_pictures").main(pictures, output, "sycoca", 0.5, "vit_tiny_patch16_224", False)
    drawn = Image.open(output)
    assert drawn.size == (3 * 224, 2 * 224)
    left = np.asarray(drawn.crop((2 * 224, 0, 3 * 224, 224)))
    assert 0.4 < (left.sum(2) == 0).mean() < 0.6  # half of the picture is hidden
    assert "hides 50% of 2 pictures" in capsys.readouterr().out
