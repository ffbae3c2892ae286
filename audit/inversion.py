"""From a site's update to its training images.

The loop (restarts, optimizer, schedule, box, divergences) is that of `attack.loop.inversion`.
What differs is what a candidate is compared by: a federation's client sends its running
BatchNorm statistics along with its weights, its batches are those of a data loader, and a
radiograph is one grey value per pixel. `UpdateInversion` replaces these parts.

Who attacks is the site itself, before its update leaves: it knows its own local training.
What a server would have to guess is granted and listed in every result (`granted`): the
number of images, the local hyper-parameters, and over several local epochs which images
shared which steps. No hypotheses about the order are searched, so that what is measured is
the leakage to an attacker who has it right: an upper bound for one who has not.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from attack.attacks import OptimizationAttack, get_attack
from attack.knowledge.labels import recover_labels
from attack.loop.inversion import Inversion
from attack.loop.problem import InversionProblem
from attack.loop.restarts import Starter
from attack.matching.matcher import GradientMatcher, Match, Penalty
from attack.matching.objectives import OBJECTIVES, Objective
from attack.matching.smooth_relu import width_at
from attack.matching.switches import TwiceDifferentiable
from attack.priors.coordinates import Coordinates
from attack.priors.public_images import PRINCIPAL_STEP, Grey, Principal, PriorDistance
from attack.settings import InversionConfig
from audit.local_simulation import LocalSimulation
from audit.published import PublishedAttack
from audit.settings import InversionSettings, load_inversion_settings
from audit.updates import LocalUpdate, target_from_update
from core.errors import InputError
from core.target import BatchStatistics, Target

__all__ = [
    "InversionSettings",
    "LocalUpdate",
    "UpdateInversion",
    "UpdateReconstruction",
    "invert_update",
    "load_inversion_settings",
    "target_from_update",
]


@dataclass
class UpdateReconstruction:
    """What an inversion of one update recovered.

    Attributes:
        images: N x C x H x W in [0, 1], on the CPU; one per image of the site.
        labels: N class indices.
        losses: "gradient" (objective of the update) and "bn" (distance of BatchNorm
            statistics) of these images, as far as the method has them.
        seconds: Wall-clock time.
        method: As in the settings.
        iterations: Done.
        labels_from: Where the labels come from: the rule, or "joint".
        bn_statistics: Whether BatchNorm statistics were matched.
        granted: What the attacker was told that a server does not see.
        status: "finished", or why the attack ended early.
        trace: One dictionary per printed iteration.
        settings: The settings as plain values.
    """

    images: torch.Tensor
    labels: torch.Tensor
    losses: dict[str, float]
    seconds: float
    method: str
    iterations: int
    labels_from: str
    bn_statistics: bool
    granted: list[str] = field(default_factory=list)
    status: str = "finished"
    trace: list[dict[str, float]] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)


def invert_update(
    update: LocalUpdate,
    settings: InversionSettings,
    *,
    prior: torch.Tensor | None = None,
    public: torch.Tensor | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
    progress: bool = False,
) -> UpdateReconstruction:
    """Reconstruct the images behind an update.

    Args:
        update: What the site sent, and what is known of its training.
        settings: Method and hyper-parameters.
        prior: 3 x H x W in [0, 1] to start from, such as the mean of public images.
        public: P x 3 x H x W in [0, 1], images of other people, for methods full and bn: how
            people differ. Without a prior their mean is the prior.
        seed: Of every random number.
        device: Where to compute.
        progress: Show a bar.

    Raises:
        InputError: Settings or update that cannot be used.
    """
    settings.validate()
    device = torch.device(device)
    if prior is None and public is not None and len(public):
        prior = public.mean(0)
    if prior is not None and tuple(prior.shape) != tuple(update.data.shape):
        raise InputError(
            f"the prior image has shape {tuple(prior.shape)}, the site's {update.data.shape}"
        )
    if settings.start == "prior" and prior is None:
        raise InputError("start 'prior' needs a prior image; give one, or choose grey or random")
    started = time.perf_counter()
    if settings.method == "published":
        result = _run_published(update, settings, prior, seed, device, progress)
    elif settings.method in ("full", "bn"):
        result = _run_own(update, settings, prior, public, seed, device, progress)
    else:
        result = _run_registered(update, settings, prior, seed, device, progress)
    result.seconds = time.perf_counter() - started
    result.settings = settings.to_dict()
    result.granted = granted_to_the_auditor(update)
    return result


def granted_to_the_auditor(update: LocalUpdate) -> list[str]:
    """What an inversion is told of the local training, in words for a site's report."""
    granted = ["number of images, batch size and local epochs", "learning rate"]
    if update.momentum or update.weight_decay or update.proximal:
        granted.append("momentum, weight decay and proximal term")
    if update.order_granted:
        granted.append("which images shared which local steps")
    return granted


