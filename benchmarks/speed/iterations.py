"""Seconds per iteration, memory, restarts and processes of gradient matching."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from torch.utils.flop_counter import FlopCounterMode

from attack.matching.matcher import GradientMatcher
from attack.matching.objectives import Cosine
from attack.matching.replica import Replica
from benchmarks.speed import references
from benchmarks.speed.cases import CASES, SMALL_CASES, Case, Problem, make_problem
from benchmarks.speed.timing import interleaved, matrix_rate, medians, paired_ratio
from benchmarks.speed.workers import Job, take_turns
from core.errors import InputError
from core.launch_arguments import LaunchSettings
from core.models import batch_norm
from core.processes import distributed
from core.processes.launch import launch

if TYPE_CHECKING:
    from multiprocessing.queues import SimpleQueue

# An iteration needs a forward pass (1), a backward pass (2) and their derivative (4).
PASSES = 7
# Of one process among several: those of an attack find the caches as the one before left them.
CALLS_PER_TURN = 4
# Of the whole attacks that are timed.
ATTACK_ITERATIONS = 48
METHODS: dict[str, Callable[[Problem], references.Iteration]] = {
    "R1": references.published_loop,
    "R2": references.analytic_seed,
    "ours": references.ours,
    "breaching": references.breaching_loop,
    "our loop": references.our_loop,
}
# Whole iterations of Inverting Gradients, by the names they have in the record of small networks.
LOOPS = {"breaching": "breaching", "ours": "our loop", "traced": "our loop, traced"}


def build_iteration(method: str, case: str, seed: int) -> references.Iteration:
    """An iteration of one method on one case, set up as its command would."""
    methods = {**METHODS, LOOPS["traced"]: references.our_traced_loop}
    return methods[method](make_problem({**SMALL_CASES, **CASES}[case], seed))


def measure_case(
    case: Case, repeats: int, seconds: float, seed: int, threads: int
) -> dict[str, Any]:
    """One row: every method on one target, taking turns.

    `R1`, `R2` and `ours` evaluate the gradient of the objective; `breaching` and `our loop`
    are whole iterations of Inverting Gradients with total variation and optimizer.

    Args:
        case: The target that is timed.
        repeats: Rounds at most.
        seconds: Enough time to stop after three rounds.
        seed: Of model, images and candidate.
        threads: Number of threads of each method.
    """
    methods = [name for name in METHODS if _available(name)]
    jobs: dict[str, Job] = {m: (build_iteration, (m, case.name, seed)) for m in methods}
    times, results = take_turns(jobs, repeats, threads, seconds)
    problem = make_problem(case, seed)
    row: dict[str, Any] = {
        "case": case.name,
        "seconds": medians(times),
        "clock": "processor" if threads == 1 else "wall",
        "rounds": len(times["ours"]),
        "speedup_over_R1": paired_ratio(times["R1"], times["ours"]),
        "speedup_over_R2": paired_ratio(times["R2"], times["ours"]),
        "cosine_to_float64": accuracy(problem, results["ours"]),
        "parameters": sum(g.numel() for g in problem.target.gradient.values()),
    }
    if "breaching" in times:
        row["speedup_over_breaching"] = paired_ratio(times["breaching"], times["our loop"])
    return row | _roofline(problem, row["seconds"]["ours"])


def measure_small(case: Case, repeats: int, seconds: float, seed: int) -> dict[str, Any]:
    """One row: whole iterations of Inverting Gradients on a small network, taking turns.

    Args:
        case: One of `SMALL_CASES`.
        repeats: Rounds at most.
        seconds: Enough time to stop after three rounds.
        seed: Of model, images and candidate.
    """
    jobs: dict[str, Job] = {
        name: (build_iteration, (method, case.name, seed))
        for name, method in LOOPS.items()
        if _available(method)
    }
    times, _ = take_turns(jobs, repeats, 1, seconds)
    row = {
        "case": case.name,
        "seconds": medians(times),
        "clock": "processor",
        "rounds": len(times["ours"]),
        "traced_over_ours": paired_ratio(times["ours"], times["traced"]),
    }
    if "breaching" in times:
        row["ours_over_breaching"] = paired_ratio(times["breaching"], times["ours"])
        row["traced_over_breaching"] = paired_ratio(times["breaching"], times["traced"])
    return row


def _available(method: str) -> bool:
    return method != "breaching" or importlib.util.find_spec("breaching") is not None


def accuracy(problem: Problem, found: torch.Tensor) -> float:
    """Cosine of a gradient in the images to the textbook's in float64."""
    exact = references.analytic_seed(problem, torch.float64)()
    found = found.to(exact)
    return float((exact * found).sum() / (exact.norm() * found.norm()))


def _roofline(problem: Problem, seconds: float) -> dict[str, float]:
    """What the matrix products alone of `PASSES` forward passes would take."""
    model = problem.target.build_model()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(problem.inputs)
    rate = matrix_rate()
    bound = PASSES * counter.get_total_flops() / rate
    return {
        "forward_flops": counter.get_total_flops(),
        "matrix_flops_per_second": rate,
        "roofline_seconds": bound,
        "times_roofline": seconds / bound,
    }


