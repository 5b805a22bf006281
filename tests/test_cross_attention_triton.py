"""Triton's forward kernels against the reference in float64: on a GPU where there is one, else in Triton's interpreter.

The blocks are chosen here, not by the table of tiles, so that short lengths already take several of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace

import interpreter_bf16
import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.errors import InterpreterError

from crossmask.kernels.cross_attention import dropout, reference
from crossmask.kernels.cross_attention.request import Forward, Masks, Request
from crossmask.kernels.cross_attention.triton import configs, launch_forward
from crossmask.kernels.cross_attention.triton.configs import Config

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EVERYTHING = Request(0.2, 0.0, False, True, True, True, True, True)
NO_MASKS = Masks()
BLOCKS = Config(32, 32)
NAMES = ("max_probability", "entropy", "key_attention", "query_attention", "key_max")
# exp2 of a masked key's or an uncounted query's logit may overflow; it is put aside afterwards
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")

Run = Callable[..., Forward]


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    """Every torch.empty is full of NaN."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    def forward(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        masks: Masks = NO_MASKS,
        request: Request = EVERYTHING,
        seed: Tensor | None = None,
        *,
        single: Config | None = None,
        online: Config = BLOCKS,
        partials: int = 16,
    ) -> Forward:
        """With ``single`` where the keys fit into it, else ``online``, which also gives the other kernels' blocks."""

        def select(
            kernel: str, arch: str, width: int, dtype: torch.dtype, queries: int, keys: int, links: bool
        ) -> Config | None:
            assert links == (masks.link is not None)
            fits = single is not None and keys <= single.block_p
            return (single if fits else None) if kernel == "forward_single" else online

        monkeypatch.setattr(configs, "select", select)
        monkeypatch.setattr(launch_forward, "MOST_PARTIALS", partials)
        emulated = DEVICE == "cpu" and q.dtype == torch.bfloat16
        with interpreter_bf16.repaired() if emulated else nullcontext():
            return launch_forward.forward(q, k, v, masks, seed, request)

    return forward


