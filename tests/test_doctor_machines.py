"""What the doctor says of machines that are not here, from made-up facts; every gap says what to do."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from crossmask.engine.doctor import Finding, building, environment, gpus, host, libraries, ops
from crossmask.engine.doctor.building import ExtensionFacts, Tool
from crossmask.engine.doctor.finding import GIB
from crossmask.engine.doctor.gpus import Gpu, GpuFacts, Listed
from crossmask.engine.doctor.host import HostFacts

H100 = Gpu("NVIDIA H100 80GB HBM3", "sm_90", 80 * GIB)
CODE = ("sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120")
LISTED = Listed("NVIDIA H100 80GB HBM3", "580.82.07", 80 * GIB, 0, False)
EIGHT = GpuFacts(
    "2.14.1+cu130",
    "CUDA 13.0",
    code_for=CODE,
    gpus=(H100,) * 8,
    driver_cuda=(13, 0),
    listed=(LISTED,) * 8,
    files=("/dev/nvidia0", "/dev/nvidiactl"),
    bf16=True,
    nccl="2.30.7",
)
OLD_DRIVER = replace(
    EIGHT,
    gpus=(),
    error="RuntimeError: the driver is too old",
    driver_cuda=(12, 4),
    listed=(replace(LISTED, driver="550.54.15"),),
)
ROCM = GpuFacts(
    "2.14.1+rocm7.0",
    "ROCm 7.0",
    code_for=("gfx90a", "gfx942"),
    gpus=(Gpu("AMD Instinct MI300X", "gfx942", 192 * GIB),),
    files=("/dev/kfd",),
    bf16=True,
    nccl="2.26",
)
NOTHING = GpuFacts("2.14.1", "CUDA 13.0", error="Found no NVIDIA driver")
DESKTOP = HostFacts(
    "AMD EPYC", 16, 16, capabilities=frozenset({"avx2", "avx512_f", "avx512_bf16"}), memory=64 * GIB,
    memory_free=48 * GIB, shared=(32 * GIB, 32 * GIB), runs="/home/me", disk_free=200 * GIB, open_files=(65536, 65536),
)  # fmt: skip
EXTENSION = ExtensionFacts(True, "_C.abi3.so", ("80", "90", "120"), built_with="2.14.1+cu130", torch="2.14.1+cu130")


def told(findings: Iterable[Finding]) -> dict[str, Finding]:
    found = list(findings)
    for finding in found:
        assert bool(finding.remedy) == (finding.level in ("gap", "broken")), finding
        assert "\n" not in finding.here + finding.remedy
    return {finding.what: finding for finding in found}


def levels(findings: dict[str, Finding]) -> dict[str, str]:
    return {what: finding.level for what, finding in findings.items() if finding.level in ("gap", "broken")}


# -- GPUs --------------------------------------------------------------------------------------------------------------


def test_eight_h100() -> None:
    found = told(gpus.judge(EIGHT))
    assert levels(found) == {}
    assert found["GPUs"].here == "8 × NVIDIA H100 80GB HBM3 (sm_90, 80 GiB)"
    assert found["GPU driver"].here == "580.82.07, runs CUDA up to 13.0; torch is built for CUDA 13.0"
    assert found["NCCL"].here == "2.30.7"
    assert found["between GPUs"].here == "direct access, each to every other"


def test_an_old_driver_names_the_one_to_install() -> None:
    (found,) = gpus.judge(OLD_DRIVER)
    assert found == Finding(
        "GPUs",
        "NVIDIA H100 80GB HBM3, but the driver (550.54.15, up to CUDA 12.4) is too old for torch's CUDA 13.0; training "
        "runs as CPU ranks",
        "gap",
        "update NVIDIA's driver to 580.65 or newer",
    )
    assert not gpus.driver_is_old(replace(OLD_DRIVER, built_for="CUDA 12.8"))  # minor versions fit each other


def test_rocm() -> None:
    found = told(gpus.judge(ROCM))
    assert levels(found) == {}
    assert found["GPUs"].here == "1 × AMD Instinct MI300X (gfx942, 192 GiB)"
    assert found["GPU driver"].here == "present; torch is built for ROCm 7.0"
    (closed,) = gpus.judge(replace(ROCM, gpus=(), readable=False, error="no HIP GPUs"))
    assert "usermod -aG render,video" in closed.remedy


@pytest.mark.parametrize(
    ("facts", "here", "remedy"),
    [
        (NOTHING, "none; training runs as CPU ranks", ""),
        (replace(NOTHING, built_for=None), "none; training runs as CPU ranks", ""),
        (
            replace(EIGHT, gpus=(), selected=(("CUDA_VISIBLE_DEVICES", ""),)),
            "hidden by CUDA_VISIBLE_DEVICES=''",
            "unset",
        ),
        (replace(EIGHT, gpus=(), built_for=None, torch="2.14.1+cpu"), "torch 2.14.1+cpu is a CPU build", "CUDA build"),
        (replace(ROCM, gpus=(), built_for=None), "/dev/kfd, but torch 2.14.1+rocm7.0 is a CPU build", "ROCm build"),
        (replace(EIGHT, gpus=(), error="RuntimeError: busy"), "torch cannot use it: busy; training", "--gpus all"),
        (replace(ROCM, gpus=(), error="RuntimeError: no"), "torch cannot use it: no; training", "--device /dev/kfd"),
    ],
)
def test_why_no_gpu_is_used(facts: GpuFacts, here: str, remedy: str) -> None:
    found = told(gpus.judge(facts))["GPUs"]
    assert here in found.here
    assert remedy in found.remedy


def test_gpus_with_something_about_them() -> None:
    turing = Gpu("Tesla V100", "sm_70", 16 * GIB)
    facts = replace(
        EIGHT,
        gpus=(H100, H100, turing),
        bf16=False,
        listed=(replace(LISTED, used=60 * GIB, mig=True), LISTED),
        nccl=None,
        apart=((0, 2), (2, 0)),
        selected=(("CUDA_VISIBLE_DEVICES", "GPU-1a2b"),),
    )
    found = told(gpus.judge(facts))
    assert levels(found) == {
        "different GPUs": "gap",
        "GPU code of torch": "broken",
        "bf16": "gap",
        "GPU memory": "gap",
        "CUDA_VISIBLE_DEVICES": "gap",
        "MIG": "gap",
        "NCCL": "broken",
        "between GPUs": "gap",
    }
    assert "CUDA_VISIBLE_DEVICES=0,1 " in found["different GPUs"].remedy
    assert "has none for sm_70" in found["GPU code of torch"].here
    assert found["GPU memory"].here == "in use by other processes: 1 of 2 GPUs, at most 60 GiB of 80 GiB"
    assert "(0-2, 2-0)" in found["between GPUs"].here
    assert (
        told(gpus.judge(replace(EIGHT, selected=(("CUDA_VISIBLE_DEVICES", "0,1"),))))["CUDA_VISIBLE_DEVICES"].level
        == "optional"
    )


def test_looking_at_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's answers become facts; an answer that fails costs its own line alone."""
    properties = SimpleNamespace(name="NVIDIA H100 80GB HBM3", major=9, minor=0, total_memory=80 * GIB)
    answers = {
        "init": lambda: None,
        "device_count": lambda: 2,
        "get_device_properties": lambda index: properties,
        "get_arch_list": lambda: ["sm_90"],
        "is_bf16_supported": lambda including_emulation: not including_emulation,
        "can_device_access_peer": lambda i, j: i < j,
    }
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, answer)

    def fails() -> None:
        raise RuntimeError("no NCCL")

    monkeypatch.setattr(torch.cuda.nccl, "version", fails)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    facts = gpus.look()
    assert facts.gpus == (H100, H100)
    assert (facts.code_for, facts.bf16, facts.nccl, facts.apart) == (("sm_90",), True, None, ((1, 0),))
    assert facts.selected == (("CUDA_VISIBLE_DEVICES", "0,1"),)
    monkeypatch.setattr(torch.cuda, "init", fails)
    assert gpus.look().error == "RuntimeError: no NCCL"
    monkeypatch.setattr(torch.version, "cuda", None)
    assert gpus.look().built_for is None


