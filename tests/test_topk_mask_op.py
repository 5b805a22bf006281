"""topk_mask's implementations against its specification, and its place in torch.library."""

from __future__ import annotations

import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from crossmask.kernels import native
from crossmask.kernels.topk_mask import Selection, topk_mask
from crossmask.kernels.topk_mask.request import fixed_point

NAN, INF = math.nan, math.inf
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
LENGTHS = [1, 30, 77, 197, 257, 577, 4096, 16384]
OP = torch.ops.crossmask.topk_mask.default

needs_native = pytest.mark.skipif(
    native.status().missing("cpu") is not None, reason=f"native kernel: {native.status().missing('cpu')}"
)
quiet = pytest.mark.filterwarnings("ignore:topk_mask. NaN:RuntimeWarning")


def assert_equal(found: Selection, expected: Selection) -> None:
    for name in ("mask", "indices", "count", "nan"):
        x, y = getattr(found, name), getattr(expected, name)
        assert x.dtype == y.dtype, name
        assert torch.equal(x, y), name


def rough(rows: int, columns: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Rows of very different kinds: dense, tied, of every magnitude, and full of what is special."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    if rows > 1:
        x[1::6] = x[1::6].mul(2).round()  # ties
    x[2::6] = x[2::6].sign() * torch.exp2(40 * x[2::6])  # float16: zero to infinity; float32: with denormals
    x[3::6] = 3.0  # nothing but ties
    tiny = [sign * x for sign in (1, -1) for x in (0.0, 5e-324, 1e-45, 6e-8)]  # 0 and the least of three dtypes
    special = torch.tensor([NAN, INF, -INF, *tiny], dtype=torch.float64)
    drawn = special[torch.randint(len(special), (rows, columns), generator=generator)]
    x[4::6] = drawn[4::6]
    few = torch.rand(rows, columns, generator=generator) < 0.1
    return torch.where(few, drawn, x).to(dtype)


def flags(rows: int, columns: int, seed: int = 0) -> Tensor:
    valid = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) < 0.7
    valid[::5] = False
    return valid


