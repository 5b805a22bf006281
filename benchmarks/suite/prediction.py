"""What kernels.roofline predicts of our launches on a GPU, as ``Problem.seconds`` wants it."""

from __future__ import annotations

from collections.abc import Callable

from crossmask.kernels.roofline import Device, Work, device
from crossmask.kernels.roofline.launches import Op

Done = Callable[[Device, bool], "Op | Work"]  # of a GPU, and whether of the backward


def seconds_of(done: Done) -> Callable[[str, str], tuple[float, float]]:
    """Of a GPU's name and a way: seconds at least, and one launch after the other."""

    def found(name: str, way: str) -> tuple[float, float]:
        gpu = device(name)
        each = [done(gpu, backward) for backward in {"forward": (False,), "backward": (True,)}.get(way, (False, True))]
        least = sum((one.work() if isinstance(one, Op) else one).lower_bound(gpu) for one in each)
        return least, sum(one.seconds(gpu) for one in each)

    return found
