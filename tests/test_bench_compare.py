"""Comparing two files of results: what is slower is told by name, and what is noise is not."""

from __future__ import annotations

import dataclasses
import json
import random
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
import compare  # noqa: E402
from suite.results import Ceilings, Job, Results, Row, write  # noqa: E402

sys.path.remove(str(BENCHMARKS))

MACHINE = {"device": "cpu", "summary": "2 cores", "processor": "EPYC", "threads": 1, "versions": {"torch": "2.14"}}
PEERS = ("sdpa", "eager", "compile")


def results(
    seed: int, jobs: int = 200, rounds: int = 15, machine: float = 1.0, unit: float = 1e-2, **changes: object
) -> Results:
    """Rounds that drift together, rows that have their own noise, a slow round in twenty, and what two runs differ by
    whatever their rounds say. ``slower``: jobs of ours that take so many times as long; ``alone``: jobs without peers.
    """
    slower, alone = changes.get("slower", {}), changes.get("alone", ())
    assert isinstance(slower, dict)
    draw, rows = random.Random(seed), []
    for number in range(jobs):
        job = Job("cross_attention", f"{number}x257", "B=8", "fp32", "output", "forward")
        drift = [machine * draw.lognormvariate(0, 0.1) for _ in range(rounds)]
        for place, name in enumerate(("crossmask",) if number in alone else ("crossmask", *PEERS)):
            base = unit * (1 + number % 7) * (1 + place) * draw.lognormvariate(0, 0.01)
            base *= slower.get(number, 1.0) if name == "crossmask" else 1.0
            own = [draw.lognormvariate(0, 0.03) * (draw.uniform(1.5, 4) if draw.random() < 0.05 else 1) for _ in drift]
            seconds = tuple(base * a * b for a, b in zip(drift, own, strict=True))
            rows.append(Row(job, name, name == "crossmask", "measured", seconds=seconds, peak_bytes=1000))
    return Results(MACHINE, Ceilings(1e10, 1e10, {"fp32": 1e11}), tuple(rows))


def slower(old: Results, new: Results) -> list[str]:
    return [pair.row.job.shape for pair in compare.compare(old, new) if pair.verdict == "slower" and pair.row.ours]


def edited(found: Results, number: int, change: Callable[[Row], Row | None]) -> Results:
    """With the row of ours of one job changed, or taken away."""
    rows = (change(row) if row.ours and row.job.shape == f"{number}x257" else row for row in found.rows)
    return dataclasses.replace(found, rows=tuple(row for row in rows if row is not None))


def without_time(status: str) -> Callable[[Row], Row]:
    return lambda row: dataclasses.replace(row, status=status, reason="it said so", seconds=())


def run(tmp_path: Path, old: Results, new: Results, *options: str) -> int:
    for name, found in (("old", old), ("new", new)):
        write(found, tmp_path / f"{name}.json")
    return compare.main([str(tmp_path / "old.json"), str(tmp_path / "new.json"), *options])


@pytest.mark.parametrize("rounds", [3, 5, 15])
def test_the_same_twice_is_no_regression(rounds: int) -> None:
    alarms = sum(bool(slower(results(s, rounds=rounds), results(1000 + s, rounds=rounds))) for s in range(20))
    assert alarms <= 1


@pytest.mark.parametrize("seed", range(5))
def test_a_row_that_got_slower_is_named_and_no_other(seed: int) -> None:
    assert slower(results(seed), results(1000 + seed, slower={17: 1.3})) == ["17x257"]


@pytest.mark.parametrize("alone", [(), range(3)])
def test_a_machine_that_got_slower_is_no_regression(alone: tuple[int, ...]) -> None:
    for seed in range(5):
        assert slower(results(seed, alone=alone), results(1000 + seed, machine=1.5, alone=alone)) == []
    assert slower(results(0), results(1000, machine=1.5, slower={17: 1.3})) == ["17x257"]


def test_everything_of_ours_slower_is_not_taken_for_noise() -> None:
    found = slower(results(0), results(1000, slower=dict.fromkeys(range(200), 1.3)))
    assert len(found) > 190


def test_one_peer_that_got_faster_does_not_make_ours_slower() -> None:
    def faster(row: Row) -> Row:
        return (
            row
            if row.implementation != "compile"
            else dataclasses.replace(row, seconds=tuple(x / 3 for x in row.seconds))
        )

    new = results(1000)
    found = compare.compare(results(0), dataclasses.replace(new, rows=tuple(map(faster, new.rows))))
    changes = [pair.change for pair in found if pair.row.ours and pair.change is not None]
    assert abs(statistics.fmean(changes)) < 0.06  # of log 3, which a mean of the peers would show a third of
    assert not [pair for pair in found if pair.row.ours and pair.verdict == "slower"]


