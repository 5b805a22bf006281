"""Draws docs/images/teacher.png: what each of two ranks keeps of one parameter under every ZeRO stage.

python docs/draw_teacher.py
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

PICTURE = Path(__file__).parent / "images/teacher.png"
COLOURS = {"student": "#4c78a8", "masters": "#f58518", "shadow": "#54a24b", "teacher": "#9467bd"}
ROWS = ("student", "masters", "shadow", "teacher")
LABELS = {
    "student": "student's weights",
    "masters": "fp32 masters, Adam",
    "shadow": "fp32 shadow (EMA)",
    "teacher": "teacher's weights",
}
# which quarters of a parameter a rank holds always ("x"), and which only while it computes ("o")
STAGES: list[tuple[str, dict[str, tuple[str, str]], str]] = [
    ("stage 0", dict.fromkeys(ROWS, ("xxxx", "xxxx")), "no communication at all"),
    (
        "stages 1 and 2",
        {
            "student": ("xxxx", "xxxx"),
            "masters": ("xx..", "..xx"),
            "shadow": ("xx..", "..xx"),
            "teacher": ("xxxx", "xxxx"),
        },
        "one all-gather after an update,\noverlapping what follows",
    ),
    (
        "stage 3",
        {
            "student": ("xxoo", "ooxx"),
            "masters": ("xx..", "..xx"),
            "shadow": ("xx..", "..xx"),
            "teacher": ("oooo", "oooo"),
        },
        "one all-gather when the teacher\nlooks, freed afterwards",
    ),
]
CELL, HEIGHT, STEP = 0.42, 0.34, 0.62


def bar(axes: Any, x: float, y: float, held: str, colour: str) -> None:
    for i, kind in enumerate(held):
        style: dict[str, Any] = {"facecolor": colour, "edgecolor": "white"}
        if kind != "x":
            style = {"facecolor": "white", "edgecolor": "#cccccc"}
        if kind == "o":
            style |= {"edgecolor": colour, "hatch": "////", "alpha": 0.55}
        axes.add_patch(Rectangle((x + i * CELL, y), CELL, HEIGHT, linewidth=1, **style))


def main() -> int:
    figure, axes = plt.subplots(figsize=(10.4, 4.6), dpi=110)
    width = 4 * CELL
    for stage, (title, held, gather) in enumerate(STAGES):
        left = 2.0 + stage * 4.5
        axes.text(left + width + 0.25, 0.85, title, ha="center", fontsize=13, weight="bold")
        for rank in (0, 1):
            x = left + rank * (width + 0.5)
            axes.add_patch(
                FancyBboxPatch(
                    (x - 0.1, -2.1), width + 0.2, 2.62, boxstyle="round,pad=0.04", fc="#f6f6f6", ec="#dddddd"
                )
            )
            axes.text(x + width / 2, 0.6, f"rank {rank}", ha="center", va="bottom", fontsize=9, color="#666666")
            for row, name in enumerate(ROWS):
                bar(axes, x, -row * STEP, held[name][rank], COLOURS[name])
            axes.add_patch(
                FancyArrowPatch(
                    (x + width / 2, -STEP - 0.01),
                    (x + width / 2, -2 * STEP + HEIGHT + 0.01),
                    arrowstyle="-|>",
                    mutation_scale=11,
                    color="#333333",
                )
            )
        axes.text(left + width + 0.25, -2.4, gather, ha="center", va="top", fontsize=9.5, color=COLOURS["teacher"])
    for row, name in enumerate(ROWS):
        axes.text(1.7, -row * STEP + HEIGHT / 2, LABELS[name], ha="right", va="center", fontsize=10.5)
    axes.text(1.7, -1.5 * STEP + HEIGHT / 2, "ema_update_: local", ha="right", va="center", fontsize=9, style="italic")
    axes.text(
        2.0,
        -3.2,
        "filled: kept   hatched: only while it computes   empty: on the other rank",
        fontsize=9,
        color="#666666",
    )
    axes.set_xlim(-0.9, 15.3)
    axes.set_ylim(-3.3, 1.2)
    axes.axis("off")
    figure.savefig(PICTURE, bbox_inches="tight", pad_inches=0.08)
    print(PICTURE)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
