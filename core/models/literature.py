"""The small networks that the literature attacks; importing this file registers them."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import nn

from core.errors import InputError
from core.models.building import ModelSpec, register_model
from core.models.cifar_resnet import BLOCKS, WIDTH, CifarResNet

# Patches per side of the small vision transformers.
VIT_PATCHES = 8


@register_model("convnet")
def _convnet(spec: ModelSpec) -> nn.Module:
    """The ConvNet of Geiping et al. (2020), https://arxiv.org/abs/2003.14053: 8 convolutions."""
    w = spec.width or 64
    channels = [w, 2 * w, 2 * w, 4 * w, 4 * w, 4 * w, 4 * w, 4 * w]
    layers: list[nn.Module] = []
    before = 3
    for index, after in enumerate(channels):
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU()]
        if index in (5, 7):
            layers.append(nn.MaxPool2d(3))
        before = after
    side = spec.image_size // 3 // 3
    if side < 1:
        raise InputError(f"--arch convnet needs images of at least 9 px, not {spec.image_size}")
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(before * side * side, spec.n_classes))


def _cifar_resnet(spec: ModelSpec) -> nn.Module:
    return CifarResNet(BLOCKS[spec.arch], spec.n_classes, spec.width or WIDTH)


for _name in BLOCKS:
    register_model(_name)(_cifar_resnet)


@register_model("lenet")
def _lenet(spec: ModelSpec) -> nn.Module:
    """The smooth LeNet of DLG (Zhu et al. 2019), https://arxiv.org/abs/1906.08935."""
    w = spec.width or 12
    layers: list[nn.Module] = []
    for index, stride in enumerate((2, 2, 1)):
        layers += [nn.Conv2d(3 if index == 0 else w, w, 5, stride, padding=2), nn.Sigmoid()]
    with torch.no_grad():
        n = nn.Sequential(*layers)(torch.zeros(1, 3, spec.image_size, spec.image_size)).numel()
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(n, spec.n_classes))
    for parameter in model.parameters():
        # DLG's initialisation: wide enough that sigmoid gradients do not vanish.
        nn.init.uniform_(parameter, -0.5, 0.5)
    return model


@register_model("cnn6")
def _cnn6(spec: ModelSpec) -> nn.Module:
    """The network of R-GAP (Zhu and Blaschko 2021), https://arxiv.org/abs/2010.07733.

    Six convolutions without bias, leaky ReLU, no pooling: every layer can be solved for.
    """
    w = spec.width or 12
    layers: list[nn.Module] = []
    before, side = 3, spec.image_size
    shapes = [(w, 4, 2, 2), (3 * w, 3, 2, 1), (3 * w, 3, 1, 1), (3 * w, 3, 1, 1)]
    shapes += [(16 * w // 3, 3, 2, 1), (32 * w // 3, 3, 1, 1)]
    for after, kernel, stride, padding in shapes:
        layers.append(nn.Conv2d(before, after, kernel, stride, padding, bias=False))
        layers.append(nn.LeakyReLU(0.2))
        before, side = after, (side + 2 * padding - kernel) // stride + 1
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(before * side**2, spec.n_classes))


@register_model("cnn")
def _small_cnn(spec: ModelSpec) -> nn.Module:
    """Four convolutions with BatchNorm and a linear layer: the smallest useful victim."""
    w = spec.width or 16
    layers: dict[str, nn.Module] = {}
    before = 3
    for index, (after, stride) in enumerate([(w, 1), (2 * w, 2), (2 * w, 1), (4 * w, 2)], start=1):
        layers[f"conv{index}"] = nn.Conv2d(before, after, 3, stride, padding=1, bias=False)
        layers[f"bn{index}"] = nn.BatchNorm2d(after)
        layers[f"relu{index}"] = nn.ReLU()
        if index == 1:
            # Nothing by default; the rank-analysis defense pools here.
            layers["maxpool"] = nn.Identity()
        before = after
    layers["pool"] = nn.AdaptiveAvgPool2d(4)
    layers["flatten"] = nn.Flatten()
    layers["fc"] = nn.Linear(4 * w * 16, spec.n_classes)
    return nn.Sequential(OrderedDict(layers))


@register_model("mlp")
def _mlp(spec: ModelSpec) -> nn.Module:
    """Two hidden fully connected ReLU layers on the flattened image, or on a table's record."""
    w = spec.width or 256
    n = spec.features or 3 * spec.image_size**2
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(n, w),
        nn.ReLU(),
        nn.Linear(w, w),
        nn.ReLU(),
        nn.Linear(w, spec.n_classes),
    )


@register_model("vit_tiny")
def _vit_tiny(spec: ModelSpec) -> nn.Module:
    """A vision transformer for small images: 8 x 8 patches, two blocks, 192 channels."""
    from torchvision.models import VisionTransformer

    hidden = spec.width or 192
    if spec.image_size % VIT_PATCHES:
        raise InputError(
            f"--arch {spec.arch}: the image side must be a multiple of {VIT_PATCHES}, "
            f"not {spec.image_size}"
        )
    model = VisionTransformer(
        image_size=spec.image_size,
        patch_size=spec.image_size // VIT_PATCHES,
        num_layers=2,
        num_heads=next(n for n in (3, 2, 1) if hidden % n == 0),
        hidden_dim=hidden,
        mlp_dim=2 * hidden,
        num_classes=spec.n_classes,
    )
    # Torchvision starts the head at zero, through which no gradient passes.
    head: Any = model.heads.head
    head.reset_parameters()
    return model


class _BareAttention(nn.Module):
    """The first half of a transformer block without normalisation and shortcut."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.self_attention = block.self_attention
        self.ln_2, self.mlp = block.ln_2, block.mlp

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """N x tokens x channels to the same shape."""
        x, _ = self.self_attention(tokens, tokens, tokens, need_weights=False)
        return x + self.mlp(self.ln_2(x))


@register_model("vit_april")
def _vit_april(spec: ModelSpec) -> nn.Module:
    """`vit_tiny` whose first attention reads the embedding itself.

    The architecture on which APRIL's closed form is exact (Lu et al. 2022, theorem 1,
    https://arxiv.org/abs/2112.14087).
    """
    model: Any = _vit_tiny(spec)
    layers = model.encoder.layers
    layers[0] = _BareAttention(layers[0])
    return model


@register_model("fedavg_cnn")
def _fedavg_cnn(spec: ModelSpec) -> nn.Module:
    """The CNN of McMahan et al. (2017), https://arxiv.org/abs/1602.05629, a usual federated victim.

    Two 5 x 5 convolutions (32 and 64 channels) with max pooling, a hidden dense layer of 512.
    """
    w = spec.width or 32
    side = spec.image_size // 4
    if side < 1:
        raise InputError(f"--arch fedavg_cnn needs images of at least 4 px, not {spec.image_size}")
    return nn.Sequential(
        nn.Conv2d(3, w, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(w, 2 * w, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(2 * w * side**2, 16 * w),
        nn.ReLU(),
        nn.Linear(16 * w, spec.n_classes),
    )
