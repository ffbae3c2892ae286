"""Small convolutions as matrix products, in a list of operators.

A convolution is the product of its weight with the columns of the patches it looks at, and the
gradient in the weight that of its output's with the same columns, which are laid out once for both.
Libraries choose a layout, reorder tensors and look kernels up for every call, which for few
channels or few images takes longer than the product: on a processor with AVX-512, LeNet's three
convolutions with their derivatives take a third of the time.

Source: Chellapilla et al., High Performance Convolutional Neural Networks for Document Processing,
IWFHR 2006, section 3, https://inria.hal.science/inria-00112631.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import Graph, GraphModule, Node

from core.models.unchanged import unchanged

aten = torch.ops.aten
# Where it was measured to pay: so few images in a batch, and multiplications.
FEW_IMAGES, FEW_PRODUCTS = 2, 5_000_000
PRECISIONS = (torch.float32, torch.float64)


def all_are_small(model: nn.Module, shape: Sequence[int]) -> bool:
    """Whether every convolution of a model is better written out, so that no other layout pays.

    Args:
        model: Run once, without a gradient.
        shape: Of its inputs, N x C x H x W.
    """
    layers = [m for m in model.modules() if isinstance(m, nn.modules.conv._ConvNd)]
    verdicts: list[bool] = []

    def look(layer: nn.Module, given: tuple[torch.Tensor, ...], found: torch.Tensor) -> None:
        verdicts.append(isinstance(layer, nn.Conv2d) and _layer_is_small(layer, given[0], found))

    handles = [layer.register_forward_hook(look) for layer in layers]
    parameter = next(model.parameters())
    try:
        with torch.no_grad(), unchanged(model):
            model.eval()
            # Not a plain zero: some layers divide by what they read.
            model(torch.full(tuple(shape), 0.5, device=parameter.device, dtype=parameter.dtype))
    except RuntimeError:
        # The passes themselves will say why.
        return False
    finally:
        for handle in handles:
            handle.remove()
    return bool(verdicts) and all(verdicts)


def _layer_is_small(layer: nn.Conv2d, inputs: torch.Tensor, found: torch.Tensor) -> bool:
    plain = layer.groups == 1 and max(layer.dilation) == 1 and layer.padding_mode == "zeros"
    return plain and _pays(tuple(inputs.shape), tuple(found.shape), tuple(layer.weight.shape))


def write_out_small_convolutions(module: GraphModule) -> None:
    """Replace small convolutions of two dimensions, and their derivatives, by matrix products.

    Args:
        module: As of `plain_operators`, for tensors on a CPU; changed in place, up to rounding.
    """
    writer = _Writer(module.graph)
    for node in list(module.graph.nodes):
        if node.target == aten.convolution.default:
            writer.write_out(node)
        elif node.target == aten.convolution_backward.default:
            writer.write_out_derivatives(node)
    module.graph.eliminate_dead_code()
    module.recompile()


class _Writer:
    """Writes the products of one list of operators.

    Args:
        graph: The list.
    """

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        # The columns of every convolution's inputs: one node for all that ask for them.
        self._columns: dict[tuple[Any, ...], Node] = {}

    def write_out(self, node: Node) -> None:
        """Replace a convolution, if it is small."""
        arguments: tuple[Any, ...] = node.args
        inputs, weight, bias, *settings = arguments
        if _is_small(inputs, weight, _shape(node), settings):
            with self._graph.inserting_before(node):
                patches = self._patches(inputs, weight, settings)
                self._call_for(node, filtered, weight, patches, bias, _shape(node))

    def write_out_derivatives(self, node: Node) -> None:
        """Replace what is asked for of a small convolution's derivatives."""
        arguments: tuple[Any, ...] = node.args
        gradient, inputs, weight, _, *settings, wanted = arguments
        if not _is_small(inputs, weight, _shape(gradient), settings):
            return
        for user in list(node.users):
            if user.target != operator.getitem or not wanted[user.args[1]]:
                continue
            with self._graph.inserting_before(user):
                if user.args[1] == 0:
                    stride, padding = settings[:2]
                    given = (gradient, inputs, weight, stride, padding)
                    self._call_for(user, gradient_in_inputs, *given)
                elif user.args[1] == 1:
                    patches = self._patches(inputs, weight, settings)
                    self._call_for(user, gradient_in_weight, gradient, patches, _shape(weight))
                else:
                    self._call_for(user, gradient_in_bias, gradient)

    def _call_for(self, node: Node, function: Callable[..., Any], *arguments: Any) -> None:
        """Put a call in a node's place."""
        found = self._graph.call_function(function, arguments)
        found.meta.update(node.meta)
        node.replace_all_uses_with(found)

    def _patches(self, inputs: Node, weight: Node, settings: Sequence[Any]) -> Node:
        stride, padding = settings[:2]
        kernel = _shape(weight)[2:]
        key = (inputs, kernel, *stride, *padding)
        if key not in self._columns:
            given = (inputs, kernel, stride, padding)
            self._columns[key] = self._graph.call_function(patches_of, given)
        return self._columns[key]


