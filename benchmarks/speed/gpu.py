"""The iteration on one device: methods, batched restarts, and levers with what they cost.

Everything runs in this process, in turns, and is timed until the device is done. It runs on
a CPU as well, which is how it is tested; its numbers are meant for a GPU.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from multiprocessing import get_context
from typing import TYPE_CHECKING, Any

import torch

from attack.attacks.inverting_gradients import InvertingGradients
from attack.loop.inversion import Inversion
from attack.matching.acceleration import AcceleratedMatcher, product_precision
from attack.matching.matcher import GradientMatcher
from attack.matching.objectives import Cosine
from attack.matching.replica import Replica
from attack.metrics import assign, psnr
from attack.settings import SpeedSettings
from benchmarks.speed import references
from benchmarks.speed.cases import CASES, Case, Problem, make_problem, true_images
from benchmarks.speed.iterations import accuracy
from benchmarks.speed.timing import interleaved, medians, paired_ratio, synchronised
from core.launch_arguments import LaunchSettings
from core.processes.launch import launch

if TYPE_CHECKING:
    from multiprocessing.queues import SimpleQueue

    from core.processes.distributed import Process

Row = dict[str, Any]
RESTARTS = (1, 2, 4, 8, 16, 32)
RANKS = (1, 2, 4)
# Enough to tell a lever that ruins the reconstruction from one that does not.
PSNR_ITERATIONS = 500
LEVERS = {
    "none": SpeedSettings(),
    "channels last": SpeedSettings(channels_last=True),
    "CUDA graphs": SpeedSettings(cuda_graphs=True),
    "compiled": SpeedSettings(compile=True),
    "compiled, CUDA graphs": SpeedSettings(compile=True, cuda_graphs=True),
    "TF32": SpeedSettings(precision="tf32"),
    "bf16": SpeedSettings(precision="bf16"),
    "bf16, channels last": SpeedSettings(precision="bf16", channels_last=True),
    "bf16, compiled, CUDA graphs, channels last": SpeedSettings(
        compile=True, cuda_graphs=True, precision="bf16", channels_last=True
    ),
}


def measure_iterations(case: Case, device: torch.device, repeats: int, seed: int) -> Iterator[Row]:
    """Both textbook loops and ours, in full float32.

    Args:
        case: The target that is timed.
        device: Device that is timed.
        repeats: Number of rounds.
        seed: Of model, images and candidate.
    """
    problem = make_problem(case, seed).to(device)
    methods: dict[str, Callable[[], torch.Tensor]] = {
        "R1": references.published_loop(problem),
        "R2": references.analytic_seed(problem),
        "ours": references.ours(problem),
    }
    with product_precision("float32"):
        peaks = {name: _peak_bytes(method, device) for name, method in methods.items()}
        timed = {name: synchronised(method, device) for name, method in methods.items()}
        times = interleaved(timed, repeats)
        cosine = accuracy(problem, methods["ours"]())
    yield {
        "case": case.name,
        "device": device.type,
        "seconds": medians(times),
        "speedup_over_R1": paired_ratio(times["R1"], times["ours"]),
        "speedup_over_R2": paired_ratio(times["R2"], times["ours"]),
        "cosine_to_float64": cosine,
        "peak_bytes": peaks,
    }


def _peak_bytes(function: Callable[[], Any], device: torch.device) -> int | None:
    """Most memory that torch held on a CUDA device during a call; None elsewhere."""
    if device.type != "cuda":
        function()
        return None
    torch.cuda.reset_peak_memory_stats(device)
    function()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device)


def measure_restarts(
    case: Case,
    device: torch.device,
    repeats: int,
    seed: int,
    counts: tuple[int, ...] = RESTARTS,
) -> Iterator[Row]:
    """One iteration of so many restarts, as many in a call as the program chooses."""
    problem = make_problem(case, seed).to(device)
    for count in counts:
        iteration = references.our_loop(problem, count, at_once=0)
        with product_precision("float32"):
            peak = _peak_bytes(iteration, device)
            times = interleaved({"loop": synchronised(iteration, device)}, min(repeats, 5))
        yield {
            "case": case.name,
            "device": device.type,
            "restarts": count,
            "seconds": medians(times)["loop"],
            "peak_bytes": peak,
        }


def measure_levers(
    case: Case,
    device: torch.device,
    repeats: int,
    seed: int,
    iterations: int = PSNR_ITERATIONS,
    names: tuple[str, ...] = tuple(LEVERS),
) -> Iterator[Row]:
    """Each lever beside none: seconds, cosine to float64, PSNR of a short attack.

    Args:
        case: The target that is timed.
        device: Where; levers it does not have are left out.
        repeats: Number of rounds.
        seed: Of model, images and candidate.
        iterations: Of the attack that PSNR is of.
        names: Which levers of `LEVERS`.
    """
    problem = make_problem(case, seed).to(device)
    plain = _Lever(problem, SpeedSettings(), device)
    for name in names:
        acceleration = LEVERS[name]
        if device.type != "cuda" and (acceleration.cuda_graphs or acceleration.precision == "tf32"):
            continue
        lever = _Lever(problem, acceleration, device)
        sides = {"without": plain.iteration, "with": lever.iteration}
        peak = _peak_bytes(lever.iteration, device)
        timed = {side: synchronised(function, device) for side, function in sides.items()}
        times = interleaved(timed, repeats)
        yield {
            "lever": name,
            "case": case.name,
            "device": device.type,
            "seconds": medians(times)["with"],
            "gain": paired_ratio(times["without"], times["with"]),
            "first_call_seconds": lever.first_call_seconds,
            "cosine_to_float64": accuracy(problem, lever.iteration()),
            "psnr": _psnr(case, problem, acceleration, device, iterations, seed),
            "psnr_iterations": iterations,
            "peak_bytes": peak,
            "events": lever.matcher.events,
        }


def measure_ranks(
    case: Case,
    device: torch.device,
    repeats: int,
    seed: int,
    counts: tuple[int, ...] = RANKS,
) -> Iterator[Row]:
    """An iteration with the batch spread over several ranks that share one device, by gloo.

    Args:
        case: The target that is timed.
        device: Of all ranks; NCCL refuses two of them on one card.
        repeats: Number of rounds.
        seed: Of model, images and candidate.
        counts: Numbers of ranks.
    """
    for count in (n for n in counts if n <= case.batch):
        answers = get_context("spawn").SimpleQueue()
        settings = LaunchSettings(
            seed=seed,
            dist_url="tcp://127.0.0.1:0",
            dist_backend="gloo",
            multiprocessing_distributed=True,
            nproc_per_node=count,
            cpu=device.type == "cpu",
        )
        launch(_rank, settings, case.name, repeats, seed, answers)
        yield {"case": case.name, "device": device.type, "ranks": count, **answers.get()}


def _rank(
    process: Process, case: str, repeats: int, seed: int, answers: SimpleQueue[dict[str, Any]]
) -> None:
    device = process.device
    problem = make_problem(CASES[case], seed).to(device)
    replica = Replica(problem.target, device)
    matcher = GradientMatcher(replica, Cosine(), "difference")
    inputs, labels = problem.inputs[replica.share], problem.labels[replica.share]
    with product_precision("float32"):
        iteration = synchronised(lambda: matcher(inputs, labels), device)
        peak = _peak_bytes(iteration, device)
        times = interleaved({"iteration": iteration}, repeats)
    if process.is_main:
        answers.put({"seconds": medians(times)["iteration"], "peak_bytes": peak})


class _Lever:
    """A matcher with one acceleration, called once, which compiles and captures."""

    def __init__(self, problem: Problem, acceleration: SpeedSettings, device: torch.device) -> None:
        self.problem, self.precision = problem, acceleration.precision
        replica = Replica(problem.target, device)
        self.matcher = AcceleratedMatcher(replica, Cosine(), "auto", acceleration)
        begun = time.perf_counter()
        synchronised(self.iteration, device)()
        self.first_call_seconds = time.perf_counter() - begun

    def iteration(self) -> torch.Tensor:
        """The gradient of the objective."""
        with product_precision(self.precision):
            return self.matcher(self.problem.inputs, self.problem.labels).input_gradient


def _psnr(
    case: Case,
    problem: Problem,
    acceleration: SpeedSettings,
    device: torch.device,
    iterations: int,
    seed: int,
) -> float:
    """Mean PSNR in dB of Inverting Gradients within so many iterations."""
    config = InvertingGradients.published.changed(
        iterations=iterations,
        restarts=1,
        **dataclasses.asdict(acceleration),
    )
    labels = problem.labels.cpu()
    found = Inversion(problem.target, labels, config, device=device, seed=seed).run().images
    truth = true_images(case, seed)
    return float(psnr(found[assign(found, truth)], truth).mean())
