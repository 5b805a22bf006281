"""Checkpoints that survive a crash at any moment, and are verified before anything in them is opened.

::

    checkpoints/latest                          name of the newest checkpoint, replaced atomically at the very end
    checkpoints/step-000500/student/*.pt        DeepSpeed's own files: weights, ZeRO shards, optimizer
                            teacher.safetensors whole fp32 tensors, independent of ZeRO stage and world size
                            queue.safetensors
                            rng-rank00.safetensors ...
                            state.json          step, world size, ZeRO stage, counters, whatever the loop adds
                            recipe.yaml         what the run was told to do when this was saved
                            manifest.json       size and SHA-256 of every file above
    checkpoints/step-000500-universal/          the same, with student/zero/PARAMETER/*.pt for any number of ranks
                                                (``crossmask reshard``, see reshard.py)
    checkpoints/step-000600.partial/            being written, or left by a crash; removed by the next save

All ranks write to one (shared) file system. Each rank hashes what it wrote, and verifies its share of what is loaded.

Trust: a file is opened only where the manifest names it and its hash matches, which protects from damage. DeepSpeed's
``.pt`` files are pickles, and are loaded as plain data only (student_files.py): none can run code. The others are
safetensors, JSON and YAML.
"""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ..beats import beat
from ..errors import CheckpointError
from ..recipe import Recipe
from ..recipe_files import dump_recipe
from ..teacher import FeatureQueue, Teacher, world_size
from .agreement import first_error, rank_of_process
from .checkpoint_state import QUEUE, RECIPE, STATE, TEACHER, CheckpointState, Inspection, inspect, random_file
from .manifest import (
    PARTIAL,
    STUDENT,
    Entry,
    describe,
    entries,
    files_of,
    hashing,
    is_disk_full,
    one_line,
    replace_text,
    seal,
    start_afresh,
    system_error,
    write_json,
    write_text,
)
from .random_state import capture_random_state, restore_random_state, seed_random_state
from .recipe_change import check_recipe
from .student_files import is_universal, load_student, more_than_data, read_unmoved, student_files_written_by

FOLDER, LATEST = "checkpoints", "latest"
UNIVERSAL = "-universal"
# Whatever DeepSpeed, torch and safetensors stumble over in files that are not what they expect.
UNREADABLE = (
    *(OSError, RuntimeError, ValueError, KeyError, IndexError, AssertionError, TypeError, AttributeError),
    SafetensorError,
)
_NAME = re.compile(rf"step-(\d+)({UNIVERSAL})?")


