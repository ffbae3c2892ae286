"""Small modules, one for each thing that a user's model may contain.

All take N x 3 x 8 x 8 and give five outputs per sample.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from torchvision.ops import DropBlock2d, StochasticDepth

CHANNELS, SIDE, N_CLASSES, WIDTH = 3, 8, 5, 8


def _around(*middle: nn.Module) -> nn.Module:
    """A convolution, the layers in question, a smooth activation and a classifier."""
    return nn.Sequential(
        nn.Conv2d(CHANNELS, WIDTH, 3, padding=1),
        *middle,
        nn.Tanh(),
        nn.AdaptiveAvgPool2d(4),
        nn.Flatten(),
        nn.Linear(16 * WIDTH, N_CLASSES),
    )


def _wrapped(wrap: Callable[[nn.Conv2d], nn.Module]) -> nn.Module:
    """A convolution whose weight is computed from other parameters."""
    return nn.Sequential(
        wrap(nn.Conv2d(CHANNELS, WIDTH, 3)), nn.Tanh(), nn.Flatten(), nn.Linear(288, N_CLASSES)
    )


class Tokens(nn.Module):
    """Patches of 2 x 2 px as tokens, layers on them, their mean and a classifier."""

    def __init__(self, layers: nn.Module) -> None:
        super().__init__()
        self.embed = nn.Conv2d(CHANNELS, WIDTH, 2, 2)
        self.layers = layers
        self.head = nn.Linear(WIDTH, N_CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """N x 3 x 8 x 8 to N x 5."""
        tokens = self.embed(x).flatten(2).transpose(1, 2)
        return self.head(self.layers(tokens).mean(1))


class MultiHead(nn.Module):
    """`torch.nn.MultiheadAttention` of the tokens to themselves."""

    def __init__(self, dropout: float = 0.0, need_weights: bool = True) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 2, dropout, batch_first=True)
        self.need_weights = need_weights

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """N x tokens x channels to the same shape."""
        return self.attention(x, x, x, need_weights=self.need_weights)[0]


class ScaledDotProduct(nn.Module):
    """`scaled_dot_product_attention`; the mask holds -inf and is a buffer."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.dropout = dropout
        self.register_buffer("mask", torch.full((16, 16), -math.inf).triu(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """N x tokens x channels to the same shape."""
        q, k, v = self.qkv(x).chunk(3, -1)
        p = self.dropout if self.training else 0.0
        return F.scaled_dot_product_attention(q, k, v, self.get_buffer("mask"), p)


class Recurrent(nn.Module):
    """A recurrent layer over the columns of an image."""

    def __init__(self, kind: Callable[..., nn.Module], **options: float) -> None:
        super().__init__()
        self.layer = kind(CHANNELS * SIDE, 16, batch_first=True, **options)
        self.head = nn.Linear(16, N_CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """N x 3 x 8 x 8 to N x 5."""
        return self.head(self.layer(x.flatten(1, 2).transpose(1, 2))[0].mean(1))


class Residual(nn.Module):
    """A block whose branch is left out at random."""

    def __init__(self, mode: str) -> None:
        super().__init__()
        self.branch, self.drop = nn.Conv2d(WIDTH, WIDTH, 1), StochasticDepth(0.5, mode)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """N x channels x H x W to the same shape."""
        return x + self.drop(self.branch(x))


class Before(nn.Module):
    """A function of a module's inputs in front of it."""

    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.function, self.model = function, _around()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """N x 3 x 8 x 8 to N x 5."""
        return self.model(self.function(x))


class MovingBuffer(nn.Module):
    """A buffer that every pass moves and reads."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.model, self.in_place = _around(), in_place
        self.register_buffer("scale", torch.ones(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """N x 3 x 8 x 8 to N x 5."""
        if self.in_place:
            self.get_buffer("scale").mul_(1.1)
        else:
            self.scale = self.get_buffer("scale") * 1.1
        return self.model(x * self.get_buffer("scale"))


class Checkpointed(nn.Module):
    """A block that the backward pass computes again."""

    def __init__(self, reentrant: bool, *middle: nn.Module) -> None:
        super().__init__()
        self.reentrant = reentrant
        self.block = nn.Sequential(nn.Conv2d(CHANNELS, WIDTH, 3), nn.ReLU(), *middle, nn.Flatten())
        self.head = nn.Linear(36 * WIDTH, N_CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """N x 3 x 8 x 8 to N x 5."""
        features = checkpoint(self.block, x, use_reentrant=self.reentrant)
        return self.head(features)


class Squeezed(nn.Module):
    """SqueezeNet's fire block, and a convolution of kernel 1 as classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(CHANNELS, 4, 1)
        self.expand = nn.ModuleList([nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3, padding=1)])
        self.classifier = nn.Conv2d(8, N_CLASSES, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """N x 3 x 8 x 8 to N x 5."""
        y = self.squeeze(x).relu()
        return self.classifier(torch.cat([e(y).relu() for e in self.expand], 1)).mean((2, 3))


class Dense(nn.Module):
    """DenseNet's block: every layer reads all before it."""

    def __init__(self) -> None:
        super().__init__()
        widths = (CHANNELS, CHANNELS + 4, CHANNELS + 8)
        self.layers = nn.ModuleList([nn.Conv2d(w, 4, 3, padding=1) for w in widths])
        self.norms = nn.ModuleList([nn.BatchNorm2d(w) for w in widths])
        self.head = nn.Linear(CHANNELS + 12, N_CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """N x 3 x 8 x 8 to N x 5."""
        for norm, layer in zip(self.norms, self.layers, strict=True):
            x = torch.cat([x, layer(norm(x).relu())], 1)
        return self.head(x.mean((2, 3)))


class Tied(nn.Module):
    """Two layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        n = CHANNELS * SIDE**2
        self.first, self.second = nn.Linear(n, n), nn.Linear(n, n)
        self.second.weight = self.first.weight
        self.head = nn.Linear(n, N_CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """N x 3 x 8 x 8 to N x 5."""
        return self.head(self.second(self.first(x.flatten(1)).tanh()).tanh())


class Unused(nn.Module):
    """The classifier is registered first; two layers are never called."""

    def __init__(self) -> None:
        super().__init__()
        self.never = nn.Conv2d(1, 1, 1)
        self.head = nn.Linear(16 * WIDTH, N_CLASSES)
        self.body = _around()[:-1]  # type: ignore[index]
        self.neither = nn.Linear(3, N_CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """N x 3 x 8 x 8 to N x 5."""
        return self.head(self.body(x))


class Packed(nn.Module):
    """A model whose outputs lie in something else than a tensor."""

    def __init__(self, pack: Callable[[torch.Tensor, torch.Tensor], object]) -> None:
        super().__init__()
        self.model, self.auxiliary, self.pack = _around(), _around(), pack

    def forward(self, x: torch.Tensor) -> object:
        """N x 3 x 8 x 8 to N x 5 and another N x 5, packed."""
        return self.pack(self.model(x), self.auxiliary(x))


class WithLogits(NamedTuple):
    """What models of the `transformers` library give, roughly."""

    hidden: torch.Tensor
    logits: torch.Tensor


class Rearranged(nn.Module):
    """The image as a signal or a volume."""

    def __init__(self, shape: tuple[int, ...], *layers: nn.Module) -> None:
        super().__init__()
        self.shape = shape
        self.layers = nn.Sequential(*layers, nn.Flatten(), nn.LazyLinear(N_CLASSES))
        self.layers(torch.zeros(1, *shape))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """N x 3 x 8 x 8 to N x 5."""
        return self.layers(x.reshape(len(x), *self.shape))


class Forgetful(nn.Module):
    """Its `train` does not return it, as those of some published modules."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def train(self, mode: bool = True) -> None:  # type: ignore[override]
        """Without a result."""
        super().train(mode)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """N x 3 x 8 x 8 to N x 5."""
        return self.inner(x)


def _frozen() -> nn.Module:
    model = _around(nn.BatchNorm2d(WIDTH))
    model.get_parameter("0.weight").requires_grad_(False)
    return model


def _lazy() -> nn.Module:
    return nn.Sequential(nn.LazyConv2d(WIDTH, 3), nn.Tanh(), nn.Flatten(), nn.LazyLinear(N_CLASSES))


_norm = nn.utils.parametrizations
_signal, _volume = (CHANNELS, SIDE**2), (1, CHANNELS, SIDE, SIDE)

OWN_MODULES: dict[str, Callable[[], nn.Module]] = {
    "no special layer": _around,
    "BatchNorm": lambda: _around(nn.BatchNorm2d(WIDTH)),
    "BatchNorm without running statistics": lambda: _around(
        nn.BatchNorm2d(WIDTH, track_running_stats=False)
    ),
    "SyncBatchNorm": lambda: _around(nn.SyncBatchNorm(WIDTH)),
    "GroupNorm": lambda: _around(nn.GroupNorm(2, WIDTH)),
    "InstanceNorm": lambda: _around(nn.InstanceNorm2d(WIDTH, affine=True)),
    "InstanceNorm with running statistics": lambda: _around(
        nn.InstanceNorm2d(WIDTH, affine=True, track_running_stats=True)
    ),
    "LayerNorm": lambda: _around(nn.LayerNorm([WIDTH, SIDE, SIDE])),
    "RMSNorm": lambda: _around(nn.RMSNorm([WIDTH, SIDE, SIDE])),
    "weight norm": lambda: _wrapped(_norm.weight_norm),
    "weight norm by hook": lambda: _wrapped(nn.utils.weight_norm),
    "spectral norm": lambda: _wrapped(_norm.spectral_norm),
    "spectral norm by hook": lambda: _wrapped(nn.utils.spectral_norm),
    "Dropout": lambda: _around(nn.Dropout(0.3)),
    "Dropout2d": lambda: _around(nn.Dropout2d(0.3)),
    "AlphaDropout": lambda: _around(nn.AlphaDropout(0.3)),
    "FeatureAlphaDropout": lambda: _around(nn.FeatureAlphaDropout(0.3)),
    "functional dropout in both modes": lambda: Before(lambda x: F.dropout(x, 0.3)),
    "added noise": lambda: Before(lambda x: x + 0.1 * torch.randn_like(x)),
    "DropBlock": lambda: _around(DropBlock2d(0.2, 3)),
    "stochastic depth by row": lambda: _around(Residual("row")),
    "stochastic depth by batch": lambda: _around(Residual("batch")),
    "RReLU": lambda: _around(nn.RReLU()),
    "activations": lambda: _around(
        nn.PReLU(), nn.ELU(), nn.GELU(), nn.SiLU(), nn.Hardswish(), nn.Softplus(), nn.Mish()
    ),
    "MultiheadAttention": lambda: Tokens(MultiHead()),
    "MultiheadAttention with dropout": lambda: Tokens(MultiHead(0.2, need_weights=False)),
    "scaled_dot_product_attention": lambda: Tokens(ScaledDotProduct()),
    "scaled_dot_product_attention with dropout": lambda: Tokens(ScaledDotProduct(0.2)),
    "TransformerEncoderLayer": lambda: Tokens(
        nn.TransformerEncoderLayer(WIDTH, 2, 16, batch_first=True)
    ),
    "RNN": lambda: Recurrent(nn.RNN),
    "LSTM": lambda: Recurrent(nn.LSTM),
    "LSTM with dropout": lambda: Recurrent(nn.LSTM, num_layers=2, dropout=0.3),
    "GRU": lambda: Recurrent(nn.GRU),
    "moving buffer, in place": lambda: MovingBuffer(in_place=True),
    "moving buffer, replaced": lambda: MovingBuffer(in_place=False),
    "checkpointed block": lambda: Checkpointed(False, nn.Dropout(0.2)),
    "checkpointed block, reentrant": lambda: Checkpointed(True),
    "squeezed block": Squeezed,
    "dense block": Dense,
    "frozen parameter": _frozen,
    "tied parameters": Tied,
    "unused parameters": Unused,
    "tuple of outputs": lambda: Packed(lambda main, other: (main, other)),
    "dictionary of outputs": lambda: Packed(lambda main, other: {"aux": other, "logits": main}),
    "output with .logits": lambda: Packed(lambda main, other: WithLogits(other, main)),
    "1-D convolution": lambda: Rearranged(_signal, nn.Conv1d(3, 8, 3), nn.ReLU(), nn.MaxPool1d(2)),
    "3-D convolution": lambda: Rearranged(
        _volume, nn.Conv3d(1, 4, 3), nn.ReLU(), nn.MaxPool3d((1, 2, 2))
    ),
    "lazy layers": _lazy,
    "train() that returns nothing": lambda: Forgetful(_around(nn.BatchNorm2d(WIDTH))),
    "TorchScript": lambda: torch.jit.script(_around()),
    "DataParallel": lambda: nn.DataParallel(_around()),
    "float16 parameters": lambda: _around().half(),
    "bfloat16 parameters": lambda: _around().bfloat16(),
}
