"""The student's fp32 masters from DeepSpeed's files: bit by bit those of training, at every stage and world size."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from crossmask.engine.errors import CheckpointError
from crossmask.engine.training.whole_student import whole_student

DISTRIBUTED = Path(__file__).parent / "distributed"
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("students")
    command = [sys.executable, str(DISTRIBUTED / "export_students.py"), str(folder)]
    ran = subprocess.run(
        command, capture_output=True, text=True, timeout=250, env={**os.environ, "DS_ACCELERATOR": "cpu"}
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return folder


@pytest.fixture(scope="module")
def trained() -> list[list[str]]:
    """Names in the order of the optimizer's groups, which is not that of the module."""
    sys.path.insert(0, str(DISTRIBUTED))
    try:
        from student import Student, optimizer_of
    finally:
        sys.path.remove(str(DISTRIBUTED))
    student = Student()
    names = {id(parameter): name for name, parameter in student.named_parameters()}
    return [[names[id(p)] for p in group["params"]] for group in optimizer_of(student).param_groups]


def test_every_stage_dtype_and_world_size(saved: Path, trained: list[list[str]]) -> None:
    compared = 0
    for case in sorted(saved.glob("*-of-*")):
        expected = load_file(case / "everything.safetensors")
        assert expected["model.frozen.weight"].shape == (13, 37)
        for form in ("student", "universal"):
            if (case / form).is_dir():
                found = whole_student(case / form, int(case.name[0]), trained)
                assert found.keys() == expected.keys(), (case.name, form)
                for name, value in expected.items():
                    assert found[name].dtype == value.dtype, (case.name, form, name)
                    assert torch.equal(found[name], value), (case.name, form, name)
                compared += 1
    assert compared == 12 + 6 + 6  # on two ranks, their universal forms, on one and four


def test_masters_in_bf16_training_are_more_than_the_weights(saved: Path, trained: list[list[str]]) -> None:
    for stage in range(4):
        found = whole_student(saved / f"{stage}-bf16-of-2/student", stage, trained)["model.hidden.weight"]
        assert not torch.equal(found, found.bfloat16().float())


def test_another_order_is_noticed(saved: Path, trained: list[list[str]]) -> None:
    """Stage 0 stores masters without names; two of one shape that change places do not round to their weights."""
    first, second = trained
    other = {"model.norm.weight": "model.norm.bias", "model.norm.bias": "model.norm.weight"}
    swapped = [first, [other.get(name, name) for name in second]]
    with pytest.raises(CheckpointError, match=r"not laid out .* stage 0 .* does not round to its weight"):
        whole_student(saved / "0-bf16-of-2/student", 0, swapped)
    with pytest.raises(CheckpointError, match="not laid out"):
        whole_student(saved / "0-bf16-of-2/student", 0, [first])
    with pytest.raises(CheckpointError, match="unheard_of is in none of the files"):
        whole_student(saved / "2-fp32-of-2/student", 2, [*trained, ["unheard_of"]])


def test_a_rank_that_is_missing_is_noticed(saved: Path, trained: list[list[str]], tmp_path: Path) -> None:
    for case in ("2-bf16-of-2", "3-fp32-of-4"):
        copied = tmp_path / case
        shutil.copytree(saved / case / "student", copied)
        for file in copied.glob("*zero_pp_rank_1_*"):
            file.unlink()
        with pytest.raises(CheckpointError, match=r"files of \d ranks, saved were"):
            whole_student(copied, int(case[0]), trained)
    with pytest.raises(CheckpointError, match="not laid out"):
        whole_student(saved / "2-bf16-of-2/student", 3, trained)


def test_a_file_that_is_more_than_data_is_not_opened(saved: Path, trained: list[list[str]], tmp_path: Path) -> None:
    class Mischief:
        def __reduce__(self) -> tuple:
            return (Path.touch, (tmp_path / "harm",))

    copied = tmp_path / "student"
    shutil.copytree(saved / "2-bf16-of-2" / "student", copied)
    torch.save({"module": Mischief()}, copied / "mp_rank_00_model_states.pt")
    with pytest.raises(CheckpointError, match="more than data"):
        whole_student(copied, 2, trained)
    assert not (tmp_path / "harm").exists()
