"""Top-k mask selection against torch.topk and a scatter, which is what one writes."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from crossmask.kernels import topk_mask
from crossmask.kernels.roofline.selection import topk_op

from ..cases import Case
from ..prediction import seconds_of
from ..problem import Implementation, Outputs, Problem

ROWS = {"cpu": 256, "cuda": 1024}
RATIO, HEADS = 0.4, 12
LENGTHS = {"scenes 36": 36, "words 77": 77, "ViT-B/16 at 224, 196": 196, "ViT-B/16 at 384, 576": 576, "long 4096": 4096}
VARIED, MEANS = "lengths vary", f"means over {HEADS} heads"
WHATS = {"words 77": (VARIED,), "ViT-B/16 at 384, 576": (VARIED, MEANS)}  # beside the plain selection
NAMES = ("crossmask", "torch.topk + scatter", "compile", "sort")


def ours(valid: Tensor | None, scores: Tensor) -> Outputs:
    return {"mask": topk_mask(scores, ratio=RATIO, valid=valid)}


def shares(counts: int | Tensor) -> int | Tensor:
    """floor(RATIO counts), in integers."""
    return counts * 2 // 5


def scattered(valid: Tensor | None, scores: Tensor) -> Outputs:
    """By torch.topk of as many as the longest row marks; a shorter one's are the first of these."""
    scores = scores.mean(1) if scores.ndim == 3 else scores
    mask, most = torch.zeros_like(scores, dtype=torch.bool), shares(scores.shape[1])
    if valid is None:
        return {"mask": mask.scatter_(1, scores.topk(most, 1).indices, True)}
    order = scores.masked_fill(~valid, -torch.inf).topk(most, 1).indices
    marked = torch.arange(most, device=scores.device) < shares(valid.sum(1, keepdim=True))
    return {"mask": mask.scatter_(1, order, marked)}


def by_sorting(valid: Tensor | None, scores: Tensor) -> Outputs:
    scores = scores.mean(1) if scores.ndim == 3 else scores
    counts = torch.full_like(scores[:, :1], scores.shape[1], dtype=torch.int64)
    if valid is not None:
        scores, counts = scores.masked_fill(~valid, -torch.inf), valid.sum(1, keepdim=True)
    order = scores.argsort(dim=1, descending=True, stable=True)
    marked = torch.arange(scores.shape[1], device=scores.device) < shares(counts)
    return {"mask": torch.zeros_like(marked).scatter_(1, order, marked)}


def draw(rows: int, length: int, what: str, device: torch.device) -> Tensor:
    """Scores without ties, of which sums over heads are exact: whole numbers."""
    scores = torch.rand(rows, length, device=device).argsort(1).float()
    if what != MEANS:
        return scores / length
    noise = torch.randint(length, (rows, HEADS // 2, length), device=device)
    return torch.cat((scores[:, None] + noise, scores[:, None] - noise), 1)


def problem(shape: str, rows: int, length: int, what: str, device: torch.device) -> Problem:
    lengths = torch.randint(length // 3 + 2, length + 1, (rows, 1), device=device)
    valid = torch.arange(length, device=device) < lengths if what == VARIED else None
    plain, sort = functools.partial(scattered, valid), functools.partial(by_sorting, valid)
    asked = (rows, length, 4, HEADS if what == MEANS else 1, valid is not None)
    return Problem(
        op="topk_mask",
        shape=shape,
        size=f"{rows} rows of {length}, ratio {RATIO}",
        what=what,
        inputs=(draw(rows, length, what, device),),
        reference=sort,
        plain=sort,
        implementations=[
            Implementation("crossmask", lambda: functools.partial(ours, valid), ours=True),
            Implementation("torch.topk + scatter", lambda: plain),
            Implementation(
                "compile", lambda: torch.compile(plain, dynamic=False), note="torch.compile of torch.topk + scatter"
            ),
            Implementation("sort", lambda: sort, note="stable: ties go to the lower index, as ours"),
        ],
        work={"forward": topk_op(*asked).work()},
        exact=True,
        seconds=seconds_of(lambda gpu, backward: topk_op(*asked, architecture=gpu.architecture)),
    )


def build(shape: str, what: str, device: torch.device) -> Problem:
    return problem(shape, ROWS[device.type], LENGTHS[shape], what, device)


def cases(device: str) -> Iterator[Case]:
    for shape in LENGTHS:
        for what in ("", *WHATS.get(shape, ())):
            yield Case("topk_mask", shape, what, "fp32", ("forward",), NAMES, functools.partial(build, shape, what))
