"""Counts steps until all ranks agree to stop. Arguments: FOLDER MODE; writes FOLDER/ready.RANK and FOLDER/end.RANK.

Modes: "loop" steps with the other ranks; "stubborn" never asks whether to stop; "launcher" starts this script as its
child in mode "loop" and waits (to be killed).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path


def main() -> None:
    folder, mode = Path(sys.argv[1]), sys.argv[2]
    if mode == "launcher":
        subprocess.Popen([sys.executable, __file__, str(folder), "loop"]).wait()
        return
    import torch.distributed as dist

    from crossmask.engine.training import signals

    signals.SAME_REQUEST_S = 0.5
    rank = int(os.environ.get("RANK", 0))
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        meeting = os.environ["CROSSMASK_TEST_MEETING"]
        dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    with signals.StopRequest() as stop:
        (folder / f"ready.{rank}").write_text(str(os.getpid()))
        steps, deadline = 0, time.monotonic() + 30
        while time.monotonic() < deadline:
            time.sleep(0.02 * (1 + rank))
            steps += 1
            if mode == "loop" and stop.agree():
                break
    (folder / f"end.{rank}.new").write_text(json.dumps({"steps": steps, "reason": stop.reason}))
    os.replace(folder / f"end.{rank}.new", folder / f"end.{rank}")


if __name__ == "__main__":
    main()
