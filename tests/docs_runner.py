"""Runs pages of documentation, each in a process of its own forked from this one, which has imported what they share.

Reads jobs from standard input, one JSON object a line: ``{"page", "blocks": [[line, code], …], "checks": [...]}``, and
writes what became of each as a line of JSON. A page is one namespace, an empty working folder, and a time limit.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

sys.modules.setdefault("kernels", None)  # type: ignore[arg-type]  # as in conftest.py

import timm  # noqa: E402, F401
import torch  # noqa: E402
import torch._dynamo  # noqa: E402  # which the first custom op with a gradient imports: once here, not once a page

import crossmask.engine.masking  # noqa: E402
import crossmask.engine.training.pretrainer  # noqa: E402
import crossmask.kernels.modules  # noqa: E402, F401

LIMIT, PATIENCE = 60, 240  # seconds of a processor that a page may take, and of a busy machine's clock


def main() -> int:
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        job = json.loads(line)
        with tempfile.TemporaryDirectory() as folder:
            told = Path(folder) / "told.json"
            (Path(folder) / "work").mkdir()
            child = os.fork()
            if child == 0:
                _run(job, Path(folder) / "work", told)
                os._exit(0)
            _, status = os.waitpid(child, 0)
            if told.is_file():
                answers.write(told.read_text() + "\n")
            else:
                how = f"signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else f"status {status}"
                answers.write(
                    json.dumps({"error": f"ended by {how}; the limit is {LIMIT} s of a processor", "seconds": LIMIT})
                    + "\n"
                )
            answers.flush()
    return 0


def _run(job: dict[str, object], folder: Path, told: Path) -> None:
    os.chdir(folder)
    resource.setrlimit(resource.RLIMIT_CPU, (LIMIT, LIMIT))
    signal.alarm(PATIENCE)
    sink = os.open(folder.parent / "printed.txt", os.O_WRONLY | os.O_CREAT)
    os.dup2(sink, 1)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    names: dict[str, object] = {"__name__": "page"}
    started, error = time.perf_counter(), None
    try:
        for line, code in job["blocks"]:  # type: ignore[attr-defined]
            exec(compile("\n" * (line - 1) + code, str(job["page"]), "exec"), names)
        sys.stdout.flush()
        names["printed"] = (folder.parent / "printed.txt").read_text()
        for check in job["checks"]:  # type: ignore[attr-defined]
            if not eval(check, names):
                error = f"does not hold behind the page's code: {check}"
    except BaseException:
        error = traceback.format_exc()
    told.write_text(json.dumps({"error": error, "seconds": time.perf_counter() - started}))


if __name__ == "__main__":
    sys.exit(main())
