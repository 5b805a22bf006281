"""Words without the padding between them: what a linear layer computes of padding, nobody reads."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Packing:
    """Where the N words of a padded batch stand."""

    index: Tensor  # (N,) int64, of the batch's flattened places
    rows: int  # B
    length: int  # L

    @classmethod
    def of(cls, mask: Tensor) -> Packing | None:
        """Of (B, L) bool, True = a word; None on a device that is not a CPU: there the host would have to wait for N,
        and shapes that change from batch to batch cost more than padding does.

        A batch without padding is packed too: who packs may run other modules than who does not, and under ZeRO stage 3
        all ranks have to run the same ones, whatever their batches are.
        """
        if mask.device.type != "cpu" or torch.compiler.is_compiling():
            return None
        return cls(mask.flatten().nonzero()[:, 0], *mask.shape)

    def pack(self, x: Tensor) -> Tensor:
        """(B, L, ...) -> (N, ...)"""
        return x.flatten(0, 1).index_select(0, self.index)

    def pad(self, x: Tensor) -> Tensor:
        """(N, ...) -> (B, L, ...), zeros at padding"""
        places = x.new_zeros(self.rows * self.length, *x.shape[1:])
        return places.index_copy(0, self.index, x).unflatten(0, (self.rows, self.length))
