"""Starts the backward kernels: which of them, over how many programs, with which memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import dropout
from ..request import Forward, Gradients, Masks, Request, share
from . import configs
from .backward import backward_fused, backward_keys, backward_queries
from .backward_rows import backward_columns, backward_rows
from .configs import Config
from .launch import dense, masks_of, run, strides, unit, writable

PROGRAMS = 2  # of backward_fused that a multiprocessor holds at once
INTERPRETED = 8  # multiprocessors that Triton's interpreter stands for


def backward(
    gradients: Gradients,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    found: Forward,
    masks: Masks,
    seed: Tensor | None,
    request: Request,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq (B, H, S, D), dk and dv (B, H, P, D), as ``torch.empty_like`` lays out q, k and v.

    ``found`` is what ``forward`` gave for the same request; ``seed`` may be None without dropout. The formulas
    stand in ``backward.py``.
    """
    (B, H, S, D), P = q.shape, k.shape[2]
    heads, block_d = B * H, max(16, 1 << (D - 1).bit_length())
    arch = configs.architecture(q.device)
    results = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    dq, dk, dv = map(writable, results)
    inputs = {"q": q, "k": k, "v": v, "o": found.output, "do": gradients.output}
    read = {name: dense(x) for name, x in inputs.items()}
    c = _by_head(gradients.key_attention, share(masks.query, S, masks.head, H, request), H)
    u = _by_head(gradients.query_attention, share(masks.key, P, masks.head, H, request), H)
    g, x, e = _rows(gradients.lse), _rows(gradients.max_probability), _rows(gradients.entropy)
    rho = torch.empty((B, H, S), dtype=torch.float32, device=q.device)
    argmax = None if x is None else torch.empty_like(rho, dtype=torch.int32)

    tensors = {
        "Q": read["q"], "K": read["k"], "V": read["v"], "Output": read["o"], "GradOutput": read["do"],
        "Lse": found.lse, "MaxProbability": found.max_probability, "Entropy": found.entropy,
        "GradLse": g, "GradMax": x, "GradEntropy": e, "ColumnLse": found.column_lse, "C": c, "U": u,
        "Rho": rho, "Peak": None if x is None else torch.empty_like(rho), "Argmax": argmax, "Tau": None, "Seed": seed,
        "GradQ": dq, "GradK": dk, "GradV": dv,
    }  # fmt: skip
    given: dict[str, Any] = {name: q if tensor is None else tensor for name, tensor in tensors.items()}  # q is not read
    given |= {
        "H": H, "S": S, "P": P, "D": D, "BLOCK_D": block_d, "scale": float(request.scale),
        "threshold": dropout.threshold(request.dropout_p) - 2**31, "keep_scale": 1.0 / (1.0 - request.dropout_p),
        "HAS_LSE": g is not None, "HAS_MAX": x is not None, "HAS_ENTROPY": e is not None,
        "HAS_KEY": c is not None, "HAS_QUERY": u is not None, "HAS_DROPOUT": request.dropout_p > 0,
        **masks_of(masks, q),
    }  # fmt: skip
    matrices = read | {"dq": dq, "dk": dk, "dv": dv}
    given["UNIT"] = units = unit(*matrices.values())
    for name, tensor in matrices.items():
        given |= strides(name, tensor, units)
    for name, means in {"c": c, "u": u}.items():
        given[f"{name}_batch"], given[f"{name}_head"] = (0, 0) if means is None else means.stride()[:2]

    def select(kernel: Any) -> Config | None:
        links = masks.link is not None
        return configs.select(kernel.__name__, arch, block_d, q.dtype, S, P, links)

    def launch(kernel: Any, programs: int, config: Config) -> None:
        arguments = {name: given[name] for name in kernel.arg_names if name in given}
        run(kernel, (programs * heads,), arguments, config, q.device)

    def start(kernel: Any, axis: str) -> None:
        """A program for every head and block of queries (axis S) or keys (P)."""
        config = select(kernel)
        if config is None:
            raise RuntimeError(f"there is no tile for {kernel.__name__} on {arch} at S={S}, P={P}, D={D}, {q.dtype}")
        blocks = -(-S // config.block_s) if axis == "S" else -(-P // config.block_p)
        launch(kernel, blocks, config)

    start(backward_rows, "S")
    fused = select(backward_fused)
    if fused is not None:
        blocks = -(-P // fused.block_p)
        each = -(-blocks // _splits(blocks, heads, q.device))  # blocks of keys a program
        splits = -(-blocks // each)
        parts = torch.empty((splits, B, H, S, D), dtype=torch.float32, device=q.device) if splits > 1 else dq[None]
        given |= {"GradQ": parts, "splits": splits, "split_keys": each * fused.block_p}
        given |= {"dq_split": parts.stride(0) // units, **strides("dq", parts[0], units)}
        launch(backward_fused, splits, fused)
        if splits > 1:
            dq = parts.sum(0)
    else:
        if u is not None:
            given["Tau"] = torch.empty((B, H, P), dtype=torch.float32, device=q.device)
            start(backward_columns, "P")
        start(backward_queries, "S")
        start(backward_keys, "P")
    for result, written in zip(results, (dq, dk, dv), strict=True):
        if written is not result:
            result.copy_(written)
    return results


def _splits(blocks: int, heads: int, device: torch.device) -> int:
    """How many programs share the key blocks of one head in backward_fused, so that the heads fill the device.

    A function of shapes and device alone, because it decides the order of a sum.
    """
    multiprocessors = INTERPRETED
    if device.type == "cuda":
        multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
    return min(blocks, -(-PROGRAMS * multiprocessors // heads))


def _rows(gradient: Tensor | None) -> Tensor | None:
    """The gradient of a row statistic as the kernels read it: (B, H, S) float32, contiguous."""
    return None if gradient is None else gradient.to(torch.float32).contiguous()


def _by_head(gradient: Tensor | None, weight: Tensor | float, heads: int) -> Tensor | None:
    """The gradient of a mean, by one of the weights in it: (B, H, length) float32, dense but for shared heads."""
    if gradient is None:
        return None
    per_head = gradient.dim() == 3
    if per_head and isinstance(weight, Tensor):
        weight = weight[:, None]
    gradient = gradient.to(torch.float32)
    scaled = (gradient * weight if isinstance(weight, Tensor) or weight != 1.0 else gradient).contiguous()
    return scaled if per_head else scaled[:, None].expand(-1, heads, -1)
