"""A problem and those who solve it: held to a float64 reference first, timed in turns after.

An implementation whose result is wrong gets no time. "Wrong" is this project's rule for its own kernels: an error
beyond twice that of plain PyTorch in the same dtype, and a floor for rounding. Errors are relative to the largest value
of the tensor that they are in.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from crossmask.kernels.roofline import DEVICES, Work

from .clock import Clock, Stage, peak_memory, take_turns
from .results import Job, Row, Status, Way

Outputs = dict[str, Tensor]
Solve = Callable[..., Outputs]  # from the problem's inputs
# Of half precision a rounding or two of the result itself; of float32 a sum of some thousands in an order of its own,
# where plain PyTorch's is in pairs.
FLOOR = {"fp32": 5e-6, "bf16": 8e-3, "fp16": 1e-3}
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


class Unavailable(Exception):
    """An implementation that cannot run here; says why in one line."""


@dataclass(frozen=True)
class Implementation:
    """One way to solve a problem.

    ``make`` is called once for each problem and may raise ``Unavailable``. What it returns takes the inputs and gives
    outputs by name, of which some may be missing: ``note`` then says so.
    """

    name: str
    make: Callable[[], Solve]
    ours: bool = False
    backward: bool = True
    note: str = ""
    trials: int = 1  # untimed runs before the first timed one


@dataclass
class Problem:
    """Inputs, what has to come out, and who does it.

    Args:
        inputs: tensors that gradients flow to, on the device, without history.
        reference: the outputs from inputs in float64.
        plain: as plain PyTorch has them in the inputs' dtype: its error is the measure.
        checked: rows of each input's first dimension that the reference is worked out for, where that decides nothing.
        upstream: gradients of outputs, by name; those that an implementation lacks are left out. Empty: no backward.
        work: bytes and FLOPs that forward and backward need.
        exact: outputs must be equal, as masks must.
        reset: puts the inputs back, for those who change them in place.
        seconds: of our launches as predicted, at least and launch by launch, for a GPU's name and a way.
    """

    op: str
    shape: str
    size: str
    what: str
    inputs: tuple[Tensor, ...]
    reference: Solve
    plain: Solve
    implementations: Sequence[Implementation]
    work: Mapping[str, Work]
    upstream: Mapping[str, Tensor] = field(default_factory=dict)
    checked: int | None = None
    exact: bool = False
    reset: Callable[[], object] | None = None
    seconds: Callable[[str, str], tuple[float, float]] | None = None
    dtype: str = ""  # where the inputs' is not what the job is known by

    @property
    def ways(self) -> tuple[Way, ...]:
        return ("forward", "backward", "both") if self.upstream else ("forward",)

    def job(self, way: Way) -> Job:
        return Job(self.op, self.shape, self.size, self.dtype or NAMES[self.inputs[0].dtype], self.what, way)


@dataclass(frozen=True)
class Budget:
    rounds: int = 15
    seconds: float = 2.0  # of a way, after which there are no more rounds


def solve(problem: Problem, clock: Clock, budget: Budget) -> list[Row]:
    """A row for every way and implementation."""
    truth = Truth(problem)
    rows: list[Row] = []
    errors: dict[tuple[str, bool], tuple[float, float]] = {}
    missing: dict[tuple[str, bool], tuple[str, ...]] = {}
    everyone = {each.name: each for each in problem.implementations}

    def refuse(name: str, way: Way, status: Status, reason: str, **figures: float) -> None:
        each = everyone[name]
        rows.append(Row(problem.job(way), name, each.ours, status, reason, **figures))

    runs: dict[bool, dict[str, Callable[[], Sequence[Stage]]]] = {False: {}, True: {}}
    peaks: dict[tuple[str, bool], int] = {}
    for name, each in everyone.items():
        try:
            found = each.make()
        except Exception as raised:
            for way in problem.ways:
                refuse(name, way, *verdict(raised))
            continue
        for training in (False, True) if problem.upstream else (False,):
            ways = ways_of(training)
            if training and not each.backward:
                for way in ways:
                    refuse(name, way, "skipped", "has no backward here")
                continue
            try:
                error, tolerance, where = truth.judge(found, training, partial=bool(each.note))
                if not error <= tolerance:
                    for way in ways:
                        reason = f"{where} is off by {error:.2g}, allowed are {tolerance:.2g}"
                        refuse(name, way, "wrong", reason, error=error, tolerance=tolerance)
                    continue
                for _ in range(each.trials):
                    run_all(trained(problem, found) if training else [lambda f=found: bare(problem, f)])
                peaks[name, training] = peak_memory(lambda f=found, t=training: once(problem, f, t), clock.device)
            except Exception as raised:
                for way in ways:
                    refuse(name, way, *verdict(raised))
                continue
            errors[name, training], missing[name, training] = (error, tolerance), truth.missing
            runs[training][name] = stages(problem, found, training)
    for training, mine in runs.items():
        if not mine:
            continue

        def broken(name: str, error: Exception, training: bool = training) -> None:
            for way in ways_of(training):
                refuse(name, way, *verdict(error))

        times = take_turns(clock, mine, budget.rounds, budget.seconds, broken=broken)
        for name, rounds in times.items():
            error, tolerance = errors[name, training]
            each = everyone[name]
            for way in ways_of(training):
                picked = [{"forward": r[0], "backward": r[-1], "both": sum(r)}[way] for r in rounds]
                work = needed(problem, way)
                row = Row(problem.job(way), name, each.ours, "measured", each.note, tuple(picked))
                rows.append(
                    replace(
                        row,
                        peak_bytes=peaks[name, training] if way != "backward" else None,
                        needed_bytes=work.bytes - work.kept,
                        flops=sum(work.flops.values()),
                        error=error,
                        tolerance=tolerance,
                        missing=missing[name, training],
                        predicted_us=predicted(problem, way, clock.device) if each.ours else None,
                    )
                )
    order = {name: number for number, name in enumerate(everyone)}
    return sorted(rows, key=lambda row: (problem.ways.index(row.job.way), order[row.implementation]))


def ways_of(training: bool) -> tuple[Way, ...]:
    return ("backward", "both") if training else ("forward",)


def needed(problem: Problem, way: Way) -> Work:
    return problem.work["forward"] + problem.work["backward"] if way == "both" else problem.work[way]


def predicted(problem: Problem, way: Way, device: torch.device) -> tuple[float, float] | None:
    """Microseconds at least, and launch by launch, where the GPU is one whose data sheet we have."""
    if device.type != "cuda" or problem.seconds is None:
        return None
    name = known(torch.cuda.get_device_name(device))
    if name is None:
        return None
    least, launches = problem.seconds(name, way)
    return 1e6 * least, 1e6 * launches


def known(gpu: str) -> str | None:
    """Our name of a GPU by its driver's: "NVIDIA H100 80GB HBM3" is "h100". None where no data sheet is at hand, as of
    the cards for PCIe that share a name with faster ones."""
    words = gpu.lower().replace("-", " ").split()
    if {"pcie", "nvl", "laptop", "d", "40gb"} & set(words):
        return None
    for name in sorted(DEVICES, key=len, reverse=True):
        if set(name.replace("-", " ").split()) <= set(words):
            return name
    return None


def verdict(error: Exception) -> tuple[Status, str]:
    """What to write of an implementation that raised."""
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    if isinstance(error, Unavailable):
        return "skipped", line
    full = isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)
    if full and torch.cuda.is_available():
        torch.cuda.empty_cache()
    return "out of memory" if full else "failed", f"{type(error).__name__}: {line[:200]}"


def run_all(stages: Sequence[Stage]) -> None:
    for stage in stages:
        stage()


def bare(problem: Problem, found: Solve) -> Outputs:
    with torch.no_grad():
        return found(*problem.inputs)


def trained(problem: Problem, found: Solve) -> list[Stage]:
    """Forward that keeps what backward needs, and backward."""
    mine = tuple(x.detach().requires_grad_(x.is_floating_point()) for x in problem.inputs)
    kept: list[Outputs] = []
    return [lambda: kept.append(found(*mine)), lambda: gradients(problem, kept.pop(), mine)]


def gradients(problem: Problem, outputs: Outputs, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    names = [name for name in problem.upstream if name in outputs]
    wanted = [x for x in inputs if x.requires_grad]
    return torch.autograd.grad([outputs[n] for n in names], wanted, [problem.upstream[n] for n in names])


def once(problem: Problem, found: Solve, training: bool) -> object:
    if not training:
        return bare(problem, found)
    forward, backward = trained(problem, found)
    forward()
    return backward()


def stages(problem: Problem, found: Solve, training: bool) -> Callable[[], Sequence[Stage]]:
    return (lambda: trained(problem, found)) if training else (lambda: [lambda: bare(problem, found)])


class Truth:
    """What has to come out, worked out once in float64, and what plain PyTorch's error is."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.found: dict[tuple[frozenset[str], bool], tuple[Outputs, Outputs]] = {}
        self.names: set[str] = set()  # of the outputs that there are
        self.missing: tuple[str, ...] = ()  # those that the last one to be judged does not give

    def judge(self, solver: Solve, training: bool, partial: bool = False) -> tuple[float, float, str]:
        """Error, tolerance and name of the output, or of the input's gradient, that is furthest beyond what it may.

        Raises:
            ValueError: it gives what the reference does not, or less, unless it is known to be ``partial``.
        """
        mine = self._results(solver, self.problem.inputs, training)
        told = frozenset(name for name in mine if not name.startswith("gradient"))
        if (told, training) not in self.found:
            self._reset()
            exact = tuple(x[: self.problem.checked] for x in self.problem.inputs)
            double = tuple(x.double() if x.is_floating_point() else x for x in exact)
            self.found[told, training] = (
                self._results(self.problem.reference, double, training, told),
                self._results(self.problem.plain, exact, training, told),
            )
        self.missing = tuple(sorted(self.names - told))
        expected, plain = self.found[told, training]
        if missing := told - expected.keys():
            raise ValueError(f"gives {', '.join(sorted(missing))}, which the reference does not")
        if self.missing and not partial:
            raise ValueError(f"does not give {', '.join(self.missing)}, and no note says so")
        floor = 0.0 if self.problem.exact else FLOOR[self.problem.job("forward").dtype]
        worst = (0.0, floor, "")
        for name, want in expected.items():
            error, measure = (distance(x[name], want, self.problem.checked) for x in (mine, plain))
            tolerance = 0.0 if self.problem.exact else 2 * measure + floor
            if not error <= tolerance or error * worst[1] > worst[0] * tolerance:
                worst = error, tolerance, name
                if not error <= tolerance:
                    break
        return worst

    def _reset(self) -> None:
        if self.problem.reset is not None:
            self.problem.reset()

    def _results(
        self, solver: Solve, inputs: tuple[Tensor, ...], training: bool, told: frozenset[str] | None = None
    ) -> Outputs:
        self._reset()
        if not training:
            with torch.no_grad():
                found = solver(*inputs)
            if self.problem.reset is not None:  # what is found is the memory that the next one begins with
                found = {name: x[: self.problem.checked].clone() for name, x in found.items()}
            self.names |= found.keys()
            return {name: x for name, x in found.items() if told is None or name in told}
        mine = tuple(x.detach().requires_grad_(x.is_floating_point()) for x in inputs)
        found = solver(*mine)
        self.names |= found.keys()
        found = {name: x for name, x in found.items() if told is None or name in told}
        rows = inputs[0].shape[0]
        names = [name for name in self.problem.upstream if name in found]
        upstream = [self.problem.upstream[n][:rows].to(found[n].dtype) for n in names]
        wanted = [x for x in mine if x.requires_grad]
        grads = torch.autograd.grad([found[n] for n in names], wanted, upstream)
        return {n: x.detach() for n, x in found.items()} | {f"gradient {i}": g for i, g in enumerate(grads)}


def distance(found: Tensor, expected: Tensor, rows: int | None) -> float:
    """Largest difference relative to the largest expected value; infinite where something is not finite."""
    mine = found.detach()[:rows]
    if mine.shape != expected.shape:
        raise ValueError(f"gives shape {tuple(mine.shape)}, not {tuple(expected.shape)}")
    if expected.dtype == torch.bool:
        return float((mine != expected).double().mean())
    difference = (mine.double() - expected.double()).abs().max()
    relative = float(difference / expected.double().abs().max().clamp(min=1e-30))
    return relative if relative == relative else float("inf")
