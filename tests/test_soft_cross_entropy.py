"""Linear and soft-label cross-entropy against float64: values, gradients, memory, PyTorch's machinery, bad input."""

from __future__ import annotations

import itertools
import math
import weakref
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from crossmask.kernels import SoftCrossEntropy, soft_cross_entropy
from crossmask.kernels.soft_cross_entropy import blockwise, dispatch, huge_pages
from crossmask.kernels.soft_cross_entropy.request import Inputs, Needed

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LENGTHS = (1, 30, 77, 197, 257, 577)
IMPLEMENTATIONS = ("blockwise", "triton", "reference")  # triton in its interpreter where there is no GPU
PLAIN = ("blockwise", "reference")
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
# NumPy says so in the interpreter, of blocks that a bias rules out
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow|divide by zero) encountered:RuntimeWarning")


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    """Every torch.empty is full of NaN, or of the largest integer."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks of words, of which the last is not full."""
    monkeypatch.setattr(blockwise, "BLOCK", 2**12)
    monkeypatch.setattr(blockwise, "FEWEST", 24)
    monkeypatch.setattr(blockwise, "MOST", 96)


class Case(NamedTuple):
    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    labels: Tensor
    teacher_hidden: Tensor | None
    teacher_weight: Tensor | None
    teacher_bias: Tensor | None
    distillation: float
    token_weights: Tensor | None

    def to(self, dtype: torch.dtype) -> Case:
        return Case(*(x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x for x in self))


def case(
    N: int = 7,
    V: int = 63,
    W: int = 16,
    dtype: torch.dtype = torch.float32,
    alpha: float = 0.4,
    *,
    bias: bool = True,
    weighted: bool = True,
) -> Case:
    """Logits of a few units; a teacher that agrees with the student in part."""

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64)

    hidden, weight, shift = draw(N, W), 3 * draw(V, W) / W**0.5, draw(V)
    teacher = (0.7 * hidden + 0.7 * draw(N, W), 0.7 * weight + 0.7 * draw(V, W) / W**0.5, draw(V))
    tensors = [x.to(DEVICE, dtype) for x in (hidden, weight, shift, *teacher)]
    if not bias:
        tensors[2] = tensors[5] = None  # type: ignore[call-overload]
    labels = torch.randint(V, (N,), device=DEVICE)
    factors = torch.rand(N, device=DEVICE) if weighted else None
    return Case(*tensors[:3], labels, *(tensors[3:] if alpha else (None,) * 3), alpha, factors)  # type: ignore[arg-type]


def plain(given: Case) -> Tensor:
    """What one would write, in the dtype of the inputs, logits and all."""
    z = F.linear(given.hidden, given.weight, given.bias).log_softmax(1)
    loss = -(1 - given.distillation) * z.gather(1, given.labels[:, None])[:, 0]
    if given.distillation:
        assert given.teacher_hidden is not None
        assert given.teacher_weight is not None
        q = F.linear(given.teacher_hidden, given.teacher_weight, given.teacher_bias).softmax(1)
        loss = loss - given.distillation * (q.detach() * z).sum(1)
    return loss if given.token_weights is None else loss * given.token_weights.to(loss.dtype)


def with_gradients(function: Any, given: Case, g: Tensor, **options: Any) -> list[Tensor]:
    """Losses and the gradients of hidden, weight and bias."""
    leaves = [x.detach().requires_grad_() for x in given[:3] if x is not None]
    bias = leaves[2] if given.bias is not None else None
    loss = function(Case(leaves[0], leaves[1], bias, *given[3:]), **options)
    return [loss, *torch.autograd.grad(loss, leaves, g.to(loss.dtype))]


def ours(given: Case, **options: Any) -> Tensor:
    *inputs, token_weights = given
    loss: Tensor = soft_cross_entropy(*inputs, token_weights=token_weights, **options)
    return loss


