"""Records of audits as they come out, for tests of what stores and shows them."""

from __future__ import annotations

import dataclasses

import numpy as np

from audit.record import (
    AttackSection,
    AuditRecord,
    ClassSection,
    DetectorSection,
    LabelSection,
    LocalSection,
    PowerSection,
    RateSection,
    ReceivedSection,
    RemedySection,
    SimilaritySection,
    TestSection,
    UntriedSection,
    UpdateSection,
)

VERDICTS = ("leaks", "no leak found", "cannot tell")


def similarity(metric: str, n: int = 8, height: float = 0.75, seed: int = 0) -> SimilaritySection:
    """Best matches of n reconstructions around a height, and their references."""
    rng = np.random.default_rng(seed)

    def around(mean: float, size: int) -> tuple[float, ...]:
        return tuple(np.round(rng.normal(mean, 0.05, size), 4).tolist())

    members, noise = around(height, n), around(0.12, 100)
    limit = float(np.percentile(noise, 99))
    return SimilaritySection(
        metric=metric, best_member=members, best_non_member=around(0.62, n), noise=noise,
        noise_99=limit, above_noise=sum(value > limit for value in members), mean_image=0.58,
        prior_image=0.55,
    )  # fmt: skip


def example(verdict: str = "leaks") -> AuditRecord:
    """An audit of an update of eight chest phantoms, with every part measured."""
    p = 0.0004 if verdict == "leaks" else 0.41
    statement = (
        f"{verdict}: p = {p} for 8 members against 200 non-members"
        + {
            "leaks": "",
            "no leak found": "; the attack finds planted images: 10 of 10 at batch 1, one step",
            "cannot tell": ", and it is not shown that it would have found a leak (1 of 10)",
        }[verdict]
    )
    found = (10, 6, 3) if verdict != "cannot tell" else (1, 0, 0)
    each = (0.0081, 0.03, 0.21, 0.4, 0.8, 1.0, 1.0, 1.0) if verdict == "leaks" else (1.0,) * 8
    test = TestSection(
        p_value=p, smallest=0.0001, alpha=0.05, memberships=9999, members=8, non_members=200,
        per_image=each, standing_out=sum(value <= 0.05 for value in each),
    )  # fmt: skip
    height = 0.82 if verdict == "leaks" else 0.62
    both = (similarity("ncc", height=height), similarity("ssim", height=height - 0.1, seed=1))
    attacks = (
        AttackSection("exact-linear", (1, 32, 32), 0, (), 0.2, (), None,
                      "the first layer is a convolution, so that no input can be read off"),
        AttackSection("spectral", (1, 16, 16), 300, (0.02,) * 8, 12.4, both, None),
        AttackSection("spectral", (1, 32, 32), 300, (0.03,) * 8, 31.9, both, test),
    )  # fmt: skip
    return AuditRecord(
        verdict=verdict,
        statement=statement,
        update=UpdateSection(
            61_386, 14, 0, True, 0.5213, 0.031, "float32", 0.0004, 31.0,
            ("sparse: 90 % of the elements are 0", "cut at both ends, at 0.01"),
        ),
        local=LocalSection("adamw", 0.001, 8, 8, ("optimiser", "learning_rate"), ("steps",)),
        labels=LabelSection("exact", (3, 4, 1), (3, 5, 0), 0.875, 0.5),
        attacks=attacks,
        power=tuple(
            PowerSection("spectral", batch, steps, n, 10, similarity)
            for (batch, steps), n, similarity in zip(
                [(1, 1), (8, 1), (8, 8)], found, [0.98, 0.81, 0.66], strict=True
            )
        ),
        membership=tuple(
            RateSection(
                method, model, auroc, auroc - 0.06, auroc + 0.06, 0.6, of_class, 64, 64, 0.7
            )
            for method in ("loss threshold", "loss trajectory", "confidence threshold")
            for model, auroc in (("global", 0.55), ("local", 0.83), ("single site", 0.91))
            for of_class in (None, 0, 1, 2)
        ),
        classes=tuple(
            ClassSection(number, 0.97, (similarity("ncc", 1), similarity("ssim", 1, 0.4)))
            for number in range(3)
        ),
        remedies=(
            RemedySection("noise", 0.001, 0.0004, "leaks", 0.99, None, False,
                          "standard deviation 3.1e-06 on every number of the update", 12.5),
            RemedySection("noise", 0.01, 0.12, "no leak found", 0.83, None, True),
            RemedySection("noise", 0.1, 0.5, "no leak found", 0.21, 41.5, True),
            RemedySection("batch-size", 64.0, 0.2, "no leak found", None, None, True),
        ),
        granted=("the classes of the images", "the statistics of BatchNorm"),
        warnings=("10 of 40 non-members are of a class without a member",),
        seed=3,
        seconds=843.2,
        program_version="1.0.0",
        untried=(
            UntriedSection("dp-sgd", "noise multiplier 0.3, clipping norm 1 per image"),
            UntriedSection("shared-layers", "the last 2 of 5 layers with parameters (from fc1 on)"),
        ),
        round_number=20,
        membership_seconds=3.5,
        classes_seconds=61.0,
        received=ReceivedSection(
            True, 19, 0.05, 0.05, True,
            (
                DetectorSection("dsnr", 0.1234, 0.2, False),
                DetectorSection("weights", None, 0.01, True),
            ),
        ),
    )  # fmt: skip


def bare(verdict: str = "cannot tell") -> AuditRecord:
    """The least that a record can hold."""
    full = example(verdict)
    update = dataclasses.replace(full.update, noise=None, signal_to_noise=None, findings=())
    local = dataclasses.replace(full.local, told=(), estimated=())
    return AuditRecord(verdict, full.statement, update, local, None, (), ())
