"""Optimizer and learning-rate schedule as pure functions of the recipe and the step, so that a resume needs neither."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from ..recipe import OptimizerSection, Recipe

# Embeddings of position and of special tokens are learned biases by nature: decay would pull them together.
UNDECAYED = ("pos_embed", "cls_token", "mask_token", "position_embeddings", "token_type_embeddings")


def parameter_groups(model: nn.Module, section: OptimizerSection) -> list[dict[str, Any]]:
    """Matrices with weight decay; scalars, vectors, embeddings of positions and of special tokens without; the
    temperature at its own rate.

    ``lr_scale`` is a group's factor on the schedule's learning rate.
    """
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    temperature: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            exempt = parameter.ndim < 2 or any(word in name for word in UNDECAYED)
            group = temperature if name == "temperature" else plain if exempt else decayed
            group.append(parameter)
    return [
        {"params": decayed, "weight_decay": section.weight_decay},
        {"params": plain, "weight_decay": 0.0},
        {"params": temperature, "weight_decay": 0.0, "lr_scale": section.temperature_lr_scale},
    ]


def build_optimizer(model: nn.Module, section: OptimizerSection) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameter_groups(model, section), lr=section.lr, betas=section.betas, fused=True)


def learning_rate(step: int, recipe: Recipe) -> float:
    """Linear warm-up from ``optimizer.warmup_lr`` to ``optimizer.lr``, then a cosine to ``optimizer.final_lr`` at
    ``training.max_steps``."""
    section, warmup = recipe.optimizer, recipe.warmup_steps
    if step < warmup:
        return section.warmup_lr + (section.lr - section.warmup_lr) * (step + 1) / warmup
    progress = (step - warmup) / max(1, recipe.training.max_steps - warmup)
    return section.final_lr + 0.5 * (section.lr - section.final_lr) * (1 + math.cos(math.pi * progress))
