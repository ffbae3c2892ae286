"""A batch in pieces: the same objective and gradient, with one piece's activations at a time."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import gradinvbench as gib
from attack.loop.inversion import Inversion
from attack.matching.matcher import GradientMatcher, cosine_of_images
from attack.matching.objectives import L2, Cosine
from attack.matching.pieces import PieceMatcher
from attack.matching.replica import Replica
from attack.settings import InversionConfig, told_by_flag
from core.errors import InputError
from core.models.building import ModelSpec
from core.target import LocalTraining, Target, Truth
from gradients.checkpoint import save_target
from tests.targets import make_target

CPU = torch.device("cpu")
CNN = ModelSpec("cnn", 10, 16, width=8)
PLAIN = InversionConfig(iterations=5, tv=0.01, double=True, hvp="exact", signed=False)


def candidate(target: Target, truth: Truth) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    shape = (target.batch_size, *target.data.shape)
    return torch.randn(shape, generator=generator, dtype=torch.float64), truth.labels


@pytest.mark.parametrize("hvp", ["exact", "difference", "auto"])
@pytest.mark.parametrize("at_once", [1, 2, 3, 8])
@pytest.mark.parametrize("arch", ["cnn", "lenet"])
def test_pieces_give_what_the_whole_batch_does(arch: str, at_once: int, hvp: str) -> None:
    target, truth = make_target(ModelSpec(arch, 10, 16, width=4), 5)
    inputs, labels = candidate(target, truth)
    replica = Replica(target, CPU, torch.float64)
    for objective in (Cosine(), L2()):
        whole = GradientMatcher(replica, objective, "exact")(inputs, labels, weight=2.0)
        pieces = PieceMatcher(replica, objective, hvp, at_once)
        found = pieces(inputs, labels, weight=2.0)
        torch.testing.assert_close(found.value, whole.value, rtol=1e-12, atol=0)
        if hvp == "exact":
            torch.testing.assert_close(found.input_gradient, whole.input_gradient)
        assert cosine_of_images(found.input_gradient, whole.input_gradient) > 1 - 1e-9
        torch.testing.assert_close(pieces.value(inputs, labels), whole.value, rtol=1e-12, atol=0)


def test_a_whole_attack_ends_at_the_same_images() -> None:
    target, truth = make_target(CNN, 4)
    for changes in ({}, {"joint_labels": True, "objective": "L2", "tv": 0.0}):
        config = PLAIN.changed(**changes)
        found = [
            Inversion(
                target, truth.labels, config.changed(images_at_once=n), device=CPU, seed=1
            ).run()
            for n in (0, 1, 3)
        ]
        for other in found[1:]:
            torch.testing.assert_close(other.images, found[0].images, rtol=0, atol=1e-6)
            assert other.objective == pytest.approx(found[0].objective, rel=1e-6)


def test_less_is_held_for_derivatives() -> None:
    target, truth = make_target(CNN, 8)
    inputs, labels = candidate(target, truth)
    replica = Replica(target, CPU, torch.float64)

    def most_held(matcher: GradientMatcher) -> int:
        """Bytes of the largest graph: of what passes keep for their derivatives."""
        now, most = 0, 0

        class Held:
            def __init__(self, tensor: torch.Tensor) -> None:
                nonlocal now, most
                self.tensor, self.size = tensor, tensor.numel() * tensor.element_size()
                now += self.size
                most = max(most, now)

            def __del__(self) -> None:
                nonlocal now
                now -= self.size

        with torch.autograd.graph.saved_tensors_hooks(Held, lambda held: held.tensor):
            matcher(inputs, labels)
        return most

    for hvp in ("difference", "exact"):
        whole = most_held(GradientMatcher(replica, Cosine(), hvp, factor=False))
        found = most_held(PieceMatcher(replica, Cosine(), hvp, 2))
        assert found < 0.6 * whole, (hvp, found, whole)


class Mixing(nn.Module):
    """A network whose outputs depend on the other images."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3 * 64, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        features = x.flatten(1)
        return self.layer(torch.tanh(features - features.mean(0)))


def test_a_network_that_mixes_images_is_refused() -> None:
    images = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    target, _ = gib.share(Mixing(), images, torch.tensor([0, 1, 2]))
    with pytest.raises(InputError, match="the network mixes the images of a batch"):
        gib.invert(target, iterations=2, images_at_once=1, progress=False)


@pytest.mark.parametrize(
    ("target", "changes", "sentence"),
    [
        (make_target(CNN, 2, train_mode=True), {}, "BatchNorm used the statistics"),
        (make_target(CNN, 2, local=LocalTraining(epochs=2, lr=0.05)), {}, "2 local step"),
        (make_target(CNN, 2), {"channels_last": True}, "not with --trace, --compile"),
        (make_target(CNN, 2), {"images_at_once": -1}, "--images-at-once must be at least 0"),
    ],
    ids=["BatchNorm", "local steps", "speed", "negative"],
)
def test_what_cannot_be_taken_apart_says_why(
    target: tuple[Target, Truth], changes: dict[str, Any], sentence: str
) -> None:
    config = PLAIN.changed(**{"images_at_once": 1, **changes})
    with pytest.raises(InputError, match=sentence), told_by_flag():
        Inversion(target[0], target[1].labels, config, device=CPU).run()


def test_a_penalty_on_statistics_needs_the_whole_batch() -> None:
    target, truth = make_target(CNN, 2, adapted=True)
    config = PLAIN.changed(images_at_once=1, bn=0.1)
    with pytest.raises(InputError, match="needs the whole batch"):
        Inversion(target, truth.labels, config, device=CPU).run()


def test_the_command_takes_it(tmp_path: Path) -> None:
    from attack.cli.command import main

    target, truth = make_target(CNN, 3, double=False)
    save_target(tmp_path / "t.tar", dataclasses.replace(target), truth)
    words = ["--checkpoint", str(tmp_path / "t.tar"), "--root", str(tmp_path), "--epochs", "2"]
    words += ["--images-at-once", "2", "--pseudo-label-init", "known", "--metric", "--quiet"]
    assert main(words) in (None, 0)
    assert '"images_at_once": 2' in (tmp_path / "test" / "record.json").read_text()
