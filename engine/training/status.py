"""``status.json`` in a run folder: running, finished, stopped or failed, at which step and why; replaced atomically."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from ..atomic import replace_file

STATUS = "status.json"


def write_status(run_dir: Path, state: str, step: int, reason: str = "") -> None:
    """Raises OSError where the folder cannot be written."""
    status = {"state": state, "step": step, "reason": " ".join(reason.split()), "written_at": time.time()}
    replace_file(run_dir / STATUS, json.dumps(status))


def read_status(run_dir: Path) -> dict[str, Any]:
    """{} where there is none, or none that can be read."""
    try:
        status = json.loads((run_dir / STATUS).read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return status if isinstance(status, dict) else {}


def record_failure(run_dir: Path, reason: str, step: int = 0) -> None:
    """Say ``failed`` for a run that could not say so itself; where nothing was said of this run, nothing is."""
    status = read_status(run_dir)
    if status.get("state") in ("running", "failed"):
        write_status(run_dir, "failed", max(step, int(status.get("step", 0))), reason)