def assert_exact(found: list[Tensor], given: Case, g: Tensor) -> None:
    """At most twice the error of plain PyTorch in the dtype, and some roundings of the results."""
    exact = with_gradients(plain, given.to(torch.float64), g.double())
    usual = with_gradients(plain, given, g)
    logits = F.linear(*given.to(torch.float64)[:3]).abs().max().item()  # of which a loss is a difference
    for mine, theirs, wanted, least in zip(found, usual, exact, (logits, 0.0, 0.0, 0.0), strict=False):
        assert mine.shape == wanted.shape
        largest = wanted.abs().max().clamp(min=least)
        # nothing more exact than float64 is there to compare float64 with
        roundings = 64 if mine.dtype == torch.float64 else 8
        allowed = 2 * (theirs.double() - wanted).abs().max() + roundings * torch.finfo(mine.dtype).eps * largest
        assert (mine - wanted).abs().max() <= allowed
    assert found[0].dtype == (torch.float64 if given.hidden.dtype == torch.float64 else torch.float32)
    assert all(x.dtype == given.hidden.dtype for x in found[1:])


# --- values and gradients ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_by_hand(impl: Any) -> None:
    """The weight is the unit matrix: hidden features are logits."""
    logits = torch.tensor([[0.0, math.log(2), math.log(5)]], device=DEVICE)
    teacher = torch.tensor([[0.0, 0.0, math.log(2)]], device=DEVICE)
    eye, label = torch.eye(3, device=DEVICE), torch.tensor([1], device=DEVICE)
    hard = math.log(8 / 2)
    soft = 0.25 * math.log(8) + 0.25 * math.log(4) + 0.5 * math.log(8 / 5)
    loss = soft_cross_entropy(logits, eye, None, label, teacher, eye, None, 0.4, impl=impl)
    assert loss.tolist() == pytest.approx([0.6 * hard + 0.4 * soft], rel=1e-6)
    loss = soft_cross_entropy(logits, eye, None, label, impl=impl)
    assert loss.tolist() == pytest.approx([hard], rel=1e-6)
    half = torch.tensor([0.5], device=DEVICE)
    loss = soft_cross_entropy(logits, eye, None, label, teacher, eye, None, 1.0, token_weights=half, impl=impl)
    assert loss.tolist() == pytest.approx([0.5 * soft], rel=1e-6)


def test_the_ends_of_alpha() -> None:
    given = case(6, 11, alpha=0.4, weighted=False)
    z = F.linear(*given[:3])
    q = F.linear(*given[4:7]).softmax(1)  # type: ignore[arg-type]
    hard = F.cross_entropy(z, given.labels, reduction="none")
    torch.testing.assert_close(soft_cross_entropy(*given[:7], 0.0), hard)
    torch.testing.assert_close(soft_cross_entropy(*given[:4]), hard)
    torch.testing.assert_close(soft_cross_entropy(*given[:7], 1.0), F.cross_entropy(z, q, reduction="none"))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_gradient_identity(impl: Any) -> None:
    """dL/dz_j = p_j - alpha q_j - (1 - alpha) delta_j; with the unit matrix as weight it is that of hidden."""
    logits = torch.randn(4, 7, device=DEVICE, requires_grad=True)
    teacher, eye = torch.randn(4, 7, device=DEVICE), torch.eye(7, device=DEVICE)
    labels = torch.tensor([0, 6, 3, 3], device=DEVICE)
    soft_cross_entropy(logits, eye, None, labels, teacher, eye, None, 0.25, impl=impl).sum().backward()
    wanted = logits.detach().softmax(1) - 0.25 * teacher.softmax(1) - 0.75 * F.one_hot(labels, 7)
    torch.testing.assert_close(logits.grad, wanted)


@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("impl", PLAIN)
@pytest.mark.parametrize("N", LENGTHS)
@pytest.mark.usefixtures("small_blocks")
def test_every_length(N: int, impl: Any, alpha: float) -> None:
    for V, bias in itertools.product((5, 63, 257, 1000), (True, False)):
        given = case(N, V, 24, alpha=alpha, bias=bias, weighted=bias)
        g = torch.randn(N, device=DEVICE)
        assert_exact(with_gradients(ours, given, g, impl=impl), given, g)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("W", [1, 8, 64, 100, 768])
