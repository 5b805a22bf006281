"""The Triton backward of cross-attention against float64 autograd: every gradient, tile, mask and layout.

On a machine without a GPU the kernels run in Triton's interpreter.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from crossmask.kernels import launch
from crossmask.kernels.cross_attention import dropout
from crossmask.kernels.cross_attention.request import Forward, Gradients, Masks, Request
from crossmask.kernels.cross_attention.triton import configs, launch_backward
from crossmask.kernels.cross_attention.triton.configs import Config

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LENGTHS = (1, 30, 77, 197, 257, 577)
STATISTICS = ("lse", "max_probability", "entropy", "key_attention", "query_attention")
FLOOR = {torch.float32: 1e-6, torch.float16: 5e-4}  # relative to the largest entry: 8 and 1/2 units in the last place
DESIGNS = ("fused", "parts", "split")


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    """Memory that torch.empty hands out is NaN, so an entry that no kernel writes is seen."""
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = filled


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    masks: Masks,
    request: Request,
    kept: Tensor | None = None,
    top: Tensor | None = None,
) -> dict[str, Tensor]:
    """Everything the backward has a gradient for, in the dtype of ``q``; ``top`` fixes where the maxima are."""
    (B, H, S, _), P = q.shape, k.shape[2]
    lowest = torch.finfo(q.dtype).min
    keys = torch.ones(B, P, dtype=torch.bool, device=q.device) if masks.key is None else masks.key
    queries = torch.ones(B, S, dtype=torch.bool, device=q.device) if masks.query is None else masks.query
    heads = torch.ones(B, H, dtype=torch.bool, device=q.device) if masks.head is None else masks.head
    allowed = keys[:, None, None, :] & heads[:, :, None, None]  # (B, H, 1, P)
    w = queries[:, None, :, None]  # (B, 1, S, 1)
    s = request.scale * (q @ k.transpose(-1, -2))
    filled = s.masked_fill(~allowed, lowest)
    lse = torch.logsumexp(filled, -1)
    p = torch.softmax(filled, -1) * allowed
    top = filled.argmax(-1, keepdim=True) if top is None else top
    z = 1.0 if kept is None else kept.to(q.dtype) / (1 - request.dropout_p)
    t = s.masked_fill(~w, lowest)
    r = torch.softmax(t, 2) * (w & allowed)
    over = (2,) if request.per_head else (1, 2)
    on = 1 if request.per_head else heads.sum(1, keepdim=True)
    query_count, key_count = (
        (x.sum(1, keepdim=True) * on).clamp(min=1)[(slice(None), None) if request.per_head else ()]
        for x in (queries, keys)
    )
    return {
        "output": (p * z) @ v,
        "lse": lse.masked_fill(~allowed.any(-1), 0.0),  # of rows that attend to something
        "max_probability": p.gather(-1, top)[..., 0],
        "entropy": (p * (lse[..., None] - s)).sum(-1),
        "key_attention": (p * w).sum(over) / query_count,
        "query_attention": r.sum((3,) if request.per_head else (1, 3)) / key_count,
        "column_lse": torch.logsumexp(t, 2).masked_fill(~queries.any(1)[:, None, None], -torch.inf),
        "top": top,
    }


def masks_for(B: int, H: int, S: int, P: int, which: str = "kqh") -> Masks:
    """Random masks, with a key, a query and a head that count in every sample."""
    made = {}
    for name, length in {"k": P, "q": S, "h": H}.items():
        mask = torch.rand(B, length, device=DEVICE) > 0.3
        mask[:, -1] = True
        made[name] = mask if name in which else None
    return Masks(made["k"], made["q"], made["h"])


class Case:
    """One call with random inputs, its gradients in float64 and in plain PyTorch, and the backward's."""

    def __init__(
        self,
        S: int,
        P: int,
        D: int = 16,
        B: int = 2,
        H: int = 2,
        statistics: tuple[str, ...] = STATISTICS,
        masks: str = "kqh",
        dropout_p: float = 0.0,
        per_head: bool = False,
        dtype: torch.dtype = torch.float32,
        rounded: bool = False,
    ) -> None:
        flags = {name: True for name in statistics if name != "lse"}
        self.request = Request(scale=D**-0.5, dropout_p=dropout_p, per_head=per_head, **flags)
        self.masks = masks_for(B, H, S, P, masks)
        self.q, self.k, self.v = (torch.randn(B, H, n, D, device=DEVICE).to(dtype) for n in (S, P, P))
        if rounded:  # few different products: ties
            self.q, self.k = self.q.round(), self.k.round()
        self.seed = torch.tensor([1234567890123], device=DEVICE)
        self.kept = None
        if dropout_p:
            heads, rows = torch.arange(B * H, device=DEVICE), torch.arange(S, device=DEVICE)
            self.kept = dropout.keep(self.seed, dropout_p, heads, rows, P).view(B, H, S, P)
        means = {
            "key_attention": (B, H, P)[:: 1 if per_head else 2],
            "query_attention": (B, H, S)[:: 1 if per_head else 2],
        }
        shapes = {"lse": (B, H, S), "max_probability": (B, H, S), "entropy": (B, H, S), **means}
        size = {"key_attention": H * S, "query_attention": H * P}  # what makes c and u as large as dO·v
        self.gradients = Gradients(
            torch.randn(B, H, S, D, device=DEVICE).to(dtype),
            **{name: torch.randn(shapes[name], device=DEVICE) * size.get(name, 1) for name in statistics},
        )

    def plain(self, dtype: torch.dtype, top: Tensor | None = None) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
        """dq, dk, dv by autograd in ``dtype``, and what the forward found."""
        q, k, v = (x.detach().to(dtype).requires_grad_() for x in (self.q, self.k, self.v))
        found = attention(q, k, v, self.masks, self.request, self.kept, top)
        given = {name: x for name, x in self.gradients._asdict().items() if x is not None}
        loss = sum((found[name] * x.to(dtype)).sum() for name, x in given.items())
        assert isinstance(loss, Tensor)
        return torch.autograd.grad(loss, (q, k, v)), {name: x.detach() for name, x in found.items()}

    def forward(self, found: dict[str, Tensor]) -> Forward:
        """What a forward hands over: no statistic that the request does not name."""
        dead = torch.zeros_like(found["lse"], dtype=torch.bool)
        if self.masks.key is not None:
            dead |= ~self.masks.key.any(1)[:, None, None]
        if self.masks.head is not None:
            dead |= ~self.masks.head[:, :, None]
        asked = {n: found[n].float() for n in STATISTICS[1:] if getattr(self.request, n)}
        if self.request.query_attention:
            asked["column_lse"] = found["column_lse"].float()
        output = torch.empty_like(self.q).copy_(found["output"])
        return Forward(output, found["lse"].masked_fill(dead, -torch.inf).float(), **asked)

    def run(self, tiles: dict[str, Config | None], found: dict[str, Tensor]) -> tuple[Tensor, ...]:
        seed = self.seed if self.request.dropout_p else None
        with configs.assuming(None, tiles):
            return launch_backward.backward(
                self.gradients, self.q, self.k, self.v, self.forward(found), self.masks, seed, self.request
            )

    def check(self, tiles: dict[str, Config | None], floor: float = 0.0) -> None:
        """Errors relative to the largest entry: at most twice those of plain PyTorch in the same dtype, and a floor."""
        exact, found = self.plain(torch.float64)
        plain, _ = self.plain(self.q.dtype, found["top"])
        inputs = (self.q, self.k, self.v)
        for name, x, got, want, other in zip("qkv", inputs, self.run(tiles, found), exact, plain, strict=True):
            like = torch.empty_like(x)
            assert (got.shape, got.stride(), got.dtype) == (like.shape, like.stride(), like.dtype)
            size = want.abs().max().item() or 1.0
            error, allowed = (((y.double() - want).abs().max() / size).item() for y in (got, other))
            assert error <= 2 * allowed + max(floor, FLOOR[x.dtype]), (
                f"d{name}: {error:.2e}, plain PyTorch {allowed:.2e}"
            )


