"""Triton's cross-entropy kernels against float64: on a GPU where there is one, else in Triton's interpreter.

The blocks are chosen here, not by the table of tiles, so that short lengths already take several of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext

import interpreter_bf16
import pytest
import torch
from test_soft_cross_entropy import DEVICE, Case, assert_exact, case, plain, with_gradients
from torch import Tensor

from crossmask.kernels import launch
from crossmask.kernels.cross_attention.triton.configs import FAMILIES, assuming
from crossmask.kernels.soft_cross_entropy.request import Inputs, Needed
from crossmask.kernels.soft_cross_entropy.triton import configs, launch_backward, launch_forward
from crossmask.kernels.soft_cross_entropy.triton.configs import Config

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
KERNELS = ("forward_words", "forward_rows", "backward_words")
# NumPy says so in the interpreter, of what is not finite
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow|divide|All-NaN slice):RuntimeWarning")

Run = Callable[..., list[Tensor]]


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    """Every torch.empty is full of NaN, or of the largest integer."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    def both(given: Case, g: Tensor, tile: Config | None = None, chunk: int = 200) -> list[Tensor]:
        """Losses and the gradients of hidden, weight and bias; by ranges of at most ``chunk`` words."""
        tile = tile or Config(64, 32, 32)
        monkeypatch.setattr(launch_backward, "CHUNK", chunk)
        rows = Config(2, 8)  # of forward_rows: 2 blocks of words at a time
        monkeypatch.setattr(configs, "select", lambda kernel, *_: rows if kernel == "forward_rows" else tile)
        emulated = DEVICE == "cpu" and given.hidden.dtype == torch.bfloat16
        with interpreter_bf16.repaired() if emulated else nullcontext():
            found = launch_forward.forward(Inputs(*given))
            gradients = launch_backward.backward(
                g, Inputs(*given), found.lse, found.teacher_lse, Needed(True, True, given.bias is not None)
            )
        return [found.loss, *(x for x in gradients if x is not None)]

    return both


@pytest.mark.parametrize("N", [1, 30, 77, 197, 257, 577])
def test_every_length(run: Run, N: int) -> None:
    """A block of words, several, and a last one that is not full; with a teacher and without."""
    for V, alpha in ((5, 0.4), (63, 0.0), (257, 0.4) if N > 77 else (1000, 1.0)):
        given, g = case(N, V, 16, alpha=alpha, bias=V != 63, weighted=V != 63), torch.randn(N, device=DEVICE)
        assert_exact(run(given, g, Config(256, 128, 16), chunk=700), given, g)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("W", [1, 8, 64, 72, 100, 768])
def test_every_width(run: Run, W: int, dtype: torch.dtype) -> None:
    given, g = case(30, 150, W, dtype), torch.randn(30, device=DEVICE)
    assert_exact(run(given, g, Config(64, 32, 64), chunk=100), given, g)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tile", [Config(16, 16, 16), Config(32, 64, 16), Config(128, 16, 32)], ids=str)
def test_any_tile_gives_the_same(run: Run, tile: Config, dtype: torch.dtype) -> None:
    given, g = case(40, 130, 40, dtype), torch.randn(40, device=DEVICE)
    assert_exact(run(given, g, tile, chunk=2 * tile.block_v), given, g)


def test_a_label_that_is_no_word_shows_in_its_row(run: Run) -> None:
    """Where no device is waited for, nothing can be said; the other rows are right."""
    given, g = case(6, 90), torch.ones(6, device=DEVICE)
    right = run(given, g)[0]
    for wrong in (-100, -1, 90, 2**40):
        given.labels[2] = wrong
        loss = run(given, g)[0]
        assert loss.isnan().tolist() == [n == 2 for n in range(6)]
        assert torch.equal(loss[loss.isfinite()], right[[0, 1, 3, 4, 5]])


def test_what_is_not_finite_shows(run: Run) -> None:
    given, g = case(6, 90, alpha=0.4), torch.ones(6, device=DEVICE)
    right = run(given, g)[0]
    given.hidden[1, 3] = torch.nan
    assert given.teacher_hidden is not None
    given.teacher_hidden[4] = torch.nan
    loss = run(given, g)[0]
    assert loss.isnan().tolist() == [n in (1, 4) for n in range(6)]
    assert torch.equal(loss[loss.isfinite()], right[[0, 2, 3, 5]])


def test_probabilities_stay_exact_where_logits_are_large(run: Run) -> None:
    """A log-sum-exp of thousands has no digits left for a probability; that is why it is kept in two numbers."""
    given, g = case(20, 90, weighted=False), torch.ones(20, device=DEVICE)
    assert given.bias is not None
    given.bias.add_(4096.0)
    exact = with_gradients(plain, given.to(torch.float64), g.double())
    for mine, wanted in zip(run(given, g)[2:], exact[2:], strict=True):  # rounding the logits alone costs 5e-4
        assert (mine - wanted).abs().max() <= 2e-3 * wanted.abs().max()


