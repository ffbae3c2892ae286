"""Torchvision's classifiers, and a few of timm's where that is installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import NamedTuple

from torch import nn

N_CLASSES = 10
# Smaller images would leave BatchNorm a single position in the last layers.
SIDE = 64
NARROW_SIDE = 32
# Sides of those that take no images of 64 px: their pooling, patches or windows are too large.
SIDES = {"inception_v3": 299, "vit_h_14": 56, "maxvit_t": 224}
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


def narrow_classifiers() -> list[Published]:
    """Torchvision's large architectures with few channels and blocks, for a quick check."""
    kinds = {"vgg": _vgg, "vit": _vit, "swin": _swin, "swin_v2": _swin_v2, "convnext": _convnext}
    return [Published(f"{name}, narrow", kinds[name], NARROW_SIDE) for name in kinds]


def _vgg() -> nn.Module:
    from torchvision.models import VGG, vgg

    model = VGG(vgg.make_layers([8, "M", 16, 16, "M"], batch_norm=True), N_CLASSES)
    model.avgpool = nn.AdaptiveAvgPool2d(2)
    layers = (nn.Linear(64, 64), nn.ReLU(), nn.Dropout(), nn.Linear(64, N_CLASSES))
    model.classifier = nn.Sequential(*layers)
    return model


def _vit() -> nn.Module:
    from torchvision.models import VisionTransformer

    return _with_a_head(VisionTransformer(NARROW_SIDE, 8, 2, 2, 32, 64, 0.1, 0.1, N_CLASSES))


def _swin() -> nn.Module:
    from torchvision.models import SwinTransformer

    return SwinTransformer(
        [4, 4], 16, [2, 2], [2, 4], [4, 4], stochastic_depth_prob=0.3, num_classes=N_CLASSES
    )


def _swin_v2() -> nn.Module:
    from torchvision.models import SwinTransformer, swin_transformer

    return SwinTransformer(
        [4, 4],
        16,
        [2, 2],
        [2, 4],
        [4, 4],
        stochastic_depth_prob=0.3,
        num_classes=N_CLASSES,
        block=swin_transformer.SwinTransformerBlockV2,
        downsample_layer=swin_transformer.PatchMergingV2,
    )


def _convnext() -> nn.Module:
    from torchvision.models import ConvNeXt
    from torchvision.models.convnext import CNBlockConfig

    blocks = [CNBlockConfig(16, 32, 1), CNBlockConfig(32, None, 2)]
    return ConvNeXt(blocks, stochastic_depth_prob=0.3, num_classes=N_CLASSES)


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
