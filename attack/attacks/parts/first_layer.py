"""The first fully connected layer: what was shared of it, and what it sees of the image.

Its weight gradient is the sum over samples of (output gradient) x (input)^T and its
bias gradient the sum of the output gradients: closed forms start from these two.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from core.errors import InputError
from core.models.kinds import BatchNorm
from core.models.unchanged import in_mode
from core.target import Target


@dataclass(frozen=True)
class FirstLayer:
    """A first fully connected layer that sees the whole image.

    Attributes:
        name: Name of the module in the model.
        weight: m x d, what the client received.
        bias: m.
        weight_gradient: m x d, as shared.
        bias_gradient: m, as shared.
        offset: d; the layer's input is `offset + scale * network input`.
        scale: d, nowhere zero.
        activation: Type of the module that follows; None for the last layer.
    """

    name: str
    weight: torch.Tensor
    bias: torch.Tensor
    weight_gradient: torch.Tensor
    bias_gradient: torch.Tensor
    offset: torch.Tensor
    scale: torch.Tensor
    activation: type[nn.Module] | None

    def network_inputs(self, layer_inputs: torch.Tensor) -> torch.Tensor:
        """Undo what lies between the network's input and the layer's (N x d, N x d)."""
        return (layer_inputs - self.offset) / self.scale


@dataclass(frozen=True)
class _Call:
    """One module's forward pass on the probes."""

    name: str
    module: nn.Module
    inputs: torch.Tensor


def first_layer(target: Target, attack: str, device: torch.device) -> FirstLayer:
    """Find the layer, in float64.

    Args:
        target: What the client shared.
        attack: Who asks, for messages.
        device: Device that the layer's tensors are moved to.

    Raises:
        InputError: There is none, it has no bias, it sees features instead of the image,
            or its gradients were not shared.
    """
    probes = _probes(target)
    calls = _trace(target.build_model().double(), probes)
    linear = [i for i, call in enumerate(calls) if isinstance(call.module, nn.Linear)]
    if not linear:
        raise _unsuitable(target, attack, "it has none")
    before, call, after = calls[: linear[0]], calls[linear[0]], calls[linear[0] + 1 :]
    offset, scale = _view_of_image(target, attack, before, call, probes)
    layer = call.module
    assert isinstance(layer, nn.Linear)
    if layer.bias is None:
        raise _unsuitable(target, attack, f"its layer {call.name} has no bias")
    names = (f"{call.name}.weight", f"{call.name}.bias")
    if any(name not in target.gradient for name in names):
        raise _unsuitable(target, attack, f"the gradient of its layer {call.name} was not shared")
    weight_gradient, bias_gradient = (target.gradient[name].to(device).double() for name in names)
    if not weight_gradient.any() or not bias_gradient.any():
        raise _unsuitable(target, attack, f"the gradient of its layer {call.name} is zero")
    return FirstLayer(
        name=call.name,
        weight=layer.weight.detach().to(device),
        bias=layer.bias.detach().to(device),
        weight_gradient=weight_gradient,
        bias_gradient=bias_gradient,
        offset=offset.to(device),
        scale=scale.to(device),
        activation=type(after[0].module) if after else None,
    )


def _unsuitable(target: Target, attack: str, reason: str) -> InputError:
    return InputError(
        f"--attack {attack}: needs a model whose first layer is fully connected with bias, like "
        f"mlp; {target.model.name} is not: {reason}"
    )


def _probes(target: Target) -> torch.Tensor:
    """Three network inputs that tell an elementwise affine map from any other."""
    shape = target.data.shape
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(shape, generator=generator, dtype=torch.float64)
    return torch.stack([torch.zeros_like(noise), torch.ones_like(noise), noise])


def _trace(model: nn.Module, inputs: torch.Tensor) -> list[_Call]:
    """The leaf modules in the order in which they are run."""
    calls: list[_Call] = []
    hooks = []
    for name, module in in_mode(model, False).named_modules():
        if next(module.children(), None) is not None:
            continue

        def note(module: nn.Module, args: tuple[torch.Tensor, ...], name: str = name) -> None:
            calls.append(_Call(name, module, args[0].detach()))

        hooks.append(module.register_forward_pre_hook(note))
    with torch.no_grad():
        model(inputs)
    for hook in hooks:
        hook.remove()
    return calls


def _view_of_image(
    target: Target, attack: str, before: list[_Call], call: _Call, probes: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Offset and scale of the layer's input as a function of the network's."""
    features = f"its layer {call.name} sees features, not the image"
    if call.inputs.shape != probes.flatten(1).shape:
        raise _unsuitable(target, attack, features)
    if target.train_mode and any(isinstance(c.module, BatchNorm) for c in before):
        raise _unsuitable(target, attack, "train-mode BatchNorm in front mixes the images")
    offset = call.inputs[0]
    scale = call.inputs[1] - offset
    predicted = offset + scale * probes[2].flatten()
    if not torch.allclose(predicted, call.inputs[2], atol=1e-9) or (scale == 0).any():
        raise _unsuitable(target, attack, features)
    return offset, scale
