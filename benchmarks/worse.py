"""Which compiles came out worse than a table has them: told by name, so that nothing gets worse unseen.

Rows are those of proof.py. They are compared by what was compiled (kernel, architecture, tile, dtype, flags), not by
``job`` and ``source``, which change with the kernel; of rows that are alike in that, figure by figure the worst.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

LESS_IS_BETTER = ("registers", "spill_bytes", "shared_bytes", "tensor_memory")
MORE_IS_BETTER = ("blocks_per_processor", "wide_loads", "wide_stores")
OTHER = ("shared_limit", "matrix", "code_bytes", "job", "source")
LONGER = 1.1  # code that grew by less is not called worse: a changed line moves it either way


def worse(before: Sequence[Any], after: Sequence[Any], describe: Callable[[Any], str]) -> list[str]:
    """A line for every row of ``after`` that ``before`` has with better figures. What only one of them has is new or
    gone, and not worse."""
    old, new = _alike(before), _alike(after)
    changed = ((new[key][0], _changes(old[key], new[key])) for key in new if key in old)
    return [f"{describe(row)}: {', '.join(changes)}" for row, changes in changed if changes]


def _alike(rows: Sequence[Any]) -> dict[tuple[Any, ...], list[Any]]:
    found: dict[tuple[Any, ...], list[Any]] = defaultdict(list)
    for row in rows:
        fields = dataclasses.asdict(row).items()
        figures = (*LESS_IS_BETTER, *MORE_IS_BETTER, *OTHER)
        found[tuple((name, value) for name, value in fields if name not in figures)].append(row)
    return found


def _changes(old: Sequence[Any], new: Sequence[Any]) -> list[str]:
    found = []
    for name, of in [(name, max) for name in LESS_IS_BETTER] + [(name, min) for name in MORE_IS_BETTER]:
        was, now = (of(getattr(row, name, 0) for row in rows) for rows in (old, new))
        if (now > was) if of is max else (now < was):
            found.append(f"{name} {was} → {now}")
    kinds = [{part.split(":")[0] for row in rows for part in row.matrix.split()} for rows in (old, new)]
    if lost := kinds[0] - kinds[1]:
        found.append(f"{' '.join(sorted(lost))} → {' '.join(sorted(kinds[1])) or 'no matrix instructions'}")
    was, now = (max(row.code_bytes for row in rows) for rows in (old, new))
    if now > LONGER * was:
        found.append(f"code_bytes {was} → {now}")
    return found
