"""Student, teacher, queue and data of one rank, and the step that moves them: the engine as a library."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from ..beats import beat
from ..data import PairData, load_data
from ..data.batch import Batch
from ..data.prefetch import Prefetcher
from ..deepspeed_config import build_deepspeed_config
from ..exported import describe_export, save_exported
from ..masking import Draws, MaskPlan, check_masking
from ..masking.heads import head_masks
from ..models.fusion import FusionEncoder
from ..objectives import RunMasks, Seen, Terms
from ..recipe import Recipe
from ..teacher import FeatureQueue, Teacher, gather_features, initialize_untouched, named_schedule
from .agreement import by_first_rank
from .clock import Clock
from .distributed import join, part
from .families import MicroStep, check_kinds
from .initial import Initial
from .nonfinite import NonFiniteGuard
from .optimizer import build_optimizer, learning_rate
from .sampling import build_sampler
from .saving import RunFolder, hand_over, load_latest
from .step import Schedule
from .systems import build_system


@dataclass(frozen=True)
class StepDetails:
    """What a step did. Plain numbers are the same on every rank, tensors are this rank's own."""

    step: int  # taken so far, this one included
    terms: Terms  # detached scalars, means over micro-batches: losses and measures; empty where the step was left out
    lr: float
    epoch: float
    gradient_norm: float  # nan where the step was left out
    skipped: bool  # left out, as a loss or a gradient was not finite
    skipped_steps: int  # so far

    def numbers(self) -> dict[str, float]:
        """As a record of ``metrics.jsonl`` has them."""
        told = {"lr": self.lr, "epoch": self.epoch, "gradient_norm": self.gradient_norm}
        return {**told, "skipped_steps": float(self.skipped_steps)}


