"""Attacks read a target and never write to it."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator

import pytest
import torch

from attack.attacks import OptimizationAttack, get_attack
from attack.loop.inversion import Inversion
from attack.matching.replica import Replica
from attack.settings import InversionConfig
from core.models.building import ModelSpec
from core.target import LocalTraining, Target
from tests.targets import make_target

CPU = torch.device("cpu")
CNN = ModelSpec("cnn", 10, 16, width=4)
PLAIN = InversionConfig(iterations=3, signed=False, tv=0.01)

Fingerprint = dict[str, tuple[str, tuple[int, ...], int]]


def tensors_of(target: Target) -> Iterator[tuple[str, torch.Tensor]]:
    for field in ("state_dict", "gradient", "running_after"):
        for name, tensor in (getattr(target, field) or {}).items():
            yield f"{field}.{name}", tensor
    for part in target.bn_statistics or ():
        for name, pair in part.items():
            yield from ((f"statistics.{name}.{i}", tensor) for i, tensor in enumerate(pair))


def fingerprint(target: Target) -> Fingerprint:
    """Bytes in logical order, strides and place in memory of every tensor of a target."""
    return {
        name: (
            hashlib.sha256(tensor.detach().contiguous().numpy().tobytes()).hexdigest(),
            tensor.stride(),
            tensor.data_ptr(),
        )
        for name, tensor in tensors_of(target)
    }


@pytest.fixture(scope="module")
def target() -> Target:
    """In float32: on a CPU its convolutions run channels last."""
    made, _ = make_target(CNN, 2, train_mode=True, double=False)
    after = {n: v + 0.1 for n, v in made.state_dict.items() if "running" in n}
    return dataclasses.replace(made, running_after=after)


LABELS = torch.tensor([0, 1])


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"hvp": "exact", "objective": "L2", "polish": 2},
        {"channels_last": True},
        {"precision": "bf16"},
        {"double": True, "bn": 0.1, "exact_bn": True},
        {"bn": 0.1, "bn_from_update": True, "balance": 0.5},
        {"joint_labels": True, "restarts": 2, "group": 0.01},
        {"adaptive": True},
    ],
    ids=lambda changes: ",".join(changes) or "plain",
)
def test_an_inversion_leaves_the_target_alone(target: Target, changes: dict[str, object]) -> None:
    if "adaptive" in changes:
        target = dataclasses.replace(target, defenses=("prune:0.5", "gaussian:0.001", "clip:1"))
    before = fingerprint(target)
    Inversion(target, LABELS, PLAIN.changed(**changes), device=CPU).run()
    assert fingerprint(target) == before


@pytest.mark.parametrize("name", ["dlg", "spectral", "gradinversion", "e2egi"])
def test_a_registered_attack_leaves_the_target_alone(target: Target, name: str) -> None:
    attack = get_attack(name)()
    if isinstance(attack, OptimizationAttack):
        attack.config = attack.config.changed(iterations=4, restarts=2, combine_every=1)
    before = fingerprint(target)
    attack.reconstruct(target, labels=LABELS, device=CPU, seed=0)
    assert fingerprint(target) == before


def test_a_closed_form_leaves_the_target_alone() -> None:
    made, truth = make_target(ModelSpec("mlp", 10, 8), 2, double=False)
    before = fingerprint(made)
    get_attack("analytic")().reconstruct(made, labels=truth.labels, device=CPU, seed=0)
    assert fingerprint(made) == before


def test_several_local_steps_leave_the_target_alone() -> None:
    local = LocalTraining(epochs=2, batches=2, lr=0.05, order=((1,), (0,), (0,), (1,)))
    made, truth = make_target(CNN, 2, train_mode=True, local=local, double=False)
    before = fingerprint(made)
    Inversion(made, truth.labels, PLAIN, device=CPU).run()
    assert fingerprint(made) == before


def test_only_what_another_layout_asks_for_is_held_twice(target: Target) -> None:
    replica = Replica(target, CPU)
    assert replica.layout == torch.channels_last
    for shared, own in zip(target.gradient.values(), replica.target_gradient, strict=True):
        assert torch.equal(shared, own)
        assert (shared.data_ptr() == own.data_ptr()) == (shared.stride() == own.stride())
