"""What the pages tell people to type works: Python runs, recipes are recipes, commands parse, scripts are there."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from docs_blocks import KNOWN, PAGES, Block, Line, blocks, commands, name_of

from crossmask.engine.masking import policies
from crossmask.engine.recipe import Recipe

WITH_PYTHON = [page for page in PAGES if any(block.info == "python" for block in blocks(page))]
LEFT_OUT = 8  # blocks fenced ``python no-run``, at most: what cannot run should be rare
# what holds behind a page's code, in its own names; ``printed`` is what it printed
CHECKS = {
    "docs/embedding.md": [
        "[name.split('.')[-1] for name in swap_attention(decoder)] == ['self_attn', 'multihead_attn'] * 2",
        "plan.image.sum(1).tolist() == [98, 98]",
        "teacher.updates == 3",
        "found.output.shape == (2, 30, 256)",
    ],
    "docs/transformers.md": [
        "printed.splitlines() == [f'bert.encoder.layer.{i}.crossattention.self torch.Size([2, 197])' for i in (0, 1)]",
        "all(p.grad is not None for n, p in model.named_parameters() if 'crossattention' in n)",
        "[tuple(step.key_attention.shape) for step in steps] == [(2, 17)] * 4",
    ],
    "docs/kernels/cross_attention.md": ["out.statistics.key_max.shape == (2, 197)", "q.grad.abs().sum() > 0"],
    "docs/index.md": ["plan.image.sum(1).tolist() == [8, 8]"],
}


@pytest.fixture(scope="module")
def runner() -> Iterator[subprocess.Popen[str]]:
    """One process that has imported torch, and forks for each page: policies that a page registers stay in it."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    with subprocess.Popen(
        [sys.executable, Path(__file__).parent / "docs_runner.py"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    ) as process:
        yield process
        assert process.stdin is not None
        process.stdin.close()


def run(runner: subprocess.Popen[str], page: str, code: list[tuple[int, str]], checks: list[str]) -> dict[str, Any]:
    assert runner.stdin is not None
    assert runner.stdout is not None
    runner.stdin.write(json.dumps({"page": page, "blocks": code, "checks": checks}) + "\n")
    runner.stdin.flush()
    answer: dict[str, Any] = json.loads(runner.stdout.readline())
    return answer


@pytest.mark.parametrize("page", WITH_PYTHON, ids=name_of)
def test_python_runs_from_top_to_bottom(page: Path, runner: subprocess.Popen[str]) -> None:
    code = [(block.line, block.code) for block in blocks(page) if block.info == "python"]
    answer = run(runner, name_of(page), code, CHECKS.get(name_of(page), []))
    assert answer["error"] is None, f"{name_of(page)}:\n{answer['error']}"


def test_the_runner_notices_what_is_wrong(runner: subprocess.Popen[str]) -> None:
    assert "ZeroDivisionError" in run(runner, "page", [(3, "1 / 0")], [])["error"]
    assert "line 3" in run(runner, "page", [(3, "1 / 0")], [])["error"]
    assert "does not hold" in run(runner, "page", [(1, "x = 1")], ["x == 2"])["error"]
    assert run(runner, "page", [(1, "x = 1")], ["x == 1"])["error"] is None
    assert "signal" in run(runner, "page", [(1, "import os; os.kill(os.getpid(), 9)")], [])["error"]


def test_what_does_not_run_is_rare_compiles_and_has_a_reason() -> None:
    found = [block for page in PAGES for block in blocks(page) if block.info == "python no-run"]
    for block in found:
        compile(block.code, block.where, "exec")
        reason = block.before.strip().splitlines()
        assert reason, f"{block.where}: say in front of it why it cannot run"
        assert not reason[-1].startswith("#"), f"{block.where}: say in front of it why it cannot run"
    assert len(found) <= LEFT_OUT, [block.where for block in found]


def test_every_block_says_what_it_is() -> None:
    known = {"python", "python no-run", "bash", "yaml", "json", "text", "", "mermaid", "csv", "toml"}
    for page in PAGES:
        for block in blocks(page):
            assert block.info in known, f"{block.where}: {block.info!r}"
        fences = re.findall(r"^ *```", page.read_text(), re.MULTILINE)
        assert len(fences) == 2 * len(blocks(page)), f"{name_of(page)}: a fence is not closed"


