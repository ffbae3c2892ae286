"""An imprint in a hidden layer that the architecture has anyway (ARES)."""

from __future__ import annotations

import itertools

import torch
from torch import nn

from core.errors import InputError
from core.models.unchanged import in_mode, unchanged
from gradients.servers.base import MaliciousServer, Means, quantiles, register_server


@register_server
class Ares(MaliciousServer):
    """Make neurons of a hidden dense layer measure their inputs' mean: `--malicious ares:BINS`.

    No layer is added. The first BINS neurons of the first dense layer that another one follows
    measure the mean of the layer's inputs against quantiles of public images, and the next layer
    reads them all alike, so that they get the same gradient. All other neurons, and the
    convolutions in front, stay honest. The batch's activations at the layer's input come apart as
    images do in Robbing the Fed; the images behind them are found by the attack.

    Only the abstract and the introduction of the paper could be read: it imprints activations of
    an unchanged architecture and recovers inputs from them by the generalized Lasso. How its
    weights are set is not known to us, and is Robbing the Fed's here.

    Read by `--attack ares`.

    Source: Gong, Zhang, Zhang, Vo, Zhu, Pan, Wang, "ARES: Scalable and Practical Gradient Inversion
        Attack in Federated Learning through Activation Recovery", 2026,
        https://arxiv.org/abs/2603.17623.
    """

    name = "ares"

    @torch.no_grad()
    def send(self, model: nn.Module, means: Means) -> nn.Module:
        """See `MaliciousServer.send`."""
        name, layer, after = hidden_layer(model)
        bins = means.malice.number
        if bins > layer.out_features:
            raise InputError(
                f"--malicious ares:{bins}: the hidden layer {name} has {layer.out_features} neurons"
            )
        assert layer.bias is not None
        measured = inputs_at(model, name, means.inputs).double().mean(1)
        layer.weight[:bins] = 1 / layer.in_features
        layer.bias[:bins] = -quantiles(measured, bins).to(layer.bias)
        after.weight[:, :bins] = after.weight[:, :1] / bins
        return model


def hidden_layer(model: nn.Module) -> tuple[str, nn.Linear, nn.Linear]:
    """Name of the first dense layer with a bias that another one follows, and the two.

    Raises:
        InputError: There is none.
    """
    dense = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    for (name, layer), (_, after) in itertools.pairwise(dense):
        if layer.bias is not None and after.in_features == layer.out_features:
            return name, layer, after
    raise InputError(
        "--malicious ares: needs a hidden fully connected layer with bias, like fedavg_cnn and mlp"
    )


def inputs_at(model: nn.Module, name: str, inputs: torch.Tensor) -> torch.Tensor:
    """What a layer gets when the model is given inputs, N x d, in eval mode; differentiable.

    Args:
        model: Left as it is.
        name: Of the layer.
        inputs: N x ..., normalised.
    """
    seen: list[torch.Tensor] = []
    layer = model.get_submodule(name)
    handle = layer.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    try:
        with unchanged(model):
            in_mode(model, False)(inputs.to(next(model.parameters())))
    finally:
        handle.remove()
    return seen[0].flatten(1)
