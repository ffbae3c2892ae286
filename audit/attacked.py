"""Attacks on an update and the test that decides: members against non-members."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from audit.attempts import Attempt, Plan, attempts, best_of
from audit.decision import Decision, Power, decide
from audit.labels import in_no_order
from audit.record import AttackSection, PowerSection, SimilaritySection, TestSection
from audit.references import (
    at_scale,
    metrics_of,
    similarities,
    similarity_section,
    some_of,
)
from audit.request import AuditRequest
from core.pictures import save_gallery
from core.storage import atomic_file


@dataclass(frozen=True)
class Attacked:
    """What the attacks found, as numbers.

    Attributes:
        sections: For the record.
        chosen: Number of the one that decides; None where none ran.
        similarity: Its reconstructions x images, members first.
        weights: How right it thinks each of its reconstructions is.
    """

    sections: tuple[AttackSection, ...]
    chosen: int | None
    similarity: tuple[tuple[float, ...], ...] = ()
    weights: tuple[float, ...] = ()

    def decided(self, request: AuditRequest, power: tuple[PowerSection, ...]) -> Decision | None:
        """What the test says of it, given what the attack finds of plants."""
        if self.chosen is None:
            return None
        plants = [Power(_words(p), p.found, p.of) for p in power]
        return decided_by(
            request, np.array(self.similarity), self.weights, request.is_member, plants
        )


def _words(power: PowerSection) -> str:
    steps = "one step" if power.steps == 1 else f"{power.steps} steps"
    return f"batch {power.batch_size}, {steps}"


def attack_update(request: AuditRequest, plan: Plan) -> Attacked:
    """Run the attacks; the one that explains the update best is tested.

    Args:
        request: Its target is attacked.
        plan: See `plan_for`.
    """
    seed, device = request.settings.seed, torch.device(request.settings.device)
    known = in_no_order(request.data.members.labels, request.local.order_told)
    tried = list(attempts(plan, request.target, known, seed, device))
    # What does not apply is worth a word only where nothing does.
    found = [attempt for attempt in tried if attempt.images is not None] or tried
    best = best_of(found)
    sections = [_section(request, attempt, plan.compared) for attempt in found]
    if best is None:
        return Attacked(tuple(sections), None)
    number = found.index(best)
    _keep_images(request, best)
    similarity = similarity_to_all(request, best)
    decision = decided_by(request, similarity, best.weights, request.is_member)
    sections[number] = dataclasses.replace(sections[number], test=_test(decision))
    rows = tuple(map(tuple, similarity.tolist()))
    return Attacked(tuple(sections), number, rows, tuple(best.weights))


def _keep_images(request: AuditRequest, best: Attempt) -> None:
    """Leave reconstructions at the site, where it asked for them."""
    folder = request.settings.keep_images
    if folder is None or best.images is None:
        return
    with atomic_file(folder / "reconstructions.npy") as file:
        np.save(file, best.images.numpy())
    if best.images.dim() < 3:  # Sentences and records are no pictures.
        return
    save_gallery(folder / "reconstructions.png", {best.attack: list(best.images)})


def _section(request: AuditRequest, attempt: Attempt, compared: int) -> AttackSection:
    """An attempt for the record, held against so many images of each kind; 0: all."""
    similar: tuple[SimilaritySection, ...] = ()
    shape = request.data.spec.shape
    if attempt.images is not None:
        shape = tuple(attempt.images.shape[1:])
        members, others = (
            at_scale(some_of(part.images, compared, request.settings.seed), shape[1:])
            for part in (request.data.members, request.data.non_members)
        )
        similar = tuple(
            similarity_section(
                metric,
                attempt.images,
                members,
                others,
                seed=request.settings.seed,
                data=request.data.spec,
            )
            for metric in metrics_of(request.data.spec)
        )
    return AttackSection(
        attack=attempt.attack,
        shape=shape,
        iterations=attempt.iterations,
        objectives=attempt.objectives,
        seconds=attempt.seconds,
        similarities=similar,
        test=None,
        note=attempt.note,
    )


def similarity_to_all(request: AuditRequest, attempt: Attempt) -> np.ndarray:
    """The similarity that decides, of reconstructions x all images of the site."""
    assert attempt.images is not None
    size, spec = tuple(attempt.images.shape[2:]), request.data.spec
    images = at_scale(request.data.everyone.images, size)
    return similarities(metrics_of(spec)[0], attempt.images, images, spec.columns)


def decided_by(
    request: AuditRequest,
    similarity: np.ndarray,
    weights: Sequence[float],
    members: np.ndarray,
    power: Sequence[Power] = (),
) -> Decision:
    """The test that decides, within classes and at the request's level.

    Args:
        request: Has classes, level and seed.
        similarity: Reconstructions x all images of the site.
        weights: Per reconstruction, how right the attack thinks it is.
        members: Per image, whether it is behind the update.
        power: What the attack finds of planted images.
    """
    return decide(
        similarity, members, classes=request.groups, weights=weights, power=power,
        alpha=request.settings.alpha, seed=request.settings.seed,
    )  # fmt: skip


def _test(decision: Decision) -> TestSection:
    return TestSection(
        p_value=decision.p_value,
        smallest=decision.smallest,
        alpha=decision.alpha,
        memberships=decision.memberships,
        members=decision.n_members,
        non_members=decision.n_non_members,
        per_image=decision.per_image_corrected,
        standing_out=len(decision.images_that_leak),
    )
