"""ema_update_ on a GPU: the bits of the reference, in one launch, inside a CUDA graph, in the stream's order."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from crossmask.kernels import ema_update_, native
from crossmask.kernels.ema.reference import ema_update_reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(not native.status().cuda_architectures, reason="the extension has no CUDA kernels"),
]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SIZES = (1, 7, 2047, 2048, 2049, 70_001, 0)


def make(count: int) -> tuple[list[Tensor], list[Tensor], list[Tensor | None]]:
    """Every mix of dtypes in turn, on the CPU; some tensors begin at an odd element."""
    random = torch.Generator().manual_seed(0)
    mixes = itertools.cycle(itertools.product(DTYPES, DTYPES, (None, *DTYPES)))
    lists: tuple[list, list, list] = ([], [], [])
    for i, mix in enumerate(itertools.islice(mixes, count)):
        size, skipped = SIZES[i % len(SIZES)], i % 5 == 0
        for one, dtype in zip(lists, mix, strict=True):
            drawn = torch.randn(size + skipped, generator=random)
            one.append(None if dtype is None else drawn.to(dtype)[int(skipped) :])
    return lists


def on_gpu(tensors: list) -> list:
    """With the same offset into an allocation."""

    def moved(t: Tensor) -> Tensor:
        return t.cuda() if t._base is None or not t.storage_offset() else t._base.cuda()[t.storage_offset() :]

    return [None if t is None else moved(t) for t in tensors]


@pytest.mark.parametrize("count", [36, 300, 1700])
@pytest.mark.parametrize("seed", [None, 2**40 + 3], ids=["nearest", "stochastic"])
@pytest.mark.parametrize("decay", [0.995, 0.3, 0.0, 1.0])
def test_the_bits_of_the_reference(count: int, seed: int | None, decay: float) -> None:
    teacher, student, copies = make(count)
    moved, followed, written = on_gpu(teacher), on_gpu(student), on_gpu(copies)
    rounding = "nearest" if seed is None else "stochastic"
    ema_update_(moved, followed, decay, copies=written, rounding=rounding, seed=seed)
    listed = [torch.empty(0, dtype=torch.uint8) if c is None else c for c in copies]
    ema_update_reference(teacher, student, decay, listed, None if seed is None else torch.tensor([seed]))
    for i, (mine, theirs) in enumerate(zip([*moved, *written], [*teacher, *copies], strict=True)):
        if theirs is not None:
            kind = torch.int32 if theirs.dtype == torch.float32 else torch.int16
            assert torch.equal(mine.cpu().view(kind), theirs.view(kind)), i


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_every_16_bit_pattern(dtype: torch.dtype) -> None:
    """The GPU's own conversions, where the host has integer arithmetic: any value, and one NaN alone."""
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    for decay in (0.0, 0.75):
        case = [torch.zeros(2**16)], [patterns], [torch.zeros(2**16, dtype=dtype)]
        on = [on_gpu(one) for one in case]
        ema_update_(on[0], on[1], decay, copies=on[2])
        ema_update_(case[0], case[1], decay, copies=case[2])
        torch.testing.assert_close(on[0][0].cpu(), case[0][0], rtol=0, atol=0, equal_nan=True)
        assert torch.equal(on[2][0].cpu().view(torch.int16), case[2][0].view(torch.int16))


def test_one_launch() -> None:
    teacher, student, copies = (on_gpu(one) for one in make(700))
    ema_update_(teacher, student, 0.99, copies=copies)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        ema_update_(teacher, student, 0.99, copies=copies)
        torch.cuda.synchronize()
    on_device = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    assert [e.name for e in on_device if "ema_update_kernel" not in e.name] == []
    assert len(on_device) == 1


def test_in_a_graph_a_replay_draws_from_the_seed_as_it_is_then() -> None:
    teacher = [torch.ones(10_000, dtype=torch.bfloat16, device="cuda")]
    student = [torch.full((10_000,), 1.5, device="cuda")]
    seed = torch.tensor([1], device="cuda")
    ema_update_(teacher, student, 0.999, rounding="stochastic", seed=seed)  # the kernel is loaded
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ema_update_(teacher, student, 0.999, rounding="stochastic", seed=seed)
    expected = [torch.ones(10_000, dtype=torch.bfloat16)]
    teacher[0].fill_(1.0)
    for value in (5, 6, 7):
        seed.fill_(value)
        graph.replay()
        ema_update_reference(expected, [student[0].cpu()], 0.999, seed=torch.tensor([value]))
        assert torch.equal(teacher[0].cpu(), expected[0])


def test_the_order_of_the_current_stream() -> None:
    stream = torch.cuda.Stream()
    teacher, student = torch.zeros(1 << 24, device="cuda"), torch.zeros(1 << 24, device="cuda")
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10**8)
        student.fill_(1.0)  # the update has to wait for it, and what follows for the update
        ema_update_([teacher], [student], 0.5)
        student.fill_(7.0)
    stream.synchronize()
    assert torch.equal(teacher, torch.full_like(teacher, 0.5))


def test_as_fast_as_the_memory() -> None:
    """203 M parameters in 288 tensors, against PyTorch's own in-place pass over the same bytes."""
    teacher = [torch.randn(203_000_000 // 288, device="cuda") for _ in range(288)]
    student = [torch.randn_like(t) for t in teacher]

    def seconds(act) -> float:
        best = float("inf")
        for _ in range(12):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            act()
            end.record()
            end.synchronize()
            best = min(best, start.elapsed_time(end) / 1e3)
        return best

    ours = seconds(lambda: ema_update_(teacher, student, 0.999))
    theirs = seconds(lambda: torch._foreach_lerp_(teacher, student, 0.001))
    print(f"ema_update_ {ours * 1e3:.2f} ms, _foreach_lerp_ {theirs * 1e3:.2f} ms")
    assert ours <= 1.1 * theirs