def yaml_blocks() -> list[Block]:
    return [block for page in PAGES for block in blocks(page) if block.language in ("yaml", "json")]


@pytest.mark.parametrize("block", yaml_blocks(), ids=lambda block: block.where)
def test_recipes_in_pages_are_recipes(block: Block) -> None:
    if block.language == "json":
        decoder, rest = json.JSONDecoder(), block.code.strip()
        while rest:  # one value, or one a line
            rest = rest[decoder.raw_decode(rest)[1] :].strip()
        return
    values = yaml.safe_load(block.code)
    if set(values) <= set(Recipe.model_fields):
        recipe = Recipe.model_validate(values)
        known = {*policies()} if not recipe.plugins else None
        for name in (recipe.masking.policy, recipe.masking.text_policy):
            assert known is None or name in (*known, None), f"{block.where}: no policy {name}"
    else:
        from crossmask.engine.ablation.description import Ablation

        assert set(values) <= set(Ablation.model_fields), f"{block.where}: neither a recipe's fields nor an ablation's"


def lines_of(*first: str) -> list[Line]:
    return [line for line in commands() if line.words and line.words[0] in first]


def test_every_command_is_one_that_is_checked() -> None:
    found = list(commands())
    assert len(found) > 60
    for line in found:
        assert line.words[0] in KNOWN, f"{line.where}: {line.text!r}: teach tests/docs_blocks.py this command"


def unique(lines: list[Line]) -> list[Line]:
    return list({tuple(line.words): line for line in lines}.values())


@pytest.mark.parametrize("line", unique(lines_of("crossmask")), ids=lambda line: " ".join(line.words)[:70])
def test_crossmask_takes_what_the_pages_say(line: Line) -> None:
    from docs_commands import check_crossmask

    check_crossmask(line)


@pytest.mark.parametrize("line", unique(lines_of("deepspeed", "torchrun")), ids=lambda line: " ".join(line.words)[:70])
def test_launchers_take_what_the_pages_say(line: Line) -> None:
    from docs_commands import check_launcher

    check_launcher(line)


@pytest.mark.parametrize("line", unique(lines_of("make", "pip", "python", "mkdocs")), ids=lambda line: line.text[:70])
def test_targets_scripts_and_extras_are_there(line: Line) -> None:
    from docs_commands import check_other

    check_other(line)


def inline_commands() -> list[Line]:
    """``crossmask …``, ``make …`` and scripts that stand in a sentence."""
    found = []
    for page in PAGES:
        text = re.sub(r"^ *```.*?^ *```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
        found += [Line(name_of(page), code) for code in re.findall(r"`((?:crossmask|make|python)[ ][^`\n]+)`", text)]
    return found


@pytest.mark.parametrize("line", unique(inline_commands()), ids=lambda line: line.text[:70])
def test_commands_in_sentences(line: Line) -> None:
    from docs_commands import check_crossmask, check_other

    (check_crossmask if line.words[0] == "crossmask" else check_other)(line)


@pytest.mark.parametrize("arguments", [["--version"], ["recipes"], ["doctor"]], ids=" ".join)
def test_cheap_commands_run(arguments: list[str], runner: subprocess.Popen[str]) -> None:
    code = f"import sys\nfrom crossmask.engine.cli import app\nfound = app({arguments!r}, standalone_mode=False)\n"
    answer = run(runner, " ".join(arguments), [(1, code)], ["len(printed) > 5", "found in (None, 0)"])
    assert answer["error"] is None, answer["error"]


def test_the_plan_of_the_page_is_made(runner: subprocess.Popen[str]) -> None:
    (line,) = [line for line in lines_of("crossmask") if line.words[1] == "plan" and "--json" in line.words]
    code = f"from crossmask.engine.cli import app\nimport json\napp({line.words[1:]!r}, standalone_mode=False)\n"
    code += f"figures = json.load(open({line.words[line.words.index('--json') + 1]!r}))\n"
    answer = run(runner, line.text, [(1, code)], ["figures"])
    assert answer["error"] is None, answer["error"]
