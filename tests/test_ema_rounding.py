"""ema_update_: how a result is rounded to 16 bits, to the nearest and at random."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from crossmask.kernels import ema_update_, native
from crossmask.kernels.ema.op import OP, _reference
from crossmask.kernels.ema.reference import draws, round_stochastically

HALVES = [torch.bfloat16, torch.float16]
needs_native = pytest.mark.skipif(not native.status().loaded, reason=f"no native extension: {native.status().reason}")


def float32_of(bits: Tensor) -> Tensor:
    return bits.to(torch.int32).view(torch.float32)


def every_upper_half(lower: int) -> Tensor:
    """2^16 float32: every upper half of the bits with this lower one."""
    return float32_of((torch.arange(2**16) << 16 | lower).sub(2**32 * (torch.arange(2**16) >= 2**15)))


def spacing(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Between the numbers of a dtype around each x, in float64."""
    digits, least = (8, -133) if dtype == torch.bfloat16 else (11, -24)
    return 2.0 ** (torch.frexp(x.double()).exponent.double() - digits).clamp(min=least)


@needs_native
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("lower", [0, 1, 0x0FFF, 0x1000, 0x1001, 0x2000, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
def test_to_the_nearest_as_pytorch_does(dtype: torch.dtype, lower: int) -> None:
    """Ties, subnormals, overflow, infinities and NaN; for teachers and for copies."""
    values = every_upper_half(lower)
    teacher, copy = torch.zeros_like(values, dtype=dtype), torch.zeros_like(values, dtype=dtype)
    OP([teacher, torch.zeros_like(values)], [values, values], 0.0, [torch.zeros_like(values), copy], None)
    for result in (teacher, copy):
        torch.testing.assert_close(result, values.to(dtype), rtol=0, atol=0, equal_nan=True)
        assert torch.equal(
            result.view(torch.int16)[~values.isnan()], values.to(dtype).view(torch.int16)[~values.isnan()]
        )


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_the_mean_over_all_draws_is_the_value(dtype: torch.dtype) -> None:
    """Exactly, for all 2^16 draws; an fp16 subnormal to within 2^-16 of the spacing."""
    values = [0.1, -0.1, 1.0 + 2.0**-23, 2.0 - 2.0**-23, math.pi * 1000, -3e-3, 2.0**-14, 2.0**-14 * (1 - 2.0**-24)]
    values += [1e-5, -3.3e-6, 5.96e-8, 2e-8, 0.0] + ([1e38, 1e-30, -1e-37, 1e-40] if dtype == torch.bfloat16 else [])
    for value in values:
        x = torch.full((2**16,), value)
        rounded = round_stochastically(x, dtype, torch.arange(2**16, dtype=torch.int32)).double()
        exact = dtype == torch.bfloat16 or abs(value) >= 2.0**-14
        error = (rounded.mean() - x[0].double()).abs().item()
        assert error <= (0.0 if exact else 2.0**-40), value
        assert rounded.unique().numel() <= 2
        assert ((rounded - x.double()).abs() < spacing(x, dtype)).all()


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_what_a_dtype_holds_is_not_moved_and_nothing_finite_becomes_nan(dtype: torch.dtype) -> None:
    held = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    for draw in (0, 1, 0x8000, 0xFFFF):
        kept = round_stochastically(held.float(), dtype, torch.full((2**16,), draw, dtype=torch.int32))
        assert torch.equal(kept.isnan(), held.isnan())
        assert torch.equal(kept.view(torch.int16)[~held.isnan()], held.view(torch.int16)[~held.isnan()])
        for lower in (1, 0x1FFF, 0x8000, 0xFFFF):
            x = every_upper_half(lower)
            rounded = round_stochastically(x, dtype, torch.full((2**16,), draw, dtype=torch.int32))
            assert torch.equal(rounded.isnan(), x.isnan())
            inside = x.abs() < torch.finfo(dtype).max
            step = (rounded.double() - x.double()).abs()[inside]
            assert (step <= spacing(x, dtype)[inside]).all()


@needs_native
@pytest.mark.parametrize("student", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_native_rounds_at_random_as_the_reference_does(dtype: torch.dtype, student: torch.dtype) -> None:
    """Every upper half of a float32, in two tensors at other places of the list."""
    for lower, seed in itertools.product((0, 0x1234, 0xFFFF), (0, -1, 2**62 + 12345)):
        values = every_upper_half(lower).to(student)
        results = []
        for run in (OP, _reference):
            teacher = [torch.zeros(2**16, dtype=dtype) for _ in range(2)]
            run(teacher, [values, values], 0.0, [], torch.tensor([seed]))
            results.append(teacher)
        for native_teacher, plain in zip(*results, strict=True):
            torch.testing.assert_close(native_teacher, plain, rtol=0, atol=0, equal_nan=True)
        if lower == 0x1234 and student == torch.float32:
            assert not torch.equal(results[0][0].nan_to_num(), results[0][1].nan_to_num()), "places draw the same"


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_the_mean_over_many_elements(dtype: torch.dtype) -> None:
    """0.3 of the way between two neighbours: a binomial's mean, by the public function."""
    size, low = 1 << 18, torch.tensor(1.0)
    step = spacing(torch.tensor(1.5), dtype).item()
    teacher = torch.full((size,), 1.0, dtype=dtype)
    ema_update_([teacher], [torch.full((size,), 1.0 + 0.3 * step)], 0.0, rounding="stochastic", seed=11)
    up = (teacher.float() > low).double().mean().item()
    assert set(teacher.float().unique().tolist()) == {1.0, 1.0 + step}
    assert abs(up - 0.3) < 5 * math.sqrt(0.3 * 0.7 / size)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_why_a_slow_teacher_in_16_bits_moves_only_so(dtype: torch.dtype) -> None:
    """β = 0.9999: a student at 2 pulls a teacher at 1 up by 1e-4 a step, below half a spacing."""
    stuck, moving = (torch.full((4096,), 1.0, dtype=dtype) for _ in range(2))
    student, steps = [torch.full((4096,), 2.0, dtype=dtype)], 300
    for step in range(steps):
        ema_update_([stuck], student, 0.9999)
        ema_update_([moving], student, 0.9999, rounding="stochastic", seed=step)
    assert (stuck == 1.0).all()
    expected = 2.0 - 0.9999**steps
    assert abs(moving.double().mean().item() - expected) < 0.1 * (expected - 1.0)


def test_draws_are_uniform_and_do_not_repeat() -> None:
    seed = torch.tensor([3])
    first, second = draws(seed, 0, 1 << 16), draws(seed, 1, 1 << 16)
    for drawn in (first, second):
        counts = torch.bincount(drawn >> 8, minlength=256).double()
        chi_square = ((counts - 256) ** 2 / 256).sum().item()
        assert 140 < chi_square < 390  # 255 degrees of freedom: six standard deviations
    assert (first == second).double().mean() < 1e-3
    assert (first == draws(torch.tensor([4]), 0, 1 << 16)).double().mean() < 1e-3
    assert torch.equal(first[:1001], draws(seed, 0, 1001)), "the draws of an element depend on how many there are"


def update(**options: object) -> Tensor:
    teacher = torch.full((512,), 1.0, dtype=torch.bfloat16)
    ema_update_([teacher], [torch.full((512,), 1.003)], 0.5, rounding="stochastic", **options)  # type: ignore[arg-type]
    return teacher


def test_seeds() -> None:
    assert torch.equal(update(seed=5), update(seed=torch.tensor([5])))
    assert torch.equal(update(seed=-(2**63)), update(seed=torch.tensor([-(2**63)])))
    assert not torch.equal(update(seed=5), update(seed=6))
    torch.manual_seed(0)
    first = update()
    assert not torch.equal(first, update())
    torch.manual_seed(0)
    assert torch.equal(first, update())


def test_float32_teachers_and_copies_are_rounded_to_the_nearest_all_the_same() -> None:
    teacher, student = torch.randn(1000), torch.randn(1000)
    plain, copy = teacher.clone(), torch.empty(1000).bfloat16()
    ema_update_([plain], [student], 0.9)
    ema_update_([teacher], [student], 0.9, copies=[copy], rounding="stochastic", seed=1)
    assert torch.equal(teacher, plain)
    assert torch.equal(copy, plain.bfloat16())


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"seed": 5}, ValueError, 'seed is for rounding="stochastic"'),
        ({"rounding": "up"}, ValueError, 'rounding must be "nearest" or "stochastic", got \'up\''),
        ({"rounding": "stochastic", "seed": 1.5}, TypeError, "seed must be an int or a tensor, got float"),
        ({"rounding": "stochastic", "seed": 2**63}, ValueError, "seed must fit into 64 bits"),
        ({"rounding": "stochastic", "seed": torch.tensor(5)}, ValueError, "seed must be one int64, shape (1,)"),
        ({"rounding": "stochastic", "seed": torch.tensor([5.0])}, ValueError, "seed must be one int64, shape (1,)"),
    ],
    ids=str,
)
def test_refuses(options: dict[str, object], kind: type[Exception], message: str) -> None:
    teacher = torch.ones(4).bfloat16()
    with pytest.raises(kind) as refused:
        ema_update_([teacher], [torch.zeros(4)], 0.5, **options)  # type: ignore[arg-type]
    assert message in str(refused.value)
    assert (teacher == 1).all()
