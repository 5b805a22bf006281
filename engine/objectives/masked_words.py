"""Where the words to predict stand, so that nothing is computed at other places."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class MaskedWords:
    """The N masked words of R captions. Rows with fewer than M of them are filled with places that do not count."""

    places: Tensor  # (R, M) int64: positions, each row's masked words first and ascending; M is at least 1
    chosen: Tensor  # (N,) int64: which of the R * M places hold a masked word, row by row

    @classmethod
    def of(cls, masked: Tensor) -> MaskedWords:
        """Of (R, L) bool, True = masked. The shapes depend on it, so this waits for the device, once."""
        count = masked.sum(1)
        longest, total = torch.stack([count.max(), count.sum()]).tolist()
        places = torch.argsort(~masked, dim=1, stable=True)[:, : max(1, longest)]
        real = torch.arange(places.shape[1], device=masked.device) < count[:, None]
        return cls(places, torch.argsort(~real.flatten(), stable=True)[:total])

    def take(self, found: Tensor) -> Tensor:
        """(R, M, ...) of the places -> (N, ...) of the masked words, in the order of the mask's True entries."""
        return found.flatten(0, 1).index_select(0, self.chosen)
