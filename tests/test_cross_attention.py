"""Cross-attention and its statistics against a derivation in numpy and float64, and against hand-computed numbers."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from crossmask.kernels import cross_attention, philox
from crossmask.kernels.cross_attention import dropout

STATISTICS = ("lse", "max_probability", "entropy", "key_attention", "query_attention", "key_max")
DIFFERENTIABLE = STATISTICS[:-1]
LENGTHS = (1, 30, 77, 197, 257, 577)
TELLING = ("reference", "blockwise")  # give statistics on a CPU; Triton's interpreter has test files of its own
IMPLEMENTATIONS = (*TELLING, "sdpa", "eager")


def oracle(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None = None,
    query_mask: Tensor | None = None,
    head_mask: Tensor | None = None,
    scale: float | None = None,
    per_head: bool = False,
    kept: Tensor | None = None,
    dropout_p: float = 0.0,
) -> dict[str, np.ndarray]:
    """Weights e^(s - max) times the mask, divided by their sum: nothing of the log-sum-exp route of the library."""
    q, k, v = (x.detach().double().numpy() for x in (q, k, v))
    B, H, S, D = q.shape
    P = k.shape[2]
    keys = np.ones((B, P)) if key_mask is None else key_mask.numpy().astype(float)
    queries = np.ones((B, S)) if query_mask is None else query_mask.numpy().astype(float)
    heads = np.ones((B, H)) if head_mask is None else head_mask.numpy().astype(float)
    allowed = keys[:, None, None, :] * heads[:, :, None, None]
    s = np.einsum("bhsd,bhpd->bhsp", q, k) * (1 / math.sqrt(D) if scale is None else scale)
    highest = np.where(allowed > 0, s, -np.inf).max(-1, keepdims=True)
    highest = np.where(np.isfinite(highest), highest, 0)
    weight = np.exp(np.minimum(s - highest, 0)) * allowed
    total = weight.sum(-1, keepdims=True)
    p = np.divide(weight, total, out=np.zeros_like(weight), where=total > 0)
    column = np.exp(s - s.max(2, keepdims=True, initial=-np.inf, where=queries[:, None, :, None] > 0))
    column = np.where(queries[:, None, :, None] > 0, column, 0)
    below = column.sum(2, keepdims=True)
    r = np.divide(column, below, out=np.zeros_like(column), where=below > 0) * allowed
    with np.errstate(divide="ignore"):
        lse = (np.log(total) + highest)[..., 0]
    information = np.where(p > 0, -p * np.log(np.where(p > 0, p, 1)), 0)
    counted = p * queries[:, None, :, None]

    def mean(sums: np.ndarray, valid: np.ndarray) -> np.ndarray:  # sums (B, H, length)
        per = sums / np.maximum(valid.sum(1), 1)[:, None, None]
        return per if per_head else per.sum(1) / np.maximum(heads.sum(1), 1)[:, None]

    z = 1.0 if kept is None else kept.numpy() / (1 - dropout_p)
    return {
        "output": np.einsum("bhsp,bhpd->bhsd", p * z, v),
        "lse": lse,
        "max_probability": p.max(-1),
        "entropy": information.sum(-1),
        "key_attention": mean(counted.sum(2), queries),
        "query_attention": mean(r.sum(3), keys),
        "key_max": counted.max(2) if per_head else counted.max((1, 2)),
    }


def inputs(
    B: int = 2, H: int = 2, S: int = 5, P: int = 7, D: int = 8, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    # Three times a normal: peaked rows, where the mistakes show.
    return (3 * torch.randn(B, H, S, D)).to(dtype), torch.randn(B, H, P, D).to(dtype), torch.randn(B, H, P, D).to(dtype)


def masks(B: int, S: int, P: int) -> tuple[Tensor, Tensor]:
    """Random, at least one position each."""
    key, query = torch.rand(B, P) < 0.7, torch.rand(B, S) < 0.6
    key[:, P // 2], query[:, S // 2] = True, True
    return key, query


def error(found: Tensor, wanted: np.ndarray) -> float:
    assert found.shape == wanted.shape
    value = found.detach().double().numpy()
    with np.errstate(invalid="ignore"):
        apart = np.abs(value - wanted)
    return float(np.where(value == wanted, 0, apart).max())  # -inf is -inf


def assert_close(found: Any, wanted: dict[str, np.ndarray], tolerance: float) -> None:
    assert error(found.output, wanted.pop("output")) < tolerance
    for name, value in wanted.items():
        assert error(getattr(found.statistics, name), value) < tolerance, name


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("P", LENGTHS)
@pytest.mark.parametrize("impl", TELLING)
def test_output_and_statistics_in_float64(impl: Any, P: int, masked: bool) -> None:
    q, k, v = inputs(S=9, P=P, dtype=torch.float64)
    key_mask, query_mask = masks(2, 9, P) if masked else (None, None)
    found = cross_attention(q, k, v, key_mask, query_mask, statistics=STATISTICS, impl=impl)
    assert_close(found, oracle(q, k, v, key_mask, query_mask), 1e-13)


@pytest.mark.parametrize("S", LENGTHS)
@pytest.mark.parametrize("impl", TELLING)
def test_query_lengths(impl: Any, S: int) -> None:
    q, k, v = inputs(S=S, P=30, dtype=torch.float64)
    key_mask, query_mask = masks(2, S, 30)
    found = cross_attention(q, k, v, key_mask, query_mask, scale=0.3, statistics=STATISTICS, impl=impl)
    assert_close(found, oracle(q, k, v, key_mask, query_mask, scale=0.3), 1e-13)


@pytest.mark.parametrize("D", [1, 16, 24, 80, 256])
@pytest.mark.parametrize("impl", TELLING)
def test_widths(impl: Any, D: int) -> None:
    q, k, v = inputs(S=9, P=30, D=D, dtype=torch.float64)
    assert_close(cross_attention(q, k, v, statistics=STATISTICS, impl=impl), oracle(q, k, v), 1e-13)


HEADS_ON = torch.tensor([[True, False, True], [False, False, False], [True, True, True]])


@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("head_mask", [None, HEADS_ON], ids=["all_heads", "some_heads"])
@pytest.mark.parametrize("impl", TELLING)
def test_heads(impl: Any, head_mask: Tensor | None, per_head: bool) -> None:
    q, k, v = inputs(B=3, H=3, dtype=torch.float64)
    key_mask, query_mask = masks(3, 5, 7)
    found = cross_attention(
        q, k, v, key_mask, query_mask, head_mask, statistics=STATISTICS, per_head=per_head, impl=impl
    )
    assert_close(found, oracle(q, k, v, key_mask, query_mask, head_mask, per_head=per_head), 1e-13)


def test_head_that_is_off_is_as_if_it_were_not_there() -> None:
    q, k, v = inputs(B=2, H=3, dtype=torch.float64)
    on = torch.tensor([True, False, True])
    found = cross_attention(q, k, v, head_mask=on, statistics=STATISTICS)
    without = cross_attention(*(x[:, on] for x in (q, k, v)), statistics=STATISTICS)
    torch.testing.assert_close(found.output[:, on], without.output)
    assert (found.output[:, ~on] == 0).all()
    for name in ("key_attention", "query_attention", "key_max"):
        torch.testing.assert_close(getattr(found.statistics, name), getattr(without.statistics, name))
    for impl in ("sdpa", "eager"):
        torch.testing.assert_close(cross_attention(q, k, v, head_mask=on, impl=impl).output, found.output)


@pytest.mark.parametrize("impl", TELLING)
@pytest.mark.parametrize("P", [1, 7, 30])
def test_dropout_drops_weights_of_the_output_alone(impl: Any, P: int) -> None:
    q, k, v = inputs(S=9, P=P, dtype=torch.float64)
    key_mask, _ = masks(2, 9, P)
    seed = torch.tensor([-3])
    kept = dropout.keep(seed, 0.4, torch.arange(4), torch.arange(9), P).view(2, 2, 9, P)
    found = cross_attention(q, k, v, key_mask, dropout_p=0.4, dropout_seed=seed, statistics=STATISTICS, impl=impl)
    assert_close(found, oracle(q, k, v, key_mask, kept=kept, dropout_p=0.4), 1e-13)


def test_dropout_is_the_counter_based_generator_it_says() -> None:
    """Known answers of Philox4x32-7 from Random123's tests, by key and counter."""
    full = 0xFFFFFFFF
    for key, counter, words in (
        (0, (0, 0, 0, 0), "5f6fb709 0d893f64 4f121f81 4f730a48"),
        (-1, (full,) * 4, "5207ddc2 45165e59 4d8ee751 8c52f662"),
        (0x299F31D0A4093822, (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), "4dfccaba 190a87f0 c47362ba b6b5242a"),
    ):
        drawn = philox.philox(torch.tensor([key]), tuple(torch.tensor([c]) for c in counter))
        assert " ".join(f"{int(word):08x}" for word in drawn) == words


