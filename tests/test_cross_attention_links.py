"""Cross-attention with a link mask, and sums instead of means: what they are, against float64 and autograd."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from link_cases import (
    DEVICE,
    SEED,
    apart,
    everything,
    inputs,
    links,
    random_gradients,
    read_columns,
    some_masks,
    wanted_gradients,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from crossmask.kernels import cross_attention, launch
from crossmask.kernels.cross_attention import blocks, blockwise, reference
from crossmask.kernels.cross_attention.request import STATISTICS, Forward, Gradients, Masks, Request, share
from crossmask.kernels.cross_attention.triton import configs, launch_forward

LENGTHS = (1, 30, 77, 197, 257, 577)
# exp2 of a masked key's or an uncounted query's logit may overflow; it is put aside afterwards
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    """Every torch.empty is full of NaN."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


# --- what it means ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", ["reference", "blockwise", "triton"])
def test_by_hand(impl: Any) -> None:
    """Logits (0, 0, 0) and (0, ln 3, ln 3); the first query sees keys 0 and 1, the second 1 alone, the third none."""
    q = torch.tensor([0.0, 1.0, 5.0]).view(1, 1, 3, 1)
    k = torch.log(torch.tensor([1.0, 3.0, 3.0])).view(1, 1, 3, 1)
    v = torch.tensor([7.0, 14.0, 21.0]).view(1, 1, 3, 1)
    link = torch.tensor([[[True, True, False], [False, True, False], [False, False, False]]])
    given = [x.to(DEVICE) for x in (q, k, v)]
    found = cross_attention(*given, link_mask=link.to(DEVICE), scale=1.0, statistics=STATISTICS, impl=impl)
    assert found.output.flatten().tolist() == pytest.approx([10.5, 14, 0])
    s = found.statistics
    assert s.lse.flatten().tolist() == pytest.approx([0.693147, 1.098612, -torch.inf])
    assert s.max_probability.flatten().tolist() == pytest.approx([0.5, 1, 0])
    assert s.entropy.flatten().tolist() == pytest.approx([0.693147, 0, 0])
    assert s.key_attention[0].tolist() == pytest.approx([0.5 / 3, 1.5 / 3, 0])
    assert s.query_attention[0].tolist() == pytest.approx([1.25 / 3, 0.75 / 3, 0])  # (1, 0) + (1/4, 3/4) + nothing
    assert s.key_max[0].tolist() == pytest.approx([0.5, 1, 0])


@pytest.mark.parametrize("impl", ["reference", "blockwise", "sdpa", "eager", "triton"])
def test_a_link_mask_of_whole_columns_is_a_key_mask(impl: Any) -> None:
    q, k, v = inputs(dtype=torch.float32)
    key = torch.rand(3, 40, device=DEVICE) < 0.6
    key[:, 3] = True
    names = () if impl in ("sdpa", "eager") else STATISTICS[:4]
    found = cross_attention(q, k, v, link_mask=key[:, None].expand(3, 17, 40), statistics=names, impl=impl)
    wanted = cross_attention(q, k, v, key, statistics=names, impl=impl)
    torch.testing.assert_close(found.output, wanted.output, rtol=1e-5, atol=1e-5)
    for name in names:
        torch.testing.assert_close(getattr(found.statistics, name), getattr(wanted.statistics, name))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("impl", ["sdpa", "eager", "blockwise", None])
def test_output_alone(impl: Any, shared: bool, dtype: torch.dtype) -> None:
    x, masks = inputs(dtype=dtype), some_masks(3, 2, 17, 40, shared)
    leaves = [value.clone().requires_grad_() for value in x]
    output = cross_attention(*leaves, masks.key, None, masks.head, link_mask=masks.link, scale=0.3, impl=impl).output
    request = Request(0.3)
    wanted = reference.forward(*(value.double() for value in x), masks, None, request).output
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    assert apart(output.detach(), wanted) < tolerance
    assert (output[0, :, 0] == 0).all()
    g = torch.randn_like(output)
    output.backward(g)
    exact = wanted_gradients({"output": g}, x, masks, request)
    for mine, want in zip(leaves, exact, strict=True):
        assert apart(mine.grad, want) < 10 * tolerance * float(want.abs().max())


