"""Architectures at the sizes of small data sets: built, or refused in one sentence."""

from __future__ import annotations

import pytest
import torch

from core.errors import InputError
from core.models.building import ModelSpec, build_model, load_parameters
from core.models.cifar_resnet import BLOCKS


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


def test_parameters_of_an_old_file_without_counters_load() -> None:
    spec = ModelSpec("cnn", n_classes=2, image_size=32)
    model, other = build_model(spec), build_model(spec)
    state = {n: v.clone() for n, v in model.state_dict().items() if "num_batches" not in n}
    load_parameters(other, state)
    assert all(
        torch.equal(value, state[n]) for n, value in other.state_dict().items() if n in state
    )
    with pytest.raises(RuntimeError, match="Missing key"):
        load_parameters(other, {n: v for n, v in state.items() if n != "conv1.weight"})


@pytest.mark.parametrize(
    ("arch", "millions"),
    [("resnet20", 0.27), ("resnet32", 0.46), ("resnet44", 0.66), ("resnet56", 0.85)],
)
def test_cifar_resnets_have_the_published_sizes(arch: str, millions: float) -> None:
    """He et al. 2016, table 6, https://arxiv.org/abs/1512.03385."""
    model = build_model(ModelSpec(arch, n_classes=10, image_size=32))
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 2) == millions
    weighted = [m for m in model.modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Linear)]
    assert len(weighted) == int(arch.removeprefix("resnet")) == 6 * BLOCKS[arch] + 2


def test_a_cifar_resnet_shortcut_subsamples_and_pads() -> None:
    model = build_model(ModelSpec("resnet20", n_classes=3, image_size=8, width=4)).eval()
    block = model.get_submodule("layer2.0")
    x = torch.rand(2, 4, 8, 8)
    torch.nn.init.zeros_(model.get_parameter("layer2.0.bn2.weight"))
    out = block(x)
    assert torch.equal(out[:, 2:6], x[:, :, ::2, ::2])
    assert not out[:, :2].any()
    assert not out[:, 6:].any()


def test_the_rank_analysis_defense_pools_in_a_cifar_resnet() -> None:
    plain = build_model(ModelSpec("resnet20", n_classes=3, image_size=32))
    pooled = build_model(ModelSpec("resnet20", n_classes=3, image_size=32, pool_kernel=19))
    assert isinstance(plain.get_submodule("maxpool"), torch.nn.Identity)
    assert pooled.get_submodule("maxpool").kernel_size == 5