class Pretrainer:
    """One rank's share of a run, in a loop of your own or in :meth:`train`'s.

    :meth:`step` is one optimizer step on every rank. What it does depends only on the recipe, the number of the step,
    the batch and the state that a checkpoint holds, so a resumed run continues as if nothing had happened.

    A process group that is there is used, under any launcher; else one is begun, and ended by :meth:`close`.
    """

    def __init__(
        self,
        recipe: Recipe,
        data: PairData | None = None,
        rank: int | None = None,
        world_size: int | None = None,
        device: torch.device | None = None,
        resumed: bool = False,
        run_dir: Path | None = None,
    ) -> None:
        """
        Args:
            data: default the recipe's.
            rank, world_size, device: default as the launcher says, and one rank without any.
            resumed: a checkpoint will be loaded, so the weights that the recipe starts from are not looked for.
            run_dir: needed where ``data.grouping`` is on.

        Raises:
            UserError: a recipe, data or weights that cannot be used; one line.
        """
        check_kinds(recipe, data)
        self._ending = ExitStack()
        if rank is None or world_size is None or device is None:
            check_masking(recipe)  # an unknown policy is said before the seconds of DeepSpeed's import
            rank, world_size, device = join()
            self._ending.callback(part)
        try:
            self._build(recipe, data, rank, world_size, device, resumed, run_dir)
        except BaseException:
            self._ending.close()
            raise

    def _build(
        self,
        recipe: Recipe,
        data: PairData | None,
        rank: int,
        world_size: int,
        device: torch.device,
        resumed: bool,
        run_dir: Path | None,
    ) -> None:
        data = load_data(recipe) if data is None else data
        self.recipe, self.data, self.rank, self.world_size, self.device = recipe, data, rank, world_size, device
        training, model = recipe.training, recipe.model
        self.masks = RunMasks(recipe, data)
        torch.manual_seed(recipe.seed)  # the same initial weights on every rank
        self.system = build_system(recipe, data, self.masks)
        student = self.system.build_student()
        initial = None if resumed else Initial(student, recipe, data.tokenizer)
        optimizer = build_optimizer(student, recipe.optimizer)
        self.engine: Any = initialize_untouched(
            student, optimizer, build_deepspeed_config(recipe, world_size, device.type)
        )
        self.teacher = Teacher(
            self.engine,
            self.system.build_teacher,
            named_schedule(recipe.teacher.schedule, recipe.teacher.momentum, training.max_steps),
            buffers=recipe.teacher.buffers,
        )
        itc = recipe.objectives.itc
        self.queue = FeatureQueue(
            itc.queue_length,
            model.projection_width,
            device,
            random_seed=recipe.seed if itc.queue_initial == "random" else None,
        )
        self._notices: list[str] = []
        if initial is not None:
            self._notices = initial.notices
            if initial.teacher is not None:
                self.teacher.load_state_dict(initial.teacher)
            if initial.queue is not None:
                self.queue.load_state_dict(initial.queue)
        self.sampler = build_sampler(recipe, data, rank, world_size, device, run_dir)
        self._ending.callback(lambda: self.sampler.close())
        self.prefetcher = Prefetcher(self._batch, recipe.data.prefetch, recipe.data.workers, device)
        self._ending.callback(lambda: self.prefetcher.close())
        self.guard = NonFiniteGuard(training.max_nonfinite, data.name_of)
        self.next_step = 0
        self.last: StepDetails | None = None  # what the latest step did
        self.seconds: dict[str, float] = {}  # where the time went, by part, since the start
        self._temperature: float | Tensor = itc.temperature
        self._trained_before, self._since, self._begun = 0.0, 0.0, False
        self._folder: RunFolder | None = None  # that save() writes to
        self._loaded: Path | None = None
        torch.manual_seed(recipe.seed + 1 + rank)  # from here on ranks draw their own dropout

    # -- training -------------------------------------------------------------------------------------------------

    def notices(self) -> list[str]:
        """Lines for the start of a run: what of the data is left out, which weights are new, and what of the recipe so
        many ranks leave out."""
        training = self.recipe.training
        pairs = training.batch_size // (self.sampler.world_size * training.accumulation_steps)
        if pairs > 1 or self.recipe.objectives.itm.weight == 0:
            return [*self.data.notices(), *self.sampler.notices(), *self._notices]
        alone = "ITM is left out: a rank's batch is one pair, of which there is no negative (training.batch_size)"
        return [*self.data.notices(), *self.sampler.notices(), *self._notices, alone]

    def begin(self) -> list[str]:
        """Before the first step of this process, which calls it where nobody has: lines for a person. Collective."""
        if self._begun:
            return []
        self._begun, self._since = True, time.perf_counter()
        return self.sampler.begin(self.next_step)

    def batches(self) -> Iterator[Batch]:
        """This rank's share of each coming step, on the CPU, from where the run stands to ``training.max_steps``.

        Raises:
            RuntimeError: asked for the next one before :meth:`step` has taken the last.
        """
        asked = -1
        while self.next_step < self.recipe.training.max_steps:
            self.begin()
            if self.next_step == asked:
                raise RuntimeError(f"batches(): step {asked} has not been taken: give each batch to step()")
            asked = self.next_step
            yield Batch.joined(list(self._shares(asked)), self.data.tokenizer.pad_id)

    def step(self, batch: Batch | None = None) -> Tensor:
        """One optimizer step; the loss of this rank's pairs, a detached scalar. Collective. See :attr:`last` for more.

        Args:
            batch: this rank's share of the step, ``batch_size / ranks`` pairs on any device; ``index`` must be places
                in the data. Default: the data's own share of the coming step.

        Raises:
            NonFiniteLossError: ``training.max_nonfinite`` steps in a row were left out.
        """
        self.begin()
        recipe, step = self.recipe, self.next_step
        schedule = Schedule.at(step, recipe)
        lr = learning_rate(step, recipe)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
        micro_batches, heads = recipe.training.accumulation_steps, self._head_mask(schedule)
        totals: Terms = {}
        left_out = self.guard.skipped
        for micro, share in enumerate(self._shares(step) if batch is None else self._parts(batch)):
            clock = Clock(self.seconds)
            on_device = share.to(self.device)
            clock.lap("data")
            terms = self._micro_step(on_device, schedule, heads, clock, micro)
            if terms is None:  # one bad micro-batch spoils the whole step
                totals = {}
                break
            for name, value in terms.items():
                totals[name] = totals.get(name, 0.0) + value / micro_batches
        self.next_step += 1
        norm = self.engine.get_global_grad_norm()
        self._temperature = totals.get("temperature", self._temperature)
        self.last = StepDetails(
            self.next_step,
            totals,
            lr,
            step * recipe.training.batch_size / self.data.train_size,
            float(norm) if totals and norm is not None else float("nan"),
            self.guard.skipped > left_out,
            self.guard.skipped,
        )
        return totals.get("loss", torch.tensor(float("nan"), device=self.device))

    def _shares(self, step: int) -> Iterator[Batch]:
        """The data's own micro-batches of a step, on the CPU."""
        clock = Clock(self.seconds)
        shares = self.sampler.indices(step, self.rank).reshape(self.recipe.training.accumulation_steps, -1)
        epoch = self.sampler.epoch(step)
        self.prefetcher.prepare([*((indices, epoch) for indices in shares), *self._coming(step)])
        clock.lap("sampler")
        for indices in shares:
            clock = Clock(self.seconds)
            beat("data", step)
            batch = self.prefetcher.take(indices, epoch)
            clock.lap("data")
            yield batch

    def _batch(self, indices: np.ndarray, epoch: int) -> Batch:
        """On the CPU. Any thread may ask: it depends on its arguments alone."""
        batch = self.masks.add_priors(self.data.train_batch(indices, epoch))
        return batch if self.data.classes is None else self.data.classes.add(batch)

    def _coming(self, step: int) -> Iterator[tuple[np.ndarray, int]]:
        """Indices and epochs of the micro-batches behind a step that are to be made while it runs."""
        training = self.recipe.training
        for later in range(step + 1, min(step + 1 + self.prefetcher.steps, training.max_steps)):
            indices = self.sampler.ahead(later, self.rank)
            if indices is None:  # the order of its epoch is not known yet
                return
            for share in indices.reshape(training.accumulation_steps, -1):
                yield share, self.sampler.epoch(later)

    def _parts(self, batch: Batch) -> Iterator[Batch]:
        """A batch that was handed in, as micro-batches."""
        training = self.recipe.training
        wanted = training.batch_size // self.world_size
        if len(batch) != wanted:
            raise ValueError(
                f"step(): a batch of {len(batch)} pairs, a rank's share is {wanted} (training.batch_size over ranks)"
            )
        if batch.priors is None:
            batch = self.masks.add_priors(batch)
        if batch.label is None and self.data.classes is not None:
            batch = self.data.classes.add(batch.to("cpu"))
        size = wanted // training.accumulation_steps
        for start in range(0, wanted, size):
            beat("data", self.next_step)
            yield batch if size == wanted else batch.rows(slice(start, start + size)).trimmed()

    def _micro_step(
        self, batch: Batch, schedule: Schedule, heads: Tensor | None, clock: Clock, micro: int
    ) -> Terms | None:
        found = self.system.forward(self.engine, self.teacher, self.queue, batch, schedule, heads, clock)
        self._collect(found, schedule.step, micro, clock)
        if not self.guard.accept(found.loss, batch.index, self.engine):
            return None
        beat("backward")
        self.engine.backward(found.loss)
        clock.lap("backward")
        beat("optimizer")
        self.engine.step()
        clock.lap("optimizer")
        applied = self.teacher.follow()
        if found.enqueue is not None:
            self.queue.enqueue(*found.enqueue)
        clock.lap("ema")
        if micro == self.recipe.training.accumulation_steps - 1:
            self.guard.stepped(applied, batch.index, self.engine)
        return found.terms | found.measures

    def _collect(self, found: MicroStep, step: int, micro: int, clock: Clock) -> None:
        """Every rank's features to a sampler that wants them: those that the queue is given, else the student's."""
        if not self.sampler.collects:
            return
        if found.enqueue is not None:
            image, text, _ = found.enqueue
        else:
            image, text = gather_features(found.image_feature), gather_features(found.text_feature)
        self.sampler.collect(step, micro, image, text)
        clock.lap("sampler")

    def _head_mask(self, schedule: Schedule) -> Tensor | None:
        section, fusion = self.recipe.masking.heads, self.recipe.model.fusion
        if section.kind == "none":
            return None
        nobody = torch.zeros(1, dtype=torch.int64, device=self.device)  # the same heads are off for all samples
        draws = Draws(self.recipe.seed, schedule.step, nobody)
        importance = None
        if section.kind == "importance":
            importance = self.head_importance()
            self._fusion.record_importance()
        return head_masks(section, fusion.depth, fusion.heads, draws, importance)

    @property
    def _fusion(self) -> FusionEncoder:
        fusion: FusionEncoder = self.engine.module.model.fusion
        return fusion

    def head_importance(self) -> Tensor:
        """(layers, H) float32: how much each head mattered when it was last on, summed over ranks. Collective."""
        importance = self._fusion.head_importance().to(self.device)
        if dist.is_initialized():
            dist.all_reduce(importance)
        return importance

    def restore_head_importance(self, importance: Tensor) -> None:
        """Undo :meth:`head_importance`: the first rank takes all of it, so that the sum over ranks is what it was."""
        first = not dist.is_initialized() or dist.get_rank() == 0
        self._fusion.restore_importance(importance.to(self.device) * float(first))

    # -- saving, measuring, ending --------------------------------------------------------------------------------

    @property
    def temperature(self) -> float:
        """Of ITC: what the latest step ended with."""
        self._temperature = float(self._temperature)
        return self._temperature

    @property
    def trained_s(self) -> float:
        """Seconds since the first step, those before a resume included."""
        return self._trained_before + (time.perf_counter() - self._since if self._begun else 0.0)

    def save(self, folder: Path | str) -> Path:
        """A checkpoint in a run's folder, as safe as those of ``crossmask train``, which can go on from it; its path.

        Collective. The folder is begun at the first call, and locked from then on until :meth:`close`.

        Raises:
            CheckpointError: it cannot be written; what was begun is removed. Or it holds another run.
        """
        run_dir = Path(folder).absolute()
        if self._folder is None or self._folder.run_dir != run_dir:
            if self._folder is not None:
                self._folder.close()
            self._folder = RunFolder(self, run_dir, goes_on=run_dir == self._loaded)
        return self._folder.save(self)

    def load(self, folder: Path | str) -> int:
        """Go on from the latest good checkpoint of a run's folder; its step. Collective.

        Raises:
            CheckpointError: there is none, or it is of another recipe, other data, or another number of ranks.
        """
        run_dir = Path(folder).absolute()
        load_latest(self, run_dir)
        self._loaded = run_dir
        return self.next_step

    def go_on(self, step: int, temperature: float, trained_s: float) -> None:
        """The next step is ``step``; the rest of the state is in place."""
        self.next_step, self._temperature = step, temperature
        self._trained_before, self._begun, self.last = trained_s, False, None

    def look(self, model: Any, batch: Batch) -> tuple[Seen, MaskPlan]:
        """A held-out batch as the masks of the run see it now. Of crossmask's own models."""
        seen = self.masks.see(model, batch)
        return seen, self.masks.plan(model, batch, seen, self.next_step)

    def evaluate(self, full: bool = True, progress: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
        """The teacher on the held-out splits, as ``evaluation.json`` has it, on every rank. Collective.

        Args:
            full: false: a quick look at masks and matching alone.
            progress: is told what is being measured, on rank 0, which measures.
        """
        from ..evaluation import evaluate

        if not self.data.splits:
            return {"splits": {}}

        def measure() -> dict[str, Any]:
            tau, data, recipe = self.temperature, self.data, self.recipe
            return evaluate(teacher, data, self.look, recipe, self.device, full, temperature=tau, progress=progress)

        with self.teacher.weights() as teacher:
            return by_first_rank(measure)

    def export(
        self, folder: Path | str, *, dtype: Literal["fp32", "bf16", "fp16"] = "fp32", force: bool = False
    ) -> None:
        """The teacher as a folder that :func:`~crossmask.engine.exported.load_exported` reads. Collective.

        Raises:
            CheckpointError: the folder is in the way (``force`` replaces an export), or cannot be written.
        """
        tensors, tokenizer = self.teacher.state_dict(), self.data.tokenizer

        def write() -> None:
            config = describe_export(self.recipe, "teacher", tensors, self.next_step, dtype, tokenizer)
            save_exported(folder, tensors, config, tokenizer, force)

        by_first_rank(write)

    def train(self, run_dir: Path | str, resume: bool = False) -> int:
        """The whole loop of ``crossmask train``: display, metrics, checkpoints, evaluation, export and report.

        Collective, from the main thread: it listens for Ctrl-C. Returns 0, or 130 where it was asked to stop and has
        saved a checkpoint. ``resume``: go on from the folder's latest one.
        """
        from .loop import train_here

        folder = Path(run_dir).absolute()
        kept, self._folder = self._folder, None
        hand_over(kept, folder, resume)
        return train_here(self, folder, resume)

    def close(self) -> None:
        """End threads, let go of the run folder, and end the process group that this began. Collective then."""
        if self._folder is not None:
            self._folder.close()
        self._ending.close()

    def __enter__(self) -> Pretrainer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