def measure_restarts(case: Case, n: int, repeats: int, seed: int) -> dict[str, Any]:
    """The time of `n` restarts in units of the time of one.

    Per iteration, with all of them running; and ("halved") of a whole attack that drops the
    worse half of them at 1/8, 1/4 and 1/2 of its iterations.
    """
    problem = make_problem(case, seed)
    functions = {
        "one": references.our_loop(problem),
        "one by one": references.our_loop(problem, n, at_once=1),
        "together": references.our_loop(problem, n, at_once=n),
        "chosen": references.our_loop(problem, n, at_once=0),
    }
    times = interleaved(functions, repeats)
    whole = {
        "one": references.our_attack(problem, ATTACK_ITERATIONS, 1, halving=False),
        "halved": references.our_attack(problem, ATTACK_ITERATIONS, n, halving=True),
    }
    attacks = interleaved(whole, repeats)
    ratios = {k: paired_ratio(times[k], times["one"]) for k in list(functions)[1:]}
    return {
        "case": case.name,
        "restarts": n,
        "seconds": medians(times),
        "times_one": {**ratios, "halved": paired_ratio(attacks["halved"], attacks["one"])},
        **{k: v for k, v in _roofline(problem, medians(times)["one"]).items() if k[0] == "t"},
    }


def measure_processes(case: Case, processes: int, repeats: int, seed: int) -> dict[str, Any]:
    """Seconds per iteration with the batch sharded over gloo processes."""
    from multiprocessing import get_context

    answers = get_context("spawn").SimpleQueue()
    settings = LaunchSettings(
        seed=seed,
        dist_url="tcp://127.0.0.1:0",
        dist_backend="gloo",
        multiprocessing_distributed=True,
        nproc_per_node=processes,
        cpu=True,
    )
    launch(_shard_of_iteration, settings, case.name, repeats, seed, answers)
    return {"case": case.name, "processes": processes, **json.loads(answers.get())}


def _shard_of_iteration(
    process: distributed.Process, case: str, repeats: int, seed: int, answers: SimpleQueue[str]
) -> None:
    # Each process as on a core of its own, also where it is alone.
    torch.set_num_threads(1)
    problem = make_problem(CASES[case], seed)
    replica = Replica(problem.target, process.device)
    matcher = GradientMatcher(replica, Cosine(), "difference")
    inputs, labels = problem.inputs[replica.share], problem.labels[replica.share]
    flat = torch.zeros(sum(p.numel() for p in replica.parameters))
    functions: dict[str, Callable[[], Any]] = {"iteration": lambda: matcher(inputs, labels)}
    if process.world_size > 1:
        sockets = functools.partial(_through_sockets, functions["iteration"])
        apart = {"apart": _apart(problem, len(inputs)), "whole": _by_the_first(problem)}
        functions |= {"sockets": sockets, **apart}
    functions["all-reduce"] = lambda: distributed.all_reduce(flat)
    turns = {name: functools.partial(_turn, function) for name, function in functions.items()}
    in_turns = medians(interleaved(turns, repeats))
    times = {name: seconds / CALLS_PER_TURN for name, seconds in in_turns.items()}
    with counted_bytes() as sent:
        matcher(inputs, labels)
    if process.is_main:
        sizes = {"bytes": flat.numel() * 4, "sent_bytes": sum(sent)}
        answers.put(json.dumps({"seconds": times, **sizes}))


def _turn(function: Callable[[], Any]) -> None:
    for _ in range(CALLS_PER_TURN):
        function()


def _apart(problem: Problem, n: int) -> Callable[[], Any]:
    """An iteration with as many images as a shard has that knows of no other process."""
    with distributed.alone():
        replica = Replica(problem.target, torch.device("cpu"))
        matcher = GradientMatcher(replica, Cosine(), "difference")

    def iteration() -> Any:
        with distributed.alone():
            return matcher(problem.inputs[:n], problem.labels[:n])

    return iteration


def _by_the_first(problem: Problem) -> Callable[[], Any]:
    """An iteration with all images on one process, for which the others wait asleep."""
    if distributed.rank() > 0:
        return distributed.barrier
    iteration = _apart(problem, len(problem.inputs))

    def call() -> None:
        iteration()
        distributed.barrier()

    return call


def _through_sockets(iteration: Callable[[], Any]) -> Any:
    with mock.patch.object(distributed, "_shared_memory", return_value=None):
        return iteration()


@contextlib.contextmanager
def counted_bytes() -> Iterator[list[int]]:
    """The bytes that this process hands to collectives within the block, call by call."""
    sent: list[int] = []

    def noted(collective: Callable[..., Any]) -> Callable[..., Any]:
        def call(tensor: torch.Tensor, *rest: Any) -> Any:
            sent.append(tensor.numel() * tensor.element_size())
            return collective(tensor, *rest)

        return call

    reduced, gathered = noted(distributed.all_reduce), noted(distributed.all_gather_rows)
    with (
        mock.patch.object(distributed, "all_reduce", reduced),
        mock.patch.object(distributed, "all_gather_rows", gathered),
        # It is known there by a name of its own.
        mock.patch.object(batch_norm, "all_reduce", reduced),
    ):
        yield sent


def check_names(names: list[str]) -> list[Case]:
    """The cases of these names.

    Raises:
        InputError: There is no such case.
    """
    unknown = [name for name in names if name not in CASES]
    if unknown:
        raise InputError(f"--cases {unknown[0]}: unknown; known are {', '.join(CASES)}")
    return [CASES[name] for name in names]
