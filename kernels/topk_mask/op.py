"""``crossmask::topk_mask`` for torch.library: schema, fake kernel, and the reference where no other kernel stands.

``csrc/topk_mask_cpu.cpp`` registers under this name for CPUs when the extension loads. The Triton kernels have a name
of their own, ``crossmask::topk_mask_triton``: in Triton's interpreter they run on CPUs too.
Nothing of the result has a gradient, and no autograd is registered: torch.library's would cost a small call its time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import native
from . import reference
from .request import Request, Selected

# k and ratio (fixed point, request.py) hold for every row; row_k and row_ratio are (B,) int64. At most one of the four.
SCHEMA = (
    "(Tensor scores, Tensor? valid, SymInt? k, SymInt? ratio, Tensor? row_k, Tensor? row_ratio, float? threshold, "
    "bool largest, Tensor? gumbel_seed, Tensor? gumbel_rows, SymInt width) -> "
    "(Tensor mask, Tensor indices, Tensor count, Tensor nan)"
)


def arguments(
    k: int | Tensor | None, ratio: int | Tensor | None
) -> tuple[int | None, int | None, Tensor | None, Tensor | None]:
    """k and ratio as the schema has them."""
    row_k = k if isinstance(k, Tensor) else None
    row_ratio = ratio if isinstance(ratio, Tensor) else None
    return None if isinstance(k, Tensor) else k, None if isinstance(ratio, Tensor) else ratio, row_k, row_ratio


def _request(
    k: int | None,
    ratio: int | None,
    row_k: Tensor | None,
    row_ratio: Tensor | None,
    threshold: float | None,
    largest: bool,
    gumbel_seed: Tensor | None,
    gumbel_rows: Tensor | None,
    width: int,
) -> Request:
    return Request(
        k=row_k if k is None else k,
        ratio=row_ratio if ratio is None else ratio,
        threshold=threshold,
        largest=largest,
        seed=gumbel_seed,
        rows=gumbel_rows,
        width=width,
    )


def _reference(scores: Tensor, valid: Tensor | None, *asked: object) -> Selected:
    return reference.select(scores, valid, _request(*asked))  # type: ignore[arg-type]


def _triton(scores: Tensor, valid: Tensor | None, *asked: object) -> Selected:
    from .triton import launch  # imported when it is first needed

    scores = scores if scores.stride(-1) == 1 else scores.contiguous()
    return launch.select(scores, valid, _request(*asked))  # type: ignore[arg-type]


def _fake(scores: Tensor, valid: Tensor | None, *asked: object) -> Selected:
    B, _, N = scores.shape
    width: int = asked[-1]  # type: ignore[assignment]
    return (
        scores.new_empty((B, N), dtype=torch.bool),
        scores.new_empty((B, width), dtype=torch.int64),
        scores.new_empty(B, dtype=torch.int64),
        scores.new_empty(B, dtype=torch.int64),
    )


for _name, _kernel in (("crossmask::topk_mask", _reference), ("crossmask::topk_mask_triton", _triton)):
    if hasattr(torch.ops.crossmask, _name.partition("::")[2]):
        continue  # in a checkout, transformers imports this folder once more, as the package "kernels" it looks for
    torch.library.define(_name, SCHEMA, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.impl(_name, "default")(_kernel)
    torch.library.register_fake(_name)(_fake)

NATIVE = torch.ops.crossmask.topk_mask.default
TRITON = torch.ops.crossmask.topk_mask_triton.default

native.status()  # loads the extension, whose kernels then stand before the reference
