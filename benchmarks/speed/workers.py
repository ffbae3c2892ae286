"""Methods in processes of their own that take turns.

What one method does to the allocator, to caches of kernels or to thread pools cannot
help or hurt another; and still they are timed in turns, not one after the other.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

import torch

# Module-level (it is sent by name): builds an iteration from plain arguments.
Build = Callable[..., Callable[[], torch.Tensor]]
Job = tuple[Build, tuple[Any, ...]]
# What one turn lasts. Shorter iterations are repeated: those of an attack find the caches as
# the one before left them, not as another method did.
TURN_SECONDS = 0.3


class Worker:
    """A process that runs iterations whenever it is told to.

    Args:
        job: What builds its iteration, and the arguments.
        threads: Number of torch's threads.
    """

    def __init__(self, job: Job, threads: int) -> None:
        context = get_context("spawn")
        self._line, there = context.Pipe()
        self._process = context.Process(target=_serve, args=(there, job, threads), daemon=True)
        self._process.start()

    def run(self) -> tuple[float, torch.Tensor]:
        """Seconds of one iteration in a turn, and its result.

        Raises:
            RuntimeError: The iteration failed.
        """
        self._line.send("run")
        try:
            seconds, result = self._line.recv()
        except EOFError:
            raise RuntimeError("a worker ended early; its error stands above") from None
        return seconds, torch.from_numpy(result)

    def close(self) -> None:
        """End the process."""
        with contextlib.suppress(BrokenPipeError):
            self._line.send("end")
        self._process.join()


def _serve(line: Connection, job: Job, threads: int) -> None:
    torch.set_num_threads(threads)
    build, arguments = job
    iteration = build(*arguments)
    # Other programs on the machine take time on the wall, but hardly processor time.
    clock = time.process_time if threads == 1 else time.perf_counter
    while line.recv() == "run":
        seconds, result = _turn(iteration, clock)
        line.send((seconds, result.numpy()))


def _turn(
    iteration: Callable[[], torch.Tensor], clock: Callable[[], float]
) -> tuple[float, torch.Tensor]:
    """Median seconds of as many iterations as fill a turn, without the first of several."""
    taken: list[float] = []
    while not taken or sum(taken) < TURN_SECONDS:
        begun = clock()
        result = iteration()
        taken.append(clock() - begun)
    return statistics.median(taken[1:] or taken), result


@contextlib.contextmanager
def workers(jobs: dict[str, Job], threads: int) -> Iterator[dict[str, Worker]]:
    """One worker per job, all ended afterwards."""
    started = {name: Worker(job, threads) for name, job in jobs.items()}
    try:
        yield started
    finally:
        for worker in started.values():
            worker.close()


def take_turns(
    jobs: dict[str, Job], repeats: int, threads: int, enough_seconds: float = 0.0
) -> tuple[dict[str, list[float]], dict[str, torch.Tensor]]:
    """Time several jobs in turns.

    Args:
        jobs: What to time, by name.
        repeats: Rounds at most, after one that is not measured.
        threads: Of each worker; with one, processor time is measured.
        enough_seconds: Stop after three rounds once so much time is used; 0: all rounds.

    Returns:
        Seconds per iteration of every turn, and the last result, by name.
    """
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    with workers(jobs, threads) as ready:
        results = {name: worker.run()[1] for name, worker in ready.items()}
        begun = time.perf_counter()
        for done in range(repeats):
            if enough_seconds and done >= 3 and time.perf_counter() - begun > enough_seconds:
                break
            for name in _rotated(list(jobs), done):
                taken, results[name] = ready[name].run()
                seconds[name].append(taken)
    return seconds, results


def _rotated(names: Sequence[str], by: int) -> Sequence[str]:
    by %= len(names)
    return [*names[by:], *names[:by]]
