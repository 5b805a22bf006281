"""Inputs and masks with links for the tests of cross-attention, and what float64 and autograd make of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from crossmask.kernels.cross_attention import reference
from crossmask.kernels.cross_attention.request import STATISTICS, Forward, Masks, Request

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DIFFERENTIABLE = ("output", *STATISTICS[:-1])
SEED = torch.tensor([2**40 + 5], device=DEVICE)


def everything(**changed: Any) -> Request:
    return replace(Request(0.3, 0.0, False, True, True, True, True, True), **changed)


def inputs(
    B: int = 3, H: int = 2, S: int = 17, P: int = 40, D: int = 16, dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    # Three times a normal: peaked rows, where the mistakes show.
    made = [(f * torch.randn(B, H, n, D, dtype=torch.float64)).to(dtype) for f, n in ((3, S), (1, P), (1, P))]
    return [x.to(DEVICE) for x in made]


def links(B: int, S: int, P: int, density: float = 0.5) -> Tensor:
    """Random; the first sample has a row and a column without any, where there is another."""
    link = torch.rand(B, S, P) < density
    link[:, S // 2, P // 2] = True
    if S > 1 and P > 1:
        link[0, 0], link[0, :, -1] = False, False
    return link.to(DEVICE)


def some_masks(B: int, H: int, S: int, P: int, shared: bool = False, others: bool = True) -> Masks:
    """Links beside every other mask: the last sample has no key, the one before it no query, a head is off."""
    link = links(1 if shared else B, S, P)
    if not others:
        return Masks(link=link)
    key, query, head = torch.rand(B, P) < 0.8, torch.rand(B, S) < 0.7, torch.ones(B, H, dtype=torch.bool)
    key[:, P // 2], query[:, S // 2] = True, True
    if B > 2:
        key[-1], query[-2] = False, False
        head[0, -1] = H == 1
    return Masks(key.to(DEVICE), query.to(DEVICE), head.to(DEVICE), link)


def apart(found: Tensor, wanted: Tensor) -> float:
    """Largest difference; infinities of one sign are equal."""
    assert found.shape == wanted.shape
    assert not found.isnan().any()
    wanted = wanted.to(torch.float64)
    return float(torch.where(found == wanted, 0.0, (found.to(torch.float64) - wanted).abs()).max())


def read_columns(found: Forward, masks: Masks) -> Forward:
    """What stands in column_lse at a masked key, or in a head that is off, may be anything."""
    column = found.column_lse
    assert column is not None
    if masks.key is not None:
        column = column.masked_fill(~masks.key[:, None], 0.0)
    if masks.head is not None:
        column = column.masked_fill(~masks.head[:, :, None], 0.0)
    return found._replace(column_lse=column)


def wanted_gradients(
    gradients: dict[str, Tensor], x: list[Tensor], masks: Masks, request: Request, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, ...]:
    """By autograd through the reference."""
    leaves = [value.detach().to(dtype).requires_grad_() for value in x]
    found = reference.forward(*leaves, masks, SEED, request)
    outputs = [getattr(found, name) for name in gradients]
    # A row that attends to nothing has lse = -inf, a constant
    given = gradients.values()
    loss = sum((x.masked_fill(x.isinf(), 0.0) * g.to(dtype)).sum() for x, g in zip(outputs, given, strict=True))
    assert isinstance(loss, Tensor)
    return torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)


def random_gradients(found: Forward, request: Request) -> dict[str, Tensor]:
    """Those of means and of sums are made to weigh as much as the others."""
    _, H, S, _ = found.output.shape
    size = {"key_attention": H * S, "query_attention": H * S} if request.normalise else {}
    names = [name for name in DIFFERENTIABLE if getattr(found, name) is not None]
    return {name: torch.randn_like(getattr(found, name)) * size.get(name, 1) for name in names}
