"""ema_update_: which memory it takes, which it refuses and in what words, and sizes beyond 32 bits."""

from __future__ import annotations

import ctypes
import mmap
import os
import re
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from crossmask.kernels import ema_update_, native
from crossmask.kernels.ema import checks
from crossmask.kernels.ema.op import OP, _reference
from crossmask.kernels.ema.reference import ema_update_reference

needs_native = pytest.mark.skipif(not native.status().loaded, reason=f"no native extension: {native.status().reason}")

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "row-major": lambda x: x.contiguous(),
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "permuted": lambda x: x.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0),
}


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("copy", LAYOUTS)
@pytest.mark.parametrize("student", LAYOUTS)
@pytest.mark.parametrize("teacher", LAYOUTS)
def test_dense_tensors_in_any_order(teacher: str, student: str, copy: str, rounding: str) -> None:
    shape = (4, 3, 1, 50)
    t = LAYOUTS[teacher](torch.randn(shape).bfloat16())
    s, c = LAYOUTS[student](torch.randn(shape)), LAYOUTS[copy](torch.full(shape, torch.nan))
    expected, strides = t.clone(), (t.stride(), c.stride())
    seed = torch.tensor([5]) if rounding == "stochastic" else None
    ema_update_reference([expected], [s], 0.9, seed=seed)
    ema_update_([t], [s], 0.9, copies=[c], rounding=rounding, seed=seed)
    assert torch.equal(t, expected)
    assert torch.equal(c, expected.float())
    assert (t.stride(), c.stride()) == strides


def test_draws_follow_memory_not_indices() -> None:
    flat = torch.full((64,), 1.0, dtype=torch.bfloat16)
    turned = flat.clone().view(8, 8).t()
    for t in (flat, turned):
        ema_update_([t], [torch.full_like(t, 2.0)], 0.999, rounding="stochastic", seed=1)
    assert torch.equal(turned.t().reshape(-1), flat)
    assert not torch.equal(turned.reshape(-1), flat)


def test_none_leaves_a_tensor_without_a_copy() -> None:
    teacher = [torch.randn(200), torch.randn(3, 4), torch.randn(0)]
    copies = [None, torch.zeros(3, 4).bfloat16(), None]
    ema_update_(teacher, [torch.zeros_like(t) for t in teacher], 0.5, copies=copies)
    assert torch.equal(copies[1], teacher[1].bfloat16())
    ema_update_(teacher, [torch.zeros_like(t) for t in teacher], 0.5, copies=[None] * 3)
    assert torch.equal(copies[1], (teacher[1] * 2).bfloat16())


def test_students_may_share_memory() -> None:
    student = torch.randn(100)
    teacher = [torch.zeros(100), torch.zeros(60), torch.zeros(100)]
    ema_update_(teacher, [student, student[20:80], student], 0.0)
    assert torch.equal(teacher[2], student)
    assert torch.equal(teacher[1], student[20:80])


def test_tensors_side_by_side_do_not_overlap() -> None:
    buffer, student = torch.zeros(1000), torch.arange(1000.0)
    cuts = [1, 10, 500, 501]
    ema_update_(buffer.tensor_split(cuts)[::-1], student.tensor_split(cuts)[::-1], 0.0)
    assert torch.equal(buffer, student)


# ---- what is refused: (words, type, teacher, student, copies)


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