class Driver:
    """libcuda, as far as it is asked."""

    def __init__(self, version: int, failed: int = 0) -> None:
        self.version, self.failed = version, failed

    def cuDriverGetVersion(self, pointer: Any) -> int:
        pointer._obj.value = self.version
        return self.failed


@pytest.mark.parametrize(
    ("driver", "cuda"),
    [(Driver(13000), (13, 0)), (Driver(12040), (12, 4)), (Driver(0), None), (Driver(12040, 1), None)],
)
def test_the_driver_says_which_cuda_it_runs(
    driver: Driver, cuda: tuple[int, int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpus.ctypes, "CDLL", lambda name: driver)
    assert gpus.driver_cuda() == cuda


@pytest.mark.parametrize(
    ("code", "name", "runs"),
    [
        (("sm_80",), "sm_89", True),  # machine code of the same major version, older
        (("sm_89",), "sm_80", False),
        (("sm_80",), "sm_90", False),
        (("sm_80", "compute_80"), "sm_90", True),  # PTX is compiled anew
        (("compute_90",), "sm_80", False),
        (("sm_90a",), "sm_90", False),
        (("gfx942",), "gfx942", True),
        (("gfx942",), "gfx1100", False),
        ((), "sm_70", True),  # nothing is known
    ],
)
def test_which_code_runs_where(code: tuple[str, ...], name: str, runs: bool) -> None:
    assert gpus.has_code(code, name) == runs


def test_what_nvidia_smi_prints() -> None:
    card = "NVIDIA H100 80GB HBM3, 580.82.07, 81559"
    said = f"{card}, 12, Disabled\n{card}, 61440, Enabled\n"
    first, second = gpus.read_listed(said + "GRID, 1, [N/A], [N/A], [N/A]\nNo devices were found\n")[:2]
    assert first == Listed("NVIDIA H100 80GB HBM3", "580.82.07", 81559 * 2**20, 12 * 2**20, False)
    assert (second.used, second.mig) == (61440 * 2**20, True)
    assert gpus.read_listed("GRID, 1, [N/A], [N/A], [N/A]")[0].memory == 0
    assert gpus.read_listed("NVIDIA-SMI has failed") == ()


# -- the host ----------------------------------------------------------------------------------------------------------


def test_a_machine_with_everything() -> None:
    found = told(host.judge(DESKTOP))
    assert levels(found) == {}
    assert found["CPU"].here == "AMD EPYC: 16 cores, AVX-512"
    assert found["bf16 on the CPU"].here == "in hardware (AVX-512 BF16)"
    assert "OMP_NUM_THREADS" not in found


def test_a_cpu_without_avx512() -> None:
    facts = replace(DESKTOP, capabilities=frozenset({"avx2"}), onednn_bf16=False)
    found = told(host.judge(facts))
    assert found["CPU"].here.endswith("AVX2")
    assert "slower than fp32" in found["bf16 on the CPU"].here
    assert "training.precision=fp32" in found["bf16 on the CPU"].remedy
    assert told(host.judge(replace(facts, gpus=2)))["bf16 on the CPU"].level == "optional"
    assert told(host.judge(replace(facts, capabilities=frozenset({"sse4_1"}))))["CPU"].level == "gap"


def test_a_small_container() -> None:
    facts = replace(
        DESKTOP,
        cores=64,
        machine_cores=128,
        quota=2.0,
        onednn=False,
        memory_limit=4 * GIB,
        memory_free=GIB,
        shared=(64 * 2**20, 64 * 2**20),
        disk_free=GIB,
        open_files=(256, 4096),
    )
    found = told(host.judge(facts))
    names = ("oneDNN", "CPU quota", "memory", "/dev/shm", "disk", "open files")
    assert levels(found) == dict.fromkeys(names, "gap")
    assert found["CPU"].here == "AMD EPYC: 64 cores of 128, AVX-512"
    assert found["CPU quota"].remedy == "on CPU ranks: export OMP_NUM_THREADS=1 (for two ranks)"
    assert found["memory"].here == "4.0 GiB, the limit of the container, 1.0 GiB free"
    assert "--shm-size" in found["/dev/shm"].remedy
    assert "ulimit -n 4096" in found["open files"].remedy
    assert told(host.judge(replace(facts, writable=False)))["disk"].remedy.endswith("--output DIR")


@pytest.mark.parametrize(("threads", "level"), [("64", "gap"), ("1", "gap"), ("8", "optional"), ("many", "gap")])
def test_threads(threads: str, level: str) -> None:
    assert told(host.judge(replace(DESKTOP, threads=threads)))["OMP_NUM_THREADS"].level == level


@pytest.mark.parametrize(
    ("files", "cpus", "memory"),
    [
        ({"cpu.max": "200000 100000", "memory.max": "4294967296"}, 2.0, 4 * GIB),
        ({"cpu.max": "max 100000", "memory.max": "max"}, None, None),
        ({"cpu/cpu.cfs_quota_us": "150000", "cpu/cpu.cfs_period_us": "100000"}, 1.5, None),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None, None),
        ({"memory/memory.limit_in_bytes": "9223372036854771712"}, None, None),
        ({"memory/memory.limit_in_bytes": "1073741824"}, None, GIB),
        ({}, None, None),
    ],
)
def test_control_groups(files: dict[str, str], cpus: float | None, memory: int | None, tmp_path: Path) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    assert host.quota(tmp_path) == cpus
    assert host.memory_limit(tmp_path) == memory


