"""What attacks make of an update: closed forms where they apply, then inversion at its scales.

The attack that decides is chosen by how well its images explain the update, never by their
likeness to members, so that nothing is to be paid for the choice.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from attack.attacks import OptimizationAttack, attack_names, get_attack
from attack.knowledge.known_defenses import Adaptation
from attack.knowledge.label_search import arrangements, choose_labels, parts_of
from attack.knowledge.threat_models import Capability
from attack.loop.inversion import Inversion, label_trial
from attack.loop.parts import Parts
from attack.matching.matcher import GradientMatcher
from attack.matching.objectives import Cosine
from attack.matching.replica import Replica
from attack.priors.coordinates import Coordinates, Cosines
from attack.settings import ONE_STEP, UNROLL, InversionConfig, Value
from audit.references import at_scale
from core.errors import InputError, first_line
from core.losses import Targets
from core.target import Target

INVERSION, OF_TEXT = "spectral-3", "tag"
# An update that a closed form explains to this cosine distance needs no other attack.
EXACT = 1e-4
# Steps that are simulated one by one; of more, the update is matched as one step's gradient.
_UNROLLED = 8
# Relative step along the distance of BatchNorm statistics, as in `attack.attacks.ensemble`.
_STATISTICS = 0.5
# Iterations below which starts that race for them get too few each.
_RACED = 500
# Sides that volumes start at, and large pictures.
_VOLUME_SIDES, _PICTURE_SIDES = (16, 32), (64,)
# Ways to spread labels over local batches that are tried, and the share of iterations for each.
_ARRANGEMENTS, _TRIAL = 6, 0.05
_ONLY_MALICIOUS = frozenset({Capability.MALICIOUS_SERVER})
# What a site does not hand to whoever attacks it.
GRANTED = frozenset(Capability) - {Capability.PRIOR_DATA, *_ONLY_MALICIOUS}


@dataclass(frozen=True, eq=False)
class Attempt:
    """What one attack made of one update.

    Attributes:
        attack: Its registered name.
        images: M x C x ..., at the attack's scale; None where it did not run.
        iterations: Number of iterations that were done.
        seconds: Wall-clock time.
        loss: Cosine distance of the images' update and the one that was sent.
        objectives: Per image, see `unexplained`.
        note: Why it did not run.
        side: Of the coarsest grid that it resolves; None: the images' own.
    """

    attack: str
    images: torch.Tensor | None
    iterations: int = 0
    seconds: float = 0.0
    loss: float = math.inf
    objectives: tuple[float, ...] = ()
    note: str = ""
    side: int | None = None

    @property
    def weights(self) -> list[float]:
        """How right the attack thinks each image is."""
        found = [max(0.0, 1 - value) for value in self.objectives]
        return found if any(found) else [1.0] * len(found)


@dataclass(frozen=True)
class Plan:
    """Which attacks are run; the same for the site's update and for planted ones.

    Attributes:
        closed: Closed forms, by name.
        inversion: By name; None: none.
        iterations: Of the inversion, at each scale.
        seconds: Budget of each closed form.
        images: That an inversion reconstructs at most; of more behind an update each stands for
            several. 0: all.
        alone: Iterations for one image in one step; 0: as many.
        compared: Images of each kind that similarities are shown of at most; 0: all.
        restarts: Of each class representative.
        forecast: Seconds that an audit by it takes, without remedies; 0: not known.
    """

    closed: tuple[str, ...]
    inversion: str | None
    iterations: int
    seconds: float
    images: int = 0
    alone: int = 0
    compared: int = 0
    restarts: int = 4
    forecast: float = 0.0

    def only(self, attack: str) -> Plan:
        """The plan of one of its attacks alone."""
        if attack in self.closed:
            return dataclasses.replace(self, closed=(attack,), inversion=None)
        return dataclasses.replace(self, closed=())


def plan_of(
    attack: str | None, target: Target, iterations: int, seconds: float, *, images: int = 0,
    alone: int = 0, compared: int = 0, restarts: int = 4,
) -> Plan:  # fmt: skip
    """The attacks that a name stands for; None: those that the update allows. See `Plan`."""
    plan = Plan((), None, iterations, seconds, images, alone, compared, restarts)
    if attack is not None:
        optimises = issubclass(get_attack(attack), OptimizationAttack)
        closed = () if optimises else (attack,)
        return dataclasses.replace(plan, closed=closed, inversion=attack if optimises else None)
    is_text = bool(target.data.n_tokens)
    kinds = [get_attack(name) for name in attack_names()]
    # Attacks on text read labels with the tokens; of images those that do know no labels.
    closed_forms = tuple(
        kind.name
        for kind in kinds
        if kind.published is None and kind.reads_tokens == is_text
        and (is_text or not kind.recovers_labels)
        and kind.requires <= GRANTED and target.loss.targets in kind.fits
    )  # fmt: skip
    return dataclasses.replace(plan, closed=closed_forms, inversion=inversion_for(target))


def inversion_for(target: Target) -> str:
    """The inversion that an audit chooses."""
    return OF_TEXT if target.data.n_tokens else INVERSION


def attempts(
    plan: Plan, target: Target, labels: torch.Tensor, seed: int, device: torch.device
) -> Iterator[Attempt]:
    """Each attack of the plan in turn; none after a closed form that explains the update."""
    for name in plan.closed:
        found = _closed_form(name, plan, target, labels, seed, device)
        yield found
        if found.loss <= EXACT:
            return
    if plan.inversion is not None and target.data.n_tokens:
        yield _closed_form(plan.inversion, plan, target, labels, seed, device)
    elif plan.inversion is not None:
        yield from _inversions(plan, plan.inversion, target, labels, seed, device)


def best_of(found: list[Attempt]) -> Attempt | None:
    """The attempt that explains the update best; None where no attack ran."""
    made = [attempt for attempt in found if attempt.images is not None]
    return min(made, key=lambda attempt: attempt.loss, default=None)


# --- Closed forms ---------------------------------------------------------------------


def _closed_form(
    name: str, plan: Plan, target: Target, labels: torch.Tensor, seed: int, device: torch.device
) -> Attempt:
    given = {"time_budget": plan.seconds, "granted": GRANTED, "adaptive": False}
    if name == plan.inversion:
        given = {"iterations": plan.iterations}
    attack, began = get_attack(name).configured(given), time.perf_counter()
    # What a language model is trained to say is the text itself.
    told = None if target.loss.targets is Targets.TOKENS else labels
    try:
        found = attack.reconstruct(target, labels=told, device=device, seed=seed)  # type: ignore[arg-type]
    except InputError as error:
        return Attempt(name, None, note=_said(error))
    except (RuntimeError, ValueError, ArithmeticError, LookupError) as error:
        # One attack's weakness on an odd model must not hide what the others find.
        return Attempt(name, None, note=f"failed: {first_line(error)}")
    if not found.images.isfinite().all():
        return Attempt(name, None, note="failed: its images are not finite")
    seconds = time.perf_counter() - began
    made = Attempt(name, found.images, found.iterations, seconds)
    return _judged(made, target, found.images, found.labels, device)


def _said(error: InputError) -> str:
    """What an attack lacks, without the flag that would have led to it."""
    return first_line(error).removeprefix("--attack ")


# --- Inversion ------------------------------------------------------------------------


class Coarse(Coordinates):
    """The lowest frequencies of every axis: images that a coarse grid resolves.

    Args:
        cosines: Coordinates of the whole image.
        size: Lengths of its axes.
        side: Of the grid.
        device: Device of the images.
    """

    def __init__(
        self, cosines: Cosines, size: tuple[int, ...], side: int, device: torch.device
    ) -> None:
        self._cosines = cosines
        low = [torch.arange(n, device=device) < side for n in size]
        axes = torch.meshgrid(*low, indexing="ij")
        self._kept = torch.stack(list(axes)).all(0)

    def decode(self, coordinates: torch.Tensor) -> torch.Tensor:
        """See `Coordinates`."""
        return self._cosines.decode(self._kept * coordinates)

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """See `Coordinates`; the nearest image that the grid resolves."""
        return self._kept * self._cosines.encode(images)

    def pull_back(self, image_gradient: torch.Tensor) -> torch.Tensor:
        """See `Coordinates`."""
        return self._kept * self._cosines.pull_back(image_gradient)


def scales_of(shape: tuple[int, ...]) -> tuple[int | None, ...]:
    """Sides of the grids that an inversion goes through, the images' own (None) last."""
    size = shape[1:]
    sides = {2: _PICTURE_SIDES, 3: _VOLUME_SIDES}.get(len(size), ())
    return (*(side for side in sides if side < min(size)), None)