@pytest.mark.parametrize("impl", PLAIN)
@pytest.mark.usefixtures("small_blocks")
def test_every_width(impl: Any, W: int, dtype: torch.dtype) -> None:
    given, g = case(30, 257, W, dtype), torch.randn(30, device=DEVICE)
    assert_exact(with_gradients(ours, given, g, impl=impl), given, g)


def test_a_whole_vocabulary() -> None:
    """BERT's, in the blocks that ship, large enough for huge pages and oneDNN's products."""
    given, g = case(30, 30522, 288), torch.full((30,), 1 / 30, device=DEVICE)
    assert given.weight.nbytes >= huge_pages.SMALLEST
    assert_exact(with_gradients(ours, given, g), given, g)


@pytest.mark.parametrize("impl", PLAIN)
@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
@pytest.mark.usefixtures("small_blocks")
def test_gradcheck(impl: Any, alpha: float) -> None:
    given = case(3, 30, 4, torch.float64, alpha)
    leaves = tuple(x.requires_grad_() for x in given[:3])  # type: ignore[union-attr]
    assert torch.autograd.gradcheck(lambda *x: ours(Case(*x, *given[3:]), impl=impl), leaves)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.usefixtures("small_blocks")
def test_argmax_is_the_first_of_the_largest(impl: Any) -> None:
    """Integers, so that logits are exact and often equal."""
    hidden, weight = (torch.randint(-2, 3, (n, 3), device=DEVICE).float() for n in (40, 300))
    labels = torch.zeros(40, dtype=torch.int64, device=DEVICE)
    found = soft_cross_entropy(hidden, weight, None, labels, return_argmax=True, impl=impl)
    z = hidden @ weight.T
    ties = z == z.amax(1, keepdim=True)
    assert (ties.sum(1) > 1).any()
    assert torch.equal(found.argmax, (ties.cumsum(1) == 0).sum(1))
    assert isinstance(found, SoftCrossEntropy)
    torch.testing.assert_close(found.loss, F.cross_entropy(z, labels, reduction="none"))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.usefixtures("small_blocks")
def test_words_that_a_bias_rules_out(impl: Any) -> None:
    """Whole blocks of them, the first ones and the last."""
    given = case(9, 700, alpha=0.0)
    assert given.bias is not None
    given.bias[:200] = given.bias[600:] = -torch.inf
    given = given._replace(labels=200 + given.labels % 400)
    allowed = given._replace(weight=given.weight[200:600], bias=given.bias[200:600], labels=given.labels - 200)
    g = torch.randn(9, device=DEVICE)
    found, wanted = with_gradients(ours, given, g, impl=impl), with_gradients(ours, allowed, g, impl="reference")
    torch.testing.assert_close(found[:2], wanted[:2])
    for mine, exact in zip(found[2:], wanted[2:], strict=True):
        torch.testing.assert_close(mine[200:600], exact)
        assert not mine[:200].any()
        assert not mine[600:].any()


@pytest.mark.parametrize("impl", ["blockwise", "triton"])
def test_large_logits_do_not_overflow(impl: Any) -> None:
    given, g = case(5, 90, alpha=0.4), torch.randn(5, device=DEVICE)
    given = given._replace(hidden=300 * given.hidden, teacher_hidden=300 * given.teacher_hidden)  # type: ignore[operator]
    assert F.linear(*given[:3]).abs().max() > 500
    assert_exact(with_gradients(ours, given, g, impl=impl), given, g)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_no_rows_keep_the_graph(impl: Any) -> None:
    for alpha in (0.0, 0.4):
        given = case(0, alpha=alpha)
        loss, *gradients = with_gradients(lambda x, **o: ours(x, **o).sum()[None], given, torch.ones(1), impl=impl)
        assert loss.item() == 0
        assert [x.shape for x in gradients] == [x.shape for x in given[:3]]  # type: ignore[union-attr]
        assert not any(x.any() for x in gradients)
        assert soft_cross_entropy(*given[:8], return_argmax=True, impl=impl).argmax.shape == (0,)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_any_layout(impl: Any) -> None:
    """A transposed weight, every other row, one row for all, a gradient without memory."""
    given = case(8, 40, 24)
    spread = given._replace(
        hidden=given.hidden.repeat_interleave(2, 0)[::2],
        weight=given.weight.T.contiguous().T,
        labels=given.labels.repeat_interleave(3)[::3],
        teacher_hidden=given.teacher_hidden[:1].expand(8, -1),  # type: ignore[index]
        teacher_weight=torch.cat([given.teacher_weight, given.teacher_weight], 1)[:, :24],  # type: ignore[list-item]
    )
    g = torch.ones(1, device=DEVICE).expand(8)
    assert_exact(with_gradients(ours, spread, g, impl=impl), spread, g)


