"""What is between two marks in a page: on GitHub the words that stand there, on the site what the code gives.

<!-- site: cost topk_mask -->
Every row is in [performance.md](../performance.md).
<!-- end -->
"""

from __future__ import annotations

import re
from collections.abc import Callable

import costs
import rooms
from mkdocs.exceptions import PluginError

MARKED = re.compile(r"^<!-- site: (\w+)((?: [\w.]+)*) -->\n(.*?)^<!-- end -->$", re.MULTILINE | re.DOTALL)
KINDS: dict[str, Callable[..., str]] = {
    "rooms": rooms.picture,
    "cost": costs.cost,
    "kernels": costs.overview,
}


def fill(markdown: str) -> str:
    def make(found: re.Match[str]) -> str:
        if found[1] not in KINDS:
            raise PluginError(f"<!-- site: {found[1]} -->: there is no such part; known: {', '.join(KINDS)}")
        return KINDS[found[1]](*found[2].split())

    return MARKED.sub(make, markdown)
