"""Fenced blocks of the project's pages: what they are in, and the commands among them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^(?P<space>[ ]*)```(?P<info>[^\n`]*)\n(?P<code>.*?)^(?P=space)```[ ]*$", re.MULTILINE | re.DOTALL)
SHELL = ("bash", "sh", "shell", "console", "")


@dataclass(frozen=True)
class Block:
    page: str  # from the top of the repository
    line: int  # of its first line of code
    info: str  # what stands behind the fence
    code: str
    before: str  # the text in front of it, up to the block before

    @property
    def language(self) -> str:
        return self.info.split()[0] if self.info.split() else ""

    @property
    def where(self) -> str:
        return f"{self.page}:{self.line}"


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path) -> list[Block]:
    text = page.read_text()
    found, last = [], 0
    for match in FENCE.finditer(text):
        space = len(match["space"])
        code = "".join(line[space:] for line in match["code"].splitlines(keepends=True))
        line = text.count("\n", 0, match.start()) + 2
        found.append(Block(name_of(page), line, match["info"].strip(), code, text[last : match.start()]))
        last = match.end()
    return found


@dataclass(frozen=True)
class Line:
    """A command somebody is told to type."""

    where: str
    text: str

    @property
    def words(self) -> list[str]:
        """As a shell takes them apart, without comments; ``.venv/bin/crossmask`` is ``crossmask``."""
        words = shlex.split(self.text, comments=True)
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
            words = words[1:]
        return [words[0].removeprefix(".venv/bin/"), *words[1:]] if words else []


KNOWN = ("crossmask", "make", "deepspeed", "torchrun", "python", "pip", "mkdocs", "source", "export", "cd")


def commands() -> Iterator[Line]:
    """Every command of every page. A block without a language may be anything; only what begins as one counts."""
    for page in PAGES:
        for block in blocks(page):
            if block.language not in SHELL:
                continue
            joined = re.sub(r"\\\n\s*", " ", block.code)
            for text in joined.splitlines():
                line = Line(block.where, text.strip())
                starts = line.text.split(maxsplit=1)[:1]
                first = starts[0].removeprefix(".venv/bin/") if starts else "#"
                if first.startswith("#"):
                    continue
                if block.language or first in KNOWN:
                    yield line
