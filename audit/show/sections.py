"""What is told of an audit, in order and in plain words: the content of the page and of the HTML.

Each section is sentences and a table. A term of statistics is explained in the section where it
occurs first, whichever that is.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from audit.decision import Verdict
from audit.permutations import non_members_needed_per_image
from audit.record import (
    AttackSection,
    AuditRecord,
    LabelSection,
    LocalSection,
    RateSection,
    ReceivedSection,
    RemedySection,
    SimilaritySection,
    TestSection,
    UntriedSection,
    UpdateSection,
)
from audit.show.received import words_of
from audit.show.words import (
    DASH,
    count,
    duration,
    listed,
    middle_and_largest,
    optional,
    p_text,
    percent,
    sentence,
    shape,
)

CHANCE = 0.5

# A term, as it is found in a text, and what it means.
GLOSSARY = (
    (r"\bp(-value\b| = )", "p-value: how often chance alone gives a result at least as clear. Of "
     "audits of updates that give nothing away, at most the share of the level says \"leaks\"."),
    (r"\b(NCC|SSIM)\b", "NCC (normalised cross-correlation) and SSIM (structural similarity) say "
     "how alike two pictures are: 1: the same; 0: nothing in common."),
    (r"\b(TOKENS|PLACES)\b", "TOKENS: the share of a sentence's tokens that the other has, in any "
     "order; PLACES: that are the same in their places. Where this page says image, it means a "
     "sentence."),
    (r"\bCELLS\b", "CELLS: the share of a record's cells that are right, a number within 0.319 "
     "standard deviations. Where this page says image, it means a record."),
    (r"\bRDLV\b", "RDLV (relative data leakage value): how much higher the best SSIM is than that "
     "of what is public, relative to the latter. 0 or less: no better than what is public."),
    (r"\bAUROC\b", "AUROC: how often a member is ranked before a non-member. 0.5: guessing; "
     "1: always."),
    (r"\bcosine\b", "Cosine: 1: the update points where it did; 0: nothing of it is left."),
    (r"\bepsilon\b", "Epsilon: what differential privacy promises against any attack: below 1 "
     "much, above 10 little."),
)  # fmt: skip
MEANING = {
    Verdict.LEAKS.value: (
        "What was computed from this update alone resembles the images of the training more than "
        "it resembles other images of the same site. Whoever receives the update can do the same."
    ),
    Verdict.NO_LEAK_FOUND.value: (
        "The attack got nothing of these images out of this update, and it does find images that "
        "were planted (see its power). A stronger attack may find what this one does not."
    ),
    Verdict.CANNOT_TELL.value: (
        "Nothing was found, and that is no good news: it is not shown that a leak would have been "
        "found. Treat the update as one that was not examined."
    ),
}


@dataclass(frozen=True)
class Table:
    """Names of columns, and rows of texts."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Section:
    """A part of what is told.

    Attributes:
        key: Names it, for figures and anchors.
        title: Its heading.
        sentences: In order.
        table: Its numbers; None where there are none.
    """

    key: str
    title: str
    sentences: tuple[str, ...]
    table: Table | None = None


def sections_of(record: AuditRecord) -> tuple[Section, ...]:
    """Everything that is told of an audit: the verdict, what to do, and then the evidence."""
    told = (
        _verdict(record),
        _received(record.received),
        _remedies(record),
        _attacks(record),
        _power(record),
        _labels(record.labels),
        _membership(record.membership),
        _classes(record),
        _update(record.update, record.local),
        _limits(record),
    )
    return tuple(_explained(told))


def _explained(sections: Iterable[Section]) -> Iterator[Section]:
    """The sections, each term explained in the one where it occurs first."""
    terms = list(GLOSSARY)
    for section in sections:
        words = " ".join([*section.sentences, *_cells(section.table)])
        new = [term for term in terms if re.search(term[0], words)]
        terms = [term for term in terms if term not in new]
        meanings = tuple(meaning for _, meaning in new)
        yield dataclasses.replace(section, sentences=section.sentences + meanings)


def _cells(table: Table | None) -> list[str]:
    return [] if table is None else [*table.header, *(cell for row in table.rows for cell in row)]


def deciding(record: AuditRecord) -> AttackSection | None:
    """The attack whose test decides, the only one that is tested; None where none could be."""
    return next((attack for attack in record.attacks if attack.test is not None), None)


# -- The verdict -------------------------------------------------------------------------


