"""Architectures at the sizes of small data sets: built, or refused in one sentence."""

from __future__ import annotations

import pytest
import torch

from training.errors import InputError
from training.models import ModelSpec, build_model, load_parameters


@pytest.mark.parametrize(
    ("arch", "side", "reason"),
    [
        ("vit_b_16", 20, "indivisible by patch size"),
        ("alexnet", 8, "Output size is too small"),
        ("squeezenet1_0", 8, "Output size is too small"),
    ],
)
def test_images_that_an_architecture_cannot_take(arch: str, side: int, reason: str) -> None:
    with pytest.raises(
        InputError, match=rf"--arch {arch} cannot take images of {side} px.*{reason}"
    ):
        build_model(ModelSpec(arch, n_classes=2, image_size=side))


def test_the_trial_draws_nothing_and_leaves_the_mode() -> None:
    spec = ModelSpec("alexnet", n_classes=2, image_size=64)
    torch.manual_seed(0)
    model = build_model(spec)
    after = torch.rand(1)
    assert model.training
    torch.manual_seed(0)
    import torchvision

    torchvision.models.alexnet(num_classes=2)
    assert torch.equal(torch.rand(1), after)


def test_a_width_that_nothing_would_heed_is_refused() -> None:
    with pytest.raises(InputError, match=r"--width: .*not vgg11"):
        build_model(ModelSpec("vgg11", n_classes=2, image_size=32, width=8))


def test_parameters_from_a_plain_dictionary_load_whatever_versions_a_model_asks_for() -> None:
    spec = ModelSpec("mnasnet0_5", n_classes=2, image_size=32)
    model, other = build_model(spec), build_model(spec)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    load_parameters(other, state)
    assert all(torch.equal(value, state[name]) for name, value in other.state_dict().items())
