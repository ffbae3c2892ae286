"""Dropout masks are the client's secret, unless an attacker is granted their seed."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gradinvbench as gib
from attack.attacks import get_attack
from attack.knowledge.requirements import Knowledge, check_knowledge
from attack.knowledge.threat_models import Capability, find_threat, threat_names
from attack.matching.matcher import GradientMatcher
from attack.matching.objectives import Cosine
from attack.matching.replica import Replica
from core.target import Target, Truth

CPU = torch.device("cpu")


class Masked(nn.Module):
    """Dropout by a module, by a function, or in attention."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.first = nn.Conv2d(1, 8, 3, padding=1)
        self.dropout = nn.Dropout(0.4) if kind == "module" else nn.Identity()
        self.attention = nn.MultiheadAttention(8, 2, dropout=0.4, batch_first=True)
        self.head = nn.Linear(8 * 64, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """N x 1 x 8 x 8 to N x 5."""
        x = torch.tanh(self.dropout(self.first(x)))
        if self.kind == "function":
            x = F.dropout(x, 0.4, self.training)
        if self.kind == "attention":
            tokens = x.flatten(2).transpose(1, 2)
            x = self.attention(tokens, tokens, tokens, need_weights=False)[0]
        return self.head(x.flatten(1))


def shared(kind: str = "module", local: str | None = None) -> tuple[Target, Truth]:
    torch.manual_seed(0)
    model = Masked(kind).double()
    # What was drawn before must not matter.
    images = torch.rand(3, 1, 8, 8, dtype=torch.float64)
    return gib.share(model, images, [0, 1, 2], local=local, seed=4)


def objective(target: Target, truth: Truth, known: bool, hvp: str = "auto") -> float:
    replica = Replica(target, CPU, torch.float64, known_masks=known)
    matcher = GradientMatcher(replica, Cosine(), hvp)
    inputs = target.data.normalize(truth.images)
    value = float(matcher(inputs, truth.labels).value)
    assert (
        float(matcher.value(inputs, truth.labels)) == pytest.approx(value, abs=1e-12) or not known
    )
    return value


@pytest.mark.parametrize("hvp", ["auto", "exact", "difference"])
@pytest.mark.parametrize("kind", ["module", "function", "attention"])
def test_the_true_batch_explains_the_gradient_under_known_masks_only(kind: str, hvp: str) -> None:
    target, truth = shared(kind)
    assert target.dropout_seed == 4
    assert objective(target, truth, True, hvp) < 1e-12
    assert objective(target, truth, False, hvp) > 1e-3


@pytest.mark.parametrize("local", ["sgd lr=0.1 steps=3", "sgd lr=0.1 weight-decay=0.1"])
def test_masks_of_local_steps_are_known_only_where_that_is_granted(local: str) -> None:
    target, truth = shared(local=local)
    assert objective(target, truth, True, "exact") < 1e-12
    assert objective(target, truth, False, "exact") > 1e-3


def test_restarts_draw_the_clients_masks_each() -> None:
    target, truth = shared()
    matcher = GradientMatcher(Replica(target, CPU, torch.float64, known_masks=True), Cosine())
    both = torch.stack([truth.images, torch.rand_like(truth.images)])
    first, second = matcher.several(both, truth.labels)
    assert float(first.value) < 1e-12
    assert float(second.value) == float(matcher(both[1], truth.labels).value)


def test_an_update_of_a_module_with_functional_dropout_has_a_seed() -> None:
    first, _ = shared("function")
    torch.rand(7)
    second, _ = shared("function")
    assert all(torch.equal(g, second.gradient[n]) for n, g in first.gradient.items())


def test_known_masks_recover_what_unknown_ones_do_not() -> None:
    target, truth = shared()
    options = {"iterations": 150, "double": True, "progress": False, "labels": truth.labels}
    known = gib.invert(target, known_masks=True, **options)  # type: ignore[arg-type]
    unknown = gib.invert(target, **options)  # type: ignore[arg-type]
    assert known.objective < 0.1 * unknown.objective


def test_an_honest_server_has_no_seed() -> None:
    target, _ = shared()
    granting = {"honest-server-with-masks", "worst-case"}
    for name in set(threat_names()) - {"custom"}:
        threat = find_threat(name)
        assert threat is not None
        assert (Capability.DROPOUT_MASKS in threat.grants) == (name in granting)
        assert (threat.view(target).dropout_seed is not None) == (name in granting)


def test_known_masks_need_their_grant() -> None:
    target, _ = shared()
    kind = get_attack("spectral")
    attack = kind(kind.published.changed(known_masks=True))  # type: ignore[attr-defined, call-arg]
    with pytest.raises(gib.InputError, match=r"--known-masks needs .*the seed of the client's"):
        check_knowledge(Knowledge("honest-server", known_masks=True), attack, target)
    check_knowledge(Knowledge("honest-server-with-masks", known_masks=True), attack, target)
    own = Knowledge(known_masks=True).to_record()
    assert Capability.DROPOUT_MASKS.value in own["granted"]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"dropout_seed": None}, "known_masks: the target holds no seed"),
        ({"shards": (2, 1)}, "known_masks: masks are drawn again for a client on one process"),
        ({"defenses": ("dp-sgd:1:0.1",)}, "known_masks: DP-SGD draws masks for every image"),
    ],
)
def test_masks_that_cannot_be_drawn_again_are_refused(
    change: dict[str, object], sentence: str
) -> None:
    target, truth = shared()
    other = dataclasses.replace(target, **change)  # type: ignore[arg-type]
    with pytest.raises(gib.InputError, match=sentence):
        gib.invert(other, labels=truth.labels, known_masks=True, iterations=1, progress=False)
