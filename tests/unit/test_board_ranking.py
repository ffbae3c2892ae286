"""Ranks, their intervals and how sure the order is."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from benchmarks.leaderboard.ranking import (
    Interval,
    by_image,
    draws,
    frontier,
    given_away,
    rank,
    resampled_worst,
    utility_of,
    worst_mean,
)
from tests.board_entries import SMALL, entry, leak, spread

SHARE = 0.1


def test_the_worst_tenth_is_that_of_a_sorted_list() -> None:
    values = np.random.default_rng(0).normal(size=(3, 25))
    by_sorting = np.sort(values, axis=1)[:, -3:].mean(axis=1)
    np.testing.assert_allclose(worst_mean(values, SHARE), by_sorting)
    assert worst_mean(np.array([1.0, 5.0]), SHARE) == 5
    # A tenth of 30 is three, whatever 0.1 is in binary.
    assert worst_mean(np.arange(30.0), SHARE) == 28


def test_draws_keep_the_numbers_of_an_image_together() -> None:
    # Two settings that add up to 1 for every image: so does every mean over whole images.
    first = np.random.default_rng(1).random(10)
    values = np.stack([first, 1 - first], axis=1)
    means = resampled_worst(values, draws(10, resamples=50), share=1.0)
    np.testing.assert_allclose(means, 0.5)
    assert np.ptp(resampled_worst(values[:, :1], draws(10, resamples=50), 1.0)) > 0.05


def test_far_entries_have_ranks_of_their_own() -> None:
    ranking = rank(
        [entry("c", spread(0.8)), entry("a", spread(0.2)), entry("b", spread(0.5))], SHARE
    )
    assert [(p.entry.defense, p.first, p.last) for p in ranking.places] == [
        ("a", 1, 1), ("b", 2, 2), ("c", 3, 3),
    ]  # fmt: skip
    assert ranking.tau == Interval(1.0, 1.0, 1.0)
    assert ranking.tau_metrics == pytest.approx(1.0)


def test_entries_whose_intervals_overlap_share_a_rank() -> None:
    entries = [
        entry("a", spread(0.20, width=0.2)),
        entry("b", spread(0.22, width=0.2)),
        entry("c", spread(0.9)),
    ]
    places = rank(entries, SHARE).places
    assert places[0].worst["ssim"].overlaps(places[1].worst["ssim"])
    assert [(p.first, p.last) for p in places] == [(1, 2), (1, 2), (3, 3)]


@pytest.mark.parametrize("seed", range(6))
def test_ranks_meet_where_intervals_do(seed: int) -> None:
    rng = np.random.default_rng(seed)
    entries = [entry(str(i), rng.random(10).round(3).tolist()) for i in range(6)]
    places = rank(entries, SHARE).places
    for one in places:
        for other in places:
            mine, theirs = one.worst["ssim"], other.worst["ssim"]
            if mine.overlaps(theirs):
                assert one.first <= other.last
                assert other.first <= one.last
            elif mine.high < theirs.low:
                assert one.first < other.first
                assert one.last < other.last


def test_an_order_by_chance_has_a_small_tau() -> None:
    rng = np.random.default_rng(3)
    same = [entry(str(i), rng.random(10).tolist()) for i in range(8)]
    apart = [entry(str(i), spread(i / 10 + 0.1)) for i in range(8)]
    by_chance, sure = rank(same, SHARE).tau, rank(apart, SHARE).tau
    assert by_chance is not None
    assert sure is not None
    assert by_chance.value < 0.9 < sure.value


def test_of_one_entry_there_is_no_order() -> None:
    ranking = rank([entry("a", spread(0.2))], SHARE)
    assert (ranking.tau, ranking.tau_metrics) == (None, None)
    assert (ranking.places[0].first, ranking.places[0].last) == (1, 1)


def test_utility_has_the_interval_of_student() -> None:
    # Of 60, 62 and 64: mean 62, standard error 2 / sqrt(3), and t(0.975, 2) = 4.303.
    found = utility_of([60.0, 62.0, 64.0])
    assert found.value == pytest.approx(62)
    assert found.high - found.value == pytest.approx(4.302653 * 2 / 3**0.5, rel=1e-5)
    assert utility_of([70.0]) == Interval(70, 70, 70)
    assert utility_of([0.0, 100.0]).low == 0


def test_identification_counts_every_attacked_image() -> None:
    half = entry("half", [0.1] * 5 + [0.9] * 5)
    assert rank([half], SHARE).places[0].identified.value == pytest.approx(0.5)


def test_settings_that_no_guess_loses_to_are_named() -> None:
    # The best guess has a mean SSIM of 0.2.
    first, second = (setting.name for setting in SMALL.settings)
    made = entry("mixed", spread(0.5))
    mixed = dataclasses.replace(made, leaks={first: leak([0.2] * 10), second: leak([0.21] * 10)})
    assert rank([mixed], SHARE).places[0].lost == (first,)


def test_the_frontier_is_what_nobody_beats_in_both() -> None:
    entries = [
        entry("leaky", spread(0.9), accuracies=(80.0, 80.0)),
        entry("beaten", spread(0.95), accuracies=(70.0, 70.0)),
        entry("tight", spread(0.2), accuracies=(50.0, 50.0)),
        entry("same as tight", spread(0.2), accuracies=(50.0, 50.0)),
    ]
    best = frontier(rank(entries, SHARE).places)
    assert [place.entry.defense for place in best] == ["tight", "same as tight", "leaky"]


def test_what_a_guess_shows_is_not_given_away() -> None:
    made = entry("a", spread(0.5))
    assert by_image(made, "ssim").shape == (SMALL.images, len(SMALL.settings))
    # An image that is almost flat: a reconstruction of 0.9 shows hardly more than its colour.
    flat = {"psnr": (10.0,) * 10, "ssim": (0.88, *[0.1] * 9)}
    guessed = dataclasses.replace(made, guesses={**made.guesses, "flat colour": flat})
    leaks = {s.name: leak([0.9, *[0.5] * 9]) for s in SMALL.settings}
    gain = given_away(dataclasses.replace(guessed, leaks=leaks), "ssim")
    np.testing.assert_allclose(gain[0], 0.02)
    np.testing.assert_allclose(gain[1:], 0.3)
