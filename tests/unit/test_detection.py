"""The table of attacks and detectors: what it counts, and that it goes on where it was."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import mannwhitneyu

from audit.detectors import detector_names
from benchmarks import detection
from benchmarks.detection import (
    ATTACKS,
    BEHIND,
    PROTOCOL,
    READ_BY,
    Look,
    Part,
    alarms_of,
    area,
    area_with_interval,
    compute,
    page_of,
    rows_of,
)
from core.errors import InputError
from core.models.malicious import parse_malice
from core.reading import read_json_object
from gradients.servers import server_names

SMALL = dataclasses.replace(
    PROTOCOL, image_size=8, rounds=5, malicious_rounds=(1, 3), clients=2, images=16, batch=8,
    looked_at=8, site_rounds=19, further=2, victims=4,
)  # fmt: skip
NETWORKS = {"mlp": ("trap:1",), "cnn behind loki:16:2": ("loki:16:2",)}


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("detection")
    compute(NETWORKS, [0, 1], folder, SMALL)
    return folder


def test_every_part_looks_at_every_round(measured: Path) -> None:
    stored = read_json_object(measured / "detection.json", what="record")
    assert len(stored["parts"]) == 4
    for part in stored["parts"]:
        honest = [look for look in part["looks"] if not look["sent"]]
        assert [look["round"] for look in honest] == [1, 2, 3, 4]
        assert len(part["looks"]) == 6
        assert all(set(look["against"]) == set(detector_names()) for look in part["looks"])
        word = NETWORKS[part["network"]][0]
        assert set(part["accuracy"]) == {"", word}
        # A model that tells clients apart gives most of them away; so do traps.
        assert part["recovered"][word] >= 2
        assert part["site"][word] == [0.05]
    assert "| cnn behind loki:16:2 | `loki:16:2` |" in page_of(measured)
    assert (measured / "detection.png").stat().st_size > 10_000


def test_a_record_is_continued_and_not_computed_again(
    measured: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(detection, "measure", None)
    assert len(compute(NETWORKS, [0, 1], measured, SMALL)) == 4
    with pytest.raises(InputError, match="another protocol"):
        compute(NETWORKS, [0], measured, PROTOCOL)


def test_areas_are_those_of_the_rank_sum() -> None:
    rng = np.random.default_rng(0)
    honest, cheating = rng.normal(size=40).round(1), rng.normal(0.7, 1, size=15).round(1)
    statistic = mannwhitneyu(cheating, honest).statistic
    assert area(honest, cheating) == pytest.approx(statistic / (40 * 15))
    found, low, high = area_with_interval(honest, cheating)
    assert low < found < high
    assert area(honest, np.array([np.inf])) == 1


def test_a_curve_s_area_is_the_area(measured: Path) -> None:
    stored = read_json_object(measured / "detection.json", what="record")
    parts = detection._parts(stored)
    rows = [row for row in rows_of(parts) if row.sent == "trap:1" and row.mode == "against"]
    for detector in detector_names():
        false, true = detection._curve(parts, "trap", detector)
        assert true[-1] == 1
        found = ((true[1:] + true[:-1]) / 2 * np.diff(false)).sum()
        assert found == pytest.approx(rows[0].auroc[detector][0], abs=0.02)


def test_alarms_need_other_federations_and_keep_to_their_rate() -> None:
    rng = np.random.default_rng(1)

    def look(number: int, sent: str, shift: float) -> Look:
        scores: dict[str, float | None] = {d: shift + rng.normal() for d in detector_names()}
        return Look(number, sent, scores, scores)

    parts = [
        Part("mlp", s, [look(n, "", 0) for n in range(50)] + [look(1, "trap:1", 9)])
        for s in range(6)
    ]
    alarms = alarms_of(parts, "alone")
    assert alarms.false <= 0.1
    assert alarms.found == {"trap:1": 1.0}
    assert np.isnan(alarms_of(parts[:1], "alone").false)
    areas = {row.sent: row.auroc for row in rows_of(parts)}
    assert all(found[0] > 0.99 for found in areas["trap:1"].values())


def test_every_server_is_tried_at_several_strengths() -> None:
    tried: dict[str, set[str]] = {}
    for name, words in ATTACKS.items():
        for word in words:
            malice = parse_malice(word, 10)
            tried.setdefault(malice.kind.partition("-")[0], set()).add(word)
            if malice.kind in ("imprint", "loki"):
                assert name.partition(BEHIND)[2] == word
    assert set(tried) == {name.partition("-")[0] for name in server_names()}
    assert all(len(words) > 1 for words in tried.values())
    assert set(server_names()) <= READ_BY.keys()
