"""pytest's side of the suite: its options, its items, what it prints and what it writes. See bench_suite.py."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from rich.console import Console
from suite import items, screen
from suite.problem import Budget
from suite.results import Row
from suite.session import Session
from suite.steps import STEPS, Options

RESULTS = Path(__file__).parent / "results"
SESSION = pytest.StashKey[Session]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("crossmask", "the benchmark suite of crossmask")
    group.addoption("--device", choices=("cpu", "cuda"), default="cpu", help="what to measure on")
    group.addoption("--rounds", type=int, default=25, help="turns that each implementation of a job has, at most")
    group.addoption("--seconds", type=float, default=0.5, help="of a job's turns; five turns it has in any case")
    group.addoption("--quick", action="store_true", help="whole steps: fewer of them")
    group.addoption("--results", type=Path, help="JSON file to write, default benchmarks/results/latest-DEVICE.json")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--device") == "cuda" and not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        why = "PyTorch finds none" if built else "this PyTorch is built for CPUs alone"
        pytest.exit(f"A GPU is needed, and {why}. `make bench` measures the CPU; `make prove-gpu` needs no GPU.", 2)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    device = metafunc.config.getoption("--device")
    if "measured" in metafunc.fixturenames:
        found = items.ops(device) if metafunc.function.__name__ == "test_op" else items.steps()
        metafunc.parametrize("measured", found, indirect=True)


@pytest.fixture
def measured(request: pytest.FixtureRequest) -> list[Row]:
    """Rows of an item, measured together with those of all items of the same case that run."""
    session, wanted, config = the_session(request.session), request.param, request.config
    if isinstance(wanted, str):
        options = Options(session.device.type, config.getoption("--rounds"), config.getoption("--quick"))
        return session.step(wanted, lambda: STEPS[wanted](options))
    selected = [found for each in request.session.items if isinstance(found := items.of(each), items.Item)]
    names = dict.fromkeys(each.implementation for each in selected if each.case is wanted.case)
    rows = session.case(wanted.case, list(names))
    return [row for row in rows if (row.job.way, row.implementation) == (wanted.way, wanted.implementation)]


def the_session(run: pytest.Session) -> Session:
    config = run.config
    if SESSION not in config.stash:
        device = config.getoption("--device")
        budget = Budget(config.getoption("--rounds"), config.getoption("--seconds"))
        path = config.getoption("--results") or RESULTS / f"latest-{device}.json"
        cases = {found.case.name if isinstance(found, items.Item) else found for found in map(items.of, run.items)}
        planned = len(cases - {None})
        config.stash[SESSION] = Session(torch.device(device), budget, path, planned, partial(say, config))
    return config.stash[SESSION]


def console() -> Console:
    return Console(width=None if sys.stdout.isatty() else 160, highlight=False)


def say(config: pytest.Config, text: str) -> None:
    """Past pytest's capturing: a case may take a minute."""
    with config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        console().print(text)


def pytest_report_teststatus(report: pytest.TestReport, config: pytest.Config) -> tuple[str, str, str] | None:
    """No letter for each item: the suite tells each case when it is measured."""
    if "bench_suite.py" in report.nodeid and report.when == "call" and report.outcome != "failed":
        return report.outcome, "", report.outcome.upper()
    return None


def pytest_terminal_summary(config: pytest.Config) -> None:
    session = config.stash.get(SESSION, None)
    results = session.finish(STEPS) if session is not None else None
    if session is not None and results is not None:
        screen.show(results, session.path, console())
