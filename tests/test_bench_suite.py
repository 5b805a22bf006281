"""The benchmark suite as it is run: items, pytest-benchmark, what is written, and what happens to those that fail."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

from suite import items, results, screen, session  # noqa: E402
from suite.cases import Case, cases  # noqa: E402
from suite.problem import Budget, Implementation, Problem  # noqa: E402
from suite.results import Ceilings, Job, Results, Row  # noqa: E402

from crossmask.kernels.roofline import Work  # noqa: E402

JOB = Job("cross_attention", "ALBEF 30x257", "B=8", "fp32", "output", "forward")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "benchmarks/bench_suite.py"]
    command += ["--benchmark-only", "--rounds", "3", "--seconds", "0.1", *arguments]
    return subprocess.run(command, cwd=BENCHMARKS.parent, capture_output=True, text=True, timeout=240)


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess[str], Path]:
    folder = tmp_path_factory.mktemp("bench")
    told = ("--results", str(folder / "new/r.json"), "--benchmark-json", str(folder / "pytest.json"))
    return run("-k", "topk_mask and scenes and not compile", *told), folder


def test_a_run_writes_every_time_it_took_and_says_what_it_did(ran: Any) -> None:
    done, folder = ran
    assert done.returncode == 0, done.stdout + done.stderr
    found = results.read(folder / "new/r.json")
    names = {row.implementation for row in found.rows}
    assert {"crossmask", "torch.topk + scatter"} <= names
    assert not any("compile" in name for name in names), "what -k leaves out is not measured"
    assert all(len(row.seconds) == 3 and min(row.seconds) > 0 for row in found.rows)
    assert found.machine["device"] == "cpu"
    assert found.machine["versions"]["torch"] == torch.__version__.split("+")[0]
    assert found.ceilings is not None
    assert min(found.ceilings.copy, found.ceilings.update, *found.ceilings.gemm.values()) > 1e8
    lines = (folder / "new/r.csv").read_text().splitlines()
    assert lines[0].split(",") == list(results.COLUMNS)
    assert len(lines) == 1 + len(found.rows)
    assert "1 of " in done.stdout
    assert "make bench-compare" in done.stdout


def test_pytest_benchmark_has_the_same_times(ran: Any) -> None:
    _, folder = ran
    found = results.read(folder / "new/r.json")
    told = json.loads((folder / "pytest.json").read_text())["benchmarks"]
    assert len(told) == len(found.rows)
    mine = sorted(row.median for row in found.rows)
    assert sorted(each["stats"]["median"] for each in told) == pytest.approx(mine, abs=2e-9)
    assert {each["group"] for each in told} >= {each["group"] for each in told if each["extra_info"]["size"]}


def case(build: Any, implementations: tuple[str, ...] = ("crossmask", "peer")) -> Case:
    return Case("topk_mask", "tiny", "", "fp32", ("forward",), implementations, build)


def the_session(tmp_path: Path, lines: list[str]) -> session.Session:
    found = session.Session(torch.device("cpu"), Budget(3, 0.1), tmp_path / "r.json", 1, lines.append)
    found.gauge = SimpleNamespace(measure=lambda: None, found=Ceilings(1e9, 2e9, {"fp32": 1e9}))  # type: ignore[assignment]
    return found


def doubled(x: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"y": 2 * x}


def problem(**changed: Any) -> Problem:
    given: dict[str, Any] = {
        "op": "topk_mask",
        "shape": "tiny",
        "size": "3",
        "what": "",
        "inputs": (torch.ones(3),),
        "reference": doubled,
        "plain": doubled,
        "implementations": [
            Implementation("crossmask", lambda: doubled, ours=True),
            Implementation("peer", lambda: doubled),
        ],
        "work": {"forward": Work(read=12, written=12)},
    }
    return Problem(**given | changed)


def test_inputs_that_do_not_fit_are_recorded_and_the_run_goes_on(tmp_path: Path) -> None:
    def too_large(device: torch.device) -> Problem:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 TiB.\nGPU 0 has ...")

    lines: list[str] = []
    found = the_session(tmp_path, lines)
    rows = found.case(case(too_large), ["crossmask", "peer"])
    assert [(row.implementation, row.ours, row.status) for row in rows] == [
        ("crossmask", True, "out of memory"),
        ("peer", False, "out of memory"),
    ]
    assert "Tried to allocate" in rows[0].reason
    assert "\n" not in rows[0].reason
    written = found.finish()
    assert written is not None
    assert results.read(tmp_path / "r.json").rows == written.rows


def test_a_mistake_in_the_suite_itself_is_not_hidden(tmp_path: Path) -> None:
    def broken(device: torch.device) -> Problem:
        raise KeyError("shape")

    with pytest.raises(KeyError):
        the_session(tmp_path, []).case(case(broken), ["crossmask"])


def test_only_what_was_selected_is_measured_and_only_once(tmp_path: Path) -> None:
    lines: list[str] = []
    found, built = the_session(tmp_path, lines), []

    def build(device: torch.device) -> Problem:
        built.append(device)
        return problem()

    first = found.case(case(build), ["crossmask"])
    assert [row.implementation for row in first] == ["crossmask"]
    assert found.case(case(build), ["crossmask"]) is first
    assert len(built) == len(lines) == 1


def test_nothing_measured_writes_nothing(tmp_path: Path) -> None:
    assert the_session(tmp_path, []).finish() is None
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("row", "outcome"),
    [
        (Row(JOB, "crossmask", True, "wrong", "output is off by 1"), "failed"),
        (Row(JOB, "crossmask", True, "failed", "RuntimeError: x"), "failed"),
        (Row(JOB, "crossmask", True, "out of memory", "x"), "skipped"),
        (Row(JOB, "flash-attn", False, "failed", "RuntimeError: no kernel image"), "skipped"),
        (Row(JOB, "flash-attn", False, "skipped", "flash-attn is not installed"), "skipped"),
    ],
    ids=lambda x: x if isinstance(x, str) else f"{x.implementation} {x.status}",
)
def test_ours_may_not_be_wrong_others_are_listed(row: Row, outcome: str) -> None:
    expected = {"failed": pytest.fail.Exception, "skipped": pytest.skip.Exception}[outcome]
    with pytest.raises(expected, match=rf"{row.implementation}: {row.status}: {row.reason[:8]}"):
        items.report(row, None, None)  # type: ignore[arg-type]


def test_the_timer_tells_what_was_taken() -> None:
    timer = items.Replay()
    timer.load([0.25, 0.5])
    told = [timer() for _ in range(6)]
    assert [told[1] - told[0], told[3] - told[2]] == [0.25, 0.5]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_case_has_its_own_name_and_has_us_in_it(device: str) -> None:
    found = list(cases(device))
    assert len({each.name for each in found}) == len(found) > 50
    for each in found:
        assert any(name.startswith("crossmask") for name in each.implementations), each.name
        assert len(each.implementations) > 1, f"{each.name} is compared with nothing"
        assert set(each.ways) <= {"forward", "backward", "both"}


def test_the_table_shows_what_has_no_time_and_why() -> None:
    from rich.console import Console

    rows = (
        Row(JOB, "crossmask", True, "measured", "", (2e-3, 2e-3, 4e-3), 2**21, 4e6, 8e6),
        Row(JOB, "sdpa", False, "measured", "", (1e-3, 3e-3, 4e-3), 2**20, 4e6, 8e6),
        Row(JOB, "flash-attn", False, "skipped", "flash-attn is not installed: pip install flash-attn"),
    )
    found = Results({"summary": "a machine", "threads": 2, "versions": {}}, Ceilings(1e9, 4e9, {"fp32": 1e10}), rows)
    console = Console(width=180, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    screen.show(found, Path("r.json"), console)
    text = console.export_text()
    assert "2.000" in text  # milliseconds
    assert "50%" in text  # 4 MB in 2 ms: 2 of 4 GB/s
    assert "40%" in text  # 8 MFLOP in 2 ms: 4 of 10 GFLOP/s
    assert "sdpa 1.00 (0.75 .. 1.25)" in text
    assert "flash-attn: skipped: flash-attn is not installed" in text
