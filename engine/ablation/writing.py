"""An ablation's results as ``ablation.md``, ``ablation.csv`` and ``ablation.png``."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ..atomic import replace_file, writing_to
from .description import Ablation, VariantSection
from .drawing import picture
from .results import FEW, Result, Summary, agreed, difference, of_variant, summarise


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
    """Markdown: a row per variant with the mean and spread of each metric, the differences to the rows that they are
    compared with, and below what the runs were."""
    headings = [f"{m.title} {'↑' if m.higher_is_better else '↓'}" for m in ablation.metrics]
    lines = [
        f"# {ablation.title or ablation.name}",
        "",
        _row(["variant", "seeds", *headings, "s per run"]),
        _row(["---", *["--:"] * (len(headings) + 2)]),
    ]
    for variant in ablation.variants:
        mine = [r for r in results if r.variant == variant.name]
        reached = [summarise(list(of_variant(results, variant, metric).values())) for metric in ablation.metrics]
        cells = [_numbers(found, metric.digits) for found, metric in zip(reached, ablation.metrics, strict=True)]
        seconds = _numbers(summarise([r.seconds for r in mine]), 0)
        lines.append(_row([variant.heading, str(len(mine) or "–"), *cells, seconds]))
    lines += [*_differences(ablation, results, headings), "", *_notes(ablation, results), ""]
    return "\n".join([*lines, *_changes(ablation, results)]) + "\n"


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


def _differences(ablation: Ablation, results: Sequence[Result], headings: Sequence[str]) -> list[str]:
    """The second table; nothing where no run has another to be compared with."""
    lines = []
    for variant in ablation.variants:
        other = ablation.compared_with(variant)
        if other is None:
            continue
        cells = []
        for metric in ablation.metrics:
            mine, theirs = of_variant(results, variant, metric), of_variant(results, other, metric)
            text = _numbers(difference(mine, theirs), metric.digits, sign=True)
            cells.append(f"**{text}**" if agreed(mine, theirs, metric.higher_is_better) else text)
        if any(cell != "–" for cell in cells):
            lines.append(_row([variant.heading, other.heading, *cells]))
    heading = [_row(["difference of", "to", *headings]), _row(["---", "---", *["--:"] * len(headings)])]
    return ["", *heading, *lines] if lines else []


def _numbers(found: Summary | None, digits: int, sign: bool = False) -> str:
    if found is None:
        return "–"
    mean = f"{found.mean:{'+' if sign else ''}.{digits}f}"
    return mean if found.deviation is None else f"{mean} ± {found.deviation:.{digits}f}"


def _notes(ablation: Ablation, results: Sequence[Result]) -> list[str]:
    lines = ["Mean ± standard deviation over seeds; differences seed by seed, over those that both rows have."]
    most = max(_count(results, variant) for variant in ablation.variants)
    if most >= FEW:
        lines[0] += (
            f" In bold: every seed agrees on which row is better, which {most} seeds do by chance alone in one case of"
            f" {2 ** (most - 1)}."
        )
    unfinished = [v for v in ablation.variants if _count(results, v) < most]
    if unfinished:
        missing = "; ".join(f"{v.heading} ({_count(results, v)} of {most})" for v in unfinished)
        lines[0] += f" Not all runs are finished: {missing}."
    if any(0 < _count(results, variant) < FEW for variant in ablation.variants):
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


def _count(results: Sequence[Result], variant: VariantSection) -> int:
    return sum(r.variant == variant.name for r in results)


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