# --- Methods full and bn ----------------------------------------------------------


class UpdateMatcher(GradientMatcher):
    """The distance of a simulated update from the site's, and its gradient in the images.

    `GradientMatcher` knows neither running statistics nor a loader's batches, and its
    BatchNorm penalty compares every forward pass with the same statistics; here the steps
    of the local training are compared with what all of them leave behind.

    Args:
        inversion: Target, device and objective.
        simulation: The site's training.
        settings: Factors of the two terms.
    """

    def __init__(
        self,
        inversion: Inversion,
        objective: Objective,
        simulation: LocalSimulation,
        settings: InversionSettings,
    ) -> None:
        super().__init__(inversion.replica, objective, "exact")
        self.simulation = simulation
        self.moves = settings.method == "full" and settings.gradient_weight > 0
        self.gradient_weight = settings.gradient_weight if self.moves else 0.0
        change = simulation.update.running_change if settings.bn_weight > 0 else None
        self.known = None if change is None else _moved(change, inversion.device, inversion.dtype)
        self.bn_weight = settings.bn_weight
        if self.known is None and not self.moves:
            raise InputError("method bn: the update holds no BatchNorm statistics to match")
        self.terms: dict[str, float] = {}

    def __call__(
        self,
        inputs: torch.Tensor,
        labels: torch.Tensor,
        *,
        weight: float = 1.0,
        penalty: Callable[[torch.nn.Module], Penalty] | None = None,
        apart: bool = False,
    ) -> Match:
        """See `GradientMatcher`; `weight` and `penalty` are this class's own business."""
        joint = labels.is_floating_point()
        variables = [t.detach().requires_grad_() for t in ([inputs, labels] if joint else [inputs])]
        with sdpa_kernel(SDPBackend.MATH), TwiceDifferentiable():
            outputs, cotangents, value = self._forward(
                variables[0], variables[1].softmax(-1) if joint else labels
            )
        pairs = [(o, c) for o, c in zip(outputs, cotangents, strict=True) if o.requires_grad]
        found = torch.autograd.grad(
            [o for o, _ in pairs], variables, [c for _, c in pairs], allow_unused=True
        )
        dense = [
            torch.zeros_like(v) if g is None else g for g, v in zip(found, variables, strict=True)
        ]
        return Match(value, dense[0], dense[1] if joint else None)

    def _forward(
        self, inputs: torch.Tensor, labels: torch.Tensor
    ) -> tuple[list[torch.Tensor], list[torch.Tensor], torch.Tensor]:
        """What to differentiate, with which cotangents, and the weighted loss."""
        outputs: list[torch.Tensor] = []
        cotangents: list[torch.Tensor] = []
        value = torch.zeros((), dtype=torch.float64, device=inputs.device)
        self.terms = {}
        if self.moves:
            simulated = self.simulation(inputs, labels)
            statistics = simulated.statistics
            detached = [g.detach() for g in simulated.gradient]
            distance, seed = self.objective.value_and_seed(detached, self.replica.target_gradient)
            outputs += simulated.gradient
            cotangents += torch._foreach_mul(seed, self.gradient_weight)
            value = value + self.gradient_weight * distance
            self.terms["gradient"] = float(distance)
        else:
            statistics = self.simulation.statistics(inputs)
        if self.known is not None:
            distance = statistics_distance(statistics, self.known)
            outputs.append(self.bn_weight * distance)
            cotangents.append(torch.ones_like(distance))
            value = value + self.bn_weight * distance.detach().double()
            self.terms["bn"] = float(distance.detach())
        return outputs, cotangents, value


def statistics_distance(found: BatchStatistics, known: BatchStatistics) -> torch.Tensor:
    """Sum over layers of the Euclidean distances of means and of variances.

    Source: DeepInversion (Yin et al. 2020), eq. 4, https://arxiv.org/abs/1912.08795.
    """
    terms = []
    for name, (mean, variance) in known.items():
        terms += [_norm(found[name][0] - mean), _norm(found[name][1] - variance)]
    return torch.stack(terms).sum()


