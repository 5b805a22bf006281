"""Environment variables, files and folders that silently change what runs."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from .finding import Finding, quietly
from .ops import interpreted

FOUND = dict(os.environ)  # as this process began: libraries set variables of their own while they are imported

PREFIXES: tuple[str, ...] = (
    "CROSSMASK_",
    "TORCH_",
    "TORCHINDUCTOR_",
    "TORCHDYNAMO_",
    "PYTORCH_",
    "NCCL_",
    "GLOO_",
    "DS_",
    "DEEPSPEED_",
)
PREFIXES += ("TRITON_", "CUDA_", "DNNL_", "ONEDNN_", "MKL_", "KMP_", "GOMP_", "ATEN_", "HF_")
LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")
KNOWN = ("CUDA_VISIBLE_DEVICES", "CUDA_HOME", "TRITON_INTERPRET", "CROSSMASK_ATTENTION_CONFIGS")  # said elsewhere


class Change(NamedTuple):
    """What a variable does where its value is one of ``values`` (none: any but an empty one)."""

    variable: str
    values: tuple[str, ...]
    effect: str
    on_gpus: bool = False  # of no effect elsewhere


CHANGES = (
    Change("CROSSMASK_NATIVE", ("0",), "the native extension is not loaded; plain PyTorch runs instead"),
    Change("CROSSMASK_LINEAR", ("torch",), "linear layers keep to PyTorch's products, slower on AMD processors"),
    Change("CROSSMASK_FAILURE_FILE", (), "left over from a rank of a run: a start takes itself for one"),
    Change("CROSSMASK_LAUNCHER_PID", (), "left over from a rank of a run: a start ends when that process does"),
    Change("DS_ACCELERATOR", ("cpu",), "runs train as CPU ranks, whatever GPUs there are", True),
    Change("CUDA_LAUNCH_BLOCKING", ("1",), "every kernel is waited for: for debugging, slow", True),
    Change("NVIDIA_TF32_OVERRIDE", ("0",), "float32 products do without TF32 whatever a program asks for", True),
    Change("NCCL_P2P_DISABLE", ("1",), "GPUs do not read each other's memory: gradients take the slow way", True),
    Change("NCCL_SHM_DISABLE", ("1",), "ranks of one machine speak through sockets", True),
    Change("TORCHDYNAMO_DISABLE", ("1",), "torch.compile does nothing"),
    Change("TORCH_COMPILE_DISABLE", ("1",), "torch.compile does nothing"),
    Change("TORCH_DISTRIBUTED_DEBUG", ("DETAIL", "INFO"), "every collective is checked: slow"),
    Change("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", ("1", "y", "yes", "true"), "torch.load runs code of files it loads"),
    Change("PYTORCH_NO_CUDA_MEMORY_CACHING", (), "GPU memory is asked for and returned each time: slow", True),
    Change("ATEN_CPU_CAPABILITY", ("default", "avx2"), "PyTorch leaves the processor's wider vectors unused"),
    Change("DNNL_MAX_CPU_ISA", (), "oneDNN leaves instructions of the processor unused"),
    Change("ONEDNN_MAX_CPU_ISA", (), "oneDNN leaves instructions of the processor unused"),
)


class Shadow(NamedTuple):
    """The module that a bare ``import kernels`` finds, and whether it is ours."""

    folder: str
    ours: bool


def look_shadow() -> Shadow | None:
    spec = quietly(lambda: importlib.util.find_spec("kernels"))
    origin = getattr(spec, "origin", None)
    if not origin:
        return None
    folder = Path(origin).resolve().parent
    return Shadow(str(folder.parent), folder == Path(__file__).resolve().parents[2] / "kernels")


def judge_shadow(shadow: Shadow | None) -> Iterator[Finding]:
    if shadow is not None and shadow.ours:
        yield Finding(
            "import kernels",
            f"finds crossmask's own folder in {shadow.folder}: Transformers may take it for the package of that name",
            "gap",
            f"take {shadow.folder} out of PYTHONPATH, or start elsewhere than in the checkout's root",
        )


def judge(environment: Mapping[str, str], gpus: bool, path_exists: bool = True) -> Iterator[Finding]:
    """Variables that change something. Values are shown of those alone that are known to hold no secret.

    Args:
        path_exists: whether the file that CROSSMASK_ATTENTION_CONFIGS names is there.
    """
    if interpreted(dict(environment)):
        if gpus:
            here = "Triton's kernels run in its interpreter, very slowly"
            yield Finding("TRITON_INTERPRET", here, "gap", "unset TRITON_INTERPRET")
        else:
            yield Finding(
                "TRITON_INTERPRET", "is set; without a GPU no kernel is Triton's, so it changes nothing", "optional"
            )
    if environment.get("CROSSMASK_ATTENTION_CONFIGS"):
        level = "optional" if path_exists else "gap"
        here = f"tiles of attention come from {environment['CROSSMASK_ATTENTION_CONFIGS']}"
        remedy = (
            "" if path_exists else "it is no such file: unset CROSSMASK_ATTENTION_CONFIGS, or write it with triton.tune"
        )
        yield Finding("CROSSMASK_ATTENTION_CONFIGS", here, level, remedy)  # type: ignore[arg-type]
    for change in CHANGES:
        value = environment.get(change.variable, "")
        if not value or (change.values and value.lower() not in {x.lower() for x in change.values}):
            continue
        if change.on_gpus and not gpus and change.variable != "DS_ACCELERATOR":
            continue
        if change.variable == "DS_ACCELERATOR" and not gpus:
            yield Finding("DS_ACCELERATOR", f"{value}: {change.effect}", "optional")
        else:
            yield Finding(change.variable, f"{value}: {change.effect}", "gap", f"unset {change.variable}")
    left = [name for name in LAUNCHED if name in environment]
    if left:
        yield Finding(
            "of another launch",
            f"{', '.join(left)} set: python -m crossmask.engine.train would wait for the ranks of that launch",
            "gap",
            f"outside of a launcher: unset {' '.join(left)}",
        )
    if "LD_PRELOAD" in environment:
        yield Finding("LD_PRELOAD", environment["LD_PRELOAD"] or "empty", "optional")
    if environment.get("PYTHONPATH"):
        yield Finding("PYTHONPATH", f"{environment['PYTHONPATH']}: searched before what is installed", "optional")
    told = {*KNOWN, *(change.variable for change in CHANGES)}
    others = sorted(name for name in environment if name.startswith(PREFIXES) and name not in told)
    if others:
        yield Finding("also set", ", ".join(others), "optional")


def findings(gpus: bool) -> Iterable[Finding]:
    yield from judge_shadow(look_shadow())
    tiles = FOUND.get("CROSSMASK_ATTENTION_CONFIGS", "")
    yield from judge(FOUND, gpus, Path(tiles).expanduser().is_file())
