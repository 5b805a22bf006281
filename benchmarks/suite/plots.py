"""The pictures of docs/performance.md: nothing in them that the record does not hold."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from crossmask.engine.atomic import replace_file

from .figures import digits, duration
from .page import REST, WAYS, shown
from .results import Job, Results, Row, quartiles, ratio
from .standing import ours_of, peers_of

OURS = "black"
PALETTE = (*(f"C{number}" for number in range(10)), "navy", "gold", "darkgreen", "salmon", "indigo", "black")
LIMITS = (0.1, 30.0)  # of a ratio; beyond them an arrow says so


def draw(results: Results, folder: Path, suffix: str = "") -> list[Path]:
    """Replaces performance-*.png in ``folder``, those that the record has something for; returns their paths."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    drawn = []
    pictures: dict[str, Callable[[Any, Results], Any]] = {
        "attention": attention,
        "others": others,
        "roofline": roofline,
        "steps": steps,
    }
    folder.mkdir(parents=True, exist_ok=True)
    with pyplot.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        for name, picture in pictures.items():
            figure = picture(pyplot, results)
            if figure is None:
                continue
            file = io.BytesIO()
            figure.savefig(file, dpi=110, metadata={"Software": None}, bbox_inches="tight")
            pyplot.close(figure)
            drawn.append(folder / f"performance-{name}{suffix}.png")
            replace_file(drawn[-1], file.getvalue())
    return drawn


def colours(results: Results, jobs: Sequence[Job]) -> dict[str, str]:
    """Of the others, the same in all panels of a picture."""
    names = dict.fromkeys(row.implementation for job in jobs for row in results.of(job) if not row.ours and row.seconds)
    return {name: PALETTE[number % len(PALETTE)] for number, name in enumerate(names)}


def title(results: Results) -> str:
    kind = "GPU" if results.machine.get("device") == "cuda" else "CPU figures"
    return f"{kind}: {results.machine.get('summary', 'unknown machine')}"


def attention(pyplot: Any, results: Results) -> Any:
    """A panel for each pass, what is asked for and dtype: bars from 1, up for who takes longer than ours."""
    jobs = shown(results, "cross_attention")
    if not jobs:
        return None
    asked = list(dict.fromkeys((job.dtype, job.what) for job in jobs))
    ways = list(dict.fromkeys(job.way for job in jobs))
    colour = colours(results, jobs)
    size = (7.5 * len(ways), 2.9 * len(asked) + 0.6)
    figure, grid = pyplot.subplots(len(asked), len(ways), figsize=size, squeeze=False, sharey=True)
    for line, (dtype, what) in enumerate(asked):
        for column, way in enumerate(ways):
            axes = grid[line][column]
            mine = [job for job in jobs if (job.dtype, job.what, job.way) == (dtype, what, way)]
            bars(axes, results, mine, colour)
            axes.set_title(", ".join(filter(None, (what, dtype, WAYS[way]))), loc="left", fontsize=10)
            if column == 0:
                axes.set_ylabel("time in ours")
    handles = [pyplot.Rectangle((0, 0), 1, 1, color=c) for c in colour.values()]
    handles.append(pyplot.Rectangle((0, 0), 1, 1, facecolor="white", edgecolor="grey", hatch="////"))
    labels = [*colour, "gives less than asked"]
    figure.legend(handles, labels, loc="upper center", ncols=len(labels), frameon=False, bbox_to_anchor=(0.5, 0.0))
    told = "Cross-attention: others' time in ours, median and quartiles; above 1 ours is faster"
    figure.suptitle(f"{told}. {title(results)}", y=1.0)
    figure.tight_layout(rect=(0, 0, 1, 0.995))
    return figure