def test_argmax_is_the_first_of_the_largest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Integers, so that logits are exact and often equal: within a block of words and between blocks."""
    given = case(40, 300, 3, alpha=0.0)._replace(bias=None)
    given.hidden.copy_(torch.randint(-2, 3, (40, 3))), given.weight.copy_(torch.randint(-2, 3, (300, 3)))
    ties = (z := given.hidden @ given.weight.T) == z.amax(1, keepdim=True)
    assert (ties.sum(1) > 1).any()
    for tile in (Config(16, 16, 16), Config(64, 32, 16)):
        monkeypatch.setattr(configs, "select", lambda kernel, *_, t=tile: Config(2, 8) if "rows" in kernel else t)
        assert torch.equal(launch_forward.forward(Inputs(*given)).argmax, (ties.cumsum(1) == 0).sum(1))


def test_only_what_is_needed(run: Run) -> None:
    given = Inputs(*case(9, 90))
    found = launch_forward.forward(given)
    every = launch_backward.backward(found.loss, given, found.lse, found.teacher_lse, Needed(True, True, True))
    for needed in (Needed(True, False, False), Needed(False, True, False), Needed(False, False, True)):
        some = launch_backward.backward(found.loss, given, found.lse, found.teacher_lse, needed)
        for mine, wanted, want in zip(some, every, needed, strict=True):
            assert torch.equal(mine, wanted) if want else mine is None


def test_two_runs_agree_bitwise(run: Run) -> None:
    given, g = case(40, 300), torch.randn(40, device=DEVICE)
    assert all(map(torch.equal, run(given, g), run(given, g)))


# --- what is launched -------------------------------------------------------------------------------------------------


def launches(arch: str, dtype: torch.dtype, N: int, V: int = 30522, W: int = 768) -> list[launch.Launch]:
    hidden, weight = (torch.empty(n, W, dtype=dtype, device="meta") for n in (N, V))
    labels, g = torch.empty(N, dtype=torch.int64, device="meta"), torch.empty(N, device="meta")
    given = Inputs(hidden, weight, None, labels, hidden, weight, None, 0.4, None)
    with launch.recording() as found, assuming(arch):
        forward = launch_forward.forward(given)
        launch_backward.backward(g, given, forward.lse, forward.teacher_lse, Needed(True, True, True))
    return found


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("arch", FAMILIES)
def test_every_architecture_has_its_tiles(arch: str, dtype: torch.dtype) -> None:
    for N, W in ((1, 16), (30, 768), (577, 100), (5000, 1024)):
        found = launches(arch, dtype, N, W=W)
        assert tuple(dict.fromkeys(x.kernel.__name__ for x in found)) == KERNELS
        for x in found:
            assert list(x.arguments) == x.kernel.arg_names
            assert x.grid[0] > 0
    for kernel in KERNELS:
        sizes = [tile.block_n for tile in configs.tiles(kernel, arch, dtype)]
        assert configs.select(kernel, arch, dtype, min(sizes)).block_n == min(sizes)
        assert configs.select(kernel, f"{arch}/some GPU", dtype, 10**6).block_n == max(sizes)


def test_the_backward_takes_bounded_ranges_of_words() -> None:
    for N, V in ((30, 30522), (577, 30522), (20000, 30522), (30, 100)):
        found = [x.arguments for x in launches("sm_90", torch.bfloat16, N, V) if x.kernel.__name__ == "backward_words"]
        assert [x["first"] for x in found[1:]] == [x["stop"] for x in found[:-1]]
        assert found[0]["first"] == 0
        assert found[-1]["stop"] == V
        for x in found:
            assert x["GradLogits"].numel() <= max(launch_backward.BUFFER, 128 * (N + 16))
            assert len(x["GradLogits"]) <= launch_backward.CHUNK
            assert x["GradLogits"].stride(0) % 16 == 0


def test_rows_of_16_bytes_are_told_to_the_compiler() -> None:
    def arguments(W: int, dtype: torch.dtype) -> dict:
        return launches("sm_90", dtype, 30, W=W)[0].arguments

    assert arguments(72, torch.float16)["UNIT"] == 8
    assert arguments(100, torch.float16)["UNIT"] == 1
    assert arguments(100, torch.float32)["UNIT"] == 4
    assert arguments(100, torch.float16)["BLOCK_D"] <= 16  # what does not spill
    assert (arguments(72, torch.float16)["D"], arguments(72, torch.float16)["w_row"]) == (9, 9)
