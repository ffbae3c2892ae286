"""What defenses cost: trainings that continue a record, and what the record is asked."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from benchmarks import utility
from benchmarks.declare.measured_utility import (
    RECORD,
    RESULTS,
    ROOT,
    Entry,
    Row,
    read_rows,
    summary,
)
from benchmarks.utility import Protocol, compute, main, utility_of
from core.errors import InputError
from core.reading import read_json_object
from training.run import run_training

SMALL = Protocol(width=4, clients=2, batch=8, rounds=2)


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    compute([Entry("clip:0.1,gaussian:0.5"), Entry("sign", "ef-sgd")], [0], tmp_path, SMALL)
    return tmp_path


def test_a_record_is_continued_and_not_computed_again(
    trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = read_json_object(trained / "utility.json", what="record")
    seeds = []

    def spy(process: object, settings: object) -> None:
        seeds.append(settings.training.seed)  # type: ignore[attr-defined]
        run_training(process, settings)  # type: ignore[arg-type]

    monkeypatch.setattr(utility, "run_training", spy)
    rows = compute([Entry("clip:0.1,gaussian:0.5")], [0, 1], trained, SMALL)
    assert seeds == [1]
    after = read_json_object(trained / "utility.json", what="record")
    assert after["rows"][0]["accuracy"][:1] == before["rows"][0]["accuracy"]
    assert after["rows"][1] == before["rows"][1]
    assert len(rows[0].accuracy) == 2
    # Two uses of noise 0.5 on updates that lie at most 0.2 apart.
    assert rows[0].epsilon == pytest.approx(epsilon(0.5 / 0.2 / math.sqrt(2), 1e-5), rel=1e-4)
    assert rows[1].epsilon is None
    with pytest.raises(InputError, match="another protocol"):
        compute([Entry()], [0], trained, Protocol(width=4, clients=2, batch=8, rounds=3))


def epsilon(sigma: float, delta: float) -> float:
    """Of the Gaussian mechanism, by bisection on Balle and Wang's theorem 8."""
    low, high = 0.0, 100.0
    for _ in range(80):
        middle = (low + high) / 2
        a, b = 1 / (2 * sigma), middle * sigma
        excess = stats.norm.cdf(a - b) - math.exp(middle) * stats.norm.cdf(-a - b)
        low, high = (middle, high) if excess > delta else (low, middle)
    return high


def test_a_defense_is_found_in_any_spelling(trained: Path) -> None:
    found = utility_of("clip:0.10,gaussian:5e-1", folder=trained)
    assert found is not None
    stored = json.loads((trained / "utility.json").read_text())["rows"][0]["accuracy"]
    assert (found.mean, found.n) == (stored[0], 1)
    assert utility_of("sign", folder=trained) is None
    assert utility_of("sign", "ef-sgd", folder=trained) is not None
    with pytest.raises(InputError, match="unknown defense"):
        utility_of("signs", folder=trained)


def test_the_interval_is_students() -> None:
    values = [50.0, 55.0, 63.0]
    low, high = stats.t.interval(0.95, 2, loc=np.mean(values), scale=stats.sem(values))
    found = summary(Row(Entry(), [0, 1, 2], values))
    assert (found.low, found.high) == (pytest.approx(low, rel=1e-3), pytest.approx(high, rel=1e-3))
    assert math.isnan(summary(Row(Entry(), [0], [50.0])).low)


def test_the_committed_record_is_of_the_protocol_and_names_its_defenses() -> None:
    record = read_json_object(RESULTS / RECORD, what="record")
    assert record["protocol"] == asdict(utility.PROTOCOL)
    none = utility_of("")
    assert none is not None
    assert none.low > 30  # Of ten classes.


def test_what_makes_no_sense_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--seeds must lie between"):
        main(["--seeds", "0"])
    with pytest.raises(InputError, match="unknown defense"):
        main(["--defense", "signs", "--output", str(tmp_path)])


def test_what_the_leaderboard_trained_is_not_trained_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object) -> None:
        raise AssertionError("nothing must be trained")

    monkeypatch.setattr(utility, "train", refused)
    found = utility.of_leaderboard(ROOT / "results" / "leaderboard")
    sparse = next(row for row in found if row.entry == Entry("prune:0.99"))
    rows = utility.compute([sparse.entry], utility.SEEDS, tmp_path, known=found)
    assert rows == utility.compute([sparse.entry], utility.SEEDS, tmp_path)
    # Both were computed, by two commands: the same trainings to the last digit.
    committed = read_rows(RESULTS / RECORD)
    own = next(row for row in committed if row.entry == sparse.entry)
    assert own.accuracy == pytest.approx(sparse.accuracy, abs=1e-9)


def test_a_leaderboard_of_another_training_is_not_taken_over() -> None:
    other = dataclasses.replace(utility.PROTOCOL, rounds=70)
    with pytest.raises(InputError, match="another protocol"):
        utility.of_leaderboard(ROOT / "results" / "leaderboard", other)
