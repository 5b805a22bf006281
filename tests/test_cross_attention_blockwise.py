"""The blockwise path of cross-attention: every cut, mask and statistic against the reference and against autograd."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import pytest
import torch
from torch import Tensor

from crossmask.kernels import cross_attention
from crossmask.kernels.cross_attention import blocks, blockwise, blockwise_backward, reference
from crossmask.kernels.cross_attention.request import STATISTICS, Forward, Gradients, Masks, Request

LENGTHS = (1, 30, 77, 197, 257, 577)
SHAPES = [*((9, n) for n in LENGTHS), *((n, 8) for n in LENGTHS)]
SEED = torch.tensor([2**40 + 5])
CUTS = {  # BLOCK and LARGEST
    "as_shipped": (blocks.BLOCK, blocks.LARGEST),
    "heads": (600, 10**9),
    "some_rows": (4000, 4000),
    "few_rows": (48, 48),
    "single_rows": (1, 1),
}
HALVES = (torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    """Fills what torch.empty gives with NaN, and refuses what is not deterministic."""
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def cut(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    block, largest = CUTS[name]
    monkeypatch.setattr(blocks, "BLOCK", block)
    monkeypatch.setattr(blocks, "LARGEST", largest)


def inputs(B: int, H: int, S: int, P: int, D: int = 8, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    # Three times a normal: peaked rows, where the mistakes show.
    return [(f * torch.randn(B, H, n, D, dtype=torch.float64)).to(dtype) for f, n in ((3, S), (1, P), (1, P))]


def masks(kind: str, B: int, H: int, S: int, P: int) -> Masks:
    """``some`` leaves in the last sample no key, in the one before it no query and in the first a head off."""
    if kind == "none":
        return Masks()
    key, query, head = torch.rand(B, P) < 0.7, torch.rand(B, S) < 0.6, torch.rand(B, H) < 0.8
    key[:, P // 2], query[:, S // 2], head[:, 0], head[0, -1] = True, True, True, False
    key[-1], query[-2] = False, False
    return (
        Masks(key, query, head) if kind == "all" else Masks(**{kind: {"key": key, "query": query, "head": head}[kind]})
    )


def asked(
    dropout_p: float = 0.0, per_head: bool = False, scale: float = 0.4, only: Sequence[str] = STATISTICS
) -> Request:
    return Request(scale, dropout_p, per_head, **{name: name in only for name in STATISTICS if name != "lse"})


def apart(found: Tensor, wanted: Tensor) -> float:
    """Largest difference; infinities of one sign are equal."""
    assert found.shape == wanted.shape
    wanted = wanted.to(torch.float64)
    return float(torch.where(found == wanted, 0.0, (found.to(torch.float64) - wanted).abs()).max())


def compare(found: Forward, wanted: Forward, valid: Masks, tolerance: float = 1e-12) -> None:
    for name, x, y in zip(Forward._fields, found, wanted, strict=True):
        assert (x is None) == (y is None), name
        if x is None or y is None:
            continue
        if name == "column_lse" and valid.key is not None:  # what stands at a masked key does not matter, but is no NaN
            assert not x.isnan().any()
            x, y = (value.masked_fill(~valid.key[:, None], 0.0) for value in (x, y))
        assert apart(x, y) < tolerance, name


def wanted_gradients(
    gradients: dict[str, Tensor], x: list[Tensor], valid: Masks, request: Request
) -> tuple[Tensor, ...]:
    """By autograd through the reference."""
    leaves = [value.detach().clone().requires_grad_() for value in x]
    found = reference.forward(*leaves, valid, SEED, request)
    # A row that attends to nothing has lse = -inf, a constant
    outputs = [getattr(found, name) for name in gradients]
    loss = sum((x.masked_fill(x.isinf(), 0.0) * g).sum() for x, g in zip(outputs, gradients.values(), strict=True))
    assert isinstance(loss, Tensor)
    return torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)


def random_gradients(names: Sequence[str], found: Forward) -> dict[str, Tensor]:
    return {name: torch.randn_like(getattr(found, name)) for name in names}


def run_backward(
    gradients: dict[str, Tensor], x: list[Tensor], found: Forward, valid: Masks, request: Request
) -> tuple[Tensor, ...]:
    given = Gradients(**{"output": torch.zeros_like(found.output), **gradients})
    return blockwise.backward(given, *x, found, valid, SEED, request)


DIFFERENTIABLE = ("output", *STATISTICS[:-1])


@pytest.mark.parametrize("name", ["as_shipped", "heads", "few_rows", "single_rows"])
@pytest.mark.parametrize(("S", "P"), SHAPES)
def test_forward_and_gradients_at_every_length(monkeypatch: pytest.MonkeyPatch, S: int, P: int, name: str) -> None:
    cut(monkeypatch, name)
    x, valid, request = inputs(3, 2, S, P), masks("all", 3, 2, S, P), asked()
    found = blockwise.forward(*x, valid, SEED, request)
    compare(found, reference.forward(*x, valid, SEED, request), valid)
    gradients = random_gradients(DIFFERENTIABLE, found)
    for mine, wanted in zip(
        run_backward(gradients, x, found, valid, request), wanted_gradients(gradients, x, valid, request), strict=True
    ):
        assert apart(mine, wanted) < 1e-12


@pytest.mark.parametrize("name", ["as_shipped", "heads", "few_rows", "single_rows"])
@pytest.mark.parametrize(("per_head", "dropout_p"), [*itertools.product((False, True), (0.0, 0.3))])
@pytest.mark.parametrize("kind", ["none", "key", "query", "head", "all"])
@pytest.mark.parametrize(("S", "P"), [(5, 18), (18, 5)])
def test_masks_heads_and_dropout(
    monkeypatch: pytest.MonkeyPatch, S: int, P: int, kind: str, per_head: bool, dropout_p: float, name: str
) -> None:
    cut(monkeypatch, name)
    x, valid, request = inputs(3, 3, S, P), masks(kind, 3, 3, S, P), asked(dropout_p, per_head)
    found = blockwise.forward(*x, valid, SEED, request)
    compare(found, reference.forward(*x, valid, SEED, request), valid)
    gradients = random_gradients(DIFFERENTIABLE, found)
    for mine, wanted in zip(
        run_backward(gradients, x, found, valid, request), wanted_gradients(gradients, x, valid, request), strict=True
    ):
        assert apart(mine, wanted) < 1e-12


@pytest.mark.parametrize("name", ["as_shipped", "few_rows"])
@pytest.mark.parametrize("told", DIFFERENTIABLE)
def test_each_gradient_alone(monkeypatch: pytest.MonkeyPatch, told: str, name: str) -> None:
    """Only this statistic is asked for, and only it has a gradient: nothing leans on another's presence."""
    cut(monkeypatch, name)
    x, valid, request = inputs(3, 2, 11, 17), masks("all", 3, 2, 11, 17), asked(0.2, only=(told,))
    found = blockwise.forward(*x, valid, SEED, request)
    compare(found, reference.forward(*x, valid, SEED, request), valid)
    gradients = random_gradients((told,), found)
    for mine, wanted in zip(
        run_backward(gradients, x, found, valid, request), wanted_gradients(gradients, x, valid, request), strict=True
    ):
        assert apart(mine, wanted) < 1e-12


