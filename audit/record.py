"""What an audit found, as numbers: the record that leaves a site.

`audit.json` is this record and nothing else. It is an allow-list: every field is a number, a
name from this project (an attack, a metric, a defense), a shape or a sentence that this project
wrote. No pixel, no file name and no path has a place in it.
"""

from __future__ import annotations

from dataclasses import dataclass

SCHEMA_VERSION = 2


@dataclass(frozen=True)
class DetectorSection:
    """What one detector says of the model that the site received.

    Attributes:
        detector: Its registered name.
        score: Higher is more suspicious; None: the model cannot be computed with.
        threshold: Above it is an alarm; None: no honest round could be computed with.
        alarm: Whether it is one, for this detector alone.
    """

    detector: str
    score: float | None
    threshold: float | None
    alarm: bool


@dataclass(frozen=True)
class ReceivedSection:
    """Whether the model that the site received was made to leak, said before anything is trained.

    Attributes:
        compared: Whether it was compared with the model of the round before.
        rounds: Honest rounds that the site made to compare with; 0: none, see `note`.
        p_value: How unusual the model is among them, by all detectors together; None: unknown.
        false_alarm: Honest models that would be called suspicious, at most; None: unknown.
        suspicious: Whether it is.
        detectors: What each of them says.
        note: Why nothing is known, in a sentence; empty where it is.
    """

    compared: bool
    rounds: int
    p_value: float | None
    false_alarm: float | None
    suspicious: bool
    detectors: tuple[DetectorSection, ...]
    note: str = ""


@dataclass(frozen=True)
class UpdateSection:
    """What the update holds, and what was done to it before.

    Attributes:
        shared_parameters: Numbers that are shared, buffers not counted.
        shared_tensors: Tensors that changed.
        unchanged_tensors: Parameters that did not change (frozen, or not shared).
        running_statistics: Whether BatchNorm statistics are in it.
        norm: L2 norm of the difference.
        relative_norm: The same over the norm of the global model.
        number_format: Such as "float32".
        noise: Standard deviation of noise that was seen; None where none was.
        signal_to_noise: Norm of what is not noise over the noise's; None without noise.
        findings: What a filter did, one sentence each ("sparse: 90 % of the elements are 0").
    """

    shared_parameters: int
    shared_tensors: int
    unchanged_tensors: int
    running_statistics: bool
    norm: float
    relative_norm: float
    number_format: str
    noise: float | None = None
    signal_to_noise: float | None = None
    findings: tuple[str, ...] = ()


@dataclass(frozen=True)
class LocalSection:
    """The local training that the attack reckons with.

    Attributes:
        optimiser: Such as "sgd" or "adamw".
        learning_rate: Of its steps.
        steps: Local steps.
        batch_size: Images per step.
        told: Names of the attributes that the site stated.
        estimated: Names of those that were estimated from the update, or assumed.
    """

    optimiser: str
    learning_rate: float
    steps: int
    batch_size: int
    told: tuple[str, ...] = ()
    estimated: tuple[str, ...] = ()


@dataclass(frozen=True)
class LabelSection:
    """Which classes the update betrays, against the truth.

    Attributes:
        rule: Name of the label rule.
        true_counts: Images per class; index is the class.
        recovered_counts: The same as the rule sees it.
        accuracy: Share of the images whose class was recovered (multiset overlap).
        chance: The same for a guess that knows the class shares of the non-members.
        note: Why a rule does not apply, in a sentence; empty where it does.
    """

    rule: str
    true_counts: tuple[int, ...]
    recovered_counts: tuple[int, ...]
    accuracy: float | None
    chance: float | None
    note: str = ""


@dataclass(frozen=True)
class SimilaritySection:
    """One similarity of reconstructions and images, beside its three references.

    Attributes:
        metric: "ncc" or "ssim"; of sentences "tokens" and "places", of a table's records "cells".
        best_member: Per reconstruction, similarity of its best match among members.
        best_non_member: Per reconstruction, of its best match among non-members.
        noise: Best match among members of each of the noise images.
        noise_99: Their 99th percentile.
        above_noise: Reconstructions above it: the protocol's count of leaks.
        mean_image: Best match of the non-members' mean image among members.
        prior_image: Of the prior image that the attack starts from; None without one.
    """

    metric: str
    best_member: tuple[float, ...]
    best_non_member: tuple[float, ...]
    noise: tuple[float, ...]
    noise_99: float
    above_noise: int
    mean_image: float
    prior_image: float | None = None


@dataclass(frozen=True)
class TestSection:
    """The test that decides: members against non-members.

    Attributes:
        p_value: By permutation of membership, of one statistic.
        smallest: The smallest that it could have given.
        alpha: Its level.
        memberships: How many memberships it rests on.
        members: How many.
        non_members: How many.
        per_image: p-value of each member, Holm's correction applied.
        standing_out: How many members stand out by themselves.
    """

    p_value: float
    smallest: float
    alpha: float
    memberships: int
    members: int
    non_members: int
    per_image: tuple[float, ...]
    standing_out: int


