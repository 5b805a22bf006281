"""The CUDA kernel of ema_update_ without a GPU: its own code, every thread of every block, on the host's memory.

csrc/ema_cuda_kernel.h is compiled by the host's compiler. Each access is noted before any is done, so that the tests
see what is read and written, how often and how wide, and see it for tensors far larger than the memory.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from crossmask.kernels.ema.reference import ema_update_reference, round_stochastically
from crossmask.kernels.philox import philox

ROOT = Path(__file__).resolve().parents[1]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # in the order of Float in csrc/ema.h
CANARY = 0x5A
PAD = 64  # bytes of canary on either side
DECAYS = (0.995, 0.3, 0.0, 1.0)  # each case of the formula


class Entry(ctypes.Structure):
    """EmaTensor of csrc/ema.h."""

    _fields_ = [
        *((name, ctypes.c_uint64) for name in ("teacher", "student", "copy")),
        ("size", ctypes.c_int64),
        ("index", ctypes.c_uint32),
        *((name, ctypes.c_uint8) for name in ("teacher_dtype", "student_dtype", "copy_dtype")),
    ]


@dataclass(frozen=True)
class Run:
    """What the kernel did: 16-byte, scalar accesses and their places; blocks of each launch."""

    accesses: np.ndarray
    blocks: list[int]

    def stores(self) -> np.ndarray:
        return self.accesses[self.accesses["stored"] == 1]

    def loads(self) -> np.ndarray:
        return self.accesses[self.accesses["stored"] == 0]


class Emulator:
    def __init__(self, library: Path) -> None:
        self.library = ctypes.CDLL(str(library))
        self.library.noted.restype = self.library.emulate.restype = ctypes.c_int64
        self.library.launch_count.restype = self.library.launch_blocks.restype = ctypes.c_int64
        constants = (ctypes.c_int64 * 7)()
        self.library.constants(constants)
        self.unit, self.most_units, self.few, self.many, self.few_bytes, self.many_bytes, entry = constants
        assert entry == ctypes.sizeof(Entry)

    def run(
        self,
        entries: Sequence[Entry],
        decay: float,
        seed: int | None = None,
        many: bool = True,
        processors: int = 4,
        blocks: Sequence[int] | None = None,
        touch: bool = False,
    ) -> Run:
        listed = (Entry * len(entries))(*entries)
        drawn = None if seed is None else ctypes.byref(ctypes.c_int64(seed))
        chosen = (ctypes.c_int64 * len(blocks or ()))(*(blocks or ()))
        count = self.library.emulate(
            listed, ctypes.c_int64(len(entries)), ctypes.c_double(decay), drawn, many, processors, chosen,
            ctypes.c_int64(-1 if blocks is None else len(blocks)), touch,
        )  # fmt: skip
        launches = (ctypes.c_int64 * self.library.launch_count()).from_address(self.library.launch_blocks())
        kind = np.dtype([("address", np.uint64), ("bytes", np.uint32), ("stored", np.uint32)])
        noted = np.zeros(0, kind)
        if count:
            raw = (ctypes.c_char * (count * kind.itemsize)).from_address(self.library.noted())
            noted = np.frombuffer(raw, kind).copy()
        return Run(noted, list(launches))


@pytest.fixture(scope="module")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> Emulator:
    compiler = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler was found (install g++, or set CXX)")
    library = tmp_path_factory.mktemp("emulation") / "kernel.so"
    include = Path(torch.__file__).parent / "include"
    flags = ["-std=c++17", "-O1", "-ffp-contract=off", "-Wall", "-Werror", "-Wno-unknown-pragmas", "-shared", "-fPIC"]
    flags += [f"-I{ROOT / 'csrc'}", "-isystem", str(include), "-DTORCH_TARGET_VERSION=0x020d000000000000"]
    source = ROOT / "tests/ema_cuda_emulation.cpp"
    ran = subprocess.run([compiler, *flags, str(source), "-o", str(library)], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return Emulator(library)


@dataclass
class Memory:
    """A tensor somewhere in a buffer full of canaries."""

    buffer: Tensor  # uint8
    tensor: Tensor

    @classmethod
    def of(cls, values: Tensor, shift: int) -> Memory:
        """``shift``: elements past an address that is a multiple of 64."""
        buffer = torch.full((values.nbytes + 2 * PAD + 128,), CANARY, dtype=torch.uint8)
        begin = -buffer.data_ptr() % 64 + PAD + shift * values.element_size()
        tensor = buffer[begin : begin + values.nbytes].view(values.dtype) if values.numel() else values.clone()
        tensor.copy_(values)
        return cls(buffer, tensor)

    @property
    def extent(self) -> tuple[int, int]:
        return self.tensor.data_ptr(), self.tensor.data_ptr() + self.tensor.nbytes

    def neighbours_stand(self) -> bool:
        rest = self.buffer.clone()
        begin = self.tensor.data_ptr() - self.buffer.data_ptr()
        rest[begin : begin + self.tensor.nbytes] = CANARY
        return bool((rest == CANARY).all())


@dataclass(frozen=True)
class Spec:
    size: int
    teacher: torch.dtype = torch.float32
    student: torch.dtype = torch.float32
    copy: torch.dtype | None = None
    shift: tuple[int, int, int] = (0, 0, 0)  # of teacher, student and copy, in elements


class Case:
    def __init__(self, specs: Sequence[Spec], seed: int = 0) -> None:
        random = torch.Generator().manual_seed(seed)

        def values(size: int, dtype: torch.dtype) -> Tensor:
            drawn = torch.randn(size, generator=random) * 10.0 ** torch.randint(-6, 5, (size,), generator=random)
            return drawn.to(dtype)

        self.specs = specs
        self.teachers = [Memory.of(values(s.size, s.teacher), s.shift[0]) for s in specs]
        self.students = [Memory.of(values(s.size, s.student), s.shift[1]) for s in specs]
        self.copies = [
            Memory.of(torch.full((s.size,), torch.nan, dtype=s.copy), s.shift[2]) if s.copy else None for s in specs
        ]

    def entries(self) -> list[Entry]:
        """Tensors without elements are left out, as csrc/ema_checks.cpp does."""
        parts = zip(self.specs, self.teachers, self.students, self.copies, strict=True)
        return [
            Entry(
                t.tensor.data_ptr(), s.tensor.data_ptr(), c.tensor.data_ptr() if c else 0, spec.size, i,
                DTYPES.index(spec.teacher), DTYPES.index(spec.student), DTYPES.index(spec.copy) if spec.copy else 0,
            )
            for i, (spec, t, s, c) in enumerate(parts)
            if spec.size
        ]  # fmt: skip

    def check(self, emulator: Emulator, decay: float, seed: int | None = None, **settings: object) -> Run:
        """Run it twice, the first time without touching memory, and compare with the reference bit by bit."""
        teachers, students = [[m.tensor.clone() for m in one] for one in (self.teachers, self.students)]
        copies = [torch.empty(0, dtype=torch.uint8) if c is None else c.tensor.clone() for c in self.copies]
        ema_update_reference(teachers, students, decay, copies, None if seed is None else torch.tensor([seed]))
        noted = emulator.run(self.entries(), decay, seed, **settings)  # type: ignore[arg-type]
        self._each_element_once(noted)
        emulator.run(self.entries(), decay, seed, touch=True, **settings)  # type: ignore[arg-type]
        for i, spec in enumerate(self.specs):
            assert same_bits(self.teachers[i].tensor, teachers[i]), (i, spec, decay)
            if (copy := self.copies[i]) is not None:
                assert same_bits(copy.tensor, copies[i]), (i, spec, decay)
        everything = [*self.teachers, *self.students, *filter(None, self.copies)]
        assert all(memory.neighbours_stand() for memory in everything)
        assert all(same_bits(m.tensor, s) for m, s in zip(self.students, students, strict=True)), "a student moved"
        return noted

    def _each_element_once(self, run: Run) -> None:
        written = [memory.extent for memory in [*self.teachers, *filter(None, self.copies)]]
        read = [memory.extent for memory in [*self.teachers, *self.students]]
        for accesses, extents in ((run.stores(), written), (run.loads(), read)):
            assert (accesses["address"] % accesses["bytes"] == 0).all(), "an access is not aligned to its width"
            at = np.sort(accesses, order="address")
            begin, end = at["address"].astype(np.int64), at["address"].astype(np.int64) + at["bytes"]
            assert (end[:-1] <= begin[1:]).all(), "an element is accessed twice"
            allowed = np.array(sorted(extent for extent in extents if extent[0] < extent[1])).reshape(-1, 2)
            place = np.searchsorted(allowed[:, 0], begin, side="right") - 1
            assert (place >= 0).all()
            assert (end <= allowed[place, 1]).all(), "an access leaves its tensor"
            assert (end - begin).sum() == (allowed[:, 1] - allowed[:, 0]).sum(), "an element is left out"


def same_bits(a: Tensor, b: Tensor) -> bool:
    """But for which NaN a NaN is: PyTorch's conversions keep some of its bits, and processors choose."""
    nan = a.isnan() & b.isnan()
    kind = torch.int32 if a.dtype == torch.float32 else torch.int16
    return torch.equal(a.view(kind).masked_fill(nan, 0), b.view(kind).masked_fill(nan, 0))


