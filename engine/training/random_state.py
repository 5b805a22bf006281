"""The random generators of one process as plain tensors, so that they are stored without pickle."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor


def capture_random_state() -> dict[str, Tensor]:
    """torch's (CPU and current CUDA device), numpy's global and Python's generator, as tensors on the CPU."""
    version, internal, gauss = random.getstate()
    numpy_state = np.random.get_state(legacy=False)  # noqa: NPY002 - libraries draw from it
    assert isinstance(numpy_state, dict)
    # The few scalars travel as JSON text: repr keeps every bit of a float.
    scalars = json.dumps(
        {
            "python": [version, gauss],
            "numpy": [
                numpy_state["bit_generator"],
                int(numpy_state["state"]["pos"]),
                int(numpy_state["has_gauss"]),
                float(numpy_state["gauss"]),
            ],
        }
    )
    state = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor(internal, dtype=torch.int64),
        "numpy": torch.from_numpy(numpy_state["state"]["key"].astype(np.int64)),
        "scalars": torch.frombuffer(bytearray(scalars.encode()), dtype=torch.uint8),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore_random_state(state: Mapping[str, Tensor]) -> None:
    """Undoes :func:`capture_random_state`; the CUDA part only where there is a CUDA device."""
    scalars = json.loads(bytes(state["scalars"].tolist()))
    version, gauss = scalars["python"]
    random.setstate((version, tuple(state["python"].tolist()), gauss))
    name, position, has_gauss, numpy_gauss = scalars["numpy"]
    np.random.set_state((name, state["numpy"].numpy().astype(np.uint32), position, has_gauss, numpy_gauss))  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def seed_random_state(seed: int, rank: int, step: int) -> None:
    """The same generators, started afresh for a rank that has none saved: a function of the three numbers alone."""
    digest = hashlib.sha256(f"{seed} {rank} {step}".encode()).digest()
    value = int.from_bytes(digest[:8], "little")
    random.seed(value)
    np.random.seed(value % 2**32)  # noqa: NPY002
    torch.manual_seed(value)  # of every device
