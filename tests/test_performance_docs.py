"""docs/performance.md and the README's figures are what the record gives, in words that say who is faster."""

from __future__ import annotations

import dataclasses
import shutil
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
import performance  # noqa: E402
from suite import figures, page, plots, standing  # noqa: E402
from suite.results import Ceilings, Job, Results, Row, write  # noqa: E402

sys.path.remove(str(ROOT / "benchmarks"))

MACHINE = {
    "device": "cpu",
    "summary": "2 CPU cores (Test)",
    "processor": "Test",
    "features": ["avx2"],
    "threads": 1,
    "memory_gb": 24,
    "versions": {"python": "3.11", "torch": "2.14"},
    "commit": "abc+",
    "minutes": 13.0,
}
SPREAD = (0.96, 0.98, 1.0, 1.02, 1.04)  # of five rounds, which all share


def rows(job: Job, times: dict[str, float], **figures: object) -> list[Row]:
    return [
        Row(job, name, name == "crossmask", "measured", seconds=tuple(x * s for s in SPREAD), **figures)  # type: ignore[arg-type]
        for name, x in times.items()
    ]


def record() -> Results:
    found: list[Row] = []
    for what, times in (
        ("output", {"crossmask": 2e-3, "sdpa": 1e-3, "eager": 5e-3}),
        ("all statistics", {"crossmask": 2e-3, "eager": 6e-3, "flex": 1e-3}),
    ):
        for way, factor in (("forward", 1), ("backward", 2), ("both", 3)):
            job = Job("cross_attention", "ALBEF 30x257", "B=8", "fp32", what, way)  # type: ignore[arg-type]
            scaled = {name: factor * x for name, x in times.items()}
            found += rows(job, scaled, needed_bytes=1e7, flops=3e7, peak_bytes=2**20)
    found = [dataclasses.replace(r, missing=("entropy",)) if r.implementation == "flex" else r for r in found]
    job = found[0].job
    found.append(Row(job, "xformers", False, "skipped", "is not installed"))
    found += rows(Job("topk_mask", "words 77", "256 rows", "fp32", "", "forward"), {"crossmask": 1e-5, "sort": 1e-5})
    found.append(Row(found[-1].job, "compile", False, "failed", "RuntimeError: a | b"))
    step = Job("step", "ALBEF-base", "batch 8", "fp32", "", "step")
    parts = {"everything else": 4.0, "image tower": 3.0}
    found += rows(step, {"common way": 10.5, "crossmask": 7.0}, samples=8, parts=parts, peak_bytes=2**30)
    for ranks, seconds in (("1 rank", 0.4), ("2 ranks", 0.25)):
        found += rows(
            Job("scaling", "albef-emoji", f"{ranks}, ZeRO 1", "bf16", "", "step"), {"crossmask": seconds}, samples=64
        )
    return Results(MACHINE, Ceilings(2e10, 1e10, {"fp32": 6e10}), tuple(found))


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout with a record and a README that waits for its figures. Pictures, which take long, are not drawn."""
    monkeypatch.setattr(performance, "draw", lambda *_: [])
    (tmp_path / "benchmarks/static").mkdir(parents=True)
    shutil.copy(ROOT / "benchmarks/static/roofline.csv", tmp_path / "benchmarks/static")
    (tmp_path / "README.md").write_text(f"# Name\n\n{performance.START}\n{performance.END}\n\nthe rest\n")
    write(record(), tmp_path / "benchmarks/results/cpu.json")
    return tmp_path


def run(root: Path, *options: str) -> int:
    return performance.main(["--root", str(root), *options])


def test_the_committed_texts_are_what_the_record_gives() -> None:
    if not (ROOT / "benchmarks/results/cpu.json").exists():
        pytest.skip("no record is committed yet")
    assert performance.main(["--check"]) == 0, "run python benchmarks/performance.py"
    for name in ("attention", "others", "roofline", "steps"):
        assert (ROOT / f"docs/images/performance-{name}.png").stat().st_size > 10_000


def test_a_line_for_each_job_with_shares_memory_and_every_peer(root: Path) -> None:
    assert run(root) == 0
    told = (root / "docs/performance.md").read_text().splitlines()
    times = "2.00 ms (1.96 – 2.04)"
    # 1e7 bytes in 2 ms of 2e10 bytes/s, 3e7 FLOPs of 6e10 FLOP/s
    end = "25 %, 25 % | 1.00; 1.00 |"
    assert f"| output | forward | {times} | **0.50 (0.50 – 0.50)** | 2.50 (2.50 – 2.50) | – | {end}" in told
    assert f"| all statistics | forward | {times} | – | 3.00 (3.00 – 3.00) | **0.50 (0.50 – 0.50)** † | {end}" in told
    assert "† gives less than was asked for." in told
    assert not [line for line in told if line.startswith("| output | backward |")]
    assert "| xformers | skipped | is not installed | cross_attention, output, forward, ALBEF 30x257, fp32 |" in told
    assert "| compile | failed | RuntimeError: a / b | topk_mask, forward, words 77, fp32 |" in told
    assert "| flex | does not give entropy | `cross_attention` |" in told
    assert "| this run | 20.0 GB/s | 10.0 GB/s | 60.0 GFLOP/s |" in told
    whole = "\n".join(told)
    assert "2 CPU cores (Test), avx2, 1 thread, 24 GB, Python 3.11; torch 2.14." in whole
    assert "Commit abc, with files that differ from it; the run took 13.0 minutes." in whole
    assert "No GPU was measured" in whole


def test_who_is_slower_is_said_and_a_peer_that_gives_less_is_no_rival(root: Path) -> None:
    assert run(root) == 0
    told = (root / "docs/performance.md").read_text()
    assert "| `cross_attention`, output, fp32 | 2 | 0 | 0 | 2 | 0.50 (0.50 – 0.50) |" in told
    assert "| `cross_attention`, all statistics, fp32 | 2 | 2 | 0 | 0 | 3.00 (3.00 – 3.00) |" in told
    assert "| `topk_mask`, fp32 | 1 | 0 | 1 | 0 | 1.00 |" in told
    assert "| a step of ALBEF-base, fp32 | 1 | 1 | 0 | 0 | 1.50 |" in told
    assert "**Slower than the best peer** in 2 of 6 jobs:" in told
    assert "| cross_attention, output, forward + backward, ALBEF 30x257, fp32 | sdpa | 0.50 (0.50 – 0.50) |" in told
    faster = dataclasses.replace(record(), rows=tuple(r for r in record().rows if r.implementation != "sdpa"))
    assert "In no job is ours slower than the best peer." in page.page({"cpu": faster})


def test_steps_and_ranks(root: Path) -> None:
    assert run(root) == 0
    told = (root / "docs/performance.md").read_text().splitlines()
    start = "| ALBEF-base | batch 8 | fp32 |"
    assert f"{start} common way | 0.762 (0.747 – 0.777) | 1,024 | 1.50 (1.50 – 1.50) |" in told
    assert f"{start} crossmask | 1.14 (1.12 – 1.17) | 1,024 |  |" in told
    head = told.index("|  | image tower | everything else |")
    assert told[head + 2] == "| ALBEF-base, fp32, common way | 43 % | 57 % |"
    assert "| albef-emoji | 2 ranks, ZeRO 1 | bf16 | 256 (251 – 261) | 1.60 | – |" in told


def test_the_readme_shows_the_records_figures_and_keeps_the_rest(root: Path) -> None:
    assert run(root) == 0
    readme = (root / "README.md").read_text()
    assert readme.startswith(f"# Name\n\n{performance.START}\n**CPU figures**, by `make bench`: 2 CPU cores (Test)")
    assert readme.endswith(f"\n{performance.END}\n\nthe rest\n")
    assert "| `cross_attention`, output | 2 | 0 | 0 | 2 | 0.50 (0.50 – 0.50) |" in readme
    step = "* A step of ALBEF-base (batch 8), fp32: **1.50 (1.50 – 1.50)** times the samples/s of common way"
    assert f"{step}, in 1.00 of the memory." in readme
    assert "Slower than the best peer in 2 of 6 jobs, most so in cross_attention, output, forward" in readme
    assert "**GPU figures are predicted, none is measured**" in readme
    assert "17.2 µs forward" in readme  # as benchmarks/static/roofline.csv has it
    assert run(root) == 0
    assert (root / "README.md").read_text() == readme


def test_the_pictures(tmp_path: Path) -> None:
    drawn = plots.draw(record(), tmp_path, "-cuda")
    assert [path.name for path in drawn] == [
        f"performance-{name}-cuda.png" for name in ("attention", "others", "roofline", "steps")
    ]
    for path in drawn:
        with Image.open(path) as picture:
            assert picture.width > 500
            assert len(picture.convert("RGB").getcolors(10**6) or ()) > 10
    bare = dataclasses.replace(record(), ceilings=None, rows=record().rows[:1])
    assert [path.name for path in plots.draw(bare, tmp_path)] == ["performance-attention.png"]


@pytest.mark.parametrize("name", ["README.md", "docs/performance.md"])
def test_a_changed_figure_is_found(root: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(root, "--check") == 1  # nothing is written yet
    assert run(root) == 0
    assert run(root, "--check") == 0
    capsys.readouterr()
    text = (root / name).read_text()
    (root / name).write_text(text.replace("0.50 (0.50 – 0.50)", "1.50 (0.50 – 0.50)", 1))
    before = (root / name).read_bytes()
    assert run(root, "--check") == 1
    assert capsys.readouterr().out == f"{name} is not what the record gives: run python benchmarks/performance.py\n"
    assert (root / name).read_bytes() == before


def test_a_file_becomes_the_record_of_its_device(root: Path, tmp_path: Path) -> None:
    slow = dataclasses.replace(record(), machine=MACHINE | {"summary": "another machine"})
    write(slow, tmp_path / "latest.json")
    assert run(root, "--accept", str(tmp_path / "latest.json")) == 0
    assert (root / "benchmarks/results/cpu.json").read_bytes() == (tmp_path / "latest.json").read_bytes()
    assert (root / "benchmarks/results/cpu.csv").read_text() == (tmp_path / "latest.csv").read_text()
    assert "another machine" in (root / "README.md").read_text()
    assert run(root, "--check") == 0


def test_a_record_of_another_processor_is_kept_beside_the_new_one(root: Path, tmp_path: Path) -> None:
    main = root / "benchmarks/results/cpu.json"

    def accept(**machine: object) -> int:
        write(dataclasses.replace(record(), machine=MACHINE | machine), tmp_path / "latest.json")
        return run(root, "--accept", str(tmp_path / "latest.json"))

    def kept() -> set[str]:
        return {path.stem for path in main.parent.glob("cpu-*.json")}

    assert accept(processor="Old, family 1") == accept(processor="New") == accept(processor="New") == 0
    assert performance.read(main).machine["processor"] == "New"
    assert kept() == {"cpu-test-avx2-1-thread", "cpu-old-family-1-avx2-1-thread"}
    text, readme = (root / "docs/performance.md").read_text().splitlines(), (root / "README.md").read_text()
    assert "|  | cpu | cpu-old-family-1-avx2-1-thread | cpu-test-avx2-1-thread |" in text
    ratios = "0.50 (0.50 – 0.50); 0 of 2"
    assert f"| `cross_attention`, output, fp32 | {ratios} | {ratios} | {ratios} |" in text
    rates = "60.0 GFLOP/s in fp32 where the one above has 60.0 GFLOP/s"
    other = f"* On another machine, Old, family 1, avx2, 1 thread, {rates}, at abc+: ours slower in 2 of 6 jobs"
    assert f"{other}; a step of ALBEF-base, fp32: 1.50 (1.50 – 1.50)." in readme
    assert accept(processor="Old, family 1") == 0  # the other way round
    assert kept() == {"cpu-test-avx2-1-thread", "cpu-new-avx2-1-thread"}
    assert not list(main.parent.glob("cpu-old*.csv"))
    assert accept(processor="New", features=[]) == 0  # another machine, though of the same processor
    assert kept() == {"cpu-test-avx2-1-thread", "cpu-new-avx2-1-thread", "cpu-old-family-1-avx2-1-thread"}
    shutil.copy(main, main.with_name("cpu-kept.json"))  # no record: it has not the name of its machine
    assert run(root, "--check") == 0
    main.with_name("cpu-damaged.json").write_text("{")
    before = main.read_bytes()
    assert accept(processor="Newer") == 2
    assert main.read_bytes() == before


def test_a_gpus_figures_stand_beside_their_predictions(root: Path, tmp_path: Path) -> None:
    found = record()
    told = tuple(dataclasses.replace(r, predicted_us=(1000.0, 1600.0)) if r.ours else r for r in found.rows)
    machine = MACHINE | {"device": "cuda", "summary": "NVIDIA H100"}
    write(dataclasses.replace(found, machine=machine, rows=told), tmp_path / "gpu.json")
    assert run(root, "--accept", str(tmp_path / "gpu.json")) == 0
    text = (root / "docs/performance.md").read_text()
    line = "| cross_attention, output, forward, ALBEF 30x257, fp32 | 2,000 | 1,000 | 1,600 | 2.00 | 1.25 |"
    assert line in text.splitlines()
    assert "No GPU was measured" not in text
    assert "images/performance-attention-cuda.png" in text
    readme = (root / "README.md").read_text()
    assert "**GPU figures**, by `make bench-gpu`: NVIDIA H100" in readme
    assert "predicted" not in readme
    sheet = (root / "benchmarks/static/roofline.md").read_text()
    assert "[docs/performance.md](../../docs/performance.md)" in sheet
    assert "nobody measured" not in sheet
    assert run(root, "--check") == 0


def test_what_cannot_be_used_is_one_line_and_changes_nothing(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = tmp_path / "good.json"
    write(record(), good)
    odd = tmp_path / "odd.json"
    write(dataclasses.replace(record(), machine={}), odd)
    empty = tmp_path / "empty.json"
    write(dataclasses.replace(record(), rows=()), empty)
    before = (root / "benchmarks/results/cpu.json").read_bytes()
    some = tmp_path / "some.json"
    write(dataclasses.replace(record(), rows=tuple(r for r in record().rows if r.job.op != "step")), some)
    part = tmp_path / "part.json"
    write(dataclasses.replace(record(), machine=record().machine | {"partial": True}), part)
    for path, said in (
        (part, "is of a part of the suite"),
        *((tmp_path / "none.json", "No such file"), (odd, "of a device None"), (empty, "no time of ours")),
        (some, "nothing of step, which"),
    ):
        assert run(root, "--accept", str(path)) == 2
        told = capsys.readouterr().err
        assert said in told
        assert told.count("\n") == 1
    readme = (root / "README.md").read_text()
    for text in (readme.replace(performance.END, ""), readme + performance.START, ""):
        (root / "README.md").write_text(text)
        for options in ((), ("--check",), ("--accept", str(good))):
            assert run(root, *options) == 2
            told = capsys.readouterr()
            assert "README.md has not <!-- performance: start --> and <!-- performance: end --> once each" in told.err
            assert told.err.count("\n") == 1
            assert not told.out
    assert (root / "benchmarks/results/cpu.json").read_bytes() == before
    (root / "benchmarks/results/cpu.json").unlink()
    (root / "README.md").write_text(readme)
    assert run(root) == 2
    assert "make bench" in capsys.readouterr().err


def test_the_best_peer_is_the_fastest_of_those_that_give_all() -> None:
    job = Job("cross_attention", "s", "", "fp32", "all statistics", "forward")
    found = rows(job, {"slow": 3.0, "crossmask": 1.0, "fast": 2.0})
    found += [dataclasses.replace(row, missing=("entropy",)) for row in rows(job, {"partial": 0.1})]
    found += [dataclasses.replace(row, seconds=row.seconds[:3]) for row in rows(job, {"of other rounds": 0.1})]
    best = standing.standing(found)
    assert best is not None
    assert (best.peer.implementation, best.place) == ("fast", "faster")
    assert standing.standing(found[1:2]) is None
    assert standing.standing([row for row in found if not row.ours]) is None


def test_how_figures_are_written() -> None:
    assert [figures.digits(x) for x in (0, 0.012345, 1.2, 12.345, 99.96, 12345.6)] == [
        *("0", "0.0123", "1.20", "12.3", "100", "12,346")
    ]
    assert [figures.duration(x) for x in (2e-7, 1.5e-5, 2.34e-2, 7.0)] == ["0.2 µs", "15.0 µs", "23.4 ms", "7.00 s"]
    assert [figures.percent(x) for x in (None, 0.255, 1.2)] == ["–", "26 %", "120 %"]
    assert figures.times((1.234, 1.0, 120.0)) == "1.23 (1.00 – 120)"
