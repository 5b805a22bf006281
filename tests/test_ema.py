"""ema_update_: the native kernel and the reference, against float64 and against each other, bit for bit."""

from __future__ import annotations

import hashlib
import itertools
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from crossmask.kernels import ema_update_, native
from crossmask.kernels.ema.api import implementation
from crossmask.kernels.ema.op import OP, _reference
from crossmask.kernels.ema.reference import ema_update_reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# 128 is a block of the CPU kernel: one less, exactly, one more, and several; 0 and 1 elements; odd tails
SHAPES = [(1,), (0,), (7, 11), (127,), (128,), (129,), (1000,), (3, 40961), ()]
DECAYS = [0.0, 0.25, 0.5, 0.995, 0.9999, 1.0]  # both ends, both forms
Update = Callable[..., None]


def randn(dtype: torch.dtype, seed: int) -> list[Tensor]:
    random = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=random).to(dtype) for shape in SHAPES]


def poisoned(dtype: torch.dtype) -> list[Tensor]:
    return [torch.full(shape, torch.nan, dtype=dtype) for shape in SHAPES]


def assert_equal(results: list[Tensor], expected: list[Tensor]) -> None:
    for result, wanted in zip(results, expected, strict=True):
        assert result.dtype == wanted.dtype
        assert torch.equal(result, wanted)


@pytest.fixture(params=["native", "reference"])
def update(request: pytest.FixtureRequest) -> Update:
    """The op with its native kernel, and the same checks with the reference."""
    if request.param == "native" and not native.status().loaded:
        pytest.skip(f"no native extension: {native.status().reason}")
    run = OP if request.param == "native" else _reference
    return lambda teacher, student, decay, copies=(), seed=None: run(teacher, student, decay, list(copies), seed)


@pytest.mark.parametrize("teacher_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("student_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("decay", DECAYS)
def test_agrees_with_float64(
    update: Update, teacher_dtype: torch.dtype, student_dtype: torch.dtype, decay: float
) -> None:
    teacher, student = randn(teacher_dtype, 0), randn(student_dtype, 1)
    exact = [t.double() for t in teacher]
    ema_update_reference(exact, [s.double() for s in student], decay)
    before = [s.clone() for s in student]
    update(teacher, student, decay)
    spacing = {torch.float32: 2e-7, torch.bfloat16: 2**-8, torch.float16: 2**-11}[teacher_dtype]
    for result, expected in zip(teacher, exact, strict=True):
        # three float32 roundings of values of size up to about 10, and one to the teacher's dtype
        torch.testing.assert_close(result.double(), expected, rtol=spacing * 1.01, atol=2e-6)
    assert_equal(student, before)


@pytest.mark.parametrize("mix", list(itertools.product(DTYPES, DTYPES, DTYPES)), ids=str)
def test_native_and_reference_give_the_same_bits(mix: tuple[torch.dtype, ...]) -> None:
    if not native.status().loaded:
        pytest.skip(f"no native extension: {native.status().reason}")
    for decay, seed in itertools.product(DECAYS, [None, torch.tensor([-(2**40) - 3])]):
        results = []
        for run in (OP, _reference):
            teacher, copies = randn(mix[0], 0), poisoned(mix[2])
            run(teacher, randn(mix[1], 1), decay, copies, seed)
            assert_equal(copies, [t.to(mix[2]) for t in teacher])
            results.append(teacher)
        assert_equal(*results)


def test_hand_computed(update: Update) -> None:
    teacher = [torch.tensor([1.0, -2.0]), torch.tensor([[8.0]])]
    copies = [torch.zeros(2, dtype=torch.bfloat16), torch.zeros(1, 1, dtype=torch.float16)]
    update(teacher, [torch.tensor([3.0, 2.0]), torch.tensor([[0.0]], dtype=torch.bfloat16)], 0.75, copies)
    assert teacher[0].tolist() == copies[0].tolist() == [1.5, -1.0]
    assert teacher[1].tolist() == copies[1].tolist() == [[6.0]]


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_every_half_precision_value_is_read_exactly(update: Update, dtype: torch.dtype) -> None:
    """All 2^16 bit patterns, subnormals, infinities and NaN among them: a teacher of 0 at decay 0 becomes the value."""
    student = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    teacher = torch.zeros(2**16)
    update([teacher], [student], 0.0)
    torch.testing.assert_close(teacher, student.float(), rtol=0, atol=0, equal_nan=True)
    assert torch.equal(teacher.signbit()[~teacher.isnan()], student.signbit()[~teacher.isnan()])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_ends_are_exact_whatever_the_other_side_holds(update: Update, dtype: torch.dtype) -> None:
    value = torch.tensor([1.0, -0.0, 6e-5, torch.inf, -torch.inf]).to(dtype)
    for other in (torch.nan, torch.inf, -torch.inf, -0.0):
        others = torch.full_like(value, other)
        stays, becomes = value.clone(), others.clone()
        update([stays, becomes], [others, value], 1.0)
        assert torch.equal(stays.view(torch.int8), value.view(torch.int8))
        update([becomes], [value], 0.0)
        assert torch.equal(becomes.view(torch.int8), value.view(torch.int8))


@pytest.mark.parametrize("decay", [0.1, 0.995])
def test_a_teacher_equal_to_its_student_stays_exactly(update: Update, decay: float) -> None:
    for dtype in DTYPES:
        teacher = randn(dtype, 0)
        update(teacher, [t.clone() for t in teacher], decay)
        assert_equal(teacher, randn(dtype, 0))


# ---- nothing but the values decides the bits: neither vector width nor threads nor how memory is cut

WIDTHS = "from test_ema import OP, digest; print(digest(OP))"


def digest(run: Update) -> str:
    """Of all dtype mixes, with and without copies and stochastic rounding. A NaN counts as a NaN."""
    total = hashlib.sha256()
    special = torch.tensor([torch.nan, torch.inf, -torch.inf, 1e-7, -65519.0, 65520.0, 3e38, 1e-40])
    random = torch.Generator().manual_seed(0)  # whole numbers alone: PyTorch's normal ones depend on the vector width
    values = [torch.randint(-(2**24), 2**24, (2, n), generator=random) * 2.0**-23 for n in (1, 7, 127, 128, 129, 1000)]
    for x in values:
        x[0, : len(special)] = special[: x.shape[1]]
    for t, s, c in itertools.product(DTYPES, DTYPES, [None, *DTYPES]):
        for decay, seed in itertools.product(DECAYS, [None, torch.tensor([12345])]):
            teacher, student = [x[0].to(t, copy=True) for x in values], [x[1].to(s) for x in values]
            copies = [torch.empty_like(x, dtype=c) for x in teacher] if c else []
            run(teacher, student, decay, copies, seed)
            for x in [*teacher, *copies]:
                total.update(x.float().masked_fill(x.isnan(), 123.0).numpy().tobytes())
    return total.hexdigest()


@pytest.mark.parametrize("capability", ["default", "avx2", "avx512"])
def test_every_vector_width_gives_the_references_bits(capability: str) -> None:
    if not native.status().loaded:
        pytest.skip(f"no native extension: {native.status().reason}")
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability, "PYTHONPATH": os.path.dirname(__file__)}
    ran = subprocess.run([sys.executable, "-c", WIDTHS], capture_output=True, text=True, env=environment)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.split()[-1] == digest(_reference)


