"""Small classifiers whose head reads features of both signs, and one of which it does not."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

SIDE = 32
CHANNELS = 3
WIDTH = 32
# How long a network is trained, on batches of so many images.
STEPS, BATCH = 150, 32


class Rows(nn.Module):
    """A recurrent network that reads an image row by row.

    Args:
        kind: `nn.LSTM` or `nn.GRU`.
        n_classes: Number of outputs.
    """

    def __init__(self, kind: type[nn.LSTM] | type[nn.GRU], n_classes: int) -> None:
        super().__init__()
        self.layers = kind(CHANNELS * SIDE, WIDTH, batch_first=True)
        self.head = nn.Linear(WIDTH, n_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """N x 3 x 32 x 32 to N x classes."""
        states, _ = self.layers(images.transpose(1, 2).flatten(2))
        outputs: torch.Tensor = self.head(states[:, -1])
        return outputs


def _vision_transformer(n: int) -> nn.Module:
    from torchvision.models import VisionTransformer

    model = VisionTransformer(SIDE, 8, 2, 2, WIDTH, 64, 0.1, 0.1, n)
    # It starts with a head of zeros, through which no gradient passes.
    for layer in model.heads:
        if isinstance(layer, nn.Linear):
            layer.reset_parameters()
    return model


def _swin(n: int, second: bool = False) -> nn.Module:
    from torchvision.models import SwinTransformer, swin_transformer

    other = {
        "block": swin_transformer.SwinTransformerBlockV2,
        "downsample_layer": swin_transformer.PatchMergingV2,
    }
    return SwinTransformer(
        [4, 4], 16, [2, 2], [2, 4], [4, 4], stochastic_depth_prob=0.1, num_classes=n,
        **(other if second else {}),
    )  # fmt: skip


def _convnext(n: int) -> nn.Module:
    from torchvision.models import ConvNeXt
    from torchvision.models.convnext import CNBlockConfig

    blocks = [CNBlockConfig(16, WIDTH, 1), CNBlockConfig(WIDTH, None, 2)]
    return ConvNeXt(blocks, stochastic_depth_prob=0.1, num_classes=n)


def _convolutional(n: int, *end: nn.Module) -> nn.Module:
    layers = (nn.Conv2d(CHANNELS, 16, 5, 2, 2), nn.ReLU(), nn.Conv2d(16, WIDTH, 5, 2, 2), nn.ReLU())
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), *end, nn.Linear(WIDTH, n))


def _after(*end: nn.Module) -> Callable[[int], nn.Module]:
    return lambda n: _convolutional(n, nn.Linear(4 * WIDTH, WIDTH), *end)


# The last one's features have one sign: what the published rules assume.
NETWORKS: dict[str, Callable[[int], nn.Module]] = {
    "vision transformer": _vision_transformer,
    "Swin": _swin,
    "Swin V2": lambda n: _swin(n, second=True),
    "ConvNeXt": _convnext,
    "LSTM": lambda n: Rows(nn.LSTM, n),
    "GRU": lambda n: Rows(nn.GRU, n),
    "CNN, LayerNorm": lambda n: _after(nn.LayerNorm(WIDTH))(n),
    "CNN, tanh": lambda n: _after(nn.Tanh())(n),
    "CNN, hardswish": lambda n: _after(nn.Hardswish())(n),
    "CNN, GELU and dropout": lambda n: _after(nn.GELU(), nn.Dropout(0.2))(n),
    "CNN, ReLU": lambda n: _after(nn.ReLU())(n),
}
ONE_SIGN = "CNN, ReLU"


def network(name: str, n_classes: int, seed: int) -> nn.Module:
    """A freshly initialised network, in train mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return NETWORKS[name](n_classes).train()


def trained(model: nn.Module, images: torch.Tensor, labels: torch.Tensor, seed: int) -> nn.Module:
    """The network after `STEPS` steps of Adam.

    Args:
        model: Changed.
        images: N x 3 x 32 x 32.
        labels: N class indices.
        seed: Of the batches and of dropout.
    """
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for _ in range(STEPS):
            chosen = torch.randint(len(images), (BATCH,), generator=generator)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images[chosen]), labels[chosen]).backward()
            optimizer.step()
    return model
