"""What a run measures, written while it runs: ``metrics.jsonl`` for programs, TensorBoard for eyes."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from contextlib import closing, nullcontext, suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from ..atomic import replace_file, writing_to
from ..errors import CheckpointError
from ..evaluation.run_folder import METRICS_FILE, read_metrics

__all__ = ["MetricWriter", "read_metrics"]

LOSS_TERMS = ("loss", "itc", "itm", "mlm", "mim", "caption", "tg_mim")
TENSORBOARD_GROUPS = {
    "losses": LOSS_TERMS,
    "optimizer": ("lr", "gradient_norm", "skipped_steps", "temperature"),
    "masks": ("image_mask_ratio", "text_mask_ratio", "masked_rows", "masked_images", "low_mask_ratio"),
    "accuracy": ("itm_accuracy", "mlm_accuracy"),
    "machine": ("samples_per_s", "memory_mb"),
}
_GROUP_OF = {name: group for group, names in TENSORBOARD_GROUPS.items() for name in names}


class MetricWriter:
    """Appends one JSON object a line and mirrors the numbers to TensorBoard. One writer a run, on rank 0.

    Each line goes to the operating system before ``write`` returns, so a crash loses at most the line being written.
    NaN and infinities become ``null``: the file stays strict JSON.

    Args:
        run_dir: the run folder, created if need be.
        resume_step: the step a resumed run continues after: later lines, and a broken last one, are dropped, and
            TensorBoard is told to forget them. ``None`` starts a new run.

    Raises:
        CheckpointError: a new run in a folder that already has metrics, or one that cannot be written, now or later.
    """

    def __init__(self, run_dir: Path | str, resume_step: int | None = None) -> None:
        self.path = Path(run_dir) / METRICS_FILE
        with writing_to(self.path.parent):
            self._open(resume_step)

    def _open(self, resume_step: int | None) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if resume_step is not None:
            self._drop_after(resume_step)
        elif self.path.exists() and self.path.stat().st_size:
            raise CheckpointError(
                f"{self.path.parent} already holds a run; continue it with --resume or choose another output folder"
            )
        # Imported here: it takes a second, and only rank 0 needs it.
        from torch.utils.tensorboard import SummaryWriter

        purge = None if resume_step is None else resume_step + 1
        self._board: Any = SummaryWriter(str(self.path.parent / "tensorboard"), purge_step=purge, flush_secs=20)
        self._file: IO[str] = self.path.open("a", encoding="utf-8")

    def train(self, step: int, **fields: float | int | None) -> None:
        """One training step's record."""
        self.write("train", step, fields)

    def probe(self, step: int, fields: Mapping[str, Any]) -> None:
        """One look at held-out data, as :func:`crossmask.engine.evaluation.evaluate` returns it."""
        self.write("probe", step, fields)

    def write(self, kind: str, step: int, fields: Mapping[str, Any]) -> None:
        record = {"kind": kind, "step": int(step), **{name: _plain(value) for name, value in fields.items()}}
        with writing_to(self.path.parent):
            self._file.write(json.dumps(record, allow_nan=False) + "\n")
            self._file.flush()
            for name, value in record.items():
                if name in ("kind", "step", "epoch", "time_s") or not isinstance(value, (int, float)):
                    continue
                group = "probe" if kind == "probe" else _GROUP_OF.get(name, "other")
                self._board.add_scalar(f"{group}/{'total' if name == 'loss' else name}", value, int(step))

    def close(self) -> None:
        if not self._file.closed:
            with writing_to(self.path.parent), closing(self._board), self._file:
                self._file.flush()
                os.fsync(self._file.fileno())

    def __enter__(self) -> MetricWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        with suppress(CheckpointError) if error else nullcontext():  # a full disk must not hide what went wrong before
            self.close()

    def _drop_after(self, step: int) -> None:
        kept = [r for r in read_metrics(self.path.parent) if int(r.get("step", 0)) <= step]
        replace_file(self.path, "".join(json.dumps(record) + "\n" for record in kept), durable=True)


def _plain(value: Any) -> Any:
    """Tensors and numpy scalars as Python numbers; what is not finite as ``None``."""
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
