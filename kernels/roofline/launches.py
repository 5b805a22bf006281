"""What one launch reads and writes, tensor by tensor, and an op as the launches that it is made of.

Tensors go by the names of the kernel's parameters, which is how benchmarks/traffic.py finds them again when it counts
what a kernel really loads and stores in Triton's interpreter. Launches of PyTorch's own have names in lower case with
a dot in them, and cannot be counted there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from .devices import Device
from .work import Work


class Read(NamedTuple):
    """Bytes of a tensor that a launch reads. What the launch itself has written before is requested, but not unique."""

    unique: int  # at least once
    requested: int  # as often as it is asked for


@dataclass(frozen=True)
class Launch:
    kernel: str
    reads: Mapping[str, Read]
    writes: Mapping[str, int]
    products: int = 0  # FLOPs of matrix products, of elements that exist
    issued: int = 0  # the same with what pads the tiles: what tl.dot is asked for
    vector: int = 0  # an estimate
    tensors: Mapping[str, str] = field(default_factory=dict)  # what a parameter is called in the op, where not the same

    def work(self, dtype: str) -> Work:
        return Work(
            {dtype: float(self.products)} if self.products else {},
            float(self.vector),
            float(sum(read.unique for read in self.reads.values())),
            float(sum(self.writes.values())),
            0.0,
            float(sum(read.requested for read in self.reads.values())),
        )


@dataclass(frozen=True)
class Op:
    """Launches one after the other; ``results`` names the tensors that are left when the last one ends."""

    dtype: str
    launches: Sequence[Launch]
    results: frozenset[str] = field(default_factory=frozenset)

    def work(self) -> Work:
        """Their sum, with what a cache could keep: results and inputs cross the bus once, all else not at all."""
        total = sum((launch.work(self.dtype) for launch in self.launches), Work())
        inputs: dict[str, int] = {}
        written: dict[str, int] = {}
        for launch in self.launches:
            for parameter, read in launch.reads.items():
                name = launch.tensors.get(parameter, parameter)
                if name not in written:
                    inputs[name] = max(inputs.get(name, 0), read.unique)
            for parameter, size in launch.writes.items():
                name = launch.tensors.get(parameter, parameter)
                written[name] = written.get(name, 0) + size
        needed = sum(inputs.values()) + sum(size for name, size in written.items() if name in self.results)
        return Work(
            total.flops, total.vector, total.read, total.written, max(0.0, total.bytes - needed), total.requested
        )

    def seconds(self, device: Device) -> float:
        """The roofline launch by launch, with nothing left in the caches from one to the next."""
        return sum(launch.work(self.dtype).seconds(device) for launch in self.launches)

    @property
    def issued(self) -> int:
        return sum(launch.issued for launch in self.launches)


def once(size: int) -> Read:
    """Read once, by one program."""
    return Read(size, size)


def tiles(length: int, block: int) -> int:
    return -(-length // block)
