"""Words without padding: the same outputs and gradients as with it, and fewer multiplications."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from crossmask.engine.models import VisionLanguageModel
from crossmask.engine.models.packing import Packing
from crossmask.engine.recipe import ModelSection

LENGTH = 7
MASK = torch.arange(LENGTH) < torch.tensor([[7], [3], [1], [5]])


def build(norm: str = "post", dropout: float = 0.0) -> VisionLanguageModel:
    torch.manual_seed(1)
    section = ModelSection.model_validate(
        {
            "image": {"size": 16, "patch_size": 8, "width": 16, "depth": 1, "heads": 2},
            "text": {"width": 24, "depth": 2, "heads": 2, "mlp_ratio": 2.0, "dropout": dropout},
            "fusion": {"depth": 2, "heads": 3, "mlp_ratio": 2.0, "dropout": dropout, "norm": norm},
            "projection_width": 8,
        }
    )
    return VisionLanguageModel(section, 40, LENGTH).eval()


def test_pack_and_pad_are_each_others_inverse() -> None:
    packing = Packing.of(MASK)
    assert packing is not None
    x = torch.randn(4, LENGTH, 3, 2)
    packed = packing.pack(x)
    assert torch.equal(packed, x[MASK])
    assert torch.equal(packing.pad(packed), x * MASK[..., None, None])
    leaf = packed.clone().requires_grad_()
    weight = torch.randn_like(x)
    (packing.pad(leaf) * weight).sum().backward()
    assert torch.equal(leaf.grad, weight[MASK])


def test_a_batch_without_padding_runs_the_same_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under ZeRO stage 3 all ranks have to, and one may have padding where another has none."""
    model = build()
    ids, image = torch.randint(5, 40, (4, LENGTH)), torch.randn(4, 5, 16)
    seen: list[str] = []
    for name, module in model.named_modules():
        module.register_forward_pre_hook(lambda _, inputs, name=name: seen.append(name))
    runs = []
    for mask in (MASK, torch.ones_like(MASK)):
        seen.clear()
        model.fuse(model.encode_text(ids, mask).tokens, mask, model.project_image(image))
        runs.append(list(seen))
    assert runs[0] == runs[1]


def test_other_devices_keep_the_padding() -> None:
    assert Packing.of(MASK.to("meta")) is None


def gradients(model: VisionLanguageModel, ids: Tensor, image: Tensor, links: Tensor | None) -> list[Tensor]:
    """Text tower and fusion, and the gradients of a random function of their words."""
    text = model.encode_text(ids, MASK, links=links)
    keys = model.project_image(image)
    fused = model.fuse(text.tokens, MASK, keys, links=links)
    two = [(k[:2], v[:2]) for k, v in keys]
    shared = model.fuse(text.tokens, MASK, two, links=links, image_index=(None, torch.tensor([1, 0])))
    rows = model.fuse(text.tokens, MASK, keys, links=links, rows=torch.tensor([[0, 6], [2, 1], [0, 0], [4, 4]]))
    outputs = [x.tokens * MASK[..., None] for x in (text, fused, shared)] + [text.feature, rows.tokens]
    torch.manual_seed(2)
    loss = sum((x * torch.randn_like(x)).sum() for x in outputs)
    wanted = [p for name, p in model.named_parameters() if name.startswith(("text.", "fusion."))]
    return [x.detach() for x in outputs] + list(torch.autograd.grad(loss, wanted))


@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize("linked", [False, True])
def test_same_outputs_and_gradients(norm: str, linked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(norm)
    ids, image = torch.randint(5, 40, (4, LENGTH)), torch.randn(4, 5, 16)
    links = torch.rand(4, LENGTH, LENGTH) < 0.5 if linked else None
    packed = gradients(model, ids, image, links)
    monkeypatch.setattr(Packing, "of", lambda mask: None)
    padded = gradients(model, ids, image, links)
    for number, (mine, theirs) in enumerate(zip(packed, padded, strict=True)):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=2e-5, msg=lambda text, n=number: f"{n}: {text}")


def test_linear_layers_compute_words_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build()
    ids, image = torch.randint(5, 40, (4, LENGTH)), torch.randn(4, 5, 16)
    keys = model.project_image(image)

    def linear_cost() -> int:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model.fuse(model.encode_text(ids, MASK).tokens, MASK, keys)
        return sum(n for op, n in counter.get_flop_counts()["Global"].items() if op in (mm, addmm))

    mm, addmm = torch.ops.aten.mm, torch.ops.aten.addmm
    packed = linear_cost()
    monkeypatch.setattr(Packing, "of", lambda mask: None)
    assert packed / linear_cost() == pytest.approx(float(MASK.float().mean()), rel=0.02)


def test_words_drop_their_attention_in_training(monkeypatch: pytest.MonkeyPatch) -> None:
    from crossmask.engine.models import text

    asked = []
    attend = text.cross_attention
    monkeypatch.setattr(
        text, "cross_attention", lambda *given, **named: asked.append(named["dropout_p"]) or attend(*given, **named)
    )
    model, ids = build(dropout=0.25), torch.randint(5, 40, (4, LENGTH))
    model.encode_text(ids, MASK)
    model.train().encode_text(ids, MASK)
    assert asked == [0.0, 0.0, 0.25, 0.25]