@pytest.fixture
def poisoned() -> Iterator[None]:
    """What torch.empty gives is full of 255s, so that a result that is not written shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]


@needs_native
@quiet
@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_native_equals_the_reference(dtype: torch.dtype, n: int, poisoned: None) -> None:
    rows = 12 if n < 4096 else 6
    scores, valid = rough(rows, n, dtype, seed=n), flags(rows, n, seed=n)
    ks = torch.randint(n + 1, (rows,), generator=torch.Generator().manual_seed(n))
    amounts: list[dict[str, Any]] = [
        {"k": 0},
        {"k": n // 3},
        {"k": n, "threshold": 0.1},
        {"k": ks, "threshold": -0.5},
        {"ratio": 0.3},
        {"ratio": torch.linspace(0, 1, rows), "threshold": 0.0},
        {"threshold": 1.0},
    ]
    for i, amount in enumerate(amounts if n < 4096 else amounts[1::2]):
        for mask, largest in ((None, i % 2 == 0), (valid, i % 2 == 1), (valid, i % 2 == 0)):
            told = {**amount, "valid": mask, "largest": largest, "return_indices": True}
            assert_equal(topk_mask(scores, **told, impl="native"), topk_mask(scores, **told, impl="reference"))


@needs_native
@quiet
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("partials", "n"), [(1, 577), (3, 197), (12, 77), (4, 5)])
def test_native_partials_equal_the_reference(dtype: torch.dtype, partials: int, n: int, poisoned: None) -> None:
    scores = torch.stack([rough(7, n, dtype, seed=r) for r in range(partials)], dim=1)
    for told in ({"ratio": 0.4}, {"k": 3, "largest": False}, {"threshold": 0.2, "valid": flags(7, n)}):
        told = {**told, "return_indices": True}
        assert_equal(topk_mask(scores, **told, impl="native"), topk_mask(scores, **told, impl="reference"))


@needs_native
@quiet
def test_strides() -> None:
    """Neither the scores nor the valid positions need be contiguous, and nothing beside them is read."""
    base = rough(9, 41, torch.float32)
    valid = flags(9, 41)
    padded = torch.full((9, 3, 60), INF)
    padded[:, :, 7:48] = base[:, None]
    heads_first = base.expand(3, 9, 41).clone()
    for scores in (base.T.contiguous().T, padded[:, 1, 7:48], base.repeat_interleave(2, 1)[:, ::2]):
        for allowed in (valid, valid.T.contiguous().T, torch.cat([valid, valid], 1)[:, :41]):
            told: dict[str, Any] = {"ratio": 0.4, "return_indices": True}
            expected = topk_mask(base, valid=valid, **told, impl="reference")
            assert_equal(topk_mask(scores, valid=allowed, **told, impl="native"), expected)
    for scores in (padded[:, :, 7:48], heads_first.transpose(0, 1), base[:, None].expand(9, 3, 41)):
        expected = topk_mask(scores.contiguous(), **told, impl="reference")
        assert_equal(topk_mask(scores, **told, impl="native"), expected)
    one_row, one_valid = base[:1].expand(9, 41), valid[1:2].expand(9, 41)
    expected = topk_mask(one_row.contiguous(), valid=one_valid.contiguous(), **told, impl="reference")
    assert_equal(topk_mask(one_row, valid=one_valid, **told), expected)
    ks = torch.tensor([4]).expand(9)
    assert topk_mask(base.nan_to_num(0.0), k=ks).sum(1).tolist() == [4] * 9


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (0, 0), (0, 2, 4), (3, 2, 0)], ids=str)
@pytest.mark.parametrize("impl", [None, "reference"])
def test_nothing_to_select_from(shape: tuple[int, ...], impl: Any) -> None:
    B, N = shape[0], shape[-1]
    for told, width in (({"ratio": 0.5}, min(N, 2)), ({"k": 0}, 0), ({"threshold": 0.0}, N)):
        for noise in ({}, {"gumbel_seed": 1}):
            selection = topk_mask(torch.zeros(shape), **told, **noise, return_indices=True, impl=impl)
            assert selection.mask.shape == (B, N)
            assert selection.indices.shape == (B, width)
            assert selection.count.tolist() == selection.nan.tolist() == [0] * B


@needs_native
def test_rows_longer_than_a_program_holds() -> None:
    scores = torch.randn(2, 100_003)
    assert_equal(
        topk_mask(scores, ratio=0.123, return_indices=True),
        topk_mask(scores, ratio=0.123, return_indices=True, impl="reference"),
    )


def test_other_floating_dtypes_are_cast() -> None:
    scores = torch.randn(3, 50).to(torch.float8_e4m3fn)
    assert torch.equal(topk_mask(scores, k=7), topk_mask(scores.float(), k=7))


@needs_native
def test_any_number_of_threads_gives_the_same() -> None:
    scores, threads = rough(600, 577, torch.float32).nan_to_num(0.5), torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(topk_mask(scores, ratio=0.3, gumbel_seed=5, return_indices=True))
    finally:
        torch.set_num_threads(threads)
    assert_equal(found[1], found[0])
    assert_equal(found[2], found[0])


@needs_native
@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="one vector width is compiled here")
@quiet
@pytest.mark.parametrize("width", ["default", "avx2"])
def test_every_vector_width_gives_the_same(width: str, tmp_path: Path) -> None:
    cases = []
    for dtype, n, largest in ((torch.float64, 77, True), (torch.float32, 577, False), (torch.bfloat16, 257, True)):
        scores = torch.stack([rough(12, n, dtype, seed=r) for r in range(3)], dim=1)
        told = {"ratio": 0.3, "valid": flags(12, n), "largest": largest, "return_indices": True}
        for scores_too in (scores, scores[:, 0].contiguous()):
            for noise in ({}, {"gumbel_seed": 7}):
                found = topk_mask(scores_too, **told, **noise, impl="native")
                cases.append((scores_too, {**told, **noise}, [found.mask, found.indices, found.count, found.nan]))
    torch.save(cases, tmp_path / "cases.pt")
    code = """