def _shape(node: Node) -> tuple[int, ...]:
    return tuple(node.meta["val"].shape)


def _is_small(inputs: Node, weight: Node, found: tuple[int, ...], settings: Sequence[Any]) -> bool:
    _, _, dilation, transposed, _, groups = settings
    if transposed or groups != 1 or len(found) != 4 or any(d != 1 for d in dilation):
        return False
    if inputs.meta["val"].dtype not in PRECISIONS:
        return False
    return _pays(_shape(inputs), found, _shape(weight))


def _pays(inputs: Sequence[int], found: Sequence[int], weight: Sequence[int]) -> bool:
    """Of the shapes of a convolution's inputs, outputs and weight."""
    products = math.prod(found) * math.prod(weight[1:])
    return inputs[0] <= FEW_IMAGES and products <= FEW_PRODUCTS


def patches_of(
    inputs: torch.Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int]
) -> torch.Tensor:
    """What a convolution looks at, one column per place: N x (C h w) x places.

    Args:
        inputs: N x C x H x W.
        kernel: h and w.
        stride: Along both axes.
        padding: Likewise, with zeros.
    """
    if any(padding):
        inputs = F.pad(inputs, (padding[1], padding[1], padding[0], padding[0]))
    inputs = inputs.contiguous()
    n, c, *size = inputs.shape
    image, channel, down, across = inputs.stride()
    places = [(whole - k) // step + 1 for whole, k, step in zip(size, kernel, stride, strict=True)]
    patches = inputs.as_strided(
        (n, c, *kernel, *places),
        (image, channel, down, across, down * stride[0], across * stride[1]),
    )
    return patches.reshape(n, c * math.prod(kernel), math.prod(places))


def filtered(
    weight: torch.Tensor,
    patches: torch.Tensor,
    bias: torch.Tensor | None,
    shape: Sequence[int],
) -> torch.Tensor:
    """The convolution's output, of this shape.

    Args:
        weight: D x C x h x w.
        patches: See `patches_of`.
        bias: D, or none.
        shape: N x D x H x W.
    """
    filters = weight.flatten(1)
    if len(patches) == 1:
        product = filters @ patches[0]
        if bias is not None:
            product += bias[:, None]
    else:
        product = torch.bmm(filters.expand(len(patches), -1, -1), patches)
        if bias is not None:
            product += bias[None, :, None]
    return product.view(shape)


def gradient_in_inputs(
    gradient: torch.Tensor,
    inputs: torch.Tensor,
    weight: torch.Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
) -> torch.Tensor:
    """The derivative of a convolution in its inputs (N x C x H x W), along its output's."""
    found: torch.Tensor = aten._slow_conv2d_backward.output_mask(
        gradient, inputs, weight, weight.shape[2:], stride, padding, [True, False, False]
    )[0]
    return found


def gradient_in_weight(
    gradient: torch.Tensor, patches: torch.Tensor, shape: Sequence[int]
) -> torch.Tensor:
    """The derivative in the weight, of this shape, along the output's (N x D x H x W)."""
    rows = gradient.flatten(2)
    if len(rows) == 1:
        return (rows[0] @ patches[0].t()).view(shape)
    return torch.bmm(rows, patches.transpose(1, 2)).sum(0).view(shape)


def gradient_in_bias(gradient: torch.Tensor) -> torch.Tensor:
    """The derivative in the bias (D), along the output's (N x D x H x W)."""
    return gradient.sum((0, 2, 3))
