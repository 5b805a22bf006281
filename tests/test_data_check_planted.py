"""``crossmask data check`` finds every one of 20 defects planted at random in a set, names its place, and no other."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from planted_defects import (
    ARROW_DEFECTS,
    CSV_DEFECTS,
    DEFECTS,
    JSONL_DEFECTS,
    TAR_DEFECTS,
    Item,
    Planted,
    Set,
    clean,
    plant,
    write_arrow,
    write_lines,
    write_shards,
)

from crossmask.engine.data_check.command import Check, find_source
from crossmask.engine.data_check.display import Watch
from crossmask.engine.data_check.findings import Findings

Writer = Callable[[Set, Path], tuple[Path, Callable[[Item], str]]]
FORMATS: dict[str, tuple[Writer, list]] = {
    "csv": (lambda found, folder: write_lines(found, folder, "csv"), CSV_DEFECTS),
    "jsonl": (lambda found, folder: write_lines(found, folder, "jsonl"), JSONL_DEFECTS),
    "tar": (write_shards, TAR_DEFECTS),
    "arrow": (write_arrow, ARROW_DEFECTS),
}


def checked(path: Path) -> list[tuple[str, str]]:
    """Kind and whole line of every finding."""
    findings = Findings()
    Check(find_source(str(path), ["data.validation_fraction=0"]), findings).run(Watch())
    return [(found["kind"], found["where"] + " | " + found["line"]) for found in map(json.loads, findings.lines())]


def names(line: str, place: str) -> bool:
    """Whether a finding's line names a place: every word of it, whole."""
    return all(re.search(rf"(?<![\w-]){re.escape(part)}(?![\w-])", line) for part in place.split(" "))


def hit(planted: Planted, place: Callable[[Item], str], kind: str, line: str) -> bool:
    return kind.removesuffix(", left out") == planted.kind and names(line, place(planted.item))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("form", FORMATS)
def test_every_planted_defect_is_found_and_its_place_named(form: str, seed: int, tmp_path: Path) -> None:
    write, defects = FORMATS[form]
    found = plant(seed, defects)
    path, place = write(found, tmp_path)
    told = checked(path)
    assert len(found.planted) == DEFECTS
    missed = [(p.kind, place(p.item)) for p in found.planted if not any(hit(p, place, *said) for said in told)]
    alarms = [said for said in told if not any(hit(p, place, *said) for p in found.planted)]
    assert (missed, alarms) == ([], [])
    assert len(told) == DEFECTS


@pytest.mark.parametrize("form", FORMATS)
def test_a_clean_set_raises_no_alarm(form: str, tmp_path: Path) -> None:
    path, _ = FORMATS[form][0](clean(7), tmp_path)
    assert checked(path) == []


@pytest.mark.parametrize(("write", "lost"), [(write_shards, 1), (write_arrow, 20)])
def test_a_truncated_file_does_not_hide_the_rest(write: Callable[..., Any], lost: int, tmp_path: Path) -> None:
    """The sample or the rows that are lost are, and what is planted in all others is found."""
    found = plant(11, [])
    path, place = write(found, tmp_path, truncate=True)
    told = checked(path)
    assert [kind for kind, _ in told].count("truncated") == 1
    left = {item.name for item in (found.items[:-20] if lost == 20 else found.items)} - {found.items[57].name}
    kept = [p for p in found.planted if p.item.name in left]
    missed = [(p.kind, place(p.item)) for p in kept if not any(hit(p, place, *said) for said in told)]
    assert missed == []
