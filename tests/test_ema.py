"""ema_update_: the native kernel and the reference, against a float64 computation."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor

from crossmask.kernels import ema_update_, native
from crossmask.kernels.ema.api import implementation
from crossmask.kernels.ema.op import ema_update_op
from crossmask.kernels.ema.reference import ema_update_reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# 32768 is one chunk of the CPU kernel: one less, exactly, one more, and several; 0 and 1 elements; odd tails
SHAPES = [(1,), (0,), (7, 11), (32767,), (32768,), (32769,), (3, 40961), ()]


def tensors(dtype: torch.dtype, seed: int = 0) -> tuple[list[Tensor], list[Tensor]]:
    random = torch.Generator().manual_seed(seed)
    teacher = [torch.randn(shape, generator=random) for shape in SHAPES]
    return teacher, [torch.randn(shape, generator=random).to(dtype) for shape in SHAPES]


@pytest.fixture(params=["native", "reference"])
def update(request: pytest.FixtureRequest):
    """The op with its native kernel, and the same checks with the reference."""
    if request.param == "native":
        if not native.status().loaded:
            pytest.skip(f"no native extension: {native.status().reason}")
        assert implementation("cpu") == "native"
        return torch.ops.crossmask.ema_update_
    return ema_update_op._init_fn


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("decay", [0.0, 0.25, 0.995, 0.9999, 1.0])
def test_agrees_with_float64(update, dtype: torch.dtype, decay: float) -> None:
    teacher, student = tensors(dtype)
    exact = [t.double() for t in teacher]
    ema_update_reference(exact, [s.double() for s in student], decay)
    before = [s.clone() for s in student]
    update(teacher, student, decay)
    for result, expected in zip(teacher, exact, strict=True):
        # three float32 roundings of values of size up to about 10
        torch.testing.assert_close(result.double(), expected, rtol=2e-7, atol=2e-6)
    for after, original in zip(student, before, strict=True):
        assert torch.equal(after, original), "the student moved"


def test_hand_computed(update) -> None:
    teacher = [torch.tensor([1.0, -2.0]), torch.tensor([[8.0]])]
    update(teacher, [torch.tensor([3.0, 2.0]), torch.tensor([[0.0]], dtype=torch.bfloat16)], 0.75)
    assert teacher[0].tolist() == [1.5, -1.0]
    assert teacher[1].tolist() == [[6.0]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_half_precision_value_is_read_exactly(update, dtype: torch.dtype) -> None:
    """All 2^16 bit patterns, subnormals, infinities and NaN among them: a teacher of 0 at decay 0 becomes the value."""
    student = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    teacher = torch.zeros(2**16)
    update([teacher], [student], 0.0)
    torch.testing.assert_close(teacher, student.float(), rtol=0, atol=0, equal_nan=True)


def test_a_teacher_equal_to_its_student_stays_exactly(update) -> None:
    teacher, _ = tensors(torch.float32)
    update(teacher, [t.clone() for t in teacher], 0.995)
    assert all(torch.equal(t, s) for t, s in zip(teacher, tensors(torch.float32)[0], strict=True))


def test_native_and_reference_agree_to_rounding_and_do_not_depend_on_threads() -> None:
    if not native.status().loaded:
        pytest.skip(f"no native extension: {native.status().reason}")
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            teacher, student = tensors(torch.bfloat16)
            torch.ops.crossmask.ema_update_(teacher, student, 0.9)
            results.append(teacher)
    finally:
        torch.set_num_threads(threads)
    reference, student = tensors(torch.bfloat16)
    ema_update_reference(reference, student, 0.9)
    for one, three, plain in zip(*results, reference, strict=True):
        assert torch.equal(one, three)
        torch.testing.assert_close(one, plain, rtol=3e-7, atol=1e-6)


def test_writes_nothing_beside_the_tensor(update) -> None:
    """A view into the middle of a buffer, not aligned to 16 bytes: its neighbours keep their bits."""
    buffer = torch.full((1000,), torch.nan)
    teacher = buffer[3:997]
    teacher.zero_()
    update([teacher], [torch.ones(994)], 0.5)
    assert torch.equal(teacher, torch.full((994,), 0.5))
    assert buffer[:3].isnan().all()
    assert buffer[997:].isnan().all()


BAD = [
    ("decay", lambda: ([torch.zeros(2)], [torch.zeros(2)], 1.5), r"decay must lie in \[0, 1\], got 1.5"),
    ("nan", lambda: ([torch.zeros(2)], [torch.zeros(2)], float("nan")), r"decay must lie in \[0, 1\]"),
    ("count", lambda: ([torch.zeros(2)], [], 0.5), "1 teacher tensors but 0 student tensors"),
    (
        "teacher dtype",
        lambda: ([torch.zeros(2, dtype=torch.bfloat16)], [torch.zeros(2)], 0.5),
        r"teacher\[0\] must be float32",
    ),
    (
        "student dtype",
        lambda: ([torch.zeros(2)], [torch.zeros(2, dtype=torch.int32)], 0.5),
        r"student\[0\] must be float32, bf",
    ),
    (
        "size",
        lambda: ([torch.zeros(1), torch.zeros(2)], [torch.zeros(1), torch.zeros(3)], 0.5),
        r"teacher\[1\].*student\[1\]",
    ),
    ("shape", lambda: ([torch.zeros(2, 3)], [torch.zeros(3, 2)], 0.5), r"teacher\[0\].*student\[0\]"),
    ("strides", lambda: ([torch.zeros(3, 2).t()], [torch.zeros(2, 3)], 0.5), "must be contiguous"),
]


@pytest.mark.parametrize(("make", "message"), [case[1:] for case in BAD], ids=[case[0] for case in BAD])
def test_refuses(update, make, message: str) -> None:
    teacher, student, decay = make()
    before = [t.clone() for t in teacher]
    with pytest.raises((ValueError, TypeError, RuntimeError), match=message):
        update(teacher, student, decay)
    with pytest.raises((ValueError, TypeError), match=message):
        ema_update_(teacher, student, decay)
    assert all(torch.equal(t, b) for t, b in zip(teacher, before, strict=True)), "a refused call changed the teacher"


def test_parameters_that_require_grad() -> None:
    teacher = torch.nn.Linear(5, 3)
    student = torch.nn.Linear(5, 3)
    expected = [(0.1 * s + 0.9 * t).detach() for t, s in zip(teacher.parameters(), student.parameters(), strict=True)]
    version = teacher.weight._version
    ema_update_(teacher.parameters(), student.parameters(), 0.9)
    for t, e in zip(teacher.parameters(), expected, strict=True):
        torch.testing.assert_close(t.detach(), e)
        assert t.is_leaf
        assert t.requires_grad
    assert teacher.weight._version > version, "autograd was not told that the teacher changed"


def test_nothing_to_do() -> None:
    ema_update_([], [], 0.5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(dtype: torch.dtype) -> None:
    teacher = [torch.randn(4, 3), torch.randn(5)]
    torch.library.opcheck(torch.ops.crossmask.ema_update_.default, (teacher, [t.to(dtype) for t in teacher], 0.9))


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


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cuda_agrees_with_the_reference(dtype: torch.dtype) -> None:
    shapes = [*SHAPES, *[(5,)] * 70, (400 * 65536 + 3,)]  # more tensors and more chunks than one launch holds
    teacher = [torch.randn(shape, device="cuda") for shape in shapes]
    student = [torch.randn(shape, device="cuda").to(dtype) for shape in shapes]
    expected = [t.clone() for t in teacher]
    ema_update_reference(expected, student, 0.9)
    torch.ops.crossmask.ema_update_(teacher, student, 0.9)
    for result, reference in zip(teacher, expected, strict=True):
        torch.testing.assert_close(result, reference, rtol=3e-7, atol=1e-6)