def test_without_peers_times_are_taken_as_they_are_and_the_floor_is_higher() -> None:
    alone = range(5)
    old, new = results(0, alone=alone), results(1000, alone=alone, slower={1: 1.2, 2: 2.0})
    pairs = [pair for pair in compare.compare(old, new) if pair.row.ours]
    assert [pair.peers for pair in pairs[:6]] == [0, 0, 0, 0, 0, 3]
    assert pairs[0].floor > 2.5 * pairs[5].floor
    assert slower(old, new) == ["2x257"]


def test_what_rounds_do_not_show_the_peers_do() -> None:
    """Two runs in which every row of every job moved by itself by a fifth: none of ours is a regression for it."""
    draw = random.Random(5)

    def moved(found: Results) -> Results:
        rows = []
        for row in found.rows:
            by = draw.lognormvariate(0, 0.2)
            rows.append(dataclasses.replace(row, seconds=tuple(by * x for x in row.seconds)))
        return dataclasses.replace(found, rows=tuple(rows))

    alarms = [slower(moved(results(s)), moved(results(1000 + s))) for s in range(10)]
    assert sum(map(bool, alarms)) <= 1


@pytest.mark.parametrize("status", ["failed", "wrong", "out of memory", "skipped"])
def test_a_row_that_lost_its_time_is_a_regression(
    status: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = results(0, jobs=5)
    assert run(tmp_path, old, edited(old, 3, without_time(status))) == 1
    (told,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Regressed")]
    assert told.endswith(f"forward, 3x257, fp32, crossmask: was measured, is {status} (it said so)")
    assert run(tmp_path, edited(old, 3, without_time(status)), old) == 0  # it got a time


def test_a_row_that_vanished_is_a_regression_and_a_peer_that_did_is_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = results(0, jobs=5)
    assert run(tmp_path, old, edited(old, 3, lambda row: None)) == 1
    assert "3x257, fp32, crossmask: was measured, and is not in the new file" in capsys.readouterr().out
    peers = dataclasses.replace(old, rows=tuple(row for row in old.rows if row.implementation != "compile"))
    assert run(tmp_path, old, peers) == 0
    assert run(tmp_path, peers, old) == 0


def test_what_a_run_of_a_part_left_out_is_not_lost(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = results(0, jobs=5)
    part = dataclasses.replace(edited(old, 3, lambda row: None), machine=MACHINE | {"partial": True})
    assert run(tmp_path, old, part) == 0
    assert "a part of the suite: 1 rows of" in capsys.readouterr().out
    assert run(tmp_path, old, edited(part, 2, without_time("wrong"))) == 1, "what was measured still counts"


def test_the_command_names_what_regressed_and_keeps_the_order(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = results(0, jobs=30)
    assert run(tmp_path, old, results(1000, jobs=30)) == 0
    assert "30 within noise" in capsys.readouterr().out
    assert run(tmp_path, old, results(1000, jobs=31, slower={7: 1.5, 21: 0.5})) == 1
    told = capsys.readouterr().out
    assert "31 rows of ours: 1 slower, 1 faster, 28 within noise, 1 only in new" in told
    assert [line.split(":")[1] for line in told.splitlines() if line.startswith("Regressed")] == [
        " cross_attention, output, forward, 7x257, fp32, crossmask"
    ]
    shuffled = list(old.rows)
    random.Random(1).shuffle(shuffled)
    pairs = compare.compare(old, dataclasses.replace(old, rows=tuple(shuffled)))
    assert [pair.row for pair in pairs] == list(old.rows)
    assert run(tmp_path, old, results(1000, jobs=30, slower={7: 1.5}), "--noise-at-least", "0.8") == 0


def test_another_machine_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = results(0, jobs=5)
    other = MACHINE | {"processor": "Xeon", "threads": 4, "versions": {"torch": "2.15", "timm": "1"}}
    assert run(tmp_path, old, dataclasses.replace(old, machine=other)) == 2
    said = capsys.readouterr()
    assert not said.out
    assert "old.json is of EPYC, 1 thread; " in said.err
    assert "new.json of Xeon, 4 threads: measure both on one machine" in said.err
    assert said.err.count("\n") == 1
    assert run(tmp_path, old, dataclasses.replace(old, machine=other), "--any-machine") == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "not the same machine: processor EPYC → Xeon; threads 1 → 4" in told
    assert "not the same versions: timm none → 1; torch 2.14 → 2.15" in told
    assert run(tmp_path, old, old) == 0
    assert "Warning" not in capsys.readouterr().out


def test_the_record_of_this_machine_is_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, new = tmp_path / "records", tmp_path / "latest.json"
    here, there = results(0, jobs=5), results(1, jobs=5, slower={3: 2.0})
    xeon = dataclasses.replace(there, machine=MACHINE | {"processor": "Xeon"})
    write(xeon, folder / "cpu.json")
    write(here, folder / "latest-cpu.json")  # which is no record
    write(here, new)
    assert compare.main([str(folder), str(new)]) == 2
    said = capsys.readouterr()
    assert "has no record of this machine, EPYC, 1 thread (cpu.json: Xeon, 1 thread): measure the older" in said.err
    assert said.err.count("\n") == 1
    assert compare.main([str(folder), str(new), "--any-machine"]) == 0
    assert "processor Xeon → EPYC" in capsys.readouterr().out
    nameless = dataclasses.replace(here, machine={"device": "cpu"})
    assert run(tmp_path, nameless, nameless) == 2
    assert "is of an unknown machine" in capsys.readouterr().err
    gpus = [MACHINE | {"device": "cuda", "gpus": ["H100"] * count} for count in (8, 8, 4)]
    eight, again, four = (dataclasses.replace(here, machine=machine) for machine in gpus)
    assert run(tmp_path, eight, again) == 0
    assert run(tmp_path, eight, four) == 2
    assert "old.json is of 8 x H100; " in capsys.readouterr().err
    write(here, folder / "cpu-epyc.json")
    assert compare.main([str(folder), str(new)]) == 0
    (folder / "cpu.json").unlink()
    (folder / "cpu-epyc.json").write_text("{")
    assert compare.main([str(folder), str(new)]) == 2
    assert "cpu-epyc.json" in capsys.readouterr().err


def test_a_file_that_cannot_be_used_is_one_line_and_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, bad = tmp_path / "good.json", tmp_path / "bad.json"
    write(results(0, jobs=3), good)
    whole = json.loads(good.read_text())
    first = whole["rows"][0]

    def rows(*found: object) -> str:
        return json.dumps(whole | {"rows": list(found)})

    for contents, said in (
        (None, "No such file"),
        ("{", "not JSON"),
        ("[]", "not a file of results"),
        (json.dumps(whole | {"format": 99}), "not a file of results"),
        (json.dumps(whole | {"rows": 3}), "damaged"),
        (json.dumps(whole | {"machine": None}), "damaged"),
        (rows("row"), "damaged"),
        (rows({name: x for name, x in first.items() if name != "op"}), "damaged"),
        (rows(first | {"op": ["a"]}), "damaged"),
        (rows(first | {"seconds": ["soon"]}), "damaged"),
        (rows(first | {"seconds": [0.0]}), "damaged"),
        (rows(first | {"seconds": []}), "damaged"),
        (rows(first | {"status": "fine"}), "damaged"),
        (rows(first, first), "twice"),
        (rows(), "no rows"),
        (json.dumps(whole | {"machine": MACHINE | {"device": "cuda"}}), "of one kind"),
    ):
        bad.unlink(missing_ok=True)
        if contents is not None:
            bad.write_text(contents)
        for pair in ((bad, good), (good, bad)):
            assert compare.main([*map(str, pair)]) == 2
            told = capsys.readouterr()
            assert said in told.err
            assert "bad.json" in told.err
            assert told.err.count("\n") == 1
            assert not told.out


@pytest.mark.parametrize(
    ("unit", "device", "named"), [(1e-4, "cpu", []), (1e-2, "cpu", ["7x257"]), (1e-4, "cuda", ["7x257"])]
)
def test_what_takes_as_long_as_threads_wake_is_not_called_slower(unit: float, device: str, named: list[str]) -> None:
    files = [results(seed, jobs=30, unit=unit, slower={7: factor}) for seed, factor in ((0, 1.0), (1000, 1.8))]
    old, new = (dataclasses.replace(each, machine=MACHINE | {"device": device}) for each in files)
    assert slower(old, new) == named


@pytest.mark.parametrize(("rounds", "freedom"), [(2, 4), (3, 16), (20, 50)])
def test_few_rounds_have_few_degrees_of_freedom(rounds: int, freedom: int) -> None:
    """Two rounds tell no spread and count themselves alone; where a spread is told, its prior counts in each file."""
    files = [results(seed, jobs=20, rounds=rounds) for seed in (0, 1)]
    (old, *before), (new, *after) = ([row for row in each.rows if row.job.shape == "0x257"] for each in files)
    change = compare.change(old, new, list(zip(before, after, strict=True)))
    assert change is not None
    assert change.freedom == freedom


def test_students_quantile() -> None:
    for freedom, probability, expected in ((10, 0.975, 2.228), (18, 0.99975, 4.25), (30, 0.9995, 3.646)):
        assert abs(compare.student(probability, freedom) - expected) < 0.01 * expected