BUFFER = zeros(100)
HALF = BUFFER.view(torch.bfloat16)  # the same memory
BAD: list[tuple[str, type[Exception], list[Tensor], list[Tensor], list[Tensor]]] = [
    ("1 teacher tensors but 0 student tensors", ValueError, [zeros(2)], [], []),
    ("1 teacher tensors but 2 copies", ValueError, [zeros(2)], [zeros(2)], [zeros(2), zeros(2)]),
    ("teacher[0] must be float32, bf", TypeError, [zeros(2, dtype=torch.float64)], [zeros(2)], []),
    ("student[1] must be float32, bf", TypeError, [zeros(2)] * 2, [zeros(2), zeros(2, dtype=torch.int32)], []),
    ("copies[0] must be float32, bf", TypeError, [zeros(2)], [zeros(2)], [zeros(2, dtype=torch.bool)]),
    ("teacher[1] is (2,) but student[1] is (3,)", ValueError, [zeros(1), zeros(2)], [zeros(1), zeros(3)], []),
    ("teacher[0] is (2, 3) but student[0] is (3, 2)", ValueError, [zeros(2, 3)], [zeros(3, 2)], []),
    ("teacher[0] is () but student[0] is (1,)", ValueError, [zeros()], [zeros(1)], []),
    ("teacher[0] is (2,) but copies[0] is (0,)", ValueError, [zeros(2)], [zeros(2)], [zeros(0)]),
    ("student[0] is not on the device of teacher[0]", ValueError, [zeros(2)], [zeros(2).to("meta")], []),
    ("teacher[0] is not dense", ValueError, [zeros(1).expand(4)], [zeros(4)], []),
    ("teacher[0] is not dense", ValueError, [zeros(4, 6)[:, ::2]], [zeros(4, 3)], []),
    ("student[0] is not dense", ValueError, [zeros(4)], [zeros(1).expand(4)], []),
    ("copies[0] is not dense", ValueError, [zeros(4, 3)], [zeros(4, 3)], [zeros(4, 4)[:, :3]]),
    ("teacher[0] and teacher[1] overlap", ValueError, [BUFFER[:50], BUFFER[49:]], [zeros(50), zeros(51)], []),
    ("teacher[0] and student[0] overlap", ValueError, [BUFFER], [BUFFER], []),
    ("teacher[0] and student[1] overlap", ValueError, [BUFFER[:50], zeros(9)], [zeros(50), BUFFER[41:50]], []),
    ("teacher[0] and student[0] overlap", ValueError, [BUFFER[:50]], [HALF[99:149]], []),
    ("teacher[0] and copies[0] overlap", ValueError, [BUFFER[:50]], [zeros(50)], [HALF[99:149]]),
    ("student[0] and copies[0] overlap", ValueError, [zeros(50)], [BUFFER[:50]], [HALF[99:149]]),
    ("copies[0] and copies[1] overlap", ValueError, [zeros(3), zeros(4)], [zeros(3), zeros(4)], [HALF[:3], HALF[2:6]]),
]


@pytest.mark.parametrize(("words", "kind", "teacher", "student", "copies"), BAD, ids=[f"{i}" for i in range(len(BAD))])
def test_refuses_in_one_line_and_changes_nothing(
    words: str, kind: type[Exception], teacher: list[Tensor], student: list[Tensor], copies: list[Tensor]
) -> None:
    written = [*teacher, *copies]
    for x in written:
        x.untyped_storage().fill_(0x40)  # 3.0 in float32 and in bfloat16, where students are 0
    before = [x.clone() for x in written]
    runs: list[tuple[Callable[[], None], type[Exception]]] = [
        (lambda: ema_update_(teacher, student, 0.5, copies=copies or None), kind),
        (lambda: _reference(teacher, student, 0.5, copies, None), kind),
    ]
    if native.status().loaded and not any(s.is_meta for s in student):
        runs.append((lambda: OP(teacher, student, 0.5, copies, None), RuntimeError))
    for run, expected in runs:
        with pytest.raises(expected, match=re.escape(words)) as refused:
            run()
        assert "\n" not in str(refused.value)
    for x, b in zip(written, before, strict=True):
        assert torch.equal(x, b), "a refused call changed something"


@pytest.mark.parametrize("decay", [1.5, -1e-9, float("nan")])
def test_refuses_a_decay_out_of_range(decay: float) -> None:
    for run in (lambda t, s: ema_update_(t, s, decay), lambda t, s: OP(t, s, decay, [], None)):
        with pytest.raises((ValueError, RuntimeError), match=r"decay must lie in \[0, 1\], got"):
            run([zeros(2)], [zeros(2)])
    with pytest.raises(TypeError, match="decay must be a number, got str"):
        ema_update_([zeros(2)], [zeros(2)], "0.9")  # type: ignore[arg-type]


def test_refuses_what_is_not_a_strided_tensor() -> None:
    with pytest.raises(TypeError, match=r"student\[0\] must be a tensor, got int"):
        ema_update_([zeros(2)], [1], 0.5)  # type: ignore[list-item]
    with pytest.raises(ValueError, match=r"teacher\[0\] is torch.sparse_coo, not strided"):
        ema_update_([zeros(2).to_sparse()], [zeros(2)], 0.5)


def test_refuses_an_overlap_that_a_temporary_would_hide() -> None:
    buffer = zeros(12)
    with pytest.raises(ValueError, match=r"teacher\[0\] and copies\[0\] overlap"):
        ema_update_([buffer.view(3, 4)], [zeros(3, 4)], 0.5, copies=[buffer.view(4, 3).t()])


