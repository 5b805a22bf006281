"""Where matrices of bfloat16 are better multiplied as they are than as float32."""

from __future__ import annotations

import functools

import torch


@functools.cache
def bf16_products(device_type: str) -> bool:
    """Whether this machine's CPU multiplies bfloat16 faster than float32: it has instructions for it (AVX512-BF16 or
    AMX), and PyTorch the library that uses them. Elsewhere such products are emulated, many times slower. Sums are in
    float32 either way; PyTorch rounds the result to bfloat16.

    It asks for the machine, not for a stopwatch, so that all ranks and a resumed run answer alike.
    """
    able = torch.cpu.get_capabilities()
    return (
        device_type == "cpu"
        and torch.backends.mkldnn.is_available()
        and any(able.get(name) for name in ("avx512_bf16", "amx_bf16"))
    )
