"""Gradient matching in the plain textbook ways, to compare with.

Each function takes a problem, builds the model once and returns an iteration: a function
that evaluates the gradient of the cosine objective in the candidate.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from attack.attacks.inverting_gradients import InvertingGradients
from attack.loop.inversion import Inversion
from attack.loop.many_targets import ManyInversions
from attack.matching.matcher import GradientMatcher
from attack.matching.objectives import Cosine
from attack.matching.pieces import PieceMatcher
from attack.matching.replica import Replica
from benchmarks.speed.cases import Problem
from core.errors import InputError
from core.target import Target

CPU = torch.device("cpu")
Iteration = Callable[[], torch.Tensor]


def published_loop(problem: Problem) -> Iteration:
    """R1: the cosine loss on the graph of the parameter gradient, then `backward`.

    As published code does it: `backward` also differentiates in the parameters, and in
    train mode BatchNorm updates its running statistics in place.

    Source: Geiping et al., Inverting Gradients, 2020, eq. 4, https://arxiv.org/abs/2003.14053.
    """
    device = problem.inputs.device
    model = problem.target.build_model().to(device)
    goal = [g.to(device) for g in problem.target.gradient.values()]

    def iteration() -> torch.Tensor:
        inputs = problem.inputs.clone().requires_grad_()
        model.zero_grad()
        loss = F.cross_entropy(model(inputs), problem.labels)
        gradient = torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
        _cosine_distance(gradient, goal).backward()
        assert inputs.grad is not None
        return inputs.grad

    return iteration


def _cosine_distance(
    gradient: Sequence[torch.Tensor], goal: Sequence[torch.Tensor]
) -> torch.Tensor:
    dot = torch.stack([(g * t).sum() for g, t in zip(gradient, goal, strict=True)]).sum()
    lengths = [torch.stack([x.pow(2).sum() for x in xs]).sum().sqrt() for xs in (gradient, goal)]
    return 1 - dot / (lengths[0] * lengths[1])


def analytic_seed(problem: Problem, dtype: torch.dtype = torch.float32) -> Iteration:
    """R2: double backward whose seed dD/dg is written down, without a graph on the loss.

    Args:
        problem: The target and the inputs to evaluate the loss at.
        dtype: float64 makes it the reference of the accuracy column.
    """
    device = problem.inputs.device
    model = problem.target.build_model().to(device, dtype).requires_grad_(False)
    parameters = [p.requires_grad_() for p in model.parameters()]
    goal = [g.to(device, dtype) for g in problem.target.gradient.values()]

    def iteration() -> torch.Tensor:
        inputs = problem.inputs.to(dtype).clone().requires_grad_()
        loss = F.cross_entropy(model(inputs), problem.labels)
        gradient = torch.autograd.grad(loss, parameters, create_graph=True)
        seed = _cosine_seed([g.detach() for g in gradient], goal)
        pairs = [(g, s) for g, s in zip(gradient, seed, strict=True) if g.requires_grad]
        outputs, seeds = zip(*pairs, strict=True)
        return torch.autograd.grad(outputs, inputs, seeds)[0]

    return iteration


def _cosine_seed(gradient: list[torch.Tensor], goal: list[torch.Tensor]) -> list[torch.Tensor]:
    dot = sum((g * t).sum() for g, t in zip(gradient, goal, strict=True))
    gg = sum(g.pow(2).sum() for g in gradient)
    tt = sum(t.pow(2).sum() for t in goal)
    length = torch.as_tensor(gg * tt).sqrt()
    return [(dot / gg * g - t) / length for g, t in zip(gradient, goal, strict=True)]


def ours(problem: Problem, hvp: str = "auto") -> Iteration:
    """This project's gradient matching."""
    matcher = GradientMatcher(Replica(problem.target, problem.inputs.device), Cosine(), hvp)
    return lambda: matcher(problem.inputs, problem.labels).input_gradient


def ours_in_pieces(problem: Problem, at_once: int, hvp: str = "auto") -> Iteration:
    """The same with so many images of the batch in one pass."""
    replica = Replica(problem.target, problem.inputs.device)
    matcher = PieceMatcher(replica, Cosine(), hvp, at_once)
    return lambda: matcher(problem.inputs, problem.labels).input_gradient


