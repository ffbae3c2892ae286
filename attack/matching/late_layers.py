"""Weight gradients kept as products, so that matching need not touch every parameter.

The weight gradient of a convolution or a fully connected layer is g = A^T d: rows of A are
the patches it read, rows of d the derivatives of the loss in its outputs, S rows in all. With
few rows (small images, late layers) the factors are far smaller than g, and give all that
matching asks of it:

    <g, g> = sum (A A^T) * (d d^T),    <g, t> = sum conv(a, t) * d,

and a second pass at W + c t + s g, which a layer with input a' answers by

    conv(a', W + c t) + s (A' A^T) d.

Where a batch is spread over processes, the factors travel instead of the gradient: every process
gathers the others' inputs and derivatives, and takes its own rows' share of the products.

The gradient is never formed. W + c t changes only with c, which the caller keeps for many
iterations. Where an objective is a function of the two products, its derivative in g is a
combination of g and t, and this is exact; the caller's difference of two passes is as accurate
as with parameters moved outright.

Source: the norm of a product, Goodfellow, Efficient Per-Example Gradient Computations, 2015,
https://arxiv.org/abs/1510.01799, and for convolutions Bu et al., Scalable and Efficient
Training of Large Convolutional Neural Networks with Differential Privacy, 2022,
https://arxiv.org/abs/2205.10683. Factors that travel instead of gradients: Xie et al., Lighter-
Communication Distributed Machine Learning via Sufficient Factor Broadcasting, UAI 2016,
https://arxiv.org/abs/1511.08486. The second pass is this project's own.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from attack.matching.fixed_convolutions import FixedConv2d, as_pair
from attack.matching.switches import RecordActivations
from core.processes import distributed

Tensors = list[torch.Tensor]
# By the identity of their weights.
Layers = dict[int, "Layer"]
# By the index of their weights among the shared parameters.
Kernels = dict[int, Callable[[torch.Tensor], torch.Tensor]]

# Kept as a product, a layer needs about four times S^2 (K + M) multiplications more, and the
# K M entries of its gradient are not written, reordered, compared and moved. Doing that to an
# entry takes about as long as so many multiplications (measured on a CPU).
MULTIPLICATIONS_PER_ENTRY = 160
# The same for sending it, where a batch is spread over processes.
MULTIPLICATIONS_PER_SENT_ENTRY = 300
# Steps whose moved weights are kept: the wanted one may lie on the border of two.
KEPT_STEPS = 2


@dataclass(frozen=True)
class Geometry:
    """How a convolution reads its input; None stands for a fully connected layer."""

    kernel: tuple[int, int]
    stride: Any
    padding: Any
    dilation: Any


class Windows:
    """Where a convolution reads, for inputs of one shape.

    Args:
        geometry: Kernel, stride, padding and dilation of the convolution.
        shape: Of its inputs, N x C x H x W.
    """

    def __init__(self, geometry: Geometry, shape: Sequence[int]) -> None:
        n, channels, *sides = shape
        self.padding, self.stride, self.dilation = (
            as_pair(v) for v in (geometry.padding, geometry.stride, geometry.dilation)
        )
        self.kernel, self.sides, self.channels = geometry.kernel, sides, channels
        self.padded = [side + 2 * p for side, p in zip(sides, self.padding, strict=True)]
        reach = [d * (k - 1) for d, k in zip(self.dilation, self.kernel, strict=True)]
        triples = zip(self.padded, reach, self.stride, strict=True)
        self.outputs = [(side - far - 1) // step + 1 for side, far, step in triples]
        self.shape = (n, *self.outputs, *self.kernel, channels)

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        """The patches of N x C x H x W, S x K."""
        (top, left), (down, right), (dy, dx) = self.padding, self.stride, self.dilation
        pixels = (F.pad(x, (left, left, top, top)) if top or left else x).permute(0, 2, 3, 1)
        n, row, column, channel = pixels.stride()
        strides = (n, down * row, right * column, dy * row, dx * column, channel)
        windows = pixels.as_strided(self.shape, strides, pixels.storage_offset())
        return windows.flatten(3).flatten(0, 2)

    def scatter(self, patches: torch.Tensor) -> torch.Tensor:
        """The transpose of `gather`: every pixel sums what it was read as."""
        windows = patches.view(self.shape)
        pixels = patches.new_zeros(self.shape[0], *self.padded, self.channels)
        for y in range(self.kernel[0]):
            for x in range(self.kernel[1]):
                rows, columns = self._read(0, y), self._read(1, x)
                pixels[:, rows, columns] += windows[:, :, :, y, x]
        (top, left), (height, width) = self.padding, self.sides
        return pixels[:, top : top + height, left : left + width].permute(0, 3, 1, 2)

    def _read(self, side: int, tap: int) -> slice:
        """The padded positions that a tap of the kernel reads along one side."""
        first, step = tap * self.dilation[side], self.stride[side]
        return slice(first, first + step * (self.outputs[side] - 1) + 1, step)


class _Patches(torch.autograd.Function):
    """Puts `Windows` into the graph.

    `torch.nn.functional.unfold` does the same for images whose channels lie apart, and for
    others copies twice.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, geometry: Geometry) -> torch.Tensor:
        ctx.windows = Windows(geometry, x.shape)
        return ctx.windows.gather(x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.windows.scatter(gradients[0].contiguous()), None


@dataclass(frozen=True)
class Layer:
    """A layer whose weight gradient is kept as a product.

    Attributes:
        index: Position of the weight among the shared parameters.
        geometry: Of its convolution; None if fully connected.
    """

    index: int
    geometry: Geometry | None

    def with_weight(self, weight: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
        """The layer without its bias, for many calls with this weight."""
        g = self.geometry
        if g is None:
            return lambda x: F.linear(x, weight)
        return FixedConv2d(weight, g.stride, g.padding, g.dilation)

    def add_bias(self, y: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Its output with the bias, one value per channel."""
        if bias is None:
            return y
        return y + (bias if self.geometry is None else bias.view(-1, 1, 1))

    def patches(self, x: torch.Tensor) -> torch.Tensor:
        """What the layer reads at each of its output positions, S x K."""
        g = self.geometry
        if g is None:
            return x.flatten(0, -2)
        patches: torch.Tensor = _Patches.apply(x, g)
        return patches

    def rows(self, y: torch.Tensor) -> torch.Tensor:
        """Values at all positions of N x C x H x W or ... x C, one position a row."""
        return y.flatten(0, -2) if self.geometry is None else y.permute(0, 2, 3, 1).flatten(0, 2)

    def from_rows(self, rows: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
        """The inverse of `rows`, for values of this shape."""
        if self.geometry is None:
            return rows.view(shape)
        n, channels, height, width = shape
        # Channels last, as convolutions on a CPU read and write them.
        return rows.view(n, height, width, channels).permute(0, 3, 1, 2)


@dataclass
class Factors:
    """One pass' weight gradient of one layer: `patches`^T `deltas`.

    Attributes:
        inputs: Of the layer, of this process's images.
        mine: The rows of this process's images.
        patches: Of the images of all processes, S x K.
        deltas: Likewise, S x M.
    """

    inputs: torch.Tensor
    mine: slice
    patches: torch.Tensor
    deltas: torch.Tensor

    def squared_norm(self) -> torch.Tensor:
        """This process's part of <g, g>, a scalar in float64."""
        a, d = self.patches, self.deltas
        return ((a[self.mine] @ a.T) * (d[self.mine] @ d.T)).sum(dtype=torch.float64)


class Factored:
    """The layers of a model whose weight gradients are kept as products.

    Args:
        layers: The late layers whose gradients stay products.
        models: Parameters of every model that runs them, each in the order shared.
        goal: The shared gradient, in the same order and layout.
        sizes: Images of each process.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        models: Sequence[Tensors],
        goal: Tensors,
        sizes: Sequence[int],
    ) -> None:
        self._layers, self._sizes = layers, sizes
        self._by_weight = {id(model[la.index]): la for la in layers for model in models}
        self._theta = [p.detach() for p in models[0]]
        self._goal = goal
        self._indices = {layer.index for layer in layers}
        self._at_theta = self._kernels(self._theta)
        self._at_goal = self._kernels(goal)
        # By the step along the target, the latest last.
        self._moved: dict[float, Kernels] = {}

    def _kernels(self, weights: Sequence[torch.Tensor]) -> Kernels:
        return {la.index: la.with_weight(weights[la.index]) for la in self._layers}

    def others(self, tensors: Sequence[torch.Tensor]) -> Tensors:
        """Those of all parameters' tensors that are handled one by one."""
        return [t for i, t in enumerate(tensors) if i not in self._indices]

    def record(self) -> RecordFactors:
        """The mode for the first pass."""
        return RecordFactors(self._by_weight, self._at_theta, self._sizes)

    def products(self, record: RecordFactors) -> tuple[float, float]:
        """<g, g> and <g, t> over all layers here, of the whole batch's gradient."""
        pairs = [
            torch.stack((factors.squared_norm(), self._target_product(layer, factors)))
            for layer, factors in record.factors()
        ]
        gg, gt = distributed.all_reduce(torch.stack(pairs).sum(0)).tolist()
        return gg, gt

    def _target_product(self, layer: Layer, factors: Factors) -> torch.Tensor:
        at_goal = layer.rows(self._at_goal[layer.index](factors.inputs))
        return (at_goal * factors.deltas[factors.mine]).sum(dtype=torch.float64)

    def along_target(self, wanted: float) -> float:
        """A step along the target within a factor of 1.5 of the wanted one.

        Any step of the right size gives the same derivative. Powers of two depend on nothing
        but the wanted step, and seldom change, so that weights moved by them can be kept.
        """
        return math.copysign(2.0 ** round(math.log2(abs(wanted))), wanted)

    def replay(self, record: RecordFactors, along: float, scale: float) -> ReplayFactors:
        """The mode for the second pass, at W + `along` t + `scale` g."""
        kernels = self._moved.pop(along, None) or self._move(along)
        self._moved[along] = kernels
        while len(self._moved) > KEPT_STEPS:
            del self._moved[next(iter(self._moved))]
        return ReplayFactors(self._by_weight, kernels, record, scale)

    def _move(self, along: float) -> Kernels:
        pairs = {i: (self._theta[i], self._goal[i]) for i in self._indices}
        moved = {i: theta.add(goal, alpha=along) for i, (theta, goal) in pairs.items()}
        return {la.index: la.with_weight(moved[la.index]) for la in self._layers}


class _LayerMode(TorchFunctionMode, abc.ABC):
    """Hands the calls of certain layers to `call`."""

    def __init__(self, layers: Layers) -> None:
        super().__init__()
        self._layers = layers

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        read = _read(func, args, kwargs or {})
        layer = None if read is None else self._layers.get(id(read.weight))
        if read is None or layer is None:
            return func(*args, **(kwargs or {}))
        return self.call(layer, read.x, read.bias)

    @abc.abstractmethod
    def call(self, layer: Layer, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """What the layer does instead."""


class RecordFactors(_LayerMode):
    """While active, layers remember what they read, and where the loss depends on them.

    Attributes:
        taps: Zeros added to the layers' outputs; the derivatives in them are the deltas.
    """

    def __init__(self, layers: Layers, kernels: Kernels, sizes: Sequence[int]) -> None:
        super().__init__(layers)
        self._kernels, self._sizes = kernels, sizes
        self.taps: Tensors = []
        self._calls: list[tuple[Layer, torch.Tensor]] = []
        self._factors: list[Factors] = []

    def call(self, layer: Layer, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """See `_LayerMode.call`."""
        output = layer.add_bias(self._kernels[layer.index](x), bias)
        tap = torch.zeros_like(output).requires_grad_()
        self.taps.append(tap)
        self._calls.append((layer, x.detach()))
        return output + tap

    def close(self, deltas: Sequence[torch.Tensor]) -> None:
        """Take the derivatives of the loss in `taps`, and what other processes have of both."""
        inputs = [x for _, x in self._calls]
        layers = [layer for layer, _ in self._calls]
        everywhere = self._gather([*layers, *layers], [*inputs, *deltas])
        n = len(layers)
        self._factors = [
            self._factors_of(layer, mine, x, d)
            for layer, mine, x, d in zip(
                layers, inputs, everywhere[:n], everywhere[n:], strict=True
            )
        ]

    def _factors_of(
        self, layer: Layer, inputs: torch.Tensor, x: torch.Tensor, deltas: torch.Tensor
    ) -> Factors:
        rows = layer.rows(deltas)
        return Factors(inputs, self._mine(len(rows)), layer.patches(x), rows)

    def _mine(self, rows: int) -> slice:
        """Which of all rows belong to this process's images."""
        if len(self._sizes) == 1:
            return slice(None)
        share = distributed.shard_slice(self._sizes, distributed.rank())
        per_image = rows // sum(self._sizes)
        return slice(share.start * per_image, share.stop * per_image)

    def _gather(self, layers: Sequence[Layer], values: Sequence[torch.Tensor]) -> Tensors:
        """The values of all processes' images, in one message."""
        if len(self._sizes) == 1:
            return list(values)
        n = self._sizes[distributed.rank()]
        pieces = [la.rows(v).reshape(n, -1) for la, v in zip(layers, values, strict=True)]
        whole = distributed.all_gather_rows(torch.cat(pieces, 1), self._sizes)
        columns = whole.split([p.shape[1] for p in pieces], 1)
        shares = zip(layers, columns, values, strict=True)
        return [_assembled(layer, column, like) for layer, column, like in shares]

    def factors(self) -> Iterator[tuple[Layer, Factors]]:
        """Every layer and its gradient's factors, in the order of execution."""
        layers = (layer for layer, _ in self._calls)
        return zip(layers, self._factors, strict=True)


def _assembled(layer: Layer, images: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Gathered values, one image a row, as the layer has them for one process's images."""
    if layer.geometry is None:
        # Only rows count; which dimension tells images apart is the model's affair.
        return images.reshape(-1, like.shape[-1])
    return layer.from_rows(images.reshape(-1), (len(images), *like.shape[1:]))


class ReplayFactors(_LayerMode):
    """While active, layers act with weights moved along the target and a recorded gradient."""

    def __init__(
        self, layers: Layers, kernels: Kernels, record: RecordFactors, scale: float
    ) -> None:
        super().__init__(layers)
        self._kernels = kernels
        self._scale = scale
        self._factors = {layer.index: factors for layer, factors in record.factors()}

    def call(self, layer: Layer, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """See `_LayerMode.call`."""
        factors = self._factors[layer.index]
        output = layer.add_bias(self._kernels[layer.index](x), bias)
        along = (layer.patches(x) @ factors.patches.T) @ (factors.deltas * self._scale)
        return output + layer.from_rows(along, output.shape)


class Read(NamedTuple):
    """What a call of a layer reads; geometry None stands for a fully connected one."""

    x: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    geometry: Geometry | None


def _read(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Read | None:
    """None for all but plain convolutions of batches and fully connected layers."""
    reader = _READERS.get(func)
    return None if reader is None else reader(*args, **kwargs)


def _read_conv(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Read | None:
    if groups > 1 or isinstance(padding, str) or x.dim() != 4:
        return None
    kernel = (weight.shape[2], weight.shape[3])
    return Read(x, weight, bias, Geometry(kernel, stride, padding, dilation))


def _read_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> Read:
    return Read(x, weight, bias, None)


_READERS: dict[Any, Callable[..., Read | None]] = {
    F.conv2d: _read_conv,
    F.linear: _read_linear,
}


class _Survey(TorchFunctionMode):
    """Notes how a forward pass uses each parameter."""

    def __init__(self, indices: dict[int, int]) -> None:
        super().__init__()
        self._indices = indices
        self.uses: dict[int, int] = {}
        self.rows: dict[int, int] = {}
        self.found: dict[int, Layer] = {}

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        for index in self._used((*args, *(kwargs or {}).values())):
            self.uses[index] = self.uses.get(index, 0) + 1
        read = _read(func, args, kwargs or {})
        if read is not None and id(read.weight) in self._indices:
            index = self._indices[id(read.weight)]
            self.found[index] = Layer(index, read.geometry)
            self.rows[index] = output.numel() // read.weight.shape[0]
        return output

    def _used(self, values: Sequence[Any]) -> list[int]:
        return [self._indices[id(v)] for v in values if id(v) in self._indices]


def find_layers(
    model: nn.Module, parameters: Tensors, shape: Sequence[int], worth: Callable[..., bool]
) -> list[Layer]:
    """The layers whose weight gradient is better kept as a product.

    A weight that is used twice, or by anything but a plain convolution or a fully
    connected layer, is none of them.

    Args:
        model: Run once, without a gradient.
        parameters: The shared parameters of that model.
        shape: Of its inputs, n x C x H x W.
        worth: Of rows, patch size K and channels M.
    """
    survey = _Survey({id(p): i for i, p in enumerate(parameters)})
    # Not a plain zero: some layers divide by what they read.
    inputs = torch.full(tuple(shape), 0.5, device=parameters[0].device, dtype=parameters[0].dtype)
    # Of the GPUs, only the one that the model runs on: a process should not touch the others.
    used = [inputs.device] if inputs.is_cuda else []
    with torch.random.fork_rng(devices=used), torch.no_grad(), RecordActivations(), survey:
        model(inputs)
    return [
        layer
        for index, layer in sorted(survey.found.items())
        if survey.uses[index] == 1
        and worth(survey.rows[index], *_patch_and_channels(parameters[index]))
    ]


def _patch_and_channels(weight: torch.Tensor) -> tuple[int, int]:
    return weight[0].numel(), weight.shape[0]


def saves_sweeps(rows: int, patch: int, channels: int, sizes: Sequence[int]) -> bool:
    """Whether the factors cost less than sweeping over the weight gradient, and sending it.

    All processes come to the same answer.

    Args:
        rows: Output positions of this process's images.
        patch: Values that one of them reads, K.
        channels: Outputs of one of them, M.
        sizes: Images of each process.
    """
    all_rows = rows * sum(sizes) // sizes[distributed.rank()]
    most_rows = all_rows * max(sizes) // sum(sizes)
    multiplications = 4 * most_rows * all_rows * (patch + channels)
    sent = MULTIPLICATIONS_PER_SENT_ENTRY if len(sizes) > 1 else 0
    return multiplications <= (MULTIPLICATIONS_PER_ENTRY + sent) * patch * channels
