"""Measures one entry: python -m suite.steps.one "recipe sycoca-emoji" --results FILE      (from benchmarks/)

``FILE`` has every row from the start, without figures until they are there. An entry that raises has the error in the
rows that are missing.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from ..problem import verdict
from ..results import Results, Row, Status, write
from . import NAMES
from .planned import PENDING, Options, Planned, Subject
from .process import end_with


def collect(subject: Subject, options: Options, path: Path) -> list[Row]:
    """Every planned row, also in ``path`` as soon as it is there."""
    planned, found = subject.planned(options), list[Row]()
    keep(planned, found, path)
    try:
        for row in subject.measure(options):
            found.append(row)
            keep(planned, found, path)
    except Exception as error:
        return keep(planned, found, path, *verdict(error))
    return keep(planned, found, path)


def keep(
    planned: list[Planned], found: list[Row], path: Path, status: Status = "failed", reason: str = PENDING
) -> list[Row]:
    """What was found in its place, and rows with a status and a reason for the rest."""
    rows = [next(filter(each.is_of, found), None) or each.row(status, reason) for each in planned]
    write(Results({}, None, tuple(rows)), path)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("name", choices=NAMES)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--parent", type=int, help="process to end with, with all of this one's group")
    arguments = parser.parse_args()
    if arguments.parent is not None:
        end_with(arguments.parent)
    options = Options(arguments.device, arguments.rounds, arguments.quick)
    from .subjects import SUBJECTS

    collect(SUBJECTS[arguments.name], options, arguments.results)
    from crossmask.engine.training.distributed import leave

    leave(0, together=False)


if __name__ == "__main__":
    main()
