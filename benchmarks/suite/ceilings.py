"""What this machine does at most, measured in the run whose figures are shares of it.

Copy and in-place update of arrays that no cache holds, and a square matrix product in each dtype by whoever is fastest.
Each is the best of several tries spread over the run, since a ceiling that something else disturbed is none.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from crossmask.kernels.linear import api as linear

from .clock import Clock
from .results import Ceilings

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TRIES = 5


class Gauge:
    """Ceilings, as far as they are known; every ``measure`` can only raise them."""

    def __init__(self, device: torch.device, dtypes: tuple[str, ...]) -> None:
        self.clock = Clock(device)
        self.dtypes = dtypes
        self.found = Ceilings(0.0, 0.0, dict.fromkeys(dtypes, 0.0))
        cuda = device.type == "cuda"
        self.elements = 2**30 // 4  # a gigabyte each: beyond the last cache of a large server
        self.side = 8192 if cuda else 1536

    def measure(self, tries: int = TRIES) -> Ceilings:
        copied, updated = self._memory(tries)
        gemm = {}
        for name in self.dtypes:
            fastest = min(
                self.clock([product])[0] for product in self._products(DTYPES[name]) for _ in range(tries + 1)
            )
            gemm[name] = max(self.found.gemm[name], 2 * self.side**3 / fastest)
        self.found = Ceilings(max(self.found.copy, copied), max(self.found.update, updated), gemm)
        return self.found

    def _memory(self, tries: int) -> tuple[float, float]:
        """Bytes/s of a copy, and of an update in place."""
        x, y = (torch.ones(self.elements, device=self.clock.device) for _ in range(2))
        copied = min(self.clock([lambda: y.copy_(x)])[0] for _ in range(tries))
        updated = min(self.clock([lambda: y.add_(x, alpha=1e-6)])[0] for _ in range(tries))
        return 2 * x.nbytes / copied, 3 * x.nbytes / updated

    def _products(self, dtype: torch.dtype) -> list[Callable[[], object]]:
        """Ways to the same product: PyTorch's, and oneDNN's where that is the faster one in float32."""
        a, b = (torch.randn(self.side, self.side, device=self.clock.device).to(dtype) for _ in range(2))
        out = torch.empty_like(a)
        found: list[Callable[[], object]] = [lambda: torch.mm(a, b, out=out)]
        if self.clock.device.type == "cpu" and dtype == torch.float32 and linear.applies():
            found.append(lambda: linear.linear(a, b))
        return found
