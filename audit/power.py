"""What the attack finds of planted images: what "nothing found" is worth."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from audit.attacked import Attacked, decided_by, similarity_to_all
from audit.attempts import Plan, attempts, best_of
from audit.decision import Verdict
from audit.labels import in_no_order
from audit.planning import FEWEST_PLANTS, MOST_PLANTS, PLANTS_SHARE, plan_for_plants
from audit.planting import PlantSetting, plant, plant_settings
from audit.record import PowerSection
from audit.request import AuditRequest
from audit.stages import Stages

# Called with the name of a stage that begins.
Shown = Callable[[str], None]


@dataclass(frozen=True)
class _Plant:
    """What was found of one planted update."""

    found: bool
    similarity: float
    seconds: float


def measure_power(
    request: AuditRequest,
    plan: Plan,
    attacked: Attacked,
    stages: Stages,
    shown: Shown,
) -> Iterator[PowerSection]:
    """Plants at every setting, as many as the budget allows, at least `FEWEST_PLANTS`."""
    if attacked.chosen is None:
        return
    attack = attacked.sections[attacked.chosen].attack
    settings = plant_settings(request)
    left = PLANTS_SHARE * request.settings.budget
    for number, setting in enumerate(settings):
        share, done = left / (len(settings) - number), list[_Plant]()
        alone = plan_for_plants(request, plan, attack, setting)
        while len(done) < (request.settings.plants or MOST_PLANTS):
            spent = sum(each.seconds for each in done)
            enough = request.settings.plants is None and len(done) >= FEWEST_PLANTS
            if enough and spent + done[-1].seconds > share:
                break
            shown(f"plant {len(done) + 1}, batch {setting.images}")
            name = f"plant {setting.images} {len(done)}"
            done.append(stages.once(name, _Plant, _planting(request, alone, setting, len(done))))
        left -= sum(each.seconds for each in done)
        yield PowerSection(
            attack=attack,
            batch_size=setting.images,
            steps=setting.training.training.steps,
            found=sum(each.found for each in done),
            of=len(done),
            best_similarity=float(np.mean([each.similarity for each in done])),
        )


def _planting(
    request: AuditRequest, plan: Plan, setting: PlantSetting, number: int
) -> Callable[[], _Plant]:
    """The stage of one plant."""

    def compute() -> _Plant:
        began = time.perf_counter()
        planted = plant(request, setting, number)
        labels = in_no_order(planted.labels, request.local.order_told)
        device = torch.device(request.settings.device)
        seed = request.settings.seed + 1 + number
        best = best_of(list(attempts(plan, planted.target, labels, seed, device)))
        if best is None:
            return _Plant(False, 0.0, time.perf_counter() - began)
        similarity = similarity_to_all(request, best)
        decision = decided_by(request, similarity, best.weights, planted.is_planted)
        return _Plant(
            found=decision.verdict is Verdict.LEAKS,
            similarity=float(similarity[:, planted.is_planted].max()),
            seconds=time.perf_counter() - began,
        )

    return compute