def test_a_tied_embedding_gets_both_gradients() -> None:
    given = case(9, 50, 8)
    table, ids = given.weight.requires_grad_(), torch.arange(9, device=DEVICE) * 5
    teacher = given[4:7]

    def loss(impl: Any) -> Tensor:
        hidden = torch.tanh(F.embedding(ids, table))
        return soft_cross_entropy(hidden, table, given.bias, given.labels, *teacher, 0.4, impl=impl).sum()

    found, wanted = (torch.autograd.grad(loss(impl), table)[0] for impl in ("blockwise", "reference"))
    torch.testing.assert_close(found, wanted)
    alone = torch.autograd.grad(soft_cross_entropy(*given[:8]).sum(), table)[0]
    assert not torch.allclose(found, alone)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_gradients_only_where_they_are_needed(impl: Any) -> None:
    for wanted in itertools.product((True, False), repeat=3):
        given = case()
        leaves = [x.requires_grad_(want) for x, want in zip(given[:3], wanted, strict=True)]  # type: ignore[union-attr]
        others = [x.requires_grad_() for x in given[4:7]]  # type: ignore[union-attr]
        weights = given.token_weights.requires_grad_()  # type: ignore[union-attr]
        found = soft_cross_entropy(*given[:8], token_weights=weights, return_argmax=True, impl=impl)
        assert found.loss.requires_grad == any(wanted)
        assert not found.argmax.requires_grad
        if any(wanted):
            found.loss.sum().backward()
        assert [x.grad is not None for x in leaves] == list(wanted)
        assert all(x.grad is None for x in (*others, weights))


@pytest.mark.parametrize("impl", ["blockwise", "triton"])
@pytest.mark.usefixtures("small_blocks")
def test_two_runs_agree_bitwise(impl: Any) -> None:
    given, g = case(20, 100), torch.randn(20, device=DEVICE)
    assert all(map(torch.equal, *(with_gradients(ours, given, g, impl=impl) for _ in range(2))))


def test_without_distillation_the_teacher_is_not_looked_at() -> None:
    given = case(alpha=0.0)
    broken = (torch.full((1, 1), torch.nan), "no tensor", None)
    with pytest.raises(TypeError, match="teacher_weight must be a tensor"):
        soft_cross_entropy(*given[:4], *broken)  # type: ignore[arg-type]
    broken = (torch.full((1, 1), torch.nan), torch.zeros(2), None)  # type: ignore[assignment]
    assert torch.equal(soft_cross_entropy(*given[:4], *broken), soft_cross_entropy(*given[:4]))  # type: ignore[arg-type]


