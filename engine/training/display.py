"""What a person sees while a run trains: one tidy display on rank 0, or short lines where there is no terminal."""

from __future__ import annotations

import atexit
import logging
import math
import os
import time
import warnings
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.padding import Padding
from rich.panel import Panel
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, Task, TaskID, TextColumn
from rich.table import Table
from rich.text import Text

LINE_EVERY_S = 10.0  # seconds between plain lines where stdout is not a terminal
REFRESH_PER_S = 4
CELL = 11  # columns of one number
LOSSES = {
    "loss": "total", "itc": "itc", "itm": "itm", "mlm": "mlm", "mim": "mim", "caption": "ic", "tg_mim": "tg-mim",
    "composed": "composed", "recognition": "classes",
}  # fmt: skip
FUSION_LOSSES, CAPTIONER_LOSSES = frozenset(("itm", "mlm", "mim")), frozenset(("caption", "tg_mim"))
FINE_TUNING = frozenset(("composed", "recognition"))

_QUIET_ENVIRONMENT = {
    "TRANSFORMERS_VERBOSITY": "error",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}
_QUIET_LOGGERS = (
    "DeepSpeed", "deepspeed", "torch.distributed", "torch.utils.cpp_extension", "transformers", "timm", "matplotlib",
    "tensorboard",
)  # fmt: skip
_QUIET_WARNINGS = r"(torch|deepspeed|transformers|timm|tensorboard|google|pydantic|multiprocessing|contextlib)(\.|$)"


class _ErrorsOnly(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return record.levelno >= logging.ERROR


def quiet() -> None:
    """Keep from the screen what a user can do nothing about. Call it first in every rank, before heavy imports.

    DeepSpeed sets its logger's level when it is imported, after us; a filter on the logger outlives that. Errors always
    pass. ``CROSSMASK_VERBOSE=1`` leaves everything as the libraries would have it.
    """
    if os.environ.get("CROSSMASK_VERBOSE", "0") not in ("", "0"):
        return
    for name, value in _QUIET_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    for name in _QUIET_LOGGERS:
        logger = logging.getLogger(name)
        if not any(isinstance(f, _ErrorsOnly) for f in logger.filters):
            logger.addFilter(_ErrorsOnly())
    for category in (FutureWarning, DeprecationWarning, UserWarning):
        warnings.filterwarnings("ignore", category=category, module=_QUIET_WARNINGS)


class TrainingDisplay:
    """A context manager around the training loop; ``enabled=False`` (every rank but 0) makes all of it do nothing.

    On a terminal: a header that stays in the scroll-back, then one live block with the bar and the current numbers;
    messages appear above it. Elsewhere, a line about every ten seconds. The terminal is restored on every way out.

    Args:
        total_steps: the step at which the run is done.
        title: the run's name.
        note: how long the run takes, said first.
        start_step: the step a resumed run continues after.
        machine, ranks, run_dir: shown in the header.
        console: for tests; the default writes to stdout.
    """

    def __init__(
        self,
        total_steps: int,
        title: str,
        note: str = "",
        enabled: bool = True,
        *,
        start_step: int = 0,
        machine: str = "",
        ranks: int | None = None,
        run_dir: str | os.PathLike[str] | None = None,
        console: Console | None = None,
    ) -> None:
        self.total_steps, self.start_step = total_steps, start_step
        self.title, self.note, self.enabled = title, note, enabled
        self.machine, self.ranks = machine, ranks
        self.run_dir = None if run_dir is None else os.fspath(run_dir)
        self.console = console or _console()
        self.live_here = self.console.is_terminal and not self.console.is_dumb_terminal
        self._step, self._values = start_step, dict[str, Any]()
        self._status: str | None = None
        self._started = self._last_line = time.monotonic()
        self._first_step_at: float | None = None
        self._first_step = start_step
        self._live: Live | None = None
        self._progress: Progress | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> TrainingDisplay:
        self._started = self._last_line = time.monotonic()
        if not self.enabled:
            return self
        self._print_header()
        if self.live_here:
            self._progress = Progress(
                SpinnerColumn(style="cyan"),
                TextColumn("{task.description}"),
                BarColumn(bar_width=None, complete_style="cyan", finished_style="green"),
                _Steps(),
                _Times(self),
                expand=True,
            )
            self._task = self._progress.add_task("training", total=self.total_steps, completed=self.start_step)
            self._live = Live(
                get_renderable=self._block, console=self.console, refresh_per_second=REFRESH_PER_S, transient=False
            )
            # A rank that ends without unwinding still gets its cursor back.
            atexit.register(self._stop)
            self._live.start(refresh=True)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self.enabled and not self.live_here and self._step > self.start_step:
            self._print_line()
        self._stop()

    def update(self, step: int, values: Mapping[str, Any]) -> None:
        """Steps done so far and a record's fields as in ``metrics.jsonl``; what is missing or ``None`` stays."""
        if not self.enabled:
            return
        now = time.monotonic()
        if self._first_step_at is None:  # the first step compiles, allocates and warms caches: no measure of the rest
            self._first_step_at, self._first_step = now, step
        self._step = step
        self._values.update({k: v for k, v in values.items() if v is not None})
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=step)
        elif not self.live_here and now - self._last_line >= LINE_EVERY_S:
            self._print_line()

    def status(self, text: str | None) -> None:
        """What happens besides training ("evaluating: held-out designer"); ``None`` says training goes on."""
        if not self.enabled or text == self._status:
            return
        self._status = text
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, description=text or "training")
        elif text:
            self.message(text)

    def message(self, text: str) -> None:
        """One line above the display; it stays."""
        if self.enabled:
            line = Text.assemble(("  • " if self.live_here else "", "cyan"), text)
            self.console.print(line, highlight=False, soft_wrap=not self.live_here)

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self._started

    @property
    def left_s(self) -> float | None:
        """Seconds of training left at the pace so far; ``None`` until that is known."""
        done = self._step - self._first_step if self._first_step_at is not None else 0
        if done < 1 or self._first_step_at is None:
            return None
        return (time.monotonic() - self._first_step_at) / done * max(self.total_steps - self._step, 0)

    def _stop(self) -> None:
        live, self._live = self._live, None
        if live is not None:
            atexit.unregister(self._stop)
            if self._progress is not None and self._task is not None and self._step < self.total_steps:
                self._progress.update(self._task, description="stopped")
            live.stop()
            self.console.show_cursor(True)

    def _print_header(self) -> None:
        facts = [self.machine, "" if self.ranks is None else f"{self.ranks} rank{'s' if self.ranks != 1 else ''}"]
        lines = [self.note, ", ".join(f for f in facts if f), self.run_dir or ""]
        if self.start_step:
            lines.insert(1, f"resumed after step {self.start_step:,}")
        kept = [line for line in lines if line]
        if not self.live_here:
            self.console.print(
                "\n".join([f"crossmask {self.title}", *kept]), highlight=False, markup=False, soft_wrap=True
            )
            return
        body = Text("\n").join(Text(s, style="bold" if s == self.note else "dim") for s in kept)
        heading = Text.assemble(("crossmask", "bold cyan"), " ", (self.title, "bold"))
        self.console.print(Panel(body, title=heading, title_align="left", border_style="cyan", padding=(0, 1)))

    def _block(self) -> RenderableType:
        assert self._progress is not None
        v = self._values
        absent = FUSION_LOSSES if v.keys() & CAPTIONER_LOSSES else CAPTIONER_LOSSES  # of the other family of models
        tuned = FINE_TUNING & v.keys()
        absent |= (FUSION_LOSSES if tuned else set()) - v.keys() | (FINE_TUNING - tuned)  # a row has room for six
        shown = {name: label for name, label in LOSSES.items() if name not in absent}
        losses = [(label, _number(v.get(name)), "bold") for name, label in shown.items()]
        losses.append(("samples/s", _number(v.get("samples_per_s"), "{:,.0f}"), ""))
        rest = [
            ("lr", _number(v.get("lr"), "{:.1e}"), ""),
            ("temperature", _number(v.get("temperature")), ""),
            ("patch mask", _percent(v.get("image_mask_ratio")), ""),
            ("word mask", _percent(v.get("text_mask_ratio")), ""),
            ("memory", _memory(v.get("memory_mb")), ""),
            ("skipped", skipped := _number(v.get("skipped_steps", 0), "{:.0f}"), "" if skipped == "0" else "bold red"),
        ]
        if self.console.width < 6 * (CELL + 2):  # too narrow for columns: the bar and the total are what one looks for
            return Group(self._progress, Text(f"  loss {_number(v.get('loss'))}"))
        table = Table.grid(padding=(0, 2, 0, 0))
        for _ in rest:
            table.add_column(width=CELL, no_wrap=True)
        for row in (losses, rest):
            table.add_row(*[Text(label, style="dim") for label, _, _ in row])
            table.add_row(*[Text(value, style=style) for _, value, style in row])
        return Group(self._progress, Padding(table, (0, 0, 0, 2)))

    def _print_line(self) -> None:
        self._last_line = time.monotonic()
        v, left = self._values, self.left_s
        share = 100 * self._step / max(self.total_steps, 1)
        parts = [f"step {self._step:,}/{self.total_steps:,} ({share:.0f} %)"]
        parts += [f"{label} {_number(v[name])}" for name, label in LOSSES.items() if name in v]
        if "lr" in v:
            parts.append(f"lr {_number(v['lr'], '{:.1e}')}")
        if "samples_per_s" in v:
            parts.append(f"{_number(v['samples_per_s'], '{:,.0f}')} samples/s")
        if v.get("skipped_steps"):
            parts.append(f"skipped {v['skipped_steps']:.0f}")
        parts.append(f"elapsed {_clock(self.elapsed_s)}")
        if left is not None:
            parts.append(f"left {_clock(left)}")
        self.console.print("  ".join(parts), highlight=False, markup=False, soft_wrap=True)


