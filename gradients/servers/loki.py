"""A block in front that keeps clients apart in the sum of their updates (LOKI)."""

from __future__ import annotations

import copy

import torch
from torch import nn

from core.errors import InputError
from core.models.malicious import Separated
from gradients.servers.base import MaliciousServer, Means, quantiles, register_server

# Factor of the convolution, by whose inverse the dense layer's weights are smaller: local steps
# then move the convolution little. The original code's.
SCALE = 500.0
# Below the darkest public value of a channel, in units of the normalised image.
BELOW = 0.1


@register_server
class Loki(MaliciousServer):
    """Give every client channels of its own before an imprint: `--malicious loki:BINS:CLIENTS`.

    The convolution of client k copies the image into channels 3 k to 3 k + 2, scaled and shifted so
    that the ReLU after it passes all of it, and leaves the others' channels at zero. The dense
    layer after it measures mean brightness over all channels, neuron i in units of the i-th bin of
    brightness, and the activation, clipped to 0..1, has a derivative within its bin alone. So the
    weights' gradient of the channels of k comes from client k, however many are summed, and that of
    a neuron from the images of one bin, also after several local steps. All clients share the
    layer's bias gradient.

    As the paper has it but for two things: quantiles of public images' brightness stand for those
    of a normal distribution, and the layer after sends random patterns into the model, as that of
    Robbing the Fed, where the paper's sends one grey value.

    Read by `--attack loki`.

    Source: Zhao, Sharma, Elkordy, Ezzeldin, Avestimehr, Bagchi, "LOKI: Large-scale Data
        Reconstruction Attack against Federated Learning through Model Manipulation", IEEE S&P
        2024, https://arxiv.org/abs/2303.12233.
    """

    name = "loki"
    tells_clients_apart = True

    @torch.no_grad()
    def send(self, model: nn.Module, means: Means) -> nn.Module:
        """See `MaliciousServer.send`; the model is that of client 0."""
        malice, dtype = means.malice, next(model.parameters()).dtype
        size = means.spec.image_size
        sent = Separated(model, size, malice.number, malice.clients).to(dtype)
        convolution, _, _, first, _, second, _ = sent.imprint
        assert isinstance(convolution, nn.Conv2d)
        assert convolution.bias is not None
        assert isinstance(first, nn.Linear)
        assert isinstance(second, nn.Linear)
        shift = BELOW - means.inputs.amin((0, 2, 3))
        convolution.weight.zero_()
        convolution.bias.copy_(shift.repeat(malice.clients) * SCALE)
        _set_bins(first, means.inputs + shift.view(1, -1, 1, 1), malice.clients)
        direction = torch.randn(len(second.weight), generator=torch.Generator().manual_seed(0))
        second.weight.copy_(direction[:, None].expand_as(second.weight) / first.out_features)
        second.bias.zero_()
        return self._addressed(sent, 0)

    @torch.no_grad()
    def send_to(self, model: nn.Module, number: int) -> nn.Module:
        """See `MaliciousServer.send_to`."""
        return self._addressed(copy.deepcopy(model), number)

    def _addressed(self, model: nn.Module, number: int) -> nn.Module:
        """The model with the convolution of that client; changed in place."""
        assert isinstance(model, Separated)
        convolution = model.imprint[0]
        assert isinstance(convolution, nn.Conv2d)
        bias = convolution.bias
        assert bias is not None
        clients = convolution.out_channels // 3
        if number >= clients:
            raise InputError(
                f"--malicious loki: the model is made for {clients} clients, and client {number} "
                "takes part; give loki:BINS:CLIENTS"
            )
        own = slice(3 * number, 3 * number + 3)
        shift = bias.abs().view(-1, 3).max(0).values
        convolution.weight.zero_()
        convolution.weight[own, :, 1, 1] = SCALE * torch.eye(3).to(convolution.weight)
        bias.zero_()
        bias[own] = shift
        return model


def _set_bins(layer: nn.Linear, public: torch.Tensor, clients: int) -> None:
    """Neuron i is (brightness - lower end of bin i) / width of bin i.

    Args:
        layer: Sees the channels of all clients; changed.
        public: N x 3 x H x W as the channels are but for their scale, above zero.
        clients: How many.
    """
    brightness = public.flatten(1).double().mean(1)
    ends = quantiles(brightness, layer.out_features)
    # Nothing is darker than black, nor much brighter than the brightest.
    ends[0] = 0.0
    top = brightness.max() + (brightness.max() - brightness.min())
    widths = torch.cat([ends[1:], top[None]]) - ends
    pixels = layer.in_features // clients
    layer.weight.copy_((1 / (SCALE * pixels * widths))[:, None].expand_as(layer.weight))
    layer.bias.copy_(-ends / widths)
