"""R-GAP's RA index, against values computed by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from core.errors import InputError
from core.models.building import ModelSpec, build_model, skeleton_of
from gradients.rank_analysis import format_table, ra_index, rank_analysis


def _rows(model: nn.Module, shape: tuple[int, int, int], batch: int) -> list[tuple[int, ...]]:
    return [(r.n_x, r.n_w, r.n_z, r.n_v, r.index) for r in rank_analysis(model, shape, batch)]


def test_small_network_by_hand() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 2, 3, padding=1), nn.MaxPool2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(8, 2)
    )
    # Two images of 3 x 4 x 4; 3 * 2 * 9 + 2 weights; 2 x 4 x 4 and then 2 x 2 x 2 features.
    assert _rows(model, (3, 4, 4), 2) == [
        (96, 56, 64, 0, 96 - 56 - 64),
        (64, 0, 16, 0, 64 - 16),
        (16, 18, 4, 0, 16 - 18 - 4),
    ]
    assert ra_index(rank_analysis(model, (3, 4, 4), 2)) == 48


def test_expanding_layer_hands_virtual_constraints_on() -> None:
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1, bias=False), nn.MaxPool2d(3), nn.Flatten(), nn.Linear(4, 2)
    )
    # The convolution makes 36 features of 9 unknowns: 27 constraints more than needed.
    assert _rows(model, (1, 3, 3), 1) == [
        (9, 36, 36, 0, 9 - 36 - 36),
        (36, 0, 4, 27, 36 - 4 - 27),
        (4, 10, 2, 27, 4 - 10 - 2 - 27),
    ]


def test_an_underdetermined_expansion_uses_its_surplus_up() -> None:
    # 8 unknowns, 10 features and no weights that count: surplus 2, all of it carried.
    model = nn.Sequential(nn.Flatten(), nn.Linear(8, 10, bias=False), nn.Linear(10, 2))
    model[1].weight.requires_grad_(False)
    assert _rows(model, (2, 2, 2), 1)[:2] == [(8, 0, 10, 0, -2), (10, 22, 2, 2, -16)]


@pytest.mark.parametrize(
    ("kernel", "pooled", "maximum"),
    # 64 x 112 x 112 features, 64 x pooled^2 after pooling, 652288 virtual constraints.
    [(3, 56, 802816 - 64 * 56**2 - 652288), (19, 48, 802816 - 64 * 48**2 - 652288)],
)
def test_resnet18_at_224_px(kernel: int, pooled: int, maximum: int) -> None:
    model = build_model(ModelSpec("resnet18", n_classes=1000, pool_kernel=kernel))
    layers = rank_analysis(model, (3, 224, 224), 1)
    names = [layer.name for layer in layers]
    assert names[:3] == ["conv1", "maxpool", "layer1.0"]
    assert names[-2:] == ["avgpool", "fc"]
    by_name = {layer.name: layer for layer in layers}
    assert by_name["conv1"].n_w == 64 * 3 * 49
    assert by_name["layer1.0"].n_w == 64 * 64 * 9
    # The last convolution of the block and the one of its shortcut.
    assert by_name["layer2.0"].n_w == 128 * 128 * 9 + 128 * 64
    assert by_name["maxpool"].n_z == 64 * pooled**2
    assert ra_index(layers) == by_name["maxpool"].index == maximum
    # The defense: a kernel of 19 makes the network underdetermined.
    assert (maximum > 0) == (kernel == 19)


LARGE = ["vgg11", "alexnet", "resnet50", "mobilenet_v2", "efficientnet_b0", "convnext_tiny"]
LARGE += ["regnet_y_400mf", "mobilenet_v3_small", "mnasnet0_5", "efficientnet_v2_s"]
SMALL = ["cnn", "convnet", "lenet", "mlp"]


@pytest.mark.parametrize("arch", [*LARGE, *SMALL])
def test_sequential_and_residual_architectures_are_known(arch: str) -> None:
    size = 32 if arch in SMALL else 224
    model = skeleton_of(ModelSpec(arch, n_classes=10, image_size=size))
    layers = rank_analysis(model, (3, size, size), 4)
    assert layers[0].n_x == 4 * 3 * size**2
    assert layers[-1].n_z == 4 * 10


@pytest.mark.parametrize("arch", ["densenet121", "vit_b_16", "squeezenet1_0"])
def test_other_branches_are_refused(arch: str) -> None:
    model = skeleton_of(ModelSpec(arch, n_classes=10))
    with pytest.raises(InputError, match="sequential and residual networks"):
        rank_analysis(model, (3, 224, 224), 1)


def test_model_is_left_in_its_mode_and_with_its_statistics() -> None:
    model = build_model(ModelSpec("cnn", n_classes=3, image_size=8, width=2)).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    rank_analysis(model, (3, 8, 8), 2)
    assert model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


def test_table_shows_every_layer_and_the_maximum() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
    layers = rank_analysis(model, (3, 2, 2), 3)
    table = format_table(layers)
    assert "| " in table
    assert f"{36 - 26 - 6}" in table.splitlines()[-2]
    assert "maximum" in table.splitlines()[-2]
