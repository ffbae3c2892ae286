"""Attacks that run for a number of iterations, ours and of `breaching`, watched on their way."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Protocol

import torch

from attack.attacks import OptimizationAttack, get_attack
from attack.metrics import evaluate
from benchmarks.speed.references import as_breaching
from core.errors import InputError
from core.target import Target, Truth

CPU = torch.device("cpu")
# How often the sample of timed iterations may double.
DOUBLINGS = 4
# Looks at the images on their way.
LOOKS = 20


class Course:
    """How good the images were on the way; what looking costs is not the attack's time.

    Args:
        truth: What they are compared with.

    Attributes:
        moments: Per look processor seconds since the beginning, mean PSNR and mean SSIM.
        looking: Processor seconds spent on looking.
    """

    def __init__(self, truth: Truth) -> None:
        self.truth = truth
        self.moments: list[tuple[float, float, float]] = []
        self.looking = 0.0
        self._begun = time.process_time()

    def look(self, images: torch.Tensor) -> None:
        """Compare N x C x H x W images in [0, 1] with the true ones."""
        now = time.process_time()
        found = evaluate(images, self.truth.labels, self.truth, metrics=("psnr", "ssim"))
        means = found.summary()
        psnr, ssim = (float(means[name]["mean"] or 0.0) for name in ("psnr", "ssim"))
        self.moments.append((now - self._begun - self.looking, psnr, ssim))
        self.looking += time.process_time() - now


class Run(Protocol):
    """Inverts with so many iterations; returns N x C x H x W in [0, 1]."""

    def __call__(self, iterations: int, course: Course | None = None) -> torch.Tensor:
        """Run from the beginning, and let the course look on the way."""


def inverter(name: str, target: Target, labels: torch.Tensor, seed: int) -> Run:
    """The attack of that name on this target.

    Args:
        name: Of an attack of ours, or `breaching:NAME`.
        target: What it sees.
        labels: N class indices, granted.
        seed: Of every run.

    Raises:
        InputError: There is none, it does not iterate, or `breaching` is not installed.
    """
    of_breaching = name.startswith("breaching:")
    return (_breaching if of_breaching else _ours)(name, target, labels, seed)


def affordable(run: Run, seconds: float, sample: int = 6) -> int:
    """Iterations that fit the time, by what twice as many of them take longer.

    On a busy machine a few iterations more may take no longer: the sample is doubled until
    the difference stands out.
    """
    run(2)  # Warm-up: allocations and kernel selection.
    short = _seconds(run, sample)
    long = _seconds(run, 2 * sample)
    for _ in range(DOUBLINGS):
        if long - short > short / 4 or long > seconds / 4:
            break
        sample *= 2
        short, long = long, _seconds(run, 2 * sample)
    # However the clock erred, an iteration costs a share of what all of them took.
    per_iteration = max((long - short) / sample, long / (8 * sample))
    overhead = max(0.0, short - per_iteration * sample)
    return max(1, int((seconds - overhead) / per_iteration))


def _seconds(run: Run, iterations: int) -> float:
    begun = time.process_time()
    run(iterations)
    return time.process_time() - begun


def _ours(name: str, target: Target, labels: torch.Tensor, seed: int) -> Run:
    attack = get_attack(name)
    if not issubclass(attack, OptimizationAttack):
        raise InputError(f"--attacks {name}: does not iterate")

    def run(iterations: int, course: Course | None = None) -> torch.Tensor:
        config = attack.published.changed(iterations=iterations)
        watched: dict[str, Any] = {}
        if course is not None:
            watched = {
                "on_snapshot": lambda _, images: course.look(images),
                "snapshot_every": max(1, iterations // LOOKS),
            }
        result = attack(config).reconstruct(target, labels=labels, device=CPU, seed=seed, **watched)
        return result.images

    return run


def _breaching(name: str, target: Target, labels: torch.Tensor, seed: int) -> Run:
    """An attack of the package `breaching` (MIT), https://github.com/JonasGeiping/breaching."""
    try:
        import breaching
    except ImportError:
        raise InputError(f"--attacks {name}: needs `pip install breaching`") from None
    model = target.build_model()
    payload, shared = as_breaching(target, model, labels.sort().values)
    config = breaching.get_attack_config(name.partition(":")[2])

    def image(candidate: torch.Tensor) -> torch.Tensor:
        return target.data.denormalize(candidate.detach()).clamp(0, 1)

    def run(iterations: int, course: Course | None = None) -> torch.Tensor:
        torch.manual_seed(seed)
        config.optim.max_iterations = iterations
        config.optim.callback = iterations + 1
        setup = {"device": CPU, "dtype": torch.float}
        attacker = breaching.attacks.prepare_attack(
            model, torch.nn.CrossEntropyLoss(), config, setup
        )
        if course is not None:
            _watch(attacker, max(1, iterations // LOOKS), lambda c: course.look(image(c)))
        found, _ = attacker.reconstruct([payload], [shared], {}, dryrun=False)
        return image(found["data"])

    return run


def _watch(attacker: Any, every: int, look: Callable[[torch.Tensor], None]) -> None:
    """Show the candidate every so many iterations, of which each ends with its schedule's step."""
    begin = attacker._init_optimizer

    def watched(candidates: list[torch.Tensor]) -> tuple[Any, Any]:
        optimizer, scheduler = begin(candidates)
        step, steps = scheduler.step, 0

        def step_and_look() -> None:
            nonlocal steps
            step()
            steps += 1
            if steps % every == 0:
                look(candidates[0])

        scheduler.step = step_and_look
        return optimizer, scheduler

    attacker._init_optimizer = watched
