"""Where the ranks of a run meet: they compare their settings, and notice who falls silent.

torch.distributed waits in silence for a rank that does not come, and computes with whatever
settings each rank has. Here ranks write what they were told into the store that the group meets
at, before the group is made; and as long as they compute, a thread of each tells that it lives.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from core.errors import InputError, RankError, first_line
from core.reading import file_digest

logger = logging.getLogger(__name__)

# Seconds until a waiting rank says for whom it waits.
PATIENCE = 30.0
# Seconds that rank 0 keeps the store for others that were told something else.
_HEARING = 10.0
# Seconds between two signs of life, and between two looks for somebody missing.
_BEAT, _LOOK = 2.0, 0.05
# Seconds that whoever answers at the address has to turn out to be a store.
_HANDSHAKE = 20.0


@dataclass(frozen=True)
class Address:
    """Where the store of a run is.

    Attributes:
        url: tcp://HOST:PORT, file://PATH, or env:// for what the environment says.
    """

    url: str

    @property
    def is_tcp(self) -> bool:
        """Whether it is a host and a port."""
        return self.url.startswith("tcp://")

    @property
    def host(self) -> str:
        """Host of a tcp address."""
        return self.url.removeprefix("tcp://").rpartition(":")[0]

    @property
    def port(self) -> int:
        """Port of a tcp address."""
        return int(self.url.rpartition(":")[2])

    def check(self) -> None:
        """Refuse what is none.

        Raises:
            InputError: Names `--dist-url`.
        """
        if self.url.startswith(("file://", "env://")):
            return
        host, _, port = self.url.removeprefix("tcp://").rpartition(":")
        if not (self.is_tcp and host and port.isdigit() and int(port) < 2**16):
            raise InputError(f"--dist-url {self.url}: expected tcp://HOST:PORT")


def from_environment() -> tuple[Address, bool]:
    """The address that a launcher put into the environment, and whether it runs the store.

    Raises:
        InputError: A variable is missing.
    """
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise InputError(f"RANK and WORLD_SIZE are set in the environment, but not {missing[0]}")
    address = Address(f"tcp://{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}")
    address.check()
    return address, os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def host_store(address: Address) -> tuple[dist.TCPStore, Address]:
    """Open the store that all ranks of the run meet at; port 0 becomes a free one.

    Raises:
        InputError: The port is in use.
    """
    try:
        store = dist.TCPStore(address.host, address.port, is_master=True, wait_for_workers=False)
    except dist.DistNetworkError as error:
        if "EADDRINUSE" in str(error):
            raise InputError(
                f"--dist-url {address.url}: the port is in use; give another one, or port 0"
            ) from None
        raise InputError(
            f"--dist-url {address.url}: cannot listen there ({first_line(error)})"
        ) from None
    return store, Address(f"tcp://{address.host}:{store.port}")


def join_store(address: Address, world_size: int, timeout: float, rank: int) -> dist.Store:
    """Connect to the store of the run; says so where it is waited for.

    Args:
        address: Where it is.
        world_size: Number of ranks.
        timeout: Seconds to wait for it.
        rank: Who asks.

    Raises:
        RankError: Nobody opened it in time, or something else answers there.
    """
    if address.url.startswith("file://"):
        return dist.FileStore(address.url.removeprefix("file://"), world_size)
    _await_host(address, timeout, rank)
    found: list[dist.Store] = []
    # Where another kind of server answers, or does not, torch waits without end.
    connecting = threading.Thread(target=_connect, args=(address, found), daemon=True)
    connecting.start()
    connecting.join(min(_HANDSHAKE, timeout))
    if not found:
        raise RankError(
            f"--dist-url {address.url}: what answers there is not rank 0 of this run; is the "
            "port another program's?"
        )
    return found[0]


def _connect(address: Address, found: list[dist.Store]) -> None:
    try:
        found.append(
            dist.TCPStore(
                address.host,
                address.port,
                is_master=False,
                wait_for_workers=False,
                timeout=timedelta(seconds=_HANDSHAKE),
            )
        )
    except RuntimeError:
        return


def _await_host(address: Address, timeout: float, rank: int) -> None:
    """Wait until somebody listens at an address."""
    begun, said = time.monotonic(), False
    while not _answers(address):
        waited = time.monotonic() - begun
        if waited > timeout:
            raise RankError(
                f"rank {rank} waited {timeout:g} s for rank 0, and nobody listens at "
                f"{address.url} (--dist-url); --timeout sets how long"
            )
        if waited > min(PATIENCE, timeout / 2) and not said:
            said = True
            logger.warning("rank %d waits for rank 0 at %s", rank, address.url)
        time.sleep(10 * _LOOK)


def _answers(address: Address) -> bool:
    try:
        socket.create_connection((address.host, address.port), timeout=5).close()
    except OSError:
        return False
    return True


class Meeting:
    """One rank at the store.

    Args:
        store: The store of the run.
        rank: This rank.
        world_size: Number of ranks.
        timeout: Seconds after which a rank that shows no sign of life counts as lost.

    Attributes:
        patience: Seconds until a waiting rank says for whom it waits.
    """

    def __init__(self, store: dist.Store, rank: int, world_size: int, timeout: float) -> None:
        self.store, self.rank, self.world_size = store, rank, world_size
        self.timeout, self.patience = timeout, min(PATIENCE, timeout / 2)

    def agree(self, flags: Mapping[str, str]) -> None:
        """Wait for all ranks, and refuse ranks that were told something else.

        Args:
            flags: What this rank was told, by flag.

        Raises:
            InputError: Two ranks were told different things.
            RankError: A rank does not come.
        """
        if self.store.add(f"taken/{self.rank}", 1) > 1:
            raise InputError(
                f"rank {self.rank} was started twice: every node needs a --rank of its own and "
                "the same --nproc-per-node"
            )
        self.store.set(f"told/{self.rank}", json.dumps(dict(flags)))
        missing = [rank for rank in range(self.world_size) if rank != self.rank]
        begun, said = time.monotonic(), False
        while missing:
            for rank in [rank for rank in missing if self.store.check([f"told/{rank}"])]:
                missing.remove(rank)
                try:
                    self._compare(flags, rank, json.loads(self.store.get(f"told/{rank}")))
                except InputError:
                    self._let_others_hear()
                    raise
            waited = time.monotonic() - begun
            if missing and waited > self.timeout:
                raise RankError(
                    f"{_named(missing)} did not come within {self.timeout:g} s (--timeout); "
                    f"{self.world_size} ranks were announced"
                )
            if missing and waited > self.patience and not said:
                said = True
                self._say_once(missing, f"waiting for {_named(missing)} to start")
            time.sleep(_LOOK)

    def _let_others_hear(self) -> None:
        """Keep the store, which ends with rank 0, until all have found the difference too."""
        self.store.set(f"heard/{self.rank}", "")
        everyone = [f"heard/{rank}" for rank in range(self.world_size)]
        until = time.monotonic() + min(self.timeout, _HEARING)
        while self.rank == 0 and time.monotonic() < until and not self.store.check(everyone):
            time.sleep(_LOOK)

    def _say_once(self, missing: Sequence[int], sentence: str) -> None:
        """Say something from one of the ranks that are there."""
        if all(rank in missing for rank in range(self.rank)):
            logger.warning("%s", sentence)

    def _compare(self, mine: Mapping[str, str], rank: int, theirs: Mapping[str, str]) -> None:
        for flag in sorted({*mine, *theirs}):
            here, there = mine.get(flag), theirs.get(flag)
            if here == there:
                continue
            (first, one), (second, other) = sorted([(self.rank, here), (rank, there)])
            raise InputError(
                f"{flag}: rank {first} was started with {one}, rank {second} with {other}; "
                "start all ranks with the same settings"
            )


class Watch:
    """A thread that tells the other ranks that this one lives, and notices who does not.

    A rank whose machine is gone, or that was stopped, breaks no connection: its peers would
    wait in their next sum.

    Args:
        meeting: This rank at a connection to the store that nobody else uses.
        lost: Called from the thread with a sentence, once, when a rank counts as lost.
    """

    def __init__(self, meeting: Meeting, lost: Callable[[str], None]) -> None:
        self._meeting, self._lost = meeting, lost
        self._ended = threading.Event()
        self._beats = 0
        others = [rank for rank in range(meeting.world_size) if rank != meeting.rank]
        self._seen: dict[int, bytes] = {}
        self._silent = dict.fromkeys(others, 0.0)
        self._named: set[int] = set()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        """Begin."""
        self._beat()
        self._thread.start()

    def end(self) -> None:
        """End, and wait for the end."""
        self._ended.set()
        self._thread.join(5)

    def _beat(self) -> None:
        self._beats += 1
        self._meeting.store.set(f"alive/{self._meeting.rank}", str(self._beats))

    def _run(self) -> None:
        every = min(_BEAT, self._meeting.patience / 4)
        looked = time.monotonic()
        while not self._ended.wait(every):
            now = time.monotonic()
            # Where this rank was stopped itself, time has passed for it alone.
            passed, looked = min(now - looked, 2 * every), now
            try:
                self._beat()
                gone = self._look(passed)
            except RuntimeError:
                gone = "the ranks can no longer reach rank 0's node (--dist-url)"
            if gone is not None and not self._ended.is_set():
                self._lost(gone)
                return

    def _look(self, passed: float) -> str | None:
        """Whether a rank counts as lost; says for whom this one waits."""
        store = self._meeting.store
        for rank in self._silent:
            key = f"alive/{rank}"
            if not store.check([key]):
                continue
            beat = store.get(key)
            if beat != self._seen.get(rank):
                self._seen[rank], self._silent[rank] = beat, 0.0
                self._named.discard(rank)
                continue
            self._silent[rank] += passed
        return self._judged()

    def _judged(self) -> str | None:
        timeout, patience = self._meeting.timeout, self._meeting.patience
        silent = [rank for rank, seconds in self._silent.items() if seconds > patience]
        new = [rank for rank in silent if rank not in self._named]
        if new:
            self._named |= set(new)
            self._meeting._say_once(
                silent, f"waiting for {_named(new)}: no sign of life for {patience:g} s"
            )
        lost = [rank for rank, seconds in self._silent.items() if seconds > timeout]
        if not lost:
            return None
        return f"{_named(lost)} gave no sign of life for {timeout:g} s (--timeout)"


def _named(ranks: Sequence[int]) -> str:
    word = "rank" if len(ranks) == 1 else "ranks"
    return f"{word} {', '.join(map(str, ranks))}"


def told_value(value: object) -> str | None:
    """What a flag's value means, for a comparison between machines.

    A file counts by its content and a folder by the names in it, wherever they lie.

    Args:
        value: Of a flag.

    Returns:
        A short text; None for what cannot be compared.
    """
    if isinstance(value, str) and value:
        found = _content(Path(value))
        return f"'{value}'" if found is None else found
    if value is None or isinstance(value, (bool, int, float, str)):
        return repr(value)
    if isinstance(value, (list, tuple)):
        parts = [told_value(part) for part in value]
        return f"[{', '.join(part for part in parts if part is not None)}]"
    return None


def _content(path: Path) -> str | None:
    try:
        if path.is_file():
            return f"a file of digest {file_digest(path)[:12]}"
        if path.is_dir():
            names = "\n".join(sorted(os.listdir(path)))
            return f"a folder of digest {hashlib.sha256(names.encode()).hexdigest()[:12]}"
    except (OSError, ValueError):
        return None
    return None
