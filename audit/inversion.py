"""From a site's update to its training images.

The update becomes a `core.target.Target` with the site's batches and running statistics
(`audit.updates`), and the loop that inverts it is that of every attack
(`attack.loop.inversion`). Three of its parts are others here (`UpdateParts`): running
BatchNorm statistics count as much as weights (`audit.update_matcher`), a radiograph is one
grey value per pixel, and starts begin at a public prior image.

Who attacks is the site itself, before its update leaves: it knows its own local training.
What a server would have to guess is granted and listed in every result (`granted`): the
number of images, the local hyper-parameters, and over several local epochs which images
shared which steps. No hypotheses about the order are searched, so that what is measured is
the leakage to an attacker who has it right: an upper bound for one who has not.
"""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from attack.attacks import OptimizationAttack, get_attack
from attack.knowledge.labels import DEFAULT_RULE, broken_assumption, recover_labels
from attack.loop.inversion import Inversion
from attack.loop.loss_terms import make_objective, make_regularizers
from attack.loop.parts import Parts, make_variables
from attack.loop.problem import InversionProblem
from attack.loop.restarts import Starter
from attack.priors.coordinates import Coordinates
from attack.priors.public_images import PRINCIPAL_STEP, Grey, Principal, PriorDistance
from attack.priors.regularizers import ModelPenalty, Regularizer
from attack.priors.shared_statistics import average_statistics
from attack.settings import InversionConfig
from audit.published import PublishedAttack
from audit.settings import InversionSettings, load_inversion_settings
from audit.update_matcher import AverageStatistics, UpdateMatcher
from audit.updates import LocalUpdate, numbered_by_place, target_from_update
from core.client import outputs_of
from core.data.specs import DataSpec
from core.errors import InputError
from core.local_training import SGD, LocalTraining
from core.losses import Targets, is_default
from core.target import Target

