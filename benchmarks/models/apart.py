"""One model's measurement in a process of its own: if that dies, the others' go on."""

from __future__ import annotations

import multiprocessing
import resource
import signal
import threading
from collections.abc import Iterator
from multiprocessing.connection import Connection

from benchmarks.models.cases import Case, cases
from benchmarks.models.measure import MODES, Agreement, agreement
from benchmarks.models.record import UNMEASURED
from core.processes.ranks import end_with_parent

GIB = 2**30
_NO_MEMORY = ("can't allocate memory", "not enough memory")


def measured_apart(case: Case, threads: int, memory: int) -> Iterator[Agreement]:
    """Measure a model in a process of its own, see `benchmarks.models.measure.agreements`.

    Args:
        case: The model; the process looks it up by its group and name.
        threads: Of the computation.
        memory: What the process may take, in GiB; 0: no limit.

    Yields:
        A row for every mode. Where the process died, the row says of what.
    """
    context = multiprocessing.get_context("spawn")
    hear, tell = context.Pipe(duplex=False)
    work = (case.group, case.name, threads, memory, tell)
    process = context.Process(target=_measure, args=work, daemon=True)
    process.start()
    tell.close()
    missing = list(MODES)
    for found in _heard(hear):
        missing.remove(found.mode)
        yield found
    process.join()
    for mode in missing:
        yield Agreement(case.name, mode, case.shape, refusal=_death(process.exitcode))


def _heard(hear: Connection) -> Iterator[Agreement]:
    while True:
        try:
            yield hear.recv()
        except EOFError:
            return


def _measure(group: str, name: str, threads: int, memory: int, tell: Connection) -> None:
    """What the process does: every row is sent as soon as it is there."""
    import torch

    threading.Thread(target=end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    if memory:
        # Of private memory: the libraries of a GPU alone take more address space.
        resource.setrlimit(resource.RLIMIT_DATA, (memory * GIB, memory * GIB))
    case = next(case for case in cases() if (case.group, case.name) == (group, name))
    for mode in MODES:
        tell.send(_within_memory(case, mode, memory))


def _within_memory(case: Case, mode: str, memory: int) -> Agreement:
    _, name, build, shape, n_classes = case
    try:
        return agreement(name, build, shape, n_classes, mode)
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not any(w in str(error) for w in _NO_MEMORY):
            raise
        sentence = f"{UNMEASURED}: it takes more than {memory} GiB of memory"
        return Agreement(name, mode, shape, refusal=sentence)


def _death(exitcode: int | None) -> str:
    code = exitcode or 0
    how = f"signal {signal.Signals(-code).name}" if code < 0 else f"status {code}"
    return f"{UNMEASURED}: the process ended with {how}"
