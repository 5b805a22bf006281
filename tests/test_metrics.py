"""metrics.jsonl: strict JSON, resumable, and readable after a crash."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from crossmask.engine.errors import CheckpointError
from crossmask.engine.evaluation.run_folder import series
from crossmask.engine.training.metrics import MetricWriter, read_metrics


def test_lines_are_on_disk_before_the_writer_closes(tmp_path: Path) -> None:
    writer = MetricWriter(tmp_path)
    writer.train(1, loss=torch.tensor(2.5), itm=None, lr=1e-3)
    writer.probe(1, {"attention_entropy": 0.5, "itm_loss": float("nan")})
    assert read_metrics(tmp_path) == [
        {"kind": "train", "step": 1, "loss": 2.5, "itm": None, "lr": 1e-3},
        {"kind": "probe", "step": 1, "attention_entropy": 0.5, "itm_loss": None},
    ]
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()
    writer.close()
    writer.close()


def test_resume_drops_what_came_after_its_step(tmp_path: Path) -> None:
    with MetricWriter(tmp_path) as writer:
        for step in range(1, 6):
            writer.train(step, loss=float(step))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "st')  # a crash
    with MetricWriter(tmp_path, resume_step=3) as writer:
        writer.train(4, loss=40.0)
    assert [(r["step"], r["loss"]) for r in read_metrics(tmp_path)] == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 40.0)]
    assert not list(tmp_path.glob("*.part"))


def test_tensorboard_has_the_scalars_and_forgets_steps_after_a_resume(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with MetricWriter(tmp_path) as writer:
        for step in (1, 2, 3):
            writer.train(step, loss=float(step), lr=0.1, time_s=9.0)
        writer.probe(3, {"on_drawing": 0.7})
    with MetricWriter(tmp_path, resume_step=1) as writer:
        writer.train(2, loss=20.0, lr=0.1, time_s=9.0)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("losses/total")] == [(1, 1.0), (2, 20.0)]
    assert set(events.Tags()["scalars"]) >= {"losses/total", "optimizer/lr"}
    assert not any("time_s" in tag for tag in events.Tags()["scalars"])


def test_a_full_disk_is_one_line_and_hides_nothing_else(tmp_path: Path) -> None:
    def on_a_full_disk(folder: Path) -> MetricWriter:
        writer = MetricWriter(folder)
        writer._file.close()
        writer._file = open("/dev/full", "w")  # noqa: SIM115
        return writer

    with pytest.raises(CheckpointError, match="a cannot be written: No space left on device; make room"):  # noqa: SIM117
        with on_a_full_disk(tmp_path / "a") as writer:
            writer.train(1, loss=1.0)
    assert writer._file.closed
    writer = on_a_full_disk(tmp_path / "b")
    writer._file.write("unflushed")
    with pytest.raises(KeyError), writer:
        raise KeyError
    (tmp_path / "c").touch()
    with pytest.raises(CheckpointError, match="c cannot be written"):
        MetricWriter(tmp_path / "c")


def test_a_new_run_does_not_mix_with_an_old_one(tmp_path: Path) -> None:
    with MetricWriter(tmp_path) as writer:
        writer.train(1, loss=1.0)
    with pytest.raises(CheckpointError, match="--resume"):
        MetricWriter(tmp_path)
    assert len(read_metrics(tmp_path)) == 1


def test_reader_tolerates_only_a_broken_last_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert read_metrics(tmp_path) == []
    path.write_bytes(b'{"kind": "train", "step": 1}\n\xff\xfe broken')
    assert [r["step"] for r in read_metrics(tmp_path)] == [1]
    path.write_text('{"kind": "train", "step": 1}\nbroken\n' + json.dumps({"kind": "train", "step": 2}) + "\n")
    with pytest.raises(CheckpointError, match="line 2"):
        read_metrics(tmp_path)


def test_series_leaves_out_gaps_and_what_has_not_begun() -> None:
    records = [{"step": 1, "itm": 0.0}, {"step": 2, "itm": None}, {"step": 3, "itm": 0.6}, {"step": 4, "itm": 0.0}]
    assert series(records, "itm") == ([3.0, 4.0], [0.6, 0.0])
    assert series(records, "mlm") == ([], [])
