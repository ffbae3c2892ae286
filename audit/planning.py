"""How an audit spends its time: what things cost on this model, and what the budget allows.

A site may have hundreds of images and minutes. Then fewer images are reconstructed, each standing
for several; fewer are compared; restarts of class representatives are left out: `cuts_of` says so.
Whoever states the number of iterations has no part of it cut.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from attack.attacks import OptimizationAttack, get_attack
from audit.attempts import Plan, inversion_for, iterate, plan_of, scales_of, stand_ins, trial_share
from audit.class_representatives import ITERATIONS, classes_of
from audit.labels import in_no_order
from audit.planting import PlantSetting, plant_settings
from audit.references import NOISE_IMAGES, metrics_of, similarities
from audit.request import AUTO, AuditRequest
from core.losses import main_output
from core.target import Target

# Shares of the budget: of all scales of the inversion together, of each closed form, of all plants
# and of all remedies, of similarities and of class representatives.
INVERSION_SHARE, CLOSED_FORM_SHARE, PLANTS_SHARE, REMEDIES_SHARE = 0.05, 0.01, 0.47, 0.3
_SIMILARITY_SHARE, _CLASSES_SHARE = 0.05, 0.05
# Iterations that fewer images are taken for, and at least; images that are reconstructed at least,
# and planted images per setting.
_FEWEST, _LEAST, FEWEST_IMAGES, FEWEST_PLANTS, MOST_PLANTS = 50, 20, 16, 2, 5
# Images of each kind that are compared at least.
_FEWEST_COMPARED = 20
# Iterations of the two inversions of which the difference is timed, and their images.
_TIMED, _TIMED_IMAGES = (1, 4), (1, 16)


@dataclass(frozen=True)
class Costs:
    """Seconds that things take on a site's model and machine.

    Attributes:
        call: Of an iteration of the inversion, however few its images are.
        image: Of one of its images.
        gradient: Of an image's way through the model and back.
        pair: Of comparing two images by every metric.
        quick_pair: Of comparing two images by the one that decides.
    """

    call: float
    image: float
    gradient: float
    pair: float
    quick_pair: float

    def iteration(self, images: int) -> float:
        """Of an inversion of so many images."""
        return self.call + images * self.image


def plan_for(request: AuditRequest) -> Plan:
    """The attacks, with as many iterations as the budget allows, and what all of it takes."""
    settings = request.settings
    name = None if settings.attack == AUTO else settings.attack
    budget = settings.budget
    if settings.iterations is not None or not issubclass(
        get_attack(name or inversion_for(request.target)), OptimizationAttack
    ):
        n = settings.iterations or 1
        return plan_of(
            name, request.target, n, CLOSED_FORM_SHARE * budget, restarts=settings.restarts
        )
    costs = measured_costs(request)
    images, iterations = _affordable(request, costs)
    plan = plan_of(
        name, request.target, iterations, CLOSED_FORM_SHARE * budget, images=images,
        alone=_alone(request, costs, images, iterations),
        compared=_compared(request, costs, images),
        restarts=_restarts(request, costs),
    )  # fmt: skip
    return with_forecast(request, plan, costs)


def with_forecast(request: AuditRequest, plan: Plan, costs: Costs | None = None) -> Plan:
    """The plan with the seconds that it takes."""
    return dataclasses.replace(
        plan, forecast=forecast(request, plan, costs or measured_costs(request))
    )


def plan_for_plants(request: AuditRequest, plan: Plan, attack: str, setting: PlantSetting) -> Plan:
    """The plan of the attack that decides, in as much time for few images as for many.

    One image in one step takes a fraction of the time, and is attacked for longer: otherwise
    the site's own batch would decide whether an attack can find anything at all.
    """
    plan = plan.only(attack)
    own = setting.images == request.target.batch_size
    return plan if own else dataclasses.replace(plan, iterations=plan.alone or plan.iterations)


# -- What the budget allows ---------------------------------------------------------------------


def _inversion_of(request: AuditRequest) -> str:
    """Name of the inversion that is asked for, or of the audit's own."""
    name = request.settings.attack
    optimises = name != AUTO and issubclass(get_attack(name), OptimizationAttack)
    return name if optimises else inversion_for(request.target)


def _most_iterations(request: AuditRequest) -> int:
    kind = get_attack(_inversion_of(request))
    assert issubclass(kind, OptimizationAttack)
    return kind.published.optimiser.iterations


