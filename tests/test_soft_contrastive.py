"""The soft-target contrastive loss against numbers worked out by hand and float64: values, gradients, memory."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from crossmask.kernels import soft_contrastive
from crossmask.kernels.soft_contrastive import blockwise
from crossmask.kernels.soft_contrastive.request import Contrast
from crossmask.kernels.soft_contrastive.triton import launch_backward, launch_forward

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LENGTHS = (1, 30, 77, 197, 257, 577)
IMPLEMENTATIONS = ("blockwise", "triton", "reference")  # triton in its interpreter where there is no GPU
PLAIN = ("blockwise", "reference")
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
# NumPy says so in the interpreter, of rows beyond the edge
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow|divide by zero) encountered:RuntimeWarning")


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    """Every torch.empty is full of NaN, or of the largest integer."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


@dataclass(frozen=True)
class Case:
    queries: Tensor
    keys: Tensor
    teacher: Tensor
    query_groups: Tensor
    key_groups: Tensor
    tau: Tensor
    queue: Tensor | None = None
    queue_groups: Tensor | None = None

    def loss(self, alpha: float, impl: Any = None) -> Tensor:
        return soft_contrastive(
            *(self.queries, self.keys, self.teacher, self.query_groups, self.key_groups, self.tau, alpha),
            queue=self.queue,
            queue_groups=self.queue_groups,
            impl=impl,
        )

    def contrast(self, alpha: float) -> Contrast:
        return Contrast(
            *(self.queries, self.keys, self.teacher, self.query_groups, self.key_groups, self.tau),
            *(self.queue, self.queue_groups, alpha),
        )

    def all_keys(self) -> Tensor:
        return self.keys if self.queue is None else torch.cat((self.keys, self.queue))

    def target(self, alpha: float) -> Tensor:
        """(N, M + Q), as one would write it."""
        groups = self.key_groups if self.queue_groups is None else torch.cat((self.key_groups, self.queue_groups))
        match = ((self.query_groups[:, None] == groups) & (groups != -1)).to(self.queries.dtype)
        soft = (self.teacher @ self.all_keys().T / self.tau).softmax(1).detach()
        return alpha * soft + (1 - alpha) * match / match.sum(1, keepdim=True).clamp(min=1)

    def plain(self, alpha: float) -> Tensor:
        """The loss in the dtype of its features, as one would write it."""
        z = self.queries @ self.all_keys().T / self.tau
        return -(self.target(alpha) * z.log_softmax(1)).sum(1)

    def double(self) -> Case:
        fields = vars(self).items()
        return replace(self, **{k: x.double() for k, x in fields if x is not None and x.is_floating_point()})

    def leaves(self) -> tuple[Case, tuple[Tensor, ...]]:
        """With queries, keys and temperature that collect gradients."""
        leaves = tuple(x.detach().clone().requires_grad_() for x in (self.queries, self.keys, self.tau))
        return replace(self, **dict(zip(("queries", "keys", "tau"), leaves, strict=True))), leaves

    def results(self, alpha: float, loss: Callable[[Case], Tensor], g: Tensor) -> tuple[Tensor, ...]:
        """Loss and gradients of queries, keys and temperature."""
        case, leaves = self.leaves()
        found = loss(case)
        given = torch.autograd.grad(found, leaves, g.to(found.dtype), allow_unused=True)
        return found.detach(), *(torch.zeros_like(x) if y is None else y for x, y in zip(leaves, given, strict=True))


def features(n: int, width: int = 16, dtype: torch.dtype = torch.float32) -> Tensor:
    return F.normalize(torch.randn(n, width, dtype=torch.float64), dim=-1).to(DEVICE, dtype)


def inputs(
    N: int = 7, M: int = 9, Q: int | None = 12, E: int = 16, dtype: torch.dtype = torch.float32, tau: float = 0.1
) -> Case:
    """Some queries have several matches, among keys and queue, and some none; some keys match nothing."""

    def groups(n: int) -> Tensor:
        return torch.randint(-1, 12, (n,)).to(DEVICE)

    kind = torch.float64 if dtype == torch.float64 else torch.float32
    queue = () if Q is None else (features(Q, E, dtype), groups(Q))
    shared = (features(N, E, dtype), features(M, E, dtype), features(N, E, dtype))
    return Case(*shared, groups(N).abs(), groups(M), torch.tensor(tau, dtype=kind, device=DEVICE), *queue)


