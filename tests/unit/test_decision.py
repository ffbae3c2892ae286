"""The test that decides whether reconstructions leak: exact, quiet without a leak, not deaf."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from audit.decision import Power, Verdict, decide
from audit.membership_statistics import STATISTICS, MembershipStatistic, best_match, ranks
from audit.permutations import (
    holm,
    non_members_needed,
    non_members_needed_per_image,
    p_values_per_image,
    permutation_p_value,
    smallest_p_value,
)
from benchmarks.decision import Setting, Trial, pool, trial
from core.errors import InputError

PLANTED = (Power("batch 1, one step", 20, 20),)
RECORD = Path(__file__).parents[2] / "results" / "decision" / "decision.json"


def drawn(setting: Setting, number: int) -> Trial:
    return trial(*pool(setting.images), setting, np.random.default_rng((31, number)))


def is_leak(setting: Setting, number: int) -> bool:
    t = drawn(setting, number)
    found = decide(
        t.similarity, t.members, classes=t.classes, weights=t.weights, power=PLANTED,
        permutations=399, seed=number,
    )  # fmt: skip
    return found.verdict is Verdict.LEAKS


@pytest.mark.parametrize("images", ["photos", "phantoms"])
@pytest.mark.parametrize(("members", "non_members"), [(1, 19), (4, 40), (8, 40)])
def test_without_a_leak_one_audit_in_twenty_says_leaks(
    images: str, members: int, non_members: int
) -> None:
    """At most 18 of 200: a test with a level of 5 % exceeds that with probability 0.5 %."""
    setting = Setting(images, members, non_members)
    assert stats.binom.sf(18, 200, 0.05) < 0.006
    assert sum(is_leak(setting, number) for number in range(200)) <= 18


@pytest.mark.parametrize("images", ["photos", "phantoms"])
def test_a_planted_image_is_found_each_time(images: str) -> None:
    setting = Setting(images, 1, 19, 1, 0.6)
    assert sum(is_leak(setting, number) for number in range(20)) == 20


def test_leaks_of_better_quality_and_of_more_images_are_found_more_often() -> None:
    def found(*leak: float) -> int:
        setting = Setting("phantoms", 8, 40, int(leak[0]), leak[1])
        return sum(is_leak(setting, number) for number in range(30))

    weak, strong, few = found(8, 0.1), found(8, 0.6), found(1, 0.6)
    assert strong >= 28
    assert strong - weak >= 15
    assert strong - few >= 10


def test_all_memberships_against_a_loop_over_them() -> None:
    rng = np.random.default_rng(0)
    scores = rng.normal(size=9)
    members = np.arange(9) < 3
    p, total = permutation_p_value(lambda r: r @ scores, members, np.zeros(9), 10_000, 0)
    sums = [scores[list(chosen)].sum() for chosen in itertools.combinations(range(9), 3)]
    assert total == len(sums) == 84
    assert p == pytest.approx(np.mean([s >= scores[:3].sum() - 1e-12 for s in sums]))


def test_the_rank_sum_is_the_one_of_scipy() -> None:
    """Wilcoxon's exact test of best matches, against SciPy's of the same two samples."""
    rng = np.random.default_rng(1)
    similarity = rng.normal(size=(1, 12))
    similarity[0, :4] += 1
    members = np.arange(12) < 4
    function = MembershipStatistic("ranks", ranks).of(similarity, np.ones(1))
    p, _ = permutation_p_value(function, members, np.zeros(12), 10_000, 0)
    best = similarity[0]
    expected = stats.mannwhitneyu(best[:4], best[4:], alternative="greater", method="exact")
    assert p == pytest.approx(expected.pvalue)


def test_drawn_memberships_approach_all_of_them_and_count_themselves() -> None:
    rng = np.random.default_rng(2)
    scores = rng.normal(size=14)
    members = np.arange(14) < 4
    classes = np.arange(14) % 2

    def p_value(permutations: int, seed: int) -> float:
        return permutation_p_value(lambda r: r @ scores, members, classes, permutations, seed)[0]

    exact = p_value(10_000, 0)  # 21 x 21 memberships
    assert smallest_p_value(members, classes, 10_000) == pytest.approx(1 / 441)
    drawn_ = [p_value(400, seed) for seed in range(20)]
    assert np.mean(drawn_) == pytest.approx(exact, abs=4 * np.sqrt(exact * (1 - exact) / 8000))
    assert drawn_ == [p_value(400, seed) for seed in range(20)]
    assert min(drawn_) >= 1 / 401


def test_membership_stays_within_classes() -> None:
    members = np.array([True, False, False, True, False])
    classes = np.array([0, 0, 0, 1, 1])
    seen: Counter[tuple[int, ...]] = Counter()

    def watch(rows: np.ndarray) -> np.ndarray:
        seen.update(tuple(row) for row in rows.astype(int).tolist())
        return rows.sum(1)

    permutation_p_value(watch, members, classes, 100, 0)
    assert set(seen) == {
        (*first, *second)
        for first in ((1, 0, 0), (0, 1, 0), (0, 0, 1))
        for second in ((1, 0), (0, 1))
    }


def test_ties_speak_against_a_leak() -> None:
    found = decide(np.full((3, 40), 0.5), np.arange(40) < 3, power=PLANTED)
    assert found.p_value == 1
    assert set(found.per_image) == {1}
    assert found.verdict is Verdict.NO_LEAK_FOUND


def test_how_many_non_members_it_takes() -> None:
    assert non_members_needed(1, 0.05) == 19
    assert non_members_needed(4, 0.05) == 3
    assert non_members_needed_per_image(1, 0.05) == 19
    assert non_members_needed_per_image(8, 0.05) == 159
    similarity = np.zeros((1, 20))
    similarity[0, 0] = 1
    for n, verdict in ((18, Verdict.CANNOT_TELL), (19, Verdict.LEAKS)):
        found = decide(similarity[:, : n + 1], np.arange(n + 1) < 1, power=PLANTED)
        assert found.verdict is verdict
        assert found.p_value == found.smallest == pytest.approx(1 / (n + 1))
    few = decide(similarity[:, :5], np.arange(5) < 1)
    assert "0.05 takes 19 non-members" in few.statement


def test_the_maximum_cannot_reach_the_level_with_four_of_44() -> None:
    """Whatever leaks: the reason why it is not the statistic that decides."""
    similarity = np.vstack([np.eye(4, 44), np.eye(4, 44)])
    members = np.arange(44) < 4
    function = STATISTICS["maximum"].of(similarity + 1e-3 * np.arange(44), np.ones(8))
    p, _ = permutation_p_value(function, members, np.zeros(44), 200_000, 0)
    assert p == pytest.approx(4 / 44, abs=1e-9)
    assert decide(similarity, members).verdict is Verdict.LEAKS


def test_one_leaking_image_is_singled_out_with_enough_non_members() -> None:
    rng = np.random.default_rng(3)
    similarity = rng.normal(size=(8, 8 + 170))
    similarity[2, 5] += 12
    found = decide(similarity, np.arange(178) < 8, power=PLANTED, permutations=999)
    assert found.images_that_leak == (5,)
    assert found.per_image_corrected[5] == pytest.approx(8 / 171)
    assert min(np.delete(found.per_image_corrected, 5)) > 0.05


def test_holm_against_its_definition() -> None:
    """Rejections at every level are those of the step-down procedure."""
    rng = np.random.default_rng(4)
    for _ in range(20):
        p = rng.uniform(0, 0.1, 6)
        adjusted = holm(p)
        for level in (0.01, 0.05, 0.2):
            rejected = set()
            for step, place in enumerate(np.argsort(p)):
                if p[place] > level / (6 - step):
                    break
                rejected.add(int(place))
            assert set(np.flatnonzero(adjusted <= level).tolist()) == rejected


def test_p_values_of_images_against_a_count() -> None:
    scores = np.array([3.0, 1.0, 2.0, 3.0, 0.0])
    members = np.array([True, True, False, False, False])
    assert p_values_per_image(scores, members, np.zeros(5)).tolist() == [2 / 4, 3 / 4]
    assert p_values_per_image(scores, members, np.array([0, 1, 1, 1, 1])).tolist() == [1, 3 / 4]


@pytest.mark.parametrize(
    ("power", "verdict"),
    [
        ((), Verdict.CANNOT_TELL),
        ((Power("batch 1", 0, 10),), Verdict.CANNOT_TELL),
        # One of two is found by chance in 10 % of audits, one of one in 5 %.
        ((Power("batch 1", 1, 2),), Verdict.CANNOT_TELL),
        ((Power("batch 1", 1, 1),), Verdict.NO_LEAK_FOUND),
        ((Power("batch 1", 10, 10), Power("batch 8", 3, 10)), Verdict.NO_LEAK_FOUND),
    ],
)
def test_nothing_found_is_worth_what_would_have_been_found(
    power: tuple[Power, ...], verdict: Verdict
) -> None:
    similarity = np.random.default_rng(5).normal(size=(8, 48))
    similarity[:, :8] -= 0.5
    found = decide(similarity, np.arange(48) < 8, power=power)
    assert found.verdict is verdict
    assert found.statement.startswith(verdict.value)
    assert all(str(plant) in found.statement for plant in power)


def test_similarities_on_another_scale_and_in_another_order_decide_the_same() -> None:
    t = drawn(Setting("phantoms", 4, 20, 2, 0.5), 0)
    first = decide(t.similarity, t.members, weights=t.weights)
    again = decide(5 * t.similarity[::-1] - 3, t.members, weights=7 * t.weights[::-1])
    assert again.p_value == first.p_value
    assert again.per_image == first.per_image


BAD = {
    "NaN": (np.full((1, 4), np.nan), [True, False, False, False], {}, "not finite"),
    "vector": (np.zeros(4), [True] * 4, {}, "reconstructions x images"),
    "length": (np.zeros((1, 4)), [True, False], {}, "each of the 4 images"),
    "all members": (np.zeros((1, 2)), [True, True], {}, "members and non-members"),
    "weights": (np.zeros((1, 2)), [True, False], {"weights": [-1.0]}, "none negative"),
    "level": (np.zeros((1, 2)), [True, False], {"alpha": 5.0}, "alpha 5.0 must lie"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_decided_is_one_sentence(case: str) -> None:
    similarity, members, more, message = BAD[case]
    with pytest.raises(InputError, match=message):
        decide(similarity, members, **more)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="3 of 2 is no count"):
        Power("batch 1", 3, 2)


def test_the_record_holds_every_statistic_and_its_false_alarms_keep_the_level() -> None:
    rows = json.loads(RECORD.read_text())["rows"]
    assert {name for row in rows for name in row["found"]} == set(STATISTICS)
    quiet = [row for row in rows if not row["setting"]["leaking"]]
    for name in STATISTICS:
        alarms, trials = (sum(values) for values in zip(*(
            (row["found"][name], row["trials"]) for row in quiet), strict=True))  # fmt: skip
        assert alarms <= stats.binom.ppf(0.995, trials, 0.05)


def test_best_match_is_the_largest_over_reconstructions() -> None:
    similarity = np.array([[0.1, 0.9], [0.4, 0.2]])
    assert best_match(similarity, np.ones(2)).tolist() == [0.4, 0.9]
