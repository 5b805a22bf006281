"""Student, teacher, queue and data of one rank, and the step that moves them."""

from __future__ import annotations

import time
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..beats import beat
from ..data import PairData, StepSampler
from ..data.batch import Batch
from ..deepspeed_config import build_deepspeed_config
from ..masking import Draws
from ..masking.heads import head_masks
from ..models import PretrainingModel, VisionLanguageModel
from ..models.fusion import FusionEncoder
from ..objectives import Keys, RunMasks, TeacherView, Terms, look
from ..recipe import Recipe
from ..teacher import FeatureQueue, Teacher, gather_features, initialize_untouched, named_schedule
from .initial import Initial
from .nonfinite import NonFiniteGuard
from .optimizer import build_optimizer, learning_rate
from .step import Schedule, compute_losses, fusion_rows


class Clock:
    """Adds the wall time since its last lap to a named part of ``seconds``."""

    def __init__(self, seconds: dict[str, float]) -> None:
        self.seconds, self.last = seconds, time.perf_counter()

    def lap(self, part: str) -> float:
        """Returns the time now."""
        now = time.perf_counter()
        self.seconds[part] = self.seconds.get(part, 0.0) + now - self.last
        self.last = now
        return now


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
    ) -> None:
        """``resumed``: a checkpoint will be loaded, so the weights that the recipe starts from are not looked for."""
        self.recipe, self.data, self.rank, self.device = recipe, data, rank, device
        training, model = recipe.training, recipe.model
        self.masks = RunMasks(recipe, data)
        torch.manual_seed(recipe.seed)  # the same initial weights on every rank
        sizes = (data.tokenizer.vocabulary_size, data.max_tokens)
        network = self.masks.network()
        specials = {"pad_id": data.tokenizer.pad_id, "mask_id": data.tokenizer.mask_id}
        student = PretrainingModel(
            model, recipe.objectives, *sizes, masking=recipe.masking, mask_network=network, **specials
        )
        initial = None if resumed else Initial(student, recipe, data.tokenizer)
        optimizer = build_optimizer(student, recipe.optimizer)
        self.engine: Any = initialize_untouched(
            student, optimizer, build_deepspeed_config(recipe, world_size, device.type)
        )
        self.teacher = Teacher(
            self.engine,
            lambda: VisionLanguageModel(model, *sizes, mask_network=self.masks.network(), **specials),
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
        self.sampler = StepSampler(
            data.train_size, training.batch_size, world_size, recipe.seed, training.accumulation_steps
        )
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
            return [*self.data.notices(), *self._notices]
        alone = "ITM is left out: a rank's batch is one pair, of which there is no negative (training.batch_size)"
        return [*self.data.notices(), *self._notices, alone]

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
        for micro, indices in enumerate(self.sampler.indices(step, self.rank).reshape(micro_batches, -1)):
            clock = Clock(self.seconds)
            beat("data", step)
            batch = self.masks.add_priors(self.data.train_batch(indices, self.sampler.epoch(step))).to(self.device)
            clock.lap("data")
            terms = self._micro_step(batch, schedule, heads, clock, micro == micro_batches - 1)
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
        self, batch: Batch, schedule: Schedule, heads: Tensor | None, clock: Clock, last: bool
    ) -> Terms | None:
        recipe = self.recipe
        rows = fusion_rows(len(batch), recipe.objectives, schedule)
        beat("teacher's forward")
        with self.teacher.weights(dropout=recipe.teacher.dropout) as teacher:
            view: TeacherView = teacher(lambda m: look(m, batch, self.masks, schedule.step, rows))
        image, text, group_id = (gather_features(x) for x in (view.image_feature, view.text_feature, batch.group_id))
        queued = Keys(self.queue.image, self.queue.text, self.queue.group_id)  # views, until the next enqueue
        keys = Keys(image, text, group_id, queued if schedule.queue and len(self.queue) else None)
        clock.lap("teacher")
        planner = self.masks.planner
        beat("student's forward")
        loss, terms = self.engine(lambda m: compute_losses(m, batch, view, keys, recipe, schedule, planner, heads))
        clock.lap("student")
        if not self.guard.accept(loss, batch.index, self.engine):
            return None
        beat("backward")
        self.engine.backward(loss)
        clock.lap("backward")
        beat("optimizer")
        self.engine.step()
        clock.lap("optimizer")
        applied = self.teacher.follow()
        self.queue.enqueue(image, text, group_id)
        clock.lap("ema")
        if last:
            self.guard.stepped(applied, batch.index, self.engine)
        return terms | _mask_measures(view, batch)

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


def _mask_measures(view: TeacherView, batch: Batch) -> Terms:
    if view.plan is None:
        return {}
    words = batch.maskable[: len(view.plan.text)].sum().clamp(min=1)
    return {
        "image_mask_ratio": view.plan.image.float().mean(),
        "text_mask_ratio": view.plan.text.sum() / words,
        "masked_rows": view.plan.text.any(1).float().mean(),
    }