def test_refuses_inference_tensors_outside_inference_mode() -> None:
    with torch.inference_mode():
        made = zeros(3)
        ema_update_([made], [zeros(3) + 1], 0.5)
    before = made.tolist()
    for teacher, copies, name in (([made], None, "teacher"), ([made.clone()], [made], "copies")):
        for _ in range(3):  # that it was allowed there, or refused before, is not remembered
            with pytest.raises(ValueError, match=rf"{name}\[0\] was made in inference mode"):
                ema_update_(teacher, [zeros(3) + 9], 0.5, copies=copies)
            assert made.tolist() == before
            with torch.inference_mode():
                ema_update_(teacher, [made.clone()], 0.5, copies=copies)
        with pytest.raises(ValueError, match=rf"{name}\[0\] was made in inference mode"):
            OP(teacher, [zeros(3)], 0.5, copies or [], None)
    ema_update_([zeros(3)], [made], 0.5)  # reading one is fine
    assert made.tolist() == before


@pytest.fixture
def mapped() -> Iterator[Callable[[str], Tensor]]:
    """4096 float32 of a file, by np.memmap in a mode."""
    with tempfile.NamedTemporaryFile() as file:
        file.write(bytes(4 * 4096))
        file.flush()

        def view(mode: str) -> Tensor:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # PyTorch's, that writing would be undefined
                return torch.from_numpy(np.memmap(file.name, dtype=np.float32, mode=mode))

        yield view


@pytest.mark.parametrize("pages", [slice(None), slice(1500, 1600)], ids=["all", "middle"])
def test_refuses_memory_that_is_mapped_read_only(mapped: Callable[[str], Tensor], pages: slice) -> None:
    """Where a store would end the process."""
    readable, writable = mapped("r")[pages], mapped("r+")[pages]
    ones = torch.ones_like(writable)
    for run in (ema_update_, lambda t, s, d, copies=(): OP(t, s, d, list(copies), None), _reference_of_copies):
        with pytest.raises((ValueError, RuntimeError), match=r"teacher\[1\] is in memory that is mapped read-only"):
            run([zeros(2), readable], [zeros(2) + 1, ones], 0.5)
        with pytest.raises((ValueError, RuntimeError), match=r"copies\[0\] is in memory that is mapped read-only"):
            run([ones], [ones.clone()], 0.5, copies=[readable])
    ema_update_([ones.clone()], [readable], 0.5)  # reading it is fine
    ema_update_([writable], [ones], 0.5, copies=[mapped("c")[pages]])
    assert (writable == 0.5).all()


def _reference_of_copies(
    teacher: list[Tensor], student: list[Tensor], decay: float, copies: list[Tensor] | tuple[()] = ()
) -> None:
    _reference(teacher, student, decay, copies, None)


def test_reads_whether_memory_is_writable_of_an_older_linux_too(mapped: Callable[[str], Tensor]) -> None:
    """What the C++ falls back to, and the reference does: a byte through a pipe."""
    readable, writable = mapped("r"), mapped("r+")
    writable[0] = 3.5
    assert not checks._writable(readable.data_ptr())
    assert checks._writable(writable.data_ptr())
    assert writable[0] == 3.5
    assert not checks._writable(16)  # mapped not at all


OLDER_LINUX = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdarg.h>
int asked = 0;
int ioctl(int file, unsigned long request, ...) {
  va_list rest; va_start(rest, request); void* argument = va_arg(rest, void*); va_end(rest);
  if ((request & 0xffff) == ('f' << 8 | 17)) { asked++; errno = ENOTTY; return -1; }
  return ((int (*)(int, unsigned long, void*))dlsym(RTLD_NEXT, "ioctl"))(file, request, argument);
}
"""
ON_IT = """
import ctypes, sys, numpy, torch
from crossmask.kernels import ema_update_
readable, writable = (torch.from_numpy(numpy.memmap(sys.argv[1], numpy.float32, mode)) for mode in ("r", "r+"))
many = [torch.zeros(3) for _ in range(1500)]  # more than one question takes
for place in (0, 1023, 1024, 1499):
    try:
        ema_update_([*many[:place], readable, *many[place + 1:]], [torch.ones_like(t) for t in
                    (*many[:place], readable, *many[place + 1:])], 0.5)
    except ValueError as error:
        assert f"teacher[{place}] is in memory that is mapped read-only" in str(error), error
    else:
        raise AssertionError("not refused")
