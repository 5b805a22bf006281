"""Large results on a CPU in huge pages.

To fault in a gradient of a whole vocabulary by pages of 4 KiB takes as long as to compute it, at each call: memory of
this size goes back to the system when it is freed.
"""

from __future__ import annotations

import ctypes
import mmap
import sys

import torch
from torch import Tensor

SMALLEST = 2**25  # bytes from which on glibc gives every allocation a mapping of its own
_MADVISE = getattr(ctypes.CDLL(None), "madvise", None) if sys.platform == "linux" else None


def empty_like(x: Tensor) -> Tensor:
    """Contiguous and uninitialised, of x's shape, dtype and device; in huge pages where the system has them to give."""
    found = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.device.type == "cpu" and found.nbytes >= SMALLEST and _MADVISE is not None:
        start = -(-found.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        length = (found.data_ptr() + found.nbytes - start) // mmap.PAGESIZE * mmap.PAGESIZE
        _MADVISE(ctypes.c_void_p(start), ctypes.c_size_t(length), mmap.MADV_HUGEPAGE)  # advice: refused is as well
    return found