def inputs(
    B: int = 1, H: int = 2, S: int = 30, P: int = 77, D: int = 16, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    # Three times a normal: peaked rows, where the mistakes show.
    q, k, v = 3 * torch.randn(B, H, S, D), torch.randn(B, H, P, D), torch.randn(B, H, P, D)
    return q.to(DEVICE, dtype), k.to(DEVICE, dtype), v.to(DEVICE, dtype)


def random_masks(B: int, H: int, S: int, P: int, heads: bool = False) -> Masks:
    """At least one position each; with ``heads`` the last head of the last sample is off."""
    key, query, head = torch.rand(B, P) < 0.7, torch.rand(B, S) < 0.6, torch.ones(B, H, dtype=torch.bool)
    key[:, P // 2], query[:, S // 2], head[-1, -1] = True, True, False
    return Masks(key.to(DEVICE), query.to(DEVICE), head.to(DEVICE) if heads else None)


def plain(q: Tensor, k: Tensor, v: Tensor, masks: Masks, request: Request, seed: Tensor | None) -> Forward:
    """PyTorch in the inputs' dtype; statistics in float32."""
    found = reference.forward(q.float(), k.float(), v.float(), masks, seed, request)
    if q.dtype == torch.float32:
        return found
    s = request.scale * q @ k.transpose(-1, -2)
    if masks.key is not None:
        s = s.masked_fill(~masks.key[:, None, None], -torch.inf)
    return found._replace(output=s.softmax(-1).nan_to_num() @ v)


def assert_exact(
    found: Forward,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    masks: Masks = NO_MASKS,
    request: Request = EVERYTHING,
    seed: Tensor | None = None,
) -> None:
    """At most twice plain PyTorch's error against float64, and a few roundings."""
    wanted = reference.forward(q.double(), k.double(), v.double(), masks, seed, request)
    usual = plain(q, k, v, masks, request, seed)
    assert found.output.dtype == q.dtype
    assert found.output.stride() == torch.empty_like(q).stride()
    for name in Forward._fields:
        value, want, other = (getattr(x, name) for x in (found, wanted, usual))
        if want is None:
            assert value is None, name
            continue
        assert value.shape == want.shape, name
        assert not value.isnan().any(), name
        if name != "output":
            assert value.dtype == torch.float32, name
            assert value.is_contiguous(), name
        if name == "column_lse":  # at keys that nobody attends to it may be anything
            B, H, P = want.shape
            read = torch.ones(B, H, P, dtype=torch.bool, device=want.device)
            read = read if masks.key is None else read & masks.key[:, None]
            read = read if masks.head is None else read & masks.head[:, :, None]
            value, want, other = value[read], want[read], other[read]
        finite = want.isfinite()
        assert torch.equal(value[~finite].double(), want[~finite]), name
        value, want, other = value[finite].double(), want[finite], other[finite].double()
        if want.numel():
            largest = max(1.0, float(want.abs().max()))
            floor = 8 * torch.finfo(value.dtype if name != "output" else q.dtype).eps * largest
            floor = max(floor, 2e-6 * largest) if name != "output" else floor / 8 + 2e-6 * largest
            error, allowed = float((value - want).abs().max()), 2 * float((other - want).abs().max()) + floor
            assert error <= allowed, f"{name}: {error} > {allowed}"


# --- shapes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    ("S", "P"),
    [(1, 1), (30, 30), (30, 77), (77, 1), (77, 197), (1, 577), (30, 577), (197, 30), (257, 77), (577, 30), (77, 257)],
)
def test_lengths(run: Run, S: int, P: int, transposed: bool) -> None:
    q, k, v = inputs(S=S, P=P)
    masks = random_masks(1, 2, S, P)
    tile = Config(64, 128, transposed=transposed)
    assert_exact(run(q, k, v, masks, single=tile, online=tile), q, k, v, masks)


@pytest.mark.parametrize("D", [1, 24, 80, 256])
@pytest.mark.parametrize("transposed", [False, True])
def test_widths(run: Run, D: int, transposed: bool) -> None:
    q, k, v = inputs(S=17, P=40, D=D)
    request = replace(EVERYTHING, scale=D**-0.5)
    for single in (Config(32, 64, transposed=transposed), None):
        found = run(q, k, v, request=request, single=single, online=Config(16, 32, transposed=transposed))
        assert_exact(found, q, k, v, request=request)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("P", [77, 197])
def test_half_precision(run: Run, dtype: torch.dtype, P: int, transposed: bool) -> None:
    q, k, v = inputs(S=40, P=P, D=32, dtype=dtype)
    masks = random_masks(1, 2, 40, P)
    tile = Config(32, 128, transposed=transposed)
    assert_exact(run(q, k, v, masks, single=tile, online=tile, partials=1), q, k, v, masks)


def _layouts() -> dict[str, Callable[[Tensor], Tensor]]:
    return {
        "heads behind rows": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
        "expanded batch": lambda x: x[:1].expand_as(x),
        "rows of a wider matrix": lambda x: torch.cat([x, x], -1)[..., x.shape[-1] :],
        "every other row": lambda x: x.repeat_interleave(2, 2)[:, :, ::2],
        "last dimension not dense": lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2),
    }


@pytest.mark.parametrize("layout", _layouts())
def test_strides(run: Run, layout: str) -> None:
    change = _layouts()[layout]
    for single in (Config(32, 64), None):
        q, k, v = inputs(B=2, S=20, P=40)
        masks = random_masks(2, 2, 20, 40)
        for given in ((change(q), k, v), (q, change(k), v), (q, k, change(v)), tuple(map(change, (q, k, v)))):
            assert_exact(run(*given, masks, single=single, online=Config(32, 64)), *given, masks)


@pytest.mark.parametrize("culprit", ["q", "k", "v"])
@pytest.mark.parametrize("single", [Config(32, 64), None], ids=["single", "online"])
def test_nan_shows(run: Run, single: Config | None, culprit: str) -> None:
    """Nothing waits for a GPU to look for it, so it must not be made a zero on its way."""
    given = dict(zip("qkv", inputs(S=20, P=40), strict=True))
    given[culprit][0, 1, 3, 5] = torch.nan
    found = run(*given.values(), single=single, online=Config(32, 64))
    row = 3 if culprit == "q" else 0
    assert found.output[0, 1, row].isnan().any()
    for name in ("lse", "max_probability", "entropy") if culprit != "v" else ():
        assert getattr(found, name)[0, 1, row].isnan(), name
    assert found.output[0, 0].isfinite().all()


