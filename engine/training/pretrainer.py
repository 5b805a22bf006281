"""Student, teacher, queue and data of one rank, and the step that moves them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..beats import beat
from ..data import PairData
from ..data.batch import Batch
from ..deepspeed_config import build_deepspeed_config
from ..masking import Draws
from ..masking.heads import head_masks
from ..models.fusion import FusionEncoder
from ..objectives import RunMasks, Terms
from ..recipe import Recipe
from ..teacher import FeatureQueue, Teacher, gather_features, initialize_untouched, named_schedule
from .clock import Clock
from .initial import Initial
from .nonfinite import NonFiniteGuard
from .optimizer import build_optimizer, learning_rate
from .sampling import build_sampler
from .step import Schedule
from .systems import MicroStep, build_system


class Pretrainer:
    """One rank's share of a run.

    :meth:`step` is one optimizer step on every rank. What it does depends only on the recipe, the number of the step
    and the state that a checkpoint holds, so a resumed run continues as if nothing had happened.
    """

    def __init__(
        self,
        recipe: Recipe,
        data: PairData,
        rank: int,
        world_size: int,
        device: torch.device,
        resumed: bool = False,
        run_dir: Path | None = None,
    ) -> None:
        """``resumed``: a checkpoint will be loaded, so the weights that the recipe starts from are not looked for.
        ``run_dir`` is needed where ``data.grouping`` is on.
        """
        self.recipe, self.data, self.rank, self.device = recipe, data, rank, device
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
        self.guard = NonFiniteGuard(training.max_nonfinite, data.name_of)
        self.next_step = 0
        self.seconds: dict[str, float] = {}  # where the time went, by part, since the start
        torch.manual_seed(recipe.seed + 1 + rank)  # from here on ranks draw their own dropout

    def notices(self) -> list[str]:
        """Lines for the start of a run: what of the data is left out, which weights are new, and what of the recipe so
        many ranks leave out."""
        training = self.recipe.training
        pairs = training.batch_size // (self.sampler.world_size * training.accumulation_steps)
        if pairs > 1 or self.recipe.objectives.itm.weight == 0:
            return [*self.data.notices(), *self.sampler.notices(), *self._notices]
        alone = "ITM is left out: a rank's batch is one pair, of which there is no negative (training.batch_size)"
        return [*self.data.notices(), *self.sampler.notices(), *self._notices, alone]

    def step(self) -> tuple[Terms, dict[str, float]]:
        """Train on the next global batch. Collective.

        Returns this rank's terms as scalar tensors, averaged over micro-batches and empty where the step was left out
        for a loss that was not finite, and plain numbers that are the same on every rank.
        """
        recipe, step = self.recipe, self.next_step
        schedule = Schedule.at(step, recipe)
        lr = learning_rate(step, recipe)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
        micro_batches, heads = recipe.training.accumulation_steps, self._head_mask(schedule)
        totals: Terms = {}
        clock = Clock(self.seconds)
        shares = self.sampler.indices(step, self.rank).reshape(micro_batches, -1)
        clock.lap("sampler")
        for micro, indices in enumerate(shares):
            clock = Clock(self.seconds)
            beat("data", step)
            batch = self.masks.add_priors(self.data.train_batch(indices, self.sampler.epoch(step)))
            batch = (batch if self.data.classes is None else self.data.classes.add(batch)).to(self.device)
            clock.lap("data")
            terms = self._micro_step(batch, schedule, heads, clock, micro)
            if terms is None:  # one bad micro-batch spoils the whole step
                totals = {}
                break
            for name, value in terms.items():
                totals[name] = totals.get(name, 0.0) + value / micro_batches
        self.next_step += 1
        norm = self.engine.get_global_grad_norm()
        return totals, {
            "lr": lr,
            "epoch": step * recipe.training.batch_size / self.data.train_size,
            "gradient_norm": float(norm) if totals and norm is not None else float("nan"),
            "skipped_steps": float(self.guard.skipped),
        }

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
