"""Many targets of one model at once: each ends where it would have ended alone."""

from __future__ import annotations

import dataclasses
import functools
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from attack.knowledge.encoded_inputs import EncodedArchitecture
from attack.knowledge.known_defenses import ElementWeighted, Through, soft_signs
from attack.loop.inversion import Inversion
from attack.loop.many_targets import ManyInversions, OneByOneError, reason_for_one_by_one
from attack.matching.many_targets import ManyTargetsMatcher
from attack.matching.objectives import Cosine
from attack.settings import InversionConfig
from core.losses import CrossEntropy
from core.models.building import ModelSpec
from core.target import Target
from gradients.defenses import ClientView, apply_defenses, parse_defenses
from tests.targets import make_target, share_model, smooth_images

CPU = torch.device("cpu")
PLAIN = InversionConfig(iterations=12, tv=0.01, double=True, hvp="exact", signed=False)
NETWORKS = {
    "lenet": (ModelSpec("lenet", 10, 16, width=4), False),
    "cnn, train mode": (ModelSpec("cnn", 10, 16, width=4), True),
    "cnn, eval mode": (ModelSpec("cnn", 10, 16, width=4), False),
    "convnet": (ModelSpec("convnet", 10, 16, width=4), False),
    "mlp": (ModelSpec("mlp", 10, 8, width=16), False),
}
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "difference": {"hvp": "difference"},
    "auto": {"hvp": "auto"},
    "L2": {"objective": "L2", "lr": 0.01},
    "layer norms": {"objective": "layer-L2"},
    "weighted layer norms": {"objective": "layer-L2", "layers": "linear"},
    "last layers": {"layers": "last:2"},
    "layer cosines": {"objective": "layer-sim"},
    "signed": {"signed": True, "schedule": "step"},
    "soft signs": {"soft_sign": True, "warmup": 3, "start": "pattern"},
    "balance": {
        "balance": 0.5,
        "balance_end": 0.05,
        "tv_kind": "double-opponents",
        "coordinates": "dct",
    },
    "statistics": {"bn": 0.1, "exact_bn": True, "tv": 0.0},
    "statistics, difference": {"bn": 0.1, "exact_bn": True, "hvp": "difference"},
    "statistics beside a balance": {"bn": 0.1, "exact_bn": True, "balance": 0.5},
    "features": {"features": 0.1},
    "group": {"restarts": 3, "group": 0.1, "registration": True, "input_noise": 0.1},
    "fusion": {"restarts": 2, "combine": True, "combine_every": 2, "input_noise": 0.1},
    "halving": {"restarts": 4, "halving": True, "iterations": 17},
    "labels": {"joint_labels": True, "objective": "L2", "tv": 0.0},
    "last iterate": {"smallest_loss": False, "input_norm": 0.01, "tv_kind": "norm"},
    "polish": {"polish": 2},
    "L-BFGS": {
        "optimizer": "LBFGS",
        "objective": "L2",
        "lr": 0.5,
        "box": False,
        "iterations": 5,
    },
    "L-BFGS, labels and restarts": {
        "optimizer": "LBFGS",
        "objective": "L2",
        "joint_labels": True,
        "restarts": 2,
        "lr": 1.0,
        "tv": 0.0,
        "box": False,
        "iterations": 4,
    },
}


def begun(targets: list[tuple[Target, torch.Tensor]], config: InversionConfig) -> list[Inversion]:
    return [Inversion(t, labels, config, device=CPU, seed=5) for t, labels in targets]


def check_alike(targets: list[tuple[Target, torch.Tensor]], config: InversionConfig) -> None:
    # A difference of passes has noise of its own, which rounding draws anew.
    noise = 1.0 if config.matching.hvp == "exact" else 1e4
    together, alone = begun(targets, config), begun(targets, config)
    found = ManyInversions(together).run(print_every=4)
    for mine, own, side, single in zip(
        found, [each.run(print_every=4) for each in alone], together, alone, strict=True
    ):
        assert (mine.iterations, mine.status) == (own.iterations, own.status)
        assert mine.objective == pytest.approx(own.objective, rel=1e-9 * noise)
        assert torch.equal(mine.labels, own.labels)
        for a, b in zip(side.restarts, single.restarts, strict=True):
            assert a.index == b.index
            assert (a.variable - b.variable).abs().max() < 1e-8 * noise
        assert len(mine.trace) == len(own.trace)
        for entry, expected in zip(mine.trace, own.trace, strict=True):
            del entry["seconds"], expected["seconds"]
            assert entry == pytest.approx(expected, rel=1e-8 * noise)


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("hvp", ["exact", "difference"])
def test_each_network_ends_where_it_would_alone(network: str, hvp: str) -> None:
    spec, train_mode = NETWORKS[network]
    check_alike(share_model(spec, 3, 2, train_mode=train_mode), PLAIN.changed(hvp=hvp))


@pytest.mark.parametrize("name", SETTINGS)
def test_each_setting_ends_where_it_would_alone(name: str) -> None:
    spec, _ = NETWORKS["cnn, eval mode"]
    train_mode = "statistics" in name
    check_alike(share_model(spec, 2, 2, train_mode=train_mode), PLAIN.changed(**SETTINGS[name]))


