"""A rank without training, started through the real launcher by test_launcher.py: RUN_DIR BEHAVIOUR."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

from crossmask.engine.errors import DataError
from crossmask.engine.failures import report_failure
from crossmask.engine.training.distributed import from_rank_zero, init_distributed, leave


def main(run_dir: Path, behaviour: str) -> None:
    rank = int(os.environ["RANK"])
    if behaviour == "mistake" and rank == 1:
        leave(report_failure(DataError("cat.png: not an image; remove it from the list"), rank), together=False)
    if behaviour == "mistake":
        time.sleep(600)  # waits for rank 1 in vain
    asked: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: asked.append(number))
    world = init_distributed()
    words = {
        "size": world.size,
        "device": str(world.device),
        "agreed": from_rank_zero(f"from {rank}"),
        "threads": os.environ["OMP_NUM_THREADS"],
        "pid": os.getpid(),
    }
    draft = run_dir / f"draft-{rank}"
    draft.write_text(json.dumps(words))
    draft.rename(run_dir / f"up-{rank}.json")
    deadline = time.monotonic() + 250
    while not asked and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(1.5)  # a checkpoint takes a while
    (run_dir / f"saved-{rank}").write_text(f"{len(asked)}")
    if rank == 0:
        (run_dir / "status.json").write_text(json.dumps({"state": "stopped", "step": 7}))
    leave(0, together=True)


if __name__ == "__main__":
    main(*(kind(word) for kind, word in zip((Path, str), [w for w in sys.argv[1:] if not w.startswith("--")])))  # noqa: B905
