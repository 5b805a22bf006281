"""Each patch's similarity to its most similar word, against the matrix product and the maximum that one would write."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from crossmask.kernels import max_similarity
from crossmask.kernels.max_similarity.reference import max_similarity_reference
from crossmask.kernels.roofline import max_similarity as needed
from crossmask.kernels.roofline.selection import similarity_op

from ..cases import Case
from ..ceilings import DTYPES
from ..prediction import seconds_of
from ..problem import Implementation, Outputs, Problem
from ..session import DTYPES as MEASURED

Size = tuple[int, int, int, int]  # samples, patches, words, width
SIZES: dict[str, dict[str, Size]] = {
    "cpu": {"196 patches, 30 words": (16, 196, 30, 256), "577 patches, 77 words": (8, 577, 77, 768)},
    "cuda": {
        "196 patches, 30 words": (256, 196, 30, 256),
        "577 patches, 77 words": (64, 577, 77, 768),
        "4096 patches, 512 words": (16, 4096, 512, 256),
    },
}


def ours(mask: Tensor, image: Tensor, text: Tensor) -> Outputs:
    return {"score": max_similarity(image, text, mask)}


def reference(mask: Tensor, image: Tensor, text: Tensor) -> Outputs:
    return {"score": max_similarity_reference(image, text, mask)[0]}


def written(largest: Callable[[Tensor], Tensor], mask: Tensor, image: Tensor, text: Tensor) -> Outputs:
    return {"score": largest((image @ text.mT).masked_fill(~mask[:, None], -torch.inf))}


def amax(similarity: Tensor) -> Tensor:
    return similarity.amax(2)


def first(similarity: Tensor) -> Tensor:
    return similarity.max(2).values


def implementations(mask: Tensor, dtype: str) -> list[Implementation]:
    plain = functools.partial(written, amax, mask)
    by_max = functools.partial(written, first, mask)
    rounded = "" if dtype == "fp32" else f"similarities rounded to {dtype}"
    return [
        Implementation("crossmask", lambda: functools.partial(ours, mask), ours=True),
        Implementation("matmul + amax", lambda: plain, note=rounded),
        Implementation("matmul + max", lambda: by_max, note=rounded),
        Implementation("compile", lambda: torch.compile(plain, dynamic=False), note="torch.compile of matmul + amax"),
    ]


NAMES = ("crossmask", "matmul + amax", "matmul + max", "compile")


def problem(shape: str, size: Size, dtype: str, device: torch.device) -> Problem:
    """Tokens of unit length; captions of half as many words and more. A patch is near one of its words, so that
    rounding does not decide which is the most similar: gradients of the wrong word are then errors, not ties."""
    b, p, s, d = size
    lengths = torch.randint((s + 1) // 2, s + 1, (b, 1), device=device)
    text = F.normalize(torch.randn(b, s, d, device=device), dim=2)
    nearest = (torch.rand(b, p, device=device) * lengths).long()
    image = text.gather(1, nearest[..., None].expand(-1, -1, d)) + torch.randn(b, p, d, device=device) / d**0.5
    mask = torch.arange(s, device=device) < lengths
    return Problem(
        op="max_similarity",
        shape=shape,
        size=f"B={b} P={p} S={s} D={d}, words masked",
        what="",
        inputs=(F.normalize(image, dim=2).to(DTYPES[dtype]), text.to(DTYPES[dtype])),
        reference=functools.partial(reference, mask),
        plain=functools.partial(written, first, mask),
        implementations=implementations(mask, dtype),
        work={
            "forward": needed(*size, dtype, mask=True),
            "backward": needed(*size, dtype, backward=True),
        },
        upstream={"score": torch.randn(b, p, device=device)},
        seconds=seconds_of(lambda gpu, backward: similarity_op(*size, dtype, backward, not backward, gpu.architecture)),
    )


def cases(device: str) -> Iterator[Case]:
    for shape, size in SIZES[device].items():
        for dtype in MEASURED[device]:
            build = functools.partial(problem, shape, size, dtype)
            yield Case("max_similarity", shape, "", dtype, ("forward", "backward", "both"), NAMES, build)
