"""Kinds of layers: torch has no public names for the classes that those of a kind derive from."""

from __future__ import annotations

from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm
from torch.nn.modules.conv import _ConvNd as Convolution
from torch.nn.modules.dropout import _DropoutNd as Dropout

__all__ = ["BatchNorm", "Convolution", "Dropout"]
