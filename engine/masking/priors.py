"""Weights of patches from outside the model: what a batch's images show, or a file that a user brings."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..data.batch import Batch
from ..errors import RecipeError


class PatchPriors:
    """``masking.prior`` of a recipe: ``contrast`` (the standard deviation of a patch's pixels, which follows every
    augmentation), ``centre`` (a Gaussian around the middle of the image), or a ``.npy`` file of shape (P,) for all
    images or (training samples, P) for each. A file's weights are of images as they lie: with rows per sample set
    ``data.augment`` to 0. Held-out images, of which it knows nothing, get the mean of its rows.

    Raises:
        RecipeError: a file that is missing, not such an array, of another shape, or with weights below 0 or not finite.
    """

    def __init__(self, prior: Path | str, grid: tuple[int, int], samples: int) -> None:
        self.prior, self.grid = prior, grid
        self.table: np.ndarray | None = None
        self.mean: Tensor | None = None
        if prior == "centre":
            rows, columns = (((torch.arange(n) + 0.5) / n - 0.5) / 0.25 for n in grid)
            self.mean = torch.exp(-0.5 * (rows[:, None] ** 2 + columns[None, :] ** 2)).flatten()
        elif prior != "contrast":
            self.table, self.mean = _read(Path(prior), grid[0] * grid[1], samples)

    def __call__(self, batch: Batch, training: bool) -> Tensor:
        """(B, P) float32 on the batch's device. A file with rows per sample is read by ``batch.index``, so before the
        batch moves to a GPU."""
        if self.prior == "contrast":
            side = batch.images.shape[-1] // self.grid[1]
            pixels = F.unfold(batch.images.float(), side, stride=side)  # (B, 3 * side * side, P)
            return pixels.std(1)
        if training and self.table is not None:
            return torch.from_numpy(self.table[batch.index.numpy()].astype(np.float32))
        assert self.mean is not None
        return self.mean.to(batch.images.device).expand(len(batch), -1)


def _read(path: Path, patches: int, samples: int) -> tuple[np.ndarray | None, Tensor]:
    wanted = f"save a float array of shape ({patches},) or ({samples}, {patches}) with numpy.save"
    try:
        table = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise RecipeError(f"masking.prior: {path} cannot be read ({error}); {wanted}") from None
    if (
        not isinstance(table, np.ndarray)
        or table.dtype.kind not in "fiu"
        or table.shape not in ((patches,), (samples, patches))
    ):
        found = f"{table.dtype} {table.shape}" if isinstance(table, np.ndarray) else "an archive"
        raise RecipeError(f"masking.prior: {path} holds {found}; {wanted}")
    mean = np.zeros(patches)
    rows = table.reshape(-1, patches)
    for start in range(0, len(rows), 65536):  # the file may be larger than memory
        part = rows[start : start + 65536].astype(np.float64)
        bad = ~np.isfinite(part) | (part < 0)
        if bad.any():
            row, patch = np.argwhere(bad)[0]
            raise RecipeError(
                f"masking.prior: {path} has the weight {part[row, patch]:g} in row {start + row}, patch {patch}; "
                "weights are finite and at least 0"
            )
        mean += part.sum(0)
    return table if table.ndim == 2 else None, torch.from_numpy(mean / len(rows)).float()
