"""Triton's contrastive kernels against float64: on a GPU where there is one, else in Triton's interpreter.

The blocks are chosen here, not by the table of tiles, so that short lengths already take several of them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace

import interpreter_bf16
import pytest
import torch
from test_soft_contrastive import DEVICE, LENGTHS, Case, assert_exact, inputs
from torch import Tensor

from crossmask.kernels import launch
from crossmask.kernels.cross_attention.triton.configs import FAMILIES, assuming
from crossmask.kernels.soft_contrastive.request import Contrast
from crossmask.kernels.soft_contrastive.triton import configs, launch_backward, launch_forward
from crossmask.kernels.soft_contrastive.triton.configs import Config

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
KERNELS = ("forward_keys", "forward_rows", "backward_queries", "backward_keys")
SMALL = Config(16, 16, 16, 16)
# NumPy says so in the interpreter, of rows beyond the edge
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow|divide by zero) encountered:RuntimeWarning")

Check = Callable[..., tuple[Tensor, ...]]


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    """Every torch.empty, partial sums included, is full of NaN, or of the largest integer."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch) -> Check:
    def both(case: Case, alpha: float = 0.4, tile: Config = SMALL, g: Tensor | None = None) -> tuple[Tensor, ...]:
        """Loss and gradients, compared with float64's."""
        rows = Config(16, 4)  # four shares at a time
        monkeypatch.setattr(configs, "select", lambda kernel, *_: rows if kernel == "forward_rows" else tile)
        g = torch.randn(len(case.queries)).to(DEVICE) if g is None else g
        emulated = DEVICE == "cpu" and case.queries.dtype == torch.bfloat16
        with interpreter_bf16.repaired() if emulated else nullcontext():
            found = case.results(alpha, lambda c: c.loss(alpha, "triton"), g)
        assert_exact(case, alpha, found, g)
        return found

    return both


@pytest.mark.parametrize("length", LENGTHS)
def test_every_length(check: Check, length: int) -> None:
    """A block, several, and a last one that is not full: of queries, of keys, of the queue."""
    for number, (N, M, Q) in enumerate(
        ((length, 30, 77), (30, length, 77), (77, 30, length), (length, length, 0), (length, 1, None), (1, 0, length))
    ):
        check(inputs(N, M, Q, 16), (0.4, 0.0, 1.0)[number % 3], Config(64, 128, 16, 16))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("E", [1, 16, 72, 100, 256, 512, 640])
def test_every_width(check: Check, E: int, dtype: torch.dtype) -> None:
    check(inputs(20, 33, 40, E, dtype), tile=Config(32, 64, 64, 256))


@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype(check: Check, dtype: torch.dtype, alpha: float) -> None:
    for tile in (SMALL, Config(16, 32, 16, 64), Config(64, 16, 32, 16)):
        check(inputs(17, 20, 33, 24, dtype), alpha, tile)


@pytest.mark.parametrize(("features", "queue"), [*itertools.permutations(DTYPES[::2]), DTYPES[:2]], ids=str)
def test_the_queue_keeps_its_dtype(check: Check, features: torch.dtype, queue: torch.dtype) -> None:
    """The wider one is that of the products."""
    case = inputs(9, 20, 40, 24)
    parts = {name: getattr(case, name).to(features) for name in ("queries", "keys", "teacher")}
    case = replace(case, **parts, queue=case.queue.to(queue))
    wide = replace(case, **{name: x.float() for name, x in parts.items()}, queue=case.queue.float())
    wanted = check(wide, g=torch.ones(9, device=DEVICE))
    found = case.results(0.4, lambda c: c.loss(0.4, "triton"), torch.ones(9, device=DEVICE))
    for mine, theirs in zip(found, wanted, strict=True):
        assert torch.equal(mine, theirs.to(mine.dtype))


@pytest.mark.parametrize("size", [1e-8, 1.0, 1e5])
def test_half_precision_takes_gradients_of_any_size(check: Check, size: float) -> None:
    """float16 reaches from 6e-8 to 65504: a mean has smaller gradients, a scaled loss larger ones."""
    case, g = inputs(20, 40, 50, 16, torch.float16), torch.randn(20, device=DEVICE)
    one = check(case, g=g)[1:3]
    found = launch_forward.forward(case.contrast(0.4))
    other = launch_backward.backward(size * g, case.contrast(0.4), found, for_queries=True, for_keys=True)
    for mine, theirs in zip(other, one, strict=True):
        wanted, mine = (x.double().clamp(-65504, 65504) for x in (size * theirs.double(), mine))
        assert ((mine - wanted).abs() <= 2**-10 * wanted.abs().max() + 6e-8).all()


