"""Which products of matrices a step takes, to tell algorithm and library apart; and memory between two steps."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from crossmask.kernels.linear import api as products

from .sizes import Captioned


@contextmanager
def pytorchs_products() -> Iterator[None]:
    """Inside, float32 matrices are multiplied by what PyTorch takes for them."""
    applies = products.applies
    products.applies = lambda: False  # type: ignore[assignment]
    try:
        yield
    finally:
        products.applies = applies


def without_onednn(step: Callable[[Captioned], Any]) -> Callable[[Captioned], Any]:
    def run(batch: Captioned) -> Any:
        with pytorchs_products():
            return step(batch)

    return run


def give_back() -> None:
    """Memory of what was deleted, to the system."""
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
