"""What an ablation's finished runs reached: the metrics of each, and their mean and spread over seeds."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from ..errors import nearest
from .description import Ablation, MetricSection, VariantSection
from .plan import PlannedRun, Start, plan_runs, read_json
from .running import ORIGIN, training_seconds

FEW = 3  # seeds below which differences may well be chance


@dataclass(frozen=True)
class Result:
    """A finished run."""

    run: PlannedRun
    values: dict[str, float | None]  # by the metric's path; None where the run has not measured it
    seconds: float | None
    machine: str
    versions: dict[str, str]
    commit: str | None

    @property
    def variant(self) -> str:
        return self.run.variant.name


@dataclass(frozen=True)
class Summary:
    mean: float
    deviation: float | None  # of the sample (n - 1); None for a single value
    count: int


def collect(ablation: Ablation, output: Path) -> tuple[list[Result], list[tuple[MetricSection, str | None]]]:
    """Every finished run of the ablation in ``output``, of whatever seeds, by variant and seed.

    Returns:
        The results, and the metrics that not one of them has measured, each with the nearest path that is there.

    Raises:
        CheckpointError: a folder that holds another run than the ablation's.
    """
    names = {variant.name: place for place, variant in enumerate(ablation.variants)}
    folders = [path.name for path in output.iterdir()] if output.is_dir() else []
    there = [found for name in folders if (found := re.fullmatch(r"(.+)-seed(0|[1-9]\d*)", name))]
    present = {(found[1], int(found[2])) for found in there if found[1] in names}
    results, known = [], set[str]()
    for seed in sorted({seed for _, seed in present}):
        for run in plan_runs(ablation, output, [seed]):
            if (run.variant.name, seed) in present and run.look() is Start.FINISHED:
                evaluation = read_json(run.folder / "evaluation.json")
                known |= set(paths(evaluation))
                results.append(_read(ablation, run, evaluation))
    results.sort(key=lambda result: (names[result.variant], result.run.seed))
    lost = [m for m in ablation.metrics if results and all(r.values[m.path] is None for r in results)]
    return results, [(m, nearest(m.path, sorted(known))) for m in lost]


def look_up(evaluation: Mapping[str, Any], path: str) -> float | None:
    """The mean of all numbers whose dotted path matches; None where there is none, or one of them is not finite."""
    nodes: list[Any] = [evaluation]
    for pattern in path.split("."):
        nodes = [
            value
            for node in nodes
            if isinstance(node, Mapping)
            for name, value in node.items()
            if fnmatchcase(str(name), pattern)
        ]
    numbers = [float(n) for n in nodes if isinstance(n, (int, float)) and not isinstance(n, bool)]
    return statistics.fmean(numbers) if numbers and all(map(math.isfinite, numbers)) else None


def paths(evaluation: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Dotted paths of all numbers."""
    found = []
    for name, value in evaluation.items():
        if isinstance(value, Mapping):
            found += paths(value, f"{prefix}{name}.")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            found.append(f"{prefix}{name}")
    return found


def summarise(values: Sequence[float | None]) -> Summary | None:
    """Mean and sample deviation of the values that are there; None where none is."""
    numbers = [value for value in values if value is not None]
    if not numbers:
        return None
    deviation = statistics.stdev(numbers) if len(numbers) > 1 else None
    return Summary(statistics.fmean(numbers), deviation, len(numbers))


def of_variant(results: Sequence[Result], variant: VariantSection, metric: MetricSection) -> dict[int, float]:
    """Value by seed."""
    mine = [r for r in results if r.variant == variant.name]
    return {r.run.seed: value for r in mine if (value := r.values[metric.path]) is not None}


def difference(values: Mapping[int, float], others: Mapping[int, float]) -> Summary | None:
    """Of the seeds that both have, value by value: what two runs owe to their common seed cancels."""
    return summarise([values[seed] - others[seed] for seed in values if seed in others])


def agreed(values: Mapping[int, float], others: Mapping[int, float], higher_is_better: bool) -> int:
    """1 where ``values`` are better than ``others`` with every seed that both have, -1 where they are worse with every
    one, 0 where seeds differ in that or are fewer than :data:`FEW`."""
    gains = [values[seed] - others[seed] for seed in values if seed in others]
    if len(gains) < FEW or min(gains) <= 0 <= max(gains):
        return 0
    return 1 if (gains[0] > 0) == higher_is_better else -1


def _read(ablation: Ablation, run: PlannedRun, evaluation: dict[str, Any]) -> Result:
    machine = evaluation.get("machine") or {}
    ranks = machine.get("ranks", 1)
    where = f"{machine.get('summary', 'unknown machine')}, {ranks} rank{'' if ranks == 1 else 's'}"
    return Result(
        run,
        {metric.path: look_up(evaluation, metric.path) for metric in ablation.metrics},
        training_seconds(evaluation),
        where,
        machine.get("versions") or {},
        read_json(run.folder / ORIGIN).get("commit"),
    )
