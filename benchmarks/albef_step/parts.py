"""Where the time of our step goes, beside what its multiplications alone need."""

from __future__ import annotations

from typing import Any

import torch
from suite.steps.trace import Seconds, labelled, trace

from . import flops
from .ours import OurStep
from .sizes import Captioned, Sizes

# Of flops.least, which parts below it is the cost of. The contrast's and the heads' are in the rest of their pass.
PARTS = {
    "image towers": ("image tower", "teacher's image tower"),
    "text towers": ("text tower", "teacher's text tower"),
    "images' keys and values": ("images' keys and values", "teacher's keys and values"),
    "fusion for ITM": ("fusion for ITM",),
    "fusion for MLM": ("fusion for MLM", "teacher's fusion"),
    "vocabulary": ("vocabulary",),
    "contrast": ("contrast",),
}


def seconds(step: OurStep, batch: Captioned) -> tuple[Seconds, float]:
    """Of one step: part -> (forward, backward) seconds, and the whole step's. Profiling itself costs some percent."""
    found = trace(lambda: step(batch), labelled(step.pretrainer), torch.device("cpu"))
    return found.parts, found.seconds


def rows(sizes: Sizes, longest: int, found: dict[str, tuple[float, float]], rate: float) -> list[dict[str, Any]]:
    """Each part's seconds beside those that its multiplications alone need at ``rate`` FLOP/s."""
    least = flops.least(sizes, flops.Work.expected(sizes, longest))
    told: list[dict[str, Any]] = []
    left = dict(found)
    for name, parts in PARTS.items():
        taken = [left.pop(part, (0.0, 0.0)) for part in parts]
        row = {"part": name, "forward": taken[0][0], "backward": taken[0][1]}
        row |= {"teacher": sum(sum(pair) for pair in taken[1:]), "needed": least[name] / rate}
        told.append(row)
    told += [
        {"part": name, "forward": pair[0], "backward": pair[1], "teacher": 0.0, "needed": 0.0}
        for name, pair in sorted(left.items(), key=lambda item: -sum(item[1]))
    ]
    return told
