"""The suite's attention cases, and with them how any case is solved: who is measured, and why others are not."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

from suite import results  # noqa: E402
from suite.clock import Clock, peak_memory, take_turns  # noqa: E402
from suite.jobs import attention  # noqa: E402
from suite.jobs import attention_peers as peers  # noqa: E402
from suite.problem import Budget, Implementation, Outputs, Problem, Unavailable, solve  # noqa: E402
from suite.results import Results, ResultsError, Row  # noqa: E402

sys.path.remove(str(BENCHMARKS))

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SIZE = (2, 3, 5, 7, 16)  # B, H, S, P, D
EVERY = ("forward", "backward", "both")


def problem(what: str, dtype: str = "fp32", *others: Implementation, size: tuple[int, ...] = SIZE) -> Problem:
    torch.manual_seed(0)
    found = attention.problem("tiny", what, dtype, size, CPU)  # type: ignore[arg-type]
    return replace(found, implementations=list(others)) if others else found


def solved(given: Problem, rounds: int = 2) -> dict[tuple[str, str], Row]:
    rows = solve(given, Clock(CPU), Budget(rounds, 1.0))
    found = {(row.implementation, row.job.way): row for row in rows}
    assert len(found) == len(rows) == len(given.ways) * len(given.implementations)
    assert not any("\n" in row.reason for row in rows)
    return found


def peer(solver: Callable[..., Outputs], **more: Any) -> Implementation:
    return Implementation("peer", lambda: solver, **more)


SDPA = Implementation("sdpa", lambda: peers.sdpa)


@pytest.mark.parametrize("what", attention.WHAT)
def test_who_can_run_here_is_measured_and_who_cannot_says_why(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))  # seconds less
    found = solved(problem(what))
    running = {"crossmask", "eager", "compile"} | ({"sdpa"} if what == "output" else {"head by head", "two calls"})
    for name in running:
        for way in EVERY:
            row = found[name, way]
            assert row.status == "measured", (name, way, row.reason)
            assert len(row.seconds) == 2
            assert row.error is not None
            assert row.tolerance is not None
            assert 0 <= row.error <= row.tolerance < 1e-4
            assert not row.missing
            assert (row.peak_bytes is None) == (way == "backward")
            assert row.ours == (name == "crossmask")
            assert row.predicted_us is None
    for (name, _), row in found.items():
        if name.startswith(("flash-attn", "xformers")):
            assert (row.status, row.reason) == ("skipped", f"{name} runs on GPUs alone")
    if what == "output":
        assert found["flex", "forward"].status == "measured"
        assert found["flex", "backward"].reason == found["flex", "both"].reason == "has no backward here"
    else:
        assert found["flex", "forward"].reason == "PyTorch's FlexAttention has no auxiliary outputs on a CPU"


@pytest.mark.parametrize("what", attention.WHAT)
def test_half_precision_is_held_to_what_plain_pytorch_reaches(what: str) -> None:
    several = [each for each in problem(what).implementations if each.name not in ("compile", "flex")]
    found = solved(problem(what, "bf16", *several, size=(2, 2, 33, 57, 32)))
    measured = {name for (name, _), row in found.items() if row.status == "measured"}
    assert measured == {each.name for each in several} - {"flash-attn", "flash-attn-4", "xformers"}
    assert not any(row.status in ("wrong", "failed") for row in found.values())


def module(monkeypatch: pytest.MonkeyPatch, name: str, **functions: Any) -> None:
    made = ModuleType(name)
    vars(made).update(functions)
    monkeypatch.setitem(sys.modules, name, made)


def with_lse(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """As the packages do it: (B, length, H, D) in and out, lse (B, H, S)."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    lse = (q.float() @ k.float().mT * q.shape[-1] ** -0.5).logsumexp(-1)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2), lse