__all__ = [
    "InversionSettings",
    "LocalUpdate",
    "UpdateParts",
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
        labels: N class indices, or what else the client's loss compares with.
        losses: "gradient" (objective of the update) and "bn" (distance of BatchNorm
            statistics) of these images, as far as the method has them.
        seconds: Wall-clock time.
        method: Name of the method, as in the settings.
        iterations: Number of finished iterations.
        labels_from: Where the labels come from: the rule, or "joint".
        bn_statistics: Whether BatchNorm statistics were matched.
        granted: What the attacker was told although a server does not see it.
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
        seed: Seed of every random number of the attack.
        device: Device that runs the computation.
        progress: Show a bar.

    Raises:
        InputError: Settings or update that cannot be used.
    """
    settings.validate()
    device = torch.device(device)
    if settings.coordinates == "auto" and update.colour and update.data.shape[0] > 1:
        settings = dataclasses.replace(settings, coordinates="channels")
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
        _check_published(update)
        result = _run_published(update, settings, prior, seed, device, progress)
    elif settings.method in ("full", "bn"):
        target = target_from_update(update)
        result = _run_own(target, settings, prior, public, seed, device, progress)
    else:
        target = numbered_by_place(target_from_update(update))
        result = _run_registered(target, settings, prior, seed, device, progress)
    result.seconds = time.perf_counter() - started
    result.settings = settings.to_dict()
    result.granted = granted_to_the_auditor(update)
    return result


def _check_published(update: LocalUpdate) -> None:
    """Refuse clients that the published attack was not made for."""
    size = update.data.shape[1:]
    if _is_other(update) or not is_default(update.loss) or len(size) != 2:
        raise InputError(
            "method published: is for images, plain SGD and cross-entropy; choose full, bn or an "
            "attack of stage 3"
        )


def _is_other(update: LocalUpdate) -> bool:
    """Whether the local training is something else than the SGD that an update states."""
    return update.optimiser is not None and update.optimiser != LocalTraining()


def granted_to_the_auditor(update: LocalUpdate) -> list[str]:
    """What an inversion is told of the local training, in words for a site's report."""
    granted = ["number of images, batch size and local epochs", "learning rate"]
    if update.momentum or update.weight_decay or update.proximal:
        granted.append("momentum, weight decay and proximal term")
    if update.optimiser is not None and _is_other(update):
        granted.append(f"the optimiser ({update.optimiser.word})")
    if not is_default(update.loss):
        granted.append(f"the loss ({update.loss.name})")
    if update.order_granted:
        granted.append("which images shared which local steps")
    return granted


# --- Methods full and bn ----------------------------------------------------------


@dataclass(frozen=True)
class UpdateParts:
    """What an update's inversion is made of, beside the loop of `attack.loop.inversion`.

    Attributes:
        settings: Method and hyper-parameters.
        start: N x C x H x W in [0, 1].
        public: P x C x H x W in [0, 1], images of other people; None for none.
    """

    settings: InversionSettings
    start: torch.Tensor
    public: torch.Tensor | None = None

    def parts(self) -> Parts:
        """For `Inversion`."""
        return Parts(
            coordinates=self.coordinates,
            matcher=self.matcher,
            penalties=self.penalties,
            regularizers=self.regularizers,
            starter=partial(Starter, noise=self.settings.start_noise),
        )

    def coordinates(
        self, target: Target, config: InversionConfig, device: torch.device, dtype: torch.dtype
    ) -> Coordinates:
        """The variables that the settings name."""
        kind, public = self.settings.coordinates, self.public
        if kind == "channels":
            return make_variables(target, config, device, dtype)
        enough = public is not None and len(public) > 1
        # A single image is matched to the pixel anyway; the public images would hold it back.
        if kind == "principal" or (kind == "auto" and enough and target.batch_size > 1):
            if public is None or not enough:
                raise InputError("coordinates principal: give at least two public images")
            return Principal(target.data, public.to(device, dtype))
        return Grey(target.data)

    def matcher(self, problem: InversionProblem) -> UpdateMatcher:
        """The comparison of updates."""
        objective = make_objective(problem.config, len(problem.target.gradient))
        settings = self.settings
        return UpdateMatcher(problem.replica, objective, settings.smoothing, settings.smoothing_end)

    def penalties(self, problem: InversionProblem) -> list[tuple[float, ModelPenalty]]:
        """The distance of BatchNorm statistics, where the update holds any."""
        if problem.config.priors.bn == 0:
            return []
        return [(problem.config.priors.bn, known_statistics(problem))]

    def regularizers(self, problem: InversionProblem) -> list[tuple[float, Regularizer]]:
        """Those of the configuration, and the distance from the prior image."""
        settings, configured = self.settings, make_regularizers(problem)
        # One image is determined by its update; the pull would only keep it from there.
        if settings.prior_weight == 0 or settings.start != "prior" or problem.shape[0] == 1:
            return configured
        coordinates = problem.coordinates
        prior = problem.target.data.normalize(self.start).to(problem.device, problem.dtype)
        unit = PRINCIPAL_STEP if isinstance(coordinates, Principal) else 1.0
        return [*configured, (settings.prior_weight, PriorDistance(coordinates, prior, unit))]


def known_statistics(problem: InversionProblem) -> AverageStatistics:
    """What the running statistics of the update say of its batches, as a penalty."""
    momentum = problem.target.local.bn_momentum
    assert momentum is not None
    known = {
        name: (mean.to(problem.device, problem.dtype), variance.to(problem.device, problem.dtype))
        for name, (mean, variance) in average_statistics(problem.target).items()
    }
    return AverageStatistics(known, momentum)


def _run_own(
    target: Target,
    settings: InversionSettings,
    prior: torch.Tensor | None,
    public: torch.Tensor | None,
    seed: int,
    device: torch.device,
    progress: bool,
) -> UpdateReconstruction:
    labels, source = _labels(target, settings)
    statistics = target.running_after is not None and settings.bn_weight > 0
    config = settings.config(statistics=statistics, joint_labels=source == "joint")
    start = _start(target.data, target.batch_size, settings, prior, seed)
    parts = UpdateParts(settings, start, public).parts()
    inversion = Inversion(
        target, labels, config, device=device, seed=seed, prior=start, parts=parts
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
        bn_statistics=statistics,
        status=found.status,
        trace=found.trace,
    )


def _final_losses(
    inversion: Inversion, images: torch.Tensor, labels: torch.Tensor
) -> dict[str, float]:
    """The distances at the end, without their factors, through the network as it is."""
    problem, matcher = inversion.problem, inversion.matcher.exact()
    # What was found are targets, no variables that stand for some.
    problem.replica.joint = False
    inputs = problem.target.data.normalize(images).to(problem.device, problem.dtype)
    labels, weight = labels.to(problem.device), problem.config.matching.gradient_weight
    losses = {}
    if weight > 0:
        losses["gradient"] = float(matcher.value(inputs, labels))
    if problem.config.priors.bn > 0:
        match = matcher(inputs, labels, weight=weight, penalty=known_statistics(problem))
        assert match.penalty is not None
        losses["bn"] = float(match.penalty)
    return losses


def _start(
    data: DataSpec, n: int, settings: InversionSettings, prior: torch.Tensor | None, seed: int
) -> torch.Tensor:
    """n x C x H x W in [0, 1]."""
    shape = (n, *data.shape)
    if settings.start == "prior":
        assert prior is not None
        return prior.expand(shape).clone()
    if settings.start == "random":
        return torch.rand(shape, generator=torch.Generator().manual_seed(seed))
    return data.denormalize(torch.zeros(shape))


def _rule_for(target: Target) -> str:
    """A published rule where it is exact: row sums of one image bear more noise than its bias."""
    if target.batch_size > 1:
        return "ilrg-robust"
    return "idlg" if broken_assumption("idlg", target) is None else DEFAULT_RULE


def _labels(target: Target, settings: InversionSettings) -> tuple[torch.Tensor, str]:
    """Labels recovered from the update, and by which rule; or "joint" to optimise them.

    With several local steps the counts of each step are unknown, so labels are optimised;
    so they are where the update is too noisy for any to be recovered, and where a batch's
    targets are no classes: what is recovered of those belongs to no sample.
    """
    joint = torch.zeros(target.batch_size, dtype=torch.long), "joint"
    if settings.labels == "joint" or (settings.labels == "auto" and _hides_labels(target)):
        return joint
    try:
        if target.loss.targets is not Targets.CLASSES:
            return _other_targets(target), DEFAULT_RULE
        rule = _rule_for(target)
        return recover_labels(rule, target), rule
    except InputError:
        if settings.labels == "recovered":
            raise
        return joint


def _hides_labels(target: Target) -> bool:
    """Whether no rule reads every sample's label."""
    plain = target.local.steps == 1 and target.local.optimizer == SGD
    return target.batch_size > 1 and not (plain and target.loss.targets is Targets.CLASSES)


def _other_targets(target: Target) -> torch.Tensor:
    """Recovered findings or values, in the shape that the loss takes."""
    model = target.build_model()
    outputs = outputs_of(model, target.data, torch.zeros(1, *target.data.shape))
    return target.loss.fitted(outputs, recover_labels(DEFAULT_RULE, target, model))


# --- The other methods ------------------------------------------------------------


def _run_published(
    update: LocalUpdate,
    settings: InversionSettings,
    prior: torch.Tensor | None,
    seed: int,
    device: torch.device,
    progress: bool,
) -> UpdateReconstruction:
    start = _start(update.data, update.n_images, settings, prior, seed)[0]
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
    target: Target,
    settings: InversionSettings,
    prior: torch.Tensor | None,
    seed: int,
    device: torch.device,
    progress: bool,
) -> UpdateReconstruction:
    """An attack of stage 3 with its published setting, for the settings' iterations."""
    attack = get_attack(settings.method)()
    options: dict[str, Any] = {}
    if isinstance(attack, OptimizationAttack):
        attack.config = settings.config_of(attack.config)
        if settings.start == "prior":
            options["prior"] = _start(target.data, target.batch_size, settings, prior, seed)
    labels, source = _labels(target, dataclasses.replace(settings, labels="recovered"))
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
