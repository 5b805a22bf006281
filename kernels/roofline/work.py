"""What an operation does, whatever the device: bytes to and from memory, and floating-point operations.

The functions that work it out for each op stand beside this file, one subject each: ``attention.py``,
``attention_backward.py``, ``selection.py``, ``contrastive.py``, ``cross_entropy.py`` and ``training.py``. Their rules:

* ``read`` and ``written`` are bytes that have to cross the memory bus: what one launch reads several times counts once
  (the cache holds it, or ought to), what two launches read counts twice.
* ``kept`` is the part of them that a cache as large as all of the op's tensors would save: what one of its launches
  writes or reads and a later one reads again. The rest no cache can save.
* ``requested`` counts every read that is asked for, however often: what reaches the caches. requested - read is what
  they have to serve; a kernel that is near neither roof may be bound by it.
* ``flops`` are those of matrix products, two for each multiply-add, by the dtype that the matrix units see. Only
  elements that exist count, not the padding of a tile.
* ``vector`` is everything else in float32, an exponential or a logarithm as one. It is an estimate, to within a few
  operations an element; it never decides but for float32 and very narrow heads.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from .devices import Device

BYTES = {"bf16": 2, "fp16": 2, "tf32": 4, "fp32": 4}


@dataclass(frozen=True)
class Work:
    """FLOPs and bytes. Add what runs one after the other, multiply what runs several times."""

    flops: Mapping[str, float] = field(default_factory=dict)  # of matrix products, by dtype
    vector: float = 0.0  # float32 operations outside them
    read: float = 0.0  # bytes from memory
    written: float = 0.0  # bytes to memory
    kept: float = 0.0  # bytes of read and written that a large cache would save
    requested: float = 0.0  # bytes that loads ask for

    def __add__(self, other: Work) -> Work:
        dtypes = {**self.flops, **other.flops}
        return Work(
            {dtype: self.flops.get(dtype, 0.0) + other.flops.get(dtype, 0.0) for dtype in dtypes},
            self.vector + other.vector,
            self.read + other.read,
            self.written + other.written,
            self.kept + other.kept,
            self.requested + other.requested,
        )

    def __mul__(self, times: float) -> Work:
        return Work(
            {dtype: count * times for dtype, count in self.flops.items()},
            self.vector * times,
            self.read * times,
            self.written * times,
            self.kept * times,
            self.requested * times,
        )

    __rmul__ = __mul__

    @property
    def bytes(self) -> float:
        return self.read + self.written

    @property
    def intensity(self) -> float:
        """FLOPs a byte."""
        total = sum(self.flops.values()) + self.vector
        return total / self.bytes if self.bytes else float("inf") if total else 0.0

    def matrix_seconds(self, device: Device) -> float:
        """Of the products alone."""
        return sum(count / device.matrix[dtype] for dtype, count in self.flops.items())

    def vector_seconds(self, device: Device) -> float:
        return self.vector / device.vector

    def memory_seconds(self, device: Device) -> float:
        return self.bytes / device.bandwidth

    def seconds(self, device: Device) -> float:
        """The roofline where matrix and other arithmetic take turns, and loads and stores hide behind both."""
        return max(self.matrix_seconds(device) + self.vector_seconds(device), self.memory_seconds(device))

    def lower_bound(self, device: Device) -> float:
        """Seconds that nothing can beat: everything hides behind whatever takes longest, and caches save all they can.

        What no cache saves assumes that the inputs lie in memory when the op begins, and the results when it ends.
        """
        memory = (self.bytes - self.kept) / device.bandwidth
        return max(self.matrix_seconds(device), self.vector_seconds(device), memory)

    def bound(self, device: Device) -> str:
        """What ``seconds`` is made of: "memory" or "compute"."""
        arithmetic = self.matrix_seconds(device) + self.vector_seconds(device)
        return "compute" if arithmetic > self.memory_seconds(device) else "memory"
