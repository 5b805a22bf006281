"""The soft-target contrastive loss in PyTorch's machinery, and what it refuses."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from test_soft_contrastive import DEVICE, DTYPES, IMPLEMENTATIONS, PLAIN, inputs

from crossmask.kernels.soft_contrastive import dispatch

# NumPy says so in the interpreter, of rows beyond the edge
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow|divide by zero) encountered:RuntimeWarning")


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    """Every torch.empty is full of NaN, or of the largest integer."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(("impl", "queued"), [("blockwise", False), ("blockwise", True), ("triton", True)])
def test_opcheck(impl: str, queued: bool) -> None:
    """Schema, autograd registration, fake kernels and AOTAutograd with dynamic shapes, forward and backward."""
    case, _ = inputs(Q=12 if queued else None).leaves()
    arguments = (*tuple(vars(case).values()), 0.4, impl)
    torch.library.opcheck(torch.ops.crossmask.soft_contrastive.default, arguments)
    _, _, *kept = (x.detach() for x in torch.ops.crossmask.soft_contrastive(*arguments))
    tensors = tuple(x if x is None else x.detach() for x in vars(case).values())
    for wanted in ((True, True), (False, True)):
        torch.library.opcheck(
            torch.ops.crossmask.soft_contrastive_backward.default,
            (torch.randn(7, device=DEVICE), *kept, *tensors, 0.4, *wanted, impl),
        )


def test_compiles_without_a_break() -> None:
    """One node of the graph, also where lengths and the share of the teacher change."""
    compiled = torch.compile(
        lambda case, alpha: case.loss(alpha).square().sum(), fullgraph=True, backend="aot_eager", dynamic=True
    )
    for N, Q, alpha in ((7, 12, 0.4), (9, 30, 0.3), (9, 30, 0.0)):
        case, leaves = inputs(N, 9, Q).leaves()
        found, eager = compiled(case, alpha), case.loss(alpha).square().sum()
        torch.testing.assert_close(found, eager)
        torch.testing.assert_close(torch.autograd.grad(found, leaves), torch.autograd.grad(eager, leaves))


@pytest.mark.parametrize("impl", PLAIN)
def test_autocast_rounds_nothing(impl: Any) -> None:
    case, leaves = inputs().leaves()
    wanted = case.loss(0.4, impl)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        found = case.loss(0.4, impl)
    assert torch.equal(found, wanted)
    assert all(map(torch.equal, *(torch.autograd.grad(x.sum(), leaves) for x in (found, wanted))))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_no_query(impl: Any) -> None:
    case, leaves = inputs(0).leaves()
    loss = case.loss(0.4, impl)
    assert loss.shape == (0,)
    loss.sum().backward()
    assert all((x.grad == 0).all() for x in leaves)


@pytest.mark.parametrize("impl", ["blockwise", "triton"])
def test_a_queue_written_before_the_backward_is_an_error(impl: Any) -> None:
    case, _ = inputs().leaves()
    loss = case.loss(0.4, impl).sum()
    case.queue[0] = 0.0
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_second_derivatives_are_refused_and_the_reference_has_them() -> None:
    for impl in PLAIN:
        case, (queries, *_) = inputs().leaves()
        (first,) = torch.autograd.grad(case.loss(0.4, impl).square().sum(), queries, create_graph=True)
        if impl == "reference":
            first.sum().backward()
        else:
            with pytest.raises(NotImplementedError, match="no second derivatives"):
                first.sum().backward()
        case, (*_, tau) = inputs().leaves()
        (first,) = torch.autograd.grad(case.loss(0.4, impl).square().sum(), tau, create_graph=True)
        if impl == "reference":
            first.backward()
        else:
            with pytest.raises(NotImplementedError, match="no second derivatives"):
                first.backward()


def test_transforms_are_refused() -> None:
    case = inputs()
    with pytest.raises(NotImplementedError, match=r"none of torch\.func's transforms"):
        torch.func.grad(lambda q: replace(case, queries=q).loss(0.4).sum())(case.queries)


# --- bad input --------------------------------------------------------------------------------------------------------


