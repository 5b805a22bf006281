"""Where ranks put their last beat for others to read: files under our own launcher, the process group's store else.

Under ``crossmask train`` the launcher's temporary folder is the board. A file keeps what a rank said last, whatever
has become of the rank, and the launcher, which cannot hang with the ranks, does the reading.

:class:`StoreBoard` serves other launchers only (``deepspeed``, ``torchrun``). They offer no such place, and their ranks
may be on several machines: there the ranks read one another's beats through a connection of their own to the store in
which the process group met.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

from ..beats import Beat, tell_beats

RECORD_BYTES, BEAT_BYTES = 1024, 256  # a file holds the record and, after it, the last beat
STORE_TIMEOUT = 5.0  # seconds one question to the store may take


@dataclass(frozen=True)
class Record:
    """A rank's last beat and what else tells how it does."""

    rank: int
    host: str
    pid: int
    started: int  # rank_processes.start_ticks: tells the process from a later one with the same id
    stacks: str  # file that gets the process's Python stacks on SIGUSR2; "" where there is none
    step: int | None
    phase: str
    count: int  # beats so far
    at: float  # when the last one was
    pulse: int  # grows as long as the process runs and its interpreter is not blocked, beats or not
    collectives: int  # issued so far, over all process groups

    def after(self, beat: Beat) -> Record:
        """The same rank at its latest beat."""
        return replace(self, step=beat.step, phase=beat.phase, count=beat.number, at=beat.at)


class Board(Protocol):
    def exchange(self, mine: Record) -> Mapping[int, Record]:
        """Publish one's own record; return every rank's. May block or raise when the others cannot be reached."""


class FileBoard:
    """One small file per rank, overwritten in place; a reader that meets half a record takes the next one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._file: int | None = None
        self._known: dict[int, Record] = {}

    def publish(self, mine: Record) -> None:
        if self._file is None:
            self._file = os.open(self.folder / f"rank-{mine.rank}.json", os.O_WRONLY | os.O_CREAT, 0o600)
            tell_beats(self._note)  # at once: what a rank did last before it was stopped or killed
        os.pwrite(self._file, json.dumps(asdict(mine)).encode().ljust(RECORD_BYTES), 0)

    def _note(self, beat: Beat) -> None:
        assert self._file is not None
        with suppress(OSError):
            os.pwrite(self._file, json.dumps(beat).encode().ljust(BEAT_BYTES), RECORD_BYTES)

    def read(self) -> Mapping[int, Record]:
        for path in self.folder.glob("rank-*.json"):
            with suppress(OSError, ValueError, TypeError):
                text = path.read_bytes()
                record = Record(**json.loads(text[:RECORD_BYTES]))
                if len(text) > RECORD_BYTES:
                    record = record.after(Beat(*json.loads(text[RECORD_BYTES:])))
                self._known[record.rank] = record
        return dict(self._known)

    def exchange(self, mine: Record) -> Mapping[int, Record]:
        self.publish(mine)
        return self.read()


class StoreBoard:
    """Keys in the c10d store of the process group, which rank 0 or ``torchrun`` serves at MASTER_ADDR:MASTER_PORT."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self.host, self.port = environment["MASTER_ADDR"], int(environment["MASTER_PORT"])
        self.ranks = int(environment["WORLD_SIZE"])
        # torchrun starts failed jobs again, in the same store.
        self.prefix = f"crossmask/beats/{environment.get('TORCHELASTIC_RESTART_COUNT', '0')}"
        self._store: Any = None
        self._up: list[int] = []

    def exchange(self, mine: Record) -> Mapping[int, Record]:
        try:
            return self._exchange(mine)
        except Exception:
            self._store = None  # a connection that failed once fails ever after, and says so on the screen every time
            raise

    def _exchange(self, mine: Record) -> Mapping[int, Record]:
        import torch.distributed as dist

        if self._store is None:
            # The store's own client complains at length on the screen when nobody listens yet.
            socket.create_connection((self.host, self.port), STORE_TIMEOUT).close()
            self._store = dist.TCPStore(
                self.host, self.port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=STORE_TIMEOUT)
            )
        self._store.set(self._key(mine.rank), json.dumps(asdict(mine)))
        self._up += [r for r in range(self.ranks) if r not in self._up and self._store.check([self._key(r)])]
        texts = self._store.multi_get([self._key(rank) for rank in self._up])
        records = [Record(**json.loads(text)) for text in texts]
        return {record.rank: record for record in records}

    def _key(self, rank: int) -> str:
        return f"{self.prefix}/{rank}"