def bars(axes: Any, results: Results, jobs: Sequence[Job], colour: dict[str, str]) -> None:
    width = 0.8 / max(len(colour), 1)
    for place, job in enumerate(jobs):
        rows = results.of(job)
        ours = ours_of(rows)
        if ours is None:
            continue
        low, high = (x / ours.median for x in quartiles(ours.seconds))
        axes.fill_between((place - 0.45, place + 0.45), low, high, color="0.8", linewidth=0)
        for row in peers_of(rows, ours):
            told = ratio(row, ours)
            assert told is not None
            x = place + width * (list(colour).index(row.implementation) - (len(colour) - 1) / 2)
            middle, least, most = (min(max(value, LIMITS[0]), LIMITS[1]) for value in told)
            hatch = "////" if row.missing else None
            face = "white" if row.missing else colour[row.implementation]
            edge = colour[row.implementation] if row.missing else "none"
            axes.bar(x, middle - 1, 0.92 * width, bottom=1, color=face, edgecolor=edge, hatch=hatch, linewidth=0.8)
            axes.plot((x, x), (least, most), color="black", linewidth=1)
            text = f"{told[0]:.2g}" if told[0] < 99.5 else f"{told[0]:.0f}"
            up = told[0] >= 1
            axes.annotate(
                text + (" ▲" if told[0] > LIMITS[1] else ""),
                (x, max(middle, most) if up else min(middle, least)),
                (0, 2 if up else -2),
                textcoords="offset points",
                ha="center",
                va="bottom" if up else "top",
                fontsize=6,
            )
    axes.axhline(1, color=OURS, linewidth=1)
    axes.set_yscale("log")
    axes.set_yticks([0.1, 0.2, 0.5, 1, 2, 5, 10, 30], ["0.1", "0.2", "0.5", "1", "2", "5", "10", "30"])
    axes.minorticks_off()
    axes.margins(y=0.12)
    axes.grid(axis="y", alpha=0.25)
    found = [ours_of(results.of(job)) for job in jobs]
    names = [f"{j.shape}\nours {duration(row.median)}" for j, row in zip(jobs, found, strict=True) if row is not None]
    axes.set_xticks(range(len(jobs)), names, fontsize=8)


