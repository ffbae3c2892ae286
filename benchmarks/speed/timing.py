"""Paired timing: what is compared runs in turns, so that a busy machine slows all alike."""

from __future__ import annotations

import contextlib
import ctypes
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch


def interleaved(
    functions: Mapping[str, Callable[[], Any]], repeats: int, least_seconds: float = 0.0
) -> dict[str, list[float]]:
    """Seconds of every call, the functions taking turns.

    Args:
        functions: What to time, by name; each is called once before, unmeasured.
        repeats: Rounds at most.
        least_seconds: Stop after three rounds once so much time is used; 0: all rounds.
    """
    for function in functions.values():
        function()
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    begun = time.perf_counter()
    for rounds in range(repeats):
        if least_seconds and rounds >= 3 and time.perf_counter() - begun > least_seconds:
            break
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def synchronised(function: Callable[[], Any], device: torch.device) -> Callable[[], Any]:
    """The function, which returns only when a CUDA device has done all it was told."""

    def call() -> Any:
        result = function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return result

    return call


def medians(seconds: Mapping[str, list[float]]) -> dict[str, float]:
    """The median time of each."""
    return {name: statistics.median(times) for name, times in seconds.items()}


def paired_ratio(slow: list[float], fast: list[float]) -> float:
    """Median over rounds of slow / fast: a disturbance of one round counts once."""
    return statistics.median(a / b for a, b in zip(slow, fast, strict=True))


def peak_bytes() -> int:
    """Largest resident memory of this process so far, or since `forget_peak`."""
    # What getrusage tells also counts the parent that this process was forked from.
    found = _status("VmHWM")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 if found is None else found


def resident_bytes() -> int:
    """Resident memory of this process now; its peak where the system tells no more."""
    found = _status("VmRSS")
    return peak_bytes() if found is None else found


def forget_peak() -> None:
    """Return freed memory to the system and count the peak from here on, where possible."""
    if sys.platform.startswith("linux"):
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def _status(field: str) -> int | None:
    """A field of the kernel's account of this process, in bytes."""
    path = Path("/proc/self/status")
    if not path.exists():
        return None
    lines = path.read_text(encoding="utf-8").splitlines()
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    return int(fields[field].split()[0]) * 1024


def in_subprocess(module: str, *words: str) -> str:
    """Standard output of `python -m module words`, in a fresh process."""
    command = [sys.executable, "-m", module, *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed: {done.stderr.strip()[-500:]}")
    return done.stdout


def matrix_rate(size: int = 1536, repeats: int = 7) -> float:
    """Multiply-add rate of this machine, FLOP/s: the best of several float32 products."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    times = interleaved({"product": lambda: a @ b}, repeats)["product"]
    return 2 * size**3 / min(times)
