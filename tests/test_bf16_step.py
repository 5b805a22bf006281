"""The bf16 step of ZeRO stage 0: DeepSpeed's own result, bit by bit, from fewer passes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from crossmask.engine.teacher.bf16_step import spare_passes
from crossmask.engine.training.distributed import init_distributed

STEPS = 3


def build(clip: float = 0.0, spare: bool = True) -> tuple[nn.Module, Any]:
    init_distributed()
    from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer

    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 9), nn.GELU(), nn.Linear(9, 4)).to(torch.bfloat16)
    groups = [{"params": list(model[0].parameters()), "weight_decay": 0.1}, {"params": list(model[2].parameters())}]
    adam = torch.optim.AdamW(groups, lr=0.01, weight_decay=0.0, fused=True)
    optimizer = FP16_UnfusedOptimizer(adam, low_precision_dtype=torch.bfloat16, clip_grad=clip)
    if spare:
        spare_passes(optimizer)
    return model, optimizer


def train(model: nn.Module, optimizer: Any, spoil: Callable[[nn.Module, int], None] = lambda model, step: None) -> None:
    torch.manual_seed(2)
    for step in range(STEPS):
        model(torch.randn(5, 6, dtype=torch.bfloat16)).square().sum().backward()
        spoil(model, step)
        optimizer.step()
        optimizer.zero_grad()


def state(model: nn.Module, optimizer: Any) -> list[Tensor]:
    masters = [master for group in optimizer.fp32_groups for master in group]
    moments = [x for master in masters for x in optimizer.state[master].values()]
    return [*(p.detach() for p in model.parameters()), *(m.detach() for m in masters), *moments]


@pytest.mark.parametrize("spoiled", [None, torch.inf, torch.nan, -torch.inf])
def test_the_same_bits_as_deepspeeds(spoiled: float | None) -> None:
    def spoil(model: nn.Module, step: int) -> None:
        if spoiled is not None and step == 1:
            model[2].weight.grad[1, 3] = spoiled

    (model, optimizer), (theirs, their_optimizer) = build(), build(spare=False)
    train(model, optimizer, spoil)
    train(theirs, their_optimizer, spoil)
    for mine, wanted in zip(state(model, optimizer), state(theirs, their_optimizer), strict=True):
        assert torch.equal(mine, wanted)
    assert float(optimizer._global_grad_norm) == pytest.approx(float(their_optimizer._global_grad_norm))


def test_gradients_are_clipped_alike() -> None:
    (model, optimizer), (theirs, their_optimizer) = build(0.5), build(0.5, spare=False)
    train(model, optimizer)
    train(theirs, their_optimizer)
    assert optimizer._global_grad_norm > 0.5
    for mine, wanted in zip(state(model, optimizer), state(theirs, their_optimizer), strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-5, atol=1e-7)


def test_a_step_left_out_says_so_and_changes_nothing() -> None:
    model, optimizer = build()
    train(model, optimizer)
    before = [x.clone() for x in state(model, optimizer)]
    model[0].weight.grad = torch.full_like(model[0].weight, torch.nan)
    assert optimizer.step()
    assert optimizer.overflow
    assert all(torch.equal(a, b) for a, b in zip(before, state(model, optimizer), strict=True))
    assert all(p.grad is None for p in model.parameters())
    model[0].weight.grad = torch.ones_like(model[0].weight)  # alone: the others count as zeros, as with DeepSpeed
    assert not optimizer.step()
    assert not optimizer.overflow
    assert not torch.equal(before[0], model[0].weight)


def test_gradients_are_gone_after_the_step() -> None:
    model, optimizer = build()
    model(torch.randn(5, 6, dtype=torch.bfloat16)).sum().backward()
    optimizer.step()
    assert all(p.grad is None for p in model.parameters())
    assert all(master.grad is None for group in optimizer.fp32_groups for master in group)
