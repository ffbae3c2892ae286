"""An audit: what does this update give away of the images that it was trained on?

    labels -> attacks -> the test that decides -> power -> verdict -> membership -> remedies

Every stage draws its random numbers from the request's seed and is kept as numbers, so that an
interrupted audit goes on where it was.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from attack.attacks import OptimizationAttack, get_attack
from attack.knowledge.labels import DEFAULT_RULE, label_accuracy, recover_labels
from attack.matching.matcher import GradientMatcher
from attack.matching.objectives import Cosine
from attack.matching.replica import Replica
from audit.attempts import (
    INVERSION,
    Attempt,
    Plan,
    attempts,
    best_of,
    plan_of,
    scales_of,
)
from audit.class_representatives import class_representatives
from audit.decision import Decision, Power, Verdict, decide
from audit.membership import measure_membership, too_few
from audit.planting import PlantSetting, plant, plant_settings
from audit.received import state_after
from audit.record import (
    AttackSection,
    AuditRecord,
    ClassSection,
    LabelSection,
    PowerSection,
    RateSection,
    RemedySection,
    SimilaritySection,
    TestSection,
    UpdateSection,
)
from audit.references import NCC, at_scale, metrics_of, similarities, similarity_section
from audit.remedies import find_remedies, remaking
from audit.request import AUTO, AuditRequest
from audit.show.words import sentence
from audit.stages import Stages
from core.errors import InputError, first_line
from core.losses import Targets
from core.pictures import save_gallery
from core.processes import distributed
from core.storage import atomic_file
from core.target import Target
from core.version import __version__
from gradients.shared_update import SharedUpdate
from gradients.update_traces import Trace

# Shares of the budget: of all scales of the inversion together, of each closed form, of all plants
# and of all remedies.
_INVERSION, _CLOSED_FORM, _PLANTS, _REMEDIES = 0.1, 0.01, 0.4, 0.4
_FEWEST_ITERATIONS, _MOST_PLANTS = 50, 5
# Gradient evaluations that are timed, and the drawn guesses behind the chance of labels.
_TIMED, _GUESSES = 2, 1000
EDGE = 1e-12


def audit(
    request: AuditRequest, *, report: Path | None = None, progress: bool = False
) -> AuditRecord:
    """Measure what an update gives away.

    Args:
        request: See `audit.request.make_request`.
        report: Folder for the numbers of finished stages, from which an interrupted audit goes
            on; None: nothing is kept.
        progress: Show a bar on rank 0.

    Raises:
        InputError: The file of stages is damaged.
    """
    began = time.perf_counter()
    stages = Stages(report, request.digest)
    plan = stages.once("plan", Plan, lambda: plan_for(request))
    labels = stages.once("labels", KnownLabels, lambda: known_labels(request))
    with _bar(progress) as bar:
        _shown(bar, "attack")
        found = stages.once("attack", Attacked, lambda: attack_update(request, plan))
        power = tuple(_power(request, plan, found, stages, bar))
        decision = found.decided(request, power)
        _shown(bar, "membership")
        others = stages.once("model", _Model, lambda: _measure_model(request))
        remedies = tuple(_remedies(request, plan, found, power, stages, bar))
    return AuditRecord(
        verdict=decision.verdict.value if decision else Verdict.CANNOT_TELL.value,
        statement=decision.statement if decision else _NOTHING_RAN,
        update=update_section(request.update),
        local=request.local.section(len(request.data.members.labels)),
        labels=labels.section,
        attacks=found.sections,
        power=power,
        membership=others.membership,
        classes=others.classes,
        remedies=remedies,
        granted=_granted(request, labels),
        warnings=(*request.warnings, *others.warnings),
        seed=request.settings.seed,
        seconds=time.perf_counter() - began,
        program_version=__version__,
    )


_NO_ATTACK = Verdict.CANNOT_TELL.value
_NOTHING_RAN = "cannot tell: no attack could be run on this update"


def _bar(shown: bool) -> tqdm:
    """Counts attacks: how many there will be depends on what is found."""
    return tqdm(desc="audit", unit=" stages", disable=not (shown and distributed.rank() == 0))


def _shown(bar: tqdm, stage: str) -> None:
    bar.update()
    bar.set_postfix_str(stage)


# --- The update ------------------------------------------------------------------------


def update_section(update: SharedUpdate) -> UpdateSection:
    """What the update holds, for the record."""
    entries = [entry for entry in update.entries if entry.kind == "shared"]
    changed = [update.change[entry.name] for entry in entries]
    before = np.sqrt(sum(entry.norm_before**2 for entry in entries))
    noise = next((f.value for f in update.findings if f.trace is Trace.NOISE and f.certain), None)
    count = sum(value.numel() for value in changed)
    whole = noise * count**0.5 if noise else 0.0
    return UpdateSection(
        shared_parameters=count,
        shared_tensors=len(entries),
        unchanged_tensors=len(update.names("unchanged")) + len(update.names("absent")),
        running_statistics=update.running_after() is not None,
        norm=update.norm,
        relative_norm=update.norm / max(float(before), EDGE),
        number_format=", ".join(sorted({entry.number_format for entry in entries})),
        noise=noise,
        # Norms of what is independent add as squares.
        signal_to_noise=max(update.norm**2 - whole**2, 0.0) ** 0.5 / whole if whole else None,
        findings=tuple(map(str, update.findings)),
    )


# --- Labels -----------------------------------------------------------------------------


@dataclass(frozen=True)
class KnownLabels:
    """What is known of labels.

    Attributes:
        section: For the record; None where the client has no classes.
        granted: Whether the attack is told what the update does not betray.
    """

    section: LabelSection | None
    granted: bool


def known_labels(request: AuditRequest) -> KnownLabels:
    """Which classes the update betrays; what it does not is granted to the attack."""
    target, truth = request.target, request.data.members.labels
    if target.loss.targets is not Targets.CLASSES or truth.dim() != 1:
        return KnownLabels(None, True)
    true_counts = torch.bincount(truth, minlength=target.data.n_classes)
    section = LabelSection(DEFAULT_RULE, tuple(true_counts.tolist()), (), None, None)
    section = dataclasses.replace(section, chance=_chance(request, true_counts.numpy()))
    try:
        recovered = recover_labels(DEFAULT_RULE, target)
    except InputError as error:
        return KnownLabels(dataclasses.replace(section, note=first_line(error)), True)
    counts = torch.bincount(recovered, minlength=target.data.n_classes)
    accuracy = label_accuracy(recovered, truth)
    section = dataclasses.replace(
        section, recovered_counts=tuple(counts.tolist()), accuracy=accuracy
    )
    return KnownLabels(section, accuracy < 1)


def _chance(request: AuditRequest, true_counts: np.ndarray) -> float:
    """The accuracy of a guess that knows the class shares of the non-members."""
    n = int(true_counts.sum())
    others = np.bincount(request.data.non_members.labels.numpy(), minlength=len(true_counts))
    rng = np.random.default_rng((request.settings.seed, 53))
    guesses = rng.multinomial(n, others / others.sum(), _GUESSES)
    return float(np.minimum(guesses, true_counts).sum(1).mean() / n)


def _granted(request: AuditRequest, labels: KnownLabels) -> tuple[str, ...]:
    told = ["number of images and of local steps", "the local training"]
    if labels.granted:
        told.append("what the images were labelled with")
    if request.local.order_told:
        told.append("which images shared which local steps")
    return tuple(told)


def _in_no_order(labels: torch.Tensor, order_told: bool) -> torch.Tensor:
    """Class indices sorted, unless the attack is told which image comes when."""
    is_classes = labels.dim() == 1 and not labels.is_floating_point()
    return labels.sort().values if is_classes and not order_told else labels


# --- Attacks -----------------------------------------------------------------------------


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
        return _decided(request, np.array(self.similarity), self.weights, request.is_member, plants)


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
    known = _in_no_order(request.data.members.labels, request.local.order_told)
    tried = list(attempts(plan, request.target, known, seed, device))
    # What does not apply is worth a word only where nothing does.
    found = [attempt for attempt in tried if attempt.images is not None] or tried
    best = best_of(found)
    sections = [_section(request, attempt) for attempt in found]
    if best is None:
        return Attacked(tuple(sections), None)
    number = found.index(best)
    _keep_images(request, best)
    similarity = _similarity(request, best)
    decision = _decided(request, similarity, best.weights, request.is_member)
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
    save_gallery(folder / "reconstructions.png", {best.attack: list(best.images)})


def _section(request: AuditRequest, attempt: Attempt) -> AttackSection:
    similar: tuple[SimilaritySection, ...] = ()
    shape = request.data.spec.shape
    if attempt.images is not None:
        shape = tuple(attempt.images.shape[1:])
        members, others = (
            at_scale(part.images, shape[1:])
            for part in (request.data.members, request.data.non_members)
        )
        similar = tuple(
            similarity_section(metric, attempt.images, members, others, seed=request.settings.seed)
            for metric in metrics_of(shape)
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


def _similarity(request: AuditRequest, attempt: Attempt) -> np.ndarray:
    """NCC of reconstructions x all images of the site."""
    assert attempt.images is not None
    size = tuple(attempt.images.shape[2:])
    return similarities(NCC, attempt.images, at_scale(request.data.everyone.images, size))


def _decided(
    request: AuditRequest,
    similarity: np.ndarray,
    weights: tuple[float, ...] | list[float],
    members: np.ndarray,
    power: list[Power] | None = None,
) -> Decision:
    return decide(
        similarity, members, classes=request.groups, weights=weights, power=power or (),
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


# --- Power ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Plant:
    """What was found of one planted update."""

    found: bool
    similarity: float
    seconds: float


def _power(
    request: AuditRequest,
    plan: Plan,
    attacked: Attacked,
    stages: Stages,
    bar: tqdm,
) -> Iterator[PowerSection]:
    """Plants at every setting, as many as the budget allows, at least one."""
    if attacked.chosen is None:
        return
    attack = attacked.sections[attacked.chosen].attack
    alone, settings = plan.only(attack), plant_settings(request)
    left = _PLANTS * request.settings.budget
    for number, setting in enumerate(settings):
        share, done = left / (len(settings) - number), list[_Plant]()
        while len(done) < (request.settings.plants or _MOST_PLANTS):
            spent = sum(each.seconds for each in done)
            if request.settings.plants is None and done and spent + done[-1].seconds > share:
                break
            _shown(bar, f"plant {len(done) + 1}, batch {setting.images}")
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
        labels = _in_no_order(planted.labels, request.local.order_told)
        device = torch.device(request.settings.device)
        seed = request.settings.seed + 1 + number
        best = best_of(list(attempts(plan, planted.target, labels, seed, device)))
        if best is None:
            return _Plant(False, 0.0, time.perf_counter() - began)
        similarity = _similarity(request, best)
        decision = _decided(request, similarity, best.weights, planted.is_planted)
        return _Plant(
            found=decision.verdict is Verdict.LEAKS,
            similarity=float(similarity[:, planted.is_planted].max()),
            seconds=time.perf_counter() - began,
        )

    return compute


# --- The model, and what to do --------------------------------------------------------------


@dataclass(frozen=True)
class _Model:
    """What the models give away beside the update, and why it was not measured."""

    membership: tuple[RateSection, ...] = ()
    classes: tuple[ClassSection, ...] = ()
    warnings: tuple[str, ...] = ()


def _measure_model(request: AuditRequest) -> _Model:
    """Membership by losses, and class representatives of the global model."""
    settings, data, target = request.settings, request.data, request.target
    if not settings.membership:
        return _Model()
    members, others, seed = data.members, data.non_members, settings.seed
    classes = class_representatives(
        target, target.state_dict, members, others, seed=seed, device=settings.device
    )
    few = too_few(len(members.labels), len(others.labels))
    rounds = [*request.rounds, target.state_dict]
    sent = state_after(request.update, target.build_model())
    try:
        rates = measure_membership(
            target, rounds, sent, members, others, seed=seed, device=settings.device
        )
    except InputError as error:  # scikit-learn is absent, or a model has diverged.
        return _Model((), classes, (sentence(first_line(error)),))
    return _Model(rates, classes, (sentence(few),) if few else ())


def _remedies(
    request: AuditRequest,
    plan: Plan,
    attacked: Attacked,
    power: tuple[PowerSection, ...],
    stages: Stages,
    bar: tqdm,
) -> Iterator[RemedySection]:
    """The update measured again under defenses, where it leaks."""
    decision = attacked.decided(request, power)
    leaks = decision is not None and decision.verdict is Verdict.LEAKS
    if not (leaks and request.settings.remedies) or attacked.chosen is None:
        return
    alone = plan.only(attacked.sections[attacked.chosen].attack)

    def measure(update: Target) -> tuple[float, str]:
        defended = dataclasses.replace(request, target=update)
        again = attack_update(defended, alone).decided(request, power)
        return (1.0, _NO_ATTACK) if again is None else (again.p_value, again.verdict.value)

    done = stages.all_of("remedy", RemedySection)
    yield from done
    target, seed = request.target, request.settings.seed
    new = find_remedies(
        target, measure, remake=remaking(target, request.data.members, seed), seed=seed, done=done,
        budget=_REMEDIES * request.settings.budget,
    )  # fmt: skip
    _shown(bar, "remedies")
    for number, result in enumerate(new, start=len(done)):
        _shown(bar, f"remedies: {result.defense}")
        yield stages.once(f"remedy {number}", RemedySection, partial(_same, result))


def _same(result: RemedySection) -> RemedySection:
    return result


# --- Time ------------------------------------------------------------------------------------


def plan_for(request: AuditRequest) -> Plan:
    """The attacks, with as many iterations as the budget allows."""
    name = None if request.settings.attack == AUTO else request.settings.attack
    kind = get_attack(name or INVERSION)
    iterations = request.settings.iterations
    if iterations is None and issubclass(kind, OptimizationAttack):
        each = seconds_per_iteration(request)
        share = _INVERSION * request.settings.budget / len(scales_of(request.data.spec.shape))
        most = kind.published.optimiser.iterations
        iterations = int(min(most, max(_FEWEST_ITERATIONS, share / each)))
    return plan_of(name, request.target, iterations or 1, _CLOSED_FORM * request.settings.budget)


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
    attack += len(plan.closed) * plan.seconds
    plants = (request.settings.plants or _MOST_PLANTS) * len(plant_settings(request))
    if request.settings.plants is None:
        plants = min(plants, max(2, int(_PLANTS * request.settings.budget / max(attack, EDGE))))
    return attack * (1 + 2 * plants)