def test_dropout_without_a_seed_is_pytorchs_own_on_a_cpu() -> None:
    """Uniform weights and values that are the axes show what was kept; a seed, or statistics, take another way."""
    q, k, v = torch.zeros(2, 2, 100, 8), torch.randn(2, 2, 8, 8), torch.eye(8).expand(2, 2, 8, 8)
    mask = torch.arange(8) < torch.tensor([[8], [6]])
    torch.manual_seed(0)
    found = cross_attention(q, k, v, mask, dropout_p=0.25).output
    torch.manual_seed(0)
    assert torch.equal(cross_attention(q, k, v, mask, dropout_p=0.25, impl="eager").output, found)
    kept = found != 0
    assert not kept[1, :, :, 6:].any()
    for row, keys in ((0, 8), (1, 6)):
        share = found[row][kept[row]]
        torch.testing.assert_close(share, torch.full_like(share, 1 / keys / 0.75))
        assert 0.7 < kept[row, :, :, :keys].float().mean() < 0.8
    seeded = cross_attention(q, k, v, mask, dropout_p=0.25, dropout_seed=3)
    wanted = cross_attention(q, k, v, mask, dropout_p=0.25, dropout_seed=3, impl="blockwise")
    assert torch.equal(seeded.output, wanted.output)
    with pytest.raises(ValueError, match="'eager' has no seeded dropout"):
        cross_attention(q, k, v, dropout_p=0.1, dropout_seed=3, impl="eager")


