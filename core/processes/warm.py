"""Processes that start warm: forked from a server that has imported what they need.

A new interpreter takes seconds to import torch. A process forked from one that has imported it and
done nothing else is as new as the interpreter: it has no threads and no group, and no random number
was drawn. That holds on Linux and where no GPU is used, whose state cannot be inherited; elsewhere
every process is a new interpreter.
"""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import multiprocessing.forkserver
import multiprocessing.resource_tracker
import multiprocessing.util
import os
import runpy
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.process import BaseProcess
from multiprocessing.reduction import DupFd
from pathlib import Path
from typing import Any

from core.locks import remove_folders_left_behind, temporary_prefix

# torch keeps its stack traces of lost peers to itself.
_QUIET = {"TORCH_CPP_LOG_LEVEL": "FATAL"}
# Of the server's socket; its whole path may have 107 bytes, of which ours are some 85.
_FOLDER = "gradinvbench-server."
_LONGEST_PLACE = 20
# The server must own no thread: threads are not inherited, and what they held stays held.
_ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
THREADS = "OMP_NUM_THREADS"
# Threads that wait for each other sleep. By default they spin, and where others compute as well
# they take the processor from the very thread they wait for: 60 times the processor time.
SLEEPING = {"OMP_WAIT_POLICY": "PASSIVE"}


# Whether this process was forked from a server that has torch.
_is_served = False


def can_be_warm(*, gpu: bool) -> bool:
    """Whether processes that use a GPU, or none, may be forked from a server."""
    return sys.platform == "linux" and not gpu


def start(
    work: Callable[..., None], *arguments: Any, imports: Sequence[str] = (), warm: bool = True
) -> BaseProcess:
    """Call a function in a process of its own, in this process' environment and process group.

    A process that was itself forked from a server takes another one from there.

    Args:
        work: A module-level function, or a partial of one.
        arguments: What it is called with.
        imports: What the server imports; those of this process' first call count. One that
            cannot be imported is left to the process that needs it.
        warm: Whether to fork it from the server; else it is a new interpreter.
    """
    if not warm:
        process: BaseProcess = multiprocessing.get_context("spawn").Process(
            target=work, args=arguments
        )
        with _environment(_QUIET):
            process.start()
        return process
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*imports])
    surroundings = _Surroundings(dict(os.environ), os.getpgrp(), os.sched_getaffinity(0))
    path = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    process = context.Process(target=_as_if_new, args=(surroundings, work, arguments))
    with _environment({**_QUIET, **SLEEPING, **_ONE_THREAD, **path}):
        if _is_served:
            # Where that server has gone, this process gets one of its own.
            with contextlib.suppress(OSError), _server_of_this_process():
                process.start()
                return process
        _name_folder(os.getpid())
        process.start()
    return process


@contextlib.contextmanager
def _server_of_this_process() -> Iterator[None]:
    """Within the block, processes come from the server that this one was forked from.

    Python knows its address, and starts another server nevertheless, which imports all again.
    """
    server = multiprocessing.forkserver._forkserver  # type: ignore[attr-defined]
    server.ensure_running = multiprocessing.resource_tracker.ensure_running  # type: ignore[method-assign]
    try:
        yield
    finally:
        del server.ensure_running


@functools.cache
def _name_folder(_of_process: int) -> None:
    """Give the server's socket a folder that says whose it is.

    Python's own says nothing, and stays for ever when this process is killed.
    """
    place = Path(tempfile.gettempdir())
    if len(str(place)) > _LONGEST_PLACE:
        return
    remove_folders_left_behind(place, _FOLDER)
    mine = tempfile.mkdtemp(prefix=temporary_prefix(_FOLDER))
    before, tempfile.tempdir = tempfile.tempdir, mine
    try:
        used = multiprocessing.util.get_temp_dir()
    finally:
        tempfile.tempdir = before
    if Path(used).parent != Path(mine):
        # The process has one already.
        os.rmdir(mine)
        return
    # After Python's own, whose priority is -100.
    multiprocessing.util.Finalize(None, shutil.rmtree, args=(mine, True), exitpriority=-101)


