"""What an ablation's table and picture say of fixed numbers."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from test_ablation import folder, measured, toy, write_run

from crossmask.engine.ablation import Ablation, ablate, load_ablation
from crossmask.engine.ablation.plan import plan_runs
from crossmask.engine.ablation.results import agreed, collect, difference, look_up, summarise
from crossmask.engine.ablation.writing import picture, rows, table
from crossmask.engine.evaluation.plots import COLOURS

__all__ = ["folder"]  # a fixture that every test here uses


def test_look_up() -> None:
    evaluation = {
        "splits": {"a": {"i2t": {"r1": 1, "r5": 4.0, "n": 7}}, "b": {"i2t": {"r1": 3.0}, "x": None}},
        "ok": True,
    }
    assert look_up(evaluation, "splits.a.i2t.r1") == 1.0
    assert look_up(evaluation, "splits.*.i2t.r1") == 2.0
    assert look_up(evaluation, "splits.a.i2t.r*") == 2.5
    assert look_up(evaluation, "splits.b.i2t") is None
    assert look_up(evaluation, "splits.b.x.r1") is None
    assert look_up(evaluation, "ok") is None
    assert look_up({"a": {"x": float("nan")}, "b": {"x": 1.0}}, "*.x") is None


def test_mean_spread_and_difference_by_hand() -> None:
    found = summarise([2.0, None, 4.0, 9.0])
    assert found is not None
    assert (found.mean, found.count) == (5.0, 3)
    assert found.deviation == pytest.approx((26 / 2) ** 0.5)
    assert summarise([3.0]).deviation is None  # type: ignore[union-attr]
    assert summarise([None]) is None
    assert agreed({0: 2.0, 1: 3.0, 2: 9.0}, {0: 1.0, 1: 2.5, 2: 0.0, 3: 99.0}, True) == 1
    assert agreed({0: 2.0, 1: 3.0, 2: 9.0}, {0: 1.0, 1: 2.5, 2: 0.0}, False) == -1
    assert agreed({0: 2.0, 1: 3.0, 2: 9.0}, {0: 3.0, 1: 4.0, 2: 9.5}, False) == 1
    assert agreed({0: 2.0, 1: 3.0, 2: 0.0}, {0: 1.0, 1: 2.5, 2: 0.0}, True) == 0, "an equal one agrees with nobody"
    assert agreed({0: 2.0, 1: 3.0, 2: 9.0}, {0: 1.0, 1: 2.5}, True) == 0, "two are too few"
    paired = difference({0: 5.0, 1: 7.0, 2: 100.0}, {0: 4.0, 1: 4.0})
    assert paired is not None
    assert (paired.mean, paired.count) == (2.0, 2)
    assert paired.deviation == pytest.approx(2**0.5)
    assert difference({0: 1.0}, {1: 1.0}) is None


@pytest.fixture
def filled(folder: Path) -> Ablation:
    """plain: TR 10, 14; taught: 13, 15 and a third seed; tuned: one seed; the losses alike."""
    ablation = load_ablation("toy.yaml")
    machine = {"summary": "4 CPU cores (Abacus | 9)", "ranks": 2, "versions": {"python": "3.11.4", "torch": "2.14.1"}}
    for seed, numbers in enumerate((((10, 0.6), (13, 0.55), (20, 0.5)), ((14, 0.7), (15, 0.6), None))):
        for run, found in zip(plan_runs(ablation, folder / "out", [seed]), numbers, strict=True):
            if found:
                write_run(run, machine=machine, minutes=2.0 + seed, **measured(*found))
    taught = plan_runs(ablation, folder / "out", [2])[1]
    write_run(taught, machine=machine, **measured(50, 0.1))
    (taught.folder / "ablation.json").write_text('{"commit": "abc123"}')
    return ablation


def test_the_table_by_hand(filled: Ablation, folder: Path) -> None:
    results, lost = collect(filled, folder / "out")
    assert not lost
    text = table(filled, results)
    lines = text.splitlines()
    assert lines[0] == "# toy"
    assert lines[2] == "| variant | seeds | TR R@1 ↑ | ITM loss ↓ | s per run |"
    assert lines[4] == "| plain | 2 | 12.0 ± 2.8 | 0.650 ± 0.071 | 150 ± 42 |"
    # of 13, 15 and 50 the mean is 26; of the seeds that both have, 3 and 1 more than plain
    assert lines[5] == "| with a teacher | 3 | 26.0 ± 20.8 | 0.417 ± 0.275 | 140 ± 35 |"
    assert lines[6] == "| tuned | 1 | 20.0 | 0.500 | 120 |"
    assert lines[8] == "| difference of | to | TR R@1 ↑ | ITM loss ↓ |"
    assert lines[10] == "| with a teacher | plain | +2.0 ± 1.4 | -0.075 ± 0.035 |"
    assert lines[11] == "| tuned | with a teacher | +7.0 | -0.050 |"
    assert "Not all runs are finished: plain (2 of 3); tuned (1 of 3)." in text
    assert "which 3 seeds do by chance alone in one case of 4" in text
    assert "Fewer than 3 seeds" in text
    assert "Machine: 4 CPU cores (Abacus | 9), 2 ranks. python 3.11.4, torch 2.14.1. Commit: abc123 / unknown." in text
    assert "TR R@1 = `splits.*.i2t.r1`" in text
    assert "| plain | small | – | – | 20 | `objectives.itc.distillation=0` |" in text
    assert "| tuned | fine | with a teacher | with a teacher | 10 | – |" in text


def test_what_all_variants_share_is_said_once(filled: Ablation, folder: Path) -> None:
    results, _ = collect(filled, folder / "out")
    text = table(filled.overridden(["optimizer.lr=1e-3"]), results)
    assert "All variants: `optimizer.lr=1e-3`\n\n| variant | recipe" in text
    assert "| plain | small | – | – | 20 | `objectives.itc.distillation=0` |" in text
    assert "All variants" not in table(filled, results)


def test_differences_to_the_first_row_or_a_named_one(filled: Ablation, folder: Path) -> None:
    first = filled.model_copy(update={"compare": "first"})
    results, _ = collect(first, folder / "out")
    assert "| tuned | plain | +10.0 | -0.100 |" in table(first, results)
    plain, taught, tuned = filled.variants
    named = filled.model_copy(update={"variants": [plain.model_copy(update={"against": "taught"}), taught, tuned]})
    assert "| plain | with a teacher | -2.0 ± 1.4 | +0.075 ± 0.035 |" in table(named, results)
    bars = filled.model_copy(update={"variants": [plain.model_copy(update={"title": "a|b"}), taught, tuned]})
    assert "| a\\|b | 2 |" in table(bars, results)


@pytest.fixture
def compared(folder: Path) -> Ablation:
    """Three seeds of four variants: b beats a with each, c does not, d loses against c with each; c has no loss."""
    variants = [
        {"name": "a"},
        *({"name": name, "title": f"the variant named {name}", "overrides": [f"optimizer.lr={lr}"]}
          for name, lr in (("b", 1e-3), ("c", 2e-3))),
        {"name": "d", "against": "c", "overrides": ["optimizer.lr=3e-3"]},
    ]  # fmt: skip
    ablation = toy(variants=variants, compare="first", seeds=[0, 1, 2])
    reached = {"a": (10.0, 20.0, 30.0), "b": (12.0, 21.0, 33.0), "c": (11.0, 22.0, 29.0), "d": (10.5, 20.0, 28.0)}
    for seed in range(3):
        for run in plan_runs(ablation, folder / "out", [seed]):
            found = measured(reached[run.variant.name][seed], 0.5)
            write_run(run, **(found | {"itm": {}} if run.variant.name == "c" else found))
    return ablation


def test_where_every_seed_agrees(compared: Ablation, folder: Path) -> None:
    results, _ = collect(compared, folder / "out")
    text = table(compared, results)
    assert "| the variant named b | a | **+2.0 ± 1.0** | +0.000 ± 0.000 |" in text
    assert "| the variant named c | a | +0.7 ± 1.5 | – |" in text
    assert "| d | the variant named c | **-1.2 ± 0.8** | – |" in text
    assert "Not all runs" not in text
    panels = picture(compared, results)
    dots, missing = panels.axes
    hues = [to_hex(part.get_facecolor()[0]) for part in dots.collections if hasattr(part, "get_sizes")]
    assert hues == [COLOURS[name] for name in ("c1", "c3", "c1", "c2")]
    assert [part.get_text() for part in missing.texts] == ["not measured"]
    assert [part.get_position()[1] for part in missing.texts] == [2]
    legend = [part.get_text() for part in panels.legends[0].get_texts()]
    assert "better than that with every seed" in legend
    assert "worse with every seed" in legend
    # dashed: the mean of a, from its row along b and c, and of c, from its row along d
    lines = [part.get_segments()[0] for part in dots.collections if not hasattr(part, "get_sizes")]
    dashed = [line.tolist() for line in lines if line[1][1] - line[0][1] > 0.7]
    assert dashed == [[[20.0, 0], [20.0, 2.45]], [[pytest.approx(62 / 3), 2], [pytest.approx(62 / 3), 3.45]]]


def test_a_picture_has_room_for_its_words(compared: Ablation, folder: Path) -> None:
    """No text is cut off at the picture's edge, and no panel's title runs into the next one."""
    words = "on a thing that is both drawn and named, as a multiple of what random masks get"
    metrics = [m.model_copy(update={"title": f"{m.title} {words}"}) for m in compared.metrics]
    long = compared.model_copy(update={"metrics": metrics, "title": f"Masks {words}, {words}"})
    results, _ = collect(compared, folder / "out")
    for ablation in (long, long.model_copy(update={"metrics": metrics[:1]})):
        figure = picture(ablation, results)
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        titles = [ax.title if ax.get_title() else ax._left_title for ax in figure.axes]  # type: ignore[attr-defined]
        boxes = [text.get_window_extent() for text in (*titles, figure._suptitle)]  # type: ignore[attr-defined]
        boxes += [text.get_window_extent() for text in figure.legends[0].get_texts()]
        width, height = canvas.get_width_height()
        assert all(box.x0 >= 0 and box.x1 <= width and box.y0 >= 0 and box.y1 <= height for box in boxes)
        assert all(ax.get_window_extent().height / figure.dpi >= 0.27 * len(ablation.variants) for ax in figure.axes)
        assert not any(boxes[i].overlaps(boxes[j]) for i in range(len(titles)) for j in range(i))


def test_rows_and_picture(filled: Ablation, folder: Path) -> None:
    results, _ = collect(filled, folder / "out")
    found = list(csv.DictReader(rows(filled, results).splitlines()))
    assert [(r["variant"], r["seed"]) for r in found] == [
        *(("plain", "0"), ("plain", "1"), ("taught", "0"), ("taught", "1"), ("taught", "2"), ("tuned", "0")),
    ]
    assert (found[1]["splits.*.i2t.r1"], found[1]["itm.loss"], found[1]["seconds"]) == ("14.0", "0.7", "180.0")
    assert (found[4]["commit"], found[0]["commit"], found[0]["torch"]) == ("abc123", "", "2.14.1")
    panels = picture(filled, results).axes
    assert [ax.get_title(loc="left") for ax in panels] == ["TR R@1", "ITM loss"]
    assert [label.get_text() for label in panels[0].get_yticklabels()] == [
        *("plain (2\u00a0of\u00a03\u00a0seeds)", "with a teacher", "tuned (1\u00a0of\u00a03\u00a0seeds)"),
    ]
    dots = [sorted(x for x, _ in part.get_offsets()) for part in panels[0].collections if hasattr(part, "get_sizes")]
    assert [10.0, 14.0] in dots
    assert [13.0, 15.0, 50.0] in dots
    assert [20.0] in dots
    bands = [(bar.get_x(), bar.get_x() + bar.get_width()) for bar in panels[0].patches]
    assert bands[0] == (pytest.approx(12 - 8**0.5), pytest.approx(12 + 8**0.5))
    assert len(bands) == 2, "a single seed has none"


def test_the_table_alone_and_a_metric_that_nobody_measured(filled: Ablation, folder: Path) -> None:
    said: list[str] = []
    (folder / "out/ablation.md").write_text("old")
    assert ablate("toy.yaml", [], folder / "out", "7", "plain", said.append, table_only=True) == 0
    assert "| with a teacher | 3 |" in (folder / "out/ablation.md").read_text(), "all that is finished, of any seed"
    metrics = [{"path": "splits.a.i2t.r2", "title": "R@2"}, {"path": "itm.loss", "title": "ITM", "digits": 2}]
    toy(metrics=metrics, name="toy")
    said.clear()
    assert ablate("changed.yaml", [], folder / "out", None, None, said.append, table_only=True) == 0
    assert said[-1] == "metric splits.a.i2t.r2: no run has measured it; did you mean splits.a.i2t.r1?"
    assert "| plain | 2 | – | 0.65 ± 0.07 | 150 ± 42 |" in (folder / "out/ablation.md").read_text()
