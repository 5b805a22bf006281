"""Weights of patches from outside the model: from pixels, the middle, a file; and files that cannot be used."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from crossmask.engine.data.batch import Batch
from crossmask.engine.errors import RecipeError
from crossmask.engine.masking.priors import PatchPriors

GRID = (2, 3)


def batch(index: list[int]) -> Batch:
    """Images of 8 x 12 pixels in patches of 4: flat but for patch 4, the middle of the lower row."""
    n = len(index)
    images = torch.zeros(n, 3, 8, 12)
    images[:, :, 4:, 4:8] = torch.randn(n, 3, 4, 4)
    ids = torch.zeros(n, 3, dtype=torch.int64)
    return Batch(images, ids, ids == 0, ids == 0, torch.arange(n), torch.tensor(index))


def test_contrast_is_where_the_pixels_differ() -> None:
    found = PatchPriors("contrast", GRID, 5)(batch([0, 1]), training=True)
    assert found.shape == (2, 6)
    assert (found[:, 4] > 0.5).all()
    assert (found[:, [0, 1, 2, 3, 5]] == 0).all()


def test_centre_falls_off_from_the_middle() -> None:
    found = PatchPriors("centre", (5, 5), 5)(batch([0]), training=False)[0].reshape(5, 5)
    assert found[2, 2] == found.max() == 1
    assert found[2, 2] > found[2, 1] > found[2, 0] > found[0, 0] > 0
    torch.testing.assert_close(found, found.flip(0))
    torch.testing.assert_close(found, found.T)


def test_rows_of_a_file_belong_to_samples_and_their_mean_to_held_out_ones(tmp_path: Path) -> None:
    table = np.random.default_rng(0).random((5, 6)).astype(np.float32)
    np.save(tmp_path / "p.npy", table)
    priors = PatchPriors(tmp_path / "p.npy", GRID, 5)
    np.testing.assert_array_equal(priors(batch([3, 0]), training=True).numpy(), table[[3, 0]])
    np.testing.assert_allclose(
        priors(batch([3, 0]), training=False).numpy(), table.mean(0)[None].repeat(2, 0), rtol=1e-6
    )


def test_one_row_is_for_every_sample(tmp_path: Path) -> None:
    np.save(tmp_path / "p.npy", np.arange(6))
    found = PatchPriors(tmp_path / "p.npy", GRID, 5)(batch([3, 0]), training=True)
    assert found.tolist() == [[0, 1, 2, 3, 4, 5]] * 2


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (np.ones((4, 6)), r"holds float64 \(4, 6\); save a float array of shape \(6,\) or \(5, 6\) with numpy.save"),
        (np.array(["a"] * 6), "holds <U1"),
        (-np.ones(6), "has the weight -1 in row 0, patch 0; weights are finite and at least 0"),
        (np.array([1, 1, np.nan, 1, 1, 1]), "has the weight nan in row 0, patch 2"),
        (np.array([object()] * 6), "cannot be read"),  # a pickle, which is not opened
    ],
    ids=["shape", "text", "negative", "nan", "pickle"],
)
def test_files_that_cannot_be_used(tmp_path: Path, table: np.ndarray, message: str) -> None:
    np.save(tmp_path / "p.npy", table)
    with pytest.raises(RecipeError, match=message) as caught:
        PatchPriors(tmp_path / "p.npy", GRID, 5)
    assert "\n" not in str(caught.value)
    assert "masking.prior" in str(caught.value)


def test_a_file_that_is_no_array(tmp_path: Path) -> None:
    (tmp_path / "p.npy").write_bytes(b"nothing of the kind")
    with pytest.raises(RecipeError, match="cannot be read"):
        PatchPriors(tmp_path / "p.npy", GRID, 5)
    np.savez(tmp_path / "q.npz", a=np.ones(6))
    with pytest.raises(RecipeError, match="holds an archive"):
        PatchPriors(tmp_path / "q.npz", GRID, 5)
