"""R-GAP: recursion from the last layer to the image (Zhu and Blaschko 2021)."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from attack.attacks.base import Attack, register_attack
from attack.attacks.parts.closed_form import closed_form_reconstruction
from attack.reconstruction import Reconstruction
from core.errors import InputError
from core.target import Target
from gradients.rank_analysis import ra_index, rank_analysis

# Outputs of a ReLU below this share of the largest are taken for zero.
OFF = 1e-10
# Saturated activations are inverted up to here.
SATURATED = 1e-12


@dataclass(frozen=True)
class _Inverse:
    """An activation read backwards: from its output to its input, slope, and what is known."""

    inputs: torch.Tensor
    slope: torch.Tensor
    known: torch.Tensor


def _invert_relu(module: Any, a: torch.Tensor) -> _Inverse:
    # Where the output is zero the input is only known to be negative.
    on = a > OFF * a.abs().max()
    return _Inverse(a, on.to(a), on)


def _invert_leaky_relu(module: Any, a: torch.Tensor) -> _Inverse:
    slope = torch.ones_like(a).masked_fill(a < 0, module.negative_slope)
    return _Inverse(a / slope, slope, torch.ones_like(a, dtype=torch.bool))


def _invert_sigmoid(module: Any, a: torch.Tensor) -> _Inverse:
    inside = a.clamp(SATURATED, 1 - SATURATED)
    return _Inverse(inside.logit(), inside * (1 - inside), inside == a)


def _invert_tanh(module: Any, a: torch.Tensor) -> _Inverse:
    inside = a.clamp(SATURATED - 1, 1 - SATURATED)
    return _Inverse(inside.atanh(), 1 - inside.square(), inside == a)


def _invert_nothing(module: Any, a: torch.Tensor) -> _Inverse:
    return _Inverse(a, torch.ones_like(a), torch.ones_like(a, dtype=torch.bool))


_INVERSES: dict[type[nn.Module], Callable[[Any, torch.Tensor], _Inverse]] = {
    nn.ReLU: _invert_relu,
    nn.LeakyReLU: _invert_leaky_relu,
    nn.Sigmoid: _invert_sigmoid,
    nn.Tanh: _invert_tanh,
    nn.Identity: _invert_nothing,
}


@register_attack
class RGap(Attack):
    """Solve for the input of every layer, from the last to the first, batch 1.

    The bias gradient of the last layer is the gradient k of the logits. Then, layer by
    layer: the layer's output z and k are known, its input x fulfils W x + b = z (weight
    constraints) and dL/dW = k x^T (gradient constraints), convolutions being linear maps
    as well: a least squares problem. With x, the activation in front is inverted and
    k = W^T k times its slope.

    Exact where every layer is determined, which the rank analysis says (`ra_index` in the
    record, positive: underdetermined, and the solution of smallest norm is taken). Errors
    grow from layer to layer. For small chains of convolutions, fully connected layers and
    ReLU, leaky ReLU, sigmoid or tanh, like `cnn6`, `lenet` and `mlp`.

    The paper derives k for a single logit without bias from the loss; here it is read from
    the bias gradient.

    Source: Zhu and Blaschko, "R-GAP: Recursive Gradient Attack on Privacy", ICLR 2021,
        section 3 and algorithm 1, https://arxiv.org/abs/2010.07733.

    Published: 49.01 dB on one image of CIFAR-10 with cnn6, in the notebook of
        https://github.com/JonasGeiping/breaching.

    Reproduced:
        r-gap: 100.00 (100.00 to 100.00, n = 8), 2026-11-30: above.

    Example:
        python training/get_gradients.py --data photo-patches -a cnn6 -b 1 --double
        python main_run.py --attack r-gap --checkpoint CHECKPOINT --metric
    """

    name = "r-gap"

    def reconstruct(
        self, target: Target, *, labels: torch.Tensor, device: torch.device, seed: int, **run: Any
    ) -> Reconstruction:
        """See `Attack.reconstruct`; solved on the CPU, nothing is random.

        Raises:
            InputError: More than one image, several local steps, a network that is no
                chain of the layers above, or gradients that were not shared.
        """
        began = time.perf_counter()
        what = f"--attack {self.name}: "
        if target.batch_size != 1 or not target.local.shares_gradient:
            raise InputError(f"{what}needs the gradient of one image and one local step")
        model = target.build_model().double()
        chain = _chain(model, target, what)
        gradient = {name: g.double().cpu() for name, g in target.gradient.items()}
        sizes = _input_shapes(chain, target)
        solved, residuals = _recurse(chain, sizes, gradient, what)
        return closed_form_reconstruction(
            target,
            solved,
            labels,
            device=device,
            began=began,
            iterations=1,
            details={
                "ra_index": ra_index(rank_analysis(model, target.data.shape, 1)),
                "relative_residuals": residuals,
            },
        )


def _chain(model: nn.Module, target: Target, what: str) -> list[tuple[str, nn.Module]]:
    """The layers in the order in which they run; refuses what cannot be inverted."""
    allowed = (nn.Conv2d, nn.Linear, nn.Flatten, *_INVERSES)
    layers = [(n, m) for n, m in model.named_modules() if not any(True for _ in m.children())]
    strange = [m for _, m in layers if not isinstance(m, allowed)]
    nested = [m for m in model.modules() if any(True for _ in m.children())]
    if strange or not all(isinstance(m, nn.Sequential) for m in nested):
        culprit = type(strange[0] if strange else model).__name__
        raise InputError(
            f"{what}needs a chain of convolutions, fully connected layers and activations, like "
            f"cnn6 or lenet; {target.model.name} holds {culprit}"
        )
    for name, module in layers:
        if isinstance(module, nn.Conv2d) and not _is_plain(module):
            raise InputError(f"{what}the convolution {name} has groups or dilation")
        if hasattr(module, "weight") and f"{name}.weight" not in target.gradient:
            raise InputError(f"{what}the gradient of {name} was not shared")
    last = [name for name, m in layers if isinstance(m, nn.Linear)][-1:]
    if layers[-1][0] not in last or f"{last[0]}.bias" not in target.gradient:
        raise InputError(f"{what}needs a last layer that is fully connected with bias")
    if not target.gradient[f"{last[0]}.bias"].any():
        raise InputError(f"{what}the gradient of {last[0]} is zero")
    return layers


def _is_plain(layer: nn.Conv2d) -> bool:
    numeric = not isinstance(layer.padding, str) and layer.padding_mode == "zeros"
    return layer.groups == 1 and layer.dilation == (1, 1) and numeric


def _input_shapes(chain: list[tuple[str, nn.Module]], target: Target) -> list[torch.Size]:
    x = torch.zeros((1, *target.data.shape), dtype=torch.float64)
    shapes = []
    with torch.no_grad():
        for _, module in chain:
            shapes.append(x.shape)
            x = module(x)
    return shapes


def _recurse(
    chain: list[tuple[str, nn.Module]],
    shapes: list[torch.Size],
    gradient: dict[str, torch.Tensor],
    what: str,
) -> tuple[torch.Tensor, list[float]]:
    """From the last layer's bias gradient to the network's input.

    Returns:
        The input, and the relative residual of every linear layer, last layer first.
    """
    last = chain[-1][0]
    k = gradient[f"{last}.bias"]
    # Nothing is known about the logits themselves.
    z, known = torch.zeros_like(k), torch.zeros_like(k, dtype=torch.bool)
    x = z
    residuals = []
    for (name, module), shape in zip(reversed(chain), reversed(shapes), strict=True):
        if isinstance(module, nn.Flatten):
            continue
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            layer = _linear_map(module, shape)
            x, residual = _solve(layer, z, known, k, gradient[f"{name}.weight"])
            residuals.append(residual)
            k = layer.matrix.T @ k
            z, known = x, torch.ones_like(x, dtype=torch.bool)
            continue
        inverse = _INVERSES[type(module)](module, z)
        z, known, k = inverse.inputs, inverse.known, k * inverse.slope
        if not k.any():
            raise InputError(f"{what}no gradient passes {name}: its outputs are all zero")
    return x, residuals


@dataclass(frozen=True)
class _LinearMap:
    """A layer as a matrix on its flattened input.

    Attributes:
        matrix: outputs x inputs.
        bias: outputs.
        patches: kernel positions x output positions x input positions, 0 or 1: which pixel
            each weight meets; a fully connected layer is one position.
        channels: Number of input channels.
    """

    matrix: torch.Tensor
    bias: torch.Tensor
    patches: torch.Tensor
    channels: int


def _linear_map(layer: nn.Conv2d | nn.Linear, shape: torch.Size) -> _LinearMap:
    weight = layer.weight.detach()
    bias = torch.zeros(len(weight), dtype=weight.dtype)
    bias = bias if layer.bias is None else layer.bias.detach()
    if isinstance(layer, nn.Linear):
        one = torch.ones((1, 1, 1), dtype=weight.dtype)
        return _LinearMap(weight, bias, one, weight.shape[1])
    _, channels, height, width = shape
    pixels = torch.eye(height * width, dtype=weight.dtype).view(-1, 1, height, width)
    assert not isinstance(layer.padding, str)
    unfolded = F.unfold(pixels, layer.kernel_size, padding=layer.padding, stride=layer.stride)
    patches = unfolded.permute(1, 2, 0)
    kernel = weight.flatten(2)
    matrix = torch.einsum("oci,ipx->opcx", kernel, patches).reshape(
        len(weight) * patches.shape[1], channels * height * width
    )
    return _LinearMap(matrix, bias.repeat_interleave(patches.shape[1]), patches, channels)


def _solve(
    layer: _LinearMap,
    z: torch.Tensor,
    known: torch.Tensor,
    k: torch.Tensor,
    weight_gradient: torch.Tensor,
) -> tuple[torch.Tensor, float]:
    """The input that explains outputs and weight gradient best, and the relative residual."""
    n_kernel, n_positions, n_pixels = layer.patches.shape
    by_position = k.reshape(-1, n_positions)
    # The same equations hold for every input channel.
    system = torch.einsum("op,ipx->oix", by_position, layer.patches).reshape(-1, n_pixels)
    right = weight_gradient.reshape(len(by_position), layer.channels, n_kernel)
    right = right.transpose(1, 2).reshape(-1, layer.channels)
    # Orthogonal compression loses nothing, and leaves as many equations as unknowns.
    q, system = torch.linalg.qr(system)
    right = q.T @ right
    # Gradients are small: equations of both kinds count alike.
    scale = layer.matrix.norm() / layer.matrix.shape[0] ** 0.5
    scale = scale * system.shape[0] ** 0.5 / system.norm()
    gradient_rows = torch.kron(torch.eye(layer.channels, dtype=system.dtype), system.contiguous())
    a = torch.cat([layer.matrix[known], scale * gradient_rows])
    b = torch.cat([(z - layer.bias)[known], scale * right.T.flatten()])
    x = torch.linalg.lstsq(a, b[:, None], driver="gelsy").solution[:, 0]
    return x, float((a @ x - b).norm() / b.norm())
