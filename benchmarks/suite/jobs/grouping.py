"""The order of semi-hard negatives, against the loop one writes: a top-k for each sample, used ones overwritten."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from crossmask.kernels import semi_hard_order
from crossmask.kernels.roofline import Work

from ..cases import Case
from ..problem import Implementation, Outputs, Problem

PAIRS, WIDTH, SIMILAR = (512, 1920), 256, 3


def ours(image: Tensor, text: Tensor) -> Outputs:
    return {"order": semi_hard_order(image, text, similar=SIMILAR)}


def specification(image: Tensor, text: Tensor) -> Outputs:
    return {"order": semi_hard_order(image, text, similar=SIMILAR, impl="reference")}


def loop(image: Tensor, text: Tensor) -> Outputs:
    """As commonly written: both directions' similarities, rows and columns overwritten as samples are used up."""
    by_image = image @ text.T
    by_text = by_image.T.clone()
    order, lowest = [0], -torch.inf
    for place in range(1, len(image)):
        last = order[-1]
        by_image[:, last] = lowest
        by_text[:, last] = lowest
        row = (by_image if place % 2 else by_text)[last]
        order.append(int(row.topk(min(SIMILAR, len(image) - place)).indices[-1]))
        by_image[last] = lowest
        by_text[last] = lowest
    return {"order": torch.tensor(order)}


NAMES = ("crossmask", "loop of torch.topk", "our reference")


def problem(pairs: int, device: torch.device) -> Problem:
    def draw() -> Tensor:
        return F.normalize(torch.randn(pairs, WIDTH, device=device), dim=1)

    read = 2.0 * 4 * pairs * WIDTH
    return Problem(
        op="semi_hard_order",
        shape=f"{pairs} pairs",
        size=f"{pairs} pairs, width {WIDTH}, the {SIMILAR}rd most similar",
        what="",
        inputs=(draw(), draw()),
        reference=loop,
        plain=loop,
        implementations=[
            Implementation("crossmask", lambda: ours, ours=True),
            Implementation("loop of torch.topk", lambda: loop),
            Implementation("our reference", lambda: specification, note="stable sorts, plain PyTorch"),
        ],
        # features are read, an order is written; what the walk reads of the similarities a cache can hold
        work={"forward": Work({"fp32": 2.0 * pairs**2 * WIDTH}, 0.0, read, 8.0 * pairs, 0.0, read)},
        exact=True,
    )


def cases(device: str) -> Iterator[Case]:
    for pairs in PAIRS:
        build = functools.partial(problem, pairs)
        yield Case("semi_hard_order", f"{pairs} pairs", "", "fp32", ("forward",), NAMES, build)
