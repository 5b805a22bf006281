"""``masks.png``: held-out pairs beside their masks and their attention, for a README."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from .plots import COLOURS, DPI, heat, heat_scale

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PER_ROW = 2
INCH = 1.45  # side of one panel
CAPTION = 0.56  # height of a caption
HEAT = np.array([226, 59, 29], float)  # as --heat in the report's light theme


def mask_picture(run_dir: Path, gallery: Mapping[str, Any], limit: int = 8) -> Figure | None:
    """Picture, masked picture and attention of at most ``limit`` pairs, two pairs a row; ``None`` without a gallery."""
    pairs = [p for p in gallery.get("pairs", []) if (run_dir / p["image"]).is_file()]
    scenes, singles = ([p for p in pairs if (p.get("kind") == "scene") == scene] for scene in (True, False))
    half = max(limit - limit // 2, limit - len(singles))
    pairs = (scenes[:half] + singles)[:limit]
    if not pairs:
        return None
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    scale = heat_scale([pair["attention"] for pair in gallery["pairs"]])
    rows = -(-len(pairs) // PER_ROW)
    gap, wide = 0.06, 3 * INCH + 2 * 0.06
    width, height = PER_ROW * wide + (PER_ROW - 1) * 0.3 + 0.2, rows * (INCH + CAPTION) + 0.1
    figure = Figure(figsize=(width, height), dpi=DPI)  # words are measured in the pixels they are drawn in
    canvas = FigureCanvasAgg(figure)
    for i, pair in enumerate(pairs):
        left = 0.1 + (i % PER_ROW) * (wide + 0.3)
        bottom = height - 0.1 - (i // PER_ROW) * (INCH + CAPTION) - INCH
        for j, panel in enumerate(_panels(run_dir, pair, gallery["grid"], scale)):
            x = left + j * (INCH + gap)
            ax = figure.add_axes((x / width, bottom / height, INCH / width, INCH / height))
            ax.imshow(panel, interpolation="bilinear")
            ax.set(xticks=[], yticks=[])
            for spine in ax.spines.values():
                spine.set_color(COLOURS["line"])
        _caption(figure, canvas, pair["words"], left, bottom - 0.08, wide)
    return figure


def _panels(run_dir: Path, pair: Mapping[str, Any], grid: tuple[int, int], scale: float) -> list[Any]:
    """Three (S, S, 3) uint8 pictures: as it is, with hidden patches grey, with the attention over it."""
    with Image.open(run_dir / pair["image"]) as image:
        side = max(256 // max(grid), 1) * max(grid)
        pixels = np.asarray(image.convert("RGB").resize((side, side), Image.Resampling.BICUBIC))

    def spread(values: Any) -> Any:
        cells = np.asarray(values, float).reshape(grid)
        return cells.repeat(side // grid[0], 0).repeat(side // grid[1], 1)[..., None]

    hidden = np.zeros(grid[0] * grid[1])
    hidden[pair["masked_patches"]] = 1.0
    warm = spread(heat(pair["attention"], scale)) * 0.85
    pale = pixels * 0.45 + 255 * 0.55
    masked = np.where(spread(hidden) > 0, 152, pixels)
    return [pixels, masked.astype(np.uint8), (pale * (1 - warm) + HEAT * warm).astype(np.uint8)]


def _caption(figure: Any, canvas: Any, words: list[Mapping[str, Any]], left: float, top: float, wide: float) -> None:
    """Words from left to right, masked ones on a dark ground, broken into lines of ``wide`` inches; at most three."""
    renderer = canvas.get_renderer()
    width, height = figure.get_size_inches()
    x, y, lines = left, top, 1
    for word in words:
        box = (
            {"boxstyle": "round,pad=0.15", "fc": COLOURS["ink"], "ec": "none"}
            if word["masked"]
            else {"boxstyle": "round,pad=0.15", "fc": "none", "ec": "none"}
        )
        text = figure.text(
            x / width, y / height, word["text"], va="top", fontsize=7.5, bbox=box,
            color="white" if word["masked"] else COLOURS["ink"],
        )  # fmt: skip
        extent = text.get_window_extent(renderer).width / figure.dpi
        if x + extent > left + wide and x > left:
            x, y, lines = left, y - 0.17, lines + 1
            if lines > 3:
                text.remove()
                return
            text.set_position((x / width, y / height))
        x += extent + 0.075
