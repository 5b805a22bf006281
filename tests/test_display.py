"""The display: plain lines off a terminal, one tidy block on one, silence where it is told to be silent."""

from __future__ import annotations

import io
import logging
import warnings
from pathlib import Path

import pytest
from rich.console import Console

from crossmask.engine.training import display as module
from crossmask.engine.training.display import TrainingDisplay, quiet

VALUES = {
    "loss": 5.5, "itc": 3.25, "itm": 0.6, "mlm": 1.5, "mim": None, "lr": 2e-3, "temperature": 0.05,
    "samples_per_s": 612.0, "memory_mb": 2048.0, "image_mask_ratio": 0.5, "text_mask_ratio": 0.15, "skipped_steps": 0,
}  # fmt: skip


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    fake = Clock()
    monkeypatch.setattr(module, "time", fake)
    return fake


def plain() -> tuple[Console, io.StringIO]:
    stream = io.StringIO()
    return Console(file=stream, force_terminal=False, width=100), stream


def test_plain_lines_come_every_ten_seconds_and_say_the_duration_first(clock: Clock) -> None:
    console, stream = plain()
    with TrainingDisplay(
        100, "demo", "Takes about 8 min.", console=console, ranks=2, machine="a box", run_dir=Path("runs/demo")
    ) as shown:
        for step in range(1, 31):
            clock.now += 1.0
            shown.update(step, VALUES)
        shown.message("checkpoint step-000030 saved")
    lines = stream.getvalue().splitlines()
    assert lines[:4] == ["crossmask demo", "Takes about 8 min.", "a box, 2 ranks", "runs/demo"]
    steps = [line for line in lines if line.startswith("step ")]
    assert [line.split()[1] for line in steps] == ["10/100", "20/100", "30/100", "30/100"]
    assert "total 5.500  itc 3.250" in steps[0]
    assert "mim" not in steps[0]
    assert "elapsed 0:10  left 1:30" in steps[0]
    assert "checkpoint step-000030 saved" in lines
    assert "\x1b" not in stream.getvalue()


def test_a_loss_of_nothing_has_no_sign() -> None:
    assert [module._number(x) for x in (-0.0, -1e-6, 0, -0.5)] == ["0.000", "0.000", "0.000", "-0.500"]


def test_a_terminal_gets_numbers_and_its_cursor_back_even_after_an_error() -> None:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=90, height=24, color_system=None, legacy_windows=False)
    with (  # noqa: PT012 (the error has to come from within)
        pytest.raises(RuntimeError, match="boom"),
        TrainingDisplay(100, "demo", "Takes long.", console=console, start_step=40) as shown,
    ):
        shown.update(50, VALUES)
        shown.message("a [message] above")
        raise RuntimeError("boom")
    out = stream.getvalue()
    assert "50/100" in out
    assert "3.250" in out
    assert "2.0 GB" in out
    assert "50 %" in out
    assert "resumed after step 40" in out
    assert "a [message] above" in out
    assert "\x1b[?25l" in out
    assert out.rindex("\x1b[?25h") > out.rindex("\x1b[?25l")


@pytest.mark.parametrize("width", [1, 20, 40, 79, 200])
def test_no_width_breaks_it(width: int) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=width, height=10)
    with TrainingDisplay(10, "a" * 60, "note", console=console, machine="m" * 100) as shown:
        shown.update(1, VALUES)
        shown.status("evaluating")


def test_a_pseudo_terminal_without_a_size_gets_a_usable_width(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        module, "Console", lambda **kw: Console(file=io.StringIO(), force_terminal=True, width=kw.get("width", 1))
    )
    assert module._console().width == 80


def test_disabled_display_writes_nothing() -> None:
    console, stream = plain()
    with TrainingDisplay(10, "demo", "note", enabled=False, console=console) as shown:
        shown.update(1, VALUES)
        shown.message("hello")
        shown.status("evaluating")
    assert stream.getvalue() == ""


def test_non_finite_and_missing_values_are_shown_as_such(clock: Clock) -> None:
    console, stream = plain()
    with TrainingDisplay(10, "demo", "", console=console) as shown:
        clock.now += 11
        shown.update(1, {"loss": float("nan"), "itc": None})
    assert "total not finite" in stream.getvalue()


def test_quiet_drops_warnings_of_libraries_and_keeps_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CROSSMASK_VERBOSE", raising=False)
    logger = logging.getLogger("DeepSpeed")
    before, seen = list(logger.filters), list[str]()
    handler = logging.Handler()
    handler.emit = lambda record: seen.append(record.getMessage())  # type: ignore[method-assign]
    logger.addHandler(handler)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("default")
            quiet()
            logger.setLevel(logging.INFO)  # as DeepSpeed does when it is imported
            logger.info("chatter")
            logger.warning("nothing to be done")
            logger.error("this matters")
            warnings.warn_explicit("old api", FutureWarning, "x.py", 1, module="torch.distributed.c10d")
            warnings.warn_explicit("yours", UserWarning, "y.py", 1, module="crossmask.engine")
        assert seen == ["this matters"]
        assert [str(w.message) for w in caught] == ["yours"]
    finally:
        logger.removeHandler(handler)
        logger.filters[:] = before