# --- memory and lifetime ----------------------------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """The most elements that a result has which is no view."""

    def __init__(self, *known: Tensor | None) -> None:
        super().__init__()
        self.known, self.elements = {x.untyped_storage().data_ptr() for x in known if x is not None}, 0

    def __torch_dispatch__(self, op: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        found = op(*arguments, **(options or {}))
        for x in torch.utils._pytree.tree_leaves(found):
            if isinstance(x, Tensor) and x.untyped_storage().data_ptr() not in self.known:
                self.elements = max(self.elements, x.untyped_storage().nbytes() // x.element_size())
        return found


@pytest.mark.skipif(DEVICE == "cuda", reason="measures the CPU's implementation")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_no_operator_gives_rows_by_words(dtype: torch.dtype) -> None:
    given = Inputs(*case(500, 30522, 8, dtype))
    with Largest(*(x for x in given if isinstance(x, Tensor))) as seen:
        found = blockwise.forward(given)
        blockwise.backward(found.loss, given, found.lse, found.teacher_lse, Needed(True, True, True))
    assert seen.elements <= max(blockwise.BLOCK, 500 * blockwise.FEWEST, given.weight.numel())
    assert seen.elements < 500 * 30522 / 20


@pytest.mark.skipif(DEVICE == "cuda", reason="measures the CPU's allocator")
def test_memory() -> None:
    given = case(1000, 30522, 8)
    leaves = [x.requires_grad_() for x in given[:3]]  # type: ignore[union-attr]

    def most(impl: Any) -> int:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
            torch.autograd.grad(ours(given, impl=impl).sum(), leaves)
        events = found.profiler.kineto_results.events()
        changes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns()) if e.name() == "[memory]"]
        return max(itertools.accumulate(changes), default=0)

    logits = 4 * 1000 * 30522
    assert most("blockwise") < logits / 6
    assert most("reference") > 2 * logits


def test_the_teacher_is_freed_with_the_graph() -> None:
    given = case()
    arrays = [x.cpu().numpy().copy() for x in given[4:7]]  # type: ignore[union-attr]
    alive = [weakref.ref(array) for array in arrays]
    leaf = given.hidden.requires_grad_()
    loss = soft_cross_entropy(*given[:4], *(torch.from_numpy(x) for x in arrays), 0.4, impl="blockwise")
    del arrays
    assert all(ref() is not None for ref in alive)
    loss.sum().backward()
    assert all(ref() is None for ref in alive)
    assert leaf.grad is not None


def test_weights_that_exist_in_forward_and_backward_only() -> None:
    """As ZeRO stage 3 has it: a parameter's data is empty in between, and elsewhere afterwards. The teacher's is gone,
    but the tensor that was given stays."""
    given, g = case(5, 40), torch.randn(5, device=DEVICE)
    wanted = with_gradients(ours, given, g)
    leaves = [torch.nn.Parameter(x.clone()) for x in given[:3]]  # type: ignore[union-attr]
    teacher = torch.nn.Parameter(given.teacher_weight.clone(), requires_grad=False)  # type: ignore[union-attr]
    loss = ours(given._replace(hidden=leaves[0], weight=leaves[1], bias=leaves[2], teacher_weight=teacher.detach()))
    teacher.data = torch.empty(0, device=DEVICE)
    for leaf in leaves:
        leaf.data = torch.empty(0, device=DEVICE)
    for leaf, x in zip(leaves, given[:3], strict=True):
        leaf.data = x.clone()  # type: ignore[union-attr]
    torch.testing.assert_close(list(torch.autograd.grad(loss, leaves, g)), wanted[1:], rtol=0, atol=0)


def test_a_teacher_that_changed_before_the_backward_is_refused() -> None:
    given = case()
    given.hidden.requires_grad_()
    loss = soft_cross_entropy(*given[:8])
    given.teacher_weight.mul_(0.5)  # type: ignore[union-attr]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.sum().backward()


# --- PyTorch's machinery ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.0, 0.4])
@pytest.mark.parametrize("impl", ["blockwise", "triton"])
def test_opcheck(impl: str, alpha: float) -> None:
    """Schema, autograd registration, fake kernels and AOTAutograd with dynamic shapes, forward and backward."""
    given = case(4, 12, alpha=alpha, bias=alpha > 0, weighted=alpha > 0)
    leaves = [x if x is None else x.requires_grad_() for x in given[:3]]
    arguments = (*leaves, *given[3:], impl)
    torch.library.opcheck(torch.ops.crossmask.soft_cross_entropy.default, arguments)
    loss, _, lse, teacher_lse = torch.ops.crossmask.soft_cross_entropy(*arguments)
    kept = (torch.randn_like(loss), lse.detach(), teacher_lse.detach())
    for needed in ((True, True, alpha > 0), (False, True, False)):
        torch.library.opcheck(
            torch.ops.crossmask.soft_cross_entropy_backward.default,
            (*kept, *(x if x is None else x.detach() for x in leaves), *given[3:], *needed, impl),
            test_utils=("test_schema", "test_faketensor"),
        )