def tiling(design: str, block_s: int = 16, block_p: int = 32, transposed: bool = False) -> dict[str, Config | None]:
    """Tiles for every kernel. The three that follow each other get different ones, as in the table."""
    tile = Config(block_s, block_p, transposed=transposed)
    turned = replace(tile, transposed=not transposed)
    return {
        "backward_rows": turned,
        "backward_columns": tile,
        "backward_fused": None if design == "split" else tile,
        "backward_queries": tile,
        "backward_keys": Config(block_p, block_s, transposed=not transposed),
    }


@pytest.fixture
def design(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """ "fused" has a program for each head, "parts" several, "split" no fused kernel."""
    if request.param == "fused":
        monkeypatch.setattr(launch_backward, "_splits", lambda blocks, heads, device: 1)
    elif request.param == "parts":
        monkeypatch.setattr(launch_backward, "_splits", lambda blocks, heads, device: min(blocks, 4))
    return request.param


each_design = pytest.mark.parametrize("design", DESIGNS, indirect=True)
two_designs = pytest.mark.parametrize("design", DESIGNS[1:], indirect=True)


@pytest.mark.parametrize("statistics", [(), *((name,) for name in STATISTICS), STATISTICS], ids="+".join)
@two_designs
def test_each_gradient_alone_and_all_together(design: str, statistics: tuple[str, ...]) -> None:
    Case(30, 77, B=1, statistics=statistics).check(tiling(design, 32 if design == "parts" else 16))


@pytest.mark.parametrize("transposed", [False, True])
@each_design
def test_tiles_of_either_orientation_with_dropout(design: str, transposed: bool) -> None:
    Case(30, 77, dropout_p=0.3).check(tiling(design, 16 if design == "split" else 32, 32, transposed))


@pytest.mark.parametrize("masks", ["", "k", "q", "h"])
@two_designs
def test_masks(design: str, masks: str) -> None:
    Case(17, 40, masks=masks).check(tiling(design, 32))


@two_designs
def test_statistics_of_every_head(design: str) -> None:
    Case(17, 40, per_head=True).check(tiling(design, 32))
    Case(17, 40, per_head=True, masks="").check(tiling(design, 32))


@pytest.mark.parametrize("P", LENGTHS)
@two_designs
def test_key_lengths(design: str, P: int) -> None:
    Case(30, P, B=1, masks="kq").check(tiling(design, 32, 64, transposed=design == "parts"))


@pytest.mark.parametrize("S", LENGTHS)
def test_query_lengths(S: int) -> None:
    Case(S, 30, B=1, masks="kq").check(tiling("split", 64, 32))


def test_query_lengths_in_one_block() -> None:
    for S in (1, 77, 120):
        Case(S, 30, B=1, masks="kq").check(tiling("fused", 16 if S == 1 else 128))


@pytest.mark.parametrize("S", LENGTHS[2:])
def test_both_axes_long(S: int) -> None:
    Case(S, 774 - S, B=1, H=1, masks="kq", dropout_p=0.1).check(tiling("split", 64, 128, transposed=S % 3 == 2))


@pytest.mark.parametrize("D", [1, 24, 80, 256])
@two_designs
def test_widths(design: str, D: int) -> None:
    Case(20, 33, D=D, B=1, dropout_p=0.2).check(tiling(design, 32))


@pytest.mark.parametrize("statistics", [(), STATISTICS], ids=["none", "all"])
@each_design
def test_half_precision(design: str, statistics: tuple[str, ...]) -> None:
    case = Case(30, 77, D=32, statistics=statistics, dropout_p=0.1, dtype=torch.float16)
    case.check(tiling(design, 32, transposed=design == "parts"))


def layouts(case: Case, which: str) -> Case:
    D = case.q.shape[-1]
    if which == "heads inside":  # (B, length, H, D), k and v packed in one
        case.q = case.q.transpose(1, 2).contiguous().transpose(1, 2)
        case.k, case.v = torch.stack([case.k, case.v], 2).permute(0, 3, 2, 1, 4).contiguous().permute(2, 0, 3, 1, 4)
        output = case.gradients.output.transpose(1, 2).contiguous().transpose(1, 2)
        case.gradients = case.gradients._replace(output=output)
    elif which == "expanded":  # keys shared by heads, a gradient of a sum
        case.k, case.v = case.k[:, :1].expand_as(case.k), case.v[:1].expand_as(case.v)
        case.gradients = Gradients(*(x[(slice(1),) * x.dim()].expand_as(x) for x in case.gradients if x is not None))
    elif which == "width outside":
        case.q, case.v = (x.transpose(-1, -2).contiguous().transpose(-1, -2) for x in (case.q, case.v))
        entropy = case.gradients.entropy.transpose(0, 1).contiguous().transpose(0, 1)
        case.gradients = case.gradients._replace(entropy=entropy)
    else:  # every other row and a margin
        case.q, case.k, case.v = (
            torch.nn.functional.pad(x.repeat_interleave(2, 2), (0, 3))[:, :, ::2, :D] for x in (case.q, case.k, case.v)
        )
    return case


@pytest.mark.parametrize("which", ["heads inside", "expanded", "width outside", "sliced"])
@two_designs
def test_strides(design: str, which: str) -> None:
    layouts(Case(17, 40), which).check(tiling(design, 32))


@each_design
def test_rows_that_attend_to_nothing_pass_no_gradient(design: str) -> None:
    case = Case(17, 40, B=3, dropout_p=0.2)
    case.masks.key[0] = False
    case.masks.query[1] = False
    case.masks.head[2, 0] = False
    dead = torch.tensor([[True, True], [False, False], [True, False]], device=DEVICE)
    case.check(tiling(design, 32))
    _, found = case.plain(torch.float64)
    lse = case.gradients.lse.masked_fill(dead[..., None], torch.inf)  # as exp(-lse) has it
    entropy = case.gradients.entropy.masked_fill(dead[..., None], 1e38)
    case.gradients = case.gradients._replace(lse=lse, entropy=entropy)
    for x in case.run(tiling(design, 32), found):
        assert torch.isfinite(x).all()
        assert (x[dead] == 0).all()


@each_design
def test_the_first_of_equal_maxima_takes_the_gradient(design: str) -> None:
    case = Case(17, 77, D=2, statistics=("max_probability",), rounded=True)
    s = (case.q @ case.k.transpose(-1, -2)).masked_fill(~case.masks.key[:, None, None], -torch.inf)
    assert ((s == s.amax(-1, keepdim=True)).sum(-1) > 1).float().mean() > 0.5
    case.check(tiling(design, 32))


@each_design
def test_large_logits(design: str) -> None:
    """Weights from a float32 lse are off by a unit in its last place; those of a softmax in one piece are not."""
    case = Case(17, 40, masks="kq")
    case.q = case.q * 20
    largest = case.request.scale * (case.q @ case.k.transpose(-1, -2)).abs().max().item()
    case.check(tiling(design, 32), floor=4 * torch.finfo(torch.float32).eps * largest)


@each_design
def test_two_runs_agree_bitwise(design: str) -> None:
    case = Case(30, 77, B=1, dropout_p=0.1)
    _, found = case.plain(torch.float64)
    first, second = (case.run(tiling(design, 32), found) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


def launches(case: Case, tiles: dict[str, Config | None]) -> dict[str, dict[str, Any]]:
    _, found = case.plain(torch.float64)
    with launch.recording() as made:
        case.run(tiles, found)
    return {x.kernel.__name__: x.arguments for x in made}


@pytest.mark.parametrize("statistic", [None, *STATISTICS])
def test_only_gradients_that_exist_cost_anything(statistic: str | None) -> None:
    flag = dict(zip(STATISTICS, ("HAS_LSE", "HAS_MAX", "HAS_ENTROPY", "HAS_KEY", "HAS_QUERY"), strict=True))
    case = Case(17, 40, B=1, statistics=() if statistic is None else (statistic,), masks="")
    made = launches(case, tiling("split")) | launches(case, tiling("fused", 32))
    assert ("backward_columns" in made) == (statistic == "query_attention")
    for arguments in made.values():
        on = {name for name, value in arguments.items() if name.startswith("HAS_") and value}
        assert on <= ({flag[statistic]} if statistic else set())
    assert statistic is None or any(made[name].get(flag[statistic]) for name in made)


def test_keys_are_shared_out_only_where_heads_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch_backward, "INTERPRETED", 4)
    few = launches(Case(17, 300, B=1, H=2, statistics=()), tiling("fused", 32))["backward_fused"]
    many = launches(Case(17, 300, B=4, H=2, statistics=()), tiling("fused", 32))["backward_fused"]
    assert (few["splits"], few["split_keys"], few["GradQ"].shape[0]) == (4, 96, 4)  # 10 blocks of 32 keys: 3, 3, 3, 1
    assert (many["splits"], many["GradQ"].dtype) == (1, torch.float32)


def test_a_length_without_a_tile_is_an_error() -> None:
    case = Case(17, 40, statistics=())
    _, found = case.plain(torch.float64)
    with pytest.raises(RuntimeError, match="no tile for backward_rows"):
        case.run({"backward_rows": None}, found)
