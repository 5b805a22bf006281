"""What MkDocs calls while it builds the site: pages made from the code, links out of docs/, formulas as MathML."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import command_page
import formulas
import inserts
import outside
import policy_pages
import python_pages
import recipe_page
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[2]
# what else stands at the top of the repository and has a page of its own
DOCUMENTS = {"README.md": "readme.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}


def on_startup(command: str, dirty: bool) -> None:
    """The wings under their installed name, for the reference: ``build/typing/crossmask/{kernels,engine}``."""
    folder = ROOT / "build/typing/crossmask"
    folder.mkdir(parents=True, exist_ok=True)
    for wing in ("kernels", "engine"):
        if not (folder / wing).exists():
            (folder / wing).symlink_to(Path("../../..") / wing)


def on_config(config: Any) -> Any:
    """A page for each policy below the overview that is in mkdocs.yml."""
    (masks,) = (part["Masks"] for part in config.nav if "Masks" in part)
    if len(masks) == 1:
        masks.extend({heading: [{name: uri} for name, uri in pages]} for heading, pages in policy_pages.navigation())
    return config


def on_files(files: Files, config: Any) -> Files:
    made = {**policy_pages.pages(), **python_pages.pages()}
    made["reference/recipe.md"] = recipe_page.page()
    made["reference/cli.md"] = command_page.page()
    for document, uri in DOCUMENTS.items():
        made[uri] = (ROOT / document).read_text()
    homes = DOCUMENTS | {module: uri for uri, module in policy_pages.modules().items()}
    links = outside.Links(ROOT, homes)
    written = {file.src_uri: Path(str(file.abs_src_path)).read_text() for file in files.documentation_pages()}
    for uri, content in {**made, **links.sources({**written, **made})}.items():
        files.append(File.generated(config, uri, content=content))
    config.extra["links"] = links
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    markdown = inserts.fill(markdown.replace("```python no-run\n", "```python\n"))
    markdown = markdown.replace("<details>", '<details markdown="1">')  # GitHub reads Markdown in it as it is
    return config.extra["links"].rewrite(markdown, page.file.src_uri)


def on_page_content(html: str, page: Any, config: Any, files: Files) -> str:
    return formulas.render(wrap_tables(html), page.file.src_uri)


def on_post_build(config: Any) -> None:
    config.extra.pop("links", None)


def wrap_tables(html: str) -> str:
    """A table wider than the page scrolls by itself instead of widening the page; short names in it stay whole."""
    html = re.sub(
        r"<td([^>]*)>((?:<span [^>]*></span>)?(?:<a [^>]*>)?)<code>([^<]{1,36})</code>",
        r'<td\1>\2<code class="short">\3</code>',
        html,
    )
    html = re.sub(r"<td.*?</td>", lambda cell: cell[0].replace("\\|", "|"), html, flags=re.DOTALL)  # GitHub wants \|
    return re.sub(r"(<table>.*?</table>)", r'<div class="wide">\1</div>', html, flags=re.DOTALL)
