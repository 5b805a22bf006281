"""The student's part of a checkpoint, in DeepSpeed's own formats: written, loaded and converted without running code.

DeepSpeed stores pickles and loads them with ``weights_only=False``, which lets a file run whatever it likes. Here a
file may name nothing but tensors, plain containers and :func:`_allowed`. Others are refused before DeepSpeed sees them,
and for as long as it works torch is told to load plain data only.

Two formats. *Sharded*, as DeepSpeed saves: each rank's part of the optimizer's state, for the number of ranks that
saved it. *Universal*, made from it by ``deepspeed.checkpoint.ds_to_universal``: a folder per parameter with its whole
fp32 master and Adam moments, for any number of ranks. DeepSpeed 0.19's universal format leaves out, or gets wrong on
loading, what is mended here:

* frozen parameters and buffers are not loaded: they go through :data:`UNMOVED`;
* at stages 1 and 2 a rank that holds no part of a group (the temperature has one to itself) fails;
* at stage 3 every group takes the first group's weight decay, and all groups share one tensor that counts the steps, so
  that each step counts once per group.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import pickle
import re
import warnings
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from ..deepspeed_config import quiet_deepspeed

UNMOVED = "unmoved.safetensors"  # frozen parameters and buffers, whole, in their own dtype
ADAM = ("exp_avg", "exp_avg_sq")
_FORCE, _FORBID = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"


def _allowed() -> list[Any]:
    """Every class that DeepSpeed's files of stages 0 to 3 name: three plain records and an enumeration."""
    _quiet_import()
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    return [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]


@contextmanager
def plain_data_only() -> Iterator[None]:
    """Inside, every ``torch.load`` of this process, DeepSpeed's too, is ``weights_only=True``; classes: _allowed()."""
    before = {name: os.environ.pop(name, None) for name in (_FORCE, _FORBID)}
    os.environ[_FORCE] = "1"
    try:
        with safe_globals(_allowed()):
            yield
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))
        what = f"names {named[1]}, which is more than data" if named else "is no pickle of plain data"
        raise ValueError(f"a file of the student's {what}; it was not opened") from None
    finally:
        del os.environ[_FORCE]
        os.environ.update({name: value for name, value in before.items() if value is not None})


def more_than_data(student: Path, part: int = 0, parts: int = 1) -> str | None:
    """The first of the student's files that names a class or function beyond _allowed(), and its name; else None.

    Reads the pickles' instructions without following them, and no tensors. ``parts`` > 1: every ``parts``-th file only.
    """
    allowed = {f"{known.__module__}.{known.__qualname__}" for known in _allowed()}
    for path in sorted(student.rglob("*.pt"))[part::parts]:
        name = path.relative_to(student.parent).as_posix()
        try:
            named = set(get_unsafe_globals_in_checkpoint(path)) - allowed
        except Exception as error:  # whatever a strange file makes the reader stumble over
            return f"{name} is not a file of torch's ({type(error).__name__})"
        if named:
            return f"{name} names {min(named)}, which is more than data"
    return None


@contextmanager
def student_files_written_by(engine: Any, write: Callable[[Any, str], None]) -> Iterator[None]:
    """Inside, ``engine.save_checkpoint`` hands every (object, path) to ``write`` and copies no recovery scripts.

    A rank whose disk is full must still reach DeepSpeed's barriers: ``write`` can note the error instead of raising.
    """
    from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointEngine
    from deepspeed.utils import logger

    class Writer(CheckpointEngine):
        def create(self, info: Any) -> None:
            pass

        def save(self, state_dict: Any, path: str) -> None:
            write(state_dict, path)

        def load(self, path: str, map_location: Any = None) -> Any:
            raise NotImplementedError

        def commit(self, info: Any) -> bool:
            return True

    usual, level = engine.checkpoint_engine, logger.level
    logger.setLevel(logging.CRITICAL)  # it calls a folder that is there already a failure; real ones are ours to tell
    engine.checkpoint_engine = Writer()
    engine._copy_recovery_script = lambda save_path: None
    try:
        yield
    finally:
        engine.checkpoint_engine = usual
        logger.setLevel(level)
        del engine._copy_recovery_script


def is_universal(student: Path) -> bool:
    """Whether a checkpoint's student loads into any number of ranks (see also stage 0, which always does)."""
    return (student / "zero").is_dir()


def read_unmoved(student: Path) -> dict[str, Tensor] | None:
    """What :func:`load_student` wants besides; None for a sharded student. Local, so that ranks can agree on errors."""
    return load_file(student / UNMOVED) if is_universal(student) else None


def load_student(engine: Any, student: Path, unmoved: Mapping[str, Tensor] | None) -> None:
    """Weights, masters, optimizer and DeepSpeed's counters from the folder ``student``, of either format. Collective.

    The number of ranks and the ZeRO stage must fit, the manifest must have matched. ``unmoved``: of read_unmoved().
    Raises ValueError for a file that names more than data, and whatever else DeepSpeed or torch find wrong, on the
    rank that finds it: the others may wait for it in a collective, so nothing but ending them all must follow.
    """
    universal = unmoved is not None
    hyperparameters = [
        {name: value for name, value in group.items() if name != "params"} for group in engine.optimizer.param_groups
    ]
    with plain_data_only(), contextlib.ExitStack() as stack:
        if universal:
            engine._config.load_universal_checkpoint = True
            stack.callback(setattr, engine._config, "load_universal_checkpoint", False)
            stack.enter_context(_mended_groups(engine.optimizer))
        path, _ = engine.load_checkpoint(str(student.parent), tag=student.name)
    if path is None:
        raise RuntimeError("DeepSpeed found nothing to load")
    if unmoved is not None:
        _load_unmoved(engine, unmoved)
        for group, values in zip(engine.optimizer.param_groups, hyperparameters, strict=True):
            group.update(values)
        _separate_steps(engine.optimizer)


