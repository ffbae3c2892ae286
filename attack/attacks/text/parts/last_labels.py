"""The last token of every sentence of a language model, off the gradient of its last layer."""

from __future__ import annotations

import torch

from attack.attacks.text.parts.result import lengths_of
from core.errors import InputError
from core.models.head import find_linear_head
from core.models.module_inputs import inputs_of
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
        ids: N x T, right but for the last token of every sentence, which is no padding.

    Returns:
        N token ids; those given where the last layer's gradient was not shared.
    """
    sentences = torch.arange(len(ids))
    last = lengths_of(ids, target.data) - 1
    model = target.build_model().double()
    try:
        _, layer = find_linear_head(model, ids[:1])
    except InputError:
        return ids[sentences, last]
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    name = names[id(layer.weight)]
    if name not in target.gradient:
        return ids[sentences, last]
    (inputs,) = inputs_of(model, [layer], ids)
    shared = target.gradient[name].double()
    # Every label of a sentence has as large a share of its mean.
    dual = torch.linalg.pinv(inputs[sentences, last - 1], rtol=1e-9) * (len(ids) * last)
    guess = ids.clone()
    for _ in range(ROUNDS):
        (own,) = torch.autograd.grad(
            target.loss(model(guess), guess), model.get_parameter(name), materialize_grads=True
        )
        # Clipping divides all by one number.
        scale = (shared * own).sum() / shared.square().sum().clamp_min(1e-300)
        left = (scale * shared - own) @ dual
        left[guess[sentences, last], sentences] -= 1
        labels = left.argmin(0)
        if torch.equal(labels, guess[sentences, last]):
            break
        guess[sentences, last] = labels
    return guess[sentences, last]
