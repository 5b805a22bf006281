"""Damages files of real checkpoints at random, one at a time, and holds what is found and used instead against it.

    python tests/distributed/corruption.py --count 1000

The checkpoints are made by checkpoint_worlds.py: two a run, of steps 2 and 4, on two ranks: stage 2 in bf16 and stage 3
in fp32, each sharded and resharded. Every damage that changes a byte is named, and the next whole checkpoint used;
a foreign file is damage among the student's files only, where DeepSpeed would find it.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

KINDS = ("bit", "byte", "cut", "append", "zeros", "empty", "delete", "swap", "foreign", "latest")


class Damage:
    """One damage to one checkpoint, undone on leaving: in place, so that hard links stay what they are."""

    def __init__(self, checkpoint: Path, kind: str, draws: random.Random) -> None:
        self.checkpoint, self.kind, self.draws = checkpoint, kind, draws
        self.before: dict[Path, bytes] = {}
        self.hidden: list[tuple[Path, Path]] = []
        self.added: Path | None = None

    def __enter__(self) -> list[Path]:
        """The files that are no longer what they were; empty where the damage changed nothing."""
        files = sorted(path for path in self.checkpoint.rglob("*") if path.is_file())
        chosen, other = self.draws.sample(files, 2)
        data = bytearray(chosen.read_bytes())
        place = self.draws.randrange(len(data))
        if self.kind == "foreign":
            self.added = chosen.with_name(self.draws.choice(("copy-", "~", "0")) + chosen.name)
            shutil.copyfile(chosen, self.added)
            return [self.added]
        if self.kind == "delete":
            self.hidden.append((chosen, self.checkpoint.parent / ".hidden"))
            os.rename(*self.hidden[0])
            return [chosen]
        if self.kind == "latest":
            chosen = self.checkpoint.parent / "latest"
            data = bytearray(self.draws.randbytes(self.draws.randrange(30)))
        elif self.kind == "swap":
            theirs = other.read_bytes()
            self._write(other, bytes(data))
            data = bytearray(theirs)
        elif self.kind == "bit":
            data[place] ^= 1 << self.draws.randrange(8)
        elif self.kind == "byte":
            data[place] = self.draws.randrange(256)
        elif self.kind == "cut":
            del data[place:]
        elif self.kind == "append":
            data += self.draws.randbytes(self.draws.randrange(1, 100))
        elif self.kind == "zeros":
            data[place : place + 512] = bytes(len(data[place : place + 512]))
        else:
            data.clear()
        self._write(chosen, bytes(data))
        return [path for path, original in self.before.items() if path.read_bytes() != original]

    def __exit__(self, *_: object) -> None:
        for path, data in self.before.items():
            path.write_bytes(data)
        for shown, hidden in self.hidden:
            os.rename(hidden, shown)
        if self.added:
            self.added.unlink()

    def _write(self, path: Path, data: bytes) -> None:
        self.before[path] = path.read_bytes()
        path.write_bytes(data)


def corrupt(run_dir: Path, count: int, draws: random.Random) -> Counter[str]:
    """``count`` damages to the run's latest checkpoint; AssertionError for one that is not found. Counts by kind."""
    from crossmask.engine.training.checkpoint import CheckpointManager
    from crossmask.engine.training.manifest import find_damage

    counts: Counter[str] = Counter()
    whole, _ = CheckpointManager(run_dir).verified()
    meaning = json.loads((whole / "manifest.json").read_bytes())
    while sum(counts.values()) < count:
        kind = draws.choice(KINDS)
        with Damage(whole, kind, draws) as changed:
            if not changed:
                continue
            warnings: list[str] = []
            used, _ = CheckpointManager(run_dir, warn=warnings.append).verified()
            assert find_damage(used) is None
            if kind == "latest":  # holds nothing but a name: any whole checkpoint will do
                counts[kind] += 1
                continue
            names = [path.relative_to(whole).as_posix() for path in changed]
            if kind == "foreign" and not names[0].startswith("student/"):
                assert (used, warnings) == (whole, []), "a file that nobody opens does no harm"
                counts["foreign, ignored"] += 1
                continue
            if names == ["manifest.json"] and used == whole and kind != "delete":
                found = json.loads((whole / "manifest.json").read_bytes())
                assert {key: found.get(key) for key in meaning} == meaning, "a changed manifest went unnoticed"
                counts["manifest, meaning unchanged"] += 1
                continue
            assert used != whole, f"{kind} of {names} went unnoticed"
            assert any(f"{whole} is damaged ({name}: " in warnings[0] for name in names), (kind, names, warnings)
            assert any(find_damage(whole, part, 3) for part in range(3)), "ranks that share the work find nothing"
            counts[kind] += 1
    assert find_damage(whole) is None
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1000, help="damages to each of the four runs' checkpoints")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    import checkpoint_worlds
    import forked

    draws, began = random.Random(options.seed), time.monotonic()
    forked.prepare()
    with tempfile.TemporaryDirectory() as name:
        folder, cases = Path(name), ["2:bf16", "3:fp32"]
        forked.run(2, checkpoint_worlds.on_two, folder, cases, folder=folder)
        forked.run(1, checkpoint_worlds.convert, folder, cases, "plain", folder=folder)
        for case in ("2-bf16", "3-fp32"):
            for kind, run_dir in (("sharded", "sharded"), ("universal", "plain")):
                counts = corrupt(folder / case / run_dir, options.count, draws)
                files = sum(
                    path.is_file() for path in (folder / case / run_dir / "checkpoints").glob("step-000004*/**/*")
                )
                print(
                    f"{case} {kind} ({files} files): {sum(counts.values())} damages, all found: {dict(counts)}",
                    flush=True,
                )
    print(f"{time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
