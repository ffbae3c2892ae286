"""The sections of the speed benchmark: each yields the rows of one table."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from benchmarks.speed.cases import Case

Rows = Iterator[dict[str, Any]]
Measure = Callable[["Case", "torch.device", int, int], Rows]
# Of each method; the middle one counts.
MEMORY_RUNS = 9


@dataclass(frozen=True)
class Request:
    """What is to be measured, and how thoroughly.

    Attributes:
        quick: Small cases and few repeats.
        cases: Names of the targets of the section `iterations`; empty for all.
        device: "cpu", or "cuda" for the sections `gpu-...`.
        repeats: Rounds at most.
        seconds: Enough time per case to stop after three rounds.
        seed: Of models, images and candidates.
        done: Names of targets that a record holds already; of the sections that can go on.
    """

    quick: bool = False
    cases: tuple[str, ...] = ()
    device: str = "cpu"
    repeats: int = 15
    seconds: float = 20.0
    seed: int = 0
    done: frozenset[str] = frozenset()


def sections_of(device: str) -> list[str]:
    """The sections that are measured on a device, all on the CPU or all on the GPU."""
    return [name for name in MEASUREMENTS if name.startswith("gpu-") == (device == "cuda")]


def _chosen(request: Request) -> list[Case]:
    from benchmarks.speed.cases import CASES
    from benchmarks.speed.iterations import check_names

    if request.cases:
        return check_names([*request.cases])
    return [case for case in CASES.values() if case.quick or not request.quick]


def _iterations(request: Request) -> Rows:
    import torch

    from benchmarks.speed.iterations import measure_case

    for case in _chosen(request):
        seconds = request.seconds / (5 if request.quick else 1)
        yield measure_case(case, request.repeats, seconds, request.seed, torch.get_num_threads())


def _small(request: Request) -> Rows:
    from benchmarks.speed.cases import SMALL_CASES
    from benchmarks.speed.iterations import measure_small

    for case in [*SMALL_CASES.values()][: 1 if request.quick else None]:
        seconds = request.seconds / (10 if request.quick else 1)
        yield measure_small(case, request.repeats, seconds, request.seed)


def _restarts(request: Request) -> Rows:
    from benchmarks.speed.cases import CASES, SMALL_CASE
    from benchmarks.speed.iterations import measure_restarts

    names = [] if request.quick else ["convnet-32px-b1-eval", "resnet18-32px-b1-eval"]
    for case in [SMALL_CASE, *(CASES[name] for name in names)]:
        yield measure_restarts(case, 8, min(request.repeats, 5), request.seed)


def _memory(request: Request) -> Rows:
    from benchmarks.speed.memory import LARGE
    from benchmarks.speed.timing import in_subprocess

    # Images in a pass of ours; 0: all.
    pieces = {"resnet18-32px-b1-eval": (0,)} if request.quick else {
        "resnet18-224px-b4-train": (0,),
        "resnet18-224px-b4-eval": (0, 1),
        **{case.name: (0, case.batch // 8) for case in LARGE},
    }  # fmt: skip
    for case, sizes in pieces.items():
        ways = [("R1", 0), ("R2", 0), *(("ours", size) for size in sizes)]
        for method, size in ways:
            words = ["--case", case, "--method", method, "--seed", str(request.seed)]
            words += ["--images-at-once", str(size)]
            runs = 1 if request.quick else 3 if case in {c.name for c in LARGE} else MEMORY_RUNS
            texts = [in_subprocess("benchmarks.speed.memory", *words) for _ in range(runs)]
            found = [json.loads(text.splitlines()[-1]) for text in texts]
            # What a heap has in holes differs from run to run.
            middle = sorted(found, key=lambda run: run["peak_bytes"])[len(found) // 2]
            name = f"{method}, {size} at once" if size else method
            yield {"case": case, "method": name, "runs": runs, **middle}


def _processes(request: Request) -> Rows:
    from benchmarks.speed.cases import CASES, SMALL_CASE
    from benchmarks.speed.iterations import measure_processes

    models, modes = ("convnet", "resnet18"), ("eval", "train")
    names = [f"{model}-32px-b8-{mode}" for model in models for mode in modes]
    for name in [SMALL_CASE.name] if request.quick else names:
        for processes in (1, 2) if request.quick else (1, 2, 4):
            yield measure_processes(CASES[name], processes, min(request.repeats, 5), request.seed)


def _levers(request: Request) -> Rows:
    from benchmarks.speed.levers import measure_levers

    yield from measure_levers(request.quick, min(request.repeats, 7), request.seed)


def _parts(request: Request) -> Rows:
    from benchmarks.speed.parts import measure_parts

    yield from measure_parts(request.quick, request.seed)


def _targets(request: Request) -> Rows:
    import torch

    from benchmarks.speed.targets import CASES_OF_TARGETS, COUNTS, measure_targets

    device = torch.device(request.device)
    counts = COUNTS if device.type == "cpu" else (*COUNTS, 64, 256)
    for case in CASES_OF_TARGETS[: 1 if request.quick else None]:
        if case.name not in request.done:
            yield from measure_targets(case, device, min(request.repeats, 7), request.seed, counts)


def _executors(request: Request) -> Rows:
    from benchmarks.speed.executors import measure_executors

    yield from measure_executors(request.quick, min(request.repeats, 5))


def _on_device(request: Request, measure: Measure, names: Sequence[str] = ()) -> Rows:
    """Rows of the cases that were asked for, else of those with names, else of all."""
    import torch

    from benchmarks.speed.iterations import check_names

    device = torch.device(request.device)
    few = names and not (request.cases or request.quick)
    for case in check_names([*names]) if few else _chosen(request):
        if case.name not in request.done:
            yield from measure(case, device, request.repeats, request.seed)


def _gpu_iterations(request: Request) -> Rows:
    from benchmarks.speed.gpu import measure_iterations

    yield from _on_device(request, measure_iterations)


def _gpu_restarts(request: Request) -> Rows:
    from benchmarks.speed.gpu import measure_restarts

    names = ("cnn-32px-b2-eval", "resnet18-32px-b1-eval", "resnet18-224px-b1-eval")
    yield from _on_device(request, measure_restarts, names)


def _gpu_levers(request: Request) -> Rows:
    from benchmarks.speed.gpu import measure_levers

    # Each compiles three times.
    names = ("convnet-32px-b8-eval", "resnet18-32px-b8-train", "resnet18-224px-b4-eval")
    yield from _on_device(request, measure_levers, names)


def _gpu_ranks(request: Request) -> Rows:
    from benchmarks.speed.gpu import measure_ranks

    names = ("convnet-32px-b8-eval", "resnet18-32px-b32-eval", "resnet18-224px-b4-eval")
    yield from _on_device(request, measure_ranks, names)


MEASUREMENTS: dict[str, Callable[[Request], Rows]] = {
    "iterations": _iterations,
    "small": _small,
    "restarts": _restarts,
    "memory": _memory,
    "processes": _processes,
    "levers": _levers,
    "parts": _parts,
    "targets": _targets,
    "executors": _executors,
    "gpu-iterations": _gpu_iterations,
    "gpu-restarts": _gpu_restarts,
    "gpu-levers": _gpu_levers,
    "gpu-targets": _targets,
    "gpu-ranks": _gpu_ranks,
}
# Those that leave out the targets of `Request.done`.
RESUMABLE = ("targets", *(name for name in MEASUREMENTS if name.startswith("gpu-")))
