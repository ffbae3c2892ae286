"""Torchvision's classifiers, and a few of timm's where that is installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import NamedTuple

from torch import nn

N_CLASSES = 10
SIDE = 32
# Sides of those that take no images of 32 px: their pooling, patches or windows are too large.
SIDES = {"alexnet": 64, "googlenet": 64, "inception_v3": 128, "vit_h_14": 28, "maxvit_t": 224}
# One of each family of timm that torchvision has not.
TIMM = (
    "mixer_s32_224",
    "gmlp_s16_224",
    "resnetv2_50",
    "nfnet_l0",
    "ghostnet_100",
    "levit_128s",
    "deit_tiny_patch16_224",
    "xcit_nano_12_p16_224",
    "poolformer_s12",
    "repvgg_a0",
)


class Published(NamedTuple):
    """A classifier by name.

    Attributes:
        name: As its library calls it.
        build: Builds it from torch's random numbers.
        side: Of the images, in pixels.
    """

    name: str
    build: Callable[[], nn.Module]
    side: int


def torchvision_classifiers() -> list[Published]:
    """All of torchvision's, in the order of their names."""
    import torchvision

    names = torchvision.models.list_models(module=torchvision.models)
    return [Published(name, _builder(name), SIDES.get(name, SIDE)) for name in sorted(names)]


def timm_classifiers() -> list[Published]:
    """A few of timm's; none where it is not installed."""
    if importlib.util.find_spec("timm") is None:
        return []
    return [Published(name, _timm_builder(name), 224) for name in TIMM]


def _builder(name: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import torchvision

        options: dict[str, object] = {"num_classes": N_CLASSES}
        if name in ("googlenet", "inception_v3"):
            # With the auxiliary classifiers: in train mode the outputs are several.
            options |= {"init_weights": False}
        if name.startswith("vit"):
            options |= {"image_size": SIDES.get(name, SIDE)}
        model: nn.Module = torchvision.models.get_model(name, weights=None, **options)
        return _with_a_head(model)

    return build


def _timm_builder(name: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import timm

        model: nn.Module = timm.create_model(name, pretrained=False, num_classes=N_CLASSES)
        return _with_a_head(model)

    return build


def _with_a_head(model: nn.Module) -> nn.Module:
    """Vision transformers start with a head of zeros, through which no gradient passes."""
    for module in model.modules():
        if isinstance(module, nn.Linear) and not module.weight.any():
            module.reset_parameters()
    return model