def test_single_images_keep_their_contrast_as_they_would_alone() -> None:
    targets = share_model(NETWORKS["cnn, train mode"][0], 3, 1, train_mode=True)
    check_alike(targets, PLAIN.changed(keep_contrast=True, balance=0.5, restarts=2))


def defended(
    targets: list[tuple[Target, torch.Tensor]], *words: str
) -> list[tuple[Target, torch.Tensor]]:
    """What is shared of those of `share_model` under one defense each."""
    found = []
    for number, ((target, labels), word) in enumerate(zip(targets, words, strict=True)):
        images = smooth_images(target.batch_size, target.data.shape[-1], number + 1)
        view = ClientView(
            model=target.build_model().double(),
            images=target.data.normalize(images).double(),
            labels=labels,
            generator=torch.Generator().manual_seed(number),
        )
        shared = apply_defenses(parse_defenses(word), target.gradient, view)
        found.append((dataclasses.replace(target, gradient=shared, defenses=(word,)), labels))
    return found


@pytest.mark.parametrize(
    "word",
    ["clip:0.1", "prune:0.5", "topk:0.9", "soteria:0.5", "sign", "quantize:2", "gaussian:0.01",
     "censor:20:0", "censor", "outpost"],
)  # fmt: skip
@pytest.mark.parametrize("hvp", ["exact", "difference"])
def test_those_who_are_told_of_a_defense_end_where_they_would_alone(word: str, hvp: str) -> None:
    targets = defended(share_model(NETWORKS["cnn, eval mode"][0], 3, 2), word, word, word)
    config = PLAIN.changed(adaptive=True, hvp=hvp)
    check_alike(targets, config)
    matcher = ManyInversions(begun(targets, config))._matcher
    assert matcher._stacks


def test_a_stand_in_that_may_hold_a_target_s_tensors_is_not_taken_for_all() -> None:
    class Shifted:
        def __init__(self, by: float) -> None:
            self.by = by

        def shift(self, gradient: list[torch.Tensor]) -> list[torch.Tensor]:
            return [g + self.by for g in gradient]

    by = 2.0
    held = [
        Through(Cosine(), stand_in).held()
        for stand_in in (
            Shifted(1.0).shift,
            lambda gradient: [g + by for g in gradient],
            lambda gradient, by=1.0: [g + by for g in gradient],
            functools.partial(torch._foreach_add, other=1.0),
        )
    ]
    assert held == [None] * 4
    assert Through(Cosine(), soft_signs).held() is not None
    assert ElementWeighted(Through(Cosine(), Shifted(1.0).shift), []).held() is None


def test_different_defenses_are_compared_row_by_row() -> None:
    targets = defended(share_model(NETWORKS["lenet"][0], 2, 1), "prune:0.5", "soteria:0.5")
    config = PLAIN.changed(adaptive=True)
    assert not ManyInversions(begun(targets, config))._matcher._stacks
    check_alike(targets, config)


def test_a_target_that_ends_early_leaves_the_others_as_they_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    targets = share_model(NETWORKS["lenet"][0], 3, 1)

    def ending() -> list[Inversion]:
        """The second one ends after seven iterations."""
        inversions = begun(targets, PLAIN)
        progress = inversions[1].progress

        def status(restarts: object) -> str:
            return "patience" if progress.iteration >= 7 else "finished"

        monkeypatch.setattr(inversions[1].stopping, "status", status)
        return inversions

    found = ManyInversions(ending()).run()
    alone = [inversion.run() for inversion in ending()]
    assert [r.iterations for r in found] == [r.iterations for r in alone] == [12, 7, 12]
    for mine, own in zip(found, alone, strict=True):
        assert mine.objective == pytest.approx(own.objective, rel=1e-9)
        assert mine.status == own.status
        assert mine.details["targets_at_once"] == 3


@pytest.mark.parametrize(
    "settings",
    [
        {"input_noise": 0.1},
        {"optimizer": "LBFGS", "objective": "L2", "lr": 0.5, "box": False, "joint_labels": True},
    ],
    ids=["Adam", "L-BFGS"],
)
def test_a_killed_run_goes_on_from_its_states(tmp_path: Path, settings: dict[str, Any]) -> None:
    spec, _ = NETWORKS["lenet"]
    targets = share_model(spec, 2, 1)
    config = PLAIN.changed(restarts=2, iterations=6, **settings)
    files = [tmp_path / f"{number}.pt" for number in range(2)]
    whole = ManyInversions(begun(targets, config)).run()
    killed = ManyInversions(begun(targets, config))
    stops = iter([False] * 3)

    def stop(iteration: int, images: torch.Tensor) -> None:
        if next(stops, True):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        killed.run(on_snapshots=[stop] * 2, snapshot_every=2, state_files=files, save_every=3)
    resumed = ManyInversions(begun(targets, config)).run(state_files=files)
    for mine, own in zip(resumed, whole, strict=True):
        assert mine.iterations == own.iterations == 6
        assert mine.objective == pytest.approx(own.objective, rel=1e-12)
    # One of them can as well go on alone.
    assert begun(targets, config)[0].run(state_file=files[0]).objective == pytest.approx(
        whole[0].objective, rel=1e-9
    )


