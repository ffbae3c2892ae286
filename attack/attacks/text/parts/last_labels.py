"""Tokens of a language model that are known as labels only, off the gradient of its last layer."""

from __future__ import annotations

import torch

from attack.attacks.text.parts.result import lengths_of
from core.errors import InputError
from core.models.head import find_linear_head
from core.models.module_inputs import inputs_of
from core.target import Target

# A row that was wrong shows the next label a round later; and the gradient of an embedding that is
# the last layer as well depends on the labels a little more.
ROUNDS = 8


def read_labels(target: Target, ids: torch.Tensor, unknown: torch.Tensor) -> torch.Tensor:
    """Tokens that are known as labels only, once most of the others are known.

    A label y of a row h in front of the last layer adds -h / n to row y of the layer's gradient.
    What is left of the shared gradient under a guess of the labels is a sum of such terms, which
    the rows' dual vectors take apart; there are as many as the layer is wide.

    Args:
        target: What was shared.
        ids: N x T, right but for the unknown ones, which are no padding.
        unknown: N x T, none of them in the first place; the last of every sentence among them.

    Returns:
        N x T token ids; those given where the last layer's gradient was not shared.
    """
    model = target.build_model().double()
    try:
        _, layer = find_linear_head(model, ids[:1])
    except InputError:
        return ids
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    name = names[id(layer.weight)]
    if name not in target.gradient:
        return ids
    shared = target.gradient[name].double()
    sentence, place = unknown.nonzero(as_tuple=True)
    # Every label of a sentence has as large a share of its mean.
    shares = len(ids) * (lengths_of(ids, target.data) - 1)[sentence]
    guess = ids.clone()
    for _ in range(ROUNDS):
        (inputs,) = inputs_of(model, [layer], guess)
        dual = torch.linalg.pinv(inputs[sentence, place - 1], rtol=1e-9) * shares
        (own,) = torch.autograd.grad(
            target.loss(model(guess), guess), model.get_parameter(name), materialize_grads=True
        )
        # Clipping divides all by one number.
        scale = (shared * own).sum() / shared.square().sum().clamp_min(1e-300)
        left = (scale * shared - own) @ dual
        left[guess[sentence, place], torch.arange(len(sentence))] -= 1
        if target.data.pad is not None:
            left[target.data.pad] = torch.inf
        labels = left.argmin(0)
        if torch.equal(labels, guess[sentence, place]):
            break
        guess[sentence, place] = labels
    return guess