def test_does_not_depend_on_threads() -> None:
    if not native.status().loaded:
        pytest.skip(f"no native extension: {native.status().reason}")
    threads = torch.get_num_threads()
    # cut inside tensors and between them: a thread gets no less than 32 MiB of traffic
    shapes = [(5,)] * 50 + [(6_000_001,)] + [(129,)] * 300 + [(0,), (7_000_003,)]
    results = []
    try:
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            random = torch.Generator().manual_seed(0)
            teacher = [torch.randn(shape, generator=random).to(DTYPES[i % 3]) for i, shape in enumerate(shapes)]
            student = [torch.randn(shape, generator=random).to(DTYPES[i % 2]) for i, shape in enumerate(shapes)]
            copies = [torch.full(shape, torch.nan, dtype=DTYPES[i % 5 % 3]) for i, shape in enumerate(shapes)]
            OP(teacher, student, 0.9, copies, torch.tensor([7]))
            results.append(teacher + copies)
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert_equal(other, results[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_does_not_depend_on_how_tensors_are_cut_into_shards(update: Update, dtype: torch.dtype) -> None:
    whole, student = torch.randn(10_000).to(dtype), torch.randn(10_000).bfloat16()
    shards = whole.clone()
    copy, copied = torch.empty(2, 10_000).bfloat16()
    update([whole], [student], 0.995, [copy])
    cuts = [1, 130, 131, 2000, 2999, 9999]
    update(*([*x.tensor_split(cuts)] for x in (shards, student)), 0.995, copied.tensor_split(cuts))
    assert torch.equal(shards, whole)
    assert torch.equal(copied, copy)


def test_large_copies_are_written_as_small_ones_are() -> None:
    """From 16 MiB of copies on they go past the cache: wherever they begin, and nothing beside them is touched."""
    size = 2**23 + 1001
    teacher, buffer = torch.randn(size), torch.full((size + 20,), 7.0, dtype=torch.bfloat16)
    for offset in (0, 3, 8):
        copy = buffer[offset : offset + size]
        ema_update_([teacher], [torch.zeros(size, dtype=torch.bfloat16)], 0.9, copies=[copy])
        assert torch.equal(copy, teacher.bfloat16())
        assert (buffer[:offset] == 7).all()
        assert (buffer[offset + size :] == 7).all()
        buffer.fill_(7.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_writes_nothing_beside_the_tensor(update: Update, dtype: torch.dtype) -> None:
    """Views into the middle of buffers, not aligned to 16 bytes: their neighbours keep their bits."""
    buffer, around_copy = torch.full((2, 1000), torch.nan, dtype=dtype)
    teacher, copy = buffer[3:997], around_copy[1:995]
    teacher.zero_()
    update([teacher], [torch.ones(994)], 0.5, [copy])
    assert (teacher == 0.5).all()
    assert (copy == 0.5).all()
    assert buffer[:3].isnan().all()
    assert buffer[997:].isnan().all()
    assert around_copy[:1].isnan().all()
    assert around_copy[995:].isnan().all()


# ---- PyTorch's side


def test_parameters_that_require_grad() -> None:
    teacher, student, copy = torch.nn.Linear(5, 3), torch.nn.Linear(5, 3), torch.nn.Linear(5, 3)
    expected = [(0.1 * s + 0.9 * t).detach() for t, s in zip(teacher.parameters(), student.parameters(), strict=True)]
    versions = [p._version for p in (teacher.weight, copy.weight, student.weight)]
    ema_update_(teacher.parameters(), student.parameters(), 0.9, copies=copy.parameters())
    for t, e in zip(teacher.parameters(), expected, strict=True):
        torch.testing.assert_close(t.detach(), e)
        assert t.is_leaf
        assert t.requires_grad
    after = [p._version for p in (teacher.weight, copy.weight, student.weight)]
    assert after == [versions[0] + 1, versions[1] + 1, versions[2]], "autograd was not told what changed"
    OP([teacher.weight], [student.weight], 0.9, [copy.weight], None)
    assert [p._version for p in (teacher.weight, copy.weight)] == [versions[0] + 2, versions[1] + 2]


@pytest.mark.parametrize("given", [{}, {"rounding": "stochastic"}, {"copies": [None]}], ids=str)
def test_what_is_no_tensor_is_named(given: dict[str, Any]) -> None:
    state = torch.get_rng_state()
    with pytest.raises(TypeError, match=r"teacher\[0\] must be a tensor, got int"):
        ema_update_([1], [2], 0.5, **given)
    assert torch.equal(torch.get_rng_state(), state)


def test_nothing_to_do() -> None:
    ema_update_([], [], 0.5)
    ema_update_([torch.zeros(0)], [torch.zeros(0)], 0.5, copies=[torch.zeros(0)])


@pytest.mark.parametrize("teacher", DTYPES, ids=str)
def test_opcheck(teacher: torch.dtype) -> None:
    seeds = [None, torch.tensor([7]), None, torch.tensor([-7])]
    for student, copy, seed in zip([*DTYPES, teacher], [None, *DTYPES], seeds, strict=True):
        t = [torch.randn(4, 3).to(teacher), torch.randn(5).to(teacher)]
        copies = [torch.empty_like(x, dtype=copy) for x in t] if copy else []
        torch.library.opcheck(OP, (t, [x.to(student, copy=True) for x in t], 0.9, copies, seed))


def test_compiles_whole() -> None:
    def step(teacher: list[Tensor], student: list[Tensor], copies: list[Tensor | None], seed: Tensor) -> Tensor:
        ema_update_(teacher, student, 0.9, copies=copies, rounding="stochastic", seed=seed)
        return teacher[0] * 2

    student, seed = [torch.randn(3, 4).t(), torch.randn(5).half()], torch.tensor([3])
    teacher, copies = [torch.randn(4, 3).bfloat16(), torch.randn(5)], [torch.zeros(3, 4).t(), None]
    expected = [t.clone() for t in teacher]
    plain = step(expected, student, [None, None], seed)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")(teacher, student, copies, seed)
    assert torch.equal(compiled, plain)
    assert_equal(teacher, expected)
    assert torch.equal(copies[0], teacher[0].float())


def test_says_once_that_the_reference_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    absent = native.NativeStatus(loaded=False, reason="no compiler here; install one")
    monkeypatch.setattr(native, "status", lambda: absent)
    native.announce.cache_clear()
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(3):
                ema_update_([torch.zeros(2)], [torch.ones(2)], 0.5)
        assert [str(w.message) for w in caught] == [
            "crossmask: ema_update_ runs in plain PyTorch on cpu: no compiler here; install one"
        ]
        assert implementation("cpu") == "reference"
    finally:
        native.announce.cache_clear()


def test_status_names_what_each_device_lacks() -> None:
    cpu_only = native.NativeStatus(loaded=True, cuda_reason="no nvcc; install it")
    assert cpu_only.missing("cpu") is None
    assert cpu_only.missing("cuda") == "no nvcc; install it"
    assert "xpu" in (cpu_only.missing("xpu") or "")
    assert native.NativeStatus(loaded=True, cuda_architectures=("90",)).missing("cuda") is None
