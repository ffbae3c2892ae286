"""The report of the MS6 white-hat protocol, filled from an audit's record.

A hospital of a swarm attacks its own update and hands back numbers. Every number that sections 4
and 5 of the protocol ask for has its place here, by the protocol's own names; what was not measured
is said with the reason, and never left out.

Source: KatherLab/MediSwarm, docs/MS6_WHITE_HAT_PROTOCOL.md,
    https://github.com/KatherLab/MediSwarm/blob/b0bd940a9363bba53d0abfc73eb9ed46e62ce66b/docs/MS6_WHITE_HAT_PROTOCOL.md
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from audit.record import AuditRecord, ClassSection, RateSection, SimilaritySection
from audit.show.sections import (
    CHANCE,
    Table,
    deciding,
    excludes_chance,
    relative_leakage,
    sections_of,
)
from audit.show.words import DASH, count, duration, listed, percent, sentence, shape
from core.escaping import in_markdown

PROTOCOL = (
    "https://github.com/KatherLab/MediSwarm/blob/b0bd940a9363bba53d0abfc73eb9ed46e62ce66b/docs/"
    "MS6_WHITE_HAT_PROTOCOL.md"
)
NOT_MEASURED = "not measured"
# The attackers of attack A as the protocol lists them, and those on the model that the site sent,
# which it does not ask for: method, model, words.
ATTACKERS = (
    ("loss threshold", "global", "1. loss threshold on the final model"),
    ("loss trajectory", "global", "2. logistic regression on the losses of all rounds"),
    ("loss threshold", "single site", "3. loss threshold on the single-site model"),
    ("loss trajectory", "single site", "3. logistic regression, single-site model"),
    ("confidence threshold", "global", "confidence in the predicted class, final model"),
    ("confidence threshold", "single site", "confidence in the predicted class, single-site model"),
    ("loss threshold", "local", "further: loss threshold on the model that the site sent"),
    ("loss trajectory", "local", "further: logistic regression, with the model that the site sent"),
    ("confidence threshold", "local", "further: confidence, model that the site sent"),
)
# Why an attacker may be missing where others were measured.
_LACKING = {
    ("loss threshold", "global"): "no final model was given",
    ("loss trajectory", "global"): "no global models of several rounds were given (--rounds)",
    ("loss threshold", "single site"): "no model of this site's data alone (--single-site)",
    ("loss trajectory", "single site"): "not several models of it, one per round (--single-site)",
    ("loss threshold", "local"): "the model that was sent could not be measured",
    ("loss trajectory", "local"): "no global models of the rounds were given (--rounds)",
}
_NO_CLASSES = "no such model, or its outputs are no logits of classes"
_SIMILARITY = ("measure", "best match", "min", "median", "max", "99th percentile", "leaks")


def to_ms6(record: AuditRecord) -> str:
    """The whole report in Markdown."""
    parts = (
        _beginning(record), _membership(record), _reconstruction(record), _inversion(record),
        _identification(), _anything_else(record), _beyond(record),
    )  # fmt: skip
    return "\n".join(line for part in parts for line in (*part, "")).rstrip() + "\n"


def _beginning(record: AuditRecord) -> Iterator[str]:
    yield "# MS6 white-hat attack: report of one site"
    yield ""
    yield (
        f"Numbers of sections 4 and 5 of [the protocol]({PROTOCOL}), measured by one audit of one "
        "update with GradInvBench. No image, no name of a file and nothing that identifies a "
        "patient is in it."
    )
    yield ""
    yield f"**Verdict of the audit: {_cell(record.verdict)}.** {_cell(sentence(record.statement))}"


# -- A ------------------------------------------------------------------------------------------


def _membership(record: AuditRecord) -> Iterator[str]:
    yield "## A. Membership inference"
    yield ""
    yield (
        f"AUROC with a 1,000-sample bootstrap 95 % interval; chance is {CHANCE:g}, and an interval "
        "that excludes it is a finding. The trajectory is fitted on half of the cases and measured "
        "on the other half, mean of five random halves. Balanced accuracy: at the threshold that "
        "is best for the cases that it is measured on, as the protocol has it, which flatters the "
        "attack; and at the best one of one half, applied to the other half."
    )
    yield ""
    header = (
        "attacker", "class", "AUROC", "95 % CI", "balanced accuracy, best threshold",
        "threshold of the other half", "n members", "n non-members", "finding",
    )  # fmt: skip
    rows = [row for attacker in ATTACKERS for row in _attacker_rows(record, *attacker)]
    yield from _table(Table(header, tuple(rows)))


def _attacker_rows(
    record: AuditRecord, method: str, model: str, words: str
) -> Iterator[tuple[str, ...]]:
    """All classes, then each; one row with the reason where nothing was measured."""
    rates = [r for r in record.membership if (r.method, r.model) == (method, model)]
    if not rates:
        lacking = _LACKING.get((method, model), _NO_CLASSES) if record.membership else (
            "membership was not asked for, or there were too few images (see the limits)"
        )  # fmt: skip
        yield (words, "all", f"{NOT_MEASURED}: {lacking}", *[DASH] * 6)
    for rate in sorted(rates, key=lambda rate: (rate.of_class is not None, rate.of_class or 0)):
        yield (words, *_rate(rate))
    if rates and all(rate.of_class is None for rate in rates):
        yield (words, "each", f"{NOT_MEASURED}: too few images of each, or no classes", *[DASH] * 6)


def _rate(rate: RateSection) -> tuple[str, ...]:
    return (
        "all" if rate.of_class is None else str(rate.of_class),
        f"{rate.auroc:.3f}",
        f"{rate.auroc_low:.3f} to {rate.auroc_high:.3f}",
        NOT_MEASURED
        if rate.best_balanced_accuracy is None
        else (f"{rate.best_balanced_accuracy:.3f}"),
        f"{rate.balanced_accuracy:.3f}",
        str(rate.members),
        str(rate.non_members),
        "yes" if excludes_chance(rate) else "no",
    )


# -- B ------------------------------------------------------------------------------------------


def _reconstruction(record: AuditRecord) -> Iterator[str]:
    yield "## B. Reconstruction from the site's own update"
    yield ""
    used = f"{NOT_MEASURED}: it was not said (--round N)" if record.round_number is None else (
        str(record.round_number)
    )  # fmt: skip
    yield (
        f"Round used: {used}. A leak is a reconstruction whose best match exceeds the 99th "
        "percentile of the noise baseline (100 Gaussian-noise volumes); the audit's own verdict is "
        "stricter, see the end."
    )
    for attack in record.attacks:
        yield ""
        yield f"### {_cell(attack.attack)} at {shape(attack.shape)}"
        yield ""
        if not attack.similarities:
            yield _cell(sentence(f"{NOT_MEASURED}: {attack.note or 'the attack did not run'}"))
            continue
        yield (
            f"Resolution {shape(attack.shape)}, {count(attack.iterations, 'iteration')}, "
            f"{duration(attack.seconds)}."
        )
        yield ""
        yield from _table(_similarity_table(attack.similarities))
    if not record.attacks:
        yield ""
        yield f"Everything: {NOT_MEASURED}: no attack could be run on this update."


def _similarity_table(found: Sequence[SimilaritySection]) -> Table:
    """Distributions of best matches and of their baselines, a row each."""
    rows = [row for each in found for row in _similarity_rows(each)]
    rows += [
        (metric.upper(), f"{NOT_MEASURED}: not defined for samples of this shape", *[DASH] * 5)
        for metric in sorted({"ncc", "ssim"} - {each.metric for each in found})
    ]
    return Table(_SIMILARITY, tuple(rows))


def _similarity_rows(found: SimilaritySection) -> Iterator[tuple[str, ...]]:
    measure = found.metric.upper()
    leaks = f"{found.above_noise} of {len(found.best_member)}"
    yield (measure, "reconstructions, training cases", *_distribution(found.best_member), leaks)
    yield (measure, "control: held-out cases", *_distribution(found.best_non_member), DASH)
    *ends, _ = _distribution(found.noise)
    yield (measure, f"baseline: {len(found.noise)} of noise", *ends, f"{found.noise_99:.3f}", DASH)
    yield (
        measure,
        "baseline: mean image of held-out cases",
        DASH,
        DASH,
        f"{found.mean_image:.3f}",
        DASH,
        DASH,
    )
    prior = f"{NOT_MEASURED}: the attack starts from none" if found.prior_image is None else (
        f"{found.prior_image:.3f}"
    )  # fmt: skip
    yield (measure, "baseline: prior image", DASH, DASH, prior, DASH, DASH)


def _distribution(values: Sequence[float]) -> tuple[str, ...]:
    """Minimum, median, maximum and 99th percentile."""
    if not values:
        return (f"{NOT_MEASURED}: none was made", *[DASH] * 3)
    numbers = (min(values), np.median(values), max(values), np.percentile(values, 99))
    return tuple(f"{float(number):.3f}" for number in numbers)


# -- C, D, and what belongs to all ----------------------------------------------------------------


def _inversion(record: AuditRecord) -> Iterator[str]:
    yield "## C. Model inversion of the global model"
    yield ""
    if not record.classes:
        yield "Not run."
        return
    restarts = max((len(s.best_member) for c in record.classes for s in c.similarities), default=0)
    yield (
        f"{count(restarts, 'restart')} for each of {len(record.classes)} classes, each compared "
        "with the cases of its class: the same similarity summary as in B over all of them, then "
        "of every class."
    )
    yield ""
    found = [s for each in record.classes for s in each.similarities]
    rows = [row for m in dict.fromkeys(s.metric for s in found) for row in _pooled(m, found)]
    yield from _table(Table(_SIMILARITY, tuple(rows)))
    yield ""
    header = (
        "class", "confidence", "measure", "training cases", "control: held-out cases",
        "noise, 99th percentile", "mean image", "leaks",
    )  # fmt: skip
    rows = [_representative(each, s) for each in record.classes for s in each.similarities]
    yield from _table(Table(header, tuple(rows)))


def _pooled(metric: str, found: Iterable[SimilaritySection]) -> Iterator[tuple[str, ...]]:
    """The distribution over all representatives, of one measure."""
    own = [s for s in found if s.metric == metric]
    members = [value for s in own for value in s.best_member]
    others = [value for s in own for value in s.best_non_member]
    leaks = f"{sum(s.above_noise for s in own)} of {len(members)}"
    yield (metric.upper(), "representatives, training cases", *_distribution(members), leaks)
    yield (metric.upper(), "control: held-out cases", *_distribution(others), DASH)


def _representative(each: ClassSection, found: SimilaritySection) -> tuple[str, ...]:
    return (
        str(each.of_class),
        percent(each.confidence),
        found.metric.upper(),
        _distribution(found.best_member)[2],
        _distribution(found.best_non_member)[2],
        f"{found.noise_99:.3f}",
        f"{found.mean_image:.3f}",
        f"{found.above_noise} of {len(found.best_member)}",
    )


def _identification() -> Iterator[str]:
    yield "## D. Site identification with the weights"
    yield ""
    yield "Not a task of a site."


def _anything_else(record: AuditRecord) -> Iterator[str]:
    yield "## Any: changes and time"
    yield ""
    yield (
        f"- Changed in the scaffold: all of it; the attacks are those of GradInvBench "
        f"{_cell(record.program_version or 'of an unknown version')}, seed {record.seed}."
    )
    yield f"- Whole audit: {duration(record.seconds)}."
    for attack in record.attacks:
        yield f"- B, {_cell(attack.attack)} at {shape(attack.shape)}: {duration(attack.seconds)}."
    for letter, seconds in (("A", record.membership_seconds), ("C", record.classes_seconds)):
        yield f"- {letter}: {NOT_MEASURED if seconds is None else duration(seconds)}."


def _beyond(record: AuditRecord) -> Iterator[str]:
    """What the audit measured and the protocol does not ask for: controls, power, remedies."""
    yield "## Beyond the protocol: what the numbers are worth"
    yield ""
    attack = deciding(record)
    for found in attack.similarities if attack else ():
        value = relative_leakage(found)
        if found.metric == "ssim" and value is not None:
            yield f"- Relative data leakage value of the best reconstruction: {value:.3f}."
    yield f"- The attacker was told: {_cell(listed(record.granted))}."
    for section in sections_of(record):
        if section.key in ("verdict", "update", "labels", "power", "remedies", "limits"):
            yield ""
            yield f"### {_cell(section.title)}"
            yield ""
            yield from (f"- {_cell(each)}" for each in section.sentences)
            if section.table is not None:
                yield ""
                yield from _table(section.table)


# -- Markdown ---------------------------------------------------------------------------------


def _table(table: Table) -> Iterator[str]:
    yield _row(table.header)
    yield _row([":---"] * len(table.header))
    yield from map(_row, table.rows)


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(map(_cell, cells))} |"


def _cell(text: str) -> str:
    return in_markdown(text)
