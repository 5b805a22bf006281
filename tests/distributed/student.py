"""A small student with everything a teacher must cope with, and its DeepSpeed engine at any ZeRO stage."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Body(nn.Module):
    """Odd sizes (padding), a tied decoder, a frozen layer, a buffer, a direct parameter."""

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

    def encode(self, ids: Tensor) -> Tensor:  # not called forward: hooks on forward would not see it
        x = self.embedding(ids) + self.position
        return self.frozen(self.dropout(F.gelu(self.hidden(self.norm(x)))))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.encode(ids)
        if self.training:
            self.calls += 1
            self.mean.copy_(x.detach().mean((0, 1)))
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


def build(stage: int, dtype: str, accumulation: int = 1, extra: dict[str, Any] | None = None, seed: int = 0) -> Any:
    """An engine with two parameter groups, AdamW and clipping."""
    import deepspeed

    torch.manual_seed(seed)
    student = Student()
    zero: dict[str, Any] = {"stage": stage} | (extra or {})
    zero |= {"reduce_bucket_size": 4096}  # the default takes 2 GB of buffers
    if stage == 3:
        zero["stage3_param_persistence_threshold"] = 100  # some parameters stay gathered, some do not
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": accumulation,
        "zero_optimization": zero,
        "gradient_clipping": 1.0,
    }
    if dtype == "bf16":
        config["bf16"] = {"enabled": True}
    matrices = [p for p in student.parameters() if p.requires_grad and p.ndim > 1]
    vectors = [p for p in student.parameters() if p.requires_grad and p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}], lr=1e-2
    )
    return deepspeed.initialize(model=student, optimizer=optimizer, config=config)[0]


def ids_of(step: int, rank: int) -> Tensor:
    """(4, 5) token ids of one rank's micro-batch."""
    generator = torch.Generator().manual_seed(1000 * step + rank)
    return torch.randint(0, 11, (4, 5), generator=generator)
