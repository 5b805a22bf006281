"""Kills ranks of a training run at random moments, again and again, and resumes it from what they leave behind.

    python tests/distributed/kill_loop.py --kills 50 --ranks 2

Each round resumes the small student (dropout on, a checkpoint every few steps), waits for a random moment of loading,
stepping or saving, sends SIGKILL to one rank, the next one each round, lets the others live on for a moment, and kills
them too. After every kill: ``latest`` names a checkpoint that is whole, it is never more than one interval older than
the furthest step of any rank, and never older than one whose saving had returned. In the end each loss that any rank
has ever computed, and the whole state, must equal those of a run that was never disturbed, bit by bit.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import random
import signal
import struct
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import forked

PHASES = ("starting", "loading", "stepping", "saving: files", "saving: seal", "saving: latest", "saving: prune")
KINDS = ("anywhere", "anywhere", "save", "save", "start")
_BLACKBOARD = mmap.mmap(
    -1, 4096
)  # shared with every rank: per rank phase, steps done, last step saved, seconds of a save
_FIELDS = struct.Struct("qqqd")


class Place:
    """Where a rank is: written by the rank, read by the parent, outliving the rank."""

    def __init__(self, rank: int) -> None:
        self.offset = rank * _FIELDS.size

    def read(self) -> tuple[int, int, int, float]:
        return _FIELDS.unpack_from(_BLACKBOARD, self.offset)  # type: ignore[return-value]

    def write(self, **changes: float) -> None:
        values = dict(zip(("phase", "step", "saved", "seconds"), self.read(), strict=True)) | changes
        _FIELDS.pack_into(_BLACKBOARD, self.offset, *values.values())


def train(folder: Path, options: argparse.Namespace, until: int | None, mode: str) -> None:
    """Steps for ever, or ``until`` a step. Modes: "begin" saves once, "resume" goes on, "reference" does neither."""
    from resumable import Run

    import crossmask.engine.training.checkpoint as module

    run = Run(options.stage, options.dtype, dropout=0.5, seed=0)
    place = Place(run.rank)

    def announced(function: Any, phase: int) -> Any:
        def call(*arguments: Any) -> Any:
            place.write(phase=phase)
            return function(*arguments)

        return call

    module.seal, module.replace_text = announced(module.seal, 4), announced(module.replace_text, 5)
    manager = module.CheckpointManager(folder / "run", keep=2, warn=print)
    manager._prune = announced(manager._prune, 6)  # type: ignore[method-assign]
    if mode == "begin":
        run.save(manager, 0)
        return
    step, disturbed = 0, mode == "resume"
    if disturbed:
        place.write(phase=1)
        step = run.load(manager).step
    log = open(folder / f"losses-{mode}.{run.rank}", "a")  # noqa: SIM115 - until a kill closes it
    while until is None or step < until:
        place.write(phase=2, step=step)
        loss = run.step(step)
        step += 1
        log.write(f"{step} {loss}\n")
        log.flush()
        place.write(step=step)
        if disturbed and step % options.every == 0:
            started = time.monotonic()
            place.write(phase=3)
            run.save(manager, step)
            place.write(phase=2, saved=step, seconds=time.monotonic() - started)
    own = "buffer model.mean", "teacher mean"  # of the rank's last local batch; a checkpoint holds rank 0's
    everything = {name: tensor for name, tensor in run.everything().items() if name not in own}
    state = {name: tensor.double().sum().item().hex() for name, tensor in everything.items()}
    (folder / f"end-{mode}.{run.rank}").write_text(json.dumps(state))


def kill_one(folder: Path, options: argparse.Namespace, number: int, draws: random.Random) -> tuple[str, int]:
    """One round: the phase in which the victim died, and its step. RuntimeError where a rank fails by itself."""
    for rank in range(options.ranks):
        Place(rank).write(phase=0, step=0, saved=0)
    group = forked.fork(options.ranks, train, folder, options, None, "resume", folder=folder)
    victim, kind = number % options.ranks, draws.choice(KINDS)
    place = Place(victim)

    def wait(wanted: tuple[int, ...]) -> None:
        deadline = time.monotonic() + 60
        while place.read()[0] not in wanted:
            if time.monotonic() > deadline or os.waitid(
                os.P_PID, group.pids[victim], os.WEXITED | os.WNOHANG | os.WNOWAIT
            ):
                group.kill()
                group.wait()
                raise RuntimeError(f"kill {number}: rank {victim} ended by itself:\n{group.logs[victim].read_text()}")
            time.sleep(0.0005)

    if kind == "start":
        time.sleep(draws.uniform(0, options.start_s))
    else:
        wait((2,))
        time.sleep(draws.uniform(0, 0.6))
    if kind == "save":
        wait((3, 4, 5, 6))
        time.sleep(draws.uniform(0, 1.1 * (place.read()[3] or 0.1)))
    os.kill(group.pids[victim], signal.SIGKILL)
    phase, step, _, _ = place.read()
    time.sleep(draws.uniform(0, 0.3))  # the others may do their worst
    group.kill()
    statuses = group.wait()
    if statuses[victim] != -signal.SIGKILL:
        raise RuntimeError(f"kill {number}: rank {victim} had ended by itself:\n{group.logs[victim].read_text()}")
    return PHASES[phase], step


def check(folder: Path, options: argparse.Namespace, last: int) -> tuple[int, bool]:
    """The step that a resume would find, and whether a half-written checkpoint lies beside it."""
    from crossmask.engine.training.checkpoint import CheckpointManager

    warnings: list[str] = []
    _, state = CheckpointManager(folder / "run", warn=warnings.append).verified()
    places = [Place(rank).read() for rank in range(options.ranks)]
    reached, saved = max(place[1] for place in places), max(place[2] for place in places)
    assert not warnings, warnings
    assert state.step >= max(last, saved), f"{state.step} is older than {max(last, saved)}, which was saved"
    assert state.step >= reached - options.every, f"step {reached} was reached, {state.step} is left"
    return state.step, bool(list((folder / "run/checkpoints").glob("*.partial")))


def losses(path: Path) -> list[tuple[int, str]]:
    """(step, loss) in the order computed; a line that a kill cut short is left out."""
    lines = [line.split() for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
    return [(int(step), loss) for step, loss in lines]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--stage", type=int, default=2)
    parser.add_argument("--dtype", default="fp32")
    parser.add_argument("--every", type=int, default=3, help="steps between checkpoints")
    parser.add_argument("--start_s", type=float, default=0.6, help="how long a start may take that is to be cut short")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    draws, began = random.Random(options.seed), time.monotonic()
    forked.prepare()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        forked.run(options.ranks, train, folder, options, 0, "begin", folder=folder)  # the checkpoint of step 0
        died: Counter[str] = Counter()
        last = halves = lost = 0
        for number in range(options.kills):
            phase, step = kill_one(folder, options, number, draws)
            before, (last, half) = last, check(folder, options, last)
            died[phase] += 1
            halves += half
            lost = max(lost, max(Place(rank).read()[1] for rank in range(options.ranks)) - last)
            print(
                f"kill {number + 1}: rank {number % options.ranks}, {phase}, step {step}: {before} -> {last}",
                flush=True,
            )
        end = max(step for rank in range(options.ranks) for step, _ in losses(folder / f"losses-resume.{rank}"))
        forked.run(options.ranks, train, folder, options, end, "resume", folder=folder)
        forked.run(options.ranks, train, folder, options, end, "reference", folder=folder, timeout=600)
        compared = 0
        for rank in range(options.ranks):
            reference, seen = (
                dict(losses(folder / f"losses-reference.{rank}")),
                losses(folder / f"losses-resume.{rank}"),
            )
            assert sorted(reference) == sorted({step for step, _ in seen}) == list(range(1, end + 1))
            different = [step for step, loss in seen if reference[step] != loss]
            assert not different, f"rank {rank}'s losses differ at steps {different}"
            compared += len(seen)
            ends = [json.loads((folder / f"end-{kind}.{rank}").read_text()) for kind in ("resume", "reference")]
            assert ends[0].keys() == ends[1].keys()
            states = [name for name in ends[0] if ends[0][name] != ends[1][name]]
            assert not states, f"rank {rank}'s state differs in the end: {states}"
    saving = sum(count for phase, count in died.items() if phase.startswith("saving"))
    print(f"{options.kills} kills of {options.ranks} ranks, stage {options.stage}, {options.dtype}: {dict(died)}")
    print(f"{saving} while saving; {halves} left a half-written checkpoint; latest was always whole")
    print(f"at most {lost} steps lost, a checkpoint every {options.every}")
    print(f"{compared} losses over {end} steps equal the undisturbed run's bit by bit")
    print(f"{time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