def test_what_cannot_run_at_once_says_why() -> None:
    lenet = share_model(NETWORKS["lenet"][0], 2, 1)
    other, truth = make_target(NETWORKS["lenet"][0], 1, seed=9)
    several = reason_for_one_by_one
    assert several(begun(lenet, PLAIN)) is None
    assert "SGD" in str(several(begun(lenet, PLAIN.changed(optimizer="SGD"))))
    mixed = [lenet[0], (other, truth.labels)]
    assert several(begun(mixed, PLAIN)) == "they do not come from one model"
    with pytest.raises(OneByOneError, match="one model"):
        ManyInversions(begun(mixed, PLAIN))


def test_what_a_defense_did_to_each_target_s_inputs_is_not_taken_for_all() -> None:
    spec, _ = NETWORKS["lenet"]
    targets = share_model(spec, 2, 1)

    def shaded(target: Target, by: float) -> Target:
        model = EncodedArchitecture(target.model, lambda inputs: inputs * by, 1)
        return dataclasses.replace(target, model=model)

    each = [
        (shaded(target, by), labels)
        for (target, labels), by in zip(targets, (0.5, 2.0), strict=True)
    ]
    assert "way of its own" in str(reason_for_one_by_one(begun(each, PLAIN)))
    with pytest.raises(OneByOneError, match="way of its own"):
        ManyInversions(begun(each, PLAIN))


def test_targets_of_other_losses_run_one_by_one() -> None:
    (first, labels), (second, other) = share_model(NETWORKS["lenet"][0], 2, 1)
    second = dataclasses.replace(second, loss=CrossEntropy(label_smoothing=0.1))
    inversions = begun([(first, labels), (second, other)], PLAIN)
    assert reason_for_one_by_one(inversions) == "their losses differ"


def test_a_model_that_draws_random_numbers_runs_one_by_one() -> None:
    (target, labels), (other, _) = share_model(NETWORKS["mlp"][0], 2, 1)
    inversions = begun([(target, labels), (other, labels)], PLAIN)
    for inversion in inversions:
        for model in (inversion.replica.model, inversion.matcher._perturbed):
            model.append(torch.nn.Dropout(0.5))
            model.train()
    with pytest.raises(OneByOneError, match="batched"):
        ManyInversions(inversions).run()


def test_a_diverged_row_goes_back_and_the_others_go_on() -> None:
    targets = share_model(NETWORKS["lenet"][0], 2, 1)
    inversions = begun(targets, PLAIN)
    with torch.no_grad():
        inversions[1].restarts[0].variable[:] = math.nan
    found = ManyInversions(inversions).run()
    alone = begun(targets, PLAIN)[0].run()
    assert found[0].objective == pytest.approx(alone.objective, rel=1e-9)
    assert found[1].details["events"]
    assert math.isfinite(found[1].objective)
    assert inversions[1].restarts[0].shrink == 0.5


@pytest.mark.parametrize("schedule", ["constant", "step", "cosine"])
def test_patience_is_a_share_once_the_rate_has_fallen(schedule: str) -> None:
    (target, labels), *_ = share_model(NETWORKS["lenet"][0], 1, 1)
    config = PLAIN.changed(
        iterations=80, lr=1e-9, lr_min=0.0, schedule=schedule, patience_share=0.05,
        min_improvement=0.01,
    )  # fmt: skip
    found = Inversion(target, labels, config, device=CPU, seed=0).run()
    assert found.status == "patience"
    first = {"constant": 5, "step": 70, "cosine": 64}[schedule]
    assert first <= found.iterations <= first + 2


@pytest.mark.parametrize("fitting", [1, 2, 3])
def test_rows_that_do_not_fit_are_halved(
    fitting: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    targets = share_model(*NETWORKS["lenet"][:1], 5, 1, train_mode=False)
    config = PLAIN.changed(iterations=4, hvp="auto")
    expected = [found.images for found in ManyInversions(begun(targets, config)).run()]
    for name in ("_difference", "_exact"):
        pass_of = getattr(ManyTargetsMatcher, name)

        def limited(self: Any, inputs: torch.Tensor, *rest: Any, work: Any = pass_of, **more: Any):
            if len(inputs) > fitting:
                raise torch.OutOfMemoryError
            return work(self, inputs, *rest, **more)

        monkeypatch.setattr(ManyTargetsMatcher, name, limited)
    with caplog.at_level("INFO"):
        found = [one.images for one in ManyInversions(begun(targets, config)).run()]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert "5 targets in one call do not fit" in caplog.text


def test_memory_that_one_row_does_not_find_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(ManyTargetsMatcher, "_exact", full)
    targets = share_model(*NETWORKS["lenet"][:1], 2, 1, train_mode=False)
    with pytest.raises(torch.OutOfMemoryError):
        ManyInversions(begun(targets, PLAIN)).run()