def _verdict(record: AuditRecord) -> Section:
    attack = deciding(record)
    test = None if attack is None else attack.test
    rests = [*_rests_on(test)] if test else ["No attack could be tested against non-members."]
    warned = words_of(record.received) if record.received and record.received.suspicious else ""
    sentences = (sentence(record.statement), warned, MEANING.get(record.verdict, ""), *rests)
    return Section("verdict", f"Verdict: {record.verdict}", tuple(filter(None, sentences)))


def _rests_on(test: TestSection) -> Iterator[str]:
    yield (
        f"It rests on one test: {count(test.members, 'member')} (images of the training) against "
        f"{count(test.non_members, 'non-member')} (images of the same site that were not in it), "
        f"membership permuted {test.memberships:,} ways. The p-value is {p_text(test.p_value)}; up "
        f"to {test.alpha:g} counts as a leak, and the smallest possible was "
        f"{p_text(test.smallest)}."
    )
    if test.per_image:
        yield (
            f"{test.standing_out} of {count(len(test.per_image), 'member')} stand out by "
            f"themselves (Holm's correction for looking at many).{_too_few_for_one(test)}"
        )


def _too_few_for_one(test: TestSection) -> str:
    """How many non-members it takes to single one member out, where there are fewer."""
    if not test.members or not 0 < test.alpha < 1:
        return ""
    needed = non_members_needed_per_image(test.members, test.alpha)
    enough = test.non_members >= needed
    return "" if enough else f" To single one out takes {needed:,} non-members of its class."


# -- What was received ----------------------------------------------------------------------


def _received(received: ReceivedSection | None) -> Section:
    title = "What the site received"
    if received is None:
        unknown = "Whether that model was made to leak was not examined."
        return Section("received", title, (unknown,))
    rows = tuple(
        (each.detector, optional(each.score), optional(each.threshold), "yes" if each.alarm else "")
        for each in received.detectors
    )
    header = ("detector", "score", "threshold", "alarm")
    return Section("received", title, (words_of(received),), Table(header, rows) if rows else None)


# -- What there is -------------------------------------------------------------------------


def _update(update: UpdateSection, local: LocalSection) -> Section:
    statistics = "are part of it" if update.running_statistics else "are not part of it"
    sentences = [
        f"{update.shared_parameters:,} numbers ({update.number_format}) in "
        f"{count(update.shared_tensors, 'tensor')} are shared, and "
        f"{count(update.unchanged_tensors, 'tensor')} did not change. The length (L2 norm) is "
        f"{update.norm:.4g}, {percent(update.relative_norm)} of the model's. Statistics of "
        f"BatchNorm {statistics}.",
        _noise(update),
        f"Local training as the attack reckons with it: {local.optimiser}, learning rate "
        f"{local.learning_rate:g}, {count(local.steps, 'step')} with "
        f"{count(local.batch_size, 'image')} each. Told by the site: {_named(local.told)}; "
        f"estimated: {_named(local.estimated)}.",
        *(sentence(f"Seen in its values: {finding}") for finding in update.findings),
    ]
    return Section("update", "What the update holds", tuple(sentences))


def _named(fields: Iterable[str]) -> str:
    return listed(field.replace("_", " ") for field in fields)


def _noise(update: UpdateSection) -> str:
    if update.noise is None:
        return "No noise was seen in it."
    ratio = update.signal_to_noise
    against = "" if ratio is None else f"; what is not noise is {ratio:.3g} times as long"
    return f"Noise was seen in it: standard deviation {update.noise:.3g}{against}."


def _labels(labels: LabelSection | None) -> Section:
    title = "Which classes it betrays"
    if labels is None:
        return Section("labels", title, ("Not measured: the client has no classes.",))
    sentences = [sentence(labels.note)] if labels.note else []
    if labels.accuracy is not None:
        chance = "" if labels.chance is None else (
            f" A guess that knows how common each class is: {percent(labels.chance)}."
        )  # fmt: skip
        sentences.append(
            f"The rule {labels.rule} reads the classes of {percent(labels.accuracy)} of the images "
            f"from the update alone.{chance}"
        )
    return Section("labels", title, tuple(sentences), _label_table(labels))


def _label_table(labels: LabelSection) -> Table | None:
    true, found = labels.true_counts, labels.recovered_counts
    present = [k for k in range(max(len(true), len(found))) if _at(true, k) or _at(found, k)]
    rows = [(str(k), str(_at(true, k)), str(_at(found, k)) if found else DASH) for k in present]
    header = ("class", "in the training", "read from the update")
    return Table(header, tuple(rows)) if rows else None


def _at(counts: Sequence[int], index: int) -> int:
    return counts[index] if index < len(counts) else 0


# -- The attack, its references and its power ------------------------------------------------


