"""Settings every test runs under. They stand before torch is imported, because that is when they are read."""

from __future__ import annotations

import os
import sys

# Transformers looks for a package of this name; from the root of the checkout it would import this one's kernels a
# second time under it, and their ops would be registered twice.
sys.modules.setdefault("kernels", None)  # type: ignore[arg-type]

for name, value in {
    "OMP_NUM_THREADS": "1",  # small tensors, and tests that start several ranks
    "TOKENIZERS_PARALLELISM": "false",
    "MPLBACKEND": "Agg",
    "HF_HUB_OFFLINE": "1",  # a test that reaches for the network is a defect
    "COLUMNS": "120",  # rich wraps the same everywhere
    "CROSSMASK_CACHE": "off",  # nothing is kept of shards that a test makes, and nothing found of another's
}.items():
    os.environ.setdefault(name, value)

import pytest  # noqa: E402
import torch  # noqa: E402

if not torch.cuda.is_available():
    # Triton reads it when a kernel is defined: without a GPU the kernels run in its interpreter, on CPU tensors
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