def _affordable(request: AuditRequest, costs: Costs) -> tuple[int, int]:
    """Images that are reconstructed, and iterations: fewer images before too few iterations."""
    share = INVERSION_SHARE * request.settings.budget / _runs(request)
    images = n = request.target.batch_size
    fewest = min(n, max(FEWEST_IMAGES, request.target.local.batches))
    # Where an iteration's cost is not that of its images, fewer of them are no help.
    while (
        images > fewest
        and images * costs.image > costs.call
        and _FEWEST * costs.iteration(images) + _judging(costs, images) > share
    ):  # fmt: skip
        images = max(fewest, images * 3 // 4)
    left = (share - _judging(costs, images)) / costs.iteration(images)
    return images, int(min(_most_iterations(request), max(_LEAST, left)))


def _runs(request: AuditRequest) -> float:
    """Inversions of the site's own batch that one attack goes through: scales, and trials."""
    target, labels = _fewer(request, max(FEWEST_IMAGES, request.target.local.batches))
    scales = len(scales_of(request.data.spec.shape))
    return scales + trial_share(target, labels, request.settings.seed)


def _judging(costs: Costs, images: int) -> float:
    """Of saying how well each image explains the update: each passes back with all others."""
    return images * images * costs.gradient


def _alone(request: AuditRequest, costs: Costs, images: int, iterations: int) -> int:
    """Iterations for one image in one step: those that take as long as the site's own."""
    epochs = request.local.training.epochs
    as_long = iterations * costs.iteration(images) * epochs / costs.iteration(1)
    most = max(iterations, _most_iterations(request))
    return int(min(most, max(iterations, min(as_long, iterations * images * epochs))))


def _compared(request: AuditRequest, costs: Costs, images: int) -> int:
    """Images of each kind that reconstructions are compared with."""
    n = max(len(request.data.members.labels), len(request.data.non_members.labels))
    each = costs.pair * (2 * images + NOISE_IMAGES)
    affordable = int(_SIMILARITY_SHARE * request.settings.budget / max(each, 1e-12))
    return min(n, max(_FEWEST_COMPARED, affordable))


def _restarts(request: AuditRequest, costs: Costs) -> int:
    each = _climbing(request, costs)
    affordable = int(_CLASSES_SHARE * request.settings.budget / max(each, 1e-12))
    return min(request.settings.restarts, max(1, affordable))


def _climbing(request: AuditRequest, costs: Costs) -> float:
    """Of one restart of every class representative."""
    data = request.data
    return len(classes_of(request.target, data.members, data.non_members)) * (
        ITERATIONS * costs.gradient
    )


def cuts_of(request: AuditRequest, plan: Plan) -> Iterator[str]:
    """What was left out for want of time, one sentence each."""
    n, others = len(request.data.members.labels), len(request.data.non_members.labels)
    budget = f"--budget ({request.settings.budget:.0f} s)"
    if plan.images and plan.images < n:
        yield (
            f"{budget} is small for {n} images: {plan.images} are reconstructed, each standing for "
            f"{n / plan.images:.1f} of them, in {plan.iterations} iterations; so are planted ones. "
            "All members and non-members are in the test that decides."
        )
    if plan.inversion and request.settings.iterations is None and plan.iterations < _FEWEST:
        yield (
            f"{budget} is small for this model: the inversion has {plan.iterations} iterations, "
            "and finds less than it would."
        )
    if plan.compared and plan.compared < max(n, others):
        yield (
            f"{budget}: the table of similarities is of {min(plan.compared, n)} of {n} members and "
            f"{min(plan.compared, others)} of {others} non-members, drawn by chance (seed "
            f"{request.settings.seed})."
        )
    if request.settings.membership and plan.restarts < request.settings.restarts:
        yield (
            f"{budget}: class representatives have {plan.restarts} of "
            f"{request.settings.restarts} restarts."
        )


# -- What it takes --------------------------------------------------------------------------------


def forecast(request: AuditRequest, plan: Plan, costs: Costs) -> float:
    """Seconds of an audit by a plan, without the search for remedies and without closed forms.

    The attack once, and as often again as there are plants; comparisons; what the model betrays.
    """
    n = request.target.batch_size
    images = plan.images or n
    attack = _inversion_seconds(request, plan, costs, images, plan.iterations)
    alone = _inversion_seconds(request, plan, costs, 1, plan.alone or plan.iterations)
    everyone = len(request.groups)
    own_plant, one_plant = (
        attack + everyone * images * costs.quick_pair,
        (alone + everyone * costs.quick_pair),
    )
    each = [own_plant if s.images == n else one_plant for s in plant_settings(request)]
    total = attack + _comparing(request, plan, costs, images) + _planting(request, each)
    return total + (_model_seconds(request, plan, costs) if request.settings.membership else 0.0)


def _inversion_seconds(
    request: AuditRequest, plan: Plan, costs: Costs, images: int, iterations: int
) -> float:
    if plan.inversion is None:
        return 0.0
    scales = len(scales_of(request.data.spec.shape))
    runs = scales if images == 1 else _runs(request)
    return runs * iterations * costs.iteration(images) + scales * _judging(costs, images)


def _planting(request: AuditRequest, each: list[float]) -> float:
    """Of all plants, as `audit.power` counts them."""
    left, total = PLANTS_SHARE * request.settings.budget, 0.0
    for number, seconds in enumerate(each):
        share = left / (len(each) - number)
        fitting = max(FEWEST_PLANTS, min(MOST_PLANTS, int(share / max(seconds, 1e-12))))
        spent = (request.settings.plants or fitting) * seconds
        left, total = left - spent, total + spent
    return total


def _comparing(request: AuditRequest, plan: Plan, costs: Costs, images: int) -> float:
    n, others = len(request.data.members.labels), len(request.data.non_members.labels)
    members, held_out = (min(plan.compared or k, k) for k in (n, others))
    pairs = members * (images + NOISE_IMAGES) + held_out * images
    return pairs * costs.pair + (n + others) * images * costs.quick_pair


def _model_seconds(request: AuditRequest, plan: Plan, costs: Costs) -> float:
    models = len(request.rounds) + len(request.single_site) + 2
    scored = models * len(request.groups) * costs.gradient
    classes = len(classes_of(request.target, request.data.members, request.data.non_members))
    pairs = (plan.restarts + NOISE_IMAGES + 2) * min(
        plan.compared or len(request.groups), len(request.data.members.labels)
    )
    compared = pairs * costs.pair * min(classes, 1)
    return scored + plan.restarts * _climbing(request, costs) + compared


# -- Measured --------------------------------------------------------------------------------------


def measured_costs(request: AuditRequest) -> Costs:
    """What things take, each measured once on few images."""
    n, batches = request.target.batch_size, request.target.local.batches
    few, more = (min(n, max(k, batches)) for k in _TIMED_IMAGES)
    first = _iteration_seconds(request, few)
    second = first if more == few else _iteration_seconds(request, more)
    image = max((second - first) / max(more - few, 1), second / more / 5)
    shown = request.data.everyone.images[:4]
    spec = request.data.spec
    metrics, pairs = metrics_of(spec), len(shown) ** 2
    return Costs(
        call=max(0.0, first - few * image),
        image=image,
        gradient=_gradient_seconds(request, more) / more,
        pair=_seconds(lambda: [similarities(m, shown, shown, spec.columns) for m in metrics])
        / pairs,
        quick_pair=_seconds(lambda: similarities(metrics[0], shown, shown, spec.columns)) / pairs,
    )


def _seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _fewer(request: AuditRequest, images: int) -> tuple[Target, torch.Tensor]:
    labels = in_no_order(request.data.members.labels, request.local.order_told)
    return stand_ins(request.target, labels, images)


def _iteration_seconds(request: AuditRequest, images: int) -> float:
    """Of an iteration: what more of them take longer than few."""
    target, labels = _fewer(request, images)
    name, device = _inversion_of(request), torch.device(request.settings.device)

    def run(iterations: int) -> float:
        return _seconds(lambda: iterate(name, target, labels, iterations, device))

    run(1)
    short, long = map(run, _TIMED)
    least = long / _TIMED[1] / 10
    return max(least, (long - short) / (_TIMED[1] - _TIMED[0]))


def _gradient_seconds(request: AuditRequest, images: int) -> float:
    """Of the gradient of the outputs' sum in the parameters, at so many images."""
    device = torch.device(request.settings.device)
    model = request.target.build_model().to(device)
    given = stand_ins(request.target, request.data.members.labels, images)[0].batch_size
    inputs = request.data.members.images[:given].to(device)

    def once() -> None:
        main_output(model(request.data.spec.normalize(inputs))).sum().backward()

    once()
    seconds = _seconds(once)
    return seconds if math.isfinite(seconds) else 0.0