# -- the extension -----------------------------------------------------------------------------------------------------


def test_extensions() -> None:
    assert levels(told(building.judge_extension(EXTENSION))) == {}
    stale = told(building.judge_extension(replace(EXTENSION, newer=("csrc/ema_cpu.cpp", "csrc/a", "csrc/b"))))
    assert stale["native extension"].here.endswith("older than csrc/ema_cpu.cpp, csrc/a and 1 more, so stale")
    later = told(building.judge_extension(replace(EXTENSION, built_with="2.15.0")))
    assert levels(later) == {"built": "gap"}
    earlier = told(building.judge_extension(replace(EXTENSION, built_with="2.13.0+cpu")))
    assert earlier["built"].here == "with torch 2.13.0+cpu; 2.14.1+cu130 loads it by torch's stable ABI"
    uncovered = told(building.judge_extension(replace(EXTENSION, architectures=("90",), gpus=("sm_80", "sm_90"))))
    assert uncovered["code for this GPU"].here == "the extension has none for sm_80"
    assert 'CROSSMASK_CUDA_ARCHITECTURES="80"' in uncovered["code for this GPU"].remedy
    newest = told(building.judge_extension(replace(EXTENSION, gpus=("sm_130",))))  # by the PTX of sm_120
    assert levels(newest) == {}
    on_cpu = replace(EXTENSION, architectures=(), cuda_reason="no nvcc was found (install the CUDA toolkit)")
    assert levels(told(building.judge_extension(on_cpu))) == {}
    assert (
        told(building.judge_extension(replace(on_cpu, gpus=("sm_90",))))["native extension"].remedy
        == on_cpu.cuda_reason
    )
    absent = told(building.judge_extension(ExtensionFacts(False, reason="no C++ compiler (install g++)")))
    assert absent["native extension"].remedy == "no C++ compiler (install g++)"


