"""Which implementation of the walk runs. It walks on the host wherever the features lie."""

from __future__ import annotations

from typing import Literal, get_args

from .. import native

Implementation = Literal["native", "reference"]
IMPLEMENTATIONS: tuple[str, ...] = get_args(Implementation)


def choose(impl: str | None) -> str:
    """The name of the implementation that runs; ``impl`` None picks one.

    Raises:
        ValueError: ``impl`` is unknown or cannot run, with what can.
    """
    missing = native.status().missing("cpu")
    if impl is None:
        return "reference" if missing else "native"
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"unknown implementation {impl!r}; choose from {list(IMPLEMENTATIONS)}")
    if impl == "native" and missing:
        raise ValueError(f"impl='native': {missing}; or use impl='reference'")
    return impl


def implementation(device_type: str) -> str:
    """What ``impl=None`` picks for features on this device type; ``crossmask doctor`` shows it."""
    return choose(None)
