"""What the rest of a training step does: linear layers, norms, the optimizer, the teacher's moving average.

These are PyTorch's, DeepSpeed's and csrc's kernels as they are usually written, each tensor crossing the memory bus
once a launch: a model of them, which nothing here checks.
"""

from __future__ import annotations

from .work import BYTES, Work


def linear(rows: int, inputs: int, outputs: int, dtype: str, bias: bool = True) -> Work:
    """(rows, inputs) by a weight (outputs, inputs): reads both and the bias, writes (rows, outputs); 2 FLOPs a
    multiply-add."""
    e = BYTES[dtype]
    read = float(e * (rows * inputs + inputs * outputs + bias * outputs))
    return Work(
        {dtype: 2.0 * rows * inputs * outputs}, float(bias * rows * outputs), read, float(e * rows * outputs), 0.0, read
    )


def linear_backward(
    rows: int, inputs: int, outputs: int, dtype: str, bias: bool = True, for_input: bool = True
) -> Work:
    """dX = dY W reads dY and W, dW = dYᵀ X reads dY and X, the bias's gradient reads dY once more; each writes its
    result. ``for_input=False``: the first layer of a network, whose input has no gradient."""
    e = BYTES[dtype]
    d_input = linear(rows, outputs, inputs, dtype, bias=False) if for_input else Work()
    d_weight = linear(inputs, rows, outputs, dtype, bias=False)
    d_bias = Work(
        {}, float(rows * outputs), float(e * rows * outputs), float(e * outputs), 0.0, float(e * rows * outputs)
    )
    return d_input + d_weight + d_bias if bias else d_input + d_weight


def layer_norm(rows: int, width: int, dtype: str) -> Work:
    """Reads x, writes y and the float32 mean and reciprocal deviation of each row; about 8 operations an element."""
    e = BYTES[dtype]
    read = float(e * (rows * width + 2 * width))
    return Work({}, 8.0 * rows * width, read, float(e * rows * width + 8 * rows), 0.0, read)


def layer_norm_backward(rows: int, width: int, dtype: str) -> Work:
    """Reads x, dy and the statistics for dx, and all of them again for the gradients of weight and bias."""
    e = BYTES[dtype]
    one = e * 2 * rows * width + 8 * rows
    read = float(2 * one + e * width)
    return Work({}, 14.0 * rows * width, read, float(e * (rows * width + 2 * width)), float(one), read)


def elementwise(elements: int, dtype: str, inputs: int = 1, outputs: int = 1, operations: int = 1) -> Work:
    """A launch that reads ``inputs`` tensors and writes ``outputs``: GELU, a residual, a dropout."""
    read = float(BYTES[dtype] * inputs * elements)
    return Work({}, float(operations * elements), read, float(BYTES[dtype] * outputs * elements), 0.0, read)


def adamw(parameters: int, gradient: str = "fp32", model: str | None = "bf16") -> Work:
    """One fused step over float32 master weights and two float32 moments: reads them (12 bytes a parameter) and the
    gradient, writes them back and, with ``model``, the copy that the model computes with. About 15 operations."""
    read = float(parameters * (12 + BYTES[gradient]))
    written = float(parameters * (12 + (BYTES[model] if model else 0)))
    return Work({}, 15.0 * parameters, read, written, 0.0, read)


def ema_update(parameters: int, teacher: str = "fp32", student: str = "fp32", copy: str | None = None) -> Work:
    """csrc/ema_cuda_kernel.h: every element of teacher and student is read once, the teacher and, where there is one,
    its copy written once; a subtraction, a multiplication and an addition an element."""
    read = float(parameters * (BYTES[teacher] + BYTES[student]))
    written = float(parameters * (BYTES[teacher] + (BYTES[copy] if copy else 0)))
    return Work({}, 3.0 * parameters, read, written, 0.0, read)