SIZES = (1, 7, 8, 2047, 2048, 2049, 4096 + 700, 0)  # around one unit of 2048; without elements
MIXES = [
    Spec(SIZES[i % len(SIZES)], teacher, student, copy)
    for i, (teacher, student, copy) in enumerate(itertools.product(DTYPES, DTYPES, (None, *DTYPES)))
]


@pytest.mark.parametrize("seed", [None, 2**40 + 5, -3], ids=["nearest", "stochastic", "negative seed"])
@pytest.mark.parametrize("decay", DECAYS)
def test_every_mix_of_dtypes_in_one_launch(emulator: Emulator, decay: float, seed: int | None) -> None:
    sizes = SIZES if decay == DECAYS[0] else SIZES[3:]
    for turn in range(len(sizes)):
        specs = [replace(spec, size=sizes[(i + turn) % len(sizes)]) for i, spec in enumerate(MIXES)]
        run = Case(specs, turn).check(emulator, decay, seed, many=turn % 2 == 0)
        assert len(run.blocks) == 1
        if decay != DECAYS[0]:
            break


@pytest.mark.parametrize("seed", [None, 11], ids=["nearest", "stochastic"])
def test_unaligned_tensors(emulator: Emulator, seed: int | None) -> None:
    """Each of the three pointers by itself, by one element and by eight bytes."""
    shifts = [tuple(shift * (place == one) for place in range(3)) for one in range(3) for shift in (1, 2, 4)]
    specs = [
        Spec(size, teacher, student, copy, shift)
        for shift in shifts
        for teacher, student, copy, size in [
            (torch.float32, torch.float32, torch.float32, 2051),
            (torch.float32, torch.bfloat16, torch.bfloat16, 4097),
            (torch.float16, torch.bfloat16, None, 2048),
        ]
    ]
    Case(specs).check(emulator, 0.9, seed)


