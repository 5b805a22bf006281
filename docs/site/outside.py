"""Links that leave docs/: GitHub shows the file, the site a page made from it.

A Markdown file becomes a page, code and configuration a page that quotes it, anything else is copied. What a page of
docs/ quotes by a link is found by looking; nothing is listed by hand.
"""

from __future__ import annotations

import os
import posixpath
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

LINK = re.compile(r"(?<!\\)(!?\[(?:[^\]\[]|\[[^\]]*\])*\]\()([^)\s#]*)(#[^)\s]*)?((?:\s+\"[^\"]*\")?\))")
FENCE = re.compile(r"^([ ]*)(```+|~~~+).*?^\1\2[ ]*$", re.MULTILINE | re.DOTALL)
LANGUAGES = {".py": "python", ".yaml": "yaml", ".yml": "yaml", ".json": "json", ".toml": "toml", ".cpp": "cpp"}
LANGUAGES |= {".h": "cpp", ".cu": "cpp", ".j2": "jinja", ".txt": "text", "": "make"}
UNSEARCHED = "---\ntitle: {title}\nsearch:\n  exclude: true\n---\n\n"


class Links:
    """``homes``: pages that files of the repository have already, by their path from its top."""

    def __init__(self, root: Path, homes: Mapping[str, str]) -> None:
        self.root = root
        self.pages = dict(homes)
        self.origins = {page: path for path, page in homes.items()}

    def sources(self, pages: Mapping[str, str]) -> dict[str, str | bytes]:
        """Pages and copies for whatever outside of docs/ the given pages lead to, and those lead to in turn."""
        made: dict[str, str | bytes] = {}
        open_pages = dict(pages)
        while open_pages:
            name, text = open_pages.popitem()
            for path in self._leaving(text, name):
                if path in self.pages or not (self.root / path).exists():
                    continue  # a page exists, or MkDocs will say that nothing is there
                uri, content = self._page(path)
                self.pages[path] = uri
                made[uri] = content
                if isinstance(content, str):
                    self.origins[uri] = path
                    if path.endswith(".md"):
                        open_pages[uri] = content
        return made

    def rewrite(self, markdown: str, page: str) -> str:
        def change(found: re.Match[str]) -> str:
            start, target, anchor, end = found[1], found[2], found[3] or "", found[4]
            path = self._repository_path(target, page)
            if path is None:
                return found[0]
            inside = path.startswith("docs/")
            uri = path.removeprefix("docs/") if inside else self.pages.get(path)
            if uri is None or (inside and page not in self.origins):
                return found[0]
            return f"{start}{os.path.relpath(uri, posixpath.dirname(page) or '.')}{anchor}{end}"

        return outside_of_code(markdown, lambda text: LINK.sub(change, text))

    def _leaving(self, text: str, page: str) -> Iterator[str]:
        found: list[str] = []
        outside_of_code(text, lambda part: found.extend(match[2] for match in LINK.finditer(part)) or part)
        for target in found:
            path = self._repository_path(target, page)
            if path is not None and not path.startswith("docs/"):
                yield path

    def _repository_path(self, target: str, page: str) -> str | None:
        """Where a page's link leads, from the top of the repository; None: to itself or another host."""
        if not target or re.match(r"[a-z]+:", target) or target.startswith("/"):
            return None
        origin = self.origins.get(page, f"docs/{page}")
        return posixpath.normpath(posixpath.join(posixpath.dirname(origin), target)).rstrip("/")

    def _page(self, path: str) -> tuple[str, str | bytes]:
        file = self.root / path
        if file.is_dir():
            listed = sorted(each.name for each in file.iterdir() if each.suffix in LANGUAGES and each.is_file())
            return f"source/{path}/contents.md", f"# {path}\n\n" + "\n".join(f"* `{name}`" for name in listed) + "\n"
        if file.suffix == ".md":
            return f"source/{path}", UNSEARCHED.format(title=path) + file.read_text()
        if file.suffix in LANGUAGES:
            text = file.read_text()
            fence = "`" * (2 + max([1, *(len(run) for run in re.findall(r"`{3,}", text))]))
            quoted = f'{fence} {{ .{LANGUAGES[file.suffix]} title="{path}" linenums="1" }}\n{text}\n{fence}\n'
            return f"source/{path}.md", f"{UNSEARCHED.format(title=path)}# {file.name}\n\n{quoted}"
        return f"source/{path}", file.read_bytes()


def outside_of_code(markdown: str, change: Callable[[str], str]) -> str:
    """``change`` applied to what is not in a fenced block."""
    parts, at = [], 0
    for found in FENCE.finditer(markdown):
        parts += [change(markdown[at : found.start()]), found[0]]
        at = found.end()
    return "".join([*parts, change(markdown[at:])])
