"""What each way of making an iteration faster gives by itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from attack.matching.acceleration import AcceleratedMatcher
from attack.matching.matcher import GradientMatcher
from attack.matching.objectives import AffineSeed, Cosine, Products
from attack.matching.replica import Replica
from attack.settings import SpeedSettings
from benchmarks.speed.cases import CASES, SMALL_CASE, Problem, make_problem
from benchmarks.speed.iterations import accuracy
from benchmarks.speed.references import CPU, Iteration, analytic_seed, ours, published_loop
from benchmarks.speed.timing import medians, paired_ratio
from benchmarks.speed.workers import Job, take_turns


class _SweepingCosine(Cosine):
    """The cosine objective computed entry by entry, in several sweeps over the parameters."""

    def affine_seed(self, products: Products) -> AffineSeed | None:
        """Not used."""
        return None


def _exact(problem: Problem) -> Iteration:
    return ours(problem, "exact")


def _difference(problem: Problem) -> Iteration:
    return ours(problem, "difference")


def _several_sweeps(problem: Problem) -> Iteration:
    matcher = GradientMatcher(Replica(problem.target, CPU), _SweepingCosine(), "difference")
    return lambda: matcher(problem.inputs, problem.labels).input_gradient


def _written_out(problem: Problem) -> Iteration:
    replica = Replica(problem.target, CPU)
    matcher = GradientMatcher(replica, Cosine(), "difference", factor=False)
    return lambda: matcher(problem.inputs, problem.labels).input_gradient


def _channels_apart(problem: Problem) -> Iteration:
    replica = Replica(problem.target, CPU)
    replica.lay_out(torch.contiguous_format)
    matcher = GradientMatcher(replica, Cosine(), "difference")
    return lambda: matcher(problem.inputs, problem.labels).input_gradient


def _bf16(problem: Problem) -> Iteration:
    return _in_bf16(_difference(problem))


def _bf16_exact(problem: Problem) -> Iteration:
    return _in_bf16(_exact(problem))


def _in_bf16(iteration: Iteration) -> Iteration:
    def in_bf16() -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return iteration()

    return in_bf16


def _one_thread(problem: Problem) -> Iteration:
    torch.set_num_threads(1)
    return _difference(problem)


def _two_threads(problem: Problem) -> Iteration:
    torch.set_num_threads(2)
    return _difference(problem)


def _compiled(problem: Problem) -> Iteration:
    matcher = _compiling_matcher(problem)
    return lambda: matcher(problem.inputs, problem.labels).input_gradient


def _compiling_matcher(problem: Problem) -> AcceleratedMatcher:
    replica = Replica(problem.target, CPU)
    return AcceleratedMatcher(replica, Cosine(), "difference", SpeedSettings(compile=True))


def seconds_to_compile(case: str, seed: int) -> float:
    """What `--compile` takes before the first iteration, where nothing is cached."""
    problem = make_problem(CASES[case], seed)
    matcher = _compiling_matcher(problem)
    with torch.compiler.config.patch(force_disable_caches=True):  # type: ignore[attr-defined]
        matcher(problem.inputs, problem.labels)
    return matcher.compile_seconds


@dataclass(frozen=True)
class Lever:
    """One change and what it is compared with.

    Attributes:
        name: Name of the lever.
        without: Builds the iteration before the change.
        with_: Builds the one after it.
        cases: Targets to try it on.
        remark: Whether it is in use, and why.
        wall: Time on the wall: it is about threads.
        compiles: Whether it takes its time before the first iteration.
    """

    name: str
    without: Callable[[Problem], Iteration]
    with_: Callable[[Problem], Iteration]
    cases: tuple[str, ...]
    remark: str
    wall: bool = False
    compiles: bool = False


_SMALL = ("convnet-32px-b1-eval", "resnet18-32px-b1-eval")
_ALL = (*_SMALL, "resnet18-224px-b1-eval", "vgg11-32px-b1-eval")
_BATCHES = ("convnet-32px-b8-eval", "resnet18-32px-b8-train", "resnet18-224px-b4-eval")
LEVERS: dict[str, Lever] = {
    lever.name: lever
    for lever in [
        Lever("analytic seed", published_loop, analytic_seed, _ALL, "in use"),
        Lever("difference for double backward", _exact, _difference, _ALL, "in use"),
        Lever("parameters swept once", _several_sweeps, _difference, _ALL, "in use"),
        Lever("late layers as products", _written_out, _difference, _ALL, "in use"),
        Lever("channels last", _channels_apart, _difference, (*_ALL, *_BATCHES), "in use on a CPU"),
        Lever("bf16", _difference, _bf16, _SMALL, "not in use: the difference drowns"),
        Lever(
            "bf16 and double backward",
            _difference,
            _bf16_exact,
            _SMALL,
            "`--precision bf16` where the difference drowns",
        ),
        Lever("two threads", _one_thread, _two_threads, _SMALL, "torch's default", wall=True),
        Lever(
            "`--compile`",
            _difference,
            _compiled,
            (SMALL_CASE.name, "resnet18-32px-b1-eval", "resnet18-32px-b8-train"),
            "on request; it compiles {seconds:.0f} s",
            compiles=True,
        ),
    ]
}


def build_lever(name: str, with_: bool, case: str, seed: int) -> Iteration:
    """One side of a lever on one case."""
    lever = LEVERS[name]
    return (lever.with_ if with_ else lever.without)(make_problem(CASES[case], seed))


def measure_levers(quick: bool, repeats: int, seed: int) -> Iterator[dict[str, Any]]:
    """One row per lever and case.

    Args:
        quick: The first case of each only, and nothing that has to be compiled.
        repeats: Number of rounds.
        seed: Of models, images and candidates.
    """
    for lever in LEVERS.values():
        if quick:
            lever = replace(lever, cases=() if lever.compiles else lever.cases[:1])
        for case in lever.cases:
            yield _measure(lever, case, repeats, seed)


def _measure(lever: Lever, case: str, repeats: int, seed: int) -> dict[str, Any]:
    sides = {"without": False, "with": True}
    jobs: dict[str, Job] = {
        side: (build_lever, (lever.name, with_, case, seed)) for side, with_ in sides.items()
    }
    times, results = take_turns(jobs, repeats, threads=2 if lever.wall else 1)
    seconds = seconds_to_compile(case, seed) if lever.compiles else 0.0
    return {
        "lever": lever.name,
        "case": case,
        "seconds": medians(times),
        "gain": paired_ratio(times["without"], times["with"]),
        "clock": "wall" if lever.wall else "processor",
        "remark": lever.remark.format(seconds=seconds),
        "compile_seconds": seconds,
        "cosine_to_float64": accuracy(make_problem(CASES[case], seed), results["with"]),
    }
