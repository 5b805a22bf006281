"""The vocabulary's cross-entropy, with and without a teacher, against a linear layer and F.cross_entropy."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Iterator
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from crossmask.kernels import soft_cross_entropy
from crossmask.kernels.roofline import Device, Work
from crossmask.kernels.roofline import soft_cross_entropy as needed
from crossmask.kernels.roofline.cross_entropy import backward_op, forward_op
from crossmask.kernels.roofline.launches import Op
from crossmask.kernels.soft_cross_entropy.reference import soft_cross_entropy_reference

from ..cases import Case
from ..ceilings import DTYPES
from ..prediction import seconds_of
from ..problem import Implementation, Outputs, Problem, Solve, Unavailable
from ..session import DTYPES as MEASURED

VOCABULARY, WIDTH, ALPHA = 30_522, 768, 0.4  # BERT's, ALBEF's
WHATS = ("labels", "labels and teacher")
# masked words: of a batch of 8 sentences, of one of 64; of a large one
ROWS = {"cpu": {30: WHATS, 240: WHATS[1:]}, "cuda": {240: WHATS, 2048: WHATS}}
Teacher = tuple[Tensor, Tensor, Tensor]  # hidden (N, W), weight (V, W), bias (V,)


def ours(labels: Tensor, teacher: Teacher | None, hidden: Tensor, weight: Tensor, bias: Tensor) -> Outputs:
    distilled = (*teacher, ALPHA) if teacher else ()
    return told(soft_cross_entropy(hidden, weight, bias, labels, *distilled))


def reference(labels: Tensor, teacher: Teacher | None, hidden: Tensor, weight: Tensor, bias: Tensor) -> Outputs:
    exact = tuple(x.to(hidden.dtype) for x in teacher) if teacher else (None, None, None)
    losses, _ = soft_cross_entropy_reference(hidden, weight, bias, labels, *exact, ALPHA if teacher else 0.0, None)
    return told(losses)


def plain(labels: Tensor, teacher: Teacher | None, hidden: Tensor, weight: Tensor, bias: Tensor) -> Outputs:
    """With all logits; products in the inputs' dtype, softmax in float32, as autocast has it."""
    z = F.linear(hidden, weight, bias).float()
    if teacher is None:
        losses = F.cross_entropy(z, labels, reduction="none")
    else:
        p = F.log_softmax(z, dim=1)
        with torch.no_grad():
            q = F.softmax(F.linear(*teacher).float(), dim=1)
        losses = (1 - ALPHA) * F.nll_loss(p, labels, reduction="none") - ALPHA * (q * p).sum(1)
    return told(losses)


def told(losses: Tensor) -> Outputs:
    """Of rows, which is what is compared, and their mean, which is what is trained with."""
    return {"losses": losses, "mean": losses.mean(0, keepdim=True)}


def liger(labels: Tensor) -> Solve:
    if importlib.util.find_spec("liger_kernel") is None:
        raise Unavailable("is not installed: pip install liger-kernel")
    if labels.device.type != "cuda":
        raise Unavailable("its kernels need a GPU")
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss()
    return lambda hidden, weight, bias: {"mean": loss(weight, hidden, labels, bias).reshape(1)}


def implementations(labels: Tensor, teacher: Teacher | None) -> list[Implementation]:
    written = functools.partial(plain, labels, teacher)
    found = [
        Implementation("crossmask", lambda: functools.partial(ours, labels, teacher), ours=True),
        Implementation("plain MLM", lambda: written),
        Implementation("compile", lambda: torch.compile(written, dynamic=False), note="torch.compile of plain MLM"),
    ]
    if teacher is None:
        note = "its forward works the gradients out as well"
        found.append(Implementation("liger", lambda: liger(labels), note=note))
    return found


def names(what: str) -> tuple[str, ...]:
    return ("crossmask", "plain MLM", "compile", *(("liger",) if what == "labels" else ()))


def launches(n: int, v: int, w: int, dtype: str, teacher: bool, gpu: Device, backward: bool) -> Op:
    return (backward_op if backward else forward_op)(n, v, w, dtype, True, teacher, gpu.architecture)


def work(n: int, v: int, w: int, dtype: str, teacher: bool) -> dict[str, Work]:
    """Forward the logits, of the teacher as well; backward a product for the features' gradient and one for the
    weight's: that ours works logits out again is its own affair."""
    product = 2.0 * n * v * w
    forward, backward = (needed(n, v, w, dtype, True, teacher, way) for way in (False, True))
    return {
        "forward": replace(forward, flops={dtype: (1 + teacher) * product}),
        "backward": replace(backward, flops={dtype: 2 * product}),
    }


def problem(what: str, n: int, v: int, w: int, dtype: str, device: torch.device) -> Problem:
    """Args: n, v, w: rows, words of the vocabulary, width."""

    def layer() -> Teacher:
        drawn = (
            torch.randn(n, w, device=device),
            torch.randn(v, w, device=device) / w**0.5,
            torch.randn(v, device=device),
        )
        hidden, weight, bias = (x.to(DTYPES[dtype]) for x in drawn)
        return hidden, weight, bias

    labels, student, teacher = torch.randint(v, (n,), device=device), layer(), None
    if what == "labels and teacher":
        teacher = layer()
    constant = labels, teacher
    return Problem(
        op="soft_cross_entropy",
        shape=f"{n} masked words",
        size=f"{n} rows of width {w}, {v:,} words" + (f", alpha {ALPHA}" if teacher else ""),
        what=what,
        inputs=student,
        reference=functools.partial(reference, *constant),
        plain=functools.partial(plain, *constant),
        implementations=implementations(*constant),
        work=work(n, v, w, dtype, teacher is not None),
        upstream={"mean": torch.ones(1, device=device)},
        seconds=seconds_of(functools.partial(launches, n, v, w, dtype, teacher is not None)),
    )


def cases(device: str) -> Iterator[Case]:
    ways = ("forward", "backward", "both")
    for n, whats in ROWS[device].items():
        for what in whats:
            for dtype in MEASURED[device]:
                build = functools.partial(problem, what, n, VOCABULARY, WIDTH, dtype)
                yield Case("soft_cross_entropy", f"{n} masked words", what, dtype, ways, names(what), build)