def terms(case: Case, alpha: float, g: Tensor) -> tuple[Tensor, ...]:
    """By how many roundings the loss and each gradient may be off: the size of what is added up to it and may cancel,
    times that of a logit, whose rounding is a softmax's relative error."""
    with torch.no_grad():
        z, g = case.queries @ case.all_keys().T / case.tau, g.abs().double()[:, None]
        w = z.softmax(1) + case.target(alpha)
        of_key = F.pad((g * w)[:, : len(case.keys)].sum(0), (0, 1)).max()
        of_tau, large = (g * w * z.abs()).sum(), 4 + z.abs().max()
        return large, *(large * x / case.tau for x in (2 * g.max(), of_key, of_tau))


def assert_exact(case: Case, alpha: float, found: tuple[Tensor, ...], g: Tensor) -> None:
    """At most twice plain PyTorch's error in the dtype, a rounding of the result, and what cancels in it."""
    dtype, kind = case.queries.dtype, case.tau.dtype
    exact = case.double().results(alpha, lambda c: c.plain(alpha), g)
    usual = replace(case, tau=case.tau.to(dtype)).results(alpha, lambda c: c.plain(alpha), g)
    for name, mine, theirs, wanted, size in zip(
        *(("loss", "d queries", "d keys", "d temperature"), found, usual, exact),
        terms(case.double(), alpha, g),
        strict=True,
    ):
        assert mine.dtype == (dtype if name in ("d queries", "d keys") else kind), name
        assert mine.shape == wanted.shape, name
        if wanted.numel():
            noise = torch.finfo(kind).eps * size + torch.finfo(mine.dtype).eps * wanted.abs().max()
            allowed = 2 * (theirs.double() - wanted).abs().max() + noise
            error = (mine - wanted).abs().max()
            assert error <= allowed, (name, error, allowed)


def check(case: Case, alpha: float, impl: Any) -> None:
    g = torch.randn(len(case.queries)).to(DEVICE)
    assert_exact(case, alpha, case.results(alpha, lambda c: c.loss(alpha, impl), g), g)


# --- by hand ----------------------------------------------------------------------------------------------------------


def log_softmax(z: list[float]) -> list[float]:
    total = math.log(sum(math.exp(x) for x in z))
    return [x - total for x in z]


def softmax(z: list[float]) -> list[float]:
    return [math.exp(x) for x in log_softmax(z)]


@pytest.mark.parametrize("split", [0, 1, 2, 3])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_by_hand(impl: Any, split: int) -> None:
    """Two queries, three keys of which the last may be the queue's, tau 0.5, alpha 0.4; the first query matches two."""
    queries = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    keys = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
    teacher = torch.tensor([[0.6, 0.8], [0.0, 1.0]])
    groups, key_groups = torch.tensor([7, 8]), torch.tensor([7, 8, 7])
    case = Case(queries, keys[:split], teacher, groups, key_groups[:split], torch.tensor(0.5))
    case = replace(case, queue=keys[split:], queue_groups=key_groups[split:])
    case = replace(case, **{name: x.to(DEVICE) for name, x in vars(case).items()})
    q0, q1 = softmax([1.2, 1.6, 2.0]), softmax([0.0, 2.0, 1.6])
    targets = [
        [0.4 * q0[0] + 0.3, 0.4 * q0[1], 0.4 * q0[2] + 0.3],
        [0.4 * q1[0], 0.4 * q1[1] + 0.6, 0.4 * q1[2]],
    ]
    wanted = [
        -sum(t * x for t, x in zip(row, log_softmax(z), strict=True))
        for row, z in zip(targets, ([2.0, 0.0, 1.2], [0.0, 2.0, 1.6]), strict=True)
    ]
    loss = case.loss(0.4, impl)
    assert loss.tolist() == pytest.approx(wanted, rel=1e-6)
    assert loss.tolist() == pytest.approx([1.10433, 0.71028], abs=1e-5)


@pytest.mark.parametrize("impl", PLAIN)
def test_without_a_teacher_it_is_cross_entropy(impl: Any) -> None:
    case = inputs(4, 9, None, dtype=torch.float64)
    case = replace(case, query_groups=torch.arange(4, device=DEVICE), key_groups=torch.arange(9, device=DEVICE))
    z = case.queries @ case.keys.T / case.tau
    torch.testing.assert_close(case.loss(0.0, impl), F.cross_entropy(z, case.query_groups, reduction="none"))


