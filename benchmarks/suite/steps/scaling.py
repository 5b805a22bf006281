"""albef-emoji on one and several ranks under each ZeRO stage: the ranks of ``bench_scaling.py``, timed step by step.

The batch is the same however many ranks share it (strong scaling). On a CPU each rank has one core, so that two ranks
have twice the processor of one.
"""

from __future__ import annotations

import argparse
import signal
from collections.abc import Iterator

import bench_scaling
import torch

from ..results import Job, Row
from .planned import Options, Planned

RECIPE, BATCH, STAGES = "albef-emoji", 64, (0, 1, 2, 3)
STEPS, QUICK_STEPS = 10, 4
LIMIT = 120.0  # seconds that a run may take


class Scaling:
    def planned(self, options: Options) -> list[Planned]:
        return [planned for planned, _, _ in runs(options.device)]

    def measure(self, options: Options) -> Iterator[Row]:
        steps = QUICK_STEPS if options.quick else STEPS
        asked = bench_scaling.parsed(
            ["--speed", "--recipe", RECIPE, "--batch", str(BATCH), "--steps", str(steps), "--device", options.device]
        )
        for planned, ranks, stage in runs(options.device):
            yield run(planned, asked, ranks, stage)


def run(planned: Planned, asked: argparse.Namespace, ranks: int, stage: int) -> Row:
    try:
        found = bench_scaling.start(asked, ranks, stage, LIMIT)
    except bench_scaling.RankFailed as error:
        full = "OutOfMemoryError" in str(error) or f"ended with {-signal.SIGKILL}:" in str(error)
        return planned.row("out of memory" if full else "failed", str(error))
    return planned.row("measured", seconds=tuple(found["seconds"]), peak_bytes=found["peak"])


def runs(device: str) -> list[tuple[Planned, int, int]]:
    """Rows, ranks and stages."""
    found = []
    for ranks in ranks_on(device):
        for stage in STAGES:
            size = f"{ranks} rank{'s' * (ranks > 1)}, ZeRO {stage}, batch {BATCH}"
            planned = Planned(Job("scaling", RECIPE, size, "bf16", "", "step"), "crossmask", True, BATCH)
            found.append((planned, ranks, stage))
    return found


def ranks_on(device: str) -> list[int]:
    """1, 2, 4, ... up to the GPUs there are; on a CPU 1 and 2."""
    most = max(1, torch.cuda.device_count()) if device == "cuda" else 2
    return [1 << power for power in range(most.bit_length())]
