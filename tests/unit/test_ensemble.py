"""The ensemble: members, halving by the common loss, failures, resuming, worst case."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from attack.attacks import Attack, get_attack
from attack.attacks.auto import Auto, ensemble_members
from attack.attacks.base import _ATTACKS, register_attack
from attack.attacks.ensemble import OWN, VERSION, Ensemble, EnsembleConfig, Member, _standing
from attack.attacks.spectral import Spectral
from attack.cli.command import main
from attack.knowledge.label_search import (
    arrange_labels,
    arrangements,
    iterations_for,
    label_candidates,
)
from attack.knowledge.threat_models import Capability, find_threat
from attack.loop.inversion import label_trial
from attack.metrics import evaluate
from attack.metrics.worst_case import worst_case
from attack.reconstruction import Reconstruction
from core.errors import InputError, exit_status
from core.models.building import ModelSpec
from core.target import Target, Truth
from gradients.checkpoint import save_target
from tests.targets import make_target

CPU = torch.device("cpu")
MEMBERS = ("spectral", "inverting-gradients", "analytic")
SERVER = tuple(c.name for c in find_threat("honest-server").grants)  # type: ignore[union-attr]


@functools.cache
def lenet() -> tuple[Target, Truth]:
    return make_target(ModelSpec("lenet", 10, 8, width=8), 1, double=False)


def run(target: Target, labels: torch.Tensor | None = None, **changes: Any) -> Reconstruction:
    config = EnsembleConfig(**{"members": MEMBERS, "iterations": 60, "granted": SERVER, **changes})
    return Auto(config).reconstruct(target, labels=labels, device=CPU, seed=0)


def test_an_attack_that_does_not_apply_is_recorded() -> None:
    members = run(lenet()[0]).details["members"]
    assert members["analytic"]["status"] == "not applicable"
    assert "fully connected" in members["analytic"]["reason"]


def test_the_field_is_halved_and_the_choice_has_the_smallest_loss() -> None:
    found = run(lenet()[0])
    members = found.details["members"]
    status = Counter(member["status"] for member in members.values())
    assert status == {"finished": 1, "dropped": 1, "not applicable": 1}
    losses = {n: m["gradient_loss"] for n, m in members.items() if m["gradient_loss"] is not None}
    assert found.details["chosen"] == min(losses, key=lambda name: losses[name])
    assert found.objective == min(losses.values())
    assert set(found.members) == set(losses)


def test_the_budget_is_kept_and_half_of_it_goes_to_the_last() -> None:
    members = run(lenet()[0], labels=torch.tensor([0]), iterations=200).details["members"]
    assert sum(m["evaluations"] for m in members.values()) <= 200
    assert max(m["evaluations"] for m in members.values()) >= 100


def test_the_same_budget_gives_the_same_result() -> None:
    first, second = (run(lenet()[0]) for _ in range(2))
    assert torch.equal(first.images, second.images)
    assert first.details["chosen"] == second.details["chosen"]


@pytest.mark.parametrize(("loss", "goes_on"), [(0.97, "told"), (0.9, "unaware")])
def test_of_two_that_are_level_the_one_that_adapts_goes_on(loss: float, goes_on: str) -> None:
    attack = get_attack("spectral")
    told = Member("told", attack, loss=1.0)
    unaware = Member("unaware", attack, {"adaptive": False}, loss=loss)
    assert min([unaware, told], key=_standing).name == goes_on


def test_what_the_threat_model_withholds_is_not_run() -> None:
    target, _ = make_target(ModelSpec("cnn", 10, 8, width=4), 2, train_mode=True, double=False)
    members = ("spectral", "e2egi")
    withheld = run(target, members=members).details["members"]
    assert withheld["e2egi"]["status"] == "withheld"
    assert "exact BatchNorm statistics" in withheld["e2egi"]["reason"]
    assert "spectral, statistics" not in withheld
    granted = (*SERVER, Capability.BATCH_STATISTICS.name)
    allowed = run(target, members=members, granted=granted).details["members"]
    assert allowed["e2egi"]["status"] in ("finished", "dropped")
    assert allowed["spectral, statistics"]["gradient_loss"] is not None


@pytest.mark.parametrize(
    ("batch", "train_mode", "norm", "own"),
    [
        (1, True, "batch", ("spectral-2", "spectral-3")),
        (1, False, "batch", ("spectral",)),
        (2, True, "batch", ("spectral",)),
        (2, True, "group", ("spectral-3",)),
    ],
)
def test_versions_of_one_attack_take_part_where_they_differ(
    batch: int, train_mode: bool, norm: str, own: tuple[str, ...]
) -> None:
    model = ModelSpec("cnn", 10, 8, width=4, norm=norm)
    target, _ = make_target(model, batch, train_mode=train_mode, double=False)
    target = dataclasses.replace(target, defenses=("prune:0.5",))
    granted = (*SERVER, Capability.DEFENSE.name)
    asked = {"members": OWN, "granted": granted, "iterations": 30}
    took_part = set(run(target, **asked).details["members"])
    assert took_part == {name for each in own for name in (each, f"{each}, unaware")}


def test_one_that_breaks_does_not_break_the_others() -> None:
    class Broken(Attack):
        name = "broken-for-a-test"

        def reconstruct(self, target: Target, **run: Any) -> Reconstruction:
            raise RuntimeError("singular matrix")

    register_attack(Broken)
    try:
        found = run(lenet()[0], members=("spectral", Broken.name))
        assert found.details["members"][Broken.name]["status"] == "failed"
        assert "singular matrix" in found.details["members"][Broken.name]["reason"]
        with pytest.raises(InputError, match=r"no attack applies .*singular"):
            run(lenet()[0], members=(Broken.name,))
    finally:
        del _ATTACKS[Broken.name]


def test_finished_members_are_not_run_again(tmp_path: Path) -> None:
    config = EnsembleConfig(members=MEMBERS, iterations=60, granted=SERVER)
    options: dict[str, Any] = {"labels": None, "device": CPU, "seed": 0}
    state = tmp_path / "state-x.pt"
    first = Ensemble(lenet()[0], config, state_file=state, **options).run()
    again = Ensemble(lenet()[0], config, state_file=state, **options)
    again._outcome = lambda *args: pytest.fail("run again")  # type: ignore[method-assign]
    second = again.run()
    assert torch.equal(first.images, second.images)
    assert first.details["members"].keys() == second.details["members"].keys()


def test_seconds_instead_of_iterations() -> None:
    found = run(lenet()[0], time_budget=2.0)
    assert found.details["budget"] >= 1
    assert found.seconds < 10


def test_the_ensemble_leaves_itself_out() -> None:
    assert "auto" not in ensemble_members()
    assert "spectral" in ensemble_members()


def test_the_worst_case_is_per_image_and_names_the_attack() -> None:
    truth = Truth(torch.rand(2, 3, 16, 16), torch.tensor([0, 1]))
    half = torch.full_like(truth.images, 0.5)
    images = {
        "first": torch.stack([truth.images[0], half[1]]),
        "second": torch.stack([half[0], truth.images[1]]),
    }
    worst = worst_case({n: evaluate(i, truth.labels, truth) for n, i in images.items()})
    assert [row["psnr_attack"] for row in worst.per_image] == ["first", "second"]
    assert [row["mse_attack"] for row in worst.per_image] == ["first", "second"]
    assert all(row["ssim"] > 0.99 for row in worst.per_image)
    assert worst.by_attack["first"]["ssim"]["mean"] < 0.9
    assert "second" in worst.to_table().get_string()


def test_arrangements_are_distinct_and_complete() -> None:
    ways = arrangements(torch.tensor([1, 0, 1, 2]), [2, 2])
    found = {tuple(way.tolist()) for way in ways}
    assert found == {(0, 1, 1, 2), (0, 2, 1, 1), (1, 1, 0, 2), (1, 2, 0, 1)}
    assert len(ways) == len(found)
    assert len(arrangements(torch.arange(4), [4])) == 1


def test_too_many_arrangements_are_sampled() -> None:
    ways = arrangements(torch.arange(16), [8, 8], limit=10)
    assert len({tuple(way.tolist()) for way in ways}) == 10
    assert all(sorted(way.tolist()) == list(range(16)) for way in ways)


def test_labels_find_their_shards() -> None:
    """Images of each shard have known statistics, which fit the right labels only."""
    target, truth = sharded()
    config = Spectral.published.changed(bn=0.5, exact_bn=True)
    trial = label_trial(target, config, device=CPU, seed=0)
    labels = arrange_labels(target, truth.labels.flip(0), trial, seed=0)
    assert labels.tolist() == truth.labels.tolist()


def sharded() -> tuple[Target, Truth]:
    from gradients.batch_statistics import collect_batch_statistics

    target, truth = make_target(
        ModelSpec("cnn", 10, 16, width=8), 2, train_mode=True, shards=(1, 1), double=False
    )
    inputs = target.data.normalize(truth.images)
    known = tuple(collect_batch_statistics(target.build_model(), x) for x in inputs.split(1))
    return dataclasses.replace(target, bn_statistics=known), truth


def test_hypotheses_share_their_budget() -> None:
    assert iterations_for(4, 800) == 100
    assert iterations_for(1, 10) == 10
    assert [c.tolist() for c in label_candidates(lenet()[0])] == [[0]]


def test_the_command_reports_choice_and_worst_case_apart(tmp_path: Path) -> None:
    target, truth = lenet()
    save_target(tmp_path / "x.tar", target, truth)
    words = ["--checkpoint", str(tmp_path / "x.tar"), "--root", str(tmp_path), "--id", "auto"]
    more = ["--attack", "auto", "--threat", "honest-server", "--epochs", "40", "--metric"]
    assert exit_status(lambda: main([*words, *more, "--quiet", "--cpu"])) == 0
    record = json.loads((tmp_path / "auto" / "record.json").read_text())
    assert record["threat"]["name"] == "honest-server"
    assert record["threat"]["adaptive"]
    assert record["details"]["ensemble"] == VERSION == record["config"]["version"]
    assert record["details"]["chosen"] in record["worst_case"]["by_attack"]
    chosen, worst = record["evaluation"]["per_image"][0], record["worst_case"]["per_image"][0]
    assert worst["psnr"] >= chosen["psnr"]
    assert (tmp_path / "auto" / "worst_case.png").exists()
    assert not list((tmp_path / "auto").glob("state-*"))


def test_the_truth_makes_no_difference_to_the_attack(tmp_path: Path) -> None:
    target, truth = lenet()
    images = []
    for name, kept in (("with", truth), ("without", None)):
        save_target(tmp_path / f"{name}.tar", target, kept)
        words = ["--checkpoint", str(tmp_path / f"{name}.tar"), "--root", str(tmp_path)]
        flags = ["--id", name, "--attack", "auto", "--epochs", "20", "--quiet", "--cpu"]
        assert exit_status(lambda w=words, f=flags: main([*w, *f])) == 0  # type: ignore[misc]
        saved = torch.load(tmp_path / name / "reconstruction.pt", weights_only=True)
        images.append(saved["images"])
    assert torch.equal(*images)


def test_labels_only_needs_no_inversion(tmp_path: Path) -> None:
    target, truth = lenet()
    save_target(tmp_path / "x.tar", target, truth)
    words = ["--checkpoint", str(tmp_path / "x.tar"), "--root", str(tmp_path), "--id", "labels"]
    assert exit_status(lambda: main([*words, "--labels-only", "--quiet", "--cpu"])) == 0
    record = json.loads((tmp_path / "labels" / "record.json").read_text())
    assert record["label_rules"]["llg"]["accuracy"] == 1
    assert "known" not in record["label_rules"]
    assert not (tmp_path / "labels" / "reconstruction.pt").exists()


def test_auto_is_a_registered_attack() -> None:
    assert get_attack("auto") is Auto
