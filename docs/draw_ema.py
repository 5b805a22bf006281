"""Draws docs/images/ema.png from what ``benchmarks/bench_ema.py --json FILE`` has written.

python docs/draw_ema.py FILE
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

PICTURE = Path(__file__).parent / "images/ema.png"
OURS, OTHERS, LIMIT = "#54a24b", "#9aa5b1", "#dddddd"
PANELS = {
    "large, fp32": "fp32 from fp32",
    "large, copy": "fp32 from fp32, with a bf16 copy",
    "large, bf16": "fp32 from bf16",
    "large, low": "bf16 from bf16",
}


def main() -> int:
    measured = json.loads(Path(sys.argv[1]).read_text())
    panels = {key: measured["results"][key] for key in PANELS}
    heights = [len(rows) for rows in panels.values()]
    figure, grid = plt.subplots(
        len(panels), 1, figsize=(8.6, 0.34 * sum(heights) + 2.2), height_ratios=heights, dpi=110
    )
    for axes, (key, rows) in zip(grid, panels.items(), strict=True):
        shown: list[dict[str, Any]] = sorted(rows, key=lambda row: row["row / ours"])
        for place, row in enumerate(shown):
            ours, limit = row["row"].startswith("ema_update_"), "limit" in row["row"]
            value = row["row / ours"]
            low, high = row["row / ours, quartiles"]
            width = min(value, 4.0)
            axes.barh(place, width, color=OURS if ours else LIMIT if limit else OTHERS)
            if value <= 4.0:
                axes.plot([low, min(high, 4.0)], [place, place], color="#333333", linewidth=1.2)
            beside = max(width, min(high, 4.0))
            axes.text(beside + 0.06, place, f"{value:.2f}" + (" →" if value > 4.0 else ""), va="center", fontsize=8.5)
        axes.set_yticks(range(len(shown)), [row["row"] for row in shown], fontsize=9)
        axes.invert_yaxis()
        axes.set_xlim(0, 4.5)
        axes.set_title(PANELS[key], loc="left", fontsize=10.5, weight="bold")
        axes.spines[["top", "right"]].set_visible(False)
        axes.axvline(1.0, color=OURS, linewidth=0.8, linestyle=":")
    grid[-1].set_xlabel(f"time, ema_update_ = 1 (median of ratios, quartiles)\n{measured['machine']}", fontsize=9)
    figure.suptitle("203 M parameters in 288 tensors", fontsize=12)
    figure.tight_layout()
    figure.savefig(PICTURE)
    print(PICTURE)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
