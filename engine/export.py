"""``crossmask export``: a run's teacher or student, from a checkpoint of any ZeRO stage and world size, as a folder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from .errors import CheckpointError
from .exported import DTYPES, Weights, describe_export, refuse_occupied, save_exported
from .plugins import import_plugins
from .training.manifest import STUDENT
from .training.stored import read_run


def export_run(
    run: Path,
    folder: Path,
    weights: Weights = "teacher",
    step: int | None = None,
    dtype: str = "fp32",
    force: bool = False,
    tell: Callable[[str], None] = lambda line: None,
    plugins: Sequence[str] = (),
) -> str:
    """Write ``run``'s latest good checkpoint, or that of ``step``, to ``folder``; returns a line that says what it is.

    No data and no GPU are needed; for the student DeepSpeed is. ``tell`` takes one line at a time.
    ``plugins`` are modules to import, which register a system of one's own: those of the run's recipe are not imported.

    Raises:
        CheckpointError: no run, no usable checkpoint, files that do not fit together, a folder that is in the way.
    """
    if dtype not in DTYPES:
        raise CheckpointError(f"--dtype {dtype}: choose {', '.join(DTYPES)}")
    refuse_occupied(folder, force)
    import_plugins(plugins, "--plugin")
    recipe, at, found = read_run(run, {STUDENT} if weights == "student" else (), step, tell)
    tensors = found.teacher if found.student is None else found.student
    config = describe_export(recipe, weights, tensors, at, dtype, found.tokenizer)
    save_exported(folder, tensors, config, found.tokenizer, force)
    size = sum(file.stat().st_size for file in folder.iterdir())
    return (
        f"{folder}: the {weights} after {at:,} steps, {config.parameters:,} parameters in {dtype}, "
        f'{size / 1e6:,.1f} MB; load it with load_exported("{folder}"), see {folder / "README.md"}'
    )