def others(pyplot: Any, results: Results) -> Any:
    """A line for each job of the other ops: where its peers stand, ours at 1."""
    ops = dict.fromkeys(job.op for job in results.jobs if job.op not in ("cross_attention", "step", "scaling"))
    jobs = [job for op in ops for job in shown(results, op) if longest(job, shown(results, op))]
    if not jobs:
        return None
    colour = colours(results, jobs)
    figure, axes = pyplot.subplots(figsize=(11, 0.27 * len(jobs) + 1.4))
    op = ""
    for place, job in enumerate(jobs):
        rows = results.of(job)
        ours = ours_of(rows)
        assert ours is not None
        if op and op != job.op:
            axes.axhline(place - 0.5, color="0.6", linewidth=0.8)
        op = job.op
        low, high = (x / ours.median for x in quartiles(ours.seconds))
        axes.fill_betweenx((place - 0.4, place + 0.4), low, high, color="0.8", linewidth=0)
        for row in peers_of(rows, ours):
            told = ratio(row, ours)
            assert told is not None
            style = {"markerfacecolor": "white" if row.missing else colour[row.implementation]}
            axes.plot(told[1:], (place, place), color=colour[row.implementation], linewidth=1.5)
            axes.plot(told[0], place, "o", color=colour[row.implementation], markersize=5, **style)
    axes.axvline(1, color=OURS, linewidth=1)
    names = [f"{job.op}, {', '.join(filter(None, (job.what, job.shape, job.dtype, WAYS[job.way])))}" for job in jobs]
    mine = [ours_of(results.of(job)) for job in jobs]
    labels = [f"{name}   {duration(row.median)}" for name, row in zip(names, mine, strict=True) if row is not None]
    axes.set_yticks(range(len(jobs)), labels, fontsize=7.5)
    axes.invert_yaxis()
    axes.set_ylim(len(jobs) - 0.4, -0.6)
    axes.set_xscale("log")
    ticks = [
        x for x in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500) if axes.get_xlim()[0] < x < axes.get_xlim()[1]
    ]
    axes.set_xticks(ticks, [f"{x:g}" for x in ticks])
    axes.minorticks_off()
    axes.grid(axis="x", alpha=0.25)
    axes.set_xlabel(
        "others' time in ours, median and quartiles; right of 1 ours is faster (hollow: gives less than asked)"
    )
    handles = [pyplot.Line2D([], [], color=c, marker="o", linestyle="") for c in colour.values()]
    axes.legend(handles, list(colour), fontsize=7.5, loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
    axes.set_title(f"The other ops. {title(results)}", loc="left", fontsize=10)
    return figure


def longest(job: Job, among: Sequence[Job]) -> bool:
    """Whether no job alike asks for more than it: both passes where there are both."""
    alike = [other for other in among if (other.shape, other.what, other.dtype) == (job.shape, job.what, job.dtype)]
    return job.way == "both" or all(other.way != "both" for other in alike)


def roofline(pyplot: Any, results: Results) -> Any:
    """The run's own ceilings as roofs; each of our rows at the FLOPs a byte that its job needs."""
    ceilings = results.ceilings
    timed = [row for job in results.jobs if (row := ours_of(results.of(job))) is not None and row.needed_bytes]
    if ceilings is None or not timed:
        return None
    products, moving = [row for row in timed if row.flops], [row for row in timed if not row.flops]
    columns = {"ncols": 2, "width_ratios": (1.7, 1)} if products and moving else {}
    figure, panels = pyplot.subplots(
        1, figsize=(13 if columns else 9, max(5.2, 0.3 * len(moving))), squeeze=False, **columns
    )
    left, right = panels[0][0], panels[0][-1]
    if products:
        under_roofs(left, results, products)
    if moving:
        names = [f"{row.job.op}, {row.job.shape}, {row.job.dtype}" for row in moving]
        shares = [results.shares(row)[0] or 0.0 for row in moving]
        right.barh(range(len(moving)), shares, color="C0", height=0.7)
        for place, (row, share) in enumerate(zip(moving, shares, strict=True)):
            low, high = (row.needed_bytes / x / ceilings.memory for x in reversed(row.quartiles))
            right.plot((low, high), (place, place), color="black", linewidth=1)
            right.text(max(share, high), place, f"  {share:.0%}, {duration(row.median)}", va="center", fontsize=7)
        right.axvline(1, color="grey", linewidth=1)
        right.set_yticks(range(len(moving)), names, fontsize=7.5)
        right.invert_yaxis()
        right.margins(x=0.25)
        right.set_xlabel("share of the memory's ceiling")
        right.set_title("Ops without matrix products", loc="left", fontsize=10)
    figure.suptitle(f"Measured: our ops under the ceilings of the same run. {title(results)}")
    figure.tight_layout()
    return figure


def under_roofs(axes: Any, results: Results, rows: Sequence[Row]) -> None:
    ceilings = results.ceilings
    assert ceilings is not None
    intensity = {id(row): row.flops / row.needed_bytes for row in rows}
    knees = [rate / ceilings.memory for rate in ceilings.gemm.values()]
    ends = 0.5 * min(*intensity.values(), *knees), 1.7 * max(*intensity.values(), *knees)
    dtypes = [name for name in ceilings.gemm if any(row.job.dtype == name for row in rows)]
    line = dict(zip(dtypes, ("-", "--", ":"), strict=False))
    for name in dtypes:
        knee = ceilings.gemm[name] / ceilings.memory
        xs = sorted({*ends, min(max(knee, ends[0]), ends[1])})
        roof = [min(ceilings.memory * x, ceilings.gemm[name]) / 1e9 for x in xs]
        label = f"{name}: {digits(ceilings.memory / 1e9)} GB/s, {digits(ceilings.gemm[name] / 1e9)} GFLOP/s"
        axes.plot(xs, roof, line[name], color="grey", linewidth=1.8, label=label)
    colour = {op: f"C{number}" for number, op in enumerate(dict.fromkeys(row.job.op for row in rows))}
    markers = dict(zip(ceilings.gemm, "os^", strict=False))
    for row in rows:
        if row.job.way == "backward" or row.job.op == "step":
            continue
        x, y, of = intensity[id(row)], row.flops / row.median / 1e9, colour[row.job.op]
        low, high = (row.flops / value / 1e9 for value in reversed(row.quartiles))
        axes.plot((x, x), (low, high), color=of, linewidth=1)
        face = of if row.job.way == "both" else "white"
        axes.scatter(x, y, marker=markers.get(row.job.dtype, "v"), s=26, facecolors=face, edgecolors=of, zorder=3)
    for op, of in colour.items():
        axes.plot([], [], "o", color=of, label=op)
    for name in dtypes:
        axes.plot([], [], markers[name], color="black", label=name)
    axes.plot([], [], "o", color="black", markerfacecolor="white", label="hollow: forward alone")
    axes.set(xscale="log", yscale="log", xlabel="FLOP a byte that no cache can save", ylabel="GFLOP/s")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.tick_params(which="minor", labelleft=False, labelbottom=False)
    axes.grid(alpha=0.25)
    axes.set_title("Above a slanted roof: inputs that a cache held", loc="left", fontsize=10)
    axes.legend(fontsize=7.5, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)


def steps(pyplot: Any, results: Results) -> Any:
    """A bar for each step, as long as it takes in ours', cut into its parts."""
    rows = [row for row in results.rows if row.job.op == "step" and row.parts and row.seconds]
    if not rows:
        return None
    total: Counter[str] = Counter()
    for row in rows:
        total.update({name: max(x, 0) / sum(row.parts.values()) for name, x in row.parts.items()})
    names = sorted(total, key=lambda name: (name == REST, -total[name]))
    palette = pyplot.get_cmap("tab20").colors
    colour = {name: palette[(2 * number) % 20 + (number >= 10)] for number, name in enumerate(names)}
    figure, axes = pyplot.subplots(figsize=(11, 0.42 * len(rows) + 1.8))
    longest_bar = 0.0
    for place, row in enumerate(rows):
        ours = ours_of(results.of(row.job)) or row
        length, whole, start = row.median / ours.median, sum(row.parts.values()), 0.0
        for name in names:
            part = max(row.parts.get(name, 0.0), 0.0) / whole * length
            axes.barh(place, part, 0.72, left=start, color=colour[name])
            if part > 0.07:
                share = f"{row.parts[name] / whole:.0%}"
                axes.text(start + part / 2, place, share, ha="center", va="center", fontsize=7)
            start += part
        low, high = (x / ours.median for x in row.quartiles)
        axes.plot((low, high), (place, place), color="black", linewidth=1.2)
        speed = f", {digits(row.samples / row.median)} samples/s" if row.samples else ""
        axes.text(max(start, high) + 0.02, place, f"{duration(row.median)}{speed}", va="center", fontsize=8)
        longest_bar = max(longest_bar, start, high)
    axes.set_yticks(range(len(rows)), [f"{row.job.shape}, {row.job.dtype}: {row.implementation}" for row in rows])
    axes.invert_yaxis()
    axes.set_xlim(0, 1.25 * longest_bar)
    axes.set_xlabel("time of a step in ours, with quartiles; parts as PyTorch's profiler shares them out")
    handles = [pyplot.Rectangle((0, 0), 1, 1, color=colour[name]) for name in names]
    axes.legend(handles, names, loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, fontsize=8)
    axes.set_title(f"Whole training steps. {title(results)}", loc="left", fontsize=10)
    return figure