def _norm(x: torch.Tensor) -> torch.Tensor:
    """Euclidean norm with a finite slope at 0."""
    return (x.square().sum() + torch.finfo(x.dtype).tiny).sqrt()


def _moved(known: BatchStatistics, device: torch.device, dtype: torch.dtype) -> BatchStatistics:
    return {k: (m.to(device, dtype), v.to(device, dtype)) for k, (m, v) in known.items()}


class NoisyStarter(Starter):
    """Starts with a little noise of each restart's own.

    Args:
        problem: What is inverted.
        seed: See `Starter`.
        prior: See `Starter`.
        noise: Its standard deviation.
    """

    def __init__(
        self, problem: InversionProblem, seed: int, prior: torch.Tensor | None, noise: float
    ) -> None:
        super().__init__(problem, seed, prior)
        self.noise = noise

    def first_inputs(self, generator: torch.Generator) -> torch.Tensor:
        """See `Starter`."""
        inputs = super().first_inputs(generator)
        return inputs + self.noise * torch.randn(inputs[:, :1].shape, generator=generator)


class UpdateInversion(Inversion):
    """`attack.loop.inversion.Inversion` on a federation's update.

    Args:
        update: What the site sent.
        labels: N class indices.
        settings: Method "full" or "bn".
        config: The same for the engine's loop.
        start: N x C x H x W in [0, 1].
        public: P x C x H x W in [0, 1], images of other people; None for none.
        seed: Of every random number.
        device: Where to compute.
    """

    matcher: UpdateMatcher

    def __init__(
        self,
        update: LocalUpdate,
        labels: torch.Tensor,
        settings: InversionSettings,
        config: InversionConfig,
        *,
        start: torch.Tensor,
        public: torch.Tensor | None = None,
        seed: int = 0,
        device: torch.device,
    ) -> None:
        self.update, self.settings, self.public = update, settings, public
        super().__init__(
            _loose_target(update), labels, config, device=device, seed=seed, prior=start
        )
        # One image is determined by its update; the pull would only keep it from there.
        if settings.prior_weight > 0 and settings.start == "prior" and update.n_images > 1:
            prior = update.data.normalize(start).to(device, self.dtype)
            unit = PRINCIPAL_STEP if isinstance(self.coordinates, Principal) else 1.0
            distance = PriorDistance(self.coordinates, prior, unit)
            self.evaluation.regularizers.append((settings.prior_weight, distance))

    def _make_matcher(self) -> UpdateMatcher:
        simulation = LocalSimulation(self.update, self.device, self.dtype)
        return UpdateMatcher(self, OBJECTIVES[self.settings.objective](), simulation, self.settings)

    def _make_coordinates(self) -> Coordinates:
        kind = self.settings.coordinates
        if kind == "channels":
            return super()._make_coordinates()
        enough = self.public is not None and len(self.public) > 1
        # A single image is matched to the pixel anyway; the public images would hold it back.
        if kind == "principal" or (kind == "auto" and enough and self.update.n_images > 1):
            if self.public is None or not enough:
                raise InputError("coordinates principal: give at least two public images")
            return Principal(self.update.data, self.public.to(self.device, self.dtype))
        return Grey(self.update.data)

    def _iterate(self, iteration: int) -> None:
        settings = self.settings
        progress = iteration / max(1, self.config.optimiser.iterations - 1)
        width = width_at(progress, settings.smoothing, settings.smoothing_end)
        self.matcher.simulation.width = width
        super()._iterate(iteration)

    def _make_starter(self, seed: int, prior: torch.Tensor | None) -> Starter:
        return NoisyStarter(self.problem, seed, prior, self.settings.start_noise)


def _loose_target(update: LocalUpdate) -> Target:
    """The update as the engine's loop wants it; the matching does not look at its batches."""
    return Target(
        model=update.model,
        data=update.data,
        state_dict=dict(update.global_weights),
        gradient=update.gradient,
        train_mode=True,
        batch_size=update.n_images,
    )


def _engine_config(settings: InversionSettings, joint: bool) -> InversionConfig:
    return InversionConfig(
        objective=settings.objective,
        iterations=settings.iterations,
        lr=settings.learning_rate,
        warmup=settings.warmup,
        signed=False,
        tv=settings.tv_weight,
        restarts=settings.restarts,
        restarts_at_once=1,
        joint_labels=joint,
        hvp="exact",
        # Losses of differently softened networks cannot be compared.
        smallest_loss=settings.smoothing == 0,
    )