import sys, torch
from crossmask.kernels.topk_mask import topk_mask
for scores, told, expected in torch.load(sys.argv[1]):
    found = topk_mask(scores, **told, impl="native")
    for x, y in zip((found.mask, found.indices, found.count, found.nan), expected):
        assert torch.equal(x, y), (scores.dtype, told)
"""
    ran = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "cases.pt")],
        env={**os.environ, "ATEN_CPU_CAPABILITY": width},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr


def test_scores_may_require_gradients() -> None:
    scores = torch.randn(2, 9, requires_grad=True)
    for impl in (None, "reference"):
        assert not topk_mask(scores, k=3, impl=impl).requires_grad  # type: ignore[call-overload]
    with torch.inference_mode():
        assert int(topk_mask(torch.randn(2, 9), k=3).sum()) == 6


# ---- torch.library and torch.compile


@quiet
@pytest.mark.parametrize("op", [OP, torch.ops.crossmask.topk_mask_triton.default], ids=["native", "triton"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(dtype: torch.dtype, op: Any) -> None:
    if op is not OP and (dtype == torch.bfloat16 or torch.cuda.is_available()):
        pytest.skip("Triton's op on CPU tensors runs in its interpreter, which gets bfloat16 wrong")
    plain = (rough(3, 40, dtype)[:, None], None, 5, None, None, None, None, True, None, None, 5)
    seed, rows = torch.tensor([3]), torch.arange(3)
    fixed = fixed_point(torch.tensor([0.1, 0.5, 1.0]))
    full = (torch.randn(3, 2, 40).to(dtype), flags(3, 40), None, None, None, fixed, 0.5, False, seed, rows, 40)
    for arguments in (plain, full):
        torch.library.opcheck(op, arguments)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is on where there is no GPU")
def test_the_triton_implementation_by_its_name() -> None:
    """Strides that the kernel cannot read are copied first."""
    scores = torch.randn(40, 6)
    for x in (scores.T, scores.T.contiguous(), scores.T[:, ::3]):
        found = topk_mask(x, ratio=0.4, return_indices=True, impl="triton")
        wanted = topk_mask(x, ratio=0.4, return_indices=True, impl="reference")
        for name in ("mask", "indices", "count", "nan"):
            assert torch.equal(getattr(found, name), getattr(wanted, name)), name


@needs_native
def test_the_op_refuses_what_the_kernel_cannot_take() -> None:
    ok = (torch.zeros(2, 1, 4), None, 2, None, None, None, None, True, None, None, 0)

    def call(**changed: Any) -> None:
        names = ["scores", "valid", "k", "ratio", "row_k", "row_ratio", "threshold", "largest", "seed", "rows", "width"]
        OP(*(changed.get(name, x) for name, x in zip(names, ok, strict=True)))

    call()
    for changed, message in (
        ({"scores": torch.zeros(2, 4)}, "scores must be"),
        ({"scores": torch.zeros(2, 0, 4)}, "scores must be"),
        ({"scores": torch.zeros(2, 1, 4, dtype=torch.int32)}, "scores must be float64"),
        ({"valid": torch.ones(2, 3, dtype=torch.bool)}, r"valid must be bool \(2, 4\)"),
        ({"valid": torch.ones(2, 4)}, r"valid must be bool \(2, 4\)"),
        ({"row_k": torch.ones(3, dtype=torch.int64)}, "row_k must be 2 contiguous int64"),
        ({"row_ratio": torch.ones(2)}, "row_ratio must be 2 contiguous int64"),
        ({"seed": torch.ones(1, dtype=torch.int64)}, "go together"),
        ({"width": -1}, "width must not be negative"),
    ):
        with pytest.raises(RuntimeError, match=message):
            call(**changed)
    call(row_k=torch.tensor([-3, 99]), k=None)  # out of range: nothing, and everything


def test_compiled_in_one_piece() -> None:
    def select(scores: Tensor, valid: Tensor, ks: Tensor, seed: Tensor, ratio: float) -> tuple[Any, ...]:
        by_ratio = topk_mask(scores, ratio=ratio, valid=valid)
        by_k = topk_mask(scores, k=ks, gumbel_seed=seed, return_indices=True)
        by_threshold = topk_mask(scores.softmax(-1), threshold=0.02, gumbel_rows=ks, gumbel_seed=3)
        return by_ratio, by_k.indices, by_k.count, by_k.nan, by_threshold

    torch._dynamo.reset()
    compiled = torch.compile(select, fullgraph=True, backend="aot_eager")
    seed = torch.tensor([4])
    for n, ratio in ((40, 0.3), (55, 0.7), (70, 0.25)):  # lengths and ratios become symbols
        arguments = torch.randn(4, n), flags(4, n), torch.tensor([0, 3, 9, n]), seed, ratio
        for x, y in zip(compiled(*arguments), select(*arguments), strict=True):
            assert torch.equal(x, y)
    reference_too = torch.compile(lambda x: topk_mask(x, k=3, impl="reference"), fullgraph=True, backend="aot_eager")
    scores = torch.randn(4, 9)
    assert torch.equal(reference_too(scores), topk_mask(scores, k=3))


def test_exported() -> None:
    class Select(torch.nn.Module):
        def forward(self, scores: Tensor) -> Selection:
            return topk_mask(scores, ratio=0.25, return_indices=True)

    scores = torch.randn(3, 44)
    program = torch.export.export(Select(), (scores,))
    assert_equal(program.module()(scores), topk_mask(scores, ratio=0.25, return_indices=True))


def test_fake_tensors_have_the_shapes() -> None:
    for scores in (torch.empty(5, 33, device="meta"), torch.empty(5, 2, 33, device="meta")):
        mask, indices, count, nan = OP(
            scores if scores.ndim == 3 else scores[:, None], None, None, 2**40, None, None, None, True, None, None, 8
        )
        assert (mask.shape, indices.shape, count.shape, nan.shape) == ((5, 33), (5, 8), (5,), (5,))
        assert (mask.dtype, indices.dtype, count.dtype, nan.dtype) == (torch.bool, *[torch.int64] * 3)


def test_without_the_extension() -> None:
    """The op itself then runs the reference, so that an exported program finds a kernel there too."""
    code = """
