"""Checkpoints that survive a crash at any moment, and are verified before anything in them is opened.

::

    checkpoints/latest                          name of the newest checkpoint, replaced atomically at the very end
    checkpoints/step-000500/student/*.pt        DeepSpeed's own files: weights, ZeRO shards, optimizer, scheduler
                            teacher.safetensors whole fp32 tensors, independent of ZeRO stage and world size
                            queue.safetensors
                            rng-rank00.safetensors ...
                            state.json          step, world size, ZeRO stage, counters, whatever the loop adds
                            manifest.json       size and SHA-256 of every file above
    checkpoints/step-000600.partial/            being written, or left by a crash; removed by the next save

All ranks write to one (shared) file system.

Trust: DeepSpeed unpickles its ``.pt`` files (``weights_only=False``), and a pickle can run code. A file is opened only
where the manifest names it and its hash matches, which protects from damage, not from malice: resume only runs whose
folder you trust. Teacher, queue, RNG and state are safetensors and JSON and carry no code.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ..errors import CheckpointError
from ..teacher import FeatureQueue, Teacher, world_size
from ..teacher.zero import student_files_written_by
from .agreement import first_error, rank_of_process
from .random_state import capture_random_state, restore_random_state

FOLDER, LATEST, MANIFEST, STATE = "checkpoints", "latest", "manifest.json", "state.json"
STUDENT, TEACHER, QUEUE = "student", "teacher.safetensors", "queue.safetensors"
PARTIAL = ".partial"
FORMAT = 1


@dataclass(frozen=True)
class CheckpointState:
    """What a checkpoint says of itself. ``extra`` is what the loop passed to save()."""

    step: int
    world_size: int
    zero_stage: int
    teacher_updates: int
    extra: dict[str, Any] = field(default_factory=dict)


class CheckpointManager:
    """Saves and loads the checkpoints of one run folder; every method but :meth:`verified` is collective."""

    def __init__(self, run_dir: Path | str, keep: int = 2, warn: Callable[[str], None] | None = None) -> None:
        """``keep``: newest checkpoints that stay (>= 1). ``warn`` takes one line; default the module's logger."""
        if keep < 1:
            raise ValueError(f"keep {keep} checkpoints: at least one must stay")
        self.folder, self.keep = Path(run_dir) / FOLDER, keep
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

        def attempt(action: Callable[..., Any], *arguments: Any) -> None:
            # torch's zip writer turns a full disk into a RuntimeError, safetensors into its own.
            try:
                action(*arguments)
            except (OSError, RuntimeError, SafetensorError) as error:
                errors.append(_one_line(error))

        if rank == 0:
            attempt(_start_afresh, partial)
        self._check(errors, step, partial)

        with student_files_written_by(engine, lambda state, path: attempt(_save_pickled, state, path)):
            engine.save_checkpoint(str(partial), tag=STUDENT, save_latest=False)
        attempt(save_file, capture_random_state(), partial / _random_file(rank))
        tensors = teacher.state_dict()  # collective
        if rank == 0:
            state = CheckpointState(
                step, world_size(), int(engine.zero_optimization_stage()), teacher.updates, dict(extra or {})
            )
            attempt(save_file, tensors, partial / TEACHER)
            attempt(save_file, queue.state_dict(), partial / QUEUE)
            attempt(_write_json, partial / STATE, vars(state))
        del tensors
        self._check(errors, step, partial)

        if rank == 0:
            attempt(_seal, partial, final)
            if not errors:
                attempt(_replace_text, self.folder / LATEST, final.name)
        self._check(errors, step, partial)
        if rank == 0:
            self._prune(final)
        return final

    def _check(self, errors: list[str], step: int, partial: Path) -> None:
        """Raises on every rank where one of them failed."""
        error = first_error("; ".join(errors) or None)
        if error is None:
            return
        if rank_of_process() == 0:
            shutil.rmtree(partial, ignore_errors=True)
        latest = self._latest_name()
        left = f"{latest} is intact" if latest else "there is no earlier one"
        raise CheckpointError(f"the checkpoint of step {step} could not be saved in {self.folder}: {error}; {left}")

    def _prune(self, newest: Path) -> None:
        """Removes all but the newest ``keep`` checkpoints; the one just written always stays."""
        others = [path for path in self._complete() if path != newest]
        for path in others[self.keep - 1 :]:
            shutil.rmtree(path, ignore_errors=True)
            if path.exists():
                self._warn(f"the old checkpoint {path} could not be removed: delete it by hand")

    # -- loading --------------------------------------------------------------------------------------------------

    def load(self, engine: Any, teacher: Teacher, queue: FeatureQueue) -> CheckpointState:
        """Restores the latest good checkpoint into the three and the random generators, and returns its state.

        A damaged one is named in a warning, file and all, and the one before it is used. CheckpointError where none
        is usable, where the number of ranks or the ZeRO stage differs, and where the contents do not fit the model.
        """
        folder, state = self._choose(int(engine.zero_optimization_stage()))
        error: str | None = None
        try:
            path, _ = engine.load_checkpoint(str(folder), tag=STUDENT)
            if path is None:
                raise RuntimeError("DeepSpeed found nothing to load")
            teacher.load_state_dict(load_file(folder / TEACHER), state.teacher_updates)
            queue.load_state_dict(load_file(folder / QUEUE))
            restore_random_state(load_file(folder / _random_file(rank_of_process())))
        except (OSError, RuntimeError, ValueError, KeyError, SafetensorError) as problem:
            error = _one_line(problem)
        error = first_error(error)
        if error is not None:
            raise CheckpointError(f"{folder} does not fit this recipe's model: {error}")
        return state

    def verified(self) -> tuple[Path, CheckpointState]:
        """The latest checkpoint whose every file matches its manifest. Local: for one process, no engine needed.

        CheckpointError where there is none.
        """
        if not self.folder.is_dir():
            raise CheckpointError(f"{self.folder.parent} has no checkpoints: there is nothing to resume from")
        candidates = self._complete()
        latest = self._latest_name()
        if latest is None:
            if candidates:
                self._warn(f"{self.folder / LATEST} is missing: looking for the newest good checkpoint")
        elif (named := self.folder / latest) not in candidates:
            self._warn(f"{self.folder / LATEST} names {latest}, which is missing: looking for the newest good one")
        else:
            candidates = [named, *(path for path in candidates if path != named)]
        damages = []
        for candidate in candidates:
            damage = find_damage(candidate)
            if damage is None:
                return candidate, read_state(candidate)
            damages.append(f"{candidate.name}: {damage}")
            self._warn(f"checkpoint {candidate} is damaged ({damage}): trying the one before it")
        raise CheckpointError(
            f"{self.folder} holds no usable checkpoint{f' ({damages[0]})' if damages else ''}: "
            "start the run again, or copy a good checkpoint back"
        )

    def _choose(self, stage: int) -> tuple[Path, CheckpointState]:
        """Rank 0 verifies and decides, the others follow."""
        decision: list[Any] = [None, None, None]
        if rank_of_process() == 0:
            try:
                folder, state = self.verified()
                decision = [str(folder), vars(state), None]
            except CheckpointError as error:
                decision[2] = str(error)
        if world_size() > 1:
            dist.broadcast_object_list(decision, src=0)
        if decision[2] is not None:
            raise CheckpointError(decision[2])
        folder, state = Path(decision[0]), CheckpointState(**decision[1])
        if state.world_size != world_size():
            raise CheckpointError(
                f"{folder} was saved by {_ranks(state.world_size)}, this run has {_ranks(world_size())}: ZeRO's "
                f"optimizer shards load only into the same number; start {_ranks(state.world_size)}"
            )
        if state.zero_stage != stage:
            raise CheckpointError(
                f"{folder} was saved under ZeRO stage {state.zero_stage}, this run uses stage {stage}: set "
                f"zero_optimization.stage to {state.zero_stage}"
            )
        return folder, state

    def _complete(self) -> list[Path]:
        """Finished checkpoints, newest first."""
        found = [path for path in self.folder.glob("step-*") if path.is_dir() and path.name[5:].isdigit()]
        return sorted(found, key=lambda path: int(path.name[5:]), reverse=True)

    def _latest_name(self) -> str | None:
        try:
            name = (self.folder / LATEST).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError):
            return None
        return name or None