def _attacks(record: AuditRecord) -> Section:
    title = "What was reconstructed, against three references"
    notes = [f"{a.attack} at {shape(a.shape)}: {a.note}" for a in record.attacks if a.note]
    failed = list(map(sentence, notes))
    decides = deciding(record)
    # The attack that decides comes first, so that a short page has it.
    ran = sorted((a for a in record.attacks if a.similarities), key=lambda a: a is not decides)
    if not ran:
        return Section("attacks", title, ("Nothing was reconstructed.", *failed))
    noise = len(ran[0].similarities[0].noise)
    sentences = [
        "Of every reconstruction the most similar image counts (median / largest). Three "
        f"references say what that is worth: {count(noise, 'image')} of pure noise (99th "
        "percentile), what is public (the mean of the non-members, or the image that the attack "
        "starts from), and the non-members themselves, which decide.",
        *_relative_leakage(decides),
        *failed,
    ]
    rows = tuple(_attack_row(attack, s) for attack in ran for s in attack.similarities)
    header = (
        "attack", "shape", "", "members", "non-members", "noise", "above it", "public", "p-value",
    )  # fmt: skip
    return Section("attacks", title, tuple(sentences), Table(header, rows))


def _relative_leakage(attack: AttackSection | None) -> Iterator[str]:
    found = attack.similarities if attack else ()
    for s in (s for s in found if s.metric == "ssim" and s.best_member):
        value = relative_leakage(s)
        if value is not None:
            yield f"RDLV of the best reconstruction: {value:.2f}."


def relative_leakage(found: SimilaritySection) -> float | None:
    """How much better than public knowledge the best match is; None where that is not positive."""
    public = public_knowledge(found)
    return (max(found.best_member) - public) / public if public > 0 and found.best_member else None


def public_knowledge(found: SimilaritySection) -> float:
    """Similarity of the mean image or of the prior image, whichever is higher."""
    prior = found.mean_image if found.prior_image is None else found.prior_image
    return max(found.mean_image, prior)


def _attack_row(attack: AttackSection, found: SimilaritySection) -> tuple[str, ...]:
    return (
        attack.attack,
        shape(attack.shape),
        found.metric.upper(),
        middle_and_largest(found.best_member),
        middle_and_largest(found.best_non_member),
        f"{found.noise_99:.2f}",
        f"{found.above_noise} of {len(found.best_member)}",
        f"{public_knowledge(found):.2f}",
        DASH if attack.test is None else p_text(attack.test.p_value),
    )


def _power(record: AuditRecord) -> Section:
    title = "What the attack would have found"
    if not record.power:
        said = "No image was planted, so it is not known what the attack would have found."
        return Section("power", title, (said,))
    said = "Known images were planted in updates of the same model and attacked in the same way."
    rows = tuple(
        (p.attack, str(p.batch_size), str(p.steps), f"{p.found} of {p.of}",
         f"{p.best_similarity:.2f}")
        for p in record.power
    )  # fmt: skip
    header = ("attack", "batch size", "local steps", "found", "best match")
    return Section("power", title, (said,), Table(header, rows))


# -- The model ---------------------------------------------------------------------------------


_NOT_ASKED = "Not measured: it was not asked for, or what it takes was not given (see the limits)."


def _membership(rates: Sequence[RateSection]) -> Section:
    title = "Does the model betray who was in the training?"
    if not rates:
        return Section("membership", title, (_NOT_ASKED,))
    whole = [rate for rate in rates if rate.of_class is None]
    findings = [rate for rate in whole if excludes_chance(rate)]
    sentences = (
        "Members are told from non-members by how well the model fits them. An interval without "
        f"{CHANCE:g} is a finding: {len(findings)} of the {count(len(whole), 'row')} over all "
        "classes.",
    )
    ordered = [*whole, *(rate for rate in rates if rate.of_class is not None)]
    header = (
        "by", "model", "class", "AUROC", "95 % interval", "balanced accuracy", "members",
        "non-members",
    )  # fmt: skip
    rows = tuple(_rate_row(rate) for rate in ordered)
    return Section("membership", title, sentences, Table(header, rows))


def excludes_chance(rate: RateSection) -> bool:
    """Whether the interval excludes guessing: the protocol's finding."""
    return not rate.auroc_low <= CHANCE <= rate.auroc_high


def _rate_row(rate: RateSection) -> tuple[str, ...]:
    return (
        rate.method,
        rate.model,
        "all" if rate.of_class is None else str(rate.of_class),
        f"{rate.auroc:.2f}",
        f"{rate.auroc_low:.2f} to {rate.auroc_high:.2f}",
        f"{rate.balanced_accuracy:.2f}",
        str(rate.members),
        str(rate.non_members),
    )


