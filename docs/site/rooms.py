"""The house as a picture: each room (package or module of the wings) in its layer, and what imports what.

Layers are those that ``tests/test_structure.py`` holds; arrows are the imports that the code has.
"""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
WIDTH, BOX, GAP, ROW = 1000, 34, 14, 104
ABOUT = {
    "kernels": "tensors in, tensors out",
    "masking": "what to hide",
    "teacher": "moving averages",
    "models": "encoders, decoders",
    "data": "pairs, words, batches",
    "objectives": "losses of views",
    "evaluation": "figures, report.html",
    "training": "the loop, checkpoints",
    "recipe": "every field, typed",
}


def held() -> tuple[tuple[frozenset[str], ...], dict[str, str]]:
    """LAYERS, lowest first, and SAME_ROOM of the test."""
    found = {}
    for node in ast.parse((ROOT / "tests/test_structure.py").read_text()).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            name = node.targets[0].id
            if name in ("LAYERS", "SAME_ROOM"):
                found[name] = ast.literal_eval(node.value)
    return tuple(map(frozenset, found["LAYERS"])), found["SAME_ROOM"]


def room_of(parts: tuple[str, ...], same: dict[str, str]) -> str | None:
    if len(parts) < 2 or parts[0] != "crossmask":
        return None
    name = parts[1] if parts[1] != "engine" else (parts[2] if len(parts) > 2 else None)
    return same.get(name, name) if name else None


def imports(module: Path) -> Iterator[tuple[str, ...]]:
    package = ("crossmask", *module.parent.relative_to(ROOT).parts)
    for node in ast.walk(ast.parse(module.read_text())):
        if isinstance(node, ast.Import):
            yield from (tuple(alias.name.split(".")) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else ()
            name = (*start, *(node.module.split(".") if node.module else ()))
            yield from ((*name, alias.name) for alias in node.names)


def house() -> tuple[dict[str, int], set[tuple[str, str]]]:
    """Lines of code of each room, and which imports which."""
    layers, same = held()
    known = frozenset().union(*layers)
    lines: Counter[str] = Counter()
    edges: set[tuple[str, str]] = set()
    for wing in ("kernels", "engine"):
        for module in sorted((ROOT / wing).rglob("*.py")):
            parts = ("crossmask", *module.relative_to(ROOT).with_suffix("").parts)
            here = room_of(parts, same)
            if here not in known or parts == ("crossmask", "engine", "__init__"):
                continue
            lines[here] += len(module.read_text().splitlines())
            edges |= {(here, there) for name in imports(module) if (there := room_of(name, same)) in known - {here}}
    return dict(lines), edges


def picture() -> str:
    """SVG that takes the page's colours. An arrow from a room to one that it imports in a lower layer or its own."""
    layers, _ = held()
    lines, edges = house()
    place: dict[str, tuple[float, float, float]] = {}
    for height, layer in enumerate(layers):
        rooms = sorted((room for room in layer if room in lines), key=lambda room: -lines[room])
        space = min(220.0, (WIDTH - GAP) / len(rooms) - GAP)
        left = (WIDTH - len(rooms) * (space + GAP) + GAP) / 2
        for index, room in enumerate(rooms):
            place[room] = (left + index * (space + GAP), 20 + (len(layers) - 1 - height) * ROW, space)
    rank = {room: number for number, layer in enumerate(layers) for room in layer}
    total = 20 + len(layers) * ROW - 30
    svg = [f'<svg class="rooms" viewBox="0 0 {WIDTH} {total}" role="img" aria-label="Rooms and their imports">']
    svg += ['<defs><marker id="tip" viewBox="0 0 6 6" refX="5" refY="3" markerWidth="5" markerHeight="5"']
    svg += [' orient="auto"><path d="M0 0 6 3 0 6z" class="tip"/></marker></defs>']
    for above, below in sorted(edges):
        x, y, w = place[above]
        u, v, z = place[below]
        start, end = x + w / 2, u + z / 2
        if rank[above] == rank[below]:  # neighbours: an arc under the boxes
            path = f"M{start:.0f} {y + BOX + 12:.0f}C{start:.0f} {y + 74:.0f} {end:.0f} {y + 74:.0f}"
            path += f" {end:.0f} {v + BOX + 16:.0f}"
        else:
            path = (
                f"M{start:.0f} {y + BOX + 12:.0f}C{start:.0f} {y + 85:.0f} {end:.0f} {v - 45:.0f} {end:.0f} {v - 2:.0f}"
            )
        far = " far" if rank[above] - rank[below] > 1 else ""
        svg += [
            f'<path class="import{far}" d="{path}" marker-end="url(#tip)"><title>{above} imports {below}</title></path>'
        ]
    for room, (x, y, w) in place.items():
        told = ABOUT.get(room) if w > 120 else None
        svg += [f"<g><title>{room}: {lines[room]:,} lines</title>"]
        svg += [f'<rect x="{x:.0f}" y="{y}" width="{w:.0f}" height="{BOX + 12}" rx="6"/>']
        size = min(15.0, (w - 10) / (0.62 * len(room)))
        svg += [f'<text x="{x + w / 2:.0f}" y="{y + (20 if told else 28)}" font-size="{size:.1f}">{room}</text>']
        if told:
            svg += [f'<text x="{x + w / 2:.0f}" y="{y + 37}" class="about">{told}</text>']
        svg += ["</g>"]
    return "".join([*svg, "</svg>"])