def inversion_config(name: str, target: Target, iterations: int) -> InversionConfig:
    """The settings of an inversion: the attack's published ones, and what the update allows."""
    kind = get_attack(name)
    assert issubclass(kind, OptimizationAttack)
    changes: dict[str, Value] = {"iterations": iterations, "smallest_loss": True}
    if iterations < _RACED:
        changes["race"] = 0
    changes["warmup"] = min(kind.published.optimiser.warmup, iterations // 10)
    changes["adaptive"] = bool(target.defenses)
    changes["local_steps"] = UNROLL if target.local.steps <= _UNROLLED else ONE_STEP
    if target.bn_statistics is not None:
        changes |= {"bn": _STATISTICS, "exact_bn": True}
    elif target.running_after is not None and changes["local_steps"] == UNROLL:
        changes |= {"bn": _STATISTICS, "bn_from_update": True}
    return kind.published.changed(**changes)


def stand_ins(target: Target, labels: torch.Tensor, images: int) -> tuple[Target, torch.Tensor]:
    """The client as if fewer images were behind its update, and their labels.

    Each stands for as many of the others: the labels are every so many of all, and every step is
    of an even share of the images.

    Args:
        target: The client's update.
        labels: Of its images, by class where their order is not known.
        images: How many; at least one for each local step of an epoch is taken.
    """
    n, local = target.batch_size, target.local
    images = max(images, local.batches)
    if images >= n:
        return target, labels
    places = torch.arange(images) * n // images
    fewer = dataclasses.replace(
        target, batch_size=images, shards=(images,), local=dataclasses.replace(local, order=None)
    )
    return fewer, labels[places]


def iterate(
    name: str, target: Target, labels: torch.Tensor, iterations: int, device: torch.device
) -> None:
    """Go through so many iterations of an inversion, to see what they take."""
    if target.data.n_tokens:
        told = None if target.loss.targets is Targets.TOKENS else labels
        attack = get_attack(name).configured({"iterations": iterations})
        attack.reconstruct(target, labels=told, device=device, seed=0)  # type: ignore[arg-type]
        return
    config = inversion_config(name, target, iterations)
    Inversion(target, labels, config, device=device, seed=0).run()


def _inversions(
    plan: Plan, name: str, target: Target, labels: torch.Tensor, seed: int, device: torch.device
) -> Iterator[Attempt]:
    """From coarse to fine, each scale from where the one before has come."""
    target, labels = stand_ins(target, labels, plan.images or target.batch_size)
    config = inversion_config(name, target, plan.iterations)
    labels = _arranged(target, labels, config, seed, device)
    start: torch.Tensor | None = None
    for side in scales_of(target.data.shape):
        parts = Parts() if side is None else Parts(coordinates=_CoarseVariables(side))
        changed = config if start is None else config.changed(start="prior")
        inversion = Inversion(
            target, labels, changed, device=device, seed=seed, prior=start, parts=parts
        )
        found = inversion.run()
        start = found.images
        size = target.data.shape[1:] if side is None else (side,) * len(target.data.shape[1:])
        shown = at_scale(found.images, size)
        made = Attempt(name, shown, found.iterations, found.seconds, side=side)
        yield _judged(made, target, found.images, found.labels, device)


@dataclass(frozen=True)
class _CoarseVariables:
    """What is optimised at a coarse scale, for `attack.loop.parts.Parts`."""

    side: int

    def __call__(
        self, target: Target, config: InversionConfig, device: torch.device, dtype: torch.dtype
    ) -> Coordinates:
        size = tuple(target.data.shape[1:])
        return Coarse(Cosines(size, 1.0, device, dtype), size, self.side, device)


def _arranged(
    target: Target, labels: torch.Tensor, config: InversionConfig, seed: int, device: torch.device
) -> torch.Tensor:
    """The labels where they explain the update best, if it matters which step has which."""
    ways = _ways(target, labels, seed)
    first = max(1, round(_TRIAL * config.optimiser.iterations))
    trial = label_trial(target, config, device=device, seed=seed)
    return choose_labels(ways, trial, first_iterations=first)[0]


def _ways(target: Target, labels: torch.Tensor, seed: int) -> list[torch.Tensor]:
    """Labels spread over the steps that an attack simulates, in every way that is tried."""
    one_step = target.local.batches > 1 and target.local.steps > _UNROLLED
    if labels.dim() > 1 or labels.is_floating_point() or one_step:
        return [labels]
    return arrangements(labels, parts_of(target), limit=_ARRANGEMENTS, seed=seed)


def trial_share(target: Target, labels: torch.Tensor, seed: int) -> float:
    """Iterations that the choice among the ways takes, over those of the inversion."""
    ways, each, share = len(_ways(target, labels, seed)), _TRIAL, 0.0
    while ways > 1:
        share, ways, each = share + ways * each, math.ceil(ways / 2), 2 * each
    return share


# --- How well it explains the update ------------------------------------------------------


def _judged(
    attempt: Attempt, target: Target, images: torch.Tensor, labels: torch.Tensor,
    device: torch.device,
) -> Attempt:  # fmt: skip
    """The attempt with the distances that its images leave."""
    replica = Replica(target, device, torch.float64)
    objective = Adaptation.none(target, InversionConfig()).objective(Cosine())
    inputs = target.data.placed(target.data.normalize(images), replica.parameters[0])
    loss = float(GradientMatcher(replica, objective, "exact").value(inputs, labels.to(device)))
    return dataclasses.replace(
        attempt,
        loss=loss if math.isfinite(loss) else math.inf,
        objectives=unexplained(target, images, labels),
    )


def unexplained(target: Target, images: torch.Tensor, labels: torch.Tensor) -> tuple[float, ...]:
    """Per image, the cosine distance of its gradient and what the others leave of the update.

    With G what was shared, g_i an image's gradient over N, and s the scale at which the sum of
    the g_j is nearest to G, that is the distance of s g_i and G - s (sum of g_j, j not i): 0 where
    all images are right, near 1 for one that explains nothing. After several local steps the
    gradients are those at the model that was received.

    Args:
        target: What was shared.
        images: N x C x ... in [0, 1].
        labels: As the loss takes them.

    Returns:
        Zeros where the loss of a batch is not the mean of its samples'.
    """
    model = target.build_model().double()
    named = dict(model.named_parameters())
    parameters = [named[name].requires_grad_() for name in target.gradient]
    outputs = model(target.data.normalize(target.data.placed(images, parameters[0])))
    if not isinstance(outputs, torch.Tensor) or not target.loss.mean_over_samples:
        return (0.0,) * len(images)
    wanted = labels.double() if labels.is_floating_point() else labels

    def gradient(first: int, last: int) -> torch.Tensor:
        loss = target.loss(outputs[first:last], wanted[first:last]) * (last - first) / len(images)
        found = torch.autograd.grad(loss, parameters, retain_graph=True, materialize_grads=True)
        return torch.cat([value.flatten() for value in found])

    shared = torch.cat([g.flatten().double() for g in target.gradient.values()])
    whole = gradient(0, len(images))
    scale = (whole @ shared).clamp(min=0) / whole.square().sum().clamp(min=1e-30)
    error = shared - scale * whole
    each = (scale * gradient(i, i + 1) for i in range(len(images)))
    return tuple(1 - float(F.cosine_similarity(own, error + own, 0, 1e-30)) for own in each)
