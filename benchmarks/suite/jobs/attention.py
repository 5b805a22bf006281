"""Cross-attention, for its output alone and with all statistics, against those of attention_peers.py."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from crossmask.kernels import cross_attention
from crossmask.kernels.roofline import BYTES, Work
from crossmask.kernels.roofline import device as device_named
from crossmask.kernels.roofline.attention import forward_op
from crossmask.kernels.roofline.attention_backward import backward_op

from ..cases import Case
from ..ceilings import DTYPES
from ..problem import Implementation, Outputs, Problem
from ..session import DTYPES as MEASURED
from . import attention_peers as peers

HEADS, WIDTH = 12, 64
SIZES = {  # queries, keys, samples on a CPU and on a GPU
    "ALBEF 30x257": (30, 257, {"cpu": 16, "cuda": 64}),
    "ALBEF 30x577": (30, 577, {"cpu": 8, "cuda": 64}),
    "ALBEF 577x30": (577, 30, {"cpu": 8, "cuda": 64}),
    "CoCa 77x257": (77, 257, {"cpu": 16, "cuda": 64}),
    "long 256x4096": (256, 4096, {"cpu": 1, "cuda": 16}),
}
STATISTICS = ("lse", "max_probability", "entropy", "key_attention", "query_attention")
WHAT = {"output": (), "all statistics": STATISTICS}


def ours(told: tuple[str, ...], q: Tensor, k: Tensor, v: Tensor, impl: str | None = None) -> Outputs:
    found = cross_attention(q, k, v, statistics=told, impl=impl)  # type: ignore[arg-type]
    return {"output": found.output} | {name: getattr(found.statistics, name) for name in told}


def implementations(what: str, device: torch.device, dtype: torch.dtype) -> list[Implementation]:
    on_gpu = device.type == "cuda"
    hopper = on_gpu and torch.cuda.is_available() and torch.cuda.get_device_capability(device) >= (9, 0)
    mine = Implementation("crossmask", lambda: functools.partial(ours, WHAT[what]), ours=True)
    if what == "output":
        return [
            mine,
            Implementation("sdpa", lambda: peers.sdpa),
            *(
                Implementation(f"sdpa {name}", functools.partial(peers.sdpa_by, name, dtype))
                for name in peers.SDPA
                if on_gpu
            ),
            Implementation("eager", lambda: peers.eager),
            Implementation("compile", lambda: peers.compiled(peers.eager), note="torch.compile of eager"),
            Implementation("flex", peers.flex, backward=on_gpu),
            Implementation("flash-attn", lambda: peers.output_of(peers.flash(device, dtype))),
            Implementation("flash-attn-4", lambda: peers.output_of(peers.flash4(device, dtype)), backward=hopper),
            Implementation("xformers", lambda: peers.xformers(device)),
        ]
    return [
        mine,
        Implementation("eager", lambda: peers.eager_statistics),
        Implementation("compile", lambda: peers.compiled(peers.eager_statistics), note="torch.compile of eager"),
        Implementation("head by head", lambda: peers.head_by_head, note="eager, checkpointed in training"),
        Implementation(
            "two calls", lambda: peers.two_calls(peers.sdpa_with_lse, False), note="sdpa, then weights from its lse"
        ),
        Implementation(
            "flex",
            lambda: peers.flex_statistics(device),
            note="lse and max_probability alone, in training lse alone",
        ),
        Implementation("flash-attn", lambda: peers.two_calls(peers.flash(device, dtype), False)),
        Implementation("flash-attn-4", lambda: peers.two_calls(peers.flash4(device, dtype), True), backward=hopper),
    ]


def build(shape: str, what: str, dtype: str, device: torch.device) -> Problem:
    queries, keys, samples = SIZES[shape]
    return problem(shape, what, dtype, (samples[device.type], HEADS, queries, keys, WIDTH), device)


def problem(shape: str, what: str, dtype: str, size: tuple[int, int, int, int, int], device: torch.device) -> Problem:
    """Args: size: B, H, S, P, D."""
    b, h, s, p, d = size
    of = DTYPES[dtype]

    def draw(length: int) -> Tensor:  # as a projection leaves them
        return torch.randn(b, length, h, d, device=device).to(of).transpose(1, 2)

    # A mean spreads its gradient over what it is a mean of: times their number, each output's part weighs alike.
    upstream = {
        "output": draw(s),
        **{name: torch.randn(b, h, s, device=device) for name in STATISTICS[:3]},
        "key_attention": h * s * torch.randn(b, p, device=device),
        "query_attention": h * p * torch.randn(b, s, device=device),
    }
    told = WHAT[what]
    return Problem(
        op="cross_attention",
        shape=shape,
        size=f"B={b} H={h} S={s} P={p} D={d}",
        what=what,
        inputs=(draw(s), draw(p), draw(p)),
        reference=functools.partial(ours, told, impl="reference"),
        plain=peers.eager_statistics if told else peers.eager,
        implementations=implementations(what, device, of),
        work=work(size, dtype, told),
        upstream={name: upstream[name] for name in ("output", *told)},
        checked=1,
        seconds=functools.partial(predicted, size, dtype, told),
    )


def work(size: tuple[int, int, int, int, int], dtype: str, told: tuple[str, ...]) -> dict[str, Work]:
    """What the algorithm needs: each input read once, each result written once, and nothing else kept.

    Backward reads q, k, v, output, its gradient and the float32 lse, and the statistics' gradients; its FLOPs are five
    products as large as q kᵀ, as the field counts them: the weights are worked out again.
    """
    b, h, s, p, d = size
    queries, keys, product = BYTES[dtype] * b * h * s * d, BYTES[dtype] * b * h * p * d, 2 * b * h * s * p * d
    rows = 4 * b * h * s
    statistics = 3 * rows + 4 * b * (p + s) if told else 0
    return {
        "forward": Work({dtype: 2 * product}, read=queries + 2 * keys, written=queries + statistics),
        "backward": Work(
            {dtype: 5 * product}, read=3 * queries + 2 * keys + rows + statistics, written=queries + 2 * keys
        ),
    }


def predicted(
    size: tuple[int, int, int, int, int], dtype: str, told: tuple[str, ...], gpu: str, way: str
) -> tuple[float, float]:
    """Seconds of our launches on a GPU: at least, and one after the other."""
    device = device_named(gpu)
    ops = []
    if way != "backward":
        ops.append(forward_op(*size, dtype, told, device.architecture))
    if way != "forward":
        ops.append(backward_op(*size, dtype, told, device.architecture, device.multiprocessors))
    return sum(op.work().lower_bound(device) for op in ops), sum(op.seconds(device) for op in ops)


def cases(device: str) -> Iterator[Case]:
    ways = ("forward", "backward", "both")
    for shape in SIZES:
        for what in WHAT:
            for dtype in MEASURED[device]:
                found = implementations(what, torch.device(device), DTYPES[dtype])
                names = tuple(each.name for each in found)
                build_one = functools.partial(build, shape, what, dtype)
                yield Case("cross_attention", shape, what, dtype, ways, names, build_one)
