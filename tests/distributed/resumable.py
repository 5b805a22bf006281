"""The small student with teacher, queue and guard as a run that can be saved and resumed on any number of ranks.

The global batch of a step is the same whatever the number of ranks. The temperature has a parameter group to itself,
as in the real model: most ranks hold no part of it.
"""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from student import Body, Student
from torch import Tensor

from crossmask.engine.teacher import FeatureQueue, Teacher, gather_features, initialize_untouched
from crossmask.engine.training.checkpoint import CheckpointManager, CheckpointState
from crossmask.engine.training.nonfinite import NonFiniteGuard

BATCH = 8  # sequences of a step, over all ranks and micro-batches


def build_engine(stage: int, dtype: str, accumulation: int, dropout: float, seed: int) -> Any:
    torch.manual_seed(seed)
    student = Student()
    student.model.dropout.p = dropout
    zero: dict[str, Any] = {"stage": stage, "reduce_bucket_size": 4096}
    if stage == 3:
        zero["stage3_param_persistence_threshold"] = 100  # some parameters stay gathered, some do not
    config: dict[str, Any] = {
        "train_batch_size": BATCH,
        "gradient_accumulation_steps": accumulation,
        "zero_optimization": zero,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": dtype == "bf16"},
    }
    named = [(name, p) for name, p in student.named_parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for _, p in named if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for name, p in named if p.ndim < 2 and name != "temperature"], "weight_decay": 0.0},
        {"params": [student.temperature], "weight_decay": 0.0, "lr_scale": 3.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-2)
    return initialize_untouched(student, optimizer, config)


class Run:
    """One rank's share."""

    def __init__(self, stage: int, dtype: str, accumulation: int = 1, dropout: float = 0.0, seed: int = 0) -> None:
        self.rank, self.ranks, self.accumulation = dist.get_rank(), dist.get_world_size(), accumulation
        self.engine = build_engine(stage, dtype, accumulation, dropout, seed)
        self.teacher, self.queue = Teacher(self.engine, Body, 0.9), FeatureQueue(13, 2)
        self.guard = NonFiniteGuard(3)
        torch.manual_seed(seed + 1 + self.rank)

    def step(self, step: int, bad: bool = False) -> str:
        """The rank's loss, in hexadecimal; ``bad``: the last rank's last micro-batch is not finite."""
        generator = torch.Generator().manual_seed(1000 + step)
        shape = (self.accumulation, self.ranks, BATCH // self.accumulation // self.ranks, 5)
        ids = torch.randint(0, 11, shape, generator=generator)[:, self.rank]
        total = 0.0
        for micro, rows in enumerate(ids):
            last = micro == self.accumulation - 1
            with self.teacher.weights() as model:
                features = model.encode(rows).float()[:, 0, :2]
            loss = self.engine(rows, float("nan") if bad and last and self.rank == self.ranks - 1 else 1.0)
            if not self.guard.accept(loss, rows[:, 0], self.engine):
                return "skipped"
            self.engine.backward(loss)
            self.engine.step()
            applied = self.teacher.follow()
            if last:
                self.guard.stepped(applied, rows[:, 0])
            self.queue.enqueue(gather_features(features), gather_features(-features), gather_features(rows[:, 0]))
            total += loss.item() / self.accumulation
        return total.hex()

    def save(self, manager: CheckpointManager, step: int) -> Path:
        return manager.save(step, self.engine, self.teacher, self.queue, {"skipped": self.guard.skipped})

    def load(self, manager: CheckpointManager) -> CheckpointState:
        state = manager.load(self.engine, self.teacher, self.queue)
        self.guard.skipped = state.extra["skipped"]
        return state

    def everything(self) -> dict[str, Tensor]:
        """Masters, Adam's moments and steps, weights, buffers, hyperparameters, teacher, queue. Collective."""
        import deepspeed

        module, optimizer = self.engine.module, self.engine.optimizer
        inner = optimizer if isinstance(optimizer, torch.optim.Optimizer) else optimizer.optimizer
        found: dict[str, Tensor] = {}
        for name, p in module.named_parameters():
            for key in ("fp32", "exp_avg", "exp_avg_sq") if p.requires_grad else ():
                found[f"{key} {name}"] = self._whole(p, key, inner)
        with deepspeed.zero.GatheredParameters([p for p in module.parameters() if hasattr(p, "ds_id")]):
            found |= {f"weight {name}": p.detach().clone() for name, p in module.named_parameters()}
        found |= {f"buffer {name}": b for name, b in module.named_buffers() if name in module.state_dict()}
        steps = [float(state["step"]) for state in inner.state.values() if "step" in state]
        found["Adam's steps"] = torch.tensor(sorted(set(steps)))
        values = [[group["weight_decay"], group["lr"], group.get("lr_scale", 0.0)] for group in optimizer.param_groups]
        found["hyperparameters"] = torch.tensor(values)
        found |= {f"teacher {name}": value for name, value in self.teacher.state_dict(everywhere=True).items()}
        found |= {f"queue {name}": value for name, value in self.queue.state_dict().items()}
        counters = [self.teacher.updates, self.engine.global_steps, self.engine.skipped_steps, self.guard.skipped]
        found["counters"] = torch.tensor(counters)
        return {name: value.detach().clone().contiguous() for name, value in found.items()}

    def _whole(self, p: Any, key: str, inner: torch.optim.Optimizer) -> Tensor:
        """A parameter's master or moment, put together from the optimizer's own tensors."""
        optimizer = self.engine.optimizer
        if self.engine.zero_optimization_stage() == 0:
            low, high = (getattr(optimizer, f"{name}_groups", []) for name in ("fp16", "fp32"))  # both empty in fp32
            pairs = zip(chain(*low), chain(*high), strict=True)
            master = next((master for own, master in pairs if own is p), p)
            return master if key == "fp32" else inner.state[master][key]
        if self.engine.zero_optimization_stage() == 3:
            from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

            return safe_get_full_fp32_param(p) if key == "fp32" else safe_get_full_optimizer_state(p, key)
        whole = torch.zeros(p.numel())
        (index,) = [index for index, group in enumerate(optimizer.bit16_groups) if any(p is other for other in group)]
        (master,) = inner.param_groups[index]["params"]
        if p._hp_mapping is not None:
            here, there = p._hp_mapping.hp_fragment_address, p._hp_mapping.lp_fragment_address
            flat = master if key == "fp32" else inner.state[master][key]
            whole.narrow(0, there.start, there.numel).copy_(flat.detach().narrow(0, here.start, here.numel))
        dist.all_reduce(whole)
        return whole.view(p.shape)
