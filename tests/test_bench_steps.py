"""Whole steps of the benchmark suite: parts that sum up, losses that are compared, and nothing that ends the suite."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from crossmask.kernels.linear import api as products

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
from suite.results import Job, Row, read  # noqa: E402
from suite.steps import RECIPES, STEPS, one, process, recipes, trace, turns  # noqa: E402
from suite.steps.planned import PENDING, Options, Planned  # noqa: E402
from suite.steps.subjects import SUBJECTS  # noqa: E402

sys.path.remove(str(ROOT / "benchmarks"))

CPU = Options("cpu", 2, True)
HERE = torch.device("cpu")
JOB = Job("step", "a model", "batch 2", "fp32", "", "step")
ONE, OTHER = Planned(JOB, "one", True, 2), Planned(JOB, "other", False, 2)


@pytest.fixture(scope="module", autouse=True)
def only_what_is_made_here() -> Iterator[None]:
    """Tensors are looked for among all objects: not among the million that the imports have made, for time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


# ---- the entries


def test_every_entry_has_what_measures_it() -> None:
    assert list(STEPS) == list(SUBJECTS)
    small = {path.stem for path in (ROOT / "recipes").glob("*.yaml") if path.stem.endswith(("-emoji", "-scenes"))}
    assert set(RECIPES) == small


@pytest.mark.parametrize("name", SUBJECTS)
def test_rows_are_known_before_and_ours_comes_with_its_peers(name: str) -> None:
    planned = SUBJECTS[name].planned(CPU)
    assert len({(each.job, each.implementation) for each in planned}) == len(planned)
    for job in {each.job for each in planned}:
        assert next(each.implementation for each in planned if each.ours and each.job == job) == turns.OURS
    assert all(each.samples > 0 for each in planned)


def test_a_recipe_is_a_ranks_share_with_all_objectives_on() -> None:
    for name in RECIPES:
        recipe = recipes.RecipeStep(name).recipe()
        assert recipe.training.batch_size == 128
        assert recipe.objectives.fusion_start == 0
        assert recipe.objectives.itc.queue_initial == ("random" if recipe.objectives.itc.queue_length else "empty")
    (planned,) = SUBJECTS["recipe sycoca-emoji"].planned(CPU)
    assert planned.job == Job("step", "sycoca-emoji", "batch 128, one rank", "bf16", "", "step")


# ---- recipes

EXPECTED = {
    "syncmask-emoji": {"fusion", "teacher", "decoders", "masks", "queue", "objectives"},
    "sycoca-emoji": {"decoders", "masks", "objectives"},
    "recognition-emoji": {"fusion", "teacher", "objectives"},
}