@dataclass(frozen=True)
class AttackSection:
    """One attack at one scale.

    Attributes:
        attack: Its registered name.
        shape: Of the images that it reconstructs, channels first.
        iterations: Done.
        objectives: What it minimises, at each reconstruction.
        seconds: Wall-clock time.
        similarities: By metric.
        test: None where the test could not be made.
        note: What kept the attack from running, in a sentence; empty where it ran.
    """

    attack: str
    shape: tuple[int, ...]
    iterations: int
    objectives: tuple[float, ...]
    seconds: float
    similarities: tuple[SimilaritySection, ...]
    test: TestSection | None
    note: str = ""


@dataclass(frozen=True)
class PowerSection:
    """What the same attack finds of known images that were planted in an update.

    Attributes:
        attack: Its registered name.
        batch_size: Images of the planted update.
        steps: Its local steps.
        found: Plants that the test called a leak.
        of: All plants.
        best_similarity: Mean over plants of the best match, by the first similarity.
    """

    attack: str
    batch_size: int
    steps: int
    found: int
    of: int
    best_similarity: float


@dataclass(frozen=True)
class RateSection:
    """How well members are told from non-members.

    Attributes:
        method: "loss threshold", "loss trajectory" or "confidence threshold".
        model: "global", "local" (what the site sent) or "single site".
        auroc: Area under the ROC curve.
        auroc_low: Lower end of its 95 % bootstrap interval.
        auroc_high: Upper end.
        balanced_accuracy: At the threshold that was learned on the other half.
        of_class: The class that it is restricted to; None: all.
        members: How many.
        non_members: How many.
        best_balanced_accuracy: At the threshold that is best for the very images that it is
            measured on, as the MS6 protocol reports it: too high, by how much nobody knows.
    """

    method: str
    model: str
    auroc: float
    auroc_low: float
    auroc_high: float
    balanced_accuracy: float
    of_class: int | None
    members: int
    non_members: int
    best_balanced_accuracy: float | None = None


@dataclass(frozen=True)
class ClassSection:
    """Class representatives of the model, measured as reconstructions are.

    Attributes:
        of_class: The class.
        confidence: The model's probability of it, at the restart that it is surest of.
        similarities: By metric, with a value for each restart, the surest first.
    """

    of_class: int
    confidence: float
    similarities: tuple[SimilaritySection, ...]


@dataclass(frozen=True)
class RemedySection:
    """The same update, measured again under a defense that a site can switch on.

    Attributes:
        defense: Such as "noise" or "clip"; "batch-size", "shared-layers" and
            "running-statistics" change the training.
        strength: Its parameter as a number; `setting` says in which unit.
        p_value: Of the test that decides, under the defense.
        verdict: Of the same update under the defense.
        cosine: Cosine of the defended and the undefended update; None where it does not apply.
        epsilon: Of DP-SGD; None: no guarantee.
        enough: Whether nothing is found under it, and under no weaker one of its kind.
        setting: The strength as a site sets it, in words with its unit.
        seconds: That its measurement took.
    """

    defense: str
    strength: float
    p_value: float
    verdict: str
    cosine: float | None
    epsilon: float | None
    enough: bool
    setting: str = ""
    seconds: float = 0.0


@dataclass(frozen=True)
class UntriedSection:
    """A defense that the search for remedies had no time for.

    Attributes:
        defense: See `RemedySection`.
        setting: The weakest of its strengths that was not tried, in words with its unit.
    """

    defense: str
    setting: str


@dataclass(frozen=True)
class AuditRecord:
    """A whole audit.

    Attributes:
        verdict: "leaks", "no leak found" or "cannot tell".
        statement: The verdict with its numbers, in a sentence.
        update: What is in the update.
        local: The local training that was reckoned with.
        labels: Classes and counts; None where the client has no classes.
        attacks: In the order they were run.
        power: Of the attack that decides.
        membership: Attack A; empty where it was not asked for.
        classes: Attack C; empty where it was not asked for.
        remedies: What to do; empty where nothing leaked or it was not asked for.
        granted: What the attacker was told although a server does not see it.
        warnings: What limits the audit, one sentence each.
        seed: Of every random number.
        seconds: Wall-clock time.
        program_version: Of this project.
        schema_version: Of this record.
        untried: Defenses that the time was not enough for; empty where the search came to its end.
        round_number: Of the federation, where the site said it.
        membership_seconds: Wall-clock time of attack A.
        classes_seconds: Of attack C.
        received: Whether what the site received was made to leak; None in a record of version 1.
    """

    verdict: str
    statement: str
    update: UpdateSection
    local: LocalSection
    labels: LabelSection | None
    attacks: tuple[AttackSection, ...]
    power: tuple[PowerSection, ...]
    membership: tuple[RateSection, ...] = ()
    classes: tuple[ClassSection, ...] = ()
    remedies: tuple[RemedySection, ...] = ()
    granted: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    seed: int = 0
    seconds: float = 0.0
    program_version: str = ""
    schema_version: int = SCHEMA_VERSION
    untried: tuple[UntriedSection, ...] = ()
    round_number: int | None = None
    membership_seconds: float | None = None
    classes_seconds: float | None = None
    received: ReceivedSection | None = None
