"""The report's charts, drawn once and used twice: inline SVG that follows the page's colours, and PNG for a README."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from .orders import SCORES
from .recognition_rows import recognised
from .run_folder import Record, series

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Role -> colour on a light page. An SVG gets var(--role) in their place, so that a dark page can choose its own.
COLOURS = {
    "ink": "#1c2430", "muted": "#667085", "line": "#e2e6ec", "random": "#98a2b3",
    "c1": "#2563eb", "c2": "#e2711d", "c3": "#0f9d77", "c4": "#8b4fd9", "c5": "#d6336c",
}  # fmt: skip
DPI = 150  # of PNG
SMALL, WIDE = (3.7, 2.15), (10.6, 3.3)  # inches: three to a row of the report, and all of it
LOSS_TITLES = {
    "loss": "Total", "itc": "ITC: image–text contrast", "itm": "ITM: image–text matching",
    "mlm": "MLM: masked words", "mim": "MIM: masked patches",
    "caption": "Captions: next words", "tg_mim": "TG-MIM: patches from words",
    "composed": "Text-guided retrieval", "recognition": "Recognition: classes",
}  # fmt: skip


@dataclass(frozen=True)
class Line:
    field: str
    label: str
    colour: str
    dashed: bool = False


@dataclass(frozen=True)
class Chart:
    """One measure through training, with what it is compared with, and what a reader should look for."""

    title: str
    hint: str
    lines: tuple[Line, ...]
    percent: bool = False


SELECTIVITY = (
    Chart(
        "Attention entropy",
        "share of its maximum; lower is more selective",
        (Line("attention_entropy", "scenes", "c1"), Line("singles_attention_entropy", "single drawings", "c4")),
    ),
    Chart(
        "ITM loss on held-out pairs",
        "nats; below the dashed prior means it learned",
        (
            Line("itm_loss", "single drawings", "c4"),
            Line("scenes_itm_loss", "scenes", "c1"),
            Line("itm_prior", "prior 1:2", "random", dashed=True),
        ),
    ),
    Chart(
        "Masked patches on a drawing",
        "scenes; as many patches hidden at random: dashed",
        (Line("on_drawing", "teacher's masks", "c1"), Line("on_drawing_random", "random masks", "random", dashed=True)),
        percent=True,
    ),
    Chart(
        "Masked patches on a named thing",
        "things both drawn and named",
        (
            Line("on_named", "teacher's masks", "c1"),
            Line("b_on_named", "(b)", "c3"),
            Line("c_on_named", "(c)", "c2"),
            Line("on_named_random", "random masks", "random", dashed=True),
        ),
        percent=True,
    ),
    Chart(
        "Masked words whose thing is visible",
        "some named things are not drawn",
        (
            Line("word_visible", "teacher's masks", "c1"),
            Line("word_visible_random", "random masks", "random", dashed=True),
        ),
        percent=True,
    ),
    Chart(
        "Pointing",
        "a word's strongest patch lies on its thing",
        (
            Line("pointing", "teacher", "c1"),
            Line("b_pointing", "(b)", "c3"),
            Line("c_pointing", "(c)", "c2"),
            Line("pointing_random", "random patch", "random", dashed=True),
        ),
        percent=True,
    ),
)  # fmt: skip


def heat_scale(attention: Sequence[Sequence[float]]) -> float:
    """The weight, in multiples of a uniform one, that heat maps show in full colour: the strongest of these pairs, but
    at least 3, so that nearly uniform attention also looks it."""
    return max(3.0, max((max(a) * len(a) for a in attention), default=0.0))


def heat(attention: Sequence[float], scale: float) -> list[float]:
    """Colour strength of each patch, 0 (uniform weight or less) to 1 (``scale`` times uniform)."""
    return [min(max((a * len(attention) - 1) / (scale - 1), 0.0), 1.0) for a in attention]


def smooth(values: Sequence[float], share: float = 0.03) -> list[float]:
    """Exponential mean over about ``share`` of the run, corrected for its start."""
    decay = 1 - 1 / max(1.0, share * len(values))
    mean, weight, found = 0.0, 0.0, []
    for value in values:
        mean, weight = decay * mean + (1 - decay) * value, decay * weight + (1 - decay)
        found.append(mean / weight)
    return found


def probe_chart(chart: Chart, probes: Sequence[Record]) -> Figure | None:
    """One of :data:`SELECTIVITY` as a figure of one axes; ``None`` where its main line has no values."""
    return _figure(partial(_draw_probe, chart=chart, probes=probes), *SMALL) if _has(chart, probes) else None


def loss_chart(name: str, train: Sequence[Record]) -> Figure | None:
    """One loss term: raw values faint, smoothed on top."""
    if not series(train, name)[0]:
        return None
    return _figure(lambda ax: _draw_loss(ax, name, train), *SMALL)


def rate_chart(train: Sequence[Record]) -> Figure | None:
    if not series(train, "lr")[0]:
        return None

    def draw(ax: Axes) -> None:
        steps, rates = series(train, "lr")
        ax.plot(steps, rates, color=COLOURS["c3"], lw=1.8)
        ax.set_ylim(0)
        ax.ticklabel_format(axis="y", style="sci", scilimits=(-2, 2))

    return _figure(draw, *SMALL)


def retrieval_chart(splits: Mapping[str, Any], cut: str = "r1", sampled: bool = False) -> Figure | None:
    """Bars per split and direction: features alone, after re-ranking, and chance as a dark line across the group.

    ``sampled``: of the sampled galleries, with their spread as whiskers; ``None`` where no split has any.
    """
    found = {name: split["sampled"] if sampled else split for name, split in splits.items()
             if not sampled or split.get("sampled")}  # fmt: skip
    return _figure(lambda ax: _draw_retrieval(ax, found, cut), *WIDE, grid_axis="y") if found else None


def recognition_chart(found: Mapping[str, Any]) -> Figure | None:
    """Accuracy per level and split: a bar per feature, the majority class as a dark line across the group. ``found`` is
    ``recognition`` of ``evaluation.json``; ``None`` where it is empty."""
    return _figure(lambda ax: _draw_recognition(ax, found), *WIDE, grid_axis="y") if found else None


def overview(train: Sequence[Record], probes: Sequence[Record]) -> Figure | None:
    """All curves on one sheet, for a README."""
    losses = [
        (title, partial(_draw_loss, name=n, train=train)) for n, title in LOSS_TITLES.items() if series(train, n)[0]
    ]
    plots: list[tuple[str, Callable[[Axes], None]]] = [
        *losses,
        *((c.title, partial(_draw_probe, chart=c, probes=probes)) for c in SELECTIVITY if _has(c, probes)),
    ]
    if not plots:
        return None
    from matplotlib.figure import Figure

    rows = -(-len(plots) // 3)
    with style():
        figure = Figure(figsize=(11, 2.5 * rows), layout="constrained")
        engine = figure.get_layout_engine()
        assert engine is not None
        engine.set(h_pad=0.12, w_pad=0.12)  # type: ignore[call-arg]
        for i, (title, draw) in enumerate(plots):
            ax = figure.add_subplot(rows, 3, i + 1)
            dress(ax)
            draw(ax)
            ax.set_title(title, loc="left", fontsize=10, fontweight="bold", color=COLOURS["ink"])
    return figure


def to_svg(figure: Figure, salt: str) -> str:
    """Inline SVG that fills its container and takes its colours from CSS variables. ``salt`` keeps ids apart."""
    buffer = io.StringIO()
    with style(**{"svg.hashsalt": salt}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'\bid="(figure|axes|patch|line2d|text|matplotlib|xtick|ytick|legend|Poly|Line)[^"]*"', "", svg)
    for role, colour in COLOURS.items():
        svg = svg.replace(colour, f"var(--{role})")
    return re.sub(r"font: ([\d.]+)px '[^;\"]*", r"font: \1px var(--sans)", svg)


def to_png(figure: Figure, dpi: int = DPI) -> bytes:
    buffer = io.BytesIO()
    with style():
        figure.savefig(buffer, format="png", dpi=dpi, facecolor="white", metadata={"Software": None})
    return buffer.getvalue()


def _has(chart: Chart, probes: Sequence[Record]) -> bool:
    return any(series(probes, line.field)[0] for line in chart.lines if not line.dashed)


def _draw_probe(ax: Axes, chart: Chart, probes: Sequence[Record]) -> None:
    scale = 100.0 if chart.percent else 1.0
    for line in chart.lines:
        steps, values = series(probes, line.field)
        if not steps:
            continue
        style = {"ls": (0, (4, 3)), "lw": 1.5} if line.dashed else {"lw": 2.0, "marker": "o", "ms": 3.2}
        ax.plot(steps, [scale * v for v in values], color=COLOURS[line.colour], label=line.label, **style)  # type: ignore[arg-type]
    low, high = ax.get_ylim()
    ax.set_ylim(low - 0.06 * (high - low), high + 0.30 * (high - low))  # room for the legend above the curves
    ax.set_xlim(left=0)
    if chart.percent:
        ax.yaxis.set_major_formatter(lambda v, _: f"{v:g} %")
    ax.legend(
        loc="upper left", ncols=3, fontsize=8, frameon=False, borderaxespad=0.1, handlelength=1.6, columnspacing=1.2
    )


def _draw_loss(ax: Axes, name: str, train: Sequence[Record]) -> None:
    steps, values = series(train, name)
    # The total jumps where ITM, MLM and MIM begin: a running mean across the jump would draw a slope that never was.
    begin = next(iter(series(train, "itm")[0]), 0.0) if name == "loss" else 0.0
    cut = sum(s < begin for s in steps)
    line = [*smooth(values[:cut]), *smooth(values[cut:])]
    ax.plot(steps, values, color=COLOURS["c1"], lw=0.8, alpha=0.25)
    for part in (slice(None, cut), slice(cut, None)):
        ax.plot(steps[part], line[part], color=COLOURS["c1"], lw=1.8)
    if name == "itm":
        from .matching import ITM_PRIOR

        ax.axhline(ITM_PRIOR, color=COLOURS["random"], lw=1.5, ls=(0, (4, 3)))
        ax.annotate(
            "prior", (1, ITM_PRIOR), xycoords=("axes fraction", "data"), xytext=(-2, 3), textcoords="offset points",
            ha="right", fontsize=8, color=COLOURS["muted"],
        )  # fmt: skip
    ordered = sorted(values)
    low, high = ordered[0], max(ordered[int(0.995 * (len(ordered) - 1))], max(line))  # a lone spike must not flatten it
    if high > low:
        ax.set_ylim(low - 0.06 * (high - low), high + 0.1 * (high - low))
    ax.set_xlim(left=0)


def _draw_retrieval(ax: Axes, splits: Mapping[str, Any], cut: str) -> None:
    labels: list[str] = []
    ticks: list[float] = []
    centre, width, top = 0.0, 0.36, 1.0
    for name, split in splits.items():
        for direction, arrow in (("i2t", "image→text"), ("t2i", "text→image")):
            reranked = split.get("reranked")
            bars = [("ITC features", split, "c1")]
            if reranked:
                bars.append((f"re-ranked by {SCORES[reranked.get('score', 'sum')]}", reranked, "c2"))
            for i, (label, found, colour) in enumerate(bars):
                x, value = centre + (i - (len(bars) - 1) / 2) * width, found[direction][cut]
                error = found["spread"][direction][cut] if "spread" in found else None
                ax.bar(
                    x, value, width * 0.92, yerr=error, color=COLOURS[colour], label=label if not ticks else None,
                    error_kw={"ecolor": COLOURS["ink"], "elinewidth": 1.2, "capsize": 3},
                )  # fmt: skip
                ax.annotate(
                    f"{value:.1f}", (x, value + (error or 0.0)), xytext=(0, 3), textcoords="offset points", ha="center",
                    fontsize=8.5, color=COLOURS["ink"],
                )  # fmt: skip
                top = max(top, value)
            luck = split["chance"][direction][cut] if split.get("chance") else split["chance_r1"]
            ax.hlines(
                luck, centre - width, centre + width, color=COLOURS["ink"], lw=2,
                label="chance" if not ticks else "_", zorder=3,
            )  # fmt: skip
            labels.append(f"({name}) {arrow}\nchance {luck:.2g} %")
            ticks.append(centre)
            centre += 1.0
        centre += 0.35
    ax.set_xticks(ticks, labels, fontsize=8.5)
    ax.set_ylim(0, top * 1.25)
    ax.yaxis.set_major_formatter(lambda v, _: f"{v:g} %")
    ax.legend(loc="upper right", ncols=3, fontsize=8.5, frameon=False, borderaxespad=0.1)


def _draw_recognition(ax: Axes, levels: Mapping[str, Any]) -> None:
    rows = list(dict.fromkeys(name for level in levels.values() for name in recognised(level)))
    colours = dict(zip(rows, ("c1", "c3", "c4", "c2", "c5") * len(rows), strict=False))
    labels: list[str] = []
    ticks: list[float] = []
    centre, width, top = 0.0, 0.8 / max(2, len(rows)), 1.0
    for level, of in levels.items():
        for name, split in of["splits"].items():
            bars = [(row, found[name]["accuracy"]) for row, found in recognised(of).items() if name in found]
            for i, (row, value) in enumerate(bars):
                x = centre + (i - (len(bars) - 1) / 2) * width
                ax.bar(x, value, width * 0.92, color=COLOURS[colours[row]], label=row if not ticks else None)
                ax.annotate(
                    f"{value:.0f}", (x, value), xytext=(0, 3), textcoords="offset points", ha="center", fontsize=8.5,
                    color=COLOURS["ink"],
                )  # fmt: skip
                top = max(top, value)
            ax.hlines(
                split["majority"]["accuracy"], centre - 0.45, centre + 0.45, color=COLOURS["ink"], lw=2,
                label="majority class" if not ticks else "_", zorder=3,
            )  # fmt: skip
            labels.append(f"({name}) {level}")
            ticks.append(centre)
            centre += 1.0
        centre += 0.35
    ax.set_xticks(ticks, labels, fontsize=8.5)
    ax.set_ylim(0, top * 1.25)
    ax.yaxis.set_major_formatter(lambda v, _: f"{v:g} %")
    ax.legend(loc="upper right", ncols=len(rows) + 1, fontsize=8.5, frameon=False, borderaxespad=0.1)


def _figure(draw: Callable[[Axes], None], width: float, height: float, grid_axis: str = "both") -> Figure:
    from matplotlib.figure import Figure

    with style():
        figure = Figure(figsize=(width, height), layout="constrained")
        ax = figure.add_subplot()
        dress(ax, grid_axis)
        draw(ax)
    return figure


def dress(ax: Axes, grid_axis: str = "both") -> None:
    """Give axes the house's looks: a light grid behind the data, no frame, few ticks."""
    from matplotlib.ticker import MaxNLocator

    ax.grid(True, axis=grid_axis, color=COLOURS["line"], lw=0.8)  # type: ignore[arg-type]
    ax.set_axisbelow(True)
    for side in ("top", "right", "left"):
        ax.spines[side].set_visible(False)
    ax.spines["bottom"].set_color(COLOURS["line"])
    ax.tick_params(length=0, labelsize=8.5, colors=COLOURS["muted"])
    ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    ax.yaxis.set_major_locator(MaxNLocator(5))


def style(**more: Any) -> Any:
    """A context with the settings every figure is drawn and saved under; ``more``: further ones of matplotlib's."""
    import matplotlib as mpl

    settings: dict[Any, Any] = {"svg.fonttype": "none", "font.size": 9, "text.color": COLOURS["ink"], **more}
    return mpl.rc_context(settings)
