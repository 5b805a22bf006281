"""semi_hard_order: the walk against rules written down a third time, and the same bits in C++ as in PyTorch."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from crossmask.kernels import native, semi_hard_order
from crossmask.kernels.semi_hard import op, reference
from crossmask.kernels.semi_hard.similarity import similarities

NATIVE = native.status().loaded
needs_native = pytest.mark.skipif(not NATIVE, reason="the native extension is not built")
IMPLEMENTATIONS = [pytest.param("native", marks=needs_native), "reference"]


def walk(
    impl: str, similarity: Tensor, groups: Tensor | None = None, s: int = 3, start: int = 0, apart: int = 1
) -> Any:
    run = op.WALK if impl == "native" else reference.walk
    return run(similarity, groups, s, start, apart).tolist()


def by_hand(similarity: Tensor, groups: list[int] | None, s: int, start: int, apart: int) -> list[int]:
    """The rules in plain Python, as the docstring has them."""
    order, left = [start], [i for i in range(len(similarity)) if i != start]
    table = similarity.tolist()
    while left:
        last, odd = order[-1], len(order) % 2
        allowed = left
        if groups is not None:
            recent, same = {groups[i] for i in order[-apart:]}, groups[last]
            others = [j for j in left if groups[j] not in recent]
            allowed = others or [j for j in left if groups[j] != same] or left

        def rank(j: int, last: int = last, odd: int = odd) -> tuple[bool, float, int]:
            value = table[last][j] if odd else table[j][last]
            return (value != value, 0.0 if value != value else -value, j)

        order.append(sorted(allowed, key=rank)[min(s, len(allowed)) - 1])
        left.remove(order[-1])
    return order


def made_up(M: int, kind: str, generator: random.Random) -> Tensor:
    torch.manual_seed(generator.randrange(10**6))
    similarity = torch.randn(M, M)
    if kind == "ties":
        similarity = (2 * similarity).round() / 2  # zeros of both signs among them
    elif kind == "odd":
        for value in (float("nan"), float("inf"), -float("inf")):
            similarity[torch.rand(M, M) < 0.1] = value
    return similarity


def grouped(M: int, kind: str, generator: random.Random) -> list[int] | None:
    if kind == "none":
        return None
    numbers = {"few": max(1, M // 4), "one": 1, "all": M}[kind]
    return [generator.randrange(numbers) * 10**12 - 7 for _ in range(M)]


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("M", [1, 2, 3, 30])
def test_every_walk_is_the_one_by_hand(impl: str, M: int) -> None:
    generator = random.Random(M)
    for values in ("plain", "ties", "odd"):
        for kind in ("none", "few", "one", "all"):
            for s in (1, 3, 5, 40):
                for apart in (1, 4, 50):
                    similarity, groups = made_up(M, values, generator), grouped(M, kind, generator)
                    start = generator.randrange(M)
                    found = walk(impl, similarity, None if groups is None else torch.tensor(groups), s, start, apart)
                    assert found == by_hand(similarity, groups, s, start, apart), (values, kind, s, apart)


@needs_native
@pytest.mark.parametrize("M", [257, 1920])
def test_the_same_in_c_plus_plus_at_size(M: int) -> None:
    generator = random.Random(M)
    for s, values, kind, apart in ((1, "ties", "few", 1), (3, "plain", "none", 1), (5, "odd", "few", 127)):
        groups = grouped(M, kind, generator)
        numbers = None if groups is None else torch.tensor(groups)
        similarity, start = made_up(M, values, generator), generator.randrange(M)
        ours, wanted = (walk(impl, similarity, numbers, s, start, apart) for impl in ("native", "reference"))
        assert ours == wanted


def test_a_walk_worked_out_by_hand() -> None:
    #                  text 0    1    2    3
    similarity = torch.tensor([[9.0, 0.1, 0.3, 0.2], [0.5, 9.0, 0.9, 0.1], [0.8, 0.7, 9.0, 0.6], [0.2, 0.4, 0.0, 9.0]])
    # image 0 -> text 2 (0.3); text 2 -> of images 1 (0.9) and 3 (0.0) image 1; image 1 -> text 3
    assert walk("reference", similarity, s=1) == [0, 2, 1, 3]
    # the second: image 0 -> text 3 (0.2); text 3 -> of images 1 (0.1) and 2 (0.6) image 1
    assert walk("reference", similarity, s=2) == [0, 3, 1, 2]
    # group 0 is {0, 2}: image 0 -> text 3; text 3 -> image 2 (0.6)
    assert walk("reference", similarity, torch.tensor([0, 1, 0, 2]), s=1) == [0, 3, 2, 1]
    # image 3 is of text 2's group: text 2 -> image 1, image 1 -> text 3
    assert walk("reference", similarity, torch.tensor([0, 1, 2, 2]), s=1) == [0, 2, 1, 3]


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_equal_similarities_go_to_the_lower_index_and_nan_comes_last(impl: str) -> None:
    zeros = torch.zeros(6, 6)
    zeros[:, 1] = -0.0
    assert walk(impl, zeros, s=1) == [0, 1, 2, 3, 4, 5]
    assert walk(impl, zeros, s=3) == [0, 3, 4, 5, 2, 1]
    bad = torch.full((4, 4), -torch.inf)
    bad[0, 1] = bad[0, 2] = float("nan")
    assert walk(impl, bad, s=1)[1] == 3
    assert walk(impl, bad, s=2)[1] == 1


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("bad", ["nan", "inf", "zero"])
def test_any_features_give_a_permutation(impl: str, bad: str) -> None:
    image, text = torch.randn(2, 64, 8)
    if bad == "zero":
        image, text = torch.zeros(2, 64, 8)
    else:
        image[3:40] = float(bad)
        text[30:50, 2] = float(bad)
    groups = torch.arange(64) // 3
    order = semi_hard_order(image, text, groups, similar=3, start=5, impl=impl)  # type: ignore[arg-type]
    assert order.dtype == torch.int64
    assert order.sort().values.tolist() == list(range(64))


def test_partners_of_a_group_come_last() -> None:
    """One group of 20 and 10 others: where two of it are neighbours, nothing else is left."""
    torch.manual_seed(1)
    alike = torch.nn.functional.normalize(torch.randn(30, 16), dim=1)
    alike[:20] = alike[0]  # as similar as can be
    groups = torch.arange(30).clamp(min=19)
    order = groups[semi_hard_order(alike, alike, groups, similar=1)].tolist()
    meetings = [i for i in range(1, 30) if order[i] == order[i - 1]]
    assert len(meetings) >= 9
    assert all(len(set(order[i:])) == 1 for i in meetings)


def test_apart_keeps_a_group_out_of_the_samples_before() -> None:
    """Two pictures each of 32 things, in features that are nothing but the thing: neighbours alternate between two."""
    torch.manual_seed(2)
    thing = torch.arange(64) // 2
    features = torch.nn.functional.normalize(torch.randn(32, 8), dim=1)[thing]

    def meetings(order: Tensor, within: int) -> int:
        seen = thing[order].tolist()
        return sum(seen[i] in seen[max(0, i - within) : i] for i in range(64))

    near = semi_hard_order(features, features, thing, similar=1)
    far = semi_hard_order(features, features, thing, similar=1, apart=15)
    assert meetings(near, 1) <= 2, "only where nothing else is left"
    assert meetings(far, 15) <= 2
    assert meetings(near, 15) > 20


def test_float16_features_are_multiplied_in_float32_and_no_more_than_a_block_is_held() -> None:
    image, text = torch.randn(2, 100, 32).half()
    largest: list[int] = []

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if function in (torch.ops.aten.mm.default, torch.ops.aten.mm.out):
                largest.append(len(args[0]))
            return function(*args, **(kwargs or {}))

    with Products():
        found = similarities(image, text, rows=30)
    assert largest == [30, 30, 30, 10]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, image.float() @ text.float().T)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(similarities(image, text), found)


class OnGpu(Tensor):
    """On the CPU, but it says that it is on a GPU, and as from there a copy arrives when the stream is waited for."""

    pending: ClassVar[list[Callable[[], Any]]] = []

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return torch.device("cuda", 0)

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is Tensor.copy_ and (kwargs or {}).get("non_blocking"):
            target, source = (x.as_subclass(Tensor) for x in args)
            cls.pending.append(lambda: target.copy_(source))
            return target
        return super().__torch_function__(function, types, args, kwargs or {})


@pytest.mark.filterwarnings("ignore:User provided device_type of 'cuda'")
def test_from_a_gpu_blocks_come_to_pinned_memory_and_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    image, text = torch.randn(2, 100, 32)
    wanted, empty, pinned, waited = similarities(image, text, rows=30), torch.empty, [], []

    def unwritten(*shape: int, pin_memory: bool, **options: Any) -> Tensor:
        pinned.append(pin_memory)
        return empty(*shape, **options).fill_(torch.nan)

    class Stream:
        def synchronize(self) -> None:
            waited.append(len(OnGpu.pending))
            for copy in OnGpu.pending:
                copy()
            OnGpu.pending.clear()

    monkeypatch.setattr(torch, "empty", unwritten)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream())
    found = similarities(image.as_subclass(OnGpu), text.as_subclass(OnGpu), rows=30)
    monkeypatch.undo()
    assert (pinned, waited) == ([True], [4])
    assert type(found) is Tensor
    assert found.device.type == "cpu"
    torch.testing.assert_close(found, wanted)


@needs_native
def test_another_thread_runs_while_one_walks() -> None:
    similarity = torch.randn(5000, 5000)
    begun, done, turns = threading.Event(), threading.Event(), 0

    def other() -> None:
        begun.set()
        op.WALK(similarity, None, 3, 0, 1)
        done.set()

    thread = threading.Thread(target=other)
    thread.start()
    begun.wait()
    while not done.is_set():
        turns += 1
    thread.join()
    assert turns > 1000, "the walk holds Python's lock"


@needs_native
def test_the_op_is_what_torch_library_asks_for() -> None:
    groups = torch.arange(9) // 2
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(op.WALK, (torch.randn(9, 9), groups, 3, 4, 2), test_utils=tests)
    torch.library.opcheck(op.WALK, (torch.randn(9, 9), None, 3, 4, 1), test_utils=tests)


@needs_native
@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ((torch.randn(4, 3), None, 1, 0, 1), "similarity"),
        ((torch.randn(4, 4).double(), None, 1, 0, 1), "float32"),
        ((torch.randn(4, 4).T, None, 1, 0, 1), "contiguous"),
        ((torch.randn(4, 4), torch.arange(3), 1, 0, 1), "groups"),
        ((torch.randn(4, 4), None, 0, 0, 1), "at least 1"),
        ((torch.randn(4, 4), None, 1, 4, 1), "start"),
    ],
)
def test_the_native_kernel_checks_for_itself(arguments: tuple[Any, ...], told: str) -> None:
    with pytest.raises(RuntimeError, match=told):
        op.WALK(*arguments)


@pytest.mark.parametrize(
    ("change", "error", "told"),
    [
        ({"image_features": [1.0]}, TypeError, "image_features must be a tensor, got list"),
        ({"text_features": torch.ones(4, 3)}, ValueError, r"\(5, 3\) and text_features \(4, 3\)"),
        ({"image_features": torch.ones(5, 3).long()}, ValueError, "floating point, got torch.int64"),
        ({"image_features": torch.ones(0, 3), "text_features": torch.ones(0, 3)}, ValueError, "not empty"),
        ({"similar": 0}, ValueError, "similar must be at least 1, got 0"),
        ({"similar": 2.0}, TypeError, "similar must be an int, got float"),
        ({"start": 5}, ValueError, r"start must be in \[0, 4\], got 5"),
        ({"apart": 0}, ValueError, "apart must be at least 1"),
        ({"groups": torch.zeros(5)}, ValueError, r"groups must be int64 \(5,\), got torch.float32"),
        ({"groups": torch.zeros(4).long()}, ValueError, r"got torch.int64 \(4,\)"),
        ({"impl": "cuda"}, ValueError, "unknown implementation 'cuda'"),
    ],
)
def test_what_does_not_fit_is_named(change: dict[str, Any], error: type[Exception], told: str) -> None:
    arguments = {"image_features": torch.ones(5, 3), "text_features": torch.ones(5, 3), **change}
    with pytest.raises(error, match=told):
        semi_hard_order(**arguments)


def test_a_rank_beyond_what_is_left_is_the_last() -> None:
    features = torch.randn(7, 4)
    far = semi_hard_order(features, features, similar=100)
    assert far.tolist() == by_hand(similarities(features, features), None, 6, 0, 1)


@needs_native
def test_without_the_extension_the_reference_runs_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    features = torch.randn(12, 4)
    wanted = semi_hard_order(features, features)
    monkeypatch.setattr(native, "status", lambda: native.NativeStatus(loaded=False, reason="no compiler (install g++)"))
    native.announce.cache_clear()
    with pytest.warns(RuntimeWarning, match="semi_hard_order runs in plain PyTorch on cpu: no compiler"):
        assert torch.equal(semi_hard_order(features, features), wanted)
    with pytest.raises(ValueError, match="impl='native': no compiler"):
        semi_hard_order(features, features, impl="native")
    native.announce.cache_clear()


def test_more_than_there_is() -> None:
    image, text = torch.randn(2, 5, 4).unbind()
    most = semi_hard_order(image, text, None, similar=5, apart=5)
    assert torch.equal(semi_hard_order(image, text, None, similar=10**30, apart=10**30), most)
