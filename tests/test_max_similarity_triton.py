"""Triton's max-similarity kernels against float64: on a GPU where there is one, else in Triton's interpreter.

The blocks are chosen here, not by the table of tiles, so that short lengths already take several of them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import nullcontext

import interpreter_bf16
import pytest
import torch
from test_max_similarity import DEVICE, LENGTHS, WORDS, assert_exact, expected_gradients, inputs, integers, similarities
from torch import Tensor

from crossmask.kernels import launch
from crossmask.kernels.cross_attention.triton.configs import FAMILIES, assuming
from crossmask.kernels.max_similarity import reference
from crossmask.kernels.max_similarity.triton import configs, launch_backward, launch_forward
from crossmask.kernels.max_similarity.triton.configs import Config

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
KERNELS = ("forward", "backward_image", "backward_text")
# NumPy says so in the interpreter where a product is NaN, or a gradient is beyond float16
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")

Run = Callable[..., tuple[Tensor, ...]]


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    """Every torch.empty is full of NaN, or of the largest integer."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    def both(
        image: Tensor,
        text: Tensor,
        mask: Tensor | None = None,
        g: Tensor | None = None,
        tile: Config | None = None,
    ) -> tuple[Tensor, ...]:
        """score and argmax, and with ``g`` both gradients."""
        tile = tile or Config(64, 32, 32)
        monkeypatch.setattr(configs, "select", lambda *arguments: tile)
        emulated = DEVICE == "cpu" and image.dtype == torch.bfloat16
        with interpreter_bf16.repaired() if emulated else nullcontext():
            score, argmax = launch_forward.forward(image, text, mask)
            return score, argmax, *(() if g is None else launch_backward.backward(g, image, text, argmax))

    return both


def assert_gradients(found: tuple[Tensor, ...], g: Tensor, image: Tensor, text: Tensor, argmax: Tensor) -> None:
    """At most twice the error of plain PyTorch's products in the dtype, and the rounding of the result."""
    chosen = torch.zeros(*argmax.shape, text.shape[1], device=g.device)
    chosen.scatter_(2, argmax.clamp(min=0)[..., None], (g * (argmax >= 0))[..., None])
    chosen = chosen.to(image.dtype)
    for mine, theirs, wanted in zip(
        found, (chosen @ text, chosen.mT @ image), expected_gradients(g, image, text, argmax), strict=True
    ):
        assert mine.dtype == image.dtype
        assert mine.shape == wanted.shape
        largest = wanted.abs().max()
        allowed = 2 * (theirs.double() - wanted).abs().max() + torch.finfo(mine.dtype).eps * largest
        assert (mine - wanted).abs().max() <= allowed


@pytest.mark.parametrize("P", LENGTHS)
def test_every_length(run: Run, P: int) -> None:
    """A block of words, several, and a last one that is not full; with and without masks."""
    for S, masked in (*((S, True) for S in WORDS), (77, False), (257, False)):
        image, text, some = inputs(2, P, S, 16)
        mask = some if masked else None
        g = torch.randn(2, P, device=DEVICE)
        score, argmax, *gradients = run(image, text, mask, g, tile=Config(128, 64, 16))
        assert_exact(score, argmax, image, text, mask)
        assert_gradients(tuple(gradients), g, image, text, argmax)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("D", [1, 8, 16, 64, 72, 100, 256, 1024])
def test_every_width(run: Run, D: int, dtype: torch.dtype) -> None:
    image, text, mask = inputs(2, 77, 30, D, dtype)
    g = torch.randn(2, 77, device=DEVICE)
    score, argmax, *gradients = run(image, text, mask, g, tile=Config(32, 16, 64))
    assert_exact(score, argmax, image, text, mask)
    assert_gradients(tuple(gradients), g, image, text, argmax)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tile", [Config(16, 16, 16), Config(32, 64, 16), Config(128, 32, 32)], ids=str)
