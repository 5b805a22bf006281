"""The run: from a recipe to a trained teacher, its evaluation and its report, whatever happens on the way."""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, closing, nullcontext, suppress
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist

from crossmask.kernels import native

from ..atomic import replace_file, writing_to
from ..beats import beat
from ..data import PairData, load_data
from ..evaluation import (
    build_report,
    describe_machine,
    evaluate,
    print_summary,
    snapshot_steps,
    write_batches,
    write_caption_gallery,
    write_composed_gallery,
    write_gallery,
    write_reconstructions,
    write_snapshot,
)
from ..evaluation.captioner import prompts_of
from ..evaluation.evaluate import frozen, further
from ..exported import describe_export, save_exported
from ..failures import EXIT_STOPPED, describe_failure
from ..masking import check_masking
from ..objectives import Terms
from ..recipe import Recipe
from .agreement import any_rank
from .checkpoint import CheckpointManager, CheckpointState
from .clock import Clock
from .display import TrainingDisplay, quiet
from .distributed import join, part
from .mask_notice import nothing_hidden
from .metrics import MetricWriter
from .pretrainer import Pretrainer
from .run_lock import run_lock
from .run_state import begin_folder, restore_state, state_of
from .signals import StopRequest
from .status import read_status, write_status


def pretrain(recipe: Recipe, run_dir: Path, resume: bool = False, data: PairData | None = None) -> int:
    """Run ``recipe`` on this rank, in ``run_dir``, from its latest checkpoint with ``resume``. Collective.

    ``data``: default the recipe's. Returns the exit code: 0 when the run is finished, 130 when it was asked to stop and
    saved a checkpoint.

    Raises:
        UserError: what the user can mend; ``status.json`` then says ``failed`` and why.
    """
    quiet()
    rank, world_size, device = join()
    try:
        return _train(recipe, run_dir, resume, data, rank, world_size, device)
    finally:
        part()


def _train(
    recipe: Recipe, run_dir: Path, resume: bool, data: PairData | None, rank: int, world_size: int, device: torch.device
) -> int:
    check_masking(recipe)  # an unknown policy is said before the data is read
    beat("reading the data")
    data = load_data(recipe) if data is None else data
    prompts_of(recipe, data)  # what is wrong with them is said before hours of work
    beat("building the model")
    pretrainer = Pretrainer(recipe, data, rank, world_size, device, resumed=resume, run_dir=run_dir)
    return train_here(pretrainer, run_dir, resume)


def train_here(pretrainer: Pretrainer, run_dir: Path, resume: bool) -> int:
    """The loop around a pretrainer, which is closed in the end. Collective."""
    run = Run(pretrainer.recipe, run_dir, pretrainer, pretrainer.rank, pretrainer.world_size)
    with (
        run_lock(run_dir, "trained") if pretrainer.rank == 0 else nullcontext(),
        StopRequest() as stop,
        closing(pretrainer),
    ):
        return run.go(stop, resume)


SLOW_SAVE_S = 2.0


class _Stopped(Exception):
    """Asked to stop while rank 0 measures what is already trained and saved."""


