"""The ResNets for 32 px images that their inventors trained on CIFAR-10.

Depth 6n + 2: three stages of n blocks with w, 2w and 4w channels, shortcuts without
parameters. A third of a million parameters at depth 20 and width 16; width 64 is the
"ResNet20-4" of Geiping et al. (2020), https://arxiv.org/abs/2003.14053.

Source: He et al., Deep Residual Learning for Image Recognition, CVPR 2016, section 4.2,
https://arxiv.org/abs/1512.03385.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

WIDTH = 16
# Blocks per stage by name; depth is 6n + 2.
BLOCKS = {"resnet20": 3, "resnet32": 5, "resnet44": 7, "resnet56": 9, "resnet110": 18}


class _Block(nn.Module):
    """Two convolutions beside a shortcut that subsamples and pads with zero channels."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU()
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.stride, self.missing = stride, channels - channels_in

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        shortcut = x[:, :, :: self.stride, :: self.stride]
        before = self.missing // 2
        shortcut = F.pad(shortcut, (0, 0, 0, 0, before, self.missing - before))
        return self.relu(y + shortcut)


class CifarResNet(nn.Module):
    """A classifier of images of 32 px (any side from 4 px on works).

    Parameters are named as in the widespread checkpoints (`layer1.0.conv1`, `linear`).

    Args:
        blocks: Number of residual blocks in each stage.
        n_classes: Number of outputs.
        width: Channels of the first stage.
    """

    def __init__(self, blocks: int, n_classes: int, width: int = WIDTH) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()
        # Nothing by default; the rank-analysis defense pools here.
        self.maxpool: nn.Module = nn.Identity()
        self.layer1 = _stage(width, width, blocks, stride=1)
        self.layer2 = _stage(width, 2 * width, blocks, stride=2)
        self.layer3 = _stage(2 * width, 4 * width, blocks, stride=2)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(4 * width, n_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """N x 3 x H x W to N x n_classes logits."""
        y = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        y = self.layer3(self.layer2(self.layer1(y)))
        return self.linear(self.pool(y).flatten(1))


def _stage(channels_in: int, channels: int, blocks: int, stride: int) -> nn.Sequential:
    first = _Block(channels_in, channels, stride)
    return nn.Sequential(first, *(_Block(channels, channels, 1) for _ in range(blocks - 1)))
