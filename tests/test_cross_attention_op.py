"""Cross-attention as a torch.library op: opcheck, compile, export, autocast, vmap, and an import that asks no GPU."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from crossmask.engine.doctor import ops
from crossmask.kernels import CrossAttentionOutput, cross_attention
from crossmask.kernels.cross_attention import dispatch

STATISTICS = ("lse", "max_probability", "entropy", "key_attention", "query_attention", "key_max")
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
IMPLEMENTATIONS = ("blockwise", "triton")  # the latter in Triton's interpreter where there is no GPU


def inputs(B: int = 2, H: int = 2, S: int = 5, P: int = 7, D: int = 16, **options: Any) -> tuple[Tensor, ...]:
    return tuple(torch.randn(B, H, n, D, device=DEVICE, **options) for n in (S, P, P))


def masks(B: int = 2, H: int = 2, S: int = 5, P: int = 7) -> tuple[Tensor, ...]:
    key, query, head = (torch.rand(B, n, device=DEVICE) < 0.7 for n in (P, S, H))
    key[:, 0], query[:, 0], head[:, 0] = True, True, True
    return key, query, head


def links(B: int = 2, S: int = 5, P: int = 7) -> Tensor:
    """The first query has none in any sample."""
    link = torch.rand(B, S, P, device=DEVICE) < 0.6
    link[:, 0] = False
    return link


@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("statistics", [(), ("entropy",), STATISTICS], ids=len)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_opcheck(impl: str, masked: bool, statistics: tuple[str, ...], per_head: bool) -> None:
    """Schema, autograd registration, fake kernels and AOTAutograd with dynamic shapes, forward and backward."""
    q, k, v = (x.requires_grad_() for x in inputs())
    key_mask, query_mask, head_mask = masks() if masked else (None, None, None)
    seed, dropout_p = (torch.tensor([7], device=DEVICE), 0.2) if masked else (None, 0.0)
    link_mask = links() if masked else None
    request = (0.25, dropout_p, per_head, not masked, list(statistics), impl)
    arguments = (q, k, v, key_mask, query_mask, head_mask, link_mask, seed, *request, False)
    torch.library.opcheck(torch.ops.crossmask.cross_attention.default, arguments)

    output, lse, max_probability, entropy, key, query, _key_max, column = (
        x.detach() for x in torch.ops.crossmask.cross_attention(*arguments)
    )
    gradients = (torch.randn_like(output), *(torch.randn_like(x) if x.numel() else None for x in
                 (lse, max_probability, entropy, key, query)))  # fmt: skip
    torch.library.opcheck(
        torch.ops.crossmask.cross_attention_backward.default,
        (*gradients, q.detach(), k.detach(), v.detach(), output, lse, max_probability, entropy, column,
         key_mask, query_mask, head_mask, link_mask, seed, *request),
        test_utils=("test_schema", "test_faketensor"),
    )  # fmt: skip


class Reader(nn.Module):
    """What a user would compile: projections, attention, and a loss on where it looks."""

    def __init__(self, impl: Any = None, heads: int = 2, width: int = 32) -> None:
        super().__init__()
        self.heads, self.impl = heads, impl
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))

    def forward(self, words: Tensor, patches: Tensor, key_mask: Tensor | None = None) -> tuple[Tensor, ...]:
        q, k, v = (
            project(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for project, x in ((self.query, words), (self.key, patches), (self.value, patches))
        )
        found = cross_attention(q, k, v, key_mask, statistics=STATISTICS, impl=self.impl)
        told = found.statistics
        loss = told.entropy.mean() + told.key_attention.square().sum() + told.query_attention.square().sum()
        return found.output.transpose(1, 2).flatten(2), told.key_max, loss


def everything(reader: Any, words: Tensor, patches: Tensor, key_mask: Tensor | None) -> list[Tensor]:
    words = words.clone().requires_grad_()
    output, key_max, loss = reader(words, patches, key_mask)
    parameters = list(reader.parameters())
    gradients = torch.autograd.grad(output.square().sum() + loss, [words, *parameters])
    return [output, key_max, loss, *gradients]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("impl", [None, "triton", "reference"])
def test_compiles_in_one_graph(impl: Any, masked: bool) -> None:
    reader = Reader(impl).to(DEVICE)
    compiled = torch.compile(reader, fullgraph=True, backend="aot_eager", dynamic=True)
    for B, S, P in ((2, 5, 7), (3, 6, 9)):
        key_mask = masks(B=B, P=P)[0] if masked else None
        data = (torch.randn(B, S, 32, device=DEVICE), torch.randn(B, P, 32, device=DEVICE), key_mask)
        torch.testing.assert_close(everything(compiled, *data), everything(reader, *data))


def test_compiles_with_inductor() -> None:
    reader = Reader().to(DEVICE)
    data = (torch.randn(2, 5, 32, device=DEVICE), torch.randn(2, 7, 32, device=DEVICE), masks()[0])
    compiled = torch.compile(reader, fullgraph=True)
    torch.testing.assert_close(everything(compiled, *data), everything(reader, *data), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("impl", [None, "triton"])
def test_exports(impl: Any, strict: bool) -> None:
    reader = Reader(impl).to(DEVICE).eval()
    batch = torch.export.Dim("batch", min=2, max=64)
    words, patches = torch.randn(4, 5, 32, device=DEVICE), torch.randn(4, 7, 32, device=DEVICE)
    program = torch.export.export(
        reader,
        (words, patches),
        dynamic_shapes=({0: batch}, {0: batch}),
        strict=strict,
    )
    names = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert "crossmask.cross_attention.default" in names
    words, patches = torch.randn(3, 5, 32, device=DEVICE), torch.randn(3, 7, 32, device=DEVICE)
    torch.testing.assert_close(program.module()(words, patches), reader(words, patches))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype: torch.dtype) -> None:
    q, k, v = inputs()
    with torch.autocast(DEVICE, dtype=dtype):
        found = cross_attention(q, k.to(dtype), v, statistics=("entropy",))
        direct = torch.ops.crossmask.cross_attention(
            q, k, v, *(None,) * 5, 0.25, 0.0, False, True, ["entropy"], "triton" if GPU else "blockwise", False
        )
    assert found.output.dtype == direct[0].dtype == dtype
    assert found.statistics.entropy.dtype == torch.float32
    wanted = cross_attention(*(x.to(dtype) for x in (q, k, v)), statistics=("entropy",))
    assert torch.equal(found.output, wanted.output)
    assert torch.equal(direct[0], wanted.output)
    q.requires_grad_()
    with torch.autocast(DEVICE, dtype=dtype):
        cross_attention(q, k, v, statistics=("entropy",)).statistics.entropy.sum().backward()
    assert q.grad.dtype == torch.float32
    with torch.autocast(DEVICE, dtype=dtype):
        double = cross_attention(*(x.detach().double() for x in (q, k, v)), statistics=("entropy",))
    assert double.output.dtype == torch.float64


REFUSED = "none of torch.func's transforms and not in forward mode.*fold a dimension.*use impl='reference'"


def test_transforms_are_refused_and_the_reference_has_them() -> None:
    q, k, v = inputs(B=3)

    def told(q: Tensor, impl: Any = None) -> Tensor:
        return cross_attention(q, k[: len(q)], v[: len(q)], statistics=("entropy",), impl=impl).statistics.entropy

    def total(q: Tensor, impl: Any = None) -> Tensor:
        return told(q, impl).sum()

    one_by_one = torch.vmap(lambda q, impl=None: told(q[None], impl)[0])
    for refused in (
        lambda: one_by_one(q),
        lambda: torch.func.grad(total)(q),
        lambda: torch.func.jvp(told, (q,), (q,)),
        lambda: dual(told, q),
    ):
        with pytest.raises(NotImplementedError, match=REFUSED):
            refused()
    rest = (*(None,) * 5, 0.25, 0.0, False, True, ["lse"], "blockwise", False)
    with pytest.raises(NotImplementedError, match=REFUSED):
        torch.vmap(lambda q: torch.ops.crossmask.cross_attention(q[None], k[:1], v[:1], *rest)[0])(q)
    k, v = k[:1].expand_as(k), v[:1].expand_as(v)
    torch.testing.assert_close(one_by_one(q, impl="reference"), told(q, "reference"))
    assert torch.func.grad(total)(q, "reference").shape == q.shape
    assert float(dual(lambda q: told(q, "reference"), q).abs().max()) > 0
    plain = torch.vmap(lambda q: cross_attention(q[None], k[:1], v[:1], impl="sdpa").output[0])(q)
    assert plain.shape == q.shape


def dual(function: Any, x: Tensor) -> Tensor:
    with torch.autograd.forward_ad.dual_level():
        found = function(torch.autograd.forward_ad.make_dual(x, x))
        return torch.autograd.forward_ad.unpack_dual(found).tangent


def test_second_derivatives_are_refused_and_the_reference_has_them() -> None:
    q, k, v = (x.requires_grad_() for x in inputs())
    for impl in ("blockwise", "reference"):
        output = cross_attention(q, k, v, statistics=("lse",), impl=impl).output
        (first,) = torch.autograd.grad(output.square().sum(), q, create_graph=True)
        if impl == "reference":
            first.sum().backward()
        else:
            with pytest.raises(NotImplementedError, match="no second derivatives; impl='reference' has"):
                first.sum().backward()


def test_gradients_only_where_they_are_needed() -> None:
    q, k, v = inputs()
    k.requires_grad_()
    cross_attention(q, k, v, statistics=("lse",)).output.sum().backward()
    assert k.grad is not None
    assert q.grad is None
    assert v.grad is None
    with torch.no_grad():
        assert not cross_attention(q, k, v, statistics=("lse",)).output.requires_grad


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_layout_follows_q(impl: Any) -> None:
    """Queries split from (B, S, H * D) give an output that merges its heads again without a copy."""
    x = torch.randn(2, 5, 32, device=DEVICE)
    q = x.unflatten(-1, (2, 16)).transpose(1, 2)
    _, k, v = inputs()
    output = cross_attention(q, k, v, statistics=("lse",), impl=impl).output
    assert output.stride() == q.stride()
    assert output.transpose(1, 2).flatten(2).data_ptr() == output.data_ptr()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_no_sample(impl: Any) -> None:
    """Also in a program that was exported from a batch with some: there nothing looks at the size any more."""
    q, k, v = (x[:0].requires_grad_() for x in inputs())
    found = cross_attention(q, k, v, statistics=STATISTICS, impl=impl)
    assert found.statistics.key_attention.shape == (0, 7)
    (found.output.sum() + found.statistics.entropy.sum()).backward()
    assert q.grad.shape == q.shape


def test_results_pass_through_export_and_checkpointing() -> None:
    class Attention(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> CrossAttentionOutput:
            return cross_attention(q, k, v, statistics=("entropy",), dropout_p=0.5)

    q, k, v = inputs()
    exported = torch.export.export(Attention(), (q, k, v)).module()(q, k, v)
    assert isinstance(exported, CrossAttentionOutput)
    assert exported.statistics.entropy.shape == (2, 2, 5)
    q.requires_grad_()
    gradients = []
    for wrap in (False, True):  # a checkpoint restores the generator, so the same weights are dropped again
        torch.manual_seed(3)
        found = checkpoint(Attention(), q, k, v, use_reentrant=False) if wrap else Attention()(q, k, v)
        gradients.append(torch.autograd.grad(found.output.square().sum(), q)[0])
    assert torch.equal(*gradients)


def test_what_runs_where() -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert dispatch.choose(None, cpu, torch.float32, (), 0.0) == "sdpa"
    assert dispatch.choose(None, cpu, torch.float64, (), 0.0) == "sdpa"
    assert dispatch.choose(None, cpu, torch.float32, ("lse",), 0.0) == "blockwise"
    assert dispatch.choose(None, cpu, torch.float32, (), 0.1) == "blockwise"
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        assert dispatch.choose(None, gpu, dtype, (), 0.0) == "triton"
        assert dispatch.choose(None, gpu, dtype, ("entropy",), 0.1) == "triton"
    assert dispatch.choose(None, gpu, torch.float64, ("entropy",), 0.0) == "blockwise"
    assert dispatch.choose("triton", gpu, torch.float16, (), 0.0) == "triton"


def test_gpu_without_triton_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "HAS_TRITON", False)
    gpu = torch.device("cuda")
    with pytest.warns(UserWarning, match="plain PyTorch on this GPU because triton is not installed"):
        assert dispatch.choose(None, gpu, torch.float16, ("lse",), 0.0) == "blockwise"
    with pytest.raises(ValueError, match="needs the package triton: pip install triton"):
        dispatch.choose("triton", gpu, torch.float16, (), 0.0)


def test_doctor_says_what_runs() -> None:
    assert dispatch.implementation("cuda") == "triton"
    assert "with statistics blockwise" in dispatch.implementation("cpu")
    (row,) = [f for f in ops.kernels() if f.what == "cross_attention"]
    assert "sdpa" in row.here
    assert "blockwise on cpu" in row.here


def test_import_and_use_on_a_cpu_ask_no_gpu_for_anything() -> None:
    program = """
import torch
def refuse(*arguments, **options):
    raise AssertionError("a GPU was asked")
for name in ("is_available", "device_count", "_lazy_init", "get_device_capability", "current_device"):
    setattr(torch.cuda, name, refuse)
import sys
from crossmask.kernels import cross_attention
assert "triton" not in sys.modules  # a second of importing that a CPU has no use for
x = torch.randn(1, 1, 4, 16, requires_grad=True)
cross_attention(x, x, x, statistics=("entropy",), dropout_p=0.1).output.sum().backward()
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