def convert_student(sharded: Path, universal: Path, stage: int) -> None:
    """Writes the folder ``universal`` from a ``sharded`` one of ZeRO stage 1 to 3. In this process alone; no engine.

    Raises whatever DeepSpeed, torch or the file system find wrong; what has been written so far stays then.
    """
    _quiet_import()
    from deepspeed.checkpoint import ds_to_universal

    options = Namespace(
        input_folder=str(sharded),
        output_folder=str(universal),
        num_extract_workers=1,  # more would be processes that do not know what is allowed
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,  # of stages 1 and 2
    )
    universal.mkdir()
    chatter = io.StringIO()
    with (
        plain_data_only(),
        warnings.catch_warnings(),
        contextlib.redirect_stdout(chatter),
        contextlib.redirect_stderr(chatter),
    ):
        warnings.simplefilter("ignore")
        ds_to_universal.main(options)
        unmoved = _unmoved_sharded(sharded) if stage == 3 else _unmoved_whole(sharded)
    (universal.parent / "latest_universal").unlink()  # DeepSpeed's own pointer; ours is crash-safe
    save_file(unmoved, universal / UNMOVED)


def _quiet_import() -> None:
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    with quiet_deepspeed():
        import deepspeed  # noqa: F401


@contextmanager
def _mended_groups(optimizer: Any) -> Iterator[None]:
    """Stages 1, 2: loads each group's part by DeepSpeed's own functions, whether this rank holds any of it or not."""
    from deepspeed.utils.tensor_fragment import map_to_flat_opt_states

    name = "load_hp_checkpoint_state_from_checkpoint_dir"
    if not hasattr(optimizer, name):  # stage 3 has its own
        yield
        return

    def load(groups_name: str, folder: str) -> None:
        zero, state = Path(folder, "zero"), optimizer.optimizer.state
        optimizer._load_global_state(torch.load(zero / "optimizer_state.pt", weights_only=True))
        for group, parameters in zip(optimizer.optimizer.param_groups, getattr(optimizer, groups_name), strict=True):
            master = group["params"][0]
            folders = [zero / optimizer.param_names[parameter] for parameter in parameters]
            for parameter, folder_of_parameter in zip(parameters, folders, strict=True):
                if parameter._hp_mapping is not None:
                    parameter.load_hp_checkpoint_state(str(folder_of_parameter), 0, 1)
            map_to_flat_opt_states(master, parameters, state, ADAM)
            state[master]["step"] = torch.load(folders[0] / "step.pt", weights_only=True)

    setattr(optimizer, name, load)
    try:
        yield
    finally:
        delattr(optimizer, name)


def _separate_steps(optimizer: Any) -> None:
    """A tensor of its own for every state's step, on the device where the optimizer's kernel looks for it."""
    inner = optimizer.optimizer
    on_device = any(group.get("fused") or group.get("capturable") for group in inner.param_groups)
    for master, state in inner.state.items():
        if isinstance(step := state.get("step"), Tensor):
            state["step"] = step.detach().clone().to(master.device if on_device else "cpu")


def _load_unmoved(engine: Any, tensors: Mapping[str, Tensor]) -> None:
    import deepspeed

    for name, buffer in engine.module.named_buffers():
        if name in tensors:
            buffer.copy_(tensors[name])
    frozen = {name: p for name, p in engine.module.named_parameters() if name in tensors}
    sharded = [parameter for parameter in frozen.values() if hasattr(parameter, "ds_id")]
    with deepspeed.zero.GatheredParameters(sharded, modifier_rank=0), torch.no_grad():
        for name, parameter in frozen.items():
            parameter.copy_(tensors[name])


def _unmoved_whole(student: Path) -> dict[str, Tensor]:
    """Stages 1 and 2: rank 0's file has everything; what no optimizer moves is named there at stage 2 only."""
    state = torch.load(student / "mp_rank_00_model_states.pt", map_location="cpu", weights_only=True)
    moved = {name for group in state["param_shapes"] for name in group} | set(state["shared_params"])
    return {name: value.clone().contiguous() for name, value in state["module"].items() if name not in moved}


def _unmoved_sharded(student: Path) -> dict[str, Tensor]:
    """Stage 3: buffers of rank 0, and frozen parameters."""
    files = files_by_rank(student, "*mp_rank_00_model_states.pt")
    models = [torch.load(path, map_location="cpu", weights_only=True) for path in files]
    found = {name: models[0]["module"][name].clone().contiguous() for name in models[0]["buffer_names"]}
    return found | {name: value.clone() for name, value in frozen_shares(models)}


def files_by_rank(student: Path, pattern: str) -> list[Path]:
    """Names are (bf16_)zero_pp_rank_N_mp_rank_00_*; rank 10 comes after rank 9. ValueError where there is none."""
    found = sorted(
        student.glob(pattern), key=lambda path: int(path.name.partition("pp_rank_")[2].partition("_")[0] or 0)
    )
    if not found:
        raise ValueError(f"no {pattern} is in it")
    return found


def frozen_shares(models: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, Tensor]]:
    """Stage 3: frozen parameters put together from all ranks' equal, padded shares."""
    for name, shape in (models[0]["frozen_param_shapes"] or {}).items():
        whole = torch.cat([model["frozen_param_fragments"][name].reshape(-1) for model in models])
        yield name, whole[: torch.Size(shape).numel()].view(torch.Size(shape))
