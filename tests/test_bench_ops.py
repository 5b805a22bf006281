"""The suite's ops at small sizes: what is right is measured, what is wrong is not, and what a job needs is counted."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
from suite.clock import Clock  # noqa: E402
from suite.jobs import (  # noqa: E402
    contrastive,
    cross_entropy,
    ema,
    grouping,
    linear,
    selection,
    similarity,
)
from suite.problem import Budget, Implementation, Outputs, Problem, solve  # noqa: E402
from suite.results import Row  # noqa: E402

sys.path.remove(str(BENCHMARKS))

CPU = torch.device("cpu")
TENSORS = ((3, 5), (700,), (7, 11), (1,), (33, 3))
NUMBER = 15 + 700 + 77 + 1 + 99
PROBLEMS: dict[str, tuple[Callable[[], Problem], tuple[str, ...]]] = {
    **{
        f"max_similarity {dtype}": (
            lambda d=dtype: similarity.problem("tiny", (2, 7, 5, 16), d, CPU),  # type: ignore[misc]
            similarity.NAMES,
        )
        for dtype in ("fp32", "bf16")
    },
    **{
        f"soft_contrastive {dtype}": (
            lambda d=dtype: contrastive.problem(4, 96, 16, d, CPU),  # type: ignore[misc]
            contrastive.NAMES,
        )
        for dtype in ("fp32", "bf16")
    },
    **{
        f"soft_cross_entropy {what} {dtype}": (
            lambda w=what, d=dtype: cross_entropy.problem(w, 6, 130, 16, d, CPU),  # type: ignore[misc]
            cross_entropy.names(what),
        )
        for what in cross_entropy.WHATS
        for dtype in ("fp32", "bf16")
    },
    "semi_hard_order": (lambda: grouping.problem(40, CPU), grouping.NAMES),
    "linear": (lambda: linear.problem("tiny", (130, 130, 130), CPU), linear.NAMES),  # large enough for oneDNN
    **{
        f"topk_mask {what}": (
            lambda w=what: selection.problem("tiny", 9, 23, w, CPU),  # type: ignore[misc]
            selection.NAMES,
        )
        for what in ("", selection.VARIED, selection.MEANS)
    },
    **{
        f"ema_update_ {what}": (lambda w=what: ema.problem("tiny", TENSORS, w, CPU), ema.NAMES[what])  # type: ignore[misc]
        for what in ema.WHATS
    },
}
EVERY = pytest.mark.parametrize("name", PROBLEMS)
OPTIONAL = {"liger": "liger_kernel", "ema-pytorch": "ema_pytorch"}


@pytest.fixture(autouse=True)
def _uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """The suite itself compiles; here a minute's compiling would tell nothing of sizes and checks."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)


def measured(problem: Problem, *implementations: Implementation) -> list[Row]:
    if implementations:
        problem.implementations = implementations
    return solve(problem, Clock(CPU), Budget(2, 0.0))


def of_ours(problem: Problem, change: Callable[[Outputs], Outputs]) -> Implementation:
    """Ours, with something done to what it gives."""
    solver = next(each for each in problem.implementations if each.ours).make()
    return Implementation("bad", lambda: lambda *inputs: change(solver(*inputs)))


@EVERY
def test_ours_and_its_peers_are_measured(name: str) -> None:
    build, names = PROBLEMS[name]
    problem = build()
    rows = measured(problem)
    assert [row.implementation for row in rows] == [*names] * len(problem.ways)
    for row in rows:
        said = (row.implementation, row.job.way, row.status, row.reason)
        needs = OPTIONAL.get(row.implementation)
        if row.implementation == "liger" or (needs and importlib.util.find_spec(needs) is None):
            assert row.status == "skipped", said
            continue
        assert row.status == "measured", said
        assert len(row.seconds) == 2
        assert row.ours == (row.implementation == "crossmask")
        assert not row.missing
        assert row.needed_bytes > 0
        assert row.tolerance is not None
        assert row.tolerance < 0.05, said  # or plain PyTorch, which is the measure, is wrong itself


def spoiled(x: Tensor) -> Tensor:
    """One element is another."""
    if x.is_floating_point():
        change = torch.zeros_like(x.detach())
        change.view(-1)[0] = 0.1 * x.detach().abs().max()
        return x + change
    return x.flip(-1) if x.dtype == torch.int64 else torch.cat((~x[:, :1], x[:, 1:]), 1)


@EVERY
def test_a_wrong_element_is_wrong(name: str) -> None:
    problem = PROBLEMS[name][0]()
    rows = measured(problem, of_ours(problem, lambda found: {key: spoiled(x) for key, x in found.items()}))
    assert {(row.job.way, row.status) for row in rows} == {(way, "wrong") for way in problem.ways}


@pytest.mark.parametrize("name", [name for name, (build, _) in PROBLEMS.items() if build().upstream])
def test_a_wrong_gradient_is_wrong(name: str) -> None:
    problem = PROBLEMS[name][0]()
    rows = measured(problem, of_ours(problem, lambda found: {k: x + 0.1 * (x - x.detach()) for k, x in found.items()}))
    assert [(row.job.way, row.status) for row in rows] == [
        ("forward", "measured"),
        ("backward", "wrong"),
        ("both", "wrong"),
    ]


# ---- the moving average, which changes its input