def test_what_was_built_is_read_from_beside_the_library(tmp_path: Path) -> None:
    assert building.built_with(tmp_path / "_C.json") is None
    for text, found in (('{"torch": "2.13"}', "2.13"), ('{"torch": null}', None), ("[]", None), ("{", None)):
        (tmp_path / "_C.json").write_text(text)
        assert building.built_with(tmp_path / "_C.json") == found
    library = tmp_path / "kernels" / "_C.so"
    library.parent.mkdir()
    library.touch()
    assert building.newer_sources(library) == ()  # installed, without sources
    (tmp_path / "csrc").mkdir()
    (tmp_path / "csrc" / "new.cpp").touch()
    assert building.newer_sources(library) in ((), ("csrc/new.cpp",))
    os.utime(library, (0, 0))
    assert building.newer_sources(library) == ("csrc/new.cpp",)


def test_tools() -> None:
    nvcc = Tool("nvcc", (12, 0), "the CUDA toolkit")
    tools = [Tool("cmake", (3, 25), "pip install cmake", "/usr/bin/cmake", "3.22.1"), nvcc]
    found = told(building.judge_tools(tools, gpus=True))
    assert found["cmake"].here == "3.22.1 at /usr/bin/cmake, but 3.25 is needed to build the extension"
    assert levels(found) == {"cmake": "gap", "nvcc": "gap"}
    assert levels(told(building.judge_tools([nvcc], gpus=False))) == {}
    older = nvcc._replace(path="/usr/bin/nvcc", version="12.4")
    assert "sm_100" in told(building.judge_tools([older], gpus=True))["nvcc"].here
    assert levels(told(building.judge_tools([older], gpus=False))) == {}


