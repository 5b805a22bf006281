"""What a check found: counted by kind, the first of each kept, all of them on the disk."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from ..data.complaints import KINDS, Kind
from ..data.pair_files import Source
from ..errors import DataError

KEPT = 12  # of each kind, for the table and the picture
_OTHER = Kind("see its line")


class Shown(NamedTuple):
    """An image that belongs to a finding."""

    source: Source
    address: str
    label: str


class Finding(NamedTuple):
    kind: str
    where: str  # file and line, shard and key, or row
    line: str  # the whole of it, as a run would say it
    images: tuple[Shown, ...] = ()


def kind_of(name: str) -> Kind:
    return KINDS.get(name, _OTHER)


class Findings:
    """Takes complaints of readers, and findings; memory does not grow with their number."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.first: dict[str, list[Finding]] = {}
        self._all = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115

    def complain(self, kind: str, error: DataError) -> None:
        """For readers, whose lines begin with the place."""
        line = str(error)
        self.add(Finding(kind, line.split(": ", 1)[0], line))

    def add(self, finding: Finding) -> None:
        self.counts[finding.kind] += 1
        kept = self.first.setdefault(finding.kind, [])
        if len(kept) < KEPT:
            kept.append(finding)
        told = {
            "kind": finding.kind,
            "defect": kind_of(finding.kind).defect,
            "where": finding.where,
            "line": finding.line,
            **({"images": [shown.address for shown in finding.images]} if finding.images else {}),
        }
        self._all.write(json.dumps(told) + "\n")

    @property
    def defects(self) -> int:
        return sum(count for kind, count in self.counts.items() if kind_of(kind).defect)

    def ordered(self) -> list[tuple[str, int]]:
        """Kinds with their counts: defects first, each as :data:`KINDS` has them."""
        place = {kind: n for n, kind in enumerate(KINDS)}
        order = sorted(self.counts, key=lambda kind: (not kind_of(kind).defect, place.get(kind, len(place)), kind))
        return [(kind, self.counts[kind]) for kind in order]

    def lines(self) -> Iterator[str]:
        """Every finding as a line of JSON, in the order they were found."""
        self._all.seek(0)
        for line in self._all:
            yield line.rstrip("\n")
        self._all.seek(0, 2)

    def close(self) -> None:
        self._all.close()