@pytest.mark.parametrize("what", ema.WHATS)
@pytest.mark.parametrize("times", [0, 2])
def test_as_many_updates_as_one(what: str, times: int) -> None:
    problem = ema.problem("tiny", TENSORS, what, CPU)
    solver = next(each for each in problem.implementations if each.ours).make()

    def others(*inputs: Tensor) -> Outputs:
        found = {"teacher": problem.inputs[0]} | ({"copy": problem.inputs[0].bfloat16()} if "copy" in what else {})
        for _ in range(times):
            found = solver(*inputs)
        return found

    (row,) = measured(problem, Implementation("others", lambda: others))
    assert row.status == "wrong", row


def test_a_copy_that_is_not_written_is_wrong() -> None:
    problem = ema.problem("tiny", TENSORS, ema.COPIED, CPU)
    (row,) = measured(problem, of_ours(problem, lambda found: found | {"copy": torch.zeros_like(found["copy"])}))
    assert row.status == "wrong"
    assert row.reason.startswith("copy ")


def test_the_last_tensor_counts() -> None:
    weights, student = (ema.Weights(TENSORS, torch.float32, CPU, std) for std in (0.02, 1.0))
    memory = ema.Memory(weights, student, None, weights.buffer.clone())
    problem = ema.problem("tiny", TENSORS, "", CPU)
    problem.inputs, problem.reset = (weights.rows, student.rows), memory.reset
    but_the_last = memory.updated(lambda teacher, student: ema.foreach(teacher[:-1], student[:-1]))
    rows = measured(
        problem,
        Implementation("but the last", lambda: but_the_last),
        Implementation("all", lambda: memory.updated(ema.foreach)),
    )
    assert [row.status for row in rows] == ["wrong", "measured"]


def test_libraries_average_the_very_memory() -> None:
    problem = ema.problem("tiny", TENSORS, "", CPU)
    teacher, student = (x.clone() for x in problem.inputs)
    assert problem.reset is not None
    for each in problem.implementations:
        if each.name == "ema-pytorch" and importlib.util.find_spec("ema_pytorch") is None:
            continue
        update = each.make()
        problem.reset()
        assert torch.equal(problem.inputs[0], teacher)
        update(*problem.inputs)
        torch.testing.assert_close(problem.inputs[0], teacher.lerp(student, 1 - ema.DECAY))


# ---- what is needed, and predicted


def needs(problem: Problem) -> dict[str, tuple[float, float]]:
    return {way: (work.bytes - work.kept, sum(work.flops.values())) for way, work in problem.work.items()}


def test_what_a_maximum_similarity_needs() -> None:
    """Two samples of 7 patches and 5 words of 16 float32: tokens and mask, score (4 bytes) and word (8) of a patch."""
    image, text, patches = 2 * 7 * 16 * 4, 2 * 5 * 16 * 4, 2 * 7
    product = 2 * 2 * 7 * 5 * 16
    assert needs(PROBLEMS["max_similarity fp32"][0]()) == {
        "forward": (image + text + 2 * 5 + 12 * patches, product),
        "backward": (2 * image + 2 * text + 12 * patches, product),
    }


def test_what_a_contrast_needs() -> None:
    """4 queries, 4 + 96 keys, width 16, float32: features and int64 groups, tau, five float32 results of a row; of the
    teacher's keys no gradient."""
    features, groups = 4 * 16 * (4 + 4 + 4 + 96), 8 * (4 + 4 + 96)
    product = 2 * 4 * 100 * 16
    assert needs(PROBLEMS["soft_contrastive fp32"][0]()) == {
        "forward": (features + groups + 4 + 5 * 4 * 4, 2 * product),
        "backward": (features + groups + 4 + 4 * 4 * 4 + 4 * 4 * 16, product),
    }


def test_what_a_vocabulary_needs() -> None:
    product = 2 * 6 * 130 * 16
    for what, teacher in zip(cross_entropy.WHATS, (False, True), strict=True):
        found = needs(PROBLEMS[f"soft_cross_entropy {what} fp32"][0]())
        assert (found["forward"][1], found["backward"][1]) == ((1 + teacher) * product, 2 * product)
        layer = 4 * (6 * 16 + 130 * 16 + 130)
        assert found["forward"][0] == layer * (1 + teacher) + 8 * 6 + 6 * (4 + 8 + 8 + 8 * teacher)


@pytest.mark.parametrize(("what", "each"), list(zip(ema.WHATS, (12, 14, 10, 6), strict=True)))
def test_what_an_average_needs(what: str, each: int) -> None:
    assert needs(ema.problem("tiny", TENSORS, what, CPU)) == {"forward": (each * NUMBER, 0)}


def test_what_a_linear_layer_needs() -> None:
    square, row = 4 * 130 * 130, 4 * 130
    assert needs(PROBLEMS["linear"][0]()) == {
        "forward": (3 * square + row, 2 * 130**3),
        "backward": (5 * square + row, 4 * 130**3),
    }


@EVERY
def test_predictions_are_ordered(name: str) -> None:
    problem = PROBLEMS[name][0]()
    if problem.seconds is None:
        assert problem.op in ("linear", "semi_hard_order")  # PyTorch's on a GPU; on the host
        return
    found = {way: problem.seconds("h100", way) for way in problem.ways}
    assert all(0 < least <= launches for least, launches in found.values())
    if problem.upstream:
        sums = tuple(a + b for a, b in zip(found["forward"], found["backward"], strict=True))
        assert found["both"] == pytest.approx(sums)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_cases_are_told_apart(device: str) -> None:
    modules = (contrastive, cross_entropy, ema, grouping, linear, selection, similarity)
    found = [case for module in modules for case in module.cases(device)]
    assert len({case.name for case in found}) == len(found)
    assert all(case.implementations[0] == "crossmask" for case in found)
    assert ("linear" in {case.op for case in found}) == (device == "cpu")