import torch, warnings
from crossmask.kernels.topk_mask import topk_mask
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    scores = torch.tensor([[1.0, 3.0, 2.0]])
    assert topk_mask(scores, k=2).tolist() == [[False, True, True]]
assert "CROSSMASK_NATIVE=0" in str(caught[0].message), caught
found = torch.ops.crossmask.topk_mask(scores[:, None], None, 2, None, None, None, None, True, None, None, 2)
assert [x.tolist() for x in found] == [[[False, True, True]], [[1, 2]], [2], [0]]
"""
    environment = {**os.environ, "CROSSMASK_NATIVE": "0"}
    ran = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr


# ---- speed


@needs_native
def test_faster_than_topk_and_scatter() -> None:
    """No slower is what is promised; it is tens of times faster (benchmarks/bench_selection.py), so no load turns it
    round."""
    scores, threads = torch.randn(256, 577), torch.get_num_threads()

    def plain() -> Tensor:
        marked = torch.zeros_like(scores, dtype=torch.bool)
        return marked.scatter_(1, scores.topk(288, dim=1).indices, True)

    def timed(select: Any) -> float:
        start = time.perf_counter()
        select()
        return time.perf_counter() - start

    try:
        torch.set_num_threads(1)
        assert torch.equal(plain(), topk_mask(scores, k=288))
        ratios = [timed(lambda: topk_mask(scores, k=288)) / timed(plain) for _ in range(21)]
    finally:
        torch.set_num_threads(threads)
    assert statistics.median(ratios) <= 0.5