assert not any(t.any() for t in many)
ema_update_([writable, *many], [torch.ones_like(t) for t in (writable, *many)], 0.5)
assert all((t == 0.5).all() for t in (writable, *many))
assert ctypes.c_int.in_dll(ctypes.CDLL(sys.argv[2]), "asked").value > 0
"""


@needs_native
@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
def test_the_kernel_reads_whether_memory_is_writable_on_an_older_linux(tmp_path: Path) -> None:
    """Where /proc/self/maps answers no questions: the C++ that asks a pipe."""
    (tmp_path / "older.c").write_text(OLDER_LINUX)
    shim = tmp_path / "older.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", shim, tmp_path / "older.c", "-ldl"], check=True)
    np.zeros(4096, np.float32).tofile(tmp_path / "memory")
    command = [sys.executable, "-W", "ignore", "-c", ON_IT, str(tmp_path / "memory"), str(shim)]
    ran = subprocess.run(command, env={**os.environ, "LD_PRELOAD": str(shim)}, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr


# ---- sizes beyond 32 bits


def test_fake_and_meta_tensors_beyond_31_bits() -> None:
    size = 2**31 + 5
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for device, mode in (("meta", None), ("cpu", FakeTensorMode()), ("cuda", FakeTensorMode())):
            with mode or torch.no_grad():
                teacher, student, copy = (
                    torch.empty(size, device=device, dtype=d) for d in (torch.bfloat16, None, None)
                )
                ema_update_([teacher], [student], 0.9, copies=[copy], rounding="stochastic", seed=1)
                with pytest.raises(
                    ValueError, match=rf"teacher\[0\] is \({size},\) but student\[0\] is \({size - 1},\)"
                ):
                    ema_update_([teacher], [student[:-1]], 0.9)


class Repeated:
    """`size` bfloat16 in a row of which all but the last few are the same little memory, again and again."""

    PIECE = 1 << 23  # bytes

    def __init__(self, size: int) -> None:
        self.libc = ctypes.CDLL(None, use_errno=True)
        self.libc.mmap.restype = ctypes.c_void_p
        self.libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
        self.bytes = -(-2 * size // self.PIECE) * self.PIECE
        anonymous = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000  # MAP_NORESERVE
        self.address = self._map(None, self.bytes, 0, anonymous, -1)
        fixed = mmap.MAP_SHARED | 0x10
        shared = os.memfd_create("repeated")
        os.ftruncate(shared, 2 * self.PIECE)
        last = self.bytes - self.PIECE
        for offset in range(0, self.bytes, self.PIECE):
            part = self.PIECE if offset == last else 0
            self._map(self.address + offset, self.PIECE, mmap.PROT_READ | mmap.PROT_WRITE, fixed, shared, part)
        os.close(shared)
        self.tensor = torch.frombuffer((ctypes.c_char * (2 * size)).from_address(self.address), dtype=torch.bfloat16)

    def _map(self, address: int | None, size: int, access: int, kind: int, file: int, offset: int = 0) -> int:
        got = self.libc.mmap(address, size, access, kind, file, offset)
        assert got not in (None, ctypes.c_void_p(-1).value), os.strerror(ctypes.get_errno())
        return int(got)

    def close(self) -> None:
        self.libc.munmap(ctypes.c_void_p(self.address), ctypes.c_size_t(self.bytes))


@needs_native
@pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="needs Linux's memfd_create")
@pytest.mark.parametrize("threads", [1, 16])  # the last cut between sixteen is past 2^31 as well
def test_more_than_31_bits_of_elements_on_the_cpu(threads: int) -> None:
    """The kernel's own arithmetic of places, over 4 GiB of addresses on 16 MiB of memory."""
    size, before = 2**31 + 2**28 + 37, torch.get_num_threads()
    teacher, student = Repeated(size), Repeated(size)
    try:
        torch.set_num_threads(threads)
        t, s = teacher.tensor, student.tensor
        s[: Repeated.PIECE // 2] = 1.0
        s[-37:] = torch.arange(37.0) + 2.0
        OP([t], [s], 0.0, [], None)
        assert torch.equal(t[-37:], s[-37:])
        assert (t[: Repeated.PIECE // 2] == 1.0).all()
        # of the last piece of memory nothing beyond the tensor was written
        end = teacher.address + 2 * size
        assert not any(ctypes.string_at(end, teacher.address + teacher.bytes - end))
    finally:
        torch.set_num_threads(before)
        teacher.close()
        student.close()


@needs_native
@pytest.mark.slow
@pytest.mark.skipif(
    psutil.virtual_memory().available < 16 * 2**30 or "CROSSMASK_LARGE" not in os.environ,
    reason="needs 9 GB of memory, and CROSSMASK_LARGE in the environment",
)
def test_more_than_31_bits_of_elements_in_memory() -> None:
    size = 2**31 + 37
    teacher, student = torch.zeros(size, dtype=torch.bfloat16), torch.ones(size, dtype=torch.bfloat16)
    student[-37:] = torch.arange(37.0)
    ema_update_([teacher], [student], 0.5)
    assert torch.equal(teacher[-37:], torch.arange(37.0).bfloat16() / 2)
    assert teacher[: 2**31].min() == teacher[: 2**31].max() == 0.5