def test_whole_units_move_by_128_bits_and_the_rest_by_elements(emulator: Emulator) -> None:
    for spec in MIXES:
        for shift in (0, 1):
            case = Case([replace(spec, size=3 * emulator.unit + 17, shift=(0, shift, 0))])
            run = case.check(emulator, 0.9)
            memories = [case.teachers[0], case.teachers[0], case.students[0], *filter(None, case.copies)]
            units = 0 if shift else 3
            wide = sum(units * emulator.unit * memory.tensor.element_size() // 16 for memory in memories)
            rest = len(memories) * (17 + (3 - units) * emulator.unit)
            assert (run.accesses["bytes"] == 16).sum() == wide
            assert (run.accesses["bytes"] < 16).sum() == rest


def test_neighbouring_threads_take_neighbouring_memory(emulator: Emulator) -> None:
    """Float32 alone: each access of a warp, noted from its last thread on, fills 512 bytes in a row."""
    run = Case([Spec(emulator.unit)]).check(emulator, 0.9)
    for accesses in (run.loads(), run.stores()):
        streams = accesses["address"].astype(np.int64).reshape(emulator.unit // 8, -1)
        assert (np.diff(streams, axis=0) == -16).all()


@pytest.mark.parametrize("many", [True, False])
@pytest.mark.parametrize("seed", [None, 5], ids=["nearest", "stochastic"])
def test_a_list_longer_than_the_argument(emulator: Emulator, many: bool, seed: int | None) -> None:
    """900 tensors, every seventh without elements: further launches, and draws by the place in the caller's list."""
    kinds = itertools.cycle(MIXES)
    specs = [replace(next(kinds), size=0 if i % 7 == 0 else 1 + i * 37 % 300) for i in range(1050)]
    specs[1] = replace(specs[1], size=5000)
    listed = sum(spec.size > 0 for spec in specs)
    assert listed == 900
    run = Case(specs).check(emulator, 0.99, seed, many=many)
    assert len(run.blocks) == -(-listed // (emulator.many if many else emulator.few)) == (2 if many else 10)


def test_any_cut_into_blocks_gives_the_same_bits(emulator: Emulator) -> None:
    specs = [Spec(200_000, torch.bfloat16), Spec(9, torch.float16), Spec(130_001, torch.float32, torch.bfloat16)]
    results = []
    blocks = set()
    for processors in (1, 3, 200):
        case = Case(specs)
        run = case.check(emulator, 0.99, 7, processors=processors)
        results.append([memory.tensor.clone() for memory in case.teachers])
        blocks.add(run.blocks[0])
    assert len(blocks) == 3
    assert all(same_bits(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("seed", [None, 3], ids=["nearest", "stochastic"])
def test_every_16_bit_pattern(emulator: Emulator, dtype: torch.dtype, seed: int | None) -> None:
    """Subnormals, infinities and NaN on either side, and through a float32 teacher into copies."""
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    specs = [
        Spec(2**16, dtype, dtype),
        Spec(2**16, torch.float32, dtype, dtype),
        Spec(2**16, dtype, copy=torch.float32),
    ]
    for decay in (0.0, 0.75, 1.0):
        case = Case(specs)
        for memory in (*case.students[:2], case.teachers[2]):
            memory.tensor.copy_(patterns)
        case.teachers[0].tensor.copy_(patterns.flip(0))
        case.check(emulator, decay, seed)
        rounded = torch.cat([case.teachers[0].tensor, case.copies[1].tensor])  # type: ignore[union-attr]
        one_nan = {torch.bfloat16: 0x7FC0, torch.float16: 0x7E00}[dtype]
        assert rounded.view(torch.int16)[rounded.isnan()].unique().tolist() == [one_nan]


def test_the_argument_keeps_to_its_limits(emulator: Emulator) -> None:
    assert emulator.few_bytes <= 4096 < emulator.many_bytes <= 32764
    assert (emulator.few, emulator.many) == (98, 798)


@pytest.mark.parametrize("processors", [40, 132, 148])
def test_blocks_for_every_processor(emulator: Emulator, processors: int) -> None:
    """203 M parameters in 288 tensors, and 2 M in 400: enough blocks for all, and long ones where there is enough."""

    def blocks(sizes: Sequence[int]) -> int:
        entries = [Entry(1 << 40, 1 << 41, 0, size, i, 0, 0, 0) for i, size in enumerate(sizes)]
        (launch,) = emulator.run(entries, 0.9, processors=processors, blocks=[]).blocks
        return launch

    model = [203_000_000 // 288] * 288
    assert 16 * processors <= blocks(model) <= 2 * sum(model) // (emulator.most_units * emulator.unit)
    assert blocks([5000] * 400) >= 2 * 400


@pytest.mark.parametrize("shift", [0, 1], ids=["aligned", "unaligned"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_places_beyond_32_bits(emulator: Emulator, dtype: torch.dtype, shift: int) -> None:
    """Two tensors of 2**33 elements and a few, none of which exists: the first and last blocks and one in between."""
    size, bytes_each = 2**33 + 2048 * 3 + 5, dtype.itemsize
    bases = [(1 << 44) + shift * bytes_each, (1 << 45) + shift * bytes_each]
    far = 1 << 50  # from teacher to student to copy
    entries = [Entry(b, b + far, b + 2 * far, size, i, *[DTYPES.index(dtype)] * 3) for i, b in enumerate(bases)]
    length = emulator.most_units * emulator.unit  # elements of a block
    (count,) = emulator.run(entries, 0.9, processors=132, blocks=[]).blocks
    each = -(-size // length)
    assert count == 2 * each
    for block in (0, 1, each - 1, each, each + 2**17, count - 1):
        tensor, place = divmod(block, each)
        begin, end = place * length, min((place + 1) * length, size)
        run = emulator.run(entries, 0.9, seed=1, processors=132, blocks=[block])
        for accesses, others in ((run.stores(), (0, 2)), (run.loads(), (0, 1))):
            at = np.sort(accesses, order="address")
            begins, ends = at["address"].astype(np.int64), at["address"].astype(np.int64) + at["bytes"]
            jumps = np.flatnonzero(ends[:-1] != begins[1:])  # one unbroken stretch of either tensor
            assert len(jumps) == 1
            stretches = [(begins[0], ends[jumps[0]]), (begins[jumps[0] + 1], ends[-1])]
            starts = [bases[tensor] + other * far for other in others]
            assert stretches == [(start + begin * bytes_each, start + end * bytes_each) for start in starts]


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("shift", [0, 1])
def test_draws_beyond_32_bits(emulator: Emulator, dtype: torch.dtype, shift: int) -> None:
    """The last elements of a tensor of more than 2**36: only they are in memory, and only their block runs."""
    length = emulator.most_units * emulator.unit
    before = 2**36 + length  # elements that do not exist
    teacher, student = (Memory.of(torch.randn(3000).to(dtype), shift) for _ in range(2))
    x, s = teacher.tensor.float(), student.tensor.float()
    starts = [m.tensor.data_ptr() - before * dtype.itemsize for m in (teacher, student)]
    entry = Entry(*starts, 0, before + 3000, 6, *[DTYPES.index(dtype)] * 2, 0)
    run = emulator.run([entry], 0.9, seed=17, processors=132, blocks=[-1], touch=True)
    assert run.blocks == [before // length + 1]
    group = (torch.arange(3000) + before) // 8
    words = philox(torch.tensor([17]), (group & 0xFFFFFFFF, group >> 32, torch.full_like(group, 6), group * 0))
    lane = torch.arange(3000) % 8
    draw = torch.stack(words, dim=-1).gather(1, (lane // 2)[:, None])[:, 0] >> (lane % 2 * 16) & 0xFFFF
    weight = torch.tensor([1.0 - 0.9], dtype=torch.float64).float()
    assert same_bits(teacher.tensor, round_stochastically(x + weight * (s - x), dtype, draw.int()))
    assert teacher.neighbours_stand()
