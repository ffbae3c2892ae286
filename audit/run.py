"""An audit: what does this update give away of the images that it was trained on?

    the received model -> labels -> attacks -> the test that decides -> power -> verdict
        -> membership -> remedies

Every stage draws its random numbers from the request's seed and is kept as numbers, so that an
interrupted audit goes on where it was.
"""

from __future__ import annotations

import dataclasses
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tqdm import tqdm

from audit.attacked import Attacked, attack_update
from audit.attempts import Plan
from audit.class_representatives import class_representatives
from audit.decision import Verdict
from audit.labels import KnownLabels, known_labels
from audit.membership import measure_membership, too_few
from audit.planning import REMEDIES_SHARE, cuts_of, plan_for, with_forecast
from audit.power import Shown, measure_power
from audit.received import state_after
from audit.record import (
    AuditRecord,
    ClassSection,
    PowerSection,
    RateSection,
    ReceivedSection,
    RemedySection,
    UntriedSection,
    UpdateSection,
)
from audit.remedies import find_remedies, remaking
from audit.request import AuditRequest
from audit.show.received import words_of
from audit.show.words import duration, sentence
from audit.stages import Stages
from audit.suspicion import look_at_request
from core.errors import InputError, first_line
from core.processes import distributed
from core.target import Target
from core.version import __version__
from gradients.shared_update import SharedUpdate
from gradients.update_traces import Trace


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
    with _bar(progress) as bar:
        received = stages.once(
            "received", ReceivedSection, lambda: request.looked or look_at_request(request)
        )
        if not bar.disable:
            bar.write(words_of(received), file=sys.stderr)
        plan = stages.once("plan", Plan, lambda: plan_for(request))
        labels = stages.once("labels", KnownLabels, lambda: known_labels(request))
        if not bar.disable:
            bar.write(announced(request, plan), file=sys.stderr)
        shown = partial(_show, bar)
        shown("attack")
        found = stages.once("attack", Attacked, lambda: attack_update(request, plan))
        power = tuple(measure_power(request, plan, found, stages, shown))
        decision = found.decided(request, power)
        shown("membership")
        others = stages.once("model", _Model, lambda: _measure_model(request, plan))
        searched = list(_remedies(request, plan, found, power, stages, shown))
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
        remedies=tuple(each for each in searched if isinstance(each, RemedySection)),
        untried=tuple(each for each in searched if isinstance(each, UntriedSection)),
        granted=_granted(request, labels),
        warnings=(*request.warnings, *cuts_of(request, plan), *others.warnings),
        seed=request.settings.seed,
        seconds=time.perf_counter() - began,
        program_version=__version__,
        round_number=request.settings.round_number,
        membership_seconds=others.membership_seconds,
        classes_seconds=others.classes_seconds,
        received=received,
    )


def announced(request: AuditRequest, plan: Plan) -> str:
    """How long an audit takes, in a sentence, before it starts."""
    plan = plan if plan.forecast else with_forecast(request, plan)
    more = ""
    if request.settings.remedies:
        search = duration(REMEDIES_SHARE * request.settings.budget)
        more = f", and up to {search} more to look for what helps, if it leaks"
    return f"This takes about {duration(plan.forecast)}{more}."


_NO_ATTACK = Verdict.CANNOT_TELL.value
_NOTHING_RAN = "cannot tell: no attack could be run on this update"


def _bar(shown: bool) -> tqdm:
    """Counts attacks: how many there will be depends on what is found."""
    return tqdm(desc="audit", unit=" stages", disable=not (shown and distributed.rank() == 0))


def _show(bar: tqdm, stage: str) -> None:
    bar.update()
    bar.set_postfix_str(stage)


# --- The update ------------------------------------------------------------------------


def update_section(update: SharedUpdate) -> UpdateSection:
    """What the update holds, for the record."""
    entries = [entry for entry in update.entries if entry.kind == "shared"]
    changed = [update.change[entry.name] for entry in entries]
    before = math.hypot(*(entry.norm_before for entry in entries))
    noise = next((f.value for f in update.findings if f.trace is Trace.NOISE and f.certain), None)
    count = sum(value.numel() for value in changed)
    whole = noise * count**0.5 if noise else 0.0
    return UpdateSection(
        shared_parameters=count,
        shared_tensors=len(entries),
        unchanged_tensors=len(update.names("unchanged")) + len(update.names("absent")),
        running_statistics=update.running_after() is not None,
        norm=update.norm,
        relative_norm=update.norm / max(before, 1e-12),
        number_format=", ".join(sorted({entry.number_format for entry in entries})),
        noise=noise,
        # Norms of what is independent add as squares.
        signal_to_noise=max(update.norm**2 - whole**2, 0.0) ** 0.5 / whole if whole else None,
        findings=tuple(map(str, update.findings)),
    )