# --- which kernel, which statistics -----------------------------------------------------------------------------------

VARIANTS: dict[str, dict[str, object]] = {
    "single": {"single": Config(32, 128)},
    "single, all queries": {"single": Config(128, 128)},
    "single, transposed": {"single": Config(32, 128, transposed=True)},
    "single, all queries, transposed": {"single": Config(128, 128, transposed=True)},
    "online, all queries": {"online": Config(128, 32)},
    "online, all queries, transposed": {"online": Config(128, 32, transposed=True)},
    "online": {},
    "online, transposed": {"online": Config(32, 64, transposed=True)},
    "long queries": {"partials": 2},
    "long queries, transposed": {"partials": 1, "online": Config(16, 64, transposed=True)},
}


@pytest.mark.parametrize("heads", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_variants(run: Run, variant: str, heads: bool) -> None:
    q, k, v = inputs(S=77, P=77)
    request = replace(EVERYTHING, per_head=heads)
    masks = random_masks(1, 2, 77, 77, heads)
    assert_exact(run(q, k, v, masks, request, **VARIANTS[variant]), q, k, v, masks, request)


def test_variants_start_what_they_should(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[tuple[str, bool]] = []
    stock = launch_forward.run

    def listen(kernel, grid, arguments, config, device) -> None:  # type: ignore[no-untyped-def]
        started.append((kernel.__name__, any(arguments.get(f"HAS_{x}") for x in ("KEY_SUM", "KEY_MAX", "QUERY_SUM"))))
        stock(kernel, grid, arguments, config, device)

    monkeypatch.setattr(launch_forward, "run", listen)
    q, k, v = inputs(S=40, P=40)
    nothing, keys = Request(0.2), Request(0.2, key_attention=True)
    for expected, request, options in (
        ([("forward_single", False)], nothing, {"single": Config(16, 64)}),
        ([("forward_online", False)], nothing, {}),
        ([("forward_online", False)], replace(nothing, entropy=True, max_probability=True), {"partials": 1}),
        ([("forward_single", True)], keys, {"single": Config(16, 64), "partials": 1}),
        ([("forward_online", True)], keys, {}),
        ([("forward_online", False), ("key_statistics", True)], keys, {"partials": 1}),
        ([("forward_single", True)], EVERYTHING, {"single": Config(64, 64)}),
        ([("forward_online", True)], EVERYTHING, {"online": Config(64, 32)}),
        ([("column_lse", False), ("forward_online", True)], EVERYTHING, {}),
        ([("column_lse", False), ("forward_single", True)], EVERYTHING, {"single": Config(16, 64)}),
    ):
        started.clear()
        run(q, k, v, request=request, **options)
        assert started == expected, options


@pytest.mark.parametrize("name", [*NAMES, "nothing"])
@pytest.mark.parametrize("variant", ["single", "online, all queries", "online", "long queries"])
def test_each_statistic_alone(run: Run, variant: str, name: str) -> None:
    q, k, v = inputs(H=1, S=40, P=50)
    masks = random_masks(1, 1, 40, 50)
    request = replace(Request(0.2), **({} if name == "nothing" else {name: True}))
    options = {"partials": 1} if variant == "long queries" else VARIANTS[variant]
    found = run(q, k, v, masks, request, **options)
    assert {x for x in NAMES if getattr(found, x) is not None} == {name} - {"nothing"}
    assert (found.column_lse is not None) == (name == "query_attention")
    assert_exact(found, q, k, v, masks, request)


@pytest.mark.parametrize("variant", ["single", "online", "long queries"])
def test_two_runs_agree_bitwise(run: Run, variant: str) -> None:
    q, k, v = inputs(S=77, P=77)
    masks = random_masks(1, 2, 77, 77, heads=True)
    request, seed = replace(EVERYTHING, dropout_p=0.1), torch.tensor([5], device=DEVICE)
    first, second = (run(q, k, v, masks, request, seed, **VARIANTS[variant]) for _ in range(2))
    for name in Forward._fields:
        assert torch.equal(getattr(first, name), getattr(second, name)), name


# --- masks ------------------------------------------------------------------------------------------------------------

KINDS: dict[str, dict[str, object]] = {
    "single": {"single": Config(16, 64)},
    "single, all queries": {"single": Config(32, 64)},
    "online": {"online": Config(16, 16)},
    "online, all queries": {"online": Config(32, 16, transposed=True)},
    "long queries": {"online": Config(16, 16), "partials": 1},
}


@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_left(run: Run, kind: str, per_head: bool) -> None:
    """A sample without keys, one without valid queries, one whose heads are all off."""
    q, k, v = inputs(B=4, S=20, P=40)
    masks = random_masks(4, 2, 20, 40, heads=True)
    assert masks.key is not None
    assert masks.query is not None
    assert masks.head is not None
    masks.key[0], masks.query[1], masks.head[2] = False, False, False
    request = replace(EVERYTHING, per_head=per_head)
    found = run(q, k, v, masks, request, **KINDS[kind])
    assert_exact(found, q, k, v, masks, request)
    for sample in (0, 2):
        assert (found.lse[sample] == -torch.inf).all()
        for name in ("output", *NAMES):
            assert (getattr(found, name)[sample] == 0).all(), name
    for name in ("key_attention", "query_attention", "key_max"):
        assert (getattr(found, name)[1] == 0).all(), name
    assert found.output[1].abs().min() > 0


@pytest.mark.parametrize("which", ["key", "query", "head"])
@pytest.mark.parametrize("kind", KINDS)
def test_each_mask_alone(run: Run, kind: str, which: str) -> None:
    q, k, v = inputs(S=20, P=40)
    every = random_masks(1, 2, 20, 40, heads=True)
    masks = Masks(**{which: getattr(every, which)})
    assert_exact(run(q, k, v, masks, **KINDS[kind]), q, k, v, masks)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_masked_does_not_matter(run: Run, kind: str) -> None:
    """Logits of several hundred, which overflow an exponential, at masked keys and at invalid queries."""
    q, k, v = inputs(S=20, P=40)
    masks = random_masks(1, 2, 20, 40)
    assert masks.key is not None
    assert masks.query is not None
    found = run(q, k, v, masks, **KINDS[kind])
    louder = k.masked_fill(~masks.key[:, None, :, None], 200.0)
    again = run(q, louder, v, masks, **KINDS[kind])
    for name in set(Forward._fields) - {"column_lse"}:
        assert torch.equal(getattr(found, name), getattr(again, name)), name
    deafening = q.masked_fill(~masks.query[:, None, :, None], 200.0)
    again = run(deafening, k, v, masks, **KINDS[kind])
    for name in ("key_attention", "query_attention", "key_max", "column_lse"):
        assert torch.equal(getattr(found, name), getattr(again, name)), name


@pytest.mark.parametrize("kind", KINDS)
def test_entropy_of_peaked_rows_does_not_cancel(run: Run, kind: str) -> None:
    """Entropies of 1e-6 beside logits of a hundred: lse less the mean of s would be wrong by 1e-5."""
    q, k, v = inputs(S=20, P=40)
    request = Request(4.0, entropy=True)
    found = run(q, k, v, request=request, **KINDS[kind]).entropy
    wanted = reference.forward(q.double(), k.double(), v.double(), Masks(), None, request).entropy
    assert found is not None
    assert wanted is not None
    assert wanted.min() < 1e-6
    assert (found >= 0).all()
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1.2e-7)  # log(1 + x) is exact to half an eps


@pytest.mark.parametrize("scale", [0.0, -0.3])
@pytest.mark.parametrize("kind", ["single", "online"])
def test_scale(run: Run, kind: str, scale: float) -> None:
    q, k, v = inputs(S=20, P=40)
    masks = random_masks(1, 2, 20, 40)
    request = replace(EVERYTHING, scale=scale)
    assert_exact(run(q, k, v, masks, request, **KINDS[kind]), q, k, v, masks, request)


# --- dropout ----------------------------------------------------------------------------------------------------------

TILINGS = [
    {"single": Config(16, 128)},
    {"single": Config(64, 128, transposed=True)},
    {"online": Config(16, 16)},
    {"online": Config(32, 64, transposed=True)},
]


@pytest.mark.parametrize("tiling", TILINGS, ids=str)
def test_dropout_keeps_the_same_weights_on_any_tiles(run: Run, tiling: dict[str, object]) -> None:
    """Values are an identity matrix: the output is the weights themselves."""
    B, H, S, P = 1, 2, 33, 77
    q, k, _ = inputs(B, H, S, P, D=P)
    v = torch.eye(P, device=DEVICE).expand(B, H, P, P)
    request, seed = Request(0.02, dropout_p=0.3), torch.tensor([2**40 + 12345], device=DEVICE)
    output = run(q, k, v, Masks(), request, seed, **tiling).output
    kept = dropout.keep(seed, 0.3, torch.arange(B * H, device=DEVICE), torch.arange(S, device=DEVICE), P)
    assert torch.equal(output.view(B * H, S, P) != 0, kept)
    assert 0.25 < 1 - kept.float().mean() < 0.35
    assert_exact(run(q, k, v, Masks(), request, seed, **tiling), q, k, v, Masks(), request, seed)


@pytest.mark.parametrize("tiling", TILINGS, ids=str)
def test_dropout_leaves_the_statistics_alone(run: Run, tiling: dict[str, object]) -> None:
    q, k, v = inputs(S=20, P=40)
    masks = random_masks(1, 2, 20, 40)
    request, seed = replace(EVERYTHING, dropout_p=0.5), torch.tensor([-7], device=DEVICE)
    found, without = run(q, k, v, masks, request, seed, **tiling), run(q, k, v, masks, **tiling)
    assert_exact(found, q, k, v, masks, request, seed)
    for name in set(Forward._fields) - {"output"}:
        torch.testing.assert_close(getattr(found, name), getattr(without, name), atol=1e-6, rtol=1e-6)
    assert (found.output - without.output).abs().max() > 0.1


# --- the interpreter in bfloat16 --------------------------------------------------------------------------------------

interpreted = pytest.mark.skipif(DEVICE == "cuda", reason="Triton compiles: there is nothing to repair")


@interpreted
def test_bf16_casts_are_those_of_torch() -> None:
    """Every bfloat16, and around each of them every way to round."""
    patterns = np.arange(2**16, dtype=np.uint16)
    wanted = torch.from_numpy(patterns.view(np.int16)).view(torch.bfloat16).float()
    assert np.array_equal(interpreter_bf16.widen(patterns), wanted.numpy(), equal_nan=True)
    bits = patterns.astype(np.uint32)[:, None] << 16 | np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32)
    values = bits.view(np.float32)
    narrowed = interpreter_bf16.narrow(values)
    wanted = torch.from_numpy(values).bfloat16()
    number = ~np.isnan(values)
    assert np.array_equal(narrowed[number], wanted.view(torch.int16).numpy().view(np.uint16)[number])
    assert np.isnan(interpreter_bf16.widen(narrowed[~number])).all()