def test_launchers() -> None:
    found = told(building.judge_deepspeed(None, "/usr/bin/python", True, None, []))
    assert levels(found) == {"deepspeed launcher": "gap"}
    assert found["hostfile"].here.endswith("crossmask train stays on this machine")
    assert told(building.judge_deepspeed("deepspeed", "", False, "/usr/bin/pdsh", ["fused_adam"]))[
        "DeepSpeed's ops"
    ].here.startswith("fused_adam;")


def test_tiles() -> None:
    compiled = ["sm_80", "sm_86", "sm_89", "sm_90", "gfx942"]
    assert levels(told(ops.tiles(["sm_90", "sm_90"], compiled))) == {}
    assert "those of sm_86 are taken" in told(ops.tiles(["sm_87"], compiled))["Triton tiles"].here
    assert "the smallest there are" in told(ops.tiles(["gfx1100"], compiled))["Triton tiles"].here


# -- the environment ---------------------------------------------------------------------------------------------------


def test_variables_that_change_things() -> None:
    given = {
        "TRITON_INTERPRET": "1",
        "CROSSMASK_NATIVE": "0",
        "CROSSMASK_LINEAR": "torch",
        "DS_ACCELERATOR": "cpu",
        "CUDA_LAUNCH_BLOCKING": "1",
        "RANK": "3",
        "MASTER_ADDR": "node1",
        "CROSSMASK_ATTENTION_CONFIGS": "/tiles.json",
    }
    found = told(environment.judge(given, gpus=True, path_exists=False))
    several = {"of another launch"}
    assert set(levels(found)) == {*given, *several} - {"RANK", "MASTER_ADDR"}
    assert found["of another launch"].remedy == "outside of a launcher: unset RANK MASTER_ADDR"
    without = told(environment.judge(given, gpus=False))
    assert set(levels(without)) == {"CROSSMASK_NATIVE", "CROSSMASK_LINEAR", *several}


def test_secrets_are_not_printed() -> None:
    given = {"HF_TOKEN": "hf_secret", "AWS_SECRET_ACCESS_KEY": "other", "TORCH_HOME": "/x", "CROSSMASK_NATIVE": "1"}
    found = told(environment.judge(given, gpus=True))
    assert found == {"also set": Finding("also set", "HF_TOKEN, TORCH_HOME", "optional")}


def test_a_checkout_on_the_path_is_what_import_kernels_finds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = told(environment.judge_shadow(environment.Shadow("/src/crossmask", True)))
    assert ours["import kernels"].remedy.startswith("take /src/crossmask out of PYTHONPATH")
    assert told(environment.judge_shadow(environment.Shadow("/site-packages", False))) == {}
    monkeypatch.delitem(environment.importlib.sys.modules, "kernels", raising=False)  # type: ignore[attr-defined]
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[1]))
    shadow = environment.look_shadow()
    assert shadow is not None
    assert shadow.ours


def test_extras_say_what_they_are_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(libraries, "_there", lambda module: module == "h5py")
    found = told(libraries.extras(gpu=False))
    assert found["h5py"].here.endswith(": FashionGen's published files")
    assert found["xformers"].here == "for a peer in make bench-gpu (needs a GPU): pip install 'crossmask[xformers]'"
    assert levels(found) == {}
