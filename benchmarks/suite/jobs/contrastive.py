"""The contrast against a teacher's features and a queue, against the loss as ALBEF and its successors write it."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from crossmask.kernels import soft_contrastive
from crossmask.kernels.roofline import DEVICES, Device, Work
from crossmask.kernels.roofline.contrastive import backward_op, forward_op
from crossmask.kernels.roofline.launches import Op
from crossmask.kernels.soft_contrastive.dispatch import implementation
from crossmask.kernels.soft_contrastive.reference import soft_contrastive_reference

from ..cases import Case
from ..ceilings import DTYPES
from ..prediction import seconds_of
from ..problem import Implementation, Outputs, Problem
from ..session import DTYPES as MEASURED

QUEUE, WIDTH, TAU, ALPHA = 65_536, 256, 0.07, 0.4  # ALBEF's
BATCHES = {"cpu": (8, 64), "cuda": (64, 256)}
KEY_GRADIENTS = ("torch.amax", "backward_keys")  # launches for keys that have a gradient: a teacher's have none
Constant = tuple[Tensor, Tensor, Tensor]  # the teacher's: keys (N, E), queries (N, E), queue (Q, E)


def groups(constant: Constant) -> tuple[Tensor, Tensor]:
    """Of queries and their keys, and of the queue: each sample is a match of its own key alone."""
    keys, _, queue = constant
    numbers = torch.arange(len(keys) + len(queue), device=keys.device)
    return numbers[: len(keys)], numbers[len(keys) :]


def ours(constant: Constant, of: tuple[Tensor, Tensor], queries: Tensor, tau: Tensor) -> Outputs:
    keys, teacher, queue = constant
    told = (queries, keys, teacher, of[0], of[0], tau, ALPHA)
    return {"loss": soft_contrastive(*told, queue=queue, queue_groups=of[1])}


def reference(constant: Constant, of: tuple[Tensor, Tensor], queries: Tensor, tau: Tensor) -> Outputs:
    keys, teacher, queue = (x.to(queries.dtype) for x in constant)
    return {"loss": soft_contrastive_reference(queries, keys, teacher, of[0], of[0], tau[0], ALPHA, queue, of[1])}


def plain(constant: Constant, queries: Tensor, tau: Tensor) -> Outputs:
    """With the queue cloned and joined to the keys, all logits and all targets, softmax in float32."""
    keys, teacher, queue = constant
    every = torch.cat((keys, queue.clone().detach()))
    with torch.no_grad():
        soft = F.softmax((teacher @ every.T).float() / tau, dim=1)
        target = ALPHA * soft + (1 - ALPHA) * torch.zeros_like(soft).fill_diagonal_(1)
    z = (queries @ every.T).float() / tau
    return {"loss": -(F.log_softmax(z, dim=1) * target).sum(1)}


def implementations(constant: Constant) -> list[Implementation]:
    blockwise = implementation(constant[0].device.type) == "blockwise"
    early = "its forward works out the queries' gradient, its backward scales it" if blockwise else ""
    return [
        Implementation("crossmask", lambda: functools.partial(ours, constant, groups(constant)), ours=True, note=early),
        Implementation("plain ITC", lambda: functools.partial(plain, constant)),
        Implementation(
            "compile",
            lambda: torch.compile(functools.partial(plain, constant), dynamic=False),
            note="torch.compile of plain ITC",
        ),
    ]


NAMES = ("crossmask", "plain ITC", "compile")


def launches(n: int, q: int, e: int, dtype: str, gpu: Device, backward: bool) -> Op:
    if not backward:
        return forward_op(n, n, q, e, dtype, None, True, gpu.architecture, gpu.multiprocessors)
    op = backward_op(n, n, q, e, dtype, None, True, gpu.architecture, gpu.multiprocessors)
    left = [launch for launch in op.launches if launch.kernel not in KEY_GRADIENTS]
    return replace(op, launches=left, results=frozenset({"GradQuery"}))


def work(n: int, q: int, e: int, dtype: str) -> dict[str, Work]:
    """Forward the logits of student and teacher, backward one product with their gradient: that ours works logits out
    again is its own affair. What no cache saves is the same on every GPU."""
    product = 2.0 * n * (n + q) * e
    forward, backward = (launches(n, q, e, dtype, DEVICES["h100"], way).work() for way in (False, True))
    return {
        "forward": replace(forward, flops={dtype: 2 * product}),
        "backward": replace(backward, flops={dtype: product}),
    }


def problem(n: int, q: int, e: int, dtype: str, device: torch.device) -> Problem:
    """Args: n, q, e: queries (and as many keys), rows of the queue, width."""

    def draw(rows: int) -> Tensor:
        return F.normalize(torch.randn(rows, e, device=device), dim=1).to(DTYPES[dtype])

    constant = (draw(n), draw(n), draw(q))
    return Problem(
        op="soft_contrastive",
        shape=f"ALBEF, batch {n}",
        size=f"{n} queries, {n} + {q:,} keys, width {e}, alpha {ALPHA}",
        what="",
        inputs=(draw(n), torch.full((1,), TAU, device=device)),
        reference=functools.partial(reference, constant, groups(constant)),
        plain=functools.partial(plain, constant),
        implementations=implementations(constant),
        work=work(n, q, e, dtype),
        upstream={"loss": 2 * torch.rand(n, device=device) / n},
        seconds=seconds_of(functools.partial(launches, n, q, e, dtype)),
    )


def cases(device: str) -> Iterator[Case]:
    for n in BATCHES[device]:
        for dtype in MEASURED[device]:
            build = functools.partial(problem, n, QUEUE, WIDTH, dtype)
            ways = ("forward", "backward", "both")
            yield Case("soft_contrastive", f"ALBEF, batch {n}", "", dtype, ways, NAMES, build)
