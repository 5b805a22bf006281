"""An ablation's results as ``ablation.md``, ``ablation.csv`` and ``ablation.png``."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..atomic import replace_file, writing_to
from .description import Ablation, MetricSection, VariantSection
from .results import Result, Summary, difference, of_variant, summarise

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FEW = 3  # seeds below which the table says that its differences may be chance
PANELS = 3  # in a row of the picture


def write_results(ablation: Ablation, results: Sequence[Result], output: Path) -> list[Path]:
    """Write the three files into ``output``, each replaced as a whole, and return their paths.

    Raises:
        CheckpointError: the folder cannot be written.
    """
    from ..evaluation.plots import to_png

    contents: dict[str, str | bytes] = {
        "ablation.md": table(ablation, results),
        "ablation.csv": rows(ablation, results),
        "ablation.png": to_png(picture(ablation, results)),
    }
    with writing_to(output):
        for name, content in contents.items():
            replace_file(output / name, content)
    return [output / name for name in contents]


def table(ablation: Ablation, results: Sequence[Result]) -> str:
    """Markdown: a row per variant with the mean and spread of each metric, and below it what the runs were."""
    headings = [f"{m.title} {'↑' if m.higher_is_better else '↓'}" for m in ablation.metrics]
    lines = [
        f"# {ablation.title or ablation.name}",
        "",
        _row(["variant", "seeds", *headings, "s per run"]),
        _row(["---", *["--:"] * (len(headings) + 2)]),
    ]
    for variant in ablation.variants:
        mine = [r for r in results if r.variant == variant.name]
        cells = [_cell(ablation, results, variant, metric) for metric in ablation.metrics]
        seconds = _numbers(summarise([r.seconds for r in mine]), 0)
        lines.append(_row([variant.heading, str(len(mine) or "–"), *cells, seconds]))
    lines += ["", *_notes(ablation, results), "", *_changes(ablation, results)]
    return "\n".join(lines) + "\n"


def rows(ablation: Ablation, results: Sequence[Result]) -> str:
    """CSV: a row per run, numbers in full."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    metrics = [metric.path for metric in ablation.metrics]
    writer.writerow(["variant", "title", "seed", "steps", "seconds", "machine", "torch", "commit", *metrics])
    for r in results:
        values = ["" if r.values[path] is None else repr(r.values[path]) for path in metrics]
        seconds = "" if r.seconds is None else f"{r.seconds:.1f}"
        steps, torch = r.run.recipe.training.max_steps, r.versions.get("torch", "")
        known = [r.variant, r.run.variant.heading, r.run.seed, steps, seconds, r.machine, torch, r.commit or ""]
        writer.writerow([*known, *values])
    return text.getvalue()