def test_bad_input_is_told_in_one_line() -> None:
    case = inputs(2, 3, 4, 4)
    x, k, g, h = case.queries, case.keys, case.query_groups, case.key_groups
    wrong: list[tuple[dict[str, Any], float, type[Exception], str]] = [
        ({"keys": torch.zeros(3, 5)}, 0.4, ValueError, r"queries \(2, 4\) and keys \(3, 5\) must be \(N, E\)"),
        ({"queries": x[0]}, 0.4, ValueError, r"queries \(4,\) and keys \(3, 4\) must be"),
        ({"teacher": k}, 0.4, ValueError, r"teacher_queries \(3, 4\) must match queries \(2, 4\)"),
        ({"query_groups": h}, 0.4, ValueError, r"query_groups must be int64 \(2,\), an id for each row, got .*\(3,\)"),
        ({"key_groups": h.int()}, 0.4, ValueError, r"key_groups must be int64 \(3,\).*got torch.int32 \(3,\)"),
        ({"queue_groups": h}, 0.4, ValueError, r"queue_groups must be int64 \(4,\).*got torch.int64 \(3,\)"),
        ({"queue": torch.zeros(4, 5)}, 0.4, ValueError, r"queue must be \(Q, 4\), as wide as queries, got \(4, 5\)"),
        ({"queue": None}, 0.4, ValueError, "queue_groups needs queue: pass both, or neither"),
        ({"queue_groups": None}, 0.4, ValueError, "queue needs queue_groups: pass both, or neither"),
        ({"queries": x.int()}, 0.4, ValueError, "queries must be float16, bfloat16, float32 or float64, got torch.int"),
        ({"queue": case.queue.to("meta")}, 0.4, ValueError, "queue must be on the device of queries, .*, got meta"),
        ({"queries": x.tolist()}, 0.4, TypeError, "queries must be a tensor, got list"),
        ({"query_groups": None}, 0.4, TypeError, "query_groups must be a tensor, got NoneType"),
        ({"tau": 0.07}, 0.4, TypeError, r"temperature must be a tensor, got float: torch.tensor\(tau\)"),
        ({"tau": torch.ones(2)}, 0.4, ValueError, r"temperature must be one floating-point number, got .*\(2,\)"),
        ({}, 1.5, ValueError, r"distillation must lie in \[0, 1\], got 1.5"),
        ({}, math.nan, ValueError, r"distillation must lie in \[0, 1\], got nan"),
        ({}, torch.tensor(0.4), TypeError, r"distillation must be a number, got a tensor: pass distillation.item\(\)"),
    ]
    none = {"keys": k[:0], "key_groups": h[:0], "queue": k[:0], "queue_groups": h[:0]}
    wrong.append((none, 0.4, ValueError, "there must be a key: keys and queue are both empty"))
    flat = {name: getattr(case, name)[:, :0] for name in ("queries", "keys", "teacher", "queue")}
    wrong.append((flat, 0.4, ValueError, "features must have a width"))
    if DEVICE == "cpu":  # where a look costs nothing
        wrong.append(({"tau": torch.tensor(0.0)}, 0.4, ValueError, "temperature must be above 0, got 0.0: clamp it"))
    for fields, alpha, error, told in wrong:
        with pytest.raises(error, match=told) as raised:
            replace(case, **fields).loss(alpha)
        assert "\n" not in str(raised.value)
    with pytest.raises(ValueError, match="unknown implementation 'magic'"):
        case.loss(0.4, "magic")
    with pytest.raises(ValueError, match=r"takes float32, float16 and bfloat16, not torch.float64"):
        case.double().loss(0.4, "triton")
    assert replace(case, tau=torch.tensor([math.nan])).loss(0.4).isnan().all()  # a step that is skipped, not an error
    assert len(g) == 2


def test_what_runs_where(monkeypatch: pytest.MonkeyPatch) -> None:
    choose, cpu, gpu = dispatch.choose, torch.device("cpu"), torch.device("cuda")
    assert choose(None, cpu, torch.float32) == choose(None, gpu, torch.float64) == "blockwise"
    assert {choose(None, gpu, dtype) for dtype in DTYPES[:3]} == {"triton"}
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ValueError, match="needs a CUDA or ROCm device, but queries is on cpu"):
        choose("triton", cpu, torch.float32)
    monkeypatch.setattr(dispatch, "HAS_TRITON", False)
    with pytest.warns(UserWarning, match="plain PyTorch on this GPU because triton is not installed"):
        assert choose(None, gpu, torch.float32) == "blockwise"
    with pytest.raises(ValueError, match="needs the package triton"):
        choose("triton", gpu, torch.float32)
