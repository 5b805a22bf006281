"""bfloat16 for Triton 3.8's interpreter, which keeps it as raw bits, adds those, and truncates where a GPU rounds.

    with repaired():
        kernel[grid](...)

Casts round to nearest even; elementwise operations compute in float32 and round; ``tl.dot`` multiplies exactly and adds
in float32. ``tl.sum`` and atomics raise: a kernel goes to float32 before those, as ``tl.max`` does by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder as Builder
from triton.runtime.interpreter import TensorHandle as Handle

ELEMENTWISE = ("binary_op", "unary_op", "ternary_op", "create_fma", "create_rsqrt", "create_erf")


def widen(bits: np.ndarray) -> np.ndarray:
    """uint16 bit patterns of bfloat16 as float32; exact."""
    return (np.ascontiguousarray(bits).astype(np.uint32) << 16).view(np.float32)


def narrow(values: np.ndarray) -> np.ndarray:
    """float32 rounded to nearest even, as uint16 bit patterns of bfloat16."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = ((bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def is_bf16(x: Any) -> bool:
    return isinstance(x, Handle) and x.dtype.scalar == tl.bfloat16


def as_float32(x: Any) -> Any:
    return Handle(widen(x.data), tl.float32) if is_bf16(x) else x


def _elementwise(stock: Callable[..., Handle]) -> Callable[..., Handle]:
    def repaired(self: Builder, *arguments: Any) -> Handle:
        found = stock(self, *map(as_float32, arguments))
        computed = any(map(is_bf16, arguments)) and found.data.dtype == np.float32  # and not a comparison
        return Handle(narrow(found.data), tl.bfloat16) if computed else found

    return repaired


def _cast(stock: Callable[..., Handle]) -> Callable[..., Handle]:
    def repaired(self: Builder, x: Handle, to: tl.dtype, *rounding: Any) -> Handle:
        if to.scalar == tl.bfloat16:
            return x if is_bf16(x) else Handle(narrow(x.data.astype(np.float32)), tl.bfloat16)
        if is_bf16(x):
            return Handle(widen(x.data).astype(interpreter._get_np_dtype(to.scalar)), to.scalar)
        return stock(self, x, to, *rounding)

    return repaired


def _dot(stock: Callable[..., Handle]) -> Callable[..., Handle]:
    return lambda self, *arguments: stock(self, *map(as_float32, arguments))


def _refuse(stock: Callable[..., Any]) -> Callable[..., Any]:
    def refused(self: Any, *arguments: Any) -> Any:
        operands = arguments[0] if isinstance(arguments[0], tuple) else arguments
        if any(is_bf16(x) or getattr(x, "dtype", None) == tl.bfloat16 for x in operands):
            raise TypeError("the interpreter cannot do this in bfloat16: go to float32 first")
        return stock(self, *arguments)

    return refused


@contextmanager
def repaired() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        repairs = {"cast_impl": _cast, "create_fp_to_fp": _cast, "create_dot": _dot, "create_atomic_rmw": _refuse}
        repairs |= dict.fromkeys(ELEMENTWISE, _elementwise)
        for name, repair in repairs.items():
            patch.setattr(Builder, name, repair(getattr(Builder, name)))
        for operation in (interpreter.ReduceOps, interpreter.ScanOps):
            patch.setattr(operation, "apply_impl", _refuse(operation.apply_impl))
        patch.setattr(Builder, "get_bf16", lambda _, x: Handle(narrow(np.array([x])), tl.bfloat16), raising=False)
        yield