class _Steps(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{int(task.completed):,}/{int(task.total or 0):,}", style="bold")


class _Times(ProgressColumn):
    def __init__(self, display: TrainingDisplay) -> None:
        super().__init__()
        self.display = display

    def render(self, task: Task) -> Text:
        left = self.display.left_s
        said = "–:––" if left is None else _clock(left)
        elapsed = f"{_clock(self.display.elapsed_s)} elapsed  " if self.display.console.width >= 70 else ""
        return Text.assemble((elapsed, "dim"), (said, "cyan"), " left")


def _console() -> Console:
    """stdout's console. A pseudo-terminal that reports no size (0 columns) gets 80; a huge one is capped."""
    console = Console()
    if console.is_terminal and console.width < 20:
        console = Console(width=80)
    elif console.width > 120:
        console = Console(width=120)
    return console


def _number(value: Any, form: str = "{:.3f}") -> str:
    if value is None:
        return "–"
    shown = form.format(float(value)) if math.isfinite(float(value)) else "not finite"
    return shown if shown.strip("-0.,") else shown.removeprefix("-")  # a loss of nothing is no "-0.000"


def _percent(value: Any) -> str:
    return "–" if value is None else f"{100 * float(value):.0f} %"


def _memory(mb: Any) -> str:
    return "–" if mb is None else f"{float(mb) / 1024:.1f} GB"


def _clock(seconds: float) -> str:
    whole = int(seconds + 0.5)
    hours, minutes, rest = whole // 3600, whole % 3600 // 60, whole % 60
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