class CheckpointManager:
    """Saves and loads the checkpoints of one run folder; :meth:`save` and :meth:`load` are collective."""

    def __init__(
        self,
        run_dir: Path | str,
        keep: int = 2,
        warn: Callable[[str], None] | None = None,
        recipe: Recipe | None = None,
    ) -> None:
        """
        Args:
            keep: newest steps whose checkpoints stay (>= 1).
            warn: takes one line; default the module's logger.
            recipe: the run's. It goes into every checkpoint, and is compared with the one in what is loaded.
        """
        if keep < 1:
            raise ValueError(f"keep {keep} checkpoints: at least one must stay")
        self.run_dir, self.folder, self.keep, self.recipe = Path(run_dir), Path(run_dir) / FOLDER, keep, recipe
        self._damaged: set[str] = set()  # names of the checkpoints that were found to be so
        self._warn = warn or logging.getLogger(__name__).warning

    # -- saving ---------------------------------------------------------------------------------------------------

    def save(
        self, step: int, engine: Any, teacher: Teacher, queue: FeatureQueue, extra: Mapping[str, Any] | None = None
    ) -> Path:
        """Writes checkpoint ``step`` and makes it the latest; returns its folder. ``extra`` goes through JSON.

        CheckpointError on every rank where any rank cannot write: what was begun is removed, earlier ones are intact.
        """
        final = self.folder / f"step-{step:06d}"
        partial = final.with_name(final.name + PARTIAL)
        rank = rank_of_process()
        errors: list[str] = []
        written: dict[str, Future[Entry]] = {}

        def attempt(action: Callable[..., Any], *arguments: Any, what: str = "") -> None:
            # torch's zip writer turns a full disk into a RuntimeError, safetensors into its own.
            try:
                action(*arguments)
            except (OSError, RuntimeError, SafetensorError) as error:
                errors.append(what + one_line(error))

        def write(action: Callable[[Any, Path], Any], content: Any, path: Path) -> None:
            def both() -> None:
                beat("saving the checkpoint")
                action(content, path)
                written[path.relative_to(partial).as_posix()] = pool.submit(describe, path)

            attempt(both, what=f"{path.name}: ")

        if rank == 0:
            attempt(start_afresh, partial)
        self._check(errors, step, partial)

        with hashing() as pool:  # while the next file is written
            with student_files_written_by(engine, lambda state, path: write(_save_pickled, state, Path(path))):
                engine.save_checkpoint(str(partial), tag=STUDENT, save_latest=False)
            write(save_file, capture_random_state(), partial / random_file(rank))
            tensors = teacher.state_dict()  # collective
            if rank == 0:
                state = CheckpointState(
                    step, world_size(), int(engine.zero_optimization_stage()), teacher.updates, dict(extra or {})
                )
                write(save_file, tensors, partial / TEACHER)
                write(save_file, queue.state_dict(), partial / QUEUE)
                write(lambda values, path: write_json(path, values), vars(state), partial / STATE)
                if self.recipe:
                    write(lambda text, path: write_text(path, text), dump_recipe(self.recipe), partial / RECIPE)
            del tensors
            for name, entry in written.items():
                attempt(entry.result, what=f"{name}: ")
        self._check(errors, step, partial)

        described = _from_all_ranks({name: entry.result() for name, entry in written.items()})
        begun = partial
        if rank == 0:
            attempt(seal, partial, final, {name: entry for files in described for name, entry in files.items()})
            begun = partial if partial.exists() else final
            if not errors:
                attempt(replace_text, self.folder / LATEST, final.name)
        self._check(errors, step, begun)
        if rank == 0:
            self._prune(final)
        return final

    def _check(self, errors: list[str], step: int, begun: Path) -> None:
        """Raises on every rank where one of them failed; what was ``begun`` is removed, unless ``latest`` names it."""
        error = first_error(errors[0] if errors else None)
        if error is None:
            return
        latest = self.latest_name()
        if rank_of_process() == 0 and begun.name != latest:
            shutil.rmtree(begun, ignore_errors=True)
        left = f"{latest} is intact" if latest else "there is no earlier one"
        if is_disk_full(error):
            left += ": make room"
        raise CheckpointError(f"the checkpoint of step {step} could not be saved in {self.folder}: {error}; {left}")

    def _prune(self, newest: Path) -> None:
        """Removes all but ``newest`` and those of the ``keep`` - 1 steps before it, and the damaged ones first of all.

        Later steps, of a run that was taken back by hand, do not count and stay until they are overtaken.
        """
        step, present = _step_of(newest), self._complete()
        self._damaged.discard(newest.name)  # if it was, it has just been replaced
        good = {_step_of(path) for path in present if path.name not in self._damaged}
        earlier = sorted((one for one in good if one < step), reverse=True)
        kept = good - set(earlier[self.keep - 1 :])
        for path in sorted(present, key=lambda path: path.name not in self._damaged):
            if _step_of(path) not in kept or path.name in self._damaged:
                shutil.rmtree(path, ignore_errors=True)
                if path.exists():
                    self._warn(f"the old checkpoint {path} could not be removed: delete it by hand")

    # -- loading --------------------------------------------------------------------------------------------------

    def load(self, engine: Any, teacher: Teacher, queue: FeatureQueue) -> CheckpointState:
        """Restores the latest good checkpoint into the three and the random generators, and returns its state.

        A damaged one is named in a warning, file and all, and the one before it is used. CheckpointError where none
        is usable, where the ZeRO stage differs, where the number of ranks differs and the checkpoint is not universal,
        and where recipe or contents do not fit. Ranks that did not save theirs are given random generators that follow
        from the recipe's seed, the rank and the step.
        """
        folder, state = self._choose(int(engine.zero_optimization_stage()))
        rank = rank_of_process()
        # What a rank can read by itself comes first: the ranks can still agree then. DeepSpeed's part has collectives
        # in it: a rank that fails there must leave at once, the others wait for it in vain until they are ended.
        error: str | None = None
        mine: dict[str, torch.Tensor] | None = None
        try:
            tensors, queued = load_file(folder / TEACHER), load_file(folder / QUEUE)
            unmoved = read_unmoved(folder / STUDENT)
            if rank < state.world_size:
                mine = load_file(folder / random_file(rank))
        except UNREADABLE as problem:
            error = _unreadable(folder, problem)
        if (error := first_error(error)) is not None:
            raise CheckpointError(error)
        try:
            load_student(engine, folder / STUDENT, unmoved)
            teacher.load_state_dict(tensors, state.teacher_updates)
            queue.load_state_dict(queued)
            if mine is not None:
                restore_random_state(mine)
            else:
                seed_random_state(self.recipe.seed if self.recipe else 0, rank, state.step)
        except UNREADABLE as problem:
            where = f"rank {rank}: " if world_size() > 1 else ""
            raise CheckpointError(where + _unreadable(folder, problem)) from problem
        return state

    def verified(
        self,
        step: int | None = None,
        needed: Callable[[str], bool] = lambda name: True,
        tell: Callable[[str], None] = lambda line: None,
    ) -> tuple[Path, CheckpointState]:
        """The latest checkpoint whose every file matches its manifest. Local: for one process, no engine needed.

        Args:
            step: that of this step, in either of its forms, and no other.
            needed: whether a file's contents matter, by its path inside the checkpoint.
            tell: takes a line before each checkpoint that is read.

        Raises:
            CheckpointError: there is none.
        """
        candidates, remarks = self._candidates()
        for remark in remarks if step is None else ():
            self._warn(remark)
        if step is not None:
            steps = sorted({_step_of(path) for path in candidates})
            candidates = [path for path in candidates if _step_of(path) == step]
            if not candidates:
                there = f"there {'are' if len(steps) > 1 else 'is'} {', '.join(map(str, steps)) or 'none yet'}"
                raise CheckpointError(f"{self.folder} has no checkpoint of step {step}; {there}")

        def verify(candidate: Path) -> Inspection:
            size = sum(path.stat().st_size for name, path in files_of(candidate).items() if needed(name))
            tell(f"verifying {size / 1e6:,.1f} MB of {candidate.name}")
            return inspect(candidate, needed=needed)

        return self._first_good(candidates, verify, step)

    def _first_good(
        self, candidates: list[Path], verify: Callable[[Path], Inspection], step: int | None = None
    ) -> tuple[Path, CheckpointState]:
        damages = []
        for candidate in candidates:
            damage, state = verify(candidate)
            if damage is None and state is not None:
                return candidate, state
            self._damaged.add(candidate.name)
            damages.append(f"{candidate.name}: {damage}")
            if step is not None and candidate == candidates[-1]:
                raise CheckpointError(f"checkpoint {candidate} is damaged ({damage}): take another step")
            if rank_of_process() == 0:
                self._warn(f"checkpoint {candidate} is damaged ({damage}): trying the one before it")
        raise CheckpointError(
            f"{self.folder} holds no usable checkpoint{f' ({damages[0]})' if damages else ''}: "
            "start the run again, or copy a good checkpoint back"
        )

    def _candidates(self) -> tuple[list[Path], list[str]]:
        """Finished checkpoints in the order in which to try them, and what is odd about that."""
        if not self.folder.is_dir():
            raise CheckpointError(f"{self.run_dir} has no checkpoints yet: there is nothing to resume or export")
        candidates = self._complete()
        latest = self.latest_name()
        if latest is None:
            odd = f"{self.folder / LATEST} is missing: looking for the newest good checkpoint"
            return candidates, [odd] if candidates else []
        if (named := self.folder / latest) not in candidates:
            odd = f"{self.folder / LATEST} names {latest}, which is missing: looking for the newest good one"
            return candidates, [odd]
        return [named, *(path for path in candidates if path != named)], []

    def _choose(self, stage: int) -> tuple[Path, CheckpointState]:
        """Rank 0 says what to try, and every rank reads a share of it. Collective."""
        plan: list[Any] = [[], None]
        if rank_of_process() == 0:
            try:
                candidates, remarks = self._candidates()
                plan = [[str(path) for path in candidates], None]
                for remark in remarks:
                    self._warn(remark)
            except CheckpointError as error:
                plan[1] = str(error)
        if world_size() > 1:
            dist.broadcast_object_list(plan, src=0)
        if plan[1] is not None:
            raise CheckpointError(plan[1])

        def verify(candidate: Path) -> Inspection:
            damage, state = inspect(candidate, rank_of_process(), world_size())
            return _first(_from_all_ranks(damage)), state

        folder, state = self._first_good([Path(path) for path in plan[0]], verify)
        if misfit := _first(_from_all_ranks(self._misfit(folder, state, stage))):
            raise CheckpointError(misfit)
        refused = _from_all_ranks(more_than_data(folder / STUDENT, rank_of_process(), world_size()))
        for problem in filter(None, refused):
            raise CheckpointError(f"{folder}: {problem}; it was not opened: do not resume what you do not trust")
        return folder, state

    def _misfit(self, folder: Path, state: CheckpointState, stage: int) -> str | None:
        """Why this run is not one that can continue the checkpoint."""
        if state.zero_stage != stage:
            return (
                f"{folder} was saved under ZeRO stage {state.zero_stage}, this run uses stage {stage}: set "
                f"zero_optimization.stage to {state.zero_stage}"
            )
        if state.world_size != world_size() and stage > 0 and not is_universal(folder / STUDENT):
            return (
                f"{folder} was saved by {_ranks(state.world_size)}, this run has {_ranks(world_size())}: use --ranks "
                f"{state.world_size}, or make it load into any number with: crossmask reshard {self.run_dir}"
            )
        try:
            if self.recipe and RECIPE in entries(folder):
                remarks = check_recipe((folder / RECIPE).read_text(encoding="utf-8"), self.recipe, folder.name)
                for remark in remarks if rank_of_process() == 0 else ():
                    self._warn(remark)
        except CheckpointError as error:
            return str(error)
        except (OSError, ValueError) as error:
            return _unreadable(folder, error)
        return None

    def _complete(self) -> list[Path]:
        """Finished checkpoints, newest first; of one step, the universal one first."""
        found = [path for path in self.folder.glob("step-*") if path.is_dir() and _NAME.fullmatch(path.name)]
        return sorted(found, key=lambda path: (_step_of(path), path.name), reverse=True)

    def latest_name(self) -> str | None:
        """What ``latest`` says; None where it cannot be read."""
        try:
            name = (self.folder / LATEST).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError):
            return None
        return name or None


def _unreadable(folder: Path, error: Exception) -> str:
    """A disk that fails is not the recipe's fault."""
    if system_error(error):
        return f"{folder} cannot be read: {one_line(error)}"
    return f"{folder} cannot be loaded into this recipe's model: {one_line(error)}"


def _save_pickled(state: Any, path: Path) -> None:
    with open(path, "wb") as file:
        torch.save(state, file)


def _from_all_ranks(value: Any) -> Iterator[Any]:
    """What every rank passed, in rank order. Collective."""
    values: list[Any] = [value] * world_size()
    if world_size() > 1:
        dist.all_gather_object(values, value)
    return iter(values)


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removesuffix(UNIVERSAL)[5:])


def _first(found: Iterator[str | None]) -> str | None:
    return next(filter(None, found), None)


def _ranks(count: int) -> str:
    return "1 rank" if count == 1 else f"{count} ranks"