def test_small_weights_do_not_underflow_in_half_precision(check: Check) -> None:
    """2000 keys and a teacher that differs in its features' last bits: weights of 1e-6, near float16's smallest."""
    case, g = inputs(16, 1, 2000, 16, torch.float16, tau=0.5), torch.ones(16, device=DEVICE)
    case = replace(case, teacher=(1.001 * case.queries.float()).half())
    found = check(case, 1.0, Config(16, 256, 16, 16), g)[1].double()
    exact = case.double().results(1.0, lambda c: c.plain(1.0), g)[1]
    assert (found - exact).abs().max() <= 2e-3 * exact.abs().max()


def test_two_runs_agree_bitwise(check: Check) -> None:
    case, g = inputs(20, 40, 90), torch.randn(20).to(DEVICE)
    assert all(map(torch.equal, check(case, g=g), check(case, g=g)))


# --- what is launched -------------------------------------------------------------------------------------------------


def launches(
    arch: str, dtype: torch.dtype, N: int = 64, M: int = 512, Q: int = 65536, E: int = 256, alpha: float = 0.4
) -> list[launch.Launch]:
    def empty(*shape: int, kind: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=kind, device="meta")

    def groups(n: int) -> Tensor:
        return empty(n, kind=torch.int64)

    contrast = Contrast(
        *(empty(N, E), empty(M, E), empty(N, E), groups(N), groups(M), empty(kind=torch.float32)),
        *(empty(Q, E), groups(Q), alpha),
    )
    with launch.recording() as found, assuming(arch):
        forward = launch_forward.forward(contrast)
        launch_backward.backward(forward.loss, contrast, forward, True, True)
    return found


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("arch", FAMILIES)
def test_every_architecture_has_its_tiles(arch: str, dtype: torch.dtype) -> None:
    for E, N in ((16, 1), (100, 64), (1024, 512)):
        found = launches(arch, dtype, N, E=E)
        names = [x.kernel.__name__ for x in found]
        assert names == [KERNELS[0], KERNELS[0], KERNELS[1], KERNELS[2], KERNELS[2], KERNELS[3]]
        for x in found:
            assert list(x.arguments) == x.kernel.arg_names
            assert x.grid[0] > 0
    for kernel in KERNELS:
        found = configs.tiles(kernel, arch, dtype)
        for width in {1, *(tile.block_w for tile in found)}:
            wide = [tile for tile in found if tile.block_w >= width] or found
            sizes = [tile.block_n for tile in wide if tile.block_w == min(tile.block_w for tile in wide)]
            assert configs.select(kernel, arch, dtype, min(sizes), width).block_n == min(sizes)
            assert configs.select(kernel, f"{arch}/some GPU", dtype, 10**6, width).block_n == max(sizes)


def test_the_teacher_costs_nothing_where_it_does_not_count() -> None:
    for alpha in (0.0, 0.4):
        assert {x.arguments["HAS_TEACHER"] for x in launches("sm_90", torch.float16, alpha=alpha)} == {alpha > 0}


def test_keys_and_queue_are_read_where_they_lie() -> None:
    case = inputs(8, 9, 30)
    with launch.recording() as found:
        launch_forward.forward(case.contrast(0.4))
    assert [x.arguments["Key"].data_ptr() for x in found[:2]] == [case.keys.data_ptr(), case.queue.data_ptr()]


def test_shares_of_the_keys_fill_the_device_and_cover_every_key() -> None:
    for Q in (1, 63, 64, 65, 1000, 65536):
        x = launches("sm_90", torch.float16, Q=Q)[1]
        each, splits = x.arguments["split_keys"], x.grid[0] // -(-64 // x.config.block_n)
        assert (splits - 1) * each < Q <= splits * each
        assert each % x.config.block_k == 0
        assert splits <= launch_forward.PROGRAMS * launch_forward.INTERPRETED


def test_rows_of_16_bytes_are_told_to_the_compiler() -> None:
    def unit(E: int, dtype: torch.dtype) -> set[int]:
        return {x.arguments["UNIT"] for x in launches("sm_90", dtype, E=E) if "UNIT" in x.arguments}

    assert unit(72, torch.float16) == {8}
    assert unit(100, torch.float16) == {1}
    assert unit(100, torch.float32) == {4}
    arguments = launches("sm_90", torch.float16, E=72)[0].arguments
    assert (arguments["E"], arguments["query_row"], arguments["key_row"]) == (9, 9, 9)