@pytest.mark.parametrize("impl", [None, *IMPLEMENTATIONS])
def test_compiles_in_one_graph(impl: Any) -> None:
    def loss(hidden: Tensor, weight: Tensor, *others: Any) -> Tensor:
        return soft_cross_entropy(2 * hidden, weight, *others, return_argmax=True, impl=impl).loss.square().sum()

    torch._dynamo.reset()  # what it compiled for another implementation counts towards its limit
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
    for N in (4, 6):
        for alpha in (0.4, 0.0):
            given = case(N, 12, alpha=alpha)
            leaves = [x.requires_grad_() for x in given[:3]]  # type: ignore[union-attr]
            pairs = [f(*leaves, *given[3:8]) for f in (compiled, loss)]
            torch.testing.assert_close(*pairs)
            torch.testing.assert_close(*(torch.autograd.grad(x, leaves) for x in pairs))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_autocast(impl: Any) -> None:
    """As a linear layer has it: bfloat16 products, and gradients in the weights' own dtype; the loss stays float32."""
    if impl == "triton" and DEVICE == "cpu":
        pytest.skip("Triton's interpreter gets bfloat16 wrong: test_soft_cross_entropy_triton.py repairs it")
    given, g = case(30, 257, 64), torch.randn(30, device=DEVICE)

    def under(given: Case, dtype: torch.dtype | None) -> Tensor:
        with torch.autocast(DEVICE, dtype, enabled=dtype is not None):
            return ours(given, impl=impl)

    found = with_gradients(under, given, g, dtype=torch.bfloat16)
    half = given.to(torch.bfloat16)._replace(token_weights=given.token_weights)
    assert [x.dtype for x in found] == [torch.float32] * 4
    assert all(
        torch.equal(x, y.float()) for x, y in zip(found, with_gradients(under, half, g, dtype=None), strict=True)
    )
    with torch.autocast(DEVICE, torch.bfloat16):  # also around the backward
        again = with_gradients(ours, given, g, impl=impl)
    assert impl == "reference" or all(map(torch.equal, found, again))
    if impl != "triton":
        assert under(given.to(torch.float64), torch.bfloat16).dtype == torch.float64