def test_dropout_seed() -> None:
    q, k, v = inputs(S=30, P=77)
    first, again, other = (
        cross_attention(q, k, v, dropout_p=0.5, dropout_seed=seed).output for seed in (1, torch.tensor([1]), 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    torch.manual_seed(5)
    drawn = cross_attention(q, k, v, dropout_p=0.5).output
    assert not torch.equal(drawn, cross_attention(q, k, v, dropout_p=0.5).output)
    torch.manual_seed(5)
    assert torch.equal(drawn, cross_attention(q, k, v, dropout_p=0.5).output)
    kept = dropout.keep(torch.tensor([1]), 0.3, torch.arange(8), torch.arange(100), 577).float()
    assert abs(float(kept.mean()) - 0.7) < 0.005
    assert float((kept.mean((0, 1)) - 0.7).abs().max()) < 0.1  # no key is favoured
    assert float((kept.mean((0, 2)) - 0.7).abs().max()) < 0.05  # no query is


def test_by_hand() -> None:
    """One head of width 1; logits (0, 0, 0) for the first query and (0, ln 3, ln 3) for the second."""
    q = torch.tensor([0.0, 1.0]).view(1, 1, 2, 1)
    k = torch.tensor([0.0, math.log(3), math.log(3)]).view(1, 1, 3, 1)
    v = torch.tensor([7.0, 14.0, 21.0]).view(1, 1, 3, 1)
    found = cross_attention(q, k, v, scale=1.0, statistics=STATISTICS)
    assert found.output.flatten().tolist() == pytest.approx([14, (7 + 3 * 14 + 3 * 21) / 7])
    s = found.statistics
    assert s.lse.flatten().tolist() == pytest.approx([math.log(3), math.log(7)])
    assert s.max_probability.flatten().tolist() == pytest.approx([1 / 3, 3 / 7])
    assert s.entropy.flatten().tolist() == pytest.approx([math.log(3), math.log(7) - 6 / 7 * math.log(3)])
    assert s.key_attention[0].tolist() == pytest.approx([5 / 21, 8 / 21, 8 / 21])
    assert s.query_attention[0].tolist() == pytest.approx([1 / 3, 2 / 3])  # (1/2 + 1/4 + 1/4) / 3 and its rest
    assert s.key_max[0].tolist() == pytest.approx([1 / 3, 3 / 7, 3 / 7])
    second = cross_attention(q, k, v, scale=1.0, statistics=STATISTICS, query_mask=torch.tensor([[False, True]]))
    assert second.statistics.key_attention[0].tolist() == pytest.approx([1 / 7, 3 / 7, 3 / 7])
    assert second.statistics.query_attention[0].tolist() == pytest.approx([0, 1])
    fewer = cross_attention(q, k, v, scale=1.0, statistics=STATISTICS, key_mask=torch.tensor([[True, True, False]]))
    assert fewer.output.flatten().tolist() == pytest.approx([10.5, (7 + 3 * 14) / 4])
    assert fewer.statistics.query_attention[0].tolist() == pytest.approx([0.375, 0.625])


def test_scale_zero_is_uniform() -> None:
    q, k, v = inputs(P=6, dtype=torch.float64)
    found = cross_attention(q, k, v, scale=0.0, statistics=STATISTICS)
    assert torch.allclose(found.output, v.mean(2, keepdim=True).expand_as(found.output))
    assert torch.allclose(found.statistics.entropy, torch.tensor(math.log(6)).double())
    assert torch.allclose(found.statistics.key_attention, torch.tensor(1 / 6).double())
    assert torch.allclose(found.statistics.query_attention, torch.tensor(1 / 5).double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("P", [30, 197, 577])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_output_is_as_exact_as_plain_pytorch(impl: str, P: int, dtype: torch.dtype) -> None:
    q, k, v = inputs(S=12, P=P, D=16, dtype=dtype)
    key_mask, _ = masks(2, 12, P)
    wanted = oracle(q, k, v, key_mask)["output"]
    plain = (q * 0.25 @ k.transpose(-1, -2)).masked_fill(~key_mask[:, None, None], -torch.inf).softmax(-1) @ v
    found = cross_attention(q, k, v, key_mask, impl=impl).output
    assert found.dtype == dtype
    floor = torch.finfo(dtype).eps * float(np.abs(wanted).max())
    assert error(found, wanted) <= 2 * error(plain, wanted) + floor


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("P", [77, 577])
@pytest.mark.parametrize("impl", TELLING)
def test_statistics_are_float32_and_exact_whatever_the_input(impl: Any, P: int, dtype: torch.dtype) -> None:
    q, k, v = inputs(S=12, P=P, D=16, dtype=dtype)
    key_mask, query_mask = masks(2, 12, P)
    found = cross_attention(q, k, v, key_mask, query_mask, statistics=STATISTICS, impl=impl)
    wanted = oracle(q, k, v, key_mask, query_mask)
    plain = cross_attention(
        q.float(), k.float(), v.float(), key_mask, query_mask, statistics=STATISTICS, impl="reference"
    ).statistics
    for name in STATISTICS:
        value = getattr(found.statistics, name)
        assert value.dtype == torch.float32, name
        assert error(value, wanted[name]) <= 2 * error(getattr(plain, name), wanted[name]) + 2e-6, name
        assert error(value, wanted[name]) <= 1e-5, name  # a bfloat16 softmax would be wrong by 4e-3
    assert found.output.dtype == dtype


def test_weights_sum_to_one_over_keys_and_over_queries() -> None:
    """Padding left in the normaliser would make the mass 0.85 at 197 keys and 0.94 at 577."""
    for P in LENGTHS:
        q, k, v = inputs(S=6, P=P)
        key_mask, query_mask = masks(2, 6, P)
        s = cross_attention(q, k, v, key_mask, query_mask, statistics=STATISTICS).statistics
        one = torch.ones(2)
        torch.testing.assert_close(s.key_attention.sum(1), one, atol=1e-5, rtol=0)
        # Every key's softmax over the valid queries sums to one, and so does its mean over keys and heads.
        torch.testing.assert_close(s.query_attention.sum(1), one, atol=1e-5, rtol=0)
        assert (s.key_attention[~key_mask] == 0).all()
        assert (s.query_attention[~query_mask] == 0).all()


def test_implementations_agree() -> None:
    q, k, v = inputs(S=6, P=30)
    key_mask, _ = masks(2, 6, 30)
    for mask in (None, key_mask):
        reference = cross_attention(q, k, v, mask, impl="reference").output
        for impl in (None, "sdpa", "eager"):
            torch.testing.assert_close(cross_attention(q, k, v, mask, impl=impl).output, reference)
            scaled = cross_attention(q, k, v, mask, scale=0.1, impl=impl).output
            torch.testing.assert_close(scaled, cross_attention(q, k, v, mask, scale=0.1, impl="reference").output)


def test_implementations_agree_in_their_gradients() -> None:
    base = inputs(S=6, P=11, dtype=torch.float64)
    key_mask, _ = masks(2, 6, 11)
    weight = torch.randn(2, 2, 6, 8, dtype=torch.float64)
    gradients = []
    for impl in IMPLEMENTATIONS:
        q, k, v = (x.clone().requires_grad_() for x in base)
        (cross_attention(q, k, v, key_mask, impl=impl).output * weight).sum().backward()
        gradients.append((q.grad, k.grad, v.grad))
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0])


def test_accepts_the_strides_of_a_model() -> None:
    """(B, N, H * D) split into heads is a transposed view."""
    x, y = torch.randn(2, 5, 16), torch.randn(2, 7, 32)
    q = x.unflatten(-1, (2, 8)).transpose(1, 2)
    k, v = (z.unflatten(-1, (2, 8)).transpose(1, 2) for z in y.chunk(2, -1))
    found = cross_attention(q, k, v, statistics=STATISTICS)
    copied = cross_attention(q.contiguous(), k.contiguous(), v.contiguous(), statistics=STATISTICS)
    torch.testing.assert_close(found.output, copied.output)
    torch.testing.assert_close(found.statistics.key_attention, copied.statistics.key_attention)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_sample_without_keys_has_finite_gradients(name: str) -> None:
    """Also where a gradient comes for its own statistics, the log-sum-exp of minus infinity included."""
    q, k, v = (x.requires_grad_() for x in inputs())
    key_mask = torch.tensor([[True] * 7, [False] * 7])
    found = getattr(cross_attention(q, k, v, key_mask, statistics=(name,), impl="blockwise").statistics, name)
    found.backward(torch.ones_like(found))
    for x in (q, k, v):
        assert torch.isfinite(x.grad).all()
        assert (x.grad[1] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_row_without_keys_gives_zeros_and_finite_gradients(impl: str, dtype: torch.dtype) -> None:
    q, k, v = (x.requires_grad_() for x in inputs(dtype=dtype))
    key_mask = torch.tensor([[True] * 7, [False] * 7])
    output = cross_attention(q, k, v, key_mask, impl=impl).output
    assert (output[1] == 0).all()
    alone = cross_attention(q[:1], k[:1], v[:1], impl=impl).output
    torch.testing.assert_close(output[:1], alone)  # the other sample is untouched
    output.float().square().sum().backward()
    for name, x in (("q", q), ("k", k), ("v", v)):
        assert torch.isfinite(x.grad).all(), name
        assert (x.grad[1] == 0).all(), name
        assert (x.grad[0] != 0).any(), name


def test_row_without_keys_in_the_statistics() -> None:
    q, k, v = inputs()
    key_mask = torch.tensor([[True] * 7, [False] * 7])
    s = cross_attention(q, k, v, key_mask, statistics=STATISTICS).statistics
    assert (s.lse[1] == -torch.inf).all()
    for name in STATISTICS[1:]:
        assert (getattr(s, name)[1] == 0).all(), name
    assert (s.key_max[0] > 0).all()
    alone = cross_attention(q[:1], k[:1], v[:1], statistics=STATISTICS).statistics
    for name in STATISTICS:
        torch.testing.assert_close(getattr(s, name)[:1], getattr(alone, name))


def test_query_mask_never_changes_output_or_row_statistics() -> None:
    q, k, v = inputs()
    plain = cross_attention(q, k, v, statistics=STATISTICS)
    for query_mask in (torch.zeros(2, 5, dtype=torch.bool), masks(2, 5, 7)[1]):
        found = cross_attention(q, k, v, query_mask=query_mask, statistics=STATISTICS)
        assert torch.equal(found.output, plain.output)
        for name in ("lse", "max_probability", "entropy"):
            assert torch.equal(getattr(found.statistics, name), getattr(plain.statistics, name)), name
        assert not torch.equal(found.statistics.key_attention, plain.statistics.key_attention)
        for impl in ("sdpa", "eager"):
            masked = cross_attention(q, k, v, query_mask=query_mask, impl=impl).output
            assert torch.equal(masked, cross_attention(q, k, v, impl=impl).output)


def test_no_valid_query_gives_no_attention() -> None:
    q, k, v = inputs()
    s = cross_attention(q, k, v, query_mask=torch.zeros(2, 5, dtype=torch.bool), statistics=STATISTICS).statistics
    assert (s.key_attention == 0).all()
    assert (s.query_attention == 0).all()


def test_masked_keys_and_values_are_never_read() -> None:
    q, k, v = inputs(B=1)
    key_mask = torch.tensor([[True, True, False, True, False, True, True]])
    before = cross_attention(q, k, v, key_mask, statistics=STATISTICS)
    k[:, :, ~key_mask[0]], v[:, :, ~key_mask[0]] = 1e35, -1e35  # what lies in memory that nobody wrote
    after = cross_attention(q, k, v, key_mask, statistics=STATISTICS)
    assert torch.equal(before.output, after.output)
    for name in STATISTICS:
        assert torch.equal(getattr(before.statistics, name), getattr(after.statistics, name)), name


def test_huge_logits_stay_finite() -> None:
    q, k, v = (100 * x for x in inputs())
    found = cross_attention(q, k, v, statistics=STATISTICS)
    assert torch.isfinite(found.output).all()
    for name in STATISTICS:
        assert torch.isfinite(getattr(found.statistics, name)).all(), name
    assert (found.statistics.entropy >= 0).all()


@pytest.mark.parametrize("size", [1, 10, 30])
def test_entropy_is_as_exact_as_plain_pytorch_on_peaked_rows(size: float) -> None:
    """lse - E[s] taken literally cancels: at logits of a few hundred it is wrong by 3e-4 and falls below zero."""
    q, k, v = inputs(B=4, S=16, P=32, D=64)
    found = cross_attention(size * q, k, v, statistics=("entropy",)).statistics.entropy
    wanted = oracle(size * q, k, v)["entropy"]
    p = (size * q @ k.transpose(-1, -2) * 0.125).softmax(-1)
    assert (found >= 0).all()
    assert error(found, wanted) <= 2 * error(-torch.special.xlogy(p, p).sum(-1), wanted) + 2e-6


def test_only_what_was_asked_is_given() -> None:
    q, k, v = inputs()
    s = cross_attention(q, k, v, statistics=("entropy",)).statistics
    assert s.entropy is not None
    assert all(getattr(s, name) is None for name in STATISTICS if name != "entropy")
    assert all(getattr(cross_attention(q, k, v).statistics, name) is None for name in STATISTICS)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_gradient_of_the_output(impl: str) -> None:
    q, k, v = (x.requires_grad_() for x in inputs(B=2, H=1, S=3, P=4, D=2, dtype=torch.float64))
    key_mask = torch.tensor([[True, False, True, True], [True, True, True, True]])
    assert torch.autograd.gradcheck(lambda *x: cross_attention(*x, key_mask=key_mask, impl=impl).output, (q, k, v))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", DIFFERENTIABLE)
@pytest.mark.parametrize("impl", TELLING)
def test_gradients_of_the_statistics(impl: Any, name: str, masked: bool) -> None:
    q, k, v = (x.requires_grad_() for x in inputs(B=2, H=2, S=3, P=4, D=2, dtype=torch.float64))
    key_mask = torch.tensor([[True, False, True, True], [True, True, True, True]]) if masked else None
    query_mask = torch.tensor([[True, True, False], [False, True, True]]) if masked else None

    def statistic(q: Tensor, k: Tensor) -> Tensor:
        return getattr(cross_attention(q, k, v, key_mask, query_mask, statistics=(name,), impl=impl).statistics, name)

    assert torch.autograd.gradcheck(statistic, (q, k))


@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("impl", TELLING)
def test_gradient_of_everything_at_once(impl: Any, per_head: bool) -> None:
    """Masks, a head that is off and dropout included: what the fused backward computes in one go."""
    q, k, v = (x.requires_grad_() for x in inputs(B=2, H=2, S=3, P=4, D=2, dtype=torch.float64))
    key_mask = torch.tensor([[True, False, True, True], [True, True, True, True]])
    query_mask = torch.tensor([[True, True, False], [False, True, True]])
    head_mask = torch.tensor([[True, True], [True, False]])

    def everything(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        found = cross_attention(
            q, k, v, key_mask, query_mask, head_mask,
            dropout_p=0.3, dropout_seed=1, statistics=DIFFERENTIABLE, per_head=per_head, impl=impl,
        )  # fmt: skip
        lse = found.statistics.lse.masked_fill(~head_mask[:, :, None], 0.0)
        return (found.output, lse, *(getattr(found.statistics, name) for name in DIFFERENTIABLE[1:]))

    assert torch.autograd.gradcheck(everything, (q, k, v))


@pytest.mark.parametrize("impl", TELLING)
def test_key_max_carries_no_gradient(impl: Any) -> None:
    q, k, v = (x.requires_grad_() for x in inputs())
    found = cross_attention(q, k, v, statistics=("key_max", "entropy"), impl=impl)
    assert not found.statistics.key_max.requires_grad
    assert found.statistics.entropy.requires_grad


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_gradients_of_the_statistics_are_finite_where_weights_vanish(name: str) -> None:
    """Weights that underflow to zero, and a sample without keys."""
    q, k, v = inputs(B=2)
    q, k = (60 * q).requires_grad_(), k.requires_grad_()
    key_mask = torch.tensor([[True] * 7, [False] * 7])
    found = getattr(cross_attention(q, k, v, key_mask, statistics=(name,)).statistics, name)
    found[:1].sum().backward()
    assert torch.isfinite(q.grad).all()
    assert torch.isfinite(k.grad).all()


BAD: list[tuple[str, dict[str, Any]]] = [
    (r"q, k and v must be \(batch, heads, length, width\)", {"q": torch.zeros(2, 5, 8)}),
    (r"do not fit together", {"v": torch.zeros(2, 2, 6, 8)}),
    (r"do not fit together", {"q": torch.zeros(2, 2, 5, 4)}),
    (r"do not fit together", {"q": torch.zeros(3, 2, 5, 8)}),
    (r"share one floating dtype.*float64", {"q": torch.zeros(2, 2, 5, 8).double()}),
    (r"share one floating dtype", {name: torch.zeros(2, 2, n, 8).int() for name, n in (("q", 5), ("k", 7), ("v", 7))}),
    (r"on one device.*meta", {"k": torch.zeros(2, 2, 7, 8, device="meta")}),
    (r"key_mask must be bool \(2, 7\), got torch.bool \(2, 5\)", {"key_mask": torch.ones(2, 5, dtype=torch.bool)}),
    (r"key_mask must be bool.*float32", {"key_mask": torch.ones(2, 7)}),
    (r"query_mask must be bool \(2, 5\)", {"query_mask": torch.ones(2, 7, dtype=torch.bool)}),
    (r"unknown statistics \['entropie'\]; choose from \['lse'", {"statistics": ("lse", "entropie")}),
    (r"'sdpa' cannot give statistics \['lse'\]; leave impl out", {"statistics": ("lse",), "impl": "sdpa"}),
    (r"'eager' cannot give statistics", {"statistics": ("lse",), "impl": "eager"}),
    (r"'sdpa' has no seeded dropout", {"dropout_p": 0.1, "impl": "sdpa"}),
    (r"unknown implementation 'fast'; choose from \['triton', 'blockwise'", {"impl": "fast"}),
    (
        r"'triton' takes float32, float16 and bfloat16, not torch.float64; use impl='blockwise'",
        {"impl": "triton", **{name: torch.zeros(2, 2, n, 8).double() for name, n in (("q", 5), ("k", 7), ("v", 7))}},
    ),
    (r"must be a collection of names, got the string 'lse': write \('lse',\)", {"statistics": "lse"}),
    (
        r"head_mask must be bool \(2, 2\) or \(2,\), got torch.bool \(3,\)",
        {"head_mask": torch.ones(3, dtype=torch.bool)},
    ),
    (r"key_mask must be on the device of q", {"key_mask": torch.ones(2, 7, dtype=torch.bool, device="meta")}),
    (
        r"width of a head must lie in 1 .. 256, got 320: use more heads",
        {name: torch.zeros(2, 2, n, 320) for name, n in (("q", 5), ("k", 7), ("v", 7))},
    ),
    (r"must be a head, a query and a key", {name: torch.zeros(2, 2, 0, 8) for name in "kv"}),
    (r"must be a head, a query and a key", {name: torch.zeros(2, 0, 7, 8) for name in "qkv"}),
    (r"dropout_p must be a number in \[0, 1\), got 1.0", {"dropout_p": 1.0}),
    (
        r"dropout_seed must be one int64 on cpu, got torch.int32",
        {"dropout_p": 0.1, "dropout_seed": torch.tensor(1).int()},
    ),
]


@pytest.mark.parametrize(("message", "wrong"), BAD)
def test_errors_name_the_culprit(message: str, wrong: dict[str, Any]) -> None:
    given = {"q": torch.zeros(2, 2, 5, 8), "k": torch.zeros(2, 2, 7, 8), "v": torch.zeros(2, 2, 7, 8), **wrong}
    with pytest.raises(ValueError, match=message):
        cross_attention(**given)


@pytest.mark.parametrize(
    ("message", "wrong"),
    [
        ("q must be a tensor, got NoneType", {"q": None}),
        ("k must be a tensor, got ndarray", {"k": np.zeros((2, 2, 7, 8))}),
        ("key_mask must be a bool tensor \\(2, 7\\), got list", {"key_mask": [[True] * 7] * 2}),
        ("scale must be a number, got a tensor: multiply q by a learned scale", {"scale": torch.tensor(0.3)}),
        ("statistics must be a collection of names, got True", {"statistics": True}),
    ],
)
def test_other_types_are_named(message: str, wrong: dict[str, Any]) -> None:
    given = {"q": torch.zeros(2, 2, 5, 8), "k": torch.zeros(2, 2, 7, 8), "v": torch.zeros(2, 2, 7, 8), **wrong}
    with pytest.raises(TypeError, match=message):
        cross_attention(**given)


def test_statistics_may_be_any_collection() -> None:
    q, k, v = inputs()
    for names in (["lse", "entropy"], {"lse", "entropy"}, (n for n in ("entropy", "lse"))):
        told = cross_attention(q, k, v, statistics=names).statistics
        assert told.lse is not None
        assert told.entropy is not None
        assert told.key_max is None


def test_triton_without_a_gpu_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ValueError, match="needs a CUDA or ROCm device, but q is on cpu: use impl='blockwise'"):
        cross_attention(*inputs(), impl="triton")


@pytest.mark.parametrize("impl", [None, *IMPLEMENTATIONS])
@pytest.mark.parametrize("statistics", [(), ("key_attention",)], ids=["output", "statistics"])
@pytest.mark.parametrize("culprit", ["q", "k", "v"])
def test_values_that_are_not_finite_are_named(culprit: str, statistics: tuple[str, ...], impl: Any) -> None:
    if statistics and impl in ("sdpa", "eager"):
        pytest.skip("gives no statistics")
    given = dict(zip("qkv", inputs(), strict=True))
    given[culprit][1, 0, 3, 5] = torch.nan if culprit != "v" else torch.inf
    with pytest.raises(ValueError, match=rf"{culprit} is not finite: (nan|inf) at .* = \[1, 0, 3, 5\], 1 such"):
        cross_attention(**given, statistics=statistics, impl=impl)
    let_through = cross_attention(**given, statistics=statistics, impl=impl, check_finite=False).output
    if culprit != "q" or statistics or impl not in (None, "sdpa"):  # PyTorch's makes zeros of NaN in q
        assert not torch.isfinite(let_through[1, 0]).all()
    assert torch.isfinite(let_through[0]).all()


def test_large_finite_values_are_no_error() -> None:
    """Their sum overflows, they do not."""
    q, k, _ = inputs()
    output = cross_attention(q, k, torch.full_like(k, 1e37), statistics=("lse",)).output
    assert torch.isfinite(output).all()


def test_no_sample_is_no_error() -> None:
    q, k = torch.zeros(0, 2, 5, 8), torch.zeros(0, 2, 7, 8)
    found = cross_attention(q, k, k, statistics=STATISTICS)
    assert found.output.shape == q.shape
    assert found.statistics.key_attention.shape == (0, 7)