@pytest.mark.parametrize("name", EXPECTED)
def test_a_recipes_parts_sum_to_its_steps(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    traces = 2 if name == "recognition-emoji" else 1
    for constant, number in {"WARM_UP": 1, "TRACED": traces, "AT_LEAST": 3}.items():
        monkeypatch.setattr(recipes, constant, number)
    monkeypatch.setattr(recipes, "QUICK_SECONDS", 0.0)
    found: list[trace.Traced] = []
    called = recipes.trace
    monkeypatch.setattr(recipes, "trace", lambda *given: found.append(called(*given)) or found[-1])
    (row,) = recipes.RecipeStep(name, ("training.batch_size=24",)).measure(CPU)
    assert (row.status, row.samples, len(row.seconds)) == ("measured", 12, 3)
    assert row.peak_bytes is not None
    assert row.peak_bytes > 1e6  # little beside what this process had before
    assert len(found) == traces
    assert sum(row.parts.values()) == pytest.approx(sum(each.seconds for each in found) / traces, rel=1e-6)
    common = {"data", "image tower", "text tower", "optimizer", "average", trace.REST}
    assert row.parts.keys() - {"queue"} == (common | EXPECTED[name]) - {"queue"}
    assert all(seconds > 0 for seconds in row.parts.values())
    assert row.parts[trace.REST] < 0.4 * sum(row.parts.values())
    image = found[0].parts["image tower"]
    assert min(image) > 0, "forward and backward"


def test_a_recipe_that_raises_has_the_errors_first_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def no_room(*given: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore")

    monkeypatch.setattr("crossmask.engine.data.load_data", no_room)
    (row,) = one.collect(SUBJECTS["recipe albef-emoji"], CPU, tmp_path / "rows.json")
    assert (row.status, row.seconds) == ("out of memory", ())
    assert row.reason == "OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB"
    assert read(tmp_path / "rows.json").rows == (row,)

    monkeypatch.setattr("crossmask.engine.data.load_data", lambda recipe: 1 / 0)
    (row,) = one.collect(SUBJECTS["recipe albef-emoji"], CPU, tmp_path / "rows.json")
    assert (row.status, row.reason) == ("failed", "ZeroDivisionError: division by zero")


# ---- a process of its own


class Half:
    """Of two rows the first one; then what it is told to do."""

    def __init__(self, then: Any) -> None:
        self.then = then

    def planned(self, options: Options) -> list[Planned]:
        return [ONE, OTHER]

    def measure(self, options: Options) -> Iterator[Row]:
        yield ONE.row("measured", seconds=(0.5, 0.25), parts={"data": 0.25, trace.REST: 0.125})
        self.then()


def test_rows_come_back_through_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    def killed() -> None:
        raise KeyboardInterrupt

    def ended(command: list[str], environment: dict[str, str], log: Path, limit: float) -> int:
        asked.append(command)
        assert "RANK" not in environment
        assert environment["CUDA_VISIBLE_DEVICES"] == ""
        log.write_text("Killed\n")
        with pytest.raises(KeyboardInterrupt):
            one.collect(Half(killed), CPU, Path(command[command.index("--results") + 1]))
        return -signal.SIGKILL

    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(process, "ended", ended)
    rows = STEPS["coca"](CPU)
    assert rows[0] == ONE.row("measured", seconds=(0.5, 0.25), parts={"data": 0.25, trace.REST: 0.125})
    assert rows[1] == OTHER.row("out of memory", "its process was killed, as a system does that runs out of memory")
    assert asked[0][1:5] == ["-m", "suite.steps.one", "coca", "--device"]
    assert asked[0][-5:] == ["--rounds", "2", "--quick", "--parent", str(os.getpid())]


def test_what_raises_leaves_the_rows_before_it(tmp_path: Path) -> None:
    rows = one.collect(Half(lambda: 1 / 0), CPU, tmp_path / "rows.json")
    assert [row.status for row in rows] == ["measured", "failed"]
    rows = one.collect(Half(lambda: None), CPU, tmp_path / "rows.json")
    assert (rows[1].status, rows[1].reason) == ("failed", PENDING)


def test_a_process_that_cannot_begin_is_a_row() -> None:
    (row,) = process.in_own_process("no such thing", CPU)
    assert row.status == "failed"
    assert "ended with 2" in row.reason
    assert "invalid choice: 'no such thing'" in row.reason


def test_a_process_that_hangs_is_ended_with_all_that_it_started(tmp_path: Path) -> None:
    script = "import subprocess, sys; print(subprocess.Popen(['sleep', '60']).pid, flush=True); sys.stdin.read(); "
    script += "import time; time.sleep(60)"
    start = time.monotonic()
    assert process.ended([sys.executable, "-c", script], {}, tmp_path / "log", 1.0) is None
    assert time.monotonic() - start < 20
    assert process.why(None, "", 1.0) == ("failed", "did not end within 1 s")
    started = Path("/proc", (tmp_path / "log").read_text().strip(), "cmdline")
    for _ in range(50):
        if not started.exists() or not started.read_bytes():
            return
        time.sleep(0.1)
    pytest.fail("it lives")


def test_a_process_ends_with_the_one_that_started_it(tmp_path: Path) -> None:
    """Which is killed itself, and can end nothing any more."""
    child = "from suite.steps.process import end_with; import os, sys, time, subprocess; end_with(int(sys.argv[1])); "
    child += "other = subprocess.Popen(['sleep', '60']); print(os.getpid(), other.pid, flush=True); time.sleep(60)"
    parent = "import os, subprocess, sys, time; "
    parent += f"subprocess.Popen([sys.executable, '-c', {child!r}, str(os.getpid())], start_new_session=True); "
    parent += "time.sleep(60)"
    command = [sys.executable, "-c", parent]
    running = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT / "benchmarks")
    assert running.stdout is not None
    children = [Path("/proc", pid, "cmdline") for pid in running.stdout.readline().split()]
    assert len(children) == 2
    running.kill()
    running.wait()
    for _ in range(100):
        if not any(each.exists() and each.read_bytes() for each in children):
            return
        time.sleep(0.1)
    pytest.fail("they live")


# ---- taking turns


class Toy:
    """Holds 4 MB, and takes 8 MB for a while in each step; learns nothing."""

    def __init__(self, loss: float) -> None:
        self.weight, self.loss, self.steps = torch.ones(1_000_000), loss, 0

    def __call__(self) -> dict[str, float]:
        self.steps += 1
        torch.empty(2_000_000).fill_(1.0)
        return {"loss": self.loss}


def toy(planned: Planned, loss: float = 1.0) -> turns.Side:
    return turns.Side(planned, lambda: (Toy(loss), nullcontext))


def test_sides_take_turns_and_memory_is_each_ones_own() -> None:
    rows = list(turns.in_turns([toy(OTHER), toy(ONE, 1.01)], HERE, 3, (0.02,)))
    assert [(row.implementation, row.status, len(row.seconds)) for row in rows] == [
        ("other", "measured", 3),
        ("one", "measured", 3),
    ]
    assert [row.peak_bytes for row in rows] == pytest.approx([12_000_000] * 2, rel=0.02)
    assert rows[1].error == pytest.approx(0.01)
    assert rows[0].error is None


def test_what_sides_share_is_held_by_each() -> None:
    mine = Toy(1.0)
    first = turns.Side(ONE, lambda: (Toy(1.0), nullcontext))
    again = turns.Side(OTHER, lambda: (mine, nullcontext), shares=first)
    rows = list(turns.in_turns([first, again], HERE, 1))
    assert [row.peak_bytes for row in rows] == pytest.approx([12_000_000] * 2, rel=0.02)


def test_losses_that_do_not_agree_have_no_time() -> None:
    rows = list(turns.in_turns([toy(OTHER), toy(ONE, 1.03)], HERE, 2, (0.02,)))
    assert (rows[0].implementation, rows[0].status, rows[0].seconds) == ("one", "wrong", ())
    assert rows[0].reason == "its losses are off by 0.03, allowed are 0.02"
    assert rows[1].status == "measured"


def test_each_untimed_step_has_its_own_tolerance() -> None:
    wanted = [{"a": 1.0, "b": 2.0}, {"a": 1.0, "b": 1.0}]
    assert turns.worst(wanted, wanted, (1e-4, 1e-2)) == (0.0, 1e-4)
    late = [{"a": 1.0, "b": 2.0}, {"a": 1.0, "b": 1.005}]
    assert turns.worst(late, wanted, (1e-4, 1e-2)) == (pytest.approx(0.005), 1e-2)
    early = [{"a": 1.001, "b": 2.0}, {"a": 1.0, "b": 1.005}]
    assert turns.worst(early, wanted, (1e-4, 1e-2)) == (pytest.approx(0.001), 1e-4)
    assert turns.worst([{"a": 1.0}, {"a": 1.0}], wanted, (1e-4, 1e-2))[0] == float("inf")


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_has_no_time(loss: float) -> None:
    rows = {row.implementation: row for row in turns.in_turns([toy(OTHER), toy(ONE, loss)], HERE, 2)}
    assert rows["one"].status == "failed"
    assert "its loss loss is not finite" in rows["one"].reason
    assert rows["other"].status == "measured"


def test_a_side_that_cannot_be_built_does_not_stop_the_other() -> None:
    broken = turns.Side(OTHER, lambda: (_ for _ in ()).throw(MemoryError("no room")))  # type: ignore[arg-type]
    side = toy(ONE)
    variant = Planned(JOB, turns.PYTORCHS, True, 2)
    rows = list(turns.in_turns([broken, side, turns.of_pytorchs_products(side, variant)], HERE, 2, (0.1,)))
    assert [row.status for row in rows] == ["out of memory", "measured", "measured"]
    assert rows[1].error is None
    assert rows[2].peak_bytes is None, "not traced"
    assert len(rows[2].seconds) == 2


def test_a_variant_has_no_time_where_its_original_has_none() -> None:
    side, variant = toy(ONE, 1.03), Planned(JOB, turns.PYTORCHS, True, 2)
    rows = list(turns.in_turns([toy(OTHER), side, turns.of_pytorchs_products(side, variant)], HERE, 2, (0.02,)))
    assert [(row.implementation, row.status) for row in rows] == [
        *((name, "wrong") for name in ("one", turns.PYTORCHS)),
        ("other", "measured"),
    ]


def test_the_variant_multiplies_as_pytorch_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "applies", lambda: True)
    seen: list[bool] = []
    side = turns.Side(ONE, lambda: (lambda: {"loss": float(seen.append(products.applies()) or 1)}, nullcontext))
    list(turns.in_turns([side, turns.of_pytorchs_products(side, OTHER)], HERE, 1))
    assert seen[0]
    assert seen.count(False) == 1
    assert products.applies()


def test_parts_of_a_step_by_hand() -> None:
    """Backward goes to who made the gradient's function; what has no name is the rest."""

    class Model:
        def __init__(self) -> None:
            self.weight = torch.randn(512, 512, requires_grad=True)

        def tower(self, x: torch.Tensor) -> torch.Tensor:
            return (x @ self.weight).relu()

        def step(self) -> None:
            loss = self.tower(torch.randn(256, 512)).square().sum()
            time.sleep(0.05)
            loss.backward()

    model = Model()
    found = trace.trace(model.step, trace.part(model, "tower", "image tower"), HERE, memory=True)
    assert found.parts.keys() == {"image tower", trace.REST}
    assert min(found.parts["image tower"]) > 0
    assert found.parts[trace.REST][0] >= 0.05
    assert sum(map(sum, found.parts.values())) == pytest.approx(found.seconds)
    assert found.allocated >= 256 * 512 * 4 * 3
    assert trace.larger("teacher's fusion") == trace.larger("rest of the teacher") == "teacher"
    assert trace.larger("fusion for MLM") == "fusion"
