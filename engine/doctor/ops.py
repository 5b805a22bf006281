"""Each op of crossmask.kernels: which implementation runs on which device, and whether its tiles know the GPU."""

from __future__ import annotations

import importlib
import importlib.util
import os
import pkgutil
from collections.abc import Callable, Iterable, Iterator

from .finding import Finding


def kernels(gpus: tuple[str, ...] = ()) -> Iterator[Finding]:
    """One line an op for the devices of this machine, of which ``gpus`` are the architectures."""
    package = importlib.import_module("crossmask.kernels")
    devices = ["cpu", *(["cuda"] if gpus else [])]
    for module in pkgutil.iter_modules(package.__path__):
        if not module.ispkg or importlib.util.find_spec(f"{package.__name__}.{module.name}.api") is None:
            continue
        api = importlib.import_module(f"{package.__name__}.{module.name}.api")
        # an op with more than its reference says which implementation runs for a device type
        tell: Callable[[str], str] = getattr(api, "implementation", lambda device: "reference")
        runs = {device: tell(device).replace("reference", "plain PyTorch") for device in devices}
        yield Finding(module.name, ", ".join(f"{what} on {device}" for device, what in runs.items()))
    if gpus:
        from crossmask.kernels.cross_attention.triton.configs import FAMILIES

        yield from tiles(gpus, [name for name in FAMILIES if name != "any"])


def tiles(gpus: Iterable[str], compiled: Iterable[str]) -> Iterator[Finding]:
    """Whether the Triton kernels' tiles were chosen, and compiled ahead, for these GPUs."""
    known = list(compiled)
    for name in sorted(set(gpus)):
        if name in known:
            yield Finding("Triton tiles", f"chosen for {name}, and compiled for it ahead of time")
            continue
        lower = [x for x in known if x.startswith("sm_") and name.startswith("sm_") and int(x[3:]) <= int(name[3:])]
        nearest = max(lower, key=lambda x: int(x[3:])) if lower else "the smallest there are"
        yield Finding(
            "Triton tiles",
            f"none chosen for {name}: those of {nearest} are taken, which nobody compiled for it",
            "gap",
            "time them once on this GPU: python -m crossmask.kernels.cross_attention.triton.tune",
        )


def interpreted(environment: dict[str, str] | None = None) -> bool:
    """Whether Triton runs its kernels in its interpreter."""
    value = (os.environ if environment is None else environment).get("TRITON_INTERPRET", "0")
    return value.lower() in ("1", "true", "on", "yes", "y")