def _classes(record: AuditRecord) -> Section:
    title = "Do the model's own pictures of a class resemble patients?"
    if not record.classes:
        return Section("classes", title, (_NOT_ASKED,))
    restarts = max((len(s.best_member) for c in record.classes for s in c.similarities), default=0)
    said = (
        f"Inputs that the model takes for the class ({count(restarts, 'restart')} each) are "
        "measured as reconstructions are (median / largest)."
    )
    rows = tuple(
        (str(c.of_class), percent(c.confidence), s.metric.upper(),
         middle_and_largest(s.best_member), middle_and_largest(s.best_non_member),
         f"{s.noise_99:.2f}",
         f"{s.above_noise} of {len(s.best_member)}")
        for c in record.classes for s in c.similarities
    )  # fmt: skip
    header = ("class", "confidence", "", "members", "non-members", "noise 99 %", "above it")
    return Section("classes", title, (said,), Table(header, rows))


# -- What follows ------------------------------------------------------------------------------


def _remedies(record: AuditRecord) -> Section:
    title = "What to do"
    if not record.remedies:
        sentences = (_advice(record.verdict), *_left_untried(record.untried))
        return Section("remedies", title, sentences)
    said = (
        "The same update was attacked again under defenses that a site can switch on, each kind "
        "from its weakest strength up to the first after which nothing is found."
    )
    rows = tuple(
        (remedy_name(r), r.verdict, p_text(r.p_value), optional(r.cosine), optional(r.epsilon),
         "yes" if r.enough else "no")
        for r in record.remedies
    )  # fmt: skip
    header = ("defense, as it is set", "verdict", "p-value", "cosine", "epsilon", "enough")
    sentences = (said, *_found_enough(record), *_left_untried(record.untried))
    return Section("remedies", title, sentences, Table(header, rows))


def _found_enough(record: AuditRecord) -> Iterator[str]:
    """What helps; of what does not, whether all of it was tried."""
    enough = smallest_enough(record.remedies)
    if enough:
        words = "; ".join(map(_remedy_words, enough))
        yield (
            f"Nothing is found any more with: {words}. One attack decides that once: a strength "
            "above the smallest is the safer one."
        )
    elif record.untried:
        yield "Of what was tried nothing was enough, and not all was tried."
    else:
        yield (
            "Nothing of all that was tried is enough: train with a stronger differential privacy, "
            "or share less."
        )


def _left_untried(untried: Sequence[UntriedSection]) -> Iterator[str]:
    if untried:
        words = "; ".join(f"{each.defense}: {each.setting}" for each in untried)
        yield (
            "The time of the audit (--budget) ended the search. Not tried, from this strength on: "
            f"{words}. A larger budget goes further."
        )


def _advice(verdict: str) -> str:
    if verdict == Verdict.LEAKS.value:
        return (
            "No defense was tried on it. Do not send the update as it is: try noise, clipping, "
            "larger batches or fewer shared layers, and audit again."
        )
    if verdict == Verdict.CANNOT_TELL.value:
        return "Audit again with more non-members, or with more time, until it can be told."
    return "Nothing was found that calls for it. Audit again when model or training change."


def smallest_enough(remedies: Sequence[RemedySection]) -> list[RemedySection]:
    """Of each defense, the one of those that are enough which changes the update least."""
    first: dict[str, RemedySection] = {}
    for remedy in (remedy for remedy in remedies if remedy.enough):
        kept = first.setdefault(remedy.defense, remedy)
        if (remedy.cosine or -1.0) > (kept.cosine or -1.0):
            first[remedy.defense] = remedy
    return list(first.values())


def _remedy_words(remedy: RemedySection) -> str:
    words = remedy_name(remedy)
    return words if remedy.cosine is None else f"{words} (cosine {remedy.cosine:.2f})"


def remedy_name(remedy: RemedySection) -> str:
    """Name, strength and unit as a site sets it."""
    return f"{remedy.defense}: {remedy.setting or f'{remedy.strength:.3g}'}"


def _limits(record: AuditRecord) -> Section:
    granted = (
        "The attacker was told what a server does not see, so that the audit errs on the safe "
        f"side: {listed(record.granted)}."
    )
    version = record.program_version or "of an unknown version"
    of_round = "" if record.round_number is None else f" (round {record.round_number})"
    sentences = (
        *map(sentence, record.warnings),
        *([granted] if record.granted else []),
        f"It is one update of one round{of_round}, against the attacks of today; it is no "
        "guarantee.",
        f"Made by GradInvBench {version} in {duration(record.seconds)}, seed {record.seed}, record "
        f"version {record.schema_version}.",
    )
    return Section("limits", "What limits this audit", sentences)
