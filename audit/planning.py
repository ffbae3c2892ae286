"""How an audit spends its time."""

from __future__ import annotations

import dataclasses
import time

import torch

from attack.attacks import OptimizationAttack, get_attack
from attack.matching.matcher import GradientMatcher
from attack.matching.objectives import Cosine
from attack.matching.replica import Replica
from audit.attempts import INVERSION, Plan, plan_of, scales_of
from audit.planting import PlantSetting, plant_settings
from audit.request import AUTO, AuditRequest

# Shares of the budget: of all scales of the inversion together, of each closed form, of all plants
# and of all remedies.
INVERSION_SHARE, CLOSED_FORM_SHARE, PLANTS_SHARE, REMEDIES_SHARE = 0.05, 0.01, 0.5, 0.3
# Iterations at least, and planted images per setting.
_FEWEST, FEWEST_PLANTS, MOST_PLANTS = 50, 2, 5
# Gradient evaluations that are timed.
_TIMED = 2


def plan_for(request: AuditRequest) -> Plan:
    """The attacks, with as many iterations as the budget allows."""
    name = None if request.settings.attack == AUTO else request.settings.attack
    kind = get_attack(name or INVERSION)
    iterations = request.settings.iterations
    if iterations is None and issubclass(kind, OptimizationAttack):
        each = seconds_per_iteration(request)
        share = INVERSION_SHARE * request.settings.budget / len(scales_of(request.data.spec.shape))
        most = kind.published.optimiser.iterations
        iterations = int(min(most, max(_FEWEST, share / each)))
    return plan_of(
        name, request.target, iterations or 1, CLOSED_FORM_SHARE * request.settings.budget
    )


def plan_for_plants(request: AuditRequest, plan: Plan, attack: str, setting: PlantSetting) -> Plan:
    """The plan of the attack that decides, in as much time for few images as for many.

    One image in one step takes a fraction of the time, and is attacked for longer: otherwise
    the site's own batch would decide whether an attack can find anything at all.
    """
    alone, kind = plan.only(attack), get_attack(attack)
    if request.settings.iterations is not None or not issubclass(kind, OptimizationAttack):
        return alone
    work = setting.images * setting.training.training.epochs
    own = request.target.batch_size * request.local.training.epochs
    most = max(alone.iterations, kind.published.optimiser.iterations)
    return dataclasses.replace(alone, iterations=min(most, alone.iterations * own // work))


def seconds_per_iteration(request: AuditRequest) -> float:
    """What one gradient of the matching loss takes."""
    target, device = request.target, torch.device(request.settings.device)
    matcher = GradientMatcher(Replica(target, device), Cosine(), "exact")
    inputs = torch.zeros((target.batch_size, *target.data.shape), device=device)
    labels = request.data.members.labels.to(device)
    matcher(inputs, labels)
    began = time.perf_counter()
    for _ in range(_TIMED):
        matcher(inputs, labels)
    return (time.perf_counter() - began) / _TIMED


def estimated_seconds(request: AuditRequest) -> float:
    """How long the audit takes, about: the attack once, and as often again as there are plants.

    What helps against a leak is looked for in as much time as the plants take.
    """
    plan = plan_for(request)
    scales = len(scales_of(request.data.spec.shape))
    attack = plan.iterations * seconds_per_iteration(request) * scales if plan.inversion else 0.0
    plants = (request.settings.plants or MOST_PLANTS) * len(plant_settings(request))
    if request.settings.plants is None:
        fitting = PLANTS_SHARE * request.settings.budget / max(attack, 1e-9)
        plants = min(plants, max(2 * FEWEST_PLANTS, int(fitting)))
    return attack * (1 + 2 * plants)