def _run_own(
    update: LocalUpdate,
    settings: InversionSettings,
    prior: torch.Tensor | None,
    public: torch.Tensor | None,
    seed: int,
    device: torch.device,
    progress: bool,
) -> UpdateReconstruction:
    labels, source = _labels(update, settings)
    config = _engine_config(settings, source == "joint")
    inversion = UpdateInversion(
        update,
        labels,
        settings,
        config,
        start=_start(update, settings, prior, seed),
        public=public,
        seed=seed,
        device=device,
    )
    found = inversion.run(progress=progress)
    return UpdateReconstruction(
        images=found.images,
        labels=found.labels,
        losses=_final_losses(inversion, found.images, found.labels),
        seconds=found.seconds,
        method=settings.method,
        iterations=found.iterations,
        labels_from=source,
        bn_statistics=inversion.matcher.known is not None,
        status=found.status,
        trace=found.trace,
    )


def _final_losses(
    inversion: UpdateInversion, images: torch.Tensor, labels: torch.Tensor
) -> dict[str, float]:
    inputs = inversion.update.data.normalize(images).to(inversion.device, inversion.dtype)
    inversion.matcher.simulation.width = 0.0
    inversion.matcher(inputs, labels.to(inversion.device))
    return dict(inversion.matcher.terms)


def _start(
    update: LocalUpdate, settings: InversionSettings, prior: torch.Tensor | None, seed: int
) -> torch.Tensor:
    """N x C x H x W in [0, 1]."""
    shape = (update.n_images, *update.data.shape)
    if settings.start == "prior":
        assert prior is not None
        return prior.expand(shape).clone()
    if settings.start == "random":
        return torch.rand(shape, generator=torch.Generator().manual_seed(seed))
    return update.data.denormalize(torch.zeros(shape))


def _labels(update: LocalUpdate, settings: InversionSettings) -> tuple[torch.Tensor, str]:
    """Labels recovered from the update, and by which rule; or "joint" to optimise them.

    With several local steps the counts of each step are unknown, so labels are optimised;
    so they are where the update is too noisy for any to be recovered.
    """
    target = _loose_target(update)
    rule = "idlg" if update.n_images == 1 else "ilrg-robust"
    joint = torch.zeros(update.n_images, dtype=torch.long), "joint"
    if settings.labels == "joint" or (
        settings.labels == "auto" and update.n_images > 1 and len(update.steps) > 1
    ):
        return joint
    try:
        return recover_labels(rule, target), rule
    except InputError:
        if settings.labels == "recovered":
            raise
        return joint


# --- The other methods ------------------------------------------------------------


def _run_published(
    update: LocalUpdate,
    settings: InversionSettings,
    prior: torch.Tensor | None,
    seed: int,
    device: torch.device,
    progress: bool,
) -> UpdateReconstruction:
    start = _start(update, settings, prior, seed)[0]
    attack = PublishedAttack(update, settings, prior=start, seed=seed, device=device)
    found = attack.run(progress)
    return UpdateReconstruction(
        images=found.images,
        labels=found.labels,
        losses=found.losses,
        seconds=0.0,
        method=settings.method,
        iterations=settings.iterations,
        labels_from="joint",
        bn_statistics=bool(attack.known),
        trace=found.trace,
    )


def _run_registered(
    update: LocalUpdate,
    settings: InversionSettings,
    prior: torch.Tensor | None,
    seed: int,
    device: torch.device,
    progress: bool,
) -> UpdateReconstruction:
    """An attack of stage 3 with its published setting, for the settings' iterations."""
    target = target_from_update(update)
    attack = get_attack(settings.method)()
    options: dict[str, Any] = {}
    if isinstance(attack, OptimizationAttack):
        attack.config = attack.config.changed(iterations=settings.iterations)
        if settings.start == "prior":
            options["prior"] = _start(update, settings, prior, seed)
    labels, source = _labels(update, dataclasses.replace(settings, labels="recovered"))
    found = attack.reconstruct(
        target, labels=labels, device=device, seed=seed, progress=progress, **options
    )
    return UpdateReconstruction(
        images=found.images,
        labels=found.labels,
        losses={"gradient": found.objective},
        seconds=found.seconds,
        method=settings.method,
        iterations=found.iterations,
        labels_from=source,
        bn_statistics=False,
        status=found.status,
        trace=found.trace,
    )
