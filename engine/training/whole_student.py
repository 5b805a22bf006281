"""The student's fp32 masters put together again from DeepSpeed's files, in one process and without an engine.

DeepSpeed's own ``zero_to_fp32`` does not know stage 0 and universal checkpoints, leaves out what is frozen at stage 1,
and gives frozen parameters in 16 bits. Here every value is read from where it is exact:

========= =====================================================================================================
stage 0   the weights themselves; in bf16 and fp16 the optimizer's ``fp32_groups``, which have no names, only an order
stage 1,2 each rank's flat part of each group; ``param_slice_mappings`` says which piece of it belongs to whom
stage 3   each rank's equal share of each parameter, padded, one after another over all groups
universal a whole master in a file of its own
========= =====================================================================================================

Frozen parameters and buffers are taken as they are. Wherever the files also have the weights that the student computed
with, each master must round to its weight: another layout than these would not pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from ..errors import CheckpointError
from .manifest import one_line
from .student_files import UNMOVED, files_by_rank, frozen_shares, is_universal, plain_data_only


def whole_student(student: Path, stage: int, trained: Sequence[Sequence[str]]) -> dict[str, Tensor]:
    """Parameters by name, whole and fp32, tied ones once, and persistent buffers in their own dtype.

    Args:
        student: the folder of a checkpoint whose files match its manifest, of any world size.
        stage: the ZeRO stage that saved it.
        trained: the names of each parameter group of the optimizer, in its order.

    Raises:
        CheckpointError: files that do not fit together, or that name more than data.
    """
    try:
        with plain_data_only():
            return _whole_student(student, stage, trained)
    except (KeyError, IndexError, TypeError, AttributeError, RuntimeError, ValueError, OSError) as error:
        what = f"{type(error).__name__}: {one_line(error)}"
        raise CheckpointError(f"{student} is not laid out as DeepSpeed's ZeRO stage {stage} does it: {what}") from None


def _whole_student(student: Path, stage: int, trained: Sequence[Sequence[str]]) -> dict[str, Tensor]:
    models = [_load(path) for path in files_by_rank(student, "*mp_rank_00_model_states.pt")]
    module, buffers, tied = models[0]["module"], set(models[0]["buffer_names"]), models[0]["shared_params"] or {}
    shapes = {name: torch.Size(shape) for group in models[0]["param_shapes"] or () for name, shape in group.items()}
    if stage == 0:
        found = _named_masters(models[0], trained)
    elif is_universal(student):
        found = dict(_universal(student / "zero", shapes))
    elif stage == 3:
        found = dict(_shares(_optimizers(student), shapes))
    else:
        found = dict(_pieces(_optimizers(student), shapes))
    for name, master in found.items():
        weight = module[name]
        if weight.numel() and not torch.equal(master.to(weight.dtype).nan_to_num(), weight.nan_to_num()):
            raise ValueError(f"the master of {name} does not round to its weight")
    if is_universal(student):
        found |= load_file(student / UNMOVED)
    elif stage == 3:
        found |= {name: module[name] for name in buffers} | dict(frozen_shares(models))
    else:
        known = {module[name].data_ptr() for name in found}  # stage 0 does not say what is tied
        unmoved = {name: value for name, value in module.items() if name not in found and name not in tied}
        found |= {name: value for name, value in unmoved.items() if value.data_ptr() not in known}
    missing = set(chain(*trained)) - found.keys()
    if missing:
        raise ValueError(f"{min(missing)} is in none of the files")
    return {name: value if name in buffers else value.float() for name, value in found.items()}


def _load(path: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    return loaded


def _optimizers(student: Path) -> list[dict[str, Any]]:
    """One for each rank."""
    states = [_load(path)["optimizer_state_dict"] for path in files_by_rank(student, "*_optim_states.pt")]
    for state in states:
        ranks = state["partition_count"]
        if any(count != len(states) for count in (ranks if isinstance(ranks, list) else [ranks])):
            raise ValueError(f"there are files of {len(states)} ranks, saved were {ranks}")
    return states


def _named_masters(model: Mapping[str, Any], trained: Sequence[Sequence[str]]) -> dict[str, Tensor]:
    """Stage 0. In fp32 there are no masters beside the weights."""
    optimizer = model["optimizer"]
    if "fp32_groups" not in optimizer:
        return {name: model["module"][name] for name in chain(*trained)}
    groups = zip(trained, optimizer["fp32_groups"], strict=True)
    return {name: master for names, masters in groups for name, master in zip(names, masters, strict=True)}


def _universal(zero: Path, shapes: Mapping[str, torch.Size]) -> Iterator[tuple[str, Tensor]]:
    for name, shape in shapes.items():
        master = torch.load(zero / name / "fp32.pt", map_location="cpu", mmap=True, weights_only=True)
        yield name, (master["param"] if isinstance(master, dict) else master).view(shape)


def _pieces(optimizers: Sequence[Mapping[str, Any]], shapes: Mapping[str, torch.Size]) -> Iterator[tuple[str, Tensor]]:
    """Stages 1 and 2. A parameter's pieces follow one another in the order of the ranks."""
    pieces: dict[str, list[Tensor]] = {name: [] for name in shapes}
    for state in optimizers:
        for flat, mapping in zip(state["single_partition_of_fp32_groups"], state["param_slice_mappings"], strict=True):
            for name, place in mapping.items():
                pieces[name].append(flat.narrow(0, place.start, place.numel))
    for name, shape in shapes.items():
        yield name, torch.cat(pieces[name]).view(shape)


def _shares(optimizers: Sequence[Mapping[str, Any]], shapes: Mapping[str, torch.Size]) -> Iterator[tuple[str, Tensor]]:
    """Stage 3. Sub-groups end between parameters, so that all of them are one line for each rank."""
    lines = [torch.cat([flat.reshape(-1) for flat in state["fp32_flat_groups"]]) for state in optimizers]
    begin = 0
    for name, shape in shapes.items():
        share = -(-shape.numel() // len(lines))
        whole = torch.cat([line.narrow(0, begin, share) for line in lines])
        yield name, whole[: shape.numel()].view(shape)
        begin += share
    if any(line.numel() != begin for line in lines):
        raise ValueError(f"the masters have {lines[0].numel()} elements a rank, the parameters {begin}")