def test_any_tile_gives_the_same(run: Run, tile: Config, dtype: torch.dtype) -> None:
    """Exact in every dtype, so bitwise that of the reference: ties within a block and between blocks, no words."""
    image, text, mask = integers(3, 77, 50, 20, dtype)
    image, text = image.clamp(-1, 1), text.clamp(-1, 1)
    mask[1] = False
    g = torch.randint(-3, 4, (3, 77), device=DEVICE).float()
    score, argmax, d_image, d_text = run(image, text, mask, g, tile=tile)
    v, w = image.double().requires_grad_(), text.double().requires_grad_()
    wanted, where = reference.max_similarity_reference(v, w, mask)
    s = similarities(v.detach(), w.detach(), mask)
    assert ((s == wanted[..., None]).sum(2) > 1).any()
    assert torch.equal(score.double(), wanted)
    assert torch.equal(argmax, where)
    for mine, exact in zip((d_image, d_text), torch.autograd.grad(wanted, (v, w), g.double()), strict=True):
        assert torch.equal(mine.double(), exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_extreme_values_keep_their_order(run: Run, dtype: torch.dtype) -> None:
    """One column: similarities are products, in each of the orders that the words can have."""
    values = [float("nan"), float("inf"), 2.0, 1e-4, 0.0, -0.0, -1e-4, -3.0, float("-inf")]
    pairs = torch.tensor(list(itertools.permutations(values, 2)), device=DEVICE)
    image = torch.tensor([1.0, -1.0, 0.5], device=DEVICE).to(dtype).view(1, 3, 1).expand(len(pairs), -1, -1)
    text = torch.cat((pairs, pairs.flip(1)), 1).to(dtype)[..., None]
    mask = torch.ones(text.shape[:2], dtype=torch.bool, device=DEVICE)
    for allowed in (None, mask, mask.index_fill(1, torch.tensor([0, 3], device=DEVICE), False)):
        score, argmax = run(image, text, allowed, tile=Config(16, 16, 16))
        wanted, where = reference.max_similarity_reference(image.double(), text.double(), allowed)
        assert torch.equal(argmax, where)
        torch.testing.assert_close(score.double(), wanted, equal_nan=True, rtol=0, atol=0)


@pytest.mark.parametrize(("size", "width"), [(1e-8, 1e3), (1.0, 1.0), (1e6, 1e-4)])
def test_half_precision_takes_gradients_of_any_size(run: Run, size: float, width: float) -> None:
    """float16 reaches from 6e-8 to 65504; a mean over many patches has smaller gradients, a scaled loss larger ones."""
    image, text, mask = inputs(2, 300, 20, 16)
    image, text = (width * image).half(), text.half()
    g = size * torch.rand(2, 300, device=DEVICE)
    _, argmax, _, d_text = run(image, text, mask, g)
    wanted = expected_gradients(g, image, text, argmax)[1]
    assert (d_text - wanted).abs().max() <= 1e-3 * wanted.abs().max()


def test_two_runs_agree_bitwise(run: Run) -> None:
    image, text, mask = inputs(2, 200, 40, 40)
    g = torch.randn(2, 200, device=DEVICE)
    assert all(map(torch.equal, run(image, text, mask, g), run(image, text, mask, g)))


# --- what is launched -------------------------------------------------------------------------------------------------


def launches(
    arch: str, dtype: torch.dtype, B: int = 64, P: int = 196, S: int = 77, D: int = 256
) -> list[launch.Launch]:
    image, text = (torch.empty(B, n, D, dtype=dtype, device="meta") for n in (P, S))
    with launch.recording() as found, assuming(arch):
        score, argmax = launch_forward.forward(image, text, torch.empty(B, S, dtype=torch.bool, device="meta"))
        launch_backward.backward(score, image, text, argmax)
    return found


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("arch", FAMILIES)
def test_every_architecture_has_its_tiles(arch: str, dtype: torch.dtype) -> None:
    for D, S in ((16, 1), (100, 77), (1024, 512)):
        found = launches(arch, dtype, D=D, S=S)
        assert tuple(x.kernel.__name__ for x in found) == KERNELS
        for x in found:
            assert list(x.arguments) == x.kernel.arg_names
            assert x.grid[0] > 0
    for kernel in KERNELS:
        sizes = [tile.block_s for tile in configs.tiles(kernel, arch, dtype)]
        assert configs.select(kernel, arch, dtype, min(sizes)).block_s == min(sizes)
        assert configs.select(kernel, f"{arch}/some GPU", dtype, 10**6).block_s == max(sizes)


def test_rows_of_16_bytes_are_told_to_the_compiler() -> None:
    def unit(D: int, dtype: torch.dtype) -> set[int]:
        return {x.arguments["UNIT"] for x in launches("sm_90", dtype, D=D)}

    assert unit(72, torch.float16) == {8}
    assert unit(100, torch.float16) == {1}
    assert unit(100, torch.float32) == {4}
    assert all(x.arguments["BLOCK_D"] <= 16 for x in launches("sm_90", torch.float16, D=100))  # what does not spill
    arguments = launches("sm_90", torch.float16, D=72)[0].arguments
    assert (arguments["D"], arguments["image_row"], arguments["image_batch"]) == (9, 9, 9 * 196)
