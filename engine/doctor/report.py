"""``crossmask doctor``: runs the examination in a process of its own, and prints what it finds.

A library that crashes while it is imported, or a driver that hangs, ends that process and is itself a finding.
"""

from __future__ import annotations

import json
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .examination import Section, sections
from .finding import Finding, Level
from .libraries import version_of

MARKS: dict[Level, str] = {"fine": "[green]✓[/]", "optional": "[dim]–[/]", "gap": "[yellow]•[/]", "broken": "[red]✗[/]"}
PATIENCE = 60.0  # seconds for one section; imports over a slow network take long
# with this process's search path, so that the examination finds what a run would find
EXAMINE = (
    "import sys, json; sys.path[:] = json.loads(sys.argv[1]); "
    "from crossmask.engine.doctor.examination import main; main()"
)
NAMES = 18  # characters of the column that says what a line is about


def run_doctor(console: Console | None = None, as_json: bool = False, command: Sequence[str] | None = None) -> int:
    """Print the report. Returns 0 when training can run here, 1 when something it needs is missing.

    Args:
        as_json: print one JSON object, for bug reports.
        command: what examines; default this Python.
    """
    console = console or Console()
    found: list[Section] = []
    if as_json:
        found.extend(_examined(command))
        print(json.dumps(_as_dict(found), indent=1), file=console.file)
    else:
        with console.status("looking around"):
            for section in _examined(command):
                found.append(section)
                console.print(_drawn(section))
        console.print(_verdict(found))
    return 1 if _levels(found).count("broken") else 0


def _examined(command: Sequence[str] | None) -> Iterator[Section]:
    """The sections that another process finds; where it ends early, why, and in which section."""
    command = command or [sys.executable, "-c", EXAMINE, json.dumps(sys.path)]
    titles = list(sections())
    errors: list[str] = []
    lines: queue.Queue[str | None] = queue.Queue()
    try:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
    except OSError as error:
        yield Section(titles[0], [Finding("Python", f"cannot start: {error}", "broken", "make install")])
        return

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            lines.put(line)
        lines.put(None)

    def drain() -> None:
        assert process.stderr is not None
        for line in process.stderr:
            errors.append(line)
            del errors[:-5]

    threads = [threading.Thread(target=target, daemon=True) for target in (read, drain)]
    for thread in threads:
        thread.start()
    seen = 0
    try:
        while True:
            try:
                line = lines.get(timeout=PATIENCE)
            except queue.Empty:
                yield _ended(titles[seen:], f"took longer than {PATIENCE:.0f} s")
                return
            section = _read(line) if line else None
            if section is None:
                process.wait()
                threads[1].join(1.0)
                yield _ended(titles[seen:], _cause(process.returncode, errors))
                return
            if not section.title:
                return
            seen = titles.index(section.title) + 1 if section.title in titles else seen
            yield section
    finally:
        process.kill()
        process.wait()


def _read(line: str) -> Section | None:
    try:
        said: dict[str, Any] = json.loads(line)
        return Section(said["title"], [Finding(**finding) for finding in said["findings"]])
    except (ValueError, TypeError, KeyError):
        return None


def _ended(titles: Sequence[str], why: str) -> Section:
    """In place of the section that the examination did not survive, and of those behind it."""
    title = titles[0] if titles else "At the end"
    remedy = "import the libraries above one by one in Python to see which does it, and install that one again"
    return Section(title, [Finding("the examination", why, "broken", remedy)])


def _cause(code: int, errors: Sequence[str]) -> str:
    if code < 0:
        try:
            return f"ended by {signal.Signals(-code).name}: a library crashed"
        except ValueError:
            return f"ended by signal {-code}: a library crashed"
    last = " ".join(errors[-1].split()) if errors else ""
    return f"ended with exit code {code}" + (f": {last}" if last else "")


def _drawn(section: Section) -> Table:
    table = Table(
        box=box.SIMPLE,
        show_header=False,
        show_edge=False,
        pad_edge=False,
        padding=(0, 1),
        title=section.title,
        title_justify="left",
        title_style="bold cyan",
    )
    table.add_column(no_wrap=True, width=1)
    table.add_column(style="bold", width=NAMES, overflow="fold")
    table.add_column(overflow="fold")
    for finding in section.findings:
        remedy = f"\n[yellow]→[/] {escape(finding.remedy)}" if finding.remedy else ""
        style = "dim" if finding.level == "optional" else ""
        table.add_row(MARKS[finding.level], finding.what, escape(finding.here) + remedy, style=style)
    table.add_row()
    return table


def _levels(found: Sequence[Section]) -> list[Level]:
    return [finding.level for section in found for finding in section.findings]


def _verdict(found: Sequence[Section]) -> str:
    levels = _levels(found)
    broken, gaps = levels.count("broken"), levels.count("gap")
    if broken:
        return f"[red]Training cannot run here:[/] {broken} thing{'s' * (broken > 1)} missing or broken, marked ✗."
    where = next((f for section in found for f in section.findings if f.what == "GPUs"), None)
    on_gpus = where is not None and where.level == "fine" and not where.here.startswith("none")
    noted = f" {gaps} gap{'s' * (gaps > 1)}, marked • with what to do." if gaps else ""
    return f"[green]Training can run here, on {'GPUs' if on_gpus else 'CPU ranks'}.[/]{noted}"


def _as_dict(found: Sequence[Section]) -> dict[str, Any]:
    return {
        "crossmask": version_of("crossmask"),
        "can_train": "broken" not in _levels(found),
        "examined": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "sections": [
            {"title": section.title, "findings": [vars(finding) for finding in section.findings]} for section in found
        ],
    }