class Run:
    """The loop around a :class:`Pretrainer`: what is written, shown, saved and measured, and when."""

    def __init__(self, recipe: Recipe, run_dir: Path, pretrainer: Pretrainer, rank: int, world_size: int) -> None:
        self.recipe, self.run_dir, self.pretrainer = recipe, run_dir, pretrainer
        self.rank, self.world_size = rank, world_size
        self.first = rank == 0
        self.writer: MetricWriter | None = None  # rank 0's
        self.sums: dict[str, torch.Tensor] = {}
        self.counts: dict[str, int] = {}
        self.warned = False  # of masks that hide nothing

    def go(self, stop: StopRequest, resume: bool) -> int:
        recipe, pretrainer, total = self.recipe, self.pretrainer, self.recipe.training.max_steps
        messages: list[str] = []
        checkpoints = CheckpointManager(self.run_dir, recipe.training.keep_checkpoints, messages.append, recipe)
        if resume:
            beat("loading the checkpoint")
            self._restore(checkpoints.load(pretrainer.engine, pretrainer.teacher, pretrainer.queue))
        elif self.first:
            begin_folder(pretrainer, self.run_dir)
        self._status("running")

        with ExitStack() as stack:
            if self.first:
                writer = MetricWriter(self.run_dir, pretrainer.next_step if resume else None)
                self.writer = stack.enter_context(writer)
            machine = describe_machine(self.world_size)
            self.display = stack.enter_context(
                TrainingDisplay(
                    total,
                    recipe.name,
                    "\n".join([recipe.note, *recipe.notices(), *pretrainer.notices()]).strip(),
                    self.first,
                    start_step=pretrainer.next_step,
                    machine=str(machine.get("processor", "")),
                    ranks=self.world_size,
                    run_dir=self.run_dir,
                )
            )
            missing = native.status().missing(pretrainer.device.type)
            if missing:
                messages.append(f"the teacher follows by plain PyTorch, which is slower: {missing}")
            if resume and pretrainer.next_step >= total:
                messages.append(f"trained to step {total:,} already: evaluating again, in place of the last evaluation")
            for message in messages:
                self.display.message(message)
            try:
                if self._train(stop, checkpoints):
                    self._status("stopped", stop.reason or "asked to stop on another rank")
                    return EXIT_STOPPED
                evaluation = self._finish(stop)
                if evaluation is None:
                    self._status("stopped", "stopped while the finished model was being evaluated")
                    return EXIT_STOPPED
                self._status("finished")
                if self.first:
                    self.display.status("drawing the report")
                    build_report(self.run_dir)
            except BaseException as error:
                self._status("failed", describe_failure(error, self.rank).line)
                raise
        if self.first:
            if evaluation["splits"] or evaluation.get("composed"):
                print_summary(evaluation)
            print(f"\nreport: {self.run_dir / 'report.html'}", flush=True)
        return 0

    def _train(self, stop: StopRequest, checkpoints: CheckpointManager) -> bool:
        """Train to the end of the recipe; True when asked to stop before."""
        training, pretrainer = self.recipe.training, self.pretrainer
        every = training.evaluate_every
        saved, kept = pretrainer.next_step, snapshot_steps(training.max_steps)
        for line in pretrainer.begin():
            self.display.message(line)
        if pretrainer.next_step == 0:
            self._snapshot()
            if every:
                self._probe()
        since, logged = time.perf_counter(), pretrainer.next_step
        while pretrainer.next_step < training.max_steps:
            pretrainer.step()
            details, step = pretrainer.last, pretrainer.next_step
            assert details is not None
            beat("logging", step)
            last = step == training.max_steps
            clock = Clock(pretrainer.seconds)
            self._count(details.terms)
            for record in pretrainer.sampler.records():
                if self.writer is not None:
                    self.writer.write("order", step, record)
            if step % training.log_every == 0 or last:
                now, numbers = time.perf_counter(), details.numbers()
                numbers["samples_per_s"] = (step - logged) * training.batch_size / (now - since)
                self._log(step, numbers)
                since, logged = now, step
            stopping = stop.agree()
            before = clock.lap("logging")
            if every and step % every == 0:
                self._probe()
                clock.lap("probes")
            if step in kept:
                self._snapshot()
                clock.lap("probes")
            if stopping or last or step % training.checkpoint_every == 0:
                if step > saved:
                    self._save(checkpoints, step)
                    saved = step
                if stopping and not last:
                    return True
            since += clock.lap("checkpoints") - before  # neither is training
        return False

    def _save(self, checkpoints: CheckpointManager, step: int) -> None:
        p = self.pretrainer
        mine = {name: (value.item(), self.counts[name]) for name, value in self.sums.items()}
        unlogged: list[Any] = [mine] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(unlogged, mine)
        extra = state_of(p) | {"unlogged": unlogged}  # what each rank has summed since the last record
        # silent where it is quick, said where a person would begin to wonder
        slow = threading.Timer(SLOW_SAVE_S, self.display.status, [f"saving the checkpoint of step {step:,}"])
        slow.daemon = True
        slow.start()
        started = time.perf_counter()
        beat("saving the checkpoint", step)
        try:
            p.sampler.flush()
            path = checkpoints.save(step, p.engine, p.teacher, p.queue, extra)
        finally:
            slow.cancel()
            self.display.status(None)
        seconds = time.perf_counter() - started
        self.display.message(f"checkpoint {path.name} saved{f' in {seconds:.0f} s' if seconds > SLOW_SAVE_S else ''}")

    def _restore(self, state: CheckpointState) -> None:
        restore_state(self.pretrainer, state, self.run_dir)
        for name, (value, count) in _share_of(state.extra["unlogged"], self.rank, self.world_size).items():
            self.sums[name] = torch.tensor(value, dtype=torch.float64)
            self.counts[name] = int(count)

    def _count(self, terms: Terms) -> None:
        for name, value in terms.items():
            self.sums[name] = self.sums.get(name, 0.0) + value.double()
            self.counts[name] = self.counts.get(name, 0) + 1

    def _log(self, step: int, numbers: dict[str, float]) -> None:
        """One record: terms averaged over the steps since the last record and over ranks."""
        names = sorted(self.sums)  # the same on every rank: what a step computes depends on the step alone
        if names:
            mean = torch.stack([self.sums[n].to(self.pretrainer.device) / self.counts[n] for n in names])
            if self.world_size > 1:
                dist.all_reduce(mean)
            numbers |= dict(zip(names, (mean / self.world_size).tolist(), strict=True))
        self.sums, self.counts = {}, {}
        if self.writer is not None:
            numbers |= {"time_s": self.pretrainer.trained_s, "memory_mb": _memory_mb(self.pretrainer.device)}
            self.writer.train(step, **numbers)
            self.display.update(step, numbers)
            if not self.warned and (warning := nothing_hidden(numbers, self.recipe)) is not None:
                self.display.message(warning)
                self.warned = True

    def _probe(self) -> None:
        if not self.pretrainer.data.splits or self.recipe.model.system is not None:
            return
        beat("evaluation")
        with self.pretrainer.teacher.weights() as teacher:
            if self.writer is not None:
                self.display.status("looking at held-out data")
                self.writer.probe(self.pretrainer.next_step, self._evaluate(teacher, full=False))
                self.display.status(None)

    def _snapshot(self) -> None:
        """Keep the masks of a few held-out pairs as they are now, for the report. Collective."""
        p = self.pretrainer
        if not p.data.splits or self.recipe.model.system is not None:
            return
        beat("evaluation")
        with p.teacher.weights() as teacher:
            if self.first:
                write_snapshot(self.run_dir, p.next_step, teacher, p.data, p.look, self.recipe, p.device)

    def _evaluate(
        self, teacher: Any, full: bool, progress: Callable[[str], None] = lambda text: None
    ) -> dict[str, Any]:
        p = self.pretrainer
        return evaluate(
            teacher, p.data, p.look, self.recipe, p.device, full, temperature=p.temperature, progress=progress
        )

    def _finish(self, stop: StopRequest) -> dict[str, Any] | None:
        """Export, final evaluation, masked pairs. Collective; None on every rank when asked to stop meanwhile."""
        p = self.pretrainer
        beat("final evaluation")
        tensors = p.teacher.state_dict()
        if self.first:
            config = describe_export(self.recipe, "teacher", tensors, p.next_step, tokenizer=p.data.tokenizer)
            save_exported(self.run_dir / "export", tensors, config, p.data.tokenizer, force=True)
        result: dict[str, Any] | None = {"splits": {}}
        with p.teacher.weights() as teacher:
            if self.first:
                try:
                    result = self._measure(teacher, stop)
                except _Stopped:
                    result = None
            # Nobody leaves while rank 0 still measures.
            return None if any_rank(result is None) else result

    def _measure(self, teacher: Any, stop: StopRequest) -> dict[str, Any]:
        def progress(text: str) -> None:
            if stop.requested:
                raise _Stopped
            self.display.status(f"evaluating: {text}")

        p, minutes = self.pretrainer, self.pretrainer.trained_s / 60
        measured: dict[str, Any] = {"splits": {}, "seed": self.recipe.seed}
        if p.data.splits:
            measured = self._evaluate(teacher, True, progress)
        elif p.data.composed:  # triplets alone, of which no text describes its image
            with frozen(teacher, self.recipe.seed):
                measured |= further(teacher, p.data, self.recipe, p.device, progress)
        else:
            self.display.message("nothing was held out (data.validation_fraction is 0), so nothing is evaluated")
        measured |= {"machine": describe_machine(self.world_size), "steps": p.next_step, "minutes": minutes}
        if p.device.type == "cpu":  # elsewhere the host's clock does not see where the device spends its time
            measured["seconds_by_part"] = {part: round(seconds, 3) for part, seconds in p.seconds.items()}
        with writing_to(self.run_dir):
            replace_file(self.run_dir / "evaluation.json", json.dumps(measured, indent=1))
        if p.data.splits and self.recipe.model.system is None:
            progress("drawing masked pairs")
            write_gallery(self.run_dir, teacher, p.data, p.look, self.recipe, p.device)
            write_reconstructions(self.run_dir, teacher, p.data, p.look, self.recipe, p.device)
            write_caption_gallery(self.run_dir, measured, p.data)
        write_composed_gallery(self.run_dir, measured, p.data)
        examples = p.sampler.examples(2)
        if examples is not None:
            progress("drawing batches")
            write_batches(self.run_dir, p.data, examples)
        return measured

    def _status(self, state: str, reason: str = "") -> None:
        """Rank 0's word; of a failure the first rank's to meet one, as rank 0 may be waiting for it in vain."""
        failed = state == "failed"
        if self.first if not failed else read_status(self.run_dir).get("state") == "running":
            # A full disk must not hide what went wrong before.
            with suppress(OSError) if failed else writing_to(self.run_dir):
                write_status(self.run_dir, state, self.pretrainer.next_step, reason)


def _share_of(unlogged: list[dict[str, tuple[float, int]]], rank: int, ranks: int) -> dict[str, tuple[float, int]]:
    """What this rank had summed; where another number of ranks saved it, their mean: the record stays the same."""
    if len(unlogged) == ranks:
        return unlogged[rank]
    means = {name: math.fsum(one[name][0] for one in unlogged) / len(unlogged) for name in unlogged[0]}
    return {name: (mean, unlogged[0][name][1]) for name, mean in means.items()}  # counts are the same on every rank


def _memory_mb(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return psutil.Process().memory_info().rss / 2**20
