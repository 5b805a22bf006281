"""What topk_mask refuses, what it warns of, and which implementation it picks."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch

from crossmask.kernels import native
from crossmask.kernels.topk_mask import dispatch, topk_mask

NAN = math.nan
MISSING = native.status().missing("cpu")
IMPLEMENTATIONS = [
    pytest.param("native", marks=pytest.mark.skipif(MISSING is not None, reason=f"native kernel: {MISSING}")),
    "reference",
]


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_nan_is_reported(impl: Any) -> None:
    scores = torch.tensor([[1.0, NAN, 2.0], [1.0, 2.0, 3.0]])
    with pytest.warns(RuntimeWarning, match="NaN among the valid scores") as caught:
        topk_mask(scores, k=1, impl=impl)
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        topk_mask(scores, k=1, valid=~scores.isnan(), impl=impl)
        torch.compile(lambda x: topk_mask(x, k=1, impl=impl), fullgraph=True, backend="aot_eager")(scores)


ZEROS = torch.zeros(2, 4)
BAD: list[tuple[dict[str, Any], str]] = [
    *(({"ratio": ratio}, r"ratio must lie in \[0, 1\], got") for ratio in (-0.1, 1.1, NAN, 30)),
    ({"ratio": torch.tensor([0.5, 1.5])}, r"ratio must lie in \[0, 1\], got 0.5 to 1.5"),
    ({"ratio": torch.tensor([0.5, NAN])}, r"ratio must lie in \[0, 1\]"),
    (
        {"ratio": torch.tensor([0.5])},
        r"ratio must be one float, or \(2,\) float32 or float64 on cpu.*got torch.float32 \(1,\)",
    ),
    ({"ratio": torch.tensor([1, 1])}, r"ratio must be one float, or \(2,\) float32 or float64"),
    ({"ratio": torch.tensor([0.2, 0.9]).half()}, r"float32 or float64 on cpu, one for each row, got torch.float16"),
    ({"ratio": "0.5"}, "ratio must be a float or a tensor of one for each row, got str"),
    ({"k": "3"}, r"k must be an int or a tensor of one for each row, got str: pass int\(k\)"),
    ({"k": 1, "threshold": "a"}, "threshold must be a number, got str"),
    ({"k": 5}, r"k must lie in \[0, 4\], the positions of a row, got 5: pass min\(k, 4\)"),
    ({"k": -1}, r"k must lie in \[0, 4\].*got -1"),
    ({"k": 0.5}, "k must be a whole number.*pass ratio=0.5"),
    ({"k": torch.tensor([2, 5])}, r"k must lie in \[0, 4\].*got 2 to 5"),
    ({"k": torch.tensor([-2, 3])}, r"k must lie in \[0, 4\].*got -2 to 3"),
    ({"k": torch.tensor([2.0, 3.0])}, r"k must be one int, or \(2,\) int on cpu.*got torch.float32"),
    ({"k": torch.tensor([True, False])}, r"k must be one int"),
    ({"k": torch.tensor(2)}, r"k must be one int, or \(2,\) int"),
    ({"k": torch.ones(2, dtype=torch.int64, device="meta")}, "on cpu, one for each row, got .* on meta"),
    ({}, "nothing says how many to mark: give k, ratio or threshold"),
    ({"k": 1, "ratio": 0.5}, "k and ratio both say how many: leave one out, got k=1 and ratio=0.5"),
    ({"threshold": torch.tensor(1.0)}, "threshold must be a number, got a tensor"),
    ({"scores": torch.zeros(4), "k": 1}, r"scores must be a floating \(rows, positions\) tensor.*\(4,\)"),
    ({"scores": torch.zeros(1, 1, 1, 4), "k": 1}, r"scores must be a floating \(rows, positions\)"),
    ({"scores": torch.zeros(1, 4, dtype=torch.int64), "k": 1}, "scores must be a floating.*int64"),
    ({"scores": torch.zeros(2, 0, 4), "k": 1}, "scores must have at least one partial"),
    ({"scores": [[1.0]], "k": 1}, "scores must be a tensor, got list"),
    ({"k": 1, "valid": torch.ones(2, 3, dtype=torch.bool)}, r"valid must be bool \(2, 4\), got torch.bool \(2, 3\)"),
    ({"k": 1, "valid": torch.ones(2, 4)}, r"valid must be bool.*float32.*valid.bool\(\)"),
    ({"k": 1, "valid": [True]}, "valid must be a bool tensor"),
    (
        {"k": 1, "valid": torch.ones(2, 4, dtype=torch.bool, device="meta")},
        "valid must be on the device of scores, cpu",
    ),
    ({"k": 1, "gumbel_rows": torch.arange(2)}, "gumbel_rows without gumbel_seed"),
    ({"k": 1, "gumbel_seed": 1, "gumbel_rows": torch.arange(3)}, r"gumbel_rows must be int64 \(2,\) on cpu.*\(3,\)"),
    ({"k": 1, "gumbel_seed": 1, "gumbel_rows": torch.zeros(2)}, r"gumbel_rows must be int64.*float32"),
    ({"k": 1, "gumbel_seed": 1, "gumbel_rows": [0, 1]}, "gumbel_rows must be an int64 tensor"),
    ({"k": 1, "gumbel_seed": 1.5}, "gumbel_seed must be a 64-bit integer"),
    ({"k": 1, "gumbel_seed": 2**63}, "gumbel_seed must be a 64-bit integer"),
    ({"k": 1, "gumbel_seed": torch.tensor([1, 2])}, r"gumbel_seed must be one int64 on cpu, got torch.int64 \(2,\)"),
    ({"k": 1, "impl": "cuda"}, r"unknown implementation 'cuda'; choose from \['native', 'triton', 'reference'\]"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=[str(i) for i in range(len(BAD))])
def test_refuses(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message) as caught:
        topk_mask(**{"scores": ZEROS, **arguments})
    assert "\n" not in str(caught.value)


def test_what_cannot_run_is_not_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    absent = native.NativeStatus(loaded=False, reason="no compiler here; install one")
    with pytest.raises(ValueError, match="impl='native' runs on CPUs, but scores are on meta"):
        topk_mask(ZEROS.to("meta"), k=1, impl="native")
    with monkeypatch.context() as patch:
        patch.delenv("TRITON_INTERPRET", raising=False)
        with pytest.raises(ValueError, match="impl='triton' needs a CUDA or ROCm device, but scores are on cpu"):
            topk_mask(ZEROS, k=1, impl="triton")
        patch.setenv("TRITON_INTERPRET", "1")
        with pytest.raises(ValueError, match="at most 16384 positions in a row, got 16385: use impl='reference'"):
            topk_mask(torch.zeros(1, 16385), k=1, impl="triton")
        patch.setattr(dispatch, "HAS_TRITON", False)
        with pytest.raises(ValueError, match="needs the package triton: pip install triton"):
            topk_mask(ZEROS, k=1, impl="triton")
        assert dispatch.implementation("cuda") == "reference"
    assert dispatch.implementation("cpu") == ("reference" if native.status().missing("cpu") else "native")

    monkeypatch.setattr(native, "status", lambda: absent)
    assert dispatch.implementation("cpu") == "reference"
    with pytest.raises(ValueError, match="impl='native': no compiler here; install one; or use impl='reference'"):
        topk_mask(ZEROS, k=1, impl="native")
    for cache in (native.announce, dispatch.announce):
        cache.cache_clear()
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(3):
                topk_mask(ZEROS, k=1)
        assert [str(w.message) for w in caught] == [
            "crossmask: topk_mask runs in plain PyTorch on cpu: no compiler here; install one"
        ]
    finally:
        for cache in (native.announce, dispatch.announce):
            cache.cache_clear()