@pytest.mark.parametrize("told", [(), *((name,) for name in STATISTICS)], ids=str)
def test_only_what_was_asked_for(told: tuple[str, ...]) -> None:
    x = inputs(2, 2, 5, 7)
    found = blockwise.forward(*x, Masks(), None, asked(only=told))
    compare(found, reference.forward(*x, Masks(), None, asked(only=told)), Masks())


@pytest.mark.parametrize("P", range(44, 53))
@pytest.mark.parametrize("transposed", [False, True])
def test_around_the_size_of_a_block(monkeypatch: pytest.MonkeyPatch, P: int, transposed: bool) -> None:
    monkeypatch.setattr(blocks, "BLOCK", 48 * 6)
    monkeypatch.setattr(blocks, "LARGEST", 48 * 6)
    S, P = (P, 6) if transposed else (6, P)
    x, request = inputs(3, 2, S, P), asked()
    found = blockwise.forward(*x, Masks(), None, request)
    compare(found, reference.forward(*x, Masks(), None, request), Masks())
    gradients = random_gradients(DIFFERENTIABLE, found)
    for mine, wanted in zip(
        run_backward(gradients, x, found, Masks(), request),
        wanted_gradients(gradients, x, Masks(), request),
        strict=True,
    ):
        assert apart(mine, wanted) < 1e-12


