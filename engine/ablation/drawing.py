"""An ablation's results as a picture: a panel for each metric, a line for each variant."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from .description import Ablation, MetricSection
from .results import Result, agreed, of_variant, summarise

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PANELS = 3  # in a row
LABEL, TITLE = 32, 36  # characters in a line of a variant's name and of a panel's title
LEGEND = {1: 6, 2: 2, 3: 1}  # lines of it, by panels in a row
VERDICTS = {0: "c1", 1: "c3", -1: "c2"}  # colours of rows, by agreed()


def picture(ablation: Ablation, results: Sequence[Result]) -> Figure:
    """A dot per seed, the mean a stroke, a band of one deviation about it, and dashed the mean of the row that it is
    compared with. Rows on whose side every seed agrees have a colour of their own."""
    from matplotlib.figure import Figure

    from ..evaluation.plots import COLOURS, style

    columns = min(PANELS, len(ablation.metrics))
    down = -(-len(ablation.metrics) // columns)
    names = _names(ablation, results)
    labels = 0.075 * max(len(line) for name in names for line in name.split("\n"))  # inches
    width = labels + 3.1 * columns
    titles = [textwrap.fill(metric.title, TITLE) for metric in ablation.metrics]
    title = textwrap.fill(ablation.title or ablation.name, int(8.5 * width))
    height = 0.5 + 0.22 * title.count("\n") + 0.2 * LEGEND[columns]
    height += down * (0.9 + 0.34 * len(names) + 0.17 * max(panel.count("\n") for panel in titles))
    with style():
        figure = Figure(figsize=(width, height), layout="constrained")
        figure.suptitle(title, x=0.01, ha="left", fontsize=12.5, fontweight="bold", color=COLOURS["ink"])
        engine = figure.get_layout_engine()
        assert engine is not None
        engine.set(h_pad=0.09)  # type: ignore[call-arg]
        seen = {_draw(_panel(figure, down, columns, i), ablation, m, results) for i, m in enumerate(ablation.metrics)}
        for i, (ax, metric) in enumerate(zip(figure.axes, ablation.metrics, strict=True)):
            ax.set_yticks(range(len(names)), names if i % columns == 0 else [""] * len(names), color=COLOURS["ink"])
            ax.set_ylim(len(names) - 0.5, -0.5)  # the first variant on top
            arrow = "better →" if metric.higher_is_better else "← better"
            ax.set_title(titles[i], loc="left", fontsize=9.5, fontweight="bold", color=COLOURS["ink"])
            ax.set_xlabel(arrow, loc="right" if metric.higher_is_better else "left", color=COLOURS["muted"])
        _legend(figure, frozenset().union(*seen))
    return figure


def _names(ablation: Ablation, results: Sequence[Result]) -> list[str]:
    """The variants' titles; of one that has fewer seeds than others, how many."""
    counts = [sum(r.variant == variant.name for r in results) for variant in ablation.variants]
    found = []
    for variant, count in zip(ablation.variants, counts, strict=True):
        few = f" ({count}\u00a0of\u00a0{max(counts)}\u00a0seeds)" if count < max(counts) else ""
        found.append(textwrap.fill(variant.heading + few, LABEL))
    return found


def _panel(figure: Figure, down: int, columns: int, i: int) -> Axes:
    from ..evaluation.plots import dress

    ax = figure.add_subplot(down, columns, i + 1)
    dress(ax)
    return ax


def _draw(ax: Axes, ablation: Ablation, metric: MetricSection, results: Sequence[Result]) -> frozenset[str]:
    """Draws one metric and says which parts of the legend it needs."""
    from matplotlib.ticker import MaxNLocator

    from ..evaluation.plots import COLOURS

    seen: set[str] = set()
    values = {variant.name: of_variant(results, variant, metric) for variant in ablation.variants}
    for first, last, name in _compared(ablation):
        if (found := summarise(list(values[name].values()))) is not None:
            ax.vlines(found.mean, first, last, color=COLOURS["muted"], lw=1.1, ls=(0, (3, 2)), zorder=1)
            seen.add("compared")
    for place, variant in enumerate(ablation.variants):
        by_seed = values[variant.name]
        found = summarise(list(by_seed.values()))
        if found is None:
            ax.text(
                0.5, place, "not measured", transform=ax.get_yaxis_transform(), ha="center", va="center", fontsize=8,
                color=COLOURS["muted"],
            )  # fmt: skip
            continue
        other = ablation.compared_with(variant)
        verdict = agreed(by_seed, values[other.name], metric.higher_is_better) if other else 0
        colour = COLOURS[VERDICTS[verdict]]
        seen.add(f"verdict {verdict}")
        if found.deviation is not None:
            left = found.mean - found.deviation
            ax.barh(place, 2 * found.deviation, 0.46, left, color=colour, alpha=0.16, lw=0)
            ax.vlines(found.mean, place - 0.3, place + 0.3, color=colour, lw=2)
            seen.add("spread")
        # seeds lie a little apart, in their order, so that equal values are seen as several
        heights = [place + 0.3 * ((n + 0.5) / len(by_seed) - 0.5) for n in range(len(by_seed))]
        ax.scatter(
            [by_seed[seed] for seed in sorted(by_seed)], heights, s=22, color=colour, edgecolors="white",
            linewidths=0.7, zorder=3,
        )  # fmt: skip
    ax.use_sticky_edges = False  # bars would end the axis where they begin
    ax.margins(x=0.12)
    ax.xaxis.set_major_locator(MaxNLocator(5))
    return frozenset(seen)


def _compared(ablation: Ablation) -> Iterator[tuple[float, float, str]]:
    """From where to where a line goes at the mean of which variant: along the rows that are compared with it, and from
    the middle of its own where that is next to them."""
    names = [variant.name for variant in ablation.variants]
    others = [other.name if (other := ablation.compared_with(v)) else None for v in ablation.variants]
    first = 0
    for place in range(1, len(others) + 1):
        if place < len(others) and others[place] == others[first]:
            continue
        name = others[first]
        if name is not None:
            own = names.index(name)
            yield own if own == first - 1 else first - 0.45, own if own == place else place - 0.55, name
        first = place


def _legend(figure: Figure, seen: frozenset[str]) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    from ..evaluation.plots import COLOURS

    mark: Mapping[str, object] = {"color": "none", "markerfacecolor": COLOURS["c1"], "markeredgecolor": "white"}
    parts: list[tuple[bool, Line2D | Patch]] = [
        ("spread" in seen, Line2D([], [], marker="o", ms=6, label="a seed", **mark)),  # type: ignore[arg-type]
        ("spread" in seen, Line2D([], [], marker="|", ms=12, mew=2, lw=0, color=COLOURS["c1"], label="mean")),
        ("spread" in seen, Patch(color=COLOURS["c1"], alpha=0.16, lw=0, label="± one standard deviation")),
        ("compared" in seen, Line2D([], [], color=COLOURS["muted"], lw=1.1, ls=(0, (3, 2)),
                                    label="mean of the row it is compared with")),
        ("verdict 1" in seen, Patch(color=COLOURS["c3"], label="better than that with every seed")),
        ("verdict -1" in seen, Patch(color=COLOURS["c2"], label="worse with every seed")),
    ]  # fmt: skip
    if shown := [part for needed, part in parts if needed]:
        figure.legend(
            handles=shown, loc="outside lower left", ncols=-(-len(parts) // LEGEND[min(PANELS, len(figure.axes))]),
            frameon=False, fontsize=8.5, labelcolor=COLOURS["muted"],
        )  # fmt: skip
