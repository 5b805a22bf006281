"""``docs/transformers.md``: its code runs, its table is that of the models the tests hold to eager attention."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from transformers_models import LAYERS, table

PAGE = Path(__file__).parents[1].joinpath("docs", "transformers.md").read_text()


def test_the_table_is_of_what_is_tested() -> None:
    assert table() in PAGE, "docs/transformers.md: put in what `python tests/transformers_models.py` prints"


def test_the_pages_code_runs(capsys: pytest.CaptureFixture[str]) -> None:
    torch.set_num_threads(1)
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    assert len(blocks) == PAGE.count("```python") == 3
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "docs/transformers.md", "exec"), names)
    printed = capsys.readouterr().out.splitlines()
    assert printed == [f"bert.encoder.layer.{i}.crossattention.self torch.Size([2, 197])" for i in range(LAYERS)]
    assert all(p.grad is not None for n, p in names["model"].named_parameters() if "crossattention" in n)  # type: ignore[attr-defined]
    assert [tuple(step.key_attention.shape) for step in names["steps"]] == [(2, 17)] * 4  # type: ignore[attr-defined]