def find_damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint's files, naming the first bad one; None where all match the manifest."""
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_bytes())
        files = manifest["files"]
        if manifest["sha256"] != _digest_of(files):
            return f"{MANIFEST}: contents changed"
    except FileNotFoundError:
        return f"{MANIFEST}: missing"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{MANIFEST}: unreadable, {type(error).__name__}"
    present = _files_of(checkpoint)
    for name in sorted(present.keys() - files.keys()):
        return f"{name}: not in the manifest"
    for name, expected in files.items():
        path = present.get(name)
        if path is None:
            return f"{name}: missing"
        try:
            size = path.stat().st_size
            if size != expected["bytes"]:
                return f"{name}: {size} bytes instead of {expected['bytes']}"
            if _digest(path) != expected["sha256"]:
                return f"{name}: contents changed"
        except OSError as error:
            return f"{name}: {_one_line(error)}"
    return None


def read_state(checkpoint: Path) -> CheckpointState:
    """The state of a verified checkpoint."""
    values = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
    return CheckpointState(**values)


def _start_afresh(partial: Path) -> None:
    partial.parent.mkdir(parents=True, exist_ok=True)
    for left_over in partial.parent.glob("step-*" + PARTIAL):
        shutil.rmtree(left_over)
    partial.mkdir()


def _save_pickled(state: Any, path: str) -> None:
    with open(path, "wb") as file:
        torch.save(state, file)


def _seal(partial: Path, final: Path) -> None:
    """Manifest, everything on the disk, then the final name; an earlier checkpoint of this step is replaced."""
    files = {
        name: {"bytes": path.stat().st_size, "sha256": _digest(path, flush=True)}
        for name, path in _files_of(partial).items()
    }
    _write_json(partial / MANIFEST, {"format": FORMAT, "files": files, "sha256": _digest_of(files)})
    for folder in [partial, *(path for path in partial.rglob("*") if path.is_dir())]:
        _flush_folder(folder)
    replaced = final.with_name(f"{final.name}.replaced{PARTIAL}")
    if final.exists():
        os.replace(final, replaced)
    os.replace(partial, final)
    _flush_folder(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _files_of(checkpoint: Path) -> dict[str, Path]:
    """Every file but the manifest, by its path inside the checkpoint, sorted."""
    found = {path.relative_to(checkpoint).as_posix(): path for path in checkpoint.rglob("*") if path.is_file()}
    return {name: found[name] for name in sorted(found) if name != MANIFEST}


def _digest(path: Path, flush: bool = False) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        if flush:
            os.fsync(file.fileno())
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _digest_of(files: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def _write_json(path: Path, value: Any) -> None:
    with open(path, "w", encoding="utf-8") as file:
        json.dump(value, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def _replace_text(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.new")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    _flush_folder(path.parent)


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _random_file(rank: int) -> str:
    return f"rng-rank{rank:02d}.safetensors"


def _ranks(count: int) -> str:
    return "1 rank" if count == 1 else f"{count} ranks"


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