def test_a_causal_mask_is_that_of_pytorch() -> None:
    q, k, v = inputs(S=40)
    causal = torch.ones(1, 40, 40, dtype=torch.bool, device=DEVICE).tril()
    wanted = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    for impl in ("reference", "blockwise", "sdpa"):
        torch.testing.assert_close(cross_attention(q, k, v, link_mask=causal, impl=impl).output, wanted)


BAD = [
    (r"link_mask must be bool \(2, 5, 7\) or \(1, 5, 7\), got torch.bool \(5, 7\)", torch.ones(5, 7).bool()),
    (r"link_mask must be bool .*, got torch.bool \(2, 2, 5, 7\)", torch.ones(2, 2, 5, 7).bool()),
    (r"link_mask must be bool .*, got torch.bool \(2, 7, 5\)", torch.ones(2, 7, 5).bool()),
    (r"got torch.float32 \(1, 5, 7\): True = linked, so mask.bool\(\)", torch.ones(1, 5, 7)),
    (r"link_mask must be on the device of q, cpu, got meta", torch.ones(2, 5, 7, device="meta").bool()),
]


@pytest.mark.parametrize(("message", "link"), BAD)
def test_errors_name_the_culprit(message: str, link: Tensor) -> None:
    q, k = torch.zeros(2, 2, 5, 8), torch.zeros(2, 2, 7, 8)
    with pytest.raises(ValueError, match=message):
        cross_attention(q, k, k, link_mask=link)
    with pytest.raises(TypeError, match="link_mask must be a bool tensor"):
        cross_attention(q, k, k, link_mask=[[True]])


# --- blockwise --------------------------------------------------------------------------------------------------------

CUTS = {"as_shipped": (blocks.BLOCK, blocks.LARGEST), "heads": (600, 10**9), "few_rows": (48, 48), "rows": (1, 1)}


def check_blockwise(x: list[Tensor], masks: Masks, request: Request, tolerance: float = 1e-12) -> None:
    found = blockwise.forward(*x, masks, SEED, request)
    wanted = reference.forward(*x, masks, SEED, request)
    for name, mine, want in zip(Forward._fields, read_columns(found, masks), read_columns(wanted, masks), strict=True):
        assert apart(mine, want) < tolerance, name
    gradients = random_gradients(wanted, request)
    mine = blockwise.backward(Gradients(**gradients), *x, found, masks, SEED, request)
    for got, want in zip(mine, wanted_gradients(gradients, x, masks, request), strict=True):
        assert apart(got, want) < 10 * tolerance * max(1.0, float(want.abs().max()))


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("others", [False, True])
@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize(("S", "P"), [(5, 18), (18, 5)])
def test_blockwise_in_every_cut(
    monkeypatch: pytest.MonkeyPatch, S: int, P: int, normalise: bool, others: bool, shared: bool, cut: str
) -> None:
    monkeypatch.setattr(blocks, "BLOCK", CUTS[cut][0])
    monkeypatch.setattr(blocks, "LARGEST", CUTS[cut][1])
    request = everything(dropout_p=0.3, per_head=shared, normalise=normalise)
    check_blockwise(inputs(4, 3, S, P, 8), some_masks(4, 3, S, P, shared, others), request)


@pytest.mark.parametrize(("S", "P"), [*((9, n) for n in LENGTHS), *((n, 8) for n in LENGTHS)])
def test_blockwise_at_every_length(S: int, P: int) -> None:
    check_blockwise(inputs(3, 2, S, P, 8), some_masks(3, 2, S, P), everything())


def test_blockwise_where_column_sums_underflow() -> None:
    """Logits hundreds apart: a column may lose its terms to underflow, and one without links has none to lose."""
    x = inputs(2, 2, 17, 40)
    check_blockwise([200 * x[0], *x[1:]], some_masks(2, 2, 17, 40), everything(scale=1.0), tolerance=1e-10)


