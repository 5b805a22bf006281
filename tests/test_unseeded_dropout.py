"""Dropout of attention weights without a seed: its rate, its mean, its gradient and its generator."""

from __future__ import annotations

import pytest
import torch

from crossmask.engine.models import VisionLanguageModel
from crossmask.engine.models.dropout import Dropout
from crossmask.engine.recipe import FusionSection, ImageTowerSection, ModelSection, TextTowerSection
from crossmask.kernels import cross_attention, unseeded
from crossmask.kernels.unseeded import drop


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_rate_and_scale(p: float, dtype: torch.dtype) -> None:
    x = torch.ones(3, 5, 7, 1999, dtype=dtype)
    y = drop(x, p)
    assert y.dtype is dtype
    rate = float((y == 0).double().mean())
    assert rate == pytest.approx(p, abs=4 * (p * (1 - p) / x.numel()) ** 0.5)
    kept = y[y != 0]
    assert (kept == kept[0]).all()
    assert float(kept[0]) == pytest.approx(1 / (1 - p), rel=1e-2 if dtype is torch.bfloat16 else 1e-3)


def test_every_one_of_the_four_weights_of_a_draw_drops_alike_and_by_itself() -> None:
    gone = (drop(torch.ones(400_000), 0.3) == 0).view(-1, 4).double()
    assert gone.mean(0).sub(0.3).abs().max() < 0.006
    between = torch.corrcoef(gone.T) - torch.eye(4)
    assert between.abs().max() < 0.015


@pytest.mark.parametrize("count", [0, 1, 3, 4, 5])
def test_any_number_of_weights(count: int) -> None:
    assert drop(torch.ones(count), 0.5).shape == (count,)


def test_the_gradient_passes_where_a_weight_was_kept() -> None:
    x = torch.randn(6, 50, requires_grad=True)
    y = drop(x, 0.4)
    weight = torch.randn_like(x)
    (gradient,) = torch.autograd.grad(y, x, weight)
    torch.testing.assert_close(gradient, weight * (y / x).detach())


def test_the_seed_decides() -> None:
    x = torch.ones(1000)
    torch.manual_seed(5)
    first, second = drop(x, 0.5), drop(x, 0.5)
    assert not torch.equal(first, second)
    torch.manual_seed(5)
    assert torch.equal(drop(x, 0.5), first)


def test_attention_without_a_seed_uses_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """And gives on average what it gives without dropout."""
    asked = []
    apply = unseeded._Drop.apply
    monkeypatch.setattr(unseeded._Drop, "apply", lambda *given: asked.append(given[1]) or apply(*given))
    q, k, v = torch.randn(1, 2, 3, 8), torch.randn(1, 2, 40, 8), torch.randn(1, 2, 40, 8)
    mean = cross_attention(*(x.expand(4000, -1, -1, -1) for x in (q, k, v)), dropout_p=0.2).output.mean(0)
    assert asked == [0.2]
    torch.testing.assert_close(mean, cross_attention(q, k, v).output[0], atol=0.03, rtol=0.0)


def test_compiled_code_keeps_pytorchs() -> None:
    run = torch.compile(lambda x: drop(x, 0.5), backend="eager", fullgraph=True)
    y = run(torch.ones(1000))
    assert set(y.unique().tolist()) == {0.0, 2.0}


@pytest.mark.parametrize("training", [True, False])
def test_the_models_dropout(training: bool) -> None:
    """Of every part that drops, the library's layers included."""
    section = ModelSection(
        image=ImageTowerSection(size=16, patch_size=8, width=32, depth=1, heads=2),
        text=TextTowerSection(width=32, depth=1, heads=2, dropout=0.3),
        fusion=FusionSection(depth=1, heads=2, dropout=0.3),
    )
    model = VisionLanguageModel(section, vocabulary_size=50, max_length=6).train(training)
    found = [module for module in model.modules() if isinstance(module, torch.nn.Dropout) and module.p > 0]
    assert len(found) == 5  # the text's embeddings, attention (its weights too) and feed-forward; the fusion layer's
    x = torch.ones(64, 1999)
    for module in found:
        assert type(module) is Dropout
        y = module(x)
        assert torch.equal(y, x) != training
        assert float((y == 0).double().mean()) == pytest.approx(0.3 if training else 0.0, abs=0.01)
