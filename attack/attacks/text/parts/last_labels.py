"""The last token of every sentence of a language model, off the gradient of its last layer."""

from __future__ import annotations

import torch
from torch import nn

from core.losses import main_output
from core.target import Target

# The gradient of an embedding that is the last layer as well depends on the labels a little more.
ROUNDS = 4


def last_labels(target: Target, ids: torch.Tensor) -> torch.Tensor:
    """The last label of every sentence, once everything in front of it is known.

    A label y of a sentence whose last layer reads h adds -h / n to row y of the layer's gradient.
    What is left of the shared gradient under a guess of the last labels is a sum of such terms,
    which the sentences' dual vectors take apart; there are as many as the layer is wide.

    Args:
        target: What was shared.
        ids: N x T, right but for the last token.

    Returns:
        N token ids; those given where the last layer's gradient was not shared.
    """
    model = target.build_model().double()
    found = _last_layer(model, ids)
    if found is None or found[0] not in target.gradient:
        return ids[:, -1]
    name, inputs = found
    shared = target.gradient[name].double()
    dual = torch.linalg.pinv(inputs[:, -2], rtol=1e-9)
    n = ids.shape[0] * (ids.shape[1] - 1)
    guess = ids.clone()
    for _ in range(ROUNDS):
        (own,) = torch.autograd.grad(
            target.loss(model(guess), guess), model.get_parameter(name), materialize_grads=True
        )
        # Clipping divides all by one number.
        scale = (shared * own).sum() / shared.square().sum().clamp_min(1e-300)
        left = n * (scale * shared - own) @ dual
        left[guess[:, -1], torch.arange(len(guess))] -= 1
        labels = left.argmin(0)
        if torch.equal(labels, guess[:, -1]):
            break
        guess[:, -1] = labels
    return guess[:, -1]


def _last_layer(model: nn.Module, ids: torch.Tensor) -> tuple[str, torch.Tensor] | None:
    """Name of the weight of the layer that gives the outputs, and its inputs (N x T x width)."""
    calls: list[tuple[nn.Module, torch.Tensor, torch.Tensor]] = []
    handles = [
        module.register_forward_hook(
            lambda m, given, out: calls.append((m, given[0].detach(), out))
        )
        for module in model.modules()
        if isinstance(module, nn.Linear)
    ]
    try:
        outputs = main_output(model(ids))
    finally:
        for handle in handles:
            handle.remove()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for module, given, out in calls:
        if out is outputs:
            return names[id(module.weight)], given
    return None
