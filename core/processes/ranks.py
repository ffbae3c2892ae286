"""The processes of this node, as their parent sees them: started, watched, and ended together."""

from __future__ import annotations

import contextlib
import enum
import logging
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from types import FrameType
from typing import Any

import torch.distributed as dist

from core.errors import InputError, RankError, is_write_failure, write_failure
from core.processes import warm
from core.processes.shared_memory import PeerLostError

# Seconds: between two looks for a signal; for the others to say what happened to them; to end
# by themselves once they are asked; to conclude what Ctrl-C interrupted.
_LOOK, _SETTLING, _GRACE, _CONCLUDING = 0.2, 2.0, 5.0, 120.0
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
# What gloo and the store say where the other end is gone.
_CUT = ("gloo", "connection", "Broken pipe", "timed out", "Timed out", "store", "NCCL")


class Fault(enum.IntEnum):
    """Kinds of failures; where several ranks fail, the smallest kind is the cause."""

    MISTAKE = 0
    KILLED = 1
    FAILED = 2
    ABORTED = 3
    CUT_OFF = 4


@dataclass(frozen=True)
class Complaint:
    """What went wrong in a rank.

    Attributes:
        fault: Of which kind it is.
        rank: Where.
        sentence: What the user is told.
        told: The traceback, where the fault is in the code.
    """

    fault: Fault
    rank: int
    sentence: str
    told: str = ""

    def error(self) -> Exception:
        """The same as an exception of the parent."""
        if self.fault == Fault.MISTAKE:
            return InputError(self.sentence)
        return RankError(self.sentence, self.told)


def complaint_about(error: BaseException, rank: int) -> Complaint:
    """An exception of a rank in words."""
    if isinstance(error, InputError):
        return Complaint(Fault.MISTAKE, rank, str(error))
    if isinstance(error, OSError) and is_write_failure(error):
        return Complaint(Fault.MISTAKE, rank, write_failure(error))
    if isinstance(error, RankError):
        return Complaint(Fault.CUT_OFF, rank, str(error), error.told)
    if is_cut_off(error):
        return Complaint(Fault.CUT_OFF, rank, cut_off(error, rank))
    told = "".join(traceback.format_exception(error))
    name = f"{type(error).__name__}: {error}".rstrip(": ").partition("\n")[0]
    return Complaint(Fault.FAILED, rank, f"rank {rank} failed: {name}", told)


def is_cut_off(error: BaseException) -> bool:
    """Whether an exception says that another rank is gone, and nothing of this one."""
    if isinstance(error, (PeerLostError, dist.DistError)):
        return True
    text = str(error)
    return type(error) is RuntimeError and any(word in text for word in _CUT)


def cut_off(error: BaseException, rank: int) -> str:
    """The same in one sentence."""
    if isinstance(error, PeerLostError):
        return str(error)
    text = str(error)
    if "imed out" in text or "timeout" in text.lower():
        return f"rank {rank} waited in vain for another rank's answer; --timeout sets how long"
    return f"rank {rank} lost its connection to another rank, which has ended"


