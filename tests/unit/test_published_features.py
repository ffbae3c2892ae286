"""What the published attacks add to the loop: signs, noise, registration, stages, priors."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from PIL import Image

from attack.attacks.fedavg import average_of_epochs, one_long_epoch
from attack.loop.fusion import group_target
from attack.loop.inversion import Inversion
from attack.loop.schedules import staged_learning_rate
from attack.matching.objectives import LayerNorms, layer_weights
from attack.settings import InversionConfig
from core.errors import InputError
from core.models.building import ModelSpec
from core.pictures import read_image
from core.target import LocalTraining, Target, Truth
from gradients.local_update import unrolled_update
from tests.targets import make_target, smooth_images

CPU = torch.device("cpu")
LENET = ModelSpec("lenet", 10, 8, width=4)
FAST = InversionConfig(iterations=8, signed=False, tv=0.0, double=True, hvp="exact")


@pytest.fixture(scope="module")
def lenet() -> tuple[Target, Truth]:
    return make_target(LENET, 2)


def inversion(made: tuple[Target, Truth], **fields: object) -> Inversion:
    target, truth = made
    config = FAST.changed(**fields)  # type: ignore[arg-type]
    return Inversion(target, truth.labels, config, device=CPU)


def test_soft_sign_is_the_gradient_first_small_and_at_last(lenet: tuple[Target, Truth]) -> None:
    loop = inversion(lenet, soft_sign=True)
    gradient = torch.tensor([-5.0, 1e-3, 0.5])
    torch.testing.assert_close(loop.stepper.direction.signed(gradient, 0), gradient.tanh())
    # Half way: tanh(g / 2) * 2, at most 2.
    torch.testing.assert_close(
        loop.stepper.direction.signed(gradient, 4), 2 * (gradient / 2).tanh()
    )


def test_noise_is_scaled_by_the_learning_rate(lenet: tuple[Target, Truth]) -> None:
    loop = inversion(lenet, input_noise=0.5, box=False, schedule="constant", lr=0.2)
    restart = loop.restarts[0]
    before = restart.variable.detach().clone()
    loop.stepper.add_noise(restart, 0)
    assert float((restart.variable.detach() - before).std()) == pytest.approx(0.5 * 0.2, rel=0.1)


def test_group_waits_for_its_start_and_is_renewed_at_its_pace(lenet: tuple[Target, Truth]) -> None:
    loop = inversion(lenet, restarts=2, group=0.1, group_start=0.5, group_every=2)
    assert loop.consensus.target(loop.restarts, 3) is None
    first = loop.consensus.target(loop.restarts, 4)
    with torch.no_grad():
        loop.restarts[0].variable.add_(1)
    assert loop.consensus.target(loop.restarts, 5) is first
    renewed = loop.consensus.target(loop.restarts, 6)
    assert first is not None
    assert renewed is not None
    torch.testing.assert_close(renewed, first + 0.5)


def test_registration_undoes_shifts() -> None:
    images = smooth_images(2, 16)
    shifted = torch.stack([images, images.roll((1, -1), dims=(-2, -1)), images])
    registered = group_target(shifted, registration=True)
    plain = group_target(shifted)
    assert float((registered - images).square().mean()) < 1e-10
    assert float((plain - images).square().mean()) > 1e-4


@pytest.mark.parametrize("iteration", [0, 29, 30, 59, 60, 99])
def test_stages_follow_the_line_from_end_to_end(iteration: int) -> None:
    ends, lr, lr_min = [30, 60, 100], 1.0, 0.1
    line = lr + (lr_min - lr) * iteration / 100
    found = staged_learning_rate(iteration, ends, lr, lr_min)
    # On the line where a stage begins; elsewhere not far from it.
    assert found == pytest.approx(line, abs=1e-12 if iteration in (0, 30, 60) else 0.05)


def test_layer_norms_are_the_sum_of_distances_with_their_derivative() -> None:
    generator = torch.Generator().manual_seed(0)
    gradient = [torch.randn(s, generator=generator).double() for s in ((3, 4), (5,))]
    target = [torch.randn(s, generator=generator).double() for s in ((3, 4), (5,))]
    value, seed = LayerNorms().value_and_seed(gradient, target)
    norms = [float((g - t).norm()) for g, t in zip(gradient, target, strict=True)]
    assert float(value) == pytest.approx(sum(norms))
    for g, t, s, n in zip(gradient, target, seed, norms, strict=True):
        torch.testing.assert_close(s, (g - t) / n)
    assert float(LayerNorms().value_and_seed(target, target)[1][0].norm()) == 0


def test_decay_gives_each_layer_e_times_less() -> None:
    weights = layer_weights(4, "decay")
    assert weights[0] == weights[1] == 1
    assert weights[2] ** 2 == pytest.approx(torch.tensor(-1.0).exp().item())


def test_one_long_epoch_is_the_same_update() -> None:
    local = LocalTraining(epochs=2, batches=2, lr=0.05)
    target, truth = make_target(LENET, 4, local=local)
    long = one_long_epoch(target)
    assert (long.batch_size, long.local.steps) == (8, 4)
    inputs = target.data.normalize(truth.images).double().repeat(2, 1, 1, 1)
    update = unrolled_update(
        target.build_model().double(), inputs, truth.labels.repeat(2), long.local
    )
    for name, shared in target.gradient.items():
        torch.testing.assert_close(update[name].detach(), shared)
    with pytest.raises(InputError, match="3 images do not make 2 local batches"):
        one_long_epoch(dataclasses.replace(target, batch_size=3, shards=(3,)))


def test_copies_of_epochs_are_matched_before_they_are_averaged() -> None:
    images = smooth_images(3, 8)
    copies = torch.cat([images + 0.01, images[[2, 0, 1]] - 0.01])
    torch.testing.assert_close(average_of_epochs(copies, 2), images)


def test_a_prior_start_needs_the_prior(lenet: tuple[Target, Truth], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="give the image to start from with prior"):
        inversion(lenet, start="prior")
    path = tmp_path / "grey.png"
    Image.new("RGB", (20, 10), (51, 102, 255)).save(path)
    image = read_image(path, (3, 8, 8), "--prior")
    torch.testing.assert_close(image[:, 0, 0], torch.tensor([0.2, 0.4, 1.0]))
    with pytest.raises(InputError, match=r"--prior: there is no image nothing\.png"):
        read_image("nothing.png", (3, 8, 8), "--prior")


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"features": 0.1, "joint_labels": True}, r"priors\.features needs known labels"),
        ({"signed": True, "soft_sign": True}, r"optimiser\.soft_sign replaces the sign"),
    ],
    ids=["features", "soft sign"],
)
def test_contradictions_are_refused(fields: dict[str, object], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        FAST.changed(**fields).validate()  # type: ignore[arg-type]