def picture(ablation: Ablation, results: Sequence[Result]) -> Figure:
    """A panel per metric, a line per variant: a dot per seed, the mean a stroke, a bar of one deviation about it."""
    from matplotlib.figure import Figure

    from ..evaluation.plots import COLOURS, dress, style

    columns = min(PANELS, len(ablation.metrics))
    down = -(-len(ablation.metrics) // columns)
    names = [variant.heading for variant in ablation.variants]
    labels = 0.075 * max(map(len, names))  # inches
    with style():
        figure = Figure(figsize=(labels + 3.1 * columns, down * (0.85 + 0.34 * len(names))), layout="constrained")
        for i, metric in enumerate(ablation.metrics):
            ax = figure.add_subplot(down, columns, i + 1)
            dress(ax)
            _draw(ax, [of_variant(results, variant, metric) for variant in ablation.variants])
            ax.set_yticks(range(len(names)), names if i % columns == 0 else [""] * len(names), color=COLOURS["ink"])
            ax.set_ylim(len(names) - 0.5, -0.5)  # the first variant on top
            arrow = "better →" if metric.higher_is_better else "← better"
            ax.set_title(metric.title, loc="left", fontsize=10, fontweight="bold", color=COLOURS["ink"])
            ax.set_xlabel(arrow, loc="right" if metric.higher_is_better else "left", color=COLOURS["muted"])
        if len({r.run.seed for r in results}) > 1:
            figure.supxlabel(
                "a dot per seed, a stroke for the mean, a band of ± one standard deviation", fontsize=8.5, ha="left",
                x=0.01, color=COLOURS["muted"],
            )  # fmt: skip
    return figure


def _draw(ax: Axes, values: Sequence[Mapping[int, float]]) -> None:
    from matplotlib.ticker import MaxNLocator

    from ..evaluation.plots import COLOURS

    for place, by_seed in enumerate(values):
        found = summarise(list(by_seed.values()))
        if found is None:
            continue
        many = len(by_seed)
        # seeds lie a little apart, in their order, so that equal values are seen as several
        heights = [place + 0.3 * ((n + 0.5) / many - 0.5) for n in range(many)]
        if found.deviation is not None:
            left = found.mean - found.deviation
            ax.barh(place, 2 * found.deviation, 0.46, left, color=COLOURS["c1"], alpha=0.16, lw=0)
            ax.vlines(found.mean, place - 0.3, place + 0.3, color=COLOURS["c1"], lw=2)
        ax.scatter(
            [by_seed[seed] for seed in sorted(by_seed)], heights, s=22, color=COLOURS["c1"], edgecolors="white",
            linewidths=0.7, zorder=3,
        )  # fmt: skip
    ax.use_sticky_edges = False  # bars would end the axis where they begin
    ax.margins(x=0.12)
    ax.xaxis.set_major_locator(MaxNLocator(5))


def _cell(ablation: Ablation, results: Sequence[Result], variant: VariantSection, metric: MetricSection) -> str:
    mine, other = of_variant(results, variant, metric), ablation.compared_with(variant)
    text = _numbers(summarise(list(mine.values())), metric.digits)
    delta = difference(mine, of_variant(results, other, metric)) if other else None
    return f"{text} ({_numbers(delta, metric.digits, sign=True)})" if delta else text


def _numbers(found: Summary | None, digits: int, sign: bool = False) -> str:
    if found is None:
        return "–"
    mean = f"{found.mean:{'+' if sign else ''}.{digits}f}"
    return mean if found.deviation is None else f"{mean} ± {found.deviation:.{digits}f}"


def _notes(ablation: Ablation, results: Sequence[Result]) -> list[str]:
    to = "the row above" if ablation.compare == "previous" else "the first row"
    if any(variant.against for variant in ablation.variants):
        to += ", or to the one that the second table names"
    lines = [f"Mean ± standard deviation over seeds; in brackets the difference to {to}, seed by seed."]
    counts = [sum(r.variant == variant.name for r in results) for variant in ablation.variants]
    if min(counts) < max(counts):
        lines[0] += " Not all runs are finished."
    if any(0 < count < FEW for count in counts):
        lines.append(
            f"Fewer than {FEW} seeds: how far a row would move with another one is hardly known, so a small "
            "difference may be chance."
        )
    if any("*" in metric.path for metric in ablation.metrics):
        lines.append(
            "Columns: "
            + "; ".join(f"{metric.title} = `{metric.path}`" for metric in ablation.metrics)
            + " of evaluation.json, the mean of what matches."
        )
    lines.append("Seconds are of training alone, without start-up and evaluation.")
    if ablation.note:
        lines.append(ablation.note.strip())
    versions = {", ".join(f"{name} {version}" for name, version in r.versions.items()) for r in results}
    commits = {r.commit or "unknown" for r in results}
    lines.append(f"Machine: {_all(r.machine for r in results)}. {_all(versions)}. Commit: {_all(commits)}.")
    return [line for text in lines for line in (text, "")][:-1]


def _changes(ablation: Ablation, results: Sequence[Result]) -> list[str]:
    """What each variant was, so that the table can be made again."""
    changes = {variant.name: ablation.changes(variant) for variant in ablation.variants}
    common = [o for o in next(iter(changes.values())) if all(o in own for own in changes.values())]
    lines = [f"All variants: {' '.join(f'`{override}`' for override in common)}", ""] if common else []
    lines += [_row(["variant", "recipe", "starts from", "compared with", "steps", "changes"]), _row(["---"] * 6)]
    for variant in ablation.variants:
        other = ablation.compared_with(variant)
        steps = {str(r.run.recipe.training.max_steps) for r in results if r.variant == variant.name}
        own = [f"`{override}`" for override in changes[variant.name] if override not in common]
        cells = [
            variant.heading,
            Path(variant.recipe or ablation.recipe).stem,
            ablation.variant(variant.source).heading if variant.source else "–",
            other.heading if other else "–",
            _all(steps),
            " ".join(own) or "–",
        ]
        lines.append(_row(cells))
    return lines


def _all(words: Iterable[Any]) -> str:
    return " / ".join(sorted(dict.fromkeys(words))) or "–"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(' '.join(cell.split()).replace('|', chr(92) + '|') for cell in cells)} |"