@pytest.mark.parametrize("name", ["as_shipped", "few_rows"])
def test_gradcheck(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Numerical derivatives through the public function."""
    cut(monkeypatch, name)
    torch.use_deterministic_algorithms(False)  # gradcheck itself is slow with filled memory
    valid = masks("all", 3, 2, 5, 4)

    def told(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        found = cross_attention(q, k, v, valid.key, valid.query, valid.head, statistics=STATISTICS, dropout_p=0.2,
                                dropout_seed=3, impl="blockwise")  # fmt: skip
        s = found.statistics
        given = (s.lse, s.max_probability, s.entropy, s.key_attention, s.query_attention)
        return found.output, *(x.masked_fill(x.isinf(), 0.0) for x in given if x is not None)

    assert torch.autograd.gradcheck(told, [x.requires_grad_() for x in inputs(3, 2, 5, 4, D=3)])


# -- precision ---------------------------------------------------------------------------------------------------------


def plain(q: Tensor, k: Tensor, v: Tensor, scale: float, key: Tensor) -> Tensor:
    """What PyTorch gives in the dtype of the inputs."""
    s = (scale * (q @ k.mT)).masked_fill(~key[:, None, None], -torch.inf)
    return s.softmax(-1) @ v


@pytest.mark.parametrize(
    ("dtype", "half_products"), [(torch.float32, False), *itertools.product(HALVES, (False, True))], ids=str
)
@pytest.mark.parametrize("name", ["as_shipped", "some_rows"])
@pytest.mark.parametrize(("S", "P"), [(1, 577), (30, 197), (577, 30), (257, 77), (197, 257)])
def test_error_against_float64(
    monkeypatch: pytest.MonkeyPatch, S: int, P: int, name: str, dtype: torch.dtype, half_products: bool
) -> None:
    """Output and gradients: at most twice the error of plain PyTorch. Statistics: float32 whatever the inputs."""
    cut(monkeypatch, name)
    monkeypatch.setattr(blocks, "_half_products", lambda dtype, device: half_products)
    x = inputs(2, 2, S, P, D=64, dtype=dtype)
    exact = [value.double() for value in x]
    valid, request = masks("key", 2, 2, S, P)._replace(query=torch.rand(2, S) < 0.7), asked(scale=0.125)
    key = valid.key
    assert key is not None
    key[-1] = True  # plain PyTorch knows no row without a key
    found, wanted = blockwise.forward(*x, valid, None, request), reference.forward(*exact, valid, None, request)
    floor = {torch.float32: 1e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}[dtype]
    own = apart(plain(*x, 0.125, key), wanted.output)
    assert apart(found.output, wanted.output) < 2 * own + floor
    for name in STATISTICS:
        statistic = getattr(found, name)
        assert statistic.dtype == torch.float32
        assert apart(statistic, getattr(wanted, name)) < 1e-5, name

    grad = torch.randn_like(x[0])
    leaves = [value.detach().requires_grad_() for value in x]
    theirs = torch.autograd.grad((plain(*leaves, 0.125, key) * grad).sum(), leaves)
    right = wanted_gradients({"output": grad.double()}, exact, valid, request)
    for mine, their, want in zip(run_backward({"output": grad}, x, found, valid, request), theirs, right, strict=True):
        assert mine.dtype == dtype
        assert apart(mine, want) < 2 * apart(their, want) + floor * float(want.abs().max())

    gradients = {name: torch.randn_like(getattr(wanted, name)) for name in DIFFERENTIABLE[1:]}
    right = wanted_gradients(gradients, exact, valid, request)
    given = {name: value.float() for name, value in gradients.items()}
    for mine, want in zip(run_backward(given, x, found, valid, request), right, strict=True):
        assert apart(mine, want) <= 4 * floor * float(want.abs().max())


@pytest.mark.parametrize("name", ["as_shipped", "heads", "few_rows"])
@pytest.mark.parametrize(("S", "P"), [(9, 40), (40, 9)])
def test_extreme_logits(monkeypatch: pytest.MonkeyPatch, S: int, P: int, name: str) -> None:
    cut(monkeypatch, name)
    x = inputs(3, 2, S, P, dtype=torch.float32)
    x[0] *= 100
    exact = [value.double() for value in x]
    for kind in ("none", "all"):
        valid, request = masks(kind, 3, 2, S, P), asked()
        found, wanted = blockwise.forward(*x, valid, None, request), reference.forward(*exact, valid, None, request)
        logits = float(0.4 * (exact[0] @ exact[1].mT).abs().max())
        assert logits > 500
        for told, mine in zip(Forward._fields, found, strict=True):
            if told == "column_lse":
                continue
            assert apart(mine, getattr(wanted, told)) < 4e-7 * logits, told  # float32 logits are no better than that
        gradients = random_gradients(DIFFERENTIABLE, found)
        for mine in run_backward(gradients, x, found, valid, request):
            assert mine.isfinite().all()


@pytest.mark.parametrize("name", ["as_shipped", "few_rows"])
@pytest.mark.parametrize("kind", ["none", "all"])
@pytest.mark.parametrize(("S", "P"), [(6, 14), (14, 6)])
def test_rows_far_apart_need_the_exact_column_sums(
    monkeypatch: pytest.MonkeyPatch, S: int, P: int, kind: str, name: str
) -> None:
    """Keys that only rows far below a head's largest logit look at: their weights underflow relative to it."""
    cut(monkeypatch, name)
    q, k, v = inputs(3, 2, S, P, dtype=torch.float32)
    q[..., 0], q[..., 1] = 0.0, 0.0
    k[..., 0], k[..., 1] = 1.0, 0.0
    q[:, :, S // 2, 0] = 600.0  # one row far above the others, and its favourites: the first half of the keys
    k[:, :, : P // 2, 1], q[:, :, S // 2, 1] = 1.0, 900.0
    exact = [value.double() for value in (q, k, v)]
    valid, request = masks(kind, 3, 2, S, P), asked(scale=1.0)
    wanted = reference.forward(*exact, valid, None, request)
    assert wanted.lse[0, 0].max() - wanted.lse[0, 0].min() > 400

    def error() -> float:
        found = blockwise.forward(q, k, v, valid, None, request)
        assert found.query_attention is not None
        assert wanted.query_attention is not None
        return apart(found.query_attention, wanted.query_attention)

    assert error() < 2e-4  # logits of 1500 in float32
    monkeypatch.setattr(blockwise, "SMALLEST_COLUMN", -1.0)  # without the guard the smallest columns are lost
    assert not error() < 1e-2


def test_backward_ignores_column_lse_at_masked_keys() -> None:
    x, valid, request = inputs(3, 2, 5, 7), masks("all", 3, 2, 5, 7), asked()
    found = blockwise.forward(*x, valid, None, request)
    assert valid.key is not None
    assert found.column_lse is not None
    other = found._replace(column_lse=found.column_lse.masked_fill(~valid.key[:, None], 0.5))
    gradients = random_gradients(("query_attention",), found)
    for mine, wanted in zip(
        run_backward(gradients, x, other, valid, request),
        run_backward(gradients, x, found, valid, request),
        strict=True,
    ):
        assert torch.equal(mine, wanted)


def test_entropy_does_not_cancel() -> None:
    """All logits equal and large: entropy log P, of which lse - E[s] would lose what the size of s costs."""
    q, k = torch.full((1, 1, 3, 4), 200.0), torch.full((1, 1, 50, 4), 200.0)
    found = blockwise.forward(q, k, torch.randn(1, 1, 50, 4), Masks(), None, asked(scale=1.0))
    assert found.entropy is not None
    assert apart(found.entropy, torch.full((1, 1, 3), 50.0).double().log()) < 1e-6


def test_gradient_of_the_maximum_goes_to_the_first_of_equals() -> None:
    q, k, v = inputs(1, 1, 4, 6, dtype=torch.float64)
    k[:, :, 3] = k[:, :, 1] = 5 * q[:, :, 2] / q[:, :, 2].norm()
    request, found = asked(), blockwise.forward(q, k, v, Masks(), None, asked())
    gradients = {"max_probability": torch.ones(1, 1, 4, dtype=torch.float64)}
    for mine, wanted in zip(
        run_backward(gradients, [q, k, v], found, Masks(), request),
        wanted_gradients(gradients, [q, k, v], Masks(), request),
        strict=True,
    ):
        assert apart(mine, wanted) < 1e-12


@pytest.mark.parametrize("name", ["as_shipped", "few_rows"])
@pytest.mark.parametrize("kind", ["none", "all"])
@pytest.mark.parametrize(("S", "P"), [(6, 14), (14, 6)])
def test_backward_of_columns_that_no_row_looks_at(
    monkeypatch: pytest.MonkeyPatch, S: int, P: int, kind: str, name: str
) -> None:
    """Keys whose weights underflow in every row still have a softmax over queries, which rows' weights cannot give."""
    cut(monkeypatch, name)
    q, k, v = inputs(3, 2, S, P, dtype=torch.float32)
    q[..., 0], k[..., 0] = 1.0, 0.0
    k[:, :, : P // 2, 0] = -200.0
    exact = [value.double() for value in (q, k, v)]
    valid, request = masks(kind, 3, 2, S, P), asked(scale=1.0)
    found = blockwise.forward(q, k, v, valid, None, request)
    gradients = {"query_attention": torch.randn(3, S, dtype=torch.float64)}
    right = wanted_gradients(gradients, exact, valid, request)

    def error() -> float:
        given = {name: gradient.float() for name, gradient in gradients.items()}
        mine = run_backward(given, [q, k, v], found, valid, request)
        return apart(mine[1], right[1]) / float(right[1].abs().max())

    assert error() < 2e-3  # logits of 200 in float32
    monkeypatch.setattr(blockwise_backward, "MOST_COLUMN", torch.inf)  # without the guard they are lost
    assert not error() < 1e-1


@pytest.mark.parametrize("name", ["as_shipped", "few_rows"])
@pytest.mark.parametrize("kind", ["none", "all"])
def test_columns_from_the_weights_of_rows_and_without(monkeypatch: pytest.MonkeyPatch, kind: str, name: str) -> None:
    """Both ways to the softmax over queries give the same gradients; heads and rows without keys stop neither."""
    cut(monkeypatch, name)
    ways = []
    factors = blockwise_backward._Terms._factors

    def watched(terms: blockwise_backward._Terms, cut: blocks.Blocks, valid: Masks) -> None:
        factors(terms, cut, valid)
        ways.append(terms.a is not None)

    monkeypatch.setattr(blockwise_backward._Terms, "_factors", watched)
    x, valid, request = inputs(3, 2, 11, 17), masks(kind, 3, 2, 11, 17), asked(0.2)
    found = blockwise.forward(*x, valid, SEED, request)
    gradients = random_gradients(DIFFERENTIABLE, found)
    factored = run_backward(gradients, x, found, valid, request)
    monkeypatch.setattr(blockwise_backward, "MOST_COLUMN", -torch.inf)
    for mine, other in zip(factored, run_backward(gradients, x, found, valid, request), strict=True):
        assert apart(mine, other) < 1e-12
    assert ways == [True, False]


# -- layout, determinism, memory ---------------------------------------------------------------------------------------


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The same values in other strides."""
    if layout == "heads_last":  # split from (B, S, H * D)
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "batch_inside":
        return x.permute(1, 2, 0, 3).contiguous().permute(2, 0, 1, 3)
    if layout == "width_not_dense":
        return x.mT.contiguous().mT
    return torch.cat([x, x], -1)[..., : x.shape[-1]] if layout == "rows_apart" else x


@pytest.mark.parametrize("name", ["as_shipped", "heads", "few_rows", "single_rows"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["heads_last", "batch_inside", "width_not_dense", "rows_apart"])
@pytest.mark.parametrize("kind", ["none", "all"])
def test_strides(monkeypatch: pytest.MonkeyPatch, kind: str, layout: str, dtype: torch.dtype, name: str) -> None:
    cut(monkeypatch, name)
    x, valid, request = inputs(3, 2, 9, 12, dtype=dtype), masks(kind, 3, 2, 9, 12), asked(0.2)
    plainly = blockwise.forward(*x, valid, SEED, request)
    strided = [laid_out(value, layout) for value in x]
    assert strided[0].stride() != x[0].stride()
    found = blockwise.forward(*strided, valid, SEED, request)
    assert found.output.stride() == torch.empty_like(strided[0]).stride()
    tolerance = 1e-12 if dtype == torch.float64 else 0.02
    compare(found, plainly, valid, tolerance)
    gradients = random_gradients(DIFFERENTIABLE, plainly)
    gradients["output"] = laid_out(gradients["output"], layout)
    mine = run_backward(gradients, strided, found, valid, request)
    for value, wanted, given in zip(mine, run_backward(gradients, x, plainly, valid, request), strided, strict=True):
        assert value.stride() == torch.empty_like(given).stride()
        assert apart(value, wanted) < (1e-12 if dtype == torch.float64 else 0.02 * float(wanted.abs().max()))


def test_a_gradient_that_is_expanded() -> None:
    """What .sum().backward() hands over has no strides at all."""
    x, request = inputs(2, 3, 5, 7), asked()
    found = blockwise.forward(*x, Masks(), None, request)
    one = {name: torch.ones((), dtype=torch.float64).expand_as(getattr(found, name)) for name in DIFFERENTIABLE}
    for mine, wanted in zip(
        run_backward(one, x, found, Masks(), request), wanted_gradients(one, x, Masks(), request), strict=True
    ):
        assert apart(mine, wanted) < 1e-12


@pytest.mark.parametrize("name", ["as_shipped", "heads", "few_rows", "single_rows"])
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_two_runs_agree_bitwise(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, name: str) -> None:
    cut(monkeypatch, name)
    x, valid, request = inputs(3, 2, 33, 50, dtype=dtype), masks("all", 3, 2, 33, 50), asked(0.1)

    def run() -> list[Tensor]:
        found = blockwise.forward(*x, valid, SEED, request)
        torch.manual_seed(1)
        gradients = random_gradients(DIFFERENTIABLE, found)
        told = [value for value in found if value is not None]
        return [*told, *run_backward(gradients, x, found, valid, request)]

    for once, again in zip(run(), run(), strict=True):
        assert torch.equal(once, again)


@pytest.mark.parametrize("name", ["as_shipped", "single_rows"])
def test_nothing_counts(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """No key, no query, no head: zeros, -inf, and gradients of zero."""
    cut(monkeypatch, name)
    x = inputs(2, 2, 4, 6, dtype=torch.float32)
    nothing = Masks(*(torch.zeros(2, n, dtype=torch.bool) for n in (6, 4, 2)))
    found = blockwise.forward(*x, nothing, None, asked())
    assert (found.lse == -torch.inf).all()
    for told in ("output", *STATISTICS[1:]):
        assert (getattr(found, told) == 0).all(), told
    for gradient in run_backward(random_gradients(DIFFERENTIABLE, found), x, found, nothing, asked()):
        assert (gradient == 0).all()


def peak_memory(run: object) -> tuple[int, int]:
    """The most that was allocated at one time, and the largest piece, in bytes: what the allocator itself reports."""
    assert callable(run)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        kept = run()
    events = profile.profiler.kineto_results.events()  # type: ignore[union-attr]
    changes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns()) if e.name() == "[memory]"]
    assert changes
    del kept
    return max(itertools.accumulate(changes)), max(changes)


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize(("S", "P"), [(2048, 1024), (40, 8192), (8192, 40)])
def test_memory_does_not_grow_with_the_weights(
    monkeypatch: pytest.MonkeyPatch, S: int, P: int, dropout_p: float
) -> None:
    monkeypatch.setattr(blocks, "BLOCK", 2**14)
    monkeypatch.setattr(blocks, "LARGEST", 2**14)
    torch.use_deterministic_algorithms(False)
    B, H, D = 1, 4, 8
    x, request = inputs(B, H, S, P, D, torch.float32), asked(dropout_p)
    block, weights = 4 * 2**14, 4 * B * H * S * P  # bytes
    ours = 4 * B * H * (S + P) * (D + 10)  # output, gradients, a few numbers for each query and key
    of_dropout = 60 * block if dropout_p else 0  # Philox works on 64-bit words
    bound = ours + 6 * block + of_dropout
    total, single = peak_memory(lambda: blockwise.forward(*x, Masks(), SEED, request))
    assert total < bound
    assert single <= max(4 * B * H * max(S, P) * D, 2 * block if dropout_p == 0 else 20 * block)
    found = blockwise.forward(*x, Masks(), SEED, request)
    gradients = Gradients(**random_gradients(DIFFERENTIABLE, found))
    total, _ = peak_memory(lambda: blockwise.backward(gradients, *x, found, Masks(), SEED, request))
    assert total < bound + ours
    if not dropout_p and min(S, P) > 40:
        assert total < weights / 10


@pytest.mark.parametrize(("S", "P"), [(1100, 1000), (8192, 130), (130, 8192)])
def test_long_axes_as_shipped(S: int, P: int) -> None:
    """More weights in a head than stay together: the cut that users see."""
    x = inputs(1, 1, S, P, dtype=torch.float32)
    assert S * P > blocks.LARGEST
    valid, request = masks("none", 1, 1, S, P)._replace(query=torch.rand(1, S) < 0.7), asked()
    found = blockwise.forward(*x, valid, None, request)
    wanted = reference.forward(*(value.double() for value in x), valid, None, request)
    for told in ("output", *STATISTICS):
        assert apart(getattr(found, told), getattr(wanted, told)) < 1e-5, told


def test_memory_kept_between_calls_holds_no_result() -> None:
    """Blocks are worked on in memory that the thread keeps; what a call returned must not change with the next."""
    torch.manual_seed(0)
    x, y = (torch.randn(2, 3, 40, 16) for _ in range(2))
    first = cross_attention(x, x, x, statistics=("entropy", "key_attention"), impl="blockwise")
    kept = [z.clone() for z in (first.output, first.statistics.entropy, first.statistics.key_attention)]
    held = {place: memory.data_ptr() for place, memory in blocks._kept.memory.items()}
    cross_attention(y, y, y, statistics=("entropy", "key_attention"), impl="blockwise")
    for before, z in zip(kept, (first.output, first.statistics.entropy, first.statistics.key_attention), strict=True):
        assert torch.equal(before, z)
    assert held == {place: memory.data_ptr() for place, memory in blocks._kept.memory.items()}
