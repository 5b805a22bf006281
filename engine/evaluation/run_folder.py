"""Reading a run folder, whole or cut short.

Every piece but the folder itself may be missing: a run that was stopped has no ``evaluation.json``, one that crashed
may end in half a line. Nothing here writes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import CheckpointError

METRICS_FILE = "metrics.jsonl"
Record = dict[str, Any]


def read_metrics(run_dir: Path | str) -> list[Record]:
    """All records of ``metrics.jsonl`` in the order written; ``[]`` without the file.

    A last line that is not whole JSON is what a crash leaves behind and is dropped without a word.

    Raises:
        CheckpointError: a line before the last is not a JSON object.
    """
    path = Path(run_dir) / METRICS_FILE
    if not path.is_file():
        return []
    lines = [(n, line) for n, line in enumerate(path.read_bytes().split(b"\n"), 1) if line.strip()]
    records: list[Record] = []
    for n, line in lines:
        try:
            record = json.loads(line)
            if not isinstance(record, dict):
                raise ValueError("not an object")
        except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
            if n == lines[-1][0]:
                break
            raise CheckpointError(f"{path}, line {n} is not a JSON object; delete the line or the file") from error
        records.append(record)
    return records


@dataclass(frozen=True)
class Run:
    """What a run folder holds. Empty pieces are named, in words for a reader, in ``missing``."""

    path: Path
    train: list[Record] = field(default_factory=list)
    probes: list[Record] = field(default_factory=list)
    evaluation: Record = field(default_factory=dict)
    gallery: Record = field(default_factory=dict)
    status: Record = field(default_factory=dict)
    recipe_text: str = ""
    recipe: Record = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)

    @property
    def last_step(self) -> int:
        return max((int(r.get("step", 0)) for r in [*self.train, *self.probes]), default=0)


def read_run(run_dir: Path | str) -> Run:
    """Read everything a report needs.

    Raises:
        CheckpointError: there is no such folder, or it holds none of a run's files.
    """
    path = Path(run_dir)
    if not path.is_dir():
        raise CheckpointError(f"no run folder {path}; a run's folder is named at its start")
    missing: list[str] = []
    records = read_metrics(path)
    train = [r for r in records if r.get("kind") == "train"]
    probes = [r for r in records if r.get("kind") == "probe"]
    evaluation = _json(path / "evaluation.json", "the final evaluation", missing)
    gallery = _json(path / "gallery.json", "the gallery of masked pairs", missing)
    status = _json(path / "status.json", None, missing)
    recipe_text, recipe = _yaml(path / "recipe.yaml", missing)
    if not train:
        missing.append(f"training curves ({METRICS_FILE} has no training steps)")
    if not probes:
        missing.append(f"curves of attention and masks ({METRICS_FILE} has no probes: training.evaluate_every is 0?)")
    if not (records or evaluation or gallery or recipe or status):
        raise CheckpointError(
            f"{path} is not a run folder: it has neither recipe.yaml nor {METRICS_FILE}; "
            "name one that crossmask train made"
        )
    return Run(path, train, probes, evaluation, gallery, status, recipe_text, recipe, missing)


def series(records: Sequence[Mapping[str, Any]], name: str) -> tuple[list[float], list[float]]:
    """Steps and finite values of one field. Zeros before the first other value mean "not begun" and are left out."""
    found = [(float(r["step"]), r.get(name)) for r in records if "step" in r]
    points = [(s, float(v)) for s, v in found if isinstance(v, (int, float)) and math.isfinite(v)]
    begun = next((i for i, (_, v) in enumerate(points) if v != 0.0), len(points))
    return [s for s, _ in points[begun:]], [v for _, v in points[begun:]]


def _json(path: Path, what: str | None, missing: list[str]) -> Record:
    try:
        value = json.loads(path.read_text("utf-8"))
        if isinstance(value, dict):
            return value
        reason = "is not a JSON object"
    except FileNotFoundError:
        reason = "is not there"
    except ValueError:
        reason = "cannot be read"
    if what is not None or reason != "is not there":
        missing.append(f"{what or 'the status'} ({path.name} {reason})")
    return {}


def _yaml(path: Path, missing: list[str]) -> tuple[str, Record]:
    import yaml

    try:
        text = path.read_text("utf-8")
        value = yaml.safe_load(text)
        return text, value if isinstance(value, dict) else {}
    except FileNotFoundError:
        missing.append("the recipe (recipe.yaml is not there)")
    except (ValueError, yaml.YAMLError):
        missing.append("the recipe (recipe.yaml cannot be read)")
    return "", {}
