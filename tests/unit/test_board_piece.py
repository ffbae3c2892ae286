"""Pieces of an entry: what is shared, attacked and measured; how long it takes; what fails."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch

from benchmarks.compute import Workers
from benchmarks.leaderboard.entry import GUESSES
from benchmarks.leaderboard.estimate import in_words, seconds_of
from benchmarks.leaderboard.measure import compute, guesses, unfinished
from benchmarks.leaderboard.piece import (
    GUESS,
    Piece,
    attack_piece,
    attacked,
    data_sets,
    nearest_of_all,
    shared,
)
from benchmarks.leaderboard.plan import Candidate, Plan
from benchmarks.run.executor import Executor, Job, Outcome
from benchmarks.run.stages import Stage
from benchmarks.run.store import Store
from core.data.data_sets import take_samples
from core.errors import InputError
from core.models.building import ModelSpec
from gradients.received_model import Pretrained, build_received_model
from tests.board_entries import SMALL

PIECE = Piece(
    data="photo-patches",
    seed=0,
    images=10,
    first=0,
    count=2,
    batch_size=1,
    defense="gaussian:0.001",
    plugin=None,
    threat="honest-server",
    members=("spectral",),
    evaluations=4,
)


@functools.cache
def network(arch: str) -> Pretrained:
    """An initial network, as stage 1 keeps it."""
    spec = ModelSpec(arch, n_classes=10, image_size=32, stem="cifar", width=4)
    return Pretrained(Path("model.pth.tar"), build_received_model(spec).state_dict(), spec)


def test_a_piece_is_what_its_parts_are() -> None:
    whole = attack_piece(PIECE, network("lenet"))
    parts = [dataclasses.replace(PIECE, first=i, count=1) for i in (0, 1)]
    assert whole == [attack_piece(part, network("lenet"))[0] for part in parts]
    assert whole[0] != whole[1]


def test_more_evaluations_bring_an_image_nearer() -> None:
    one = dataclasses.replace(PIECE, count=1)
    (short,) = attack_piece(one, network("lenet"))
    (longer,) = attack_piece(dataclasses.replace(one, evaluations=80), network("lenet"))
    assert longer.psnr > short.psnr + 3
    assert longer.ssim > short.ssim
    assert longer.label


def test_a_defense_and_its_noise_are_applied() -> None:
    indices = attacked("photo-patches", 10, 0)[:1]
    plain, truth = shared(dataclasses.replace(PIECE, defense=""), network("lenet"), indices, 1)
    noisy, same = shared(PIECE, network("lenet"), indices, 1)
    assert torch.equal(truth.images, same.images)
    difference = torch.cat([(noisy.gradient[n] - g).flatten() for n, g in plain.gradient.items()])
    assert float(difference.std()) == pytest.approx(0.001, rel=0.1)
    again, _ = shared(PIECE, network("lenet"), indices, 2)
    assert not torch.equal(again.gradient["0.weight"], noisy.gradient["0.weight"])


def test_dp_sgd_leaves_batch_norm_its_running_statistics() -> None:
    private = dataclasses.replace(PIECE, defense="", sigma=1.0)
    for arch, train_mode in (("lenet", True), ("cnn", False)):
        target, _ = shared(private, network(arch), [0, 1], 0)
        assert target.train_mode is train_mode
        assert target.defenses[0].startswith("dp-sgd")
    with pytest.raises(InputError, match="--sigma must not be negative"):
        shared(dataclasses.replace(PIECE, sigma=-1.0), network("lenet"), [0], 0)


def test_where_no_attack_applies_the_mean_image_is_guessed() -> None:
    # This attack must know the size of the batch, which nobody tells this attacker.
    piece = dataclasses.replace(PIECE, threat="eavesdropper", members=("modern",))
    known = guesses(SMALL)["mean image"]
    for position, result in enumerate(attack_piece(piece, network("lenet"))):
        assert result.strongest == GUESS
        assert not result.label
        assert result.psnr == pytest.approx(known["psnr"][position], abs=1e-3)
        assert result.ssim == pytest.approx(known["ssim"][position], abs=1e-3)


def test_guesses_are_of_the_attacked_images() -> None:
    found = guesses(SMALL)
    assert tuple(found) == GUESSES
    data = data_sets(SMALL.data)
    images, _ = take_samples(data.train_plain, attacked(SMALL.data, 10, 0), data.spec)
    # Of a flat image of its own mean colour the squared error is the variance.
    variance = images.var((2, 3), correction=0).mean(1)
    expected = (-10 * variance.log10()).tolist()
    assert list(found["flat colour"]["psnr"]) == pytest.approx(expected, abs=1e-3)


def test_an_image_is_nearest_to_itself() -> None:
    data = data_sets("photo-patches")
    images, _ = take_samples(data.train_plain, [5, 700], data.spec)
    assert nearest_of_all(images, "photo-patches").tolist() == [5, 700]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"defense": "nothing:1"}, "unknown defense"),
        ({"batch_size": 4}, "--count 2: no multiple of -b 4"),
        ({"plugin": "no_such_module"}, "--plugin no_such_module"),
        ({"threat": "nobody"}, "--threat nobody"),
    ],
)
def test_bad_pieces_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        attack_piece(dataclasses.replace(PIECE, **change), network("lenet"))  # type: ignore[arg-type]


def plan() -> Plan:
    return Plan(SMALL, Candidate("clip:1", "honest-server"))


def test_the_time_is_that_of_what_is_missing() -> None:
    cells = plan().cells()
    pieces = [cell for cell in cells if cell.stage == "piece"]
    assert seconds_of(plan(), []) == 0
    assert 0 < seconds_of(plan(), pieces[:1]) < 30
    assert seconds_of(plan(), plan().trainings) > 0
    assert in_words(600, 2) == "about 5 min on 2 cores"
    assert in_words(1, 1) == "about 1 min on 1 core"


class Failing:
    """An executor whose every job fails."""

    def __init__(self) -> None:
        self.jobs: list[Job] = []

    def has_room(self) -> bool:
        return not self.jobs

    def start(self, job: Job) -> None:
        self.jobs = [job]

    def poll(self) -> list[Outcome]:
        ended, self.jobs = self.jobs, []
        return [Outcome(job, "exit status 1: out of memory") for job in ended]

    def stop(self) -> None:
        self.jobs = []


class FailingWorkers(Workers):
    """Workers that give that executor."""

    def executor(self, stages: Iterable[Stage]) -> Executor:
        return Failing()


def test_a_part_that_fails_is_named(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with pytest.raises(InputError, match="failed: exit status 1: out of memory"):
        compute(plan(), store, FailingWorkers(), quiet=True)
    assert len(unfinished(plan(), store)) == len({c.key for c in plan().cells()}) + 1
