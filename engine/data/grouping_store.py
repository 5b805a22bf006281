"""Features of every training sample on disk, as two epochs in turn have collected them.

::

    grouping/features-0.f16    (samples, 2, width) float16: of the image and of the text; of epochs 0, 2, 4 ...
             features-1.f16    of epochs 1, 3, 5 ...
             epochs.i32        (2, samples) int32: 1 + the epoch that a row of either file is of, 0 = of none

Mapped into memory: the pages in use are the operating system's to keep. A row's number is written after the row, and a
resumed run writes the rows of the steps it repeats once more, the same: a process that is killed leaves nothing to
mend.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np

from ..errors import CheckpointError


class FeatureStore:
    """Rows of features by sample and epoch. One thread writes; others may read rows that it does not write."""

    def __init__(self, folder: Path, size: int, width: int) -> None:
        """Open the files of ``folder``, or make them where one is missing or of another size: ``fresh`` says which.

        CheckpointError where there is no room for them: all of it is taken now, as a mapped file cannot fail in words.
        """
        self.folder, self.size, self.width = folder, size, width
        row = 2 * width * 2
        lengths = {"features-0.f16": size * row, "features-1.f16": size * row, "epochs.i32": 2 * size * 4}
        sizes = {name: (folder / name).stat().st_size for name in lengths if (folder / name).is_file()}
        self.fresh = sizes != lengths
        if self.fresh:
            folder.mkdir(parents=True, exist_ok=True)
            for name in reversed(lengths):  # first the numbers, that none is left which speaks of rows that are gone
                (folder / name).unlink(missing_ok=True)
            try:
                for name, length in lengths.items():
                    _make(folder / name, length)
            except OSError as error:
                raise CheckpointError(
                    f"{folder}: no room for {sum(lengths.values()) / 1e9:.2f} GB of features ({error.strerror}): make"
                    " room there, or set data.grouping.search_space to 0"
                ) from error
        shape = (size, 2, width)
        self._features = [np.memmap(folder / f"features-{n}.f16", np.float16, "r+", shape=shape) for n in (0, 1)]
        self._epochs = np.memmap(folder / "epochs.i32", np.int32, "r+", shape=(2, size))

    def write(self, epoch: int, rows: np.ndarray, features: np.ndarray) -> None:
        """``rows`` (n,) int64, each once; ``features`` (n, 2, E) float16."""
        self._features[epoch % 2][rows] = features
        self._epochs[epoch % 2, rows] = epoch + 1

    def read(self, epoch: int, rows: np.ndarray) -> np.ndarray:
        """(n, 2, E) float16; of rows that are :meth:`known`."""
        found: np.ndarray = self._features[epoch % 2][rows]
        return found

    def known(self, epoch: int) -> np.ndarray:
        """(size,) bool: which rows are of this epoch; none of an epoch below 0."""
        return np.asarray(self._epochs[epoch % 2] == epoch + 1) & (epoch >= 0)

    def flush(self) -> None:
        """To the disk: what a checkpoint counts on when the machine itself stops."""
        for mapped in self._features:
            mapped.flush()
        self._epochs.flush()


def _make(path: Path, length: int) -> None:
    with path.open("wb") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, length)
        except (AttributeError, OSError) as error:
            if isinstance(error, OSError) and error.errno not in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS):
                raise
            file.truncate(length)  # a file system that cannot reserve room