@triton.jit
def _arithmetic(A, B, Out, Found, N: tl.constexpr):
    rows, columns = tl.arange(0, N)[:, None], tl.arange(0, N)[None, :]
    at = rows * N + columns
    a, b = tl.load(A + at), tl.load(B + at)
    tl.store(Out + at, tl.where(a > b, a * b + a, -a - b * 3.0))
    tl.store(Found + at, tl.dot(a, tl.trans(b)) + tl.max(a, 1)[:, None])


@interpreted
def test_bf16_arithmetic_is_that_of_torch() -> None:
    a, b = (torch.randn(16, 16).bfloat16() for _ in range(2))
    out, found = torch.empty_like(a), torch.empty(16, 16)
    with interpreter_bf16.repaired():
        _arithmetic[(1,)](a, b, out, found, 16)
    assert torch.equal(out, torch.where(a > b, a * b + a, -a - b * 3.0))
    wanted = a.double() @ b.double().T + a.double().amax(1, keepdim=True)
    assert (found - wanted).abs().max() < 1e-5
    with pytest.raises(InterpreterError, match="get_bf16"):  # the stock interpreter; if it learns this, look again
        _arithmetic[(1,)](a, b, out, found, 16)


@triton.jit
def _sum(A, Out, N: tl.constexpr):
    tl.store(Out, tl.sum(tl.load(A + tl.arange(0, N)), 0))


@interpreted
def test_bf16_sums_are_refused() -> None:
    a = torch.randn(16).bfloat16()
    with interpreter_bf16.repaired(), pytest.raises(InterpreterError, match="go to float32 first"):
        _sum[(1,)](a, torch.empty(1), 16)