def _granted(request: AuditRequest, labels: KnownLabels) -> tuple[str, ...]:
    told = ["number of images and of local steps", "the local training"]
    if labels.granted:
        told.append("what the images were labelled with")
    if request.local.order_told:
        told.append("which images shared which local steps")
    return tuple(told)


# --- The model, and what to do --------------------------------------------------------------


@dataclass(frozen=True)
class _Model:
    """What the models give away beside the update, and why it was not measured."""

    membership: tuple[RateSection, ...] = ()
    classes: tuple[ClassSection, ...] = ()
    warnings: tuple[str, ...] = ()
    membership_seconds: float | None = None
    classes_seconds: float | None = None


def _measure_model(request: AuditRequest, plan: Plan) -> _Model:
    """Membership by losses, and class representatives of the global model."""
    settings, target = request.settings, request.target
    if not settings.membership:
        return _Model()
    began = time.perf_counter()
    classes = class_representatives(
        target, request.trajectory[-1], request.data.members, request.data.non_members,
        restarts=plan.restarts, compared=plan.compared, seed=settings.seed, device=settings.device,
    )  # fmt: skip
    between = time.perf_counter()
    rates, limit = _membership_rates(request)
    return _Model(
        rates, classes, (sentence(limit),) if limit else (),
        membership_seconds=time.perf_counter() - between if rates else None,
        classes_seconds=between - began if classes else None,
    )  # fmt: skip


def _membership_rates(request: AuditRequest) -> tuple[tuple[RateSection, ...], str]:
    """What is measured, and what keeps it from being measured."""
    settings, target = request.settings, request.target
    members, others = request.data.members, request.data.non_members
    sent = state_after(request.update, target.build_model())
    try:
        rates = measure_membership(
            target, request.trajectory, sent, members, others, single_site=request.single_site,
            seed=settings.seed, device=settings.device,
        )  # fmt: skip
    except InputError as error:  # scikit-learn is absent, or a model has diverged.
        return (), first_line(error)
    return rates, too_few(len(members.labels), len(others.labels))


def _remedies(
    request: AuditRequest,
    plan: Plan,
    attacked: Attacked,
    power: tuple[PowerSection, ...],
    stages: Stages,
    shown: Shown,
) -> Iterator[RemedySection | UntriedSection]:
    """The update measured again under defenses, where it leaks, and what there was no time for."""
    decision = attacked.decided(request, power)
    leaks = decision is not None and decision.verdict is Verdict.LEAKS
    if not (leaks and request.settings.remedies) or attacked.chosen is None:
        return
    name = attacked.sections[attacked.chosen].attack
    # A closed form breaks where an inversion does not: under a defense every attack has its turn.
    tried = plan if name in plan.closed else plan.only(name)

    def measure(update: Target) -> tuple[float, str]:
        defended = dataclasses.replace(request, target=update)
        again = attack_update(defended, tried).decided(request, power)
        return (1.0, _NO_ATTACK) if again is None else (again.p_value, again.verdict.value)

    done = stages.all_of("remedy", RemedySection)
    yield from done
    target, seed = request.target, request.settings.seed
    new = find_remedies(
        target, measure, remake=remaking(target, request.data.members, seed), seed=seed, done=done,
        budget=REMEDIES_SHARE * request.settings.budget - sum(each.seconds for each in done),
        longest=sum(section.seconds for section in attacked.sections),
    )  # fmt: skip
    shown("remedies")
    for number, result in enumerate(new, start=len(done)):
        if isinstance(result, UntriedSection):
            yield result
            continue
        shown(f"remedies: {result.defense}")
        yield stages.once(f"remedy {number}", RemedySection, partial(_same, result))


def _same(result: RemedySection) -> RemedySection:
    return result
