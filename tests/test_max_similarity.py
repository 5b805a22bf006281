"""Maximum similarity against float64: values, argmax, ties, gradients, memory, PyTorch's machinery, and bad input."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from crossmask.kernels.max_similarity import MaxSimilarity, blockwise, max_similarity
from crossmask.kernels.max_similarity import op as max_similarity_op

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LENGTHS = (1, 30, 77, 197, 257, 577)
WORDS = (1, 30, 77, 197, 257, 512)
IMPLEMENTATIONS = ("blockwise", "triton", "reference")  # triton in its interpreter where there is no GPU
PLAIN = ("blockwise", "reference")
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
# NumPy says so in the interpreter where a product is NaN
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    """Every torch.empty is full of NaN, or of the largest integer."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


def inputs(
    B: int = 2, P: int = 7, S: int = 5, D: int = 16, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, and a ragged mask with at least one word each, not always the first."""
    image, text = torch.randn(B, P, D).to(DEVICE, dtype), torch.randn(B, S, D).to(DEVICE, dtype)
    mask = torch.rand(B, S) < 0.7
    mask[:, S // 2] = True
    return image, text, mask.to(DEVICE)


def integers(
    B: int = 2, P: int = 40, S: int = 30, D: int = 3, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, ...]:
    """Tokens whose similarities are exact in every dtype and often equal."""
    image, text = (torch.randint(-2, 3, (B, n, D)).to(DEVICE, dtype) for n in (P, S))
    return image, text, torch.rand(B, S, device=DEVICE) < 0.5


def similarities(image: Tensor, text: Tensor, mask: Tensor | None) -> Tensor:
    s = torch.einsum("bpd,bsd->bps", image, text)
    return s if mask is None else s.masked_fill(~mask[:, None], -torch.inf)


def assert_exact(score: Tensor, argmax: Tensor, image: Tensor, text: Tensor, mask: Tensor | None) -> None:
    """At most twice plain PyTorch's error in the dtype, and some roundings; the argmax is as good as the maximum."""
    exact = similarities(image.double(), text.double(), mask)
    plain = similarities(image, text, mask)
    wanted, usual = exact.amax(2), plain.amax(2).double()
    assert score.dtype == (torch.float64 if image.dtype == torch.float64 else torch.float32)
    assert argmax.dtype == torch.int64
    assert score.shape == argmax.shape == wanted.shape
    roundings = 32 if image.dtype == torch.float64 else 4  # of float64 itself there is nothing better to compare with
    floor = roundings * torch.finfo(score.dtype).eps * wanted.abs().max()
    allowed = 2 * (usual - wanted).abs().max() + floor
    assert (score - wanted).abs().max() <= allowed
    assert (exact.gather(2, argmax[..., None])[..., 0] - wanted).abs().max() <= allowed


def expected_gradients(g: Tensor, image: Tensor, text: Tensor, argmax: Tensor) -> tuple[Tensor, Tensor]:
    """Float64, through the argmax that was found: where two words are nearly equal any of them is right."""
    g, image, text = g.double() * (argmax >= 0), image.double(), text.double()
    chosen = torch.zeros(*argmax.shape, text.shape[1], dtype=torch.float64, device=g.device)
    chosen.scatter_(2, argmax.clamp(min=0)[..., None], g[..., None])
    return chosen @ text, chosen.mT @ image


def assert_gradients(g: Tensor, image: Tensor, text: Tensor, mask: Tensor | None, impl: Any) -> None:
    image, text = image.detach().requires_grad_(), text.detach().requires_grad_()
    found = max_similarity(image, text, mask, return_argmax=True, impl=impl)
    gradients = torch.autograd.grad(found.score, (image, text), g)
    wanted = expected_gradients(g, image, text, found.argmax)
    plain = similarities(image, text, mask).max(2).values
    usual = torch.autograd.grad(plain, (image, text), g.to(plain.dtype))
    for mine, theirs, exact in zip(gradients, usual, wanted, strict=True):
        assert mine.dtype == image.dtype
        if not torch.equal(similarities(image, text, mask).argmax(2), found.argmax):
            theirs = exact.to(image.dtype)  # plain PyTorch took another of nearly equal words
        largest = exact.abs().max()
        allowed = 2 * (theirs - exact).abs().max() + 2 * torch.finfo(image.dtype).eps * largest
        assert (mine - exact).abs().max() <= allowed


# --- values -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("impl", PLAIN)
@pytest.mark.parametrize(("P", "S"), list(itertools.product(LENGTHS, WORDS)))
def test_every_length(P: int, S: int, impl: Any, masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blockwise, "TILE", 2**16)  # many tiles: of several samples, of one, of slices of its patches
    image, text, mask = inputs(3, P, S, 24)
    found = max_similarity(image, text, mask if masked else None, return_argmax=True, impl=impl)
    assert_exact(found.score, found.argmax, image, text, mask if masked else None)
    if masked:
        assert mask.gather(1, found.argmax).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("D", [1, 16, 64, 72, 100, 256, 1024])
@pytest.mark.parametrize("impl", PLAIN)
def test_every_width(impl: Any, D: int, dtype: torch.dtype) -> None:
    image, text, mask = inputs(2, 77, 30, D, dtype)
    found = max_similarity(image, text, mask, return_argmax=True, impl=impl)
    assert_exact(found.score, found.argmax, image, text, mask)
    assert_gradients(torch.randn(2, 77, dtype=found.score.dtype, device=DEVICE), image, text, mask, impl)


@pytest.mark.parametrize("able", [False, True])
@pytest.mark.parametrize("P", LENGTHS)
def test_bfloat16_of_every_length(P: int, able: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a processor that multiplies it and with one that does not, whose products are those of float32."""
    monkeypatch.setattr(blockwise, "bf16_products", lambda device: able)
    monkeypatch.setattr(blockwise, "TILE", 2**16)
    for S in WORDS:
        image, text, mask = inputs(3, P, S, 24, torch.bfloat16)
        found = max_similarity(image, text, mask, return_argmax=True, impl="blockwise")
        assert_exact(found.score, found.argmax, image, text, mask)
        assert_gradients(torch.randn(3, P, device=DEVICE), image, text, mask, "blockwise")
        if not able:
            wide = max_similarity(image.float(), text.float(), mask, return_argmax=True, impl="blockwise")
            torch.testing.assert_close(found.score, wide.score, rtol=1e-6, atol=1e-5)
            assert (found.argmax == wide.argmax).double().mean() > 0.99


@pytest.mark.parametrize("P", LENGTHS)
def test_samples_that_are_multiplied_alone(P: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As large ones are in float32; whole, and in slices of their patches."""
    monkeypatch.setattr(blockwise, "ALONE", 0)
    for S, tile in itertools.product((1, 30, 257), (2**14, 2**20)):
        monkeypatch.setattr(blockwise, "TILE", tile)
        image, text, mask = inputs(3, P, S, 40)
        mask[1] = False
        for allowed in (mask, None):
            found = max_similarity(image, text, allowed, return_argmax=True, impl="blockwise")
            wanted = max_similarity(image.double(), text.double(), allowed, return_argmax=True, impl="reference")
            torch.testing.assert_close(found.score.double(), wanted.score, rtol=1e-5, atol=1e-5)
            assert (found.argmax == wanted.argmax).double().mean() > 0.99


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("impl", PLAIN)
def test_ties_go_to_the_lower_index(impl: Any, dtype: torch.dtype) -> None:
    image, text, mask = integers(dtype=dtype)
    mask[:, 3] = True
    found = max_similarity(image, text, mask, return_argmax=True, impl=impl)
    s = similarities(image.double(), text.double(), mask)
    assert torch.equal(found.score.double(), s.amax(2))
    ties = s == s.amax(2, keepdim=True)
    assert (ties.sum(2) > 1).any()
    assert torch.equal(found.argmax, (ties.cumsum(2) == 0).sum(2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_a_caption_without_words(impl: Any, dtype: torch.dtype) -> None:
    """Score 0, argmax -1, and no gradient, whatever stands there and comes in; the other samples are untouched."""
    image, text, mask = inputs(3, dtype=dtype)
    mask[1] = False
    text[1] = torch.nan
    image.requires_grad_(), text.requires_grad_()
    found = max_similarity(image, text, mask, return_argmax=True, impl=impl)
    assert (found.score[1] == 0).all()
    assert (found.argmax[1] == -1).all()
    assert_exact(found.score[::2], found.argmax[::2], image[::2].detach(), text[::2].detach(), mask[::2])
    g = torch.ones_like(found.score)
    g[1] = torch.inf  # as of a logarithm
    for gradient in torch.autograd.grad(found.score, (image, text), g):
        assert (gradient[1] == 0).all()
        assert (gradient[::2] != 0).any()
        assert not gradient.isnan().any()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_what_stands_in_masked_places_does_not_matter(impl: Any) -> None:
    image, text, mask = inputs(3, 30, 20)
    results = []
    for garbage in (0.0, torch.nan, torch.inf):
        filled = text.masked_fill(~mask[..., None], garbage).requires_grad_()
        image = image.detach().requires_grad_()
        found = max_similarity(image, filled, mask, return_argmax=True, impl=impl)
        results.append((found.score, found.argmax, *torch.autograd.grad(found.score.square().sum(), (image, filled))))
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))
    assert (results[0][3][~mask] == 0).all()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_what_is_not_finite_shows(impl: Any, masked: bool) -> None:
    image, text, _ = inputs(1, 6, 40, 4)
    mask = torch.ones(1, 40, dtype=torch.bool, device=DEVICE)
    mask[0, 0] = False
    image[0, :5, 0], text[0] = 1.0, -torch.inf  # every similarity -inf, or NaN where a product is 0 * inf
    image[0, 1:3] = torch.tensor([1.0, 0.0, 1.0, 1.0])
    image = image.abs()
    text[0, :, 1] = -1.0
    text[0, 5, 1] = text[0, 3, 1] = torch.nan
    image[0, 5] = 0.0
    found = max_similarity(image, text, mask if masked else None, return_argmax=True, impl=impl)
    wanted = max_similarity(image, text, mask if masked else None, return_argmax=True, impl="reference")
    assert torch.equal(found.argmax, wanted.argmax)
    torch.testing.assert_close(found.score, wanted.score, equal_nan=True, rtol=0, atol=0)
    assert found.argmax[0].tolist() == [3, 3, 3, 3, 3, 1 if masked else 0]
    text = text.nan_to_num(-1.0, neginf=-torch.inf)  # without NaN every similarity but the last row's is -inf
    found = max_similarity(image, text, mask if masked else None, return_argmax=True, impl=impl)
    assert (found.argmax[0] == (1 if masked else 0)).all()
    assert (found.score[0, :5] == -torch.inf).all()
    assert found.score[0, 5].isnan()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_any_layout(impl: Any) -> None:
    """Tokens without the class token, transposed feature maps, words shared by all samples, one column."""
    for D in (16, 1):
        image, text, mask = inputs(3, 9, 6, D)
        shared = text[:1].expand_as(text)
        feature_map = image.mT.contiguous().mT
        for v, w in ((image[:, 1:], text[:, ::2]), (feature_map, text), (image, shared), (image[::2], shared[::2])):
            m = mask[: len(v), ::2] if w.shape[1] == 3 else mask[: len(v)]
            m = m.clone()
            m[:, 0] = True
            found = max_similarity(v, w, m, return_argmax=True, impl=impl)
            assert_exact(found.score, found.argmax, v, w, m)
            assert_gradients(torch.randn_like(found.score), v, w, m, impl)
    g = torch.randn(1, 1, device=DEVICE).expand(3, 9)
    assert_gradients(g, *inputs(3, 9, 6), impl)


# --- gradients --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("P", LENGTHS)
def test_gradients_of_every_length(P: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blockwise, "COPY", 2**14)
    for S, dtype in itertools.product(WORDS, (torch.float32, torch.bfloat16)):
        image, text, mask = inputs(2, P, S, 8, dtype)
        assert_gradients(torch.randn(2, P, device=DEVICE), image, text, mask, "blockwise")


@pytest.mark.parametrize("impl", PLAIN)
def test_gradcheck(impl: Any) -> None:
    image, text, mask = inputs(2, 6, 5, 4, torch.float64)
    two = similarities(image, text, mask).topk(2, 2).values
    assert (two[..., 0] - two[..., 1]).min() > 1e-4  # finite differences do not cross a tie
    image.requires_grad_(), text.requires_grad_()
    assert torch.autograd.gradcheck(lambda v, w: max_similarity(v, w, mask, impl=impl), (image, text))


@pytest.mark.parametrize("impl", ["blockwise", "triton"])
def test_gradients_are_those_of_the_reference(impl: Any) -> None:
    """Integers, so that all is exact: also which of equal words gets the gradient."""
    image, text, mask = (x.requires_grad_(x.is_floating_point()) for x in integers(3))
    g = torch.randint(-3, 4, image.shape[:2], device=DEVICE).float()
    with torch.no_grad():
        mask[2] = False
    found = [
        torch.autograd.grad(max_similarity(image, text, mask, impl=i), (image, text), g) for i in (impl, "reference")
    ]
    assert all(map(torch.equal, *found))


def test_gradients_only_where_they_are_needed() -> None:
    image, text, _ = inputs()
    found = max_similarity(image, text.requires_grad_(), return_argmax=True)
    assert not found.argmax.requires_grad
    found.score.sum().backward()
    assert text.grad is not None
    assert image.grad is None


@pytest.mark.parametrize("impl", ["blockwise", "triton"])
def test_two_runs_agree_bitwise(impl: Any) -> None:
    image, text, mask = (x.requires_grad_(x.is_floating_point()) for x in inputs(2, 200, 30, 40))
    runs = []
    for _ in range(2):
        score = max_similarity(image, text, mask, impl=impl)
        runs.append((score, *torch.autograd.grad(score.square().sum(), (image, text))))
    assert all(map(torch.equal, *runs))


# --- memory -----------------------------------------------------------------------------------------------------------


def extra_memory(image: Tensor, text: Tensor, mask: Tensor, impl: Any) -> int:
    """Most bytes that a forward and backward had allocated at one time, results included."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        max_similarity(image, text, mask, impl=impl).sum().backward()
    events = found.profiler.kineto_results.events()
    changes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns()) if e.name() == "[memory]"]
    return max(itertools.accumulate(changes), default=0)


@pytest.mark.skipif(DEVICE == "cuda", reason="measures the CPU's allocator")
@pytest.mark.parametrize("shape", [(8, 1024, 512, 16), (1, 4096, 512, 16), (64, 577, 257, 16)], ids=str)
def test_no_similarities_in_memory(shape: tuple[int, int, int, int]) -> None:
    B, P, S, D = shape
    image, text, mask = (x.requires_grad_(x.is_floating_point()) for x in inputs(*shape))
    all_of_them = 4 * B * P * S
    most = 2 * 2**20 + 6 * B * (P + S) * D  # a tile and some more, and one and a half times the gradients
    assert most < all_of_them / 2
    assert extra_memory(image, text, mask, "blockwise") < most
    assert extra_memory(image, text, mask, "reference") > all_of_them


# --- PyTorch's machinery ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("impl", ["blockwise", "triton"])
def test_opcheck(impl: str, masked: bool) -> None:
    """Schema, autograd registration, fake kernels and AOTAutograd with dynamic shapes, forward and backward."""
    image, text, mask = (x.requires_grad_(x.is_floating_point()) for x in inputs())
    arguments = (image, text, mask if masked else None, impl)
    torch.library.opcheck(torch.ops.crossmask.max_similarity.default, arguments)
    score, argmax = torch.ops.crossmask.max_similarity(*arguments)
    torch.library.opcheck(
        torch.ops.crossmask.max_similarity_backward.default,
        (torch.randn_like(score), image.detach(), text.detach(), argmax, impl),
        test_utils=("test_schema", "test_faketensor"),
    )


@pytest.mark.parametrize("impl", [None, *IMPLEMENTATIONS])
def test_compiles_in_one_graph(impl: Any) -> None:
    compiled = torch.compile(
        lambda v, w, m: max_similarity(2 * v, w, m, return_argmax=True, impl=impl).score.square().sum(),
        fullgraph=True,
        backend="aot_eager",
        dynamic=True,
    )
    for B, P, S in ((2, 7, 5), (3, 9, 6)):
        image, text, mask = (x.requires_grad_(x.is_floating_point()) for x in inputs(B, P, S))
        for m in (mask, None):
            eager = max_similarity(2 * image, text, m, impl=impl).square().sum()
            found = compiled(image, text, m)
            torch.testing.assert_close(found, eager)
            pairs = (torch.autograd.grad(x, (image, text)) for x in (found, eager))
            torch.testing.assert_close(*pairs)


def test_exports() -> None:
    class Scorer(torch.nn.Module):
        def forward(self, image: Tensor, text: Tensor, mask: Tensor) -> MaxSimilarity:
            return max_similarity(image, text, mask, return_argmax=True)

    program = torch.export.export(Scorer(), inputs(), dynamic_shapes=({0: torch.export.Dim("batch")},) * 3)
    assert "crossmask.max_similarity.default" in {str(node.target) for node in program.graph.nodes}
    other = inputs(4)
    found, wanted = program.module()(*other), Scorer()(*other)
    assert isinstance(found, MaxSimilarity)
    assert torch.equal(found.score, wanted.score)


@pytest.mark.parametrize("impl", PLAIN)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype: torch.dtype, impl: Any) -> None:
    image, text, mask = inputs()
    with torch.autocast(DEVICE, dtype=dtype):
        found = max_similarity(image.requires_grad_(), text.to(dtype), mask, impl=impl)
        assert max_similarity(image.double(), text.double(), impl=impl).dtype == torch.float64
    assert found.dtype == torch.float32
    assert torch.equal(found, max_similarity(image.to(dtype), text.to(dtype), mask, impl=impl))
    found.sum().backward()
    assert image.grad.dtype == torch.float32


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_no_sample(impl: Any) -> None:
    image, text, mask = (x[:0].requires_grad_(x.is_floating_point()) for x in inputs())
    found = max_similarity(image, text, mask, return_argmax=True, impl=impl)
    assert found.score.shape == found.argmax.shape == (0, 7)
    found.score.sum().backward()
    assert image.grad.shape == image.shape


def test_second_derivatives_are_refused_and_the_reference_has_them() -> None:
    image, text, _ = (x.requires_grad_(x.is_floating_point()) for x in inputs())
    for impl in PLAIN:
        (first,) = torch.autograd.grad(max_similarity(image, text, impl=impl).square().sum(), image, create_graph=True)
        if impl == "reference":
            first.sum().backward()
        else:
            with pytest.raises(NotImplementedError, match="no second derivatives; impl='reference' has"):
                first.sum().backward()


def test_transforms_are_refused() -> None:
    image, text, _ = inputs()
    refused = "none of torch.func's transforms and not in forward mode.*use impl='reference'"
    for transformed in (
        lambda impl: torch.func.grad(lambda v: max_similarity(v, text, impl=impl).sum())(image),
        lambda impl: torch.vmap(lambda v: max_similarity(v[None], text[:1], impl=impl)[0])(image),
        lambda impl: torch.func.jvp(lambda v: max_similarity(v, text, impl=impl), (image,), (image,)),
    ):
        with pytest.raises(NotImplementedError, match=refused):
            transformed(None)
        transformed("reference")


# --- bad input --------------------------------------------------------------------------------------------------------


def test_errors_name_the_culprit() -> None:
    image, text, mask = inputs()
    for arguments, error, told in (
        ((image.tolist(), text), TypeError, "image_tokens must be a tensor, got list"),
        ((image[0], text), ValueError, r"\(batch, length, width\), got image_tokens \(7, 16\)"),
        ((image, text[:1]), ValueError, r"text_tokens \(1, 5, 16\) must agree in batch and width"),
        ((image, text[..., :8]), ValueError, "must agree in batch and width"),
        ((image[:, :0], text), ValueError, "there must be a patch, a word and a width"),
        ((image, text[:, :0]), ValueError, "there must be a patch, a word and a width"),
        ((image, text.half()), ValueError, "share one dtype.*got torch.float32 and torch.float16"),
        ((image.int(), text.int()), ValueError, "share one dtype, float16, bfloat16, float32 or float64"),
        ((image, text.to("meta")), ValueError, "one device, got .* and meta"),
        ((image, text, mask.tolist()), TypeError, r"text_mask must be a bool tensor \(2, 5\), got list"),
        ((image, text, mask.int()), ValueError, r"text_mask must be bool \(2, 5\), got torch.int32.*mask.bool\(\)"),
        ((image, text, mask[:, :4]), ValueError, r"text_mask must be bool \(2, 5\), got torch.bool \(2, 4\)"),
        ((image, text, mask.to("meta")), ValueError, "text_mask must be on the device of text_tokens"),
    ):
        with pytest.raises(error, match=told) as raised:
            max_similarity(*arguments)
        assert "\n" not in str(raised.value)
    with pytest.raises(ValueError, match="unknown implementation 'magic'"):
        max_similarity(image, text, impl="magic")
    with pytest.raises(ValueError, match=r"takes float32, float16 and bfloat16, not torch.float64"):
        max_similarity(image.double(), text.double(), impl="triton")


def test_what_runs_where(monkeypatch: pytest.MonkeyPatch) -> None:
    choose, cpu, gpu = max_similarity_op.choose, torch.device("cpu"), torch.device("cuda")
    assert choose(None, cpu, torch.float32) == choose(None, gpu, torch.float64) == "blockwise"
    assert {choose(None, gpu, dtype) for dtype in DTYPES[:3]} == {"triton"}
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ValueError, match="needs a CUDA or ROCm device, but the tokens are on cpu"):
        choose("triton", cpu, torch.float32)
    monkeypatch.setattr(max_similarity_op, "HAS_TRITON", False)
    with pytest.warns(UserWarning, match="plain PyTorch on this GPU because triton is not installed"):
        assert choose(None, gpu, torch.float32) == "blockwise"
    with pytest.raises(ValueError, match="needs the package triton"):
        choose("triton", gpu, torch.float32)
