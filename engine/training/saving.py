"""The run folder of a loop that is not ours: begun once, locked while it is written to."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import CheckpointError
from .agreement import by_first_rank
from .checkpoint import CheckpointManager
from .run_lock import run_lock
from .run_state import begin_folder, restore_state, state_of

if TYPE_CHECKING:
    from .pretrainer import Pretrainer


class RunFolder:
    """Where a pretrainer saves, and the lock on it."""

    def __init__(self, pretrainer: Pretrainer, run_dir: Path, goes_on: bool) -> None:
        """Collective. ``goes_on``: the pretrainer has been loaded from there.

        Raises:
            UserError: another process trains there, it holds another run, or it cannot be written.
        """
        self.run_dir, self._lock = run_dir, ExitStack()
        self._manager = CheckpointManager(run_dir, pretrainer.recipe.training.keep_checkpoints, None, pretrainer.recipe)

        def take() -> None:
            if not goes_on:
                refuse_other_run(run_dir)
            self._lock.enter_context(run_lock(run_dir, "trained"))
            begin_folder(pretrainer, run_dir)

        by_first_rank(take)

    def save(self, pretrainer: Pretrainer) -> Path:
        """A checkpoint of now; its folder. Collective."""
        p = pretrainer
        p.sampler.flush()
        return self._manager.save(p.next_step, p.engine, p.teacher, p.queue, state_of(p))

    def close(self) -> None:
        """Let go of the lock."""
        self._lock.close()


def refuse_other_run(run_dir: Path) -> None:
    """CheckpointError where a folder is a run's already."""
    if (run_dir / "recipe.yaml").exists():
        raise CheckpointError(
            f"{run_dir} holds another run: go on from it with Pretrainer.load or resume=True, or take another folder"
        )


def hand_over(kept: RunFolder | None, run_dir: Path, resume: bool) -> None:
    """The loop takes the lock itself, and begins a run only where no other one is. Collective."""
    if kept is not None:
        kept.close()
    if not resume and (kept is None or kept.run_dir != run_dir):
        by_first_rank(lambda: refuse_other_run(run_dir))


def load_latest(pretrainer: Pretrainer, run_dir: Path) -> None:
    """The latest good checkpoint of a run's folder into a pretrainer. Collective."""
    p = pretrainer
    manager = CheckpointManager(run_dir, p.recipe.training.keep_checkpoints, None, p.recipe)
    restore_state(p, manager.load(p.engine, p.teacher, p.queue), run_dir)