@pytest.mark.parametrize("name", STATISTICS[:-1])
@pytest.mark.parametrize("impl", ["reference", "blockwise"])
def test_gradients_of_each_statistic(impl: Any, name: str) -> None:
    q, k, v = (x.requires_grad_() for x in inputs(2, 2, 3, 4, 2))
    link = links(2, 3, 4).cpu().to(DEVICE)

    def statistic(q: Tensor, k: Tensor) -> Tensor:
        told = cross_attention(q, k, v, link_mask=link, statistics=(name,), impl=impl, normalise=False).statistics
        found = getattr(told, name)
        return found.masked_fill(found.isinf(), 0.0)

    assert torch.autograd.gradcheck(statistic, (q, k))


@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("impl", ["blockwise", "triton"])
def test_opcheck(impl: str, normalise: bool) -> None:
    q, k, v = (x.requires_grad_() for x in inputs(2, 2, 5, 7, dtype=torch.float32))
    request = (0.25, 0.2, False, normalise, list(STATISTICS), impl)
    masks = (None, None, None, links(2, 5, 7), SEED)
    arguments = (q, k, v, *masks, *request, False)
    torch.library.opcheck(torch.ops.crossmask.cross_attention.default, arguments)


# --- sums instead of means --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("impl", ["reference", "blockwise", "triton"])
def test_sums_are_the_means_times_what_they_are_over(impl: Any, per_head: bool) -> None:
    x, masks = inputs(dtype=torch.float32), some_masks(3, 2, 17, 40)
    names = ("key_attention", "query_attention", "key_max", "entropy")
    sums, means = (
        cross_attention(
            *x, *masks[:3], link_mask=masks.link, statistics=names, per_head=per_head, normalise=normalise, impl=impl
        ).statistics
        for normalise in (False, True)
    )
    assert sums.key_attention is not None
    assert sums.query_attention is not None
    request = everything(per_head=per_head)
    over_queries, over_keys = (share(valid, 1, masks.head, 2, request) for valid in (masks.query, masks.key))
    for found, mean, one in (
        (sums.key_attention, means.key_attention, over_queries),
        (sums.query_attention, means.query_attention, over_keys),
    ):
        torch.testing.assert_close(found * (one[..., None] if per_head else one), mean)
    assert torch.equal(sums.key_max, means.key_max)
    assert torch.equal(sums.entropy, means.entropy)
    assert share(masks.query, 1, masks.head, 2, replace(request, normalise=False)) == 1.0


class Computing(TorchDispatchMode):
    """Names of the operators that launch something: neither views nor allocations."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        view = any(x.alias_info is not None and not x.alias_info.is_write for x in function._schema.returns)
        if not view and not function.__name__.startswith(("empty", "new_empty")):
            self.seen.append(function.__name__)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("statistics", [("key_attention",), ("query_attention",), STATISTICS[1:]], ids="+".join)
@pytest.mark.parametrize("P", [32, 577])
@pytest.mark.parametrize("masked", [False, True])
def test_sums_of_every_head_are_one_launch_and_nothing_else(masked: bool, P: int, statistics: tuple[str, ...]) -> None:
    """So that attention, per-head statistics and ``topk_mask``, which takes the mean over heads, are two launches."""

    def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def count(request: Request) -> tuple[int, list[str]]:
        q, k, v = empty(64, 12, 30, 64), empty(64, 12, P, 64), empty(64, 12, P, 64)
        shapes = {"key": (64, P), "query": (64, 30), "head": (64, 12)}
        if P % 16 == 0:  # else it is copied
            shapes["link"] = (64, 30, P)
        masks = Masks(**{name: empty(*shape, dtype=torch.bool) for name, shape in shapes.items()} if masked else {})
        with configs.assuming("sm_90"), launch.recording() as made, Computing() as computing:
            found = launch_forward.forward(q, k, v, masks, None, request)
        assert all(getattr(found, name).is_contiguous() for name in statistics)
        return len(made), computing.seen

    request = Request(0.125, per_head=True, normalise=False, **dict.fromkeys(statistics, True))
    assert count(request) == (1, [])
    launches, computed = count(replace(request, per_head=False))
    assert launches == 1
    assert computed  # the sum over heads
    assert count(replace(request, normalise=True))[1]