@pytest.mark.parametrize("impl", PLAIN)
def test_with_only_the_teacher_groups_do_not_matter(impl: Any) -> None:
    case = inputs(4, 9, dtype=torch.float64)
    target = (case.teacher @ case.all_keys().T / case.tau).softmax(1)
    wanted = F.cross_entropy(case.queries @ case.all_keys().T / case.tau, target, reduction="none")
    torch.testing.assert_close(case.loss(1.0, impl), wanted)
    other = replace(case, key_groups=case.key_groups.flip(0), query_groups=case.query_groups + 100)
    torch.testing.assert_close(other.loss(1.0, impl), wanted)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_a_teacher_that_does_not_count_is_not_read(impl: Any) -> None:
    case, g = inputs(4, 9), torch.ones(4, device=DEVICE)
    other = replace(case, teacher=torch.full_like(case.teacher, torch.nan))
    runs = [x.results(0.0, lambda c: c.loss(0.0, impl), g) for x in (case, other)]
    assert all(map(torch.equal, *runs))
    assert other.loss(0.1, impl).isnan().all()


@pytest.mark.parametrize("impl", PLAIN)
def test_gradient_identity(impl: Any) -> None:
    """dL/dz_j = softmax(z)_j - alpha q_j - (1 - alpha) delta_j, with delta spread over the group."""
    # With keys = identity and tau = 1 the logits are the queries themselves.
    queries, teacher = (torch.randn(3, 5, dtype=torch.float64) for _ in range(2))
    groups, key_groups = torch.tensor([1, 2, 3]), torch.tensor([1, 2, 3, 3, 9])
    one = torch.tensor(1.0, dtype=torch.float64)
    case, (found, *_) = Case(queries, torch.eye(5).double(), teacher, groups, key_groups, one).leaves()
    case.loss(0.3, impl).sum().backward()
    delta = torch.tensor([[1, 0, 0, 0, 0], [0, 1, 0, 0, 0], [0, 0, 0.5, 0.5, 0]]).double()
    wanted = queries.softmax(1) - 0.3 * teacher.softmax(1) - 0.7 * delta
    torch.testing.assert_close(found.grad, wanted)


@pytest.mark.parametrize("alpha", [0.0, 0.4])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_a_query_without_a_match_keeps_the_teachers_part(impl: Any, alpha: float) -> None:
    """Also one of group -1, whatever the keys' groups; the other queries are untouched."""
    case = inputs(4)
    case = replace(
        case,
        query_groups=torch.tensor([3, 50, -1, 4], device=DEVICE),
        key_groups=torch.tensor([3, 3, -1, 4, 7, 8, 9, 9, -1], device=DEVICE),
        queue_groups=torch.tensor([4, 5, -1] * 4, device=DEVICE),
    )
    g = torch.ones(4, device=DEVICE)
    loss, d_queries, _, _ = case.results(alpha, lambda c: c.loss(alpha, impl), g)
    only = case.results(1.0, lambda c: c.plain(1.0), g)
    torch.testing.assert_close(loss[1:3], alpha * only[0][1:3])
    torch.testing.assert_close(d_queries[1:3], alpha * only[1][1:3])
    assert (loss[1:3] == 0).all() == (alpha == 0)
    check(case, alpha, impl)
    others = replace(case, **{k: getattr(case, k)[[0, 3]] for k in ("queries", "teacher", "query_groups")})
    torch.testing.assert_close(others.loss(alpha, impl), loss[[0, 3]])


# --- against float64 --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", PLAIN)
@pytest.mark.parametrize("N", LENGTHS)
def test_every_length(N: int, impl: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blockwise, "LOGITS", 2**14)  # several blocks
    for number, (M, Q) in enumerate(itertools.product(LENGTHS, (*LENGTHS, 0, None))):
        check(inputs(N, M, Q, 8), (0.4, 0.0, 1.0)[number % 3], impl)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("E", [1, 16, 72, 100, 256, 512, 1024])
@pytest.mark.parametrize("impl", PLAIN)
def test_every_width(impl: Any, E: int, dtype: torch.dtype) -> None:
    check(inputs(30, 77, 40, E, dtype), 0.4, impl)


@pytest.mark.parametrize("tau", [0.001, 0.01, 0.07, 0.5])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_every_temperature(impl: Any, tau: float) -> None:
    """Logits of a thousand do not overflow."""
    check(inputs(9, 40, 20, tau=tau), 0.4, impl)


@pytest.mark.parametrize("dtype", DTYPES[1:3], ids=str)
@pytest.mark.parametrize("impl", PLAIN)
def test_half_precision_is_summed_in_float32(impl: Any, dtype: torch.dtype) -> None:
    case = inputs(4, 40, 40, dtype=dtype, tau=0.01)
    loss = case.loss(0.4, impl)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), case.double().loss(0.4, "reference"), rtol=1e-5, atol=1e-4)