def test_second_derivatives_and_transforms_are_refused() -> None:
    given = case(weighted=False)
    hidden = given.hidden.requires_grad_()
    (gradient,) = torch.autograd.grad(soft_cross_entropy(*given[:8]).sum(), hidden, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivatives; impl='reference' has"):
        gradient.sum().backward()
    with pytest.raises(NotImplementedError, match=r"none of torch.func's transforms"):
        torch.func.grad(lambda h: soft_cross_entropy(h, *given[1:8]).sum())(given.hidden)
    twice = torch.func.hessian(lambda h: soft_cross_entropy(h, *given[1:8], impl="reference").sum())
    assert twice(given.hidden.detach()).shape == (7, 16, 7, 16)


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"hidden": torch.zeros(7)}, ValueError, r"hidden must be \(N, W\) and weight \(V, W\), got hidden \(7,\)"),
        ({"hidden": torch.zeros(7, 15)}, ValueError, r"got hidden \(7, 15\) and weight \(63, 16\)"),
        ({"weight": torch.zeros(0, 16)}, ValueError, "there must be a word and a width"),
        ({"weight": None}, TypeError, "weight must be a tensor, got NoneType"),
        ({"bias": torch.zeros(62)}, ValueError, r"bias must be \(63,\), got \(62,\)"),
        ({"labels": torch.zeros(6, dtype=torch.int64)}, ValueError, r"labels must be \(7,\), got \(6,\)"),
        ({"labels": torch.zeros(7, dtype=torch.int32)}, ValueError, r"labels must be int64, got torch.int32"),
        ({"teacher_hidden": None}, ValueError, "distillation 0.4 needs a teacher: teacher_hidden is missing"),
        ({"teacher_weight": None}, ValueError, "distillation 0.4 needs a teacher: teacher_weight is missing"),
        ({"teacher_hidden": torch.zeros(6, 16)}, ValueError, r"teacher_hidden must be \(7, 16\), got \(6, 16\)"),
        ({"teacher_weight": torch.zeros(63, 8)}, ValueError, r"teacher_weight must be \(63, 16\), got \(63, 8\)"),
        ({"teacher_bias": torch.zeros(1)}, ValueError, r"teacher_bias must be \(63,\), got \(1,\)"),
        ({"distillation": 1.5}, ValueError, r"distillation must be in \[0, 1\], got 1.5"),
        ({"distillation": math.nan}, ValueError, r"distillation must be in \[0, 1\], got nan"),
        ({"distillation": torch.tensor(0.4)}, TypeError, "distillation must be a number in .* got Tensor"),
        ({"token_weights": torch.zeros(8)}, ValueError, r"token_weights must be \(7,\), got \(8,\)"),
        ({"token_weights": torch.ones(7).bool()}, ValueError, "token_weights must be floating point, got torch.bool"),
        ({"teacher_weight": torch.zeros(63, 16).half()}, ValueError, "teacher_weight must have the dtype of hidden"),
        ({"bias": torch.zeros(63, device="meta")}, ValueError, "bias must be on the device of hidden"),
        ({"impl": "fast"}, ValueError, r"unknown implementation 'fast'; choose from"),
    ],
)
def test_bad_input_in_one_line(change: dict[str, Any], error: type[Exception], message: str) -> None:
    given = {**case()._asdict(), **{k: v.to(DEVICE) if isinstance(v, Tensor) and v.device.type == "cpu" else v
                                    for k, v in change.items()}}  # fmt: skip
    with pytest.raises(error, match=message) as caught:
        soft_cross_entropy(**given)
    assert "\n" not in str(caught.value)


def test_integers_are_refused() -> None:
    given = case(alpha=0.0)
    with pytest.raises(ValueError, match=r"hidden must be float16, bfloat16, float32 or float64, got torch.int64"):
        soft_cross_entropy(given.hidden.long(), given.weight.long(), None, given.labels)


@pytest.mark.skipif(DEVICE == "cuda", reason="a GPU is not waited for: the loss is NaN there")
@pytest.mark.parametrize("label", [-100, -1, 63])
def test_labels_that_are_no_words(label: int) -> None:
    given = case()
    given.labels[3] = label
    with pytest.raises(ValueError, match=rf"labels must be words, 0 to 62, got {label}: leave rows without"):
        ours(given)


def test_what_runs_where(monkeypatch: pytest.MonkeyPatch) -> None:
    assert dispatch.implementation("cpu") == "blockwise"
    assert dispatch.implementation("cuda") == ("triton" if dispatch.HAS_TRITON else "blockwise")
    cuda = torch.device("cuda")
    assert dispatch.choose(None, cuda, torch.float64) == "blockwise"
    with pytest.raises(ValueError, match=r"takes float32, float16 and bfloat16, not torch\.float64"):
        dispatch.choose("triton", cuda, torch.float64)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ValueError, match="needs a CUDA or ROCm device, but hidden is on cpu"):
        dispatch.choose("triton", torch.device("cpu"), torch.float32)
    monkeypatch.setattr(dispatch, "HAS_TRITON", False)
    with pytest.raises(ValueError, match="needs the package triton"):
        dispatch.choose("triton", cuda, torch.float32)
    with pytest.warns(UserWarning, match="soft_cross_entropy runs in plain PyTorch on this GPU"):
        assert dispatch.choose(None, cuda, torch.float32) == "blockwise"
