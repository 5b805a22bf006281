"""Draws docs/images/kernels/*.svg: what each kernel does, on a small example that the kernel itself has computed.

    python docs/draw_kernels.py

Middle tones on a transparent ground, so that one picture serves light and dark pages.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import torch

from crossmask.kernels import cross_attention, ema_update_, max_similarity, semi_hard_order, topk_mask

mpl.use("svg")
import matplotlib.pyplot as plt

PICTURES = Path(__file__).parent / "images/kernels"
GREY, BLUE, ORANGE, GREEN = "#808a96", "#4f8fc0", "#e0803c", "#5aa572"
WORDS = ["a", "red", "dog", "on", "the", "beach"]
STYLE = {"svg.fonttype": "path", "svg.hashsalt": "crossmask", "font.family": "DejaVu Sans", "font.size": 9.5}
STYLE |= {"text.color": GREY, "axes.labelcolor": GREY, "xtick.color": GREY, "ytick.color": GREY, "axes.edgecolor": GREY}
STYLE |= {"savefig.transparent": True, "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 10}


def shades(colour: str) -> Any:
    """From nothing to a colour: what is 0 shows the page."""
    red, green, blue = mpl.colors.to_rgb(colour)
    return mpl.colors.LinearSegmentedColormap.from_list("", [(red, green, blue, 0.04), (red, green, blue, 1)])


def bare(axes: Any, *, frame: bool = False) -> Any:
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(frame)
    return axes


def draw_cross_attention() -> Any:
    """The weights nobody writes down, and their sums along both axes that the kernel gives."""
    generator = torch.Generator().manual_seed(3)
    q = torch.randn(1, 1, len(WORDS), 16, generator=generator)
    k = torch.randn(1, 1, 14, 16, generator=generator)
    k[0, 0, 5:8] += 1.1 * q[0, 0, 2]
    k[0, 0, 10:12] += 0.9 * q[0, 0, 5]
    q[0, 0, [0, 3, 4]] *= 0.25
    told = cross_attention(q, k, k, statistics=("key_attention", "query_attention", "entropy")).statistics
    weights = ((q[0, 0] @ k[0, 0].T) / 4).softmax(-1)
    figure = plt.figure(figsize=(7.6, 3.4))
    grid = figure.add_gridspec(2, 3, width_ratios=(14, 2.6, 2.6), height_ratios=(1.7, 6), wspace=0.09, hspace=0.1)
    matrix = bare(figure.add_subplot(grid[1, 0]), frame=True)
    matrix.imshow(weights, cmap=shades(GREY), aspect="auto", vmin=0)
    matrix.set_yticks(range(len(WORDS)), WORDS)
    matrix.tick_params(length=0)
    matrix.set_xlabel("patches (the weights are never in memory)", labelpad=6)
    above = bare(figure.add_subplot(grid[0, 0]))
    above.bar(range(14), told.key_attention[0], color=BLUE)
    above.set_xlim(-0.5, 13.5)
    above.set_title("key_attention: how much each patch is looked at", color=BLUE, loc="left")
    for column, (name, values, colour) in enumerate(
        (("query_\nattention", told.query_attention[0], ORANGE), ("entropy", told.entropy[0, 0], GREEN)), 1
    ):
        beside = bare(figure.add_subplot(grid[1, column]))
        beside.barh(range(len(WORDS)), values, color=colour, height=0.7)
        beside.set_ylim(5.5, -0.5)
        beside.set_title(name, color=colour, loc="left")
    return figure


def draw_topk_mask() -> Any:
    """Two rows of scores of which one has fewer valid positions; what is marked."""
    generator = torch.Generator().manual_seed(11)
    scores = torch.rand(2, 24, generator=generator)
    valid = torch.arange(24) < torch.tensor([[24], [15]])
    mask = topk_mask(scores, ratio=0.3, valid=valid)
    figure, rows = plt.subplots(2, 1, figsize=(7.6, 2.9), sharex=True)
    for row, (axes, length) in enumerate(zip(rows, (24, 15), strict=True)):
        bare(axes)
        colours = [ORANGE if hidden else GREY for hidden in mask[row]]
        axes.bar(range(24), scores[row].where(valid[row], 0.0), color=colours, width=0.72)
        bound = scores[row][mask[row]].min()
        axes.axhline(bound, color=ORANGE, lw=1, ls=(0, (4, 3)), xmax=(length + 0.3) / 24.6)
        axes.set_xlim(-0.6, 24)
        axes.set_ylim(0, 1.12)
        axes.set_title(f"{length} valid, ratio 0.3: {int(mask[row].sum())} marked", loc="left")
    rows[1].text(19.5, 0.12, "not valid", ha="center", style="italic")
    figure.tight_layout()
    return figure


def draw_max_similarity() -> Any:
    """Similarities of patches and words; the largest of each patch is what remains."""
    generator = torch.Generator().manual_seed(5)
    words = torch.nn.functional.normalize(torch.randn(1, len(WORDS), 12, generator=generator), dim=2)
    patches = torch.randn(1, 14, 12, generator=generator) * 0.35
    for patch, word in ((2, 2), (3, 2), (4, 2), (8, 5), (9, 5), (10, 1)):
        patches[0, patch] += words[0, word]
    patches = torch.nn.functional.normalize(patches, dim=2)
    found = max_similarity(patches, words, return_argmax=True)
    figure, (matrix, below) = plt.subplots(2, 1, figsize=(7.6, 3.4), height_ratios=(6, 2.2), sharex=True)
    bare(matrix, frame=True).imshow((patches[0] @ words[0].T).T.clamp(min=0), cmap=shades(GREY), aspect="auto")
    matrix.set_yticks(range(len(WORDS)), WORDS)
    matrix.tick_params(length=0)
    for patch, word in enumerate(found.argmax[0].tolist()):
        matrix.add_patch(plt.Rectangle((patch - 0.5, word - 0.5), 1, 1, fill=False, ec=BLUE, lw=2))
    matrix.set_title("⟨patch, word⟩; the largest of each patch", loc="left")
    bare(below).bar(range(14), found.score[0].clamp(min=0), color=BLUE)
    below.set_title("score of each patch", color=BLUE, loc="left")
    below.set_xlim(-0.5, 13.5)
    figure.tight_layout()
    return figure


def sweep(parts: list[tuple[int, str, str]], rows: str, sums: str) -> Any:
    """Blocks of columns one after the other under a block of rows, and the running sums that stay."""
    figure, axes = plt.subplots(figsize=(7.6, 2.6))
    bare(axes)
    axes.add_patch(plt.Rectangle((-3.4, 0), 2.4, 1, color=BLUE, lw=0))
    axes.text(-2.2, 1.25, rows, ha="center", color=BLUE)
    left, number = 0.0, 0
    for count, text, colour in parts:
        for _ in range(count):
            axes.add_patch(plt.Rectangle((left, 0), 0.92, 1, color=colour, lw=0, alpha=1 if number == 3 else 0.35))
            if number == 3:
                centre = left + 0.46
            left, number = left + 1, number + 1
        axes.text(left - count / 2, 1.25, text, ha="center", color=colour)
        left += 0.35
    axes.annotate("", (centre + 3.2, 0.5), (centre + 0.55, 0.5), arrowprops={"arrowstyle": "-|>", "color": GREY})
    axes.annotate("", (centre, -0.95), (centre, -0.05), arrowprops={"arrowstyle": "-|>", "color": GREY})
    axes.text(centre, -1.35, sums, ha="center", va="center", color=GREEN)
    axes.set_xlim(-3.6, left + 0.2)
    axes.set_ylim(-1.8, 1.9)
    figure.tight_layout()
    return figure


def draw_soft_contrastive() -> Any:
    sums = (
        r"of each row stay: max and $\Sigma e^z$,  max and $\Sigma e^{z'}$,  $\Sigma e^{z'} z$,  $\Sigma$ matches' $z$"
    )
    return sweep([(3, "in-batch keys", ORANGE), (9, "queue, read where it lies", GREY)], "queries", sums)


def draw_soft_cross_entropy() -> Any:
    sums = (
        r"of each row stay: max and $\Sigma e^z$,  max and $\Sigma e^{z'}$,  $\Sigma e^{z'} z$,  $z_{\mathrm{label}}$"
    )
    return sweep([(12, "vocabulary, a block of words at a time", ORANGE)], "hidden rows", sums)


def draw_semi_hard_order() -> Any:
    """The walk: points are pairs in a plane, lines the order in which they are taken."""
    generator = torch.Generator().manual_seed(2)
    centres = torch.randn(4, 2, generator=generator) * 2.2
    points = (centres[:, None] + 0.42 * torch.randn(4, 6, 2, generator=generator)).reshape(-1, 2)
    towards = torch.cat([points, -0.5 * points.square().sum(1, keepdim=True)], 1)
    near = torch.cat([points, torch.ones(24, 1)], 1)
    order = semi_hard_order(near, towards, similar=1)
    shuffled = torch.randperm(24, generator=generator)
    figure, both = plt.subplots(1, 2, figsize=(7.6, 3.1))
    for axes, walk, title in ((both[0], shuffled, "shuffled"), (both[1], order, "ordered: batches of six are alike")):
        bare(axes).set_title(title, loc="left")
        for batch, colour in enumerate((BLUE, ORANGE, GREEN, GREY)):
            chosen = points[walk[6 * batch : 6 * batch + 6]]
            axes.plot(*chosen.T, color=colour, lw=1.1, alpha=0.7)
            axes.scatter(*chosen.T, color=colour, s=26, zorder=3)
    figure.tight_layout()
    return figure


def draw_linear() -> Any:
    """What ``linear`` is: the same product, and which library multiplies it."""
    figure, axes = plt.subplots(figsize=(7.6, 1.9))
    bare(axes)

    def box(x: float, y: float, text: str, colour: str) -> None:
        style = {"boxstyle": "round,pad=0.5", "fc": "none", "ec": colour, "lw": 1.4}
        axes.text(x, y, text, ha="center", va="center", color=colour, bbox=style)

    box(0.11, 0.5, "x Wᵀ + b", BLUE)
    box(0.48, 0.5, "float32, x86 of AMD's with AVX-512,\nnot small, not compiled?", GREY)
    box(0.87, 0.84, "oneDNN: 512-bit", ORANGE)
    box(0.87, 0.16, "PyTorch's own call", GREY)
    for start, end, text in (
        ((0.18, 0.5), (0.27, 0.5), ""),
        ((0.7, 0.6), (0.775, 0.8), "yes"),
        ((0.7, 0.4), (0.77, 0.2), "no"),
    ):
        axes.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": GREY})
        axes.text((start[0] + end[0]) / 2 - 0.01, (start[1] + end[1]) / 2 + 0.09, text, ha="right")
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    return figure


def draw_ema_update() -> Any:
    """A weight under noisy steps, and its average; and the same average kept in bfloat16, rounded to nearest."""
    steps, decay = 1500, 0.999
    noise = np.random.default_rng(0).normal(0, 0.2, steps)
    student = 2 + np.linspace(0, 1, steps) ** 0.6 * 0.5 + noise
    kept: dict[str, list[float]] = {"float32": [], "bfloat16, nearest": [], "bfloat16, stochastic": []}
    for name, values in kept.items():
        teacher = torch.full((64,), 2.0, dtype=torch.float32 if name == "float32" else torch.bfloat16)
        for step, value in enumerate(student):
            rounding = {"rounding": "stochastic", "seed": step} if "stochastic" in name else {}
            ema_update_([teacher], [torch.full((64,), float(value))], decay, **rounding)  # type: ignore[arg-type]
            values.append(teacher.float().mean().item())
    figure, axes = plt.subplots(figsize=(7.6, 2.9))
    axes.plot(student, color=GREY, lw=0.5, alpha=0.5, label="student's weight")
    for (name, values), colour, line in zip(kept.items(), (BLUE, ORANGE, GREEN), ("-", "-", "--"), strict=True):
        axes.plot(values, color=colour, lw=1.9, ls=line, label=f"its average in {name}")
    axes.legend(frameon=False, fontsize=8.5, labelcolor=GREY, ncols=2, loc="upper left")
    axes.set_xlabel("updates, decay 0.999")
    axes.set_ylim(1.3, 3.7)
    figure.tight_layout()
    return figure


PARTS: dict[str, Callable[[], Any]] = {
    name.removeprefix("draw_"): draw for name, draw in list(globals().items()) if name.startswith("draw_")
}


def main() -> int:
    PICTURES.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context(STYLE):
        for name, draw in PARTS.items():
            draw().savefig(PICTURES / f"{name}.svg", bbox_inches="tight", metadata={"Date": None})
            plt.close("all")
            print(PICTURES / f"{name}.svg")
    return 0


if __name__ == "__main__":
    sys.exit(main())
