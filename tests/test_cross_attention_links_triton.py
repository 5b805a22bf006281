"""Triton's kernels with a link mask against float64 and autograd: on a GPU, else in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import interpreter_bf16
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

from crossmask.kernels.cross_attention import reference
from crossmask.kernels.cross_attention.request import Forward, Gradients, Masks, Request
from crossmask.kernels.cross_attention.triton import configs, launch, launch_backward, launch_forward
from crossmask.kernels.cross_attention.triton.configs import Config

# exp2 of a masked key's or an uncounted query's logit may overflow; it is put aside afterwards
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    """Every torch.empty is full of NaN."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


FORWARD: dict[str, dict[str, Any]] = {
    "single": {"single": Config(16, 128)},
    "single, all queries": {"single": Config(128, 128)},
    "single, transposed": {"single": Config(32, 128, transposed=True)},
    "online, all queries": {"online": Config(128, 32)},
    "online": {"online": Config(32, 32)},
    "online, transposed": {"online": Config(32, 64, transposed=True)},
    "long queries": {"online": Config(32, 32), "partials": 1},
    "long queries, transposed": {"online": Config(16, 64, transposed=True), "partials": 1},
}


def run_forward(
    monkeypatch: pytest.MonkeyPatch,
    x: list[Tensor],
    masks: Masks,
    request: Request,
    single: Config | None = None,
    online: Config | None = None,
    partials: int = 16,
) -> Forward:
    tiles = dict.fromkeys(("forward_online", "column_lse", "key_statistics"), online or Config(32, 32))
    monkeypatch.setattr(launch_forward, "MOST_PARTIALS", partials)
    emulated = DEVICE == "cpu" and x[0].dtype == torch.bfloat16
    forced = configs.assuming(None, {"forward_single": single, **tiles})
    with forced, interpreter_bf16.repaired() if emulated else nullcontext():
        return launch_forward.forward(*x, masks, SEED, request)


def assert_exact(found: Forward, x: list[Tensor], masks: Masks, request: Request) -> None:
    """At most twice plain PyTorch's error against float64, and a few roundings."""
    wanted = read_columns(reference.forward(*(y.double() for y in x), masks, SEED, request), masks)
    plain = read_columns(reference.forward(*x, masks, SEED, request), masks)
    for name, mine, want, other in zip(Forward._fields, read_columns(found, masks), wanted, plain, strict=True):
        largest = max(1.0, float(want.masked_fill(want.isinf(), 0.0).abs().max()))
        floor = 2e-6 if name != "output" else 2e-6 + torch.finfo(mine.dtype).eps
        assert apart(mine, want) <= 2 * apart(other, want) + floor * largest, name


@pytest.mark.parametrize("variant", FORWARD)
@pytest.mark.parametrize("shared", [False, True])
def test_triton_forward(monkeypatch: pytest.MonkeyPatch, shared: bool, variant: str) -> None:
    H = 1 if shared else 2
    x, masks = inputs(3, H, 40, 70, dtype=torch.float32), some_masks(3, H, 40, 70, shared, others=not shared)
    request = everything(dropout_p=0.1, per_head=shared, normalise=not shared)
    assert_exact(run_forward(monkeypatch, x, masks, request, **FORWARD[variant]), x, masks, request)


def test_triton_forward_agrees_bitwise_with_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    x, masks = inputs(1, 2, 40, 50, dtype=torch.float32), some_masks(1, 2, 40, 50)
    found, again = (run_forward(monkeypatch, x, masks, everything(dropout_p=0.1)) for _ in range(2))
    assert all(torch.equal(y, z) for y, z in zip(found, again, strict=True))


@pytest.mark.parametrize(("S", "P"), [(1, 1), (30, 77), (77, 1), (1, 577), (197, 30), (257, 77), (577, 30), (30, 197)])
@pytest.mark.parametrize("transposed", [False, True])
def test_triton_forward_at_every_length(monkeypatch: pytest.MonkeyPatch, transposed: bool, S: int, P: int) -> None:
    x, masks, tile = inputs(1, 1, S, P, dtype=torch.float32), some_masks(1, 1, S, P), Config(64, 128, 4, 2, transposed)
    found = run_forward(monkeypatch, x, masks, everything(), tile, tile)
    assert_exact(found, x, masks, everything())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("single", [Config(32, 64), None], ids=["single", "online"])
def test_triton_forward_in_half_precision(
    monkeypatch: pytest.MonkeyPatch, single: Config | None, dtype: torch.dtype
) -> None:
    x, masks = inputs(1, 2, 40, 50, dtype=dtype), some_masks(1, 2, 40, 50)
    assert_exact(run_forward(monkeypatch, x, masks, everything(), single, partials=1), x, masks, everything())


DESIGNS = ("fused", "parts", "split")