def our_loop(
    problem: Problem, restarts: int = 1, at_once: int = 1, trace: bool = False
) -> Iteration:
    """One iteration of this project's Inverting Gradients: matching, TV, signed Adam, box.

    Args:
        problem: The target and the inputs that the loop starts from.
        restarts: Restarts that advance together.
        at_once: How many of them one call evaluates; 0: as the program chooses.
        trace: Passes as plain lists of operators (`--trace`).
    """
    inversion = _inversion(problem, restarts=restarts, restarts_at_once=at_once, trace=trace)

    def iteration() -> torch.Tensor:
        inversion._iterate(inversion.progress.iteration)
        inversion.progress.iteration += 1
        return inversion.restarts[0].variable.detach()

    return iteration


def our_traced_loop(problem: Problem) -> Iteration:
    """`our_loop` under `--trace`."""
    return our_loop(problem, trace=True)


def targets_in_turn(problems: Sequence[Problem]) -> Iteration:
    """One iteration of Inverting Gradients on each of several targets of one model."""
    loops = [our_loop(problem) for problem in problems]
    return lambda: torch.cat([loop() for loop in loops])


def targets_at_once(problems: Sequence[Problem]) -> Iteration:
    """The same for all targets in one call."""
    many = ManyInversions([_inversion(problem) for problem in problems])

    def iteration() -> torch.Tensor:
        many._iterate(10)
        return torch.cat([one.restarts[0].variable.detach() for one in many.inversions])

    return iteration


def our_attack(problem: Problem, iterations: int, restarts: int, halving: bool) -> Iteration:
    """A whole attack of so many iterations by this project's Inverting Gradients.

    Args:
        problem: The target and the inputs that the loop starts from.
        iterations: Number of iterations of each restart that is not dropped.
        restarts: Number of restarts at the beginning.
        halving: Drop the worse half of them three times.
    """
    options = {"iterations": iterations, "restarts": restarts, "halving": halving}
    return lambda: _inversion(problem, **options).run().images


def _inversion(problem: Problem, **options: Any) -> Inversion:
    config = InvertingGradients.published.changed(**options)
    return Inversion(problem.target, problem.labels, config, device=problem.inputs.device)


def breaching_loop(problem: Problem) -> Iteration:
    """One iteration of the attacker of `breaching` (MIT) with its published setting.

    https://github.com/JonasGeiping/breaching, attack `invertinggradients`: cosine, TV,
    signed Adam, box.

    Raises:
        InputError: The package is not installed.
    """
    try:
        import breaching
    except ImportError:
        raise InputError("the comparison needs `pip install breaching`") from None
    config = breaching.get_attack_config("invertinggradients")
    model = problem.target.build_model()
    payload, shared = as_breaching(problem.target, model, problem.labels.clone())
    attacker: Any = breaching.attacks.prepare_attack(
        model, torch.nn.CrossEntropyLoss(), config, {"device": CPU, "dtype": torch.float}
    )
    models, labels, _ = attacker.prepare_attack([payload], [shared])
    for regularizer in attacker.regularizers:
        regularizer.initialize(models, [shared], labels)
    attacker.objective.initialize(attacker.loss_fn, config.impl, None)
    candidate = attacker._initialize_data(list(problem.inputs.shape))
    optimizer, scheduler = attacker._init_optimizer([candidate])

    def iteration() -> torch.Tensor:
        step = attacker._compute_objective(candidate, labels, models, optimizer, [shared], 0)
        optimizer.step(step)
        scheduler.step()
        with torch.no_grad():
            low, high = -attacker.dm / attacker.ds, (1 - attacker.dm) / attacker.ds
            candidate.data = torch.max(torch.min(candidate, high), low)
        return candidate.detach()

    return iteration


def as_breaching(
    target: Target, model: nn.Module, labels: torch.Tensor
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the server of `breaching` sends and its user shares.

    Args:
        target: What the client shared.
        model: The target's.
        labels: N class indices.
    """
    metadata = SimpleNamespace(
        shape=list(target.data.shape),
        mean=target.data.mean,
        std=target.data.std,
        classes=target.data.n_classes,
        modality="vision",
    )
    buffers = list(model.buffers())
    payload = {
        "parameters": list(model.parameters()),
        # In train mode it takes batch statistics, which is what no buffers mean to it.
        "buffers": None if target.train_mode else buffers,
        "metadata": metadata,
    }
    shared = {
        "gradients": list(target.gradient.values()),
        "buffers": buffers if target.train_mode else None,
        "metadata": {
            "num_data_points": target.batch_size,
            "labels": labels,
            "local_hyperparams": None,
        },
    }
    return payload, shared
