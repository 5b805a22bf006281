"""linear: PyTorch's products and gradients, whichever library multiplies."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crossmask.kernels.linear import Linear, api, linear, use_linear

ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


@pytest.fixture(autouse=True)
def _always(monkeypatch: pytest.MonkeyPatch) -> None:
    """On any machine with oneDNN, and for small products too."""
    if not ONEDNN:
        pytest.skip("PyTorch without oneDNN: linear is PyTorch's own everywhere")
    monkeypatch.setattr(api, "applies", lambda: True)
    monkeypatch.setattr(api, "SMALLEST", 1)


def gradients(call: object, *inputs: Tensor | None) -> list[Tensor]:
    leaves = [None if x is None else x.detach().clone().requires_grad_() for x in inputs]
    y = call(*leaves)  # type: ignore[operator]
    torch.manual_seed(1)
    wanted = [x for x in leaves if x is not None]
    return [y.detach(), *torch.autograd.grad(y, wanted, torch.randn_like(y))]


@pytest.mark.parametrize("rows", [(1,), (7,), (3, 5), (2, 257)])
@pytest.mark.parametrize(("width", "out"), [(48, 96), (30, 1), (1, 17)])
@pytest.mark.parametrize("bias", [True, False])
def test_same_numbers_as_in_float64(rows: tuple[int, ...], width: int, out: int, bias: bool) -> None:
    inputs = (torch.randn(*rows, width), torch.randn(out, width), torch.randn(out) if bias else None)
    exact = gradients(F.linear, *(None if x is None else x.double() for x in inputs))
    theirs, ours = gradients(F.linear, *inputs), gradients(linear, *inputs)
    for reference, plain, mine in zip(exact, theirs, ours, strict=True):
        assert mine.dtype is torch.float32
        assert mine.is_contiguous()  # gradients of weights are read flat by optimizers
        assert (mine - reference).abs().max() <= 2 * (plain - reference).abs().max() + 1e-5


def test_strided_inputs() -> None:
    x, w = torch.randn(5, 3, 24).transpose(0, 1), torch.randn(24, 40).t()
    for mine, theirs in zip(gradients(linear, x, w), gradients(F.linear, x, w), strict=True):
        torch.testing.assert_close(mine, theirs)
    torch.testing.assert_close(linear(x[:, ::2], w[::3]), F.linear(x[:, ::2], w[::3]))


def test_only_wanted_gradients_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    products = []
    product = api._product
    monkeypatch.setattr(api, "_product", lambda *given: products.append(1) or product(*given))
    x, w = torch.randn(4, 8), torch.randn(6, 8, requires_grad=True)
    linear(x, w).sum().backward()
    assert len(products) == 2  # the first layer's input wants no gradient
    products.clear()
    with torch.no_grad():
        assert not linear(x, w).requires_grad
    assert len(products) == 1


@pytest.mark.parametrize("case", ["float64", "bfloat16", "autocast", "meta", "elsewhere"])
def test_everything_else_is_pytorch(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api._Linear, "apply", lambda *given: pytest.fail("oneDNN was asked"))
    x, w = torch.randn(4, 8), torch.randn(6, 8)
    if case in ("float64", "bfloat16"):
        x, w = x.to(getattr(torch, case)), w.to(getattr(torch, case))
    if case == "meta":
        x, w = x.to("meta"), w.to("meta")
    if case == "elsewhere":
        monkeypatch.setattr(api, "applies", lambda: False)
    with torch.autocast("cpu", torch.bfloat16, enabled=case == "autocast"):
        found = linear(x, w)
    assert found.shape == (len(x), 6)
    assert found.dtype is (torch.bfloat16 if case == "autocast" else x.dtype)


def test_compiled_code_keeps_pytorchs() -> None:
    module = torch.compile(Linear(8, 6), backend="eager", fullgraph=True)
    x = torch.randn(4, 8)
    torch.testing.assert_close(module(x), F.linear(x, module.weight, module.bias))


def test_use_linear_changes_libraries_layers_and_nothing_else() -> None:
    class Own(nn.Linear):
        pass

    model = nn.Sequential(nn.Linear(8, 6), nn.Sequential(nn.GELU(), nn.Linear(6, 4, bias=False)), Own(4, 4))
    before, x = copy.deepcopy(model), torch.randn(3, 8)
    use_linear(model)
    assert [type(model[0]), type(model[1][1]), type(model[2])] == [Linear, Linear, Own]
    assert list(model.state_dict()) == list(before.state_dict())
    torch.testing.assert_close(model(x), before(x))
    assert repr(model[0]).startswith("Linear(in_features=8")


def test_the_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    api.applies.cache_clear()
    monkeypatch.setenv("CROSSMASK_LINEAR", "torch")
    assert not api.applies()
    assert api.implementation("cpu") == "PyTorch's"
    api.applies.cache_clear()
    monkeypatch.delenv("CROSSMASK_LINEAR")
    monkeypatch.setattr(api, "_vendor", lambda: "GenuineIntel")
    assert not api.applies()
    api.applies.cache_clear()


def test_the_node_does_not_depend_on_the_number_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks differ in it, and at ZeRO stage 2 gradients have to arrive in one order on all of them."""
    monkeypatch.setattr(api, "SMALLEST", 2**10)
    weight, bias = torch.randn(16, 8, requires_grad=True), torch.randn(16, requires_grad=True)
    nodes = {type(linear(torch.randn(rows, 8), weight, bias).grad_fn) for rows in (0, 1, 7, 8, 9, 500)}
    assert len(nodes) == 1
    for rows in (0, 1, 500):
        x = torch.randn(rows, 8)
        for mine, theirs in zip(gradients(linear, x, weight, bias), gradients(F.linear, x, weight, bias), strict=True):
            torch.testing.assert_close(mine, theirs)