@pytest.fixture
def bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    """bfloat16 is multiplied as it is, whatever the processor and however small; several blocks."""
    for name, value in (("bf16_products", lambda device: True), ("SMALLEST", 0), ("LOGITS", 2**14)):
        monkeypatch.setattr(blockwise, name, value)


@pytest.mark.parametrize("N", LENGTHS)
@pytest.mark.usefixtures("bf16")
def test_products_in_bfloat16(N: int) -> None:
    for number, (M, Q) in enumerate(itertools.product(LENGTHS, (30, 577, 0, None))):
        case = inputs(N, M, Q, 24, torch.bfloat16, tau=(0.07, 0.01, 0.5)[number % 3])
        check(case, (0.4, 0.0, 1.0)[number % 3], "blockwise")


@pytest.mark.parametrize("E", [16, 256])
@pytest.mark.usefixtures("bf16")
def test_products_in_bfloat16_leave_the_loss_alone(E: int) -> None:
    """The loss and the temperature's gradient are those of float32 products, whatever the weights are rounded to."""
    case, g = inputs(40, 300, 500, E, torch.bfloat16, tau=0.01), torch.ones(40, device=DEVICE)
    loss, _, _, d_tau = case.results(0.4, lambda c: c.loss(0.4, "blockwise"), g)
    exact, _, _, exact_tau = case.double().results(0.4, lambda c: c.loss(0.4, "reference"), g)
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(d_tau.double(), exact_tau, rtol=1e-5, atol=1e-2)


@pytest.mark.usefixtures("bf16")
def test_small_products_are_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where conversion costs less than a second product: exactly what float32 features give."""
    case, g = inputs(9, 40, 50, dtype=torch.bfloat16), torch.ones(9, device=DEVICE)
    rounded = case.results(0.4, lambda c: c.loss(0.4, "blockwise"), g)
    monkeypatch.setattr(blockwise, "SMALLEST", 2**20)
    found = case.results(0.4, lambda c: c.loss(0.4, "blockwise"), g)
    monkeypatch.setattr(blockwise, "bf16_products", lambda device: False)
    monkeypatch.setattr(blockwise, "SMALLEST", 0)
    assert all(map(torch.equal, found, case.results(0.4, lambda c: c.loss(0.4, "blockwise"), g)))
    assert not torch.equal(found[1], rounded[1]) or not torch.equal(found[0], rounded[0])


@pytest.mark.parametrize("impl", PLAIN)
def test_dtypes_may_differ(impl: Any) -> None:
    """Products are in the widest: nothing of it is rounded. The queue keeps its own."""
    case = inputs(5, 9, 12)
    mixed = replace(case, queries=case.queries.half(), teacher=case.teacher.bfloat16(), queue=case.queue.bfloat16())
    loss, *gradients = mixed.results(0.4, lambda c: c.loss(0.4, impl), torch.ones(5, device=DEVICE))
    same = replace(mixed, queries=mixed.queries.float(), teacher=mixed.teacher.float(), queue=mixed.queue.float())
    assert torch.equal(loss, same.loss(0.4, impl))
    assert [x.dtype for x in gradients] == [torch.float16, torch.float32, torch.float32]


@pytest.mark.parametrize(("impl", "E"), [*itertools.product(PLAIN, (16, 1)), ("triton", 16)])
def test_any_layout(impl: Any, E: int) -> None:
    """Transposed, every other row, one row for all, a slice of wider rows, one column."""
    case = inputs(6, 8, 10, E)
    for turn in (
        lambda x: x.T.contiguous().T,
        lambda x: x.repeat_interleave(2, 0)[::2],
        lambda x: x[:1].expand_as(x),
        lambda x: torch.cat((x, x, x), 1)[:, E : 2 * E],
    ):
        fields = {k: turn(getattr(case, k)) for k in ("queries", "keys", "teacher", "queue")}
        turned, plain = replace(case, **fields), replace(case, **{k: x.contiguous() for k, x in fields.items()})
        assert not all(x.is_contiguous() for x in fields.values()) or E == 1
        torch.testing.assert_close(turned.loss(0.4, impl), plain.loss(0.4, impl))
        stays = replace(turned, queries=turned.queries.requires_grad_(), keys=turned.keys.requires_grad_())
        g = torch.ones(1, device=DEVICE).expand(6)
        found = torch.autograd.grad(stays.loss(0.4, impl), (stays.queries, stays.keys), g)
        wanted = plain.results(0.4, lambda c: c.loss(0.4, impl), g)[1:3]
        for mine, theirs in zip(found, wanted, strict=True):
            torch.testing.assert_close(mine, theirs)


# --- gradients --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("impl", PLAIN)
def test_gradcheck(impl: Any, alpha: float) -> None:
    """Keys and temperature get the gradient through the student's logits alone: the target is a constant."""
    case = inputs(4, 5, 6, 5, torch.float64, tau=0.3)
    frozen = case.target(alpha)
    case, leaves = case.leaves()

    def loss(queries: Tensor, keys: Tensor, tau: Tensor) -> Tensor:
        z = queries @ torch.cat((keys, case.queue)).T / tau
        return -(frozen * z.log_softmax(1)).sum(1)

    assert torch.autograd.gradcheck(loss, leaves)
    found = case.loss(alpha, impl)
    torch.testing.assert_close(found, loss(*leaves))
    gradients = torch.autograd.grad(found.sum(), leaves)
    torch.testing.assert_close(gradients, torch.autograd.grad(loss(*leaves).sum(), leaves))
    if alpha == 0:  # the target does not move, so finite differences see the same function
        assert torch.autograd.gradcheck(lambda q, k, t: replace(case, queries=q, keys=k, tau=t).loss(0.0, impl), leaves)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_gradients_only_where_they_are_needed(impl: Any) -> None:
    """Never for the teacher and the queue, whatever they require."""
    for wanted in ({"queries"}, {"keys"}, {"tau"}, {"queries", "keys", "tau"}):
        case = inputs()
        for name in (*wanted, "teacher", "queue"):
            getattr(case, name).requires_grad_()
        case.loss(0.4, impl).sum().backward()
        given = {name for name, x in vars(case).items() if x.grad is not None}
        assert given == wanted
    case = inputs()
    assert not case.loss(0.4, impl).requires_grad


