"""Saves small students from every ZeRO stage, and beside each its masters as they were gathered in training.

python tests/distributed/export_students.py FOLDER
"""

from __future__ import annotations

import sys
from itertools import chain
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import forked
import student
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

PLAIN = [f"{stage}-{dtype}" for stage in range(4) for dtype in ("fp32", "bf16")]
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # zero_optimization, other sections
    "offload": ({"offload_optimizer": {"device": "cpu"}}, {}),
    "subgroups": ({"sub_group_size": 100}, {}),
    "accumulation": ({}, {"data_types": {"grad_accum_dtype": "fp32"}}),
}
ON_TWO = [*PLAIN, "2-bf16-offload", "3-bf16-offload", "3-fp32-subgroups", "1-bf16-accumulation"]
ON_OTHERS = ["2-bf16", "3-fp32", "1-fp32"]


def masters(engine: Any) -> dict[str, Tensor]:
    """Whole, fp32, from the optimizer's own tensors. Collective."""
    optimizer, stage, found = engine.optimizer, engine.zero_optimization_stage(), {}
    low, high = ([*chain(*getattr(optimizer, f"{name}_groups", []))] for name in ("fp16", "fp32"))
    for name, p in engine.module.named_parameters():
        if not p.requires_grad:
            continue
        if stage == 0:
            found[name] = next((master for own, master in zip(low, high, strict=True) if own is p), p)
        elif stage == 3:
            from deepspeed.utils import safe_get_full_fp32_param

            found[name] = safe_get_full_fp32_param(p)
        else:
            found[name] = torch.zeros(p.numel())
            if p._hp_mapping is not None:
                place = p._hp_mapping.lp_fragment_address
                found[name].narrow(0, place.start, place.numel).copy_(p._hp_mapping.get_hp_fragment())
            dist.all_reduce(found[name])
            found[name] = found[name].view(p.shape)
    return {name: value.detach().float().clone() for name, value in found.items()}


def everything(engine: Any) -> dict[str, Tensor]:
    """Also what no optimizer moves."""
    import deepspeed

    module, found = engine.module, masters(engine)
    frozen = {name: p for name, p in module.named_parameters() if not p.requires_grad}
    with deepspeed.zero.GatheredParameters([p for p in frozen.values() if hasattr(p, "ds_id")]):
        found |= {name: p.detach().float().clone() for name, p in frozen.items()}
    return found | {name: b.clone() for name, b in module.named_buffers() if name in module.state_dict()}


def train_and_save(folder: Path, cases: list[str]) -> None:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    for case in cases:
        stage, dtype, *variant = case.split("-")
        extra, config = VARIANTS[variant[0]] if variant else ({}, {})
        engine = student.build(int(stage), dtype, extra=extra, config=config, lr=3e-2)
        for step in range(3):
            engine.backward(engine(student.ids_of(step, rank)))
            engine.step()
        target = folder / f"{case}-of-{ranks}"
        engine.save_checkpoint(str(target), tag="student", save_latest=False)
        found = everything(engine)
        if rank == 0:
            save_file(found, target / "everything.safetensors")


def convert(folder: Path) -> None:
    from crossmask.engine.training.student_files import convert_student

    for case in PLAIN[2:]:
        target = folder / f"{case}-of-2"
        convert_student(target / "student", target / "universal", int(case[0]))


def main() -> None:
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    forked.prepare()
    forked.run(2, train_and_save, folder, ON_TWO, folder=folder)
    forked.run(1, train_and_save, folder, ON_OTHERS, folder=folder)
    forked.run(4, train_and_save, folder, ON_OTHERS, folder=folder)
    forked.run(1, convert, folder, folder=folder)


if __name__ == "__main__":
    main()
