"""A small student with everything a teacher must cope with, and its DeepSpeed engine at any ZeRO stage."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crossmask.engine.teacher import initialize_untouched


class Body(nn.Module):
    """Odd sizes (padding), a tied decoder, a frozen layer, buffers of several kinds, a direct parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 13)
        self.position = nn.Parameter(torch.randn(5, 13) * 0.1)
        self.norm = nn.LayerNorm(13)
        self.hidden = nn.Linear(13, 37)
        self.dropout = nn.Dropout(0.5)
        self.frozen = nn.Linear(37, 13)
        self.frozen.requires_grad_(False)
        self.decoder = nn.Linear(13, 11)
        self.decoder.weight = self.embedding.weight
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mean", torch.zeros(13))
        self.register_buffer("peak", torch.zeros(13), persistent=False)

    def encode(self, ids: Tensor) -> Tensor:  # not called forward: hooks on forward would not see it
        x = self.embedding(ids) + self.position
        return self.frozen(self.dropout(F.gelu(self.hidden(self.norm(x)))))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.encode(ids)
        if self.training:
            self.calls += 1
            self.mean.copy_(x.detach().mean((0, 1)))
            self.peak = x.detach().float().amax((0, 1))  # another tensor each time
        return self.decoder(x)


class Student(nn.Module):
    """The body and, beside it, what has no teacher; the temperature comes first and shifts every offset."""

    def __init__(self) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.tensor([0.7]))  # DeepSpeed cannot take 0-d ones
        self.model = Body()
        self.head = nn.Linear(11, 3)

    def forward(self, ids: Tensor, factor: Tensor | float = 1.0) -> Tensor:
        logits = self.model(ids)
        extra = self.head(logits.mean(1)).float().square().mean()
        logits = logits.float().flatten(0, 1) / self.temperature.float()
        return factor * (F.cross_entropy(logits, ids.flatten()) + extra)


def optimizer_of(student: nn.Module, lr: float = 1e-2) -> torch.optim.AdamW:
    """AdamW with two parameter groups, one without weight decay; the head, which has no teacher, in their middle."""
    trained = [p for p in student.parameters() if p.requires_grad]
    vectors = [p for p in trained if len(getattr(p, "ds_shape", p.shape)) < 2]  # ds_shape: where zero.Init cut it up
    matrices = [p for p in trained if not any(p is vector for vector in vectors)]
    for group in (matrices, vectors):
        group.insert(2, group.pop())
    return torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}], lr=lr
    )


def build(
    stage: int,
    dtype: str,
    accumulation: int = 1,
    extra: dict[str, Any] | None = None,
    seed: int = 0,
    *,
    config: dict[str, Any] | None = None,
    dropout: float = 0.5,
    lr: float = 1e-2,
) -> Any:
    """An engine with two parameter groups, AdamW and clipping; ``extra`` zero_optimization keys, ``config`` others."""
    torch.manual_seed(seed)
    student = Student()
    student.model.dropout.p = dropout
    zero: dict[str, Any] = {"stage": stage, "reduce_bucket_size": 4096}  # the default takes 2 GB of buffers
    if stage == 3:
        zero["stage3_param_persistence_threshold"] = 100  # some parameters stay gathered, some do not
    defaults: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": accumulation,
        "zero_optimization": zero | (extra or {}),
        "gradient_clipping": 1.0,
        "zero_force_ds_cpu_optimizer": False,
    }
    if dtype == "bf16":
        defaults["bf16"] = {"enabled": True}
    return initialize_untouched(student, optimizer_of(student, lr), defaults | (config or {}))


def ids_of(step: int, rank: int) -> Tensor:
    """(4, 5) token ids of one rank's micro-batch."""
    generator = torch.Generator().manual_seed(1000 * step + rank)
    return torch.randint(0, 11, (4, 5), generator=generator)