def run_backward(
    monkeypatch: pytest.MonkeyPatch,
    design: str,
    transposed: bool,
    gradients: dict[str, Tensor],
    x: list[Tensor],
    masks: Masks,
    request: Request,
) -> tuple[Tensor, ...]:
    tile = Config(32, 32, transposed=transposed)
    turned = replace(tile, transposed=not transposed)
    tiles: dict[str, Config | None] = {
        "backward_rows": turned,
        "backward_columns": tile,
        "backward_fused": None if design == "split" else tile,
        "backward_queries": tile,
        "backward_keys": turned,
    }
    splits = {"fused": 1, "parts": 4}.get(design, 1)
    monkeypatch.setattr(launch_backward, "_splits", lambda blocks, heads, device: min(blocks, splits))
    wanted = reference.forward(*(y.double() for y in x), masks, SEED, request)
    found = Forward(wanted.output.to(x[0].dtype), *(y if y is None else y.float() for y in wanted[1:]))
    with configs.assuming(None, tiles):
        return launch_backward.backward(Gradients(**gradients), *x, found, masks, SEED, request)


@pytest.mark.parametrize(("shared", "others"), [(False, True), (True, True), (False, False)])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("design", DESIGNS)
def test_triton_backward(
    monkeypatch: pytest.MonkeyPatch, design: str, transposed: bool, shared: bool, others: bool
) -> None:
    S, P = (50, 40) if design == "split" else (30, 70)
    H = 1 if shared else 2
    x, masks = inputs(3, H, S, P, dtype=torch.float32), some_masks(3, H, S, P, shared, others)
    request = everything(dropout_p=0.2, per_head=shared, normalise=others)
    gradients = random_gradients(reference.forward(*x, masks, SEED, request), request)
    mine = run_backward(monkeypatch, design, transposed, gradients, x, masks, request)
    exact = wanted_gradients(gradients, x, masks, request)
    plain = wanted_gradients(gradients, x, masks, request, torch.float32)
    for got, want, other in zip(mine, exact, plain, strict=True):
        largest = float(want.abs().max())
        assert apart(got, want) <= 2 * apart(other, want) + 4e-6 * largest


@pytest.mark.parametrize("design", DESIGNS)
def test_rows_and_columns_without_links_pass_no_gradient(monkeypatch: pytest.MonkeyPatch, design: str) -> None:
    """Not even a gradient that is infinite or very large, as an entropy's multiplied with a masked logit would be."""
    x, masks = inputs(2, 2, 30, 40, dtype=torch.float32), some_masks(2, 2, 30, 40, others=False)
    gradients = random_gradients(reference.forward(*x, masks, SEED, everything()), everything())
    gradients["lse"][0, :, 0], gradients["entropy"][0, :, 0] = torch.inf, 1e38
    gradients["entropy"][1] *= 1e10
    dq, dk, dv = found = run_backward(monkeypatch, design, False, gradients, x, masks, everything())
    again = run_backward(monkeypatch, design, False, gradients, x, masks, everything())
    for gradient, twice in zip(found, again, strict=True):
        assert torch.isfinite(gradient).all()
        assert torch.equal(gradient, twice)
    assert (dq[0, :, 0] == 0).all()
    assert (dk[0, :, -1] == 0).all()
    assert (dv[0, :, -1] == 0).all()


def test_what_has_no_link_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits of several hundred, which overflow an exponential, where there is no link."""
    q, k, v = inputs(1, 2, 20, 40, dtype=torch.float32)
    link = links(1, 20, 40)
    link[:, 10:, :20] = False
    louder = k.clone()
    louder[:, :, :20], loud = 0.0, k.clone()
    loud[:, :, :20] = 90.0
    q[:, :, :10, 0], q[:, :, 10:] = 0.0, q[:, :, 10:].abs()
    masks = Masks(link=link, query=(torch.arange(20) >= 10)[None].to(DEVICE))
    for variant in FORWARD.values():
        found, again = (run_forward(monkeypatch, [q, key, v], masks, everything(), **variant) for key in (louder, loud))
        for name in ("key_attention", "query_attention", "key_max"):
            assert torch.equal(getattr(found, name), getattr(again, name)), name
        for name in ("output", "lse", "max_probability", "entropy"):
            assert torch.equal(getattr(found, name)[:, :, 10:], getattr(again, name)[:, :, 10:]), name


def test_links_are_read_as_they_lie_or_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels read 16 at a time: rows that do not begin at multiples of 16 bytes are copied."""
    x, wide = inputs(2, 2, 17, 40, dtype=torch.float32), links(2, 34, 80)
    cut_off = torch.as_strided(links(1, 1, 2560)[0, 0, 856:], (2, 17, 40), (0, 48, 1))
    for layout, link, same in (
        ("a slice", wide[:, :17, 16:56], True),
        ("rows of 40", links(2, 18, 40)[:, :17], False),
        ("a slice that begins anywhere", wide[:, :17, 3:43], False),
        ("every other row", wide[:, ::2, :40], True),
        ("every other key", wide[:, :17, ::2], False),
        ("the last row cut off", cut_off, False),
        ("shared by samples", wide[:1, :17, :40].expand(2, -1, -1), True),
        ("shared by queries", wide[:, :1, :40].expand(-1, 17, -1), False),
        ("turned", links(2, 40, 17).mT, False),
    ):
        assert (launch.masks_of(Masks(link=link), x[0])["LinkMask"].data_ptr() == link.data_ptr()) == same, layout
        for variant in ("single", "online"):
            found = run_forward(monkeypatch, x, Masks(link=link), everything(), **FORWARD[variant])
            assert_exact(found, x, Masks(link=link), everything())