class Ranks:
    """Processes that run the same function.

    Args:
        work: Called in each with its index on this node and the connection for complaints; a
            module-level function, or a partial of one.
        first: Rank of the first.
        number: How many.
        imports: What each of them needs, imported once for all if they are warm.
        is_warm: Whether they are forked from a server (`core.processes.warm`).
    """

    def __init__(
        self,
        work: Callable[[int, Connection], None],
        first: int,
        number: int,
        imports: Sequence[str] = (),
        is_warm: bool = False,
    ) -> None:
        self._work, self._first, self._number = work, first, number
        self._imports, self._is_warm = imports, is_warm
        self._processes: list[BaseProcess] = []
        self._told: list[Connection] = []
        self._complaints: list[Complaint] = []

    def run(self) -> None:
        """Start all, and wait until all have ended.

        Raises:
            InputError: A rank's mistake of the user; it ends all ranks.
            RankError: A rank failed; the others were ended.
            KeyboardInterrupt: The parent got SIGINT; the ranks were ended.
            SystemExit: The parent got SIGTERM; the ranks were ended.
        """
        with _signals_noted() as noted:
            try:
                self._start(noted)
                while self._living() and not noted and not self._failing():
                    self._listen(_LOOK)
                if self._failing() and not noted:
                    self._settle()
                if signal.SIGINT in noted:
                    self._conclude(noted)
            finally:
                ended = self._end(noted[0] if noted else signal.SIGTERM)
        if signal.SIGINT in noted:
            raise KeyboardInterrupt
        if noted:
            raise SystemExit(128 + noted[0])
        self._judge(ended)

    def _start(self, noted: Sequence[int]) -> None:
        for index in range(self._number):
            if noted:
                return
            hear, tell = multiprocessing.Pipe(duplex=False)
            process = warm.start(
                _ranks_work, self._work, index, tell, imports=self._imports, warm=self._is_warm
            )
            tell.close()
            self._processes.append(process)
            self._told.append(hear)

    def _living(self) -> list[BaseProcess]:
        return [process for process in self._processes if process.exitcode is None]

    def _failing(self) -> bool:
        return bool(self._complaints) or any(process.exitcode for process in self._processes)

    def _listen(self, seconds: float) -> None:
        """Wait for a complaint or an end."""
        sources: list[Connection | int] = [*self._told]
        sources += [process.sentinel for process in self._living()]
        for source in multiprocessing.connection.wait(sources, seconds):
            if not isinstance(source, Connection):
                continue
            try:
                self._complaints.append(source.recv())
            except (EOFError, OSError):
                self._told.remove(source)

    def _settle(self) -> None:
        """Let the others say what they have to say: who complains first need not be the cause."""
        until = time.monotonic() + _SETTLING
        while self._living() and time.monotonic() < until:
            if any(each.fault == Fault.MISTAKE for each in self._complaints):
                return
            self._listen(_LOOK)

    def _conclude(self, noted: Sequence[int]) -> None:
        """Interrupt the ranks and let them keep what they have; a second signal ends this."""
        self._send(signal.SIGINT)
        begun, many = time.monotonic(), len(noted)
        told = False
        while self._living() and len(noted) == many:
            waited = time.monotonic() - begun
            if waited > _CONCLUDING:
                return
            if waited > _GRACE and not told:
                told = True
                print("the processes conclude; Ctrl-C again ends them", file=sys.stderr)
            self._listen(_LOOK)

    def _send(self, number: int) -> None:
        for process in self._living():
            with contextlib.suppress(ProcessLookupError):
                # A stopped process takes no other signal than SIGKILL.
                os.kill(process.pid or 0, number)

    def _end(self, by: int) -> list[int]:
        """End whoever lives; returns which of the processes needed it."""
        ended = [i for i, process in enumerate(self._processes) if process.exitcode is None]
        for number in (by, signal.SIGKILL):
            self._send(number)
            until = time.monotonic() + _GRACE
            for process in self._processes:
                process.join(max(0.0, until - time.monotonic()))
        while self._told and multiprocessing.connection.wait(self._told, 0):
            self._listen(0)
        return ended

    def _judge(self, ended: Sequence[int]) -> None:
        found = list(self._complaints)
        told = {complaint.rank for complaint in found}
        for index, process in enumerate(self._processes):
            rank, code = self._first + index, process.exitcode
            if index not in ended and rank not in told and code:
                found.append(_of_exit(rank, code))
        if found:
            raise min(found, key=lambda each: (each.fault, each.rank)).error()


def _of_exit(rank: int, code: int) -> Complaint:
    """A rank that ended without a word."""
    if code > 0:
        return Complaint(Fault.ABORTED, rank, f"rank {rank} ended with status {code}")
    name = signal.Signals(-code).name
    hint = " (by hand, or because memory ran out)" if -code == signal.SIGKILL else ""
    fault = Fault.ABORTED if -code == signal.SIGABRT else Fault.KILLED
    return Complaint(fault, rank, f"rank {rank} was killed by {name}{hint}")


@contextlib.contextmanager
def _signals_noted() -> Iterator[list[int]]:
    """Within the block, signals that end a command are written down, and end nothing."""
    noted: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        noted.append(number)

    if threading.current_thread() is not threading.main_thread():
        yield noted
        return
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    for number, handler in before.items():
        # In the background of a script, SIGINT is ignored.
        if handler != signal.SIG_IGN:
            signal.signal(number, note)
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# -- In the rank --------------------------------------------------------------------


def _ranks_work(work: Callable[[int, Connection], None], index: int, tell: Connection) -> None:
    """What a started process does first."""
    signal.signal(signal.SIGINT, _interrupted)
    threading.Thread(target=end_with_parent, daemon=True).start()
    try:
        work(index, tell)
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def _interrupted(number: int, frame: FrameType | None) -> Any:
    """Interrupt once: a terminal interrupts the ranks, and their parent does so again."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    raise KeyboardInterrupt


def end_with_parent() -> None:
    """End this process when its parent has gone, whatever it waits in."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return
    parent.join()
    logging.shutdown()
    os._exit(1)
