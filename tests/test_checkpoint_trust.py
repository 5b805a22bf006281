"""No file of a checkpoint can run code, whoever wrote it and whatever its manifest says."""

from __future__ import annotations

import ast
import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_checkpoint import save

from crossmask.engine.errors import CheckpointError
from crossmask.engine.teacher import FeatureQueue
from crossmask.engine.training.checkpoint import CheckpointManager
from crossmask.engine.training.manifest import FORMAT, MANIFEST, _digest_of, describe, files_of
from crossmask.engine.training.reshard import reshard
from crossmask.engine.training.student_files import more_than_data, plain_data_only

ENGINE = Path(__file__).resolve().parents[1] / "engine"
PICKLES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
OPENERS = {"load", "loads", "Unpickler", "open"}


class Evil:
    """Unpickling it creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def spoil(run: Path, name: str, content: Any) -> Path:
    """Puts ``content`` into a checkpoint's file and seals it again, as someone who means harm would."""
    checkpoint = run / "checkpoints/step-000100"
    torch.save(content, checkpoint / name)
    files = {path: describe(file) for path, file in files_of(checkpoint).items()}
    (checkpoint / MANIFEST).write_text(json.dumps({"format": FORMAT, "files": files, "sha256": _digest_of(files)}))
    assert CheckpointManager(run).verified()[0] == checkpoint
    return checkpoint


def test_a_file_that_names_more_than_data_is_refused_before_it_is_opened(tmp_path: Path) -> None:
    save(tmp_path, 100)
    spoil(tmp_path, "student/model.pt", {"module": Evil(tmp_path / "made")})
    opened: list[Any] = []
    engine = SimpleNamespace(zero_optimization_stage=lambda: 2, load_checkpoint=opened.append)
    teacher: Any = SimpleNamespace()
    with pytest.raises(
        CheckpointError, match=r"student/model\.pt names posix\.mkdir, which is more than data"
    ) as found:
        CheckpointManager(tmp_path).load(engine, teacher, FeatureQueue(4, 2))
    assert "\n" not in str(found.value)
    with pytest.raises(CheckpointError, match=r"could not be resharded: student/model\.pt names posix\.mkdir"):
        reshard(tmp_path)
    assert opened == []
    assert not (tmp_path / "made").exists()
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["latest", "step-000100"]


def test_what_deepspeed_stores_is_allowed(tmp_path: Path) -> None:
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    state = {"scaler": LossScaler(1.0), "stage": ZeroStageEnum.weights, "place": fragment_address(3, 4)}
    state["dynamic"] = DynamicLossScaler(2.0**16, 2.0, 1000, 1.0, 2, True, torch.float16)
    torch.save(state | {"shape": torch.Size([2]), "names": {"a"}}, tmp_path / "x.pt")
    assert more_than_data(tmp_path) is None
    with plain_data_only():
        loaded = torch.load(tmp_path / "x.pt", weights_only=False)
    assert loaded["dynamic"].cur_scale == 2.0**16
    assert (loaded["place"], loaded["stage"]) == (state["place"], ZeroStageEnum.weights)


def test_what_is_no_pickle_of_torchs_is_refused(tmp_path: Path) -> None:
    (tmp_path / "student").mkdir()
    (tmp_path / "student/model.pt").write_bytes(b"cposix\nmkdir\n(S'made'\ntR.")
    assert more_than_data(tmp_path / "student") == "student/model.pt is not a file of torch's (ValueError)"


def test_while_deepspeed_works_every_load_is_of_plain_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever DeepSpeed asks for, and whatever the user's environment says."""
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    torch.save({"x": torch.ones(2)}, tmp_path / "plain.pt")
    torch.save({"x": Evil(tmp_path / "made")}, tmp_path / "evil.pt")
    with plain_data_only():
        assert torch.load(tmp_path / "plain.pt", weights_only=False)["x"].tolist() == [1, 1]
    with pytest.raises(ValueError, match=r"names posix\.mkdir, which is more than data"), plain_data_only():
        torch.load(tmp_path / "evil.pt", weights_only=False)
    assert not (tmp_path / "made").exists()
    assert os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] == "1"
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ


@pytest.mark.parametrize("module", sorted(ENGINE.rglob("*.py")), ids=lambda path: str(path.relative_to(ENGINE)))
def test_nothing_of_ours_unpickles(module: Path) -> None:
    for node in ast.walk(ast.parse(module.read_text())):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        owner, name = ast.unparse(node.func.value), node.func.attr
        assert not (owner in PICKLES and name in OPENERS), f"line {node.lineno}: {owner}.{name}"
        keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if owner == "torch" and name == "load":
            assert keywords.get("weights_only") == "True", f"line {node.lineno}: torch.load of anything"
        if owner in ("np", "numpy") and name == "load":
            assert keywords.get("allow_pickle", "False") == "False", f"line {node.lineno}: numpy.load of anything"
        if owner == "yaml" and name in ("load", "unsafe_load", "full_load"):
            loader = ast.unparse(node.args[1]) if len(node.args) > 1 else keywords.get("Loader", "")
            assert loader in ("_Loader", "yaml.SafeLoader"), f"line {node.lineno}: yaml.{name} of anything"