@pytest.mark.parametrize("impl", ["blockwise", "triton"])
def test_two_runs_agree_bitwise(impl: Any) -> None:
    case = inputs(20, 40, 90)
    g = torch.randn(20).to(DEVICE)
    runs = [case.results(0.4, lambda c: c.loss(0.4, impl), g) for _ in range(2)]
    assert all(map(torch.equal, *runs))


# --- memory -----------------------------------------------------------------------------------------------------------


class Sizes(TorchDispatchMode):
    """Bytes of the largest storage that an operation made."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.known = {x.untyped_storage().data_ptr() for x in vars(case).values()}
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for x in tree_leaves(found):
            if isinstance(x, Tensor) and x.untyped_storage().data_ptr() not in self.known:
                self.largest = max(self.largest, x.untyped_storage().nbytes())
        return found


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_nothing_is_as_large_as_the_logits_or_the_queue(impl: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blockwise, "LOGITS", 2**12)
    monkeypatch.setattr(blockwise, "ROWS", 2**12)
    N, M, Q, E = 24, 48, 1000, 32
    case = inputs(N, M, Q, E)
    case = replace(case, queue_groups=torch.full_like(case.queue_groups, int(case.query_groups[0])))  # all match
    with Sizes(case) as sizes:
        if impl == "reference":
            case.loss(0.4, impl)
        else:
            module, back = (blockwise, blockwise) if impl == "blockwise" else (launch_forward, launch_backward)
            found = module.forward(case.contrast(0.4))
            back.backward(torch.ones_like(found.loss), case.contrast(0.4), found, True, True)
    logits, queue = 4 * N * (M + Q), 4 * Q * E
    if impl == "reference":
        assert sizes.largest >= max(logits, queue)
    else:
        assert sizes.largest < min(logits, queue) / 2


def extra_memory(case: Case, impl: Any) -> int:
    """Most bytes that a forward and backward had allocated at one time, results included."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        case.loss(0.4, impl).sum().backward()
    events = found.profiler.kineto_results.events()
    changes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns()) if e.name() == "[memory]"]
    return max(itertools.accumulate(changes), default=0)


@pytest.mark.skipif(DEVICE == "cuda", reason="measures the CPU's allocator")
def test_memory_does_not_grow_with_queries_times_keys() -> None:
    N, M, Q, E = 256, 512, 8192, 16
    case, _ = inputs(N, M, Q, E).leaves()
    logits = 4 * N * (M + Q)
    assert extra_memory(case, "reference") > 2 * logits
    # a block of logits, some (N, E), and a few numbers for each key
    assert extra_memory(case, "blockwise") < 2**20 + 40 * N * E + 40 * (M + Q) + 2**19 < logits / 3