def test_packages_are_called_as_they_want_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-ins with their layouts and results: FlashAttention-2's log-sum-exp has no gradient, 4's has one."""

    def flash(q: Tensor, k: Tensor, v: Tensor, return_attn_probs: bool = False) -> Any:
        output, lse = with_lse(q, k, v)
        return (output, lse.detach(), None) if return_attn_probs else output

    def flash4(q: Tensor, k: Tensor, v: Tensor, return_lse: bool = False) -> tuple[Tensor, Tensor | None]:
        output, lse = with_lse(q, k, v)
        return output, lse if return_lse else None

    module(monkeypatch, "flash_attn", flash_attn_func=flash)
    module(monkeypatch, "flash_attn.cute", flash_attn_func=flash4)
    module(monkeypatch, "xformers")
    module(monkeypatch, "xformers.ops", memory_efficient_attention=lambda q, k, v: with_lse(q, k, v)[0])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for what in attention.WHAT:
        packages = [
            each
            for each in attention.implementations(what, CUDA, torch.bfloat16)
            if each.name in ("flash-attn", "flash-attn-4", "xformers")
        ]
        assert len(packages) == (3 if what == "output" else 2)
        assert all(each.backward for each in packages)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        for row in solved(problem(what, "bf16", *packages, size=(2, 2, 33, 57, 32))).values():
            assert row.status == "measured", (row.job.title, row.implementation, row.reason)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


def test_packages_that_cannot_run_say_why_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("flash_attn", "flash_attn.cute", "xformers", "xformers.ops"):
        monkeypatch.setitem(sys.modules, name, None)  # as if it were not installed
    monkeypatch.setattr(torch.version, "hip", None)

    def reason(each: Implementation) -> str:
        try:
            each.make()
        except Unavailable as said:
            return str(said)
        return ""

    def why(dtype: torch.dtype, capability: tuple[int, int]) -> dict[str, str]:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        said = {each.name: reason(each) for each in attention.implementations("output", CUDA, dtype)}
        return {name: why for name, why in said.items() if why}

    assert why(torch.float16, (8, 0)) == {
        name: f"{name} is not installed: pip install {name}" for name in ("flash-attn", "flash-attn-4", "xformers")
    }
    assert why(torch.float32, (8, 0)) == {
        "sdpa flash": "sdpa's flash backend takes fp16 and bf16 alone",
        "sdpa cudnn": "sdpa's cudnn backend takes fp16 and bf16 alone",
        "flash-attn": "flash-attn takes fp16 and bf16 alone",
        "flash-attn-4": "flash-attn-4 takes fp16 and bf16 alone",
        "xformers": "xformers is not installed: pip install xformers",
    }
    assert "compute capability 8.0" in why(torch.bfloat16, (7, 5))["flash-attn-4"]


def test_who_is_wrong_has_no_time_and_the_others_have() -> None:
    wrong = peer(lambda q, k, v: {"output": 1.001 * peers.sdpa(q, k, v)["output"]})
    found = solved(problem("output", "fp32", wrong, SDPA))
    for way in EVERY:
        row = found["peer", way]
        assert (row.status, row.seconds) == ("wrong", ())
        assert "is off by 0.001, allowed are" in row.reason
        assert row.error == pytest.approx(1e-3, rel=0.01)
        assert found["sdpa", way].status == "measured"


@pytest.mark.parametrize("name", attention.STATISTICS)
def test_a_gradient_that_one_statistic_lacks_is_found(name: str) -> None:
    def constant(q: Tensor, k: Tensor, v: Tensor) -> Outputs:
        found = peers.eager_statistics(q, k, v)
        return found | {name: found[name].detach() + 0 * found[name]}

    found = solved(problem("all statistics", "fp32", peer(constant), size=(1, 12, 30, 257, 16)))
    assert found["peer", "forward"].status == "measured"
    assert found["peer", "both"].status == "wrong"
    assert found["peer", "both"].reason.startswith("gradient")
    assert found["peer", "both"].error > 1e-2  # also where half precision allows some percent


def test_what_is_not_finite_or_misshapen_is_not_right() -> None:
    def spoiled(q: Tensor, k: Tensor, v: Tensor) -> Outputs:
        output = peers.sdpa(q, k, v)["output"].clone()
        output[0, 0, 0, 0] = torch.nan
        return {"output": output}

    assert solved(problem("output", "fp32", peer(spoiled)))["peer", "forward"].status == "wrong"
    turned = peer(lambda q, k, v: {"output": peers.sdpa(q, k, v)["output"].transpose(1, 2)})
    row = solved(problem("output", "fp32", turned))["peer", "forward"]
    assert row.status == "failed"
    assert "gives shape (1, 5, 3, 16), not (1, 3, 5, 16)" in row.reason


@pytest.mark.parametrize(
    ("error", "status"),
    [(RuntimeError, "failed"), (torch.OutOfMemoryError, "out of memory"), (MemoryError, "out of memory")],
)
@pytest.mark.parametrize("after", [0, 4], ids=["at once", "while others take turns"])
def test_who_raises_is_listed_with_its_error_and_the_others_are_measured(
    error: type[Exception], status: str, after: int
) -> None:
    left = [after]

    def raising(q: Tensor, k: Tensor, v: Tensor) -> Outputs:
        left[0] -= 1
        if left[0] < 0:
            raise error("\nno kernel image\nis available")
        return peers.sdpa(q, k, v)

    found = solved(problem("output", "fp32", peer(raising), SDPA), rounds=3)
    for way in EVERY:
        row = found["peer", way]
        assert (row.status, row.seconds) == (status, ())
        assert row.reason == f"{error.__name__}: no kernel image"
        assert len(found["sdpa", way].seconds) == 3


def test_outputs_may_be_missing_where_a_note_says_so() -> None:
    def part(q: Tensor, k: Tensor, v: Tensor) -> Outputs:
        found = peers.eager_statistics(q, k, v)
        return {name: found[name] for name in ("output", "lse")}

    row = solved(problem("all statistics", "fp32", peer(part, note="lse alone")))["peer", "both"]
    assert (row.status, row.reason) == ("measured", "lse alone")
    assert row.missing == ("entropy", "key_attention", "max_probability", "query_attention")
    row = solved(problem("all statistics", "fp32", peer(part)))["peer", "both"]
    assert row.status == "failed"
    assert "does not give entropy, key_attention" in row.reason


def test_the_order_of_the_inputs_decides_nothing_about_the_first_sample() -> None:
    """Held to the reference on one sample alone: what is wrong in it is found, sums over samples too."""

    def mixed(q: Tensor, k: Tensor, v: Tensor) -> Outputs:
        found = peers.eager_statistics(q, k, v)
        key = found["key_attention"]
        return found | {"key_attention": key.mean(0, keepdim=True).expand_as(key)}

    row = solved(problem("all statistics", "fp32", peer(mixed)))["peer", "forward"]
    assert (row.status, row.reason[:13]) == ("wrong", "key_attention")


def test_bytes_and_flops_are_those_of_the_algorithm() -> None:
    queries, keys, rows = 2 * 3 * 5 * 16, 2 * 3 * 7 * 16, 2 * 3 * 5  # elements
    product = 2 * (2 * 3) * 5 * 7 * 16
    for dtype, size in (("fp32", 4), ("bf16", 2)):
        found = solved(problem("output", dtype, SDPA))
        forward, backward, both = (found["sdpa", way] for way in EVERY)
        assert forward.needed_bytes == size * (2 * queries + 2 * keys)
        assert backward.needed_bytes == size * (4 * queries + 4 * keys) + 4 * rows
        assert both.needed_bytes == forward.needed_bytes + backward.needed_bytes
        assert [forward.flops, backward.flops, both.flops] == [2 * product, 5 * product, 7 * product]
    plain = attention.work(SIZE, "bf16", ())
    told = attention.work(SIZE, "bf16", attention.STATISTICS)
    statistics = 4 * (3 * rows + 2 * 5 + 2 * 7)
    assert told["forward"].bytes - plain["forward"].bytes == statistics
    assert told["backward"].bytes - plain["backward"].bytes == statistics


def test_a_prediction_is_of_our_launches() -> None:
    size = (64, 12, 30, 257, 64)
    for told in attention.WHAT.values():
        found = {way: attention.predicted(size, "bf16", told, "h100", way) for way in EVERY}
        for least, launches in found.values():
            assert 1e-6 < least <= launches < 1e-2
        for one, two, sum_of in zip(*(found[way] for way in EVERY), strict=True):
            assert sum_of == pytest.approx(one + two)
    assert found["forward"] > attention.predicted(size, "bf16", (), "h100", "forward")
    assert found["forward"] > attention.predicted(size, "bf16", attention.STATISTICS, "b200", "forward")


def test_rounds_are_shared_and_orders_differ() -> None:
    ran: list[str] = []
    runs = {name: functools.partial(lambda name: [lambda: ran.append(name)], name) for name in "abcd"}
    found = take_turns(Clock(CPU), runs, 20, 10.0)
    rounds = [tuple(ran[i : i + 4]) for i in range(0, len(ran), 4)]
    assert len(rounds) == 20
    assert all(sorted(each) == list("abcd") for each in rounds)
    assert len(set(rounds)) > 8
    assert {each[0] for each in rounds} == set("abcd")
    assert all(len(times) == 20 for times in found.values())
    assert len(take_turns(Clock(CPU), runs, 20, 0.0, at_least=3)["a"]) == 3


def test_memory_that_is_kept_for_the_next_call_counts() -> None:
    kept = threading.local()

    def call(size: int = 2**20) -> Tensor:
        if not hasattr(kept, "memory"):
            kept.memory = torch.empty(size, dtype=torch.int8)
        passing = torch.empty(size, dtype=torch.int8)
        del passing
        return torch.empty(size // 2, dtype=torch.int8)

    call()
    assert [peak_memory(call, CPU) for _ in range(2)] == [2 * 2**20] * 2


def test_results_come_back_as_they_were_written(tmp_path: Path) -> None:
    rows = tuple(solved(problem("output", "fp32", SDPA, *problem("output").implementations[-1:])).values())
    rows = tuple(replace(row, seconds=tuple(round(x, 9) for x in row.seconds)) for row in rows)
    assert {row.status for row in rows} == {"measured", "skipped"}
    path = tmp_path / "new" / "r.json"
    results.write(Results({"device": "cpu"}, None, rows), path)
    assert results.read(path) == Results({"device": "cpu"}, None, rows)
    assert len(path.with_suffix(".csv").read_text().splitlines()) == 1 + len(rows)

    whole = json.loads(path.read_text())

    def refused(text: str) -> str:
        path.write_text(text)
        with pytest.raises(ResultsError) as caught:
            results.read(path)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "is not JSON" in refused(path.read_text()[:-20])
    assert "format" in refused(json.dumps(whole | {"format": 99}))
    for damage in ({"status": "skipped"}, {"seconds": [0.0]}, {"op": 3}, {"status": "fine"}, {"colour": "red"}):
        first = whole["rows"][0] | damage
        assert "is damaged" in refused(json.dumps(whole | {"rows": [first, *whole["rows"][1:]]})), damage
    path.unlink()
    with pytest.raises(ResultsError, match="No such file or directory; `make bench` writes one"):
        results.read(path)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_its_measurement_is_one_line_and_2(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "benchmarks/bench_suite.py"]
    command += ["--device", "cuda", "--results", str(tmp_path / "r.json")]
    done = subprocess.run(command, cwd=BENCHMARKS.parent, capture_output=True, text=True, timeout=240)
    assert done.returncode == 2
    said = (done.stdout + done.stderr).strip().splitlines()
    assert len(said) == 1
    assert "A GPU is needed" in said[0]
    assert not list(tmp_path.iterdir())