def start_command(
    words: Sequence[str],
    *,
    folder: Path,
    environment: Mapping[str, str],
    output: int,
    kept: Sequence[int] = (),
    cores: Sequence[int] = (),
    imports: Sequence[str] = (),
) -> BaseProcess:
    """Run a Python command as `python WORDS...` does, forked from the server.

    Args:
        words: A script, or -m and a module, and their arguments.
        folder: Where it stands.
        environment: Its environment; OMP_NUM_THREADS sets torch's threads as well.
        output: Descriptor that gets all it prints.
        kept: Descriptors that it holds open as long as it lives.
        cores: Processor cores that it may run on; empty: all of this process'.
        imports: As in `start`.
    """
    # Descriptors can only be sent to a process that is being started.
    command = _Command(tuple(words), folder, dict(environment), output, tuple(kept), tuple(cores))
    return start(command, imports=imports)


class _Command:
    """A command on its way into its process."""

    def __init__(
        self,
        words: tuple[str, ...],
        folder: Path,
        environment: dict[str, str],
        output: int,
        kept: tuple[int, ...],
        cores: tuple[int, ...],
    ) -> None:
        self._words, self._folder, self._environment = words, folder, environment
        self._output, self._kept, self._cores = output, kept, cores

    def __getstate__(self) -> dict[str, Any]:
        kept = tuple(map(DupFd, self._kept))
        return {**self.__dict__, "_output": DupFd(self._output), "_kept": kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._output = state["_output"].detach()
        self._kept = tuple(each.detach() for each in state["_kept"])

    def __call__(self) -> None:
        """Become the command."""
        os.setpgid(0, 0)
        # It is interrupted by its starter, also where that runs in the background of a script.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for standard in (1, 2):
            os.dup2(self._output, standard)
        os.close(self._output)
        os.chdir(self._folder)
        os.environ.clear()
        os.environ.update(self._environment)
        path = self._environment.get("PYTHONPATH", "").split(os.pathsep)
        sys.path[:0] = [place for place in path if place and place not in sys.path]
        if self._cores:
            os.sched_setaffinity(0, self._cores)
        if "torch" in sys.modules and THREADS in os.environ:
            sys.modules["torch"].set_num_threads(int(os.environ[THREADS]))
        # Of the command's own processes: Python's default, as in a new interpreter.
        multiprocessing.set_start_method(None, force=True)
        _run(self._words)


def _run(words: Sequence[str]) -> None:
    if words[0] == "-m":
        sys.argv = [words[1], *words[2:]]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        return
    sys.argv = [*words]
    sys.path.insert(0, str(Path(words[0]).resolve().parent))
    runpy.run_path(words[0], run_name="__main__")


class _Surroundings:
    """What a new interpreter would take over from who starts it, on its way into a process."""

    def __init__(self, environment: Mapping[str, str], group: int, cores: set[int]) -> None:
        self._environment, self._group, self._cores = environment, group, cores
        self._streams = tuple(filter(_is_open, (1, 2)))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_sent": tuple(map(DupFd, self._streams))}

    def __setstate__(self, state: dict[str, Any]) -> None:
        sent = state.pop("_sent")
        self.__dict__.update(state)
        # Here, before the work is unpickled: its errors belong into these streams.
        for stream, copy in zip(self._streams, sent, strict=True):
            descriptor = copy.detach()
            os.dup2(descriptor, stream)
            os.close(descriptor)

    def take_over(self) -> None:
        """In the new process."""
        os.environ.clear()
        os.environ.update(self._environment)
        # It is the server's child, and gets the signals that its parent's group gets.
        with contextlib.suppress(OSError):
            os.setpgid(0, self._group)
        with contextlib.suppress(OSError):
            os.sched_setaffinity(0, self._cores)


def _is_open(descriptor: int) -> bool:
    try:
        os.fstat(descriptor)
    except OSError:
        return False
    return True


def _as_if_new(
    surroundings: _Surroundings, work: Callable[..., None], arguments: Sequence[Any]
) -> None:
    """In the forked process: what a new interpreter would be."""
    global _is_served
    _is_served = "torch" in sys.modules
    surroundings.take_over()
    # Where nothing is seeded, no two processes draw the same.
    if "torch" in sys.modules:
        sys.modules["torch"].default_generator.seed()
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed()
    work(*arguments)


@contextlib.contextmanager
def _environment(changes: Mapping[str, str]) -> Iterator[None]:
    """Within the block the environment is another one."""
    before = dict(os.environ)
    chosen = {name: before[name] for name in (*_QUIET, *SLEEPING) if name in before}
    os.environ.update({**changes, **chosen})
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
