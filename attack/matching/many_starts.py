"""Many candidate batches at once: the distance of each one's gradient, and its slope.

A small network leaves a processor idle between its many small operations. Copies of the whole
problem side by side (`torch.func.vmap`) cost little more than one of them.
"""

from __future__ import annotations

import torch
from torch import nn

from core.errors import InputError
from core.models.kinds import BatchNorm, Dropout
from core.target import Target
from gradients.local_update import images_of_steps

Parameters = dict[str, torch.Tensor]


class ClientOfManyStarts:
    """What a client would share for each of R candidate batches, against what it shared.

    Plain SGD of any number of steps; a model without randomness and without BatchNorm in train
    mode, whose statistics copies would have to keep apart.

    Args:
        target: What was shared.
        labels: N labels, of every candidate.
        device: Device that runs the computation.

    Raises:
        InputError: The client computes something else.
    """

    def __init__(self, target: Target, labels: torch.Tensor, device: torch.device) -> None:
        model = target.build_model().to(device)
        _check(target, model)
        self._model, self._target = model, target
        self._labels = labels.to(device)
        named = {name: p.detach() for name, p in model.named_parameters()}
        self._shared = {name: named[name] for name in target.gradient}
        self._rest = {n: p for n, p in named.items() if n not in self._shared}
        self._rest |= dict(model.named_buffers())
        self._dtype = next(iter(self._shared.values())).dtype
        self._wanted = {n: g.to(device, self._dtype) for n, g in target.gradient.items()}
        self._steps = [step[0] for step in images_of_steps(target.batch_size, target.local)]
        self._slope = torch.func.vmap(torch.func.grad(self._distance))
        self._value = torch.func.vmap(self._distance)

    @property
    def batch_size(self) -> int:
        """Records of a candidate."""
        return self._target.batch_size

    def slope(self, records: torch.Tensor) -> torch.Tensor:
        """Derivative of each candidate's distance in its records (R x N x F, as given)."""
        return self._slope(records.to(self._dtype)).to(records)

    def distance(self, records: torch.Tensor) -> torch.Tensor:
        """Cosine distance of each candidate's gradient to the shared one (R)."""
        return self._value(records.to(self._dtype))

    def _distance(self, records: torch.Tensor) -> torch.Tensor:
        update = self._update(self._target.data.normalize(records))
        product = torch.stack([(update[n] * g).sum() for n, g in self._wanted.items()]).sum()
        return 1 - product / (_square(update) * _square(self._wanted)).sqrt()

    def _update(self, inputs: torch.Tensor) -> Parameters:
        """The client's update, of the scale of a gradient."""
        gradient = torch.func.grad(self._loss)
        parameters, total = self._shared, dict.fromkeys(self._shared, torch.zeros(()))
        for step, chosen in enumerate(self._steps):
            g = gradient(parameters, inputs[chosen], self._labels[chosen])
            total = {n: total[n] + g[n] for n in g} if step else g
            parameters = {n: p - self._target.local.lr * g[n] for n, p in parameters.items()}
        return total

    def _loss(
        self, parameters: Parameters, inputs: torch.Tensor, labels: torch.Tensor
    ) -> torch.Tensor:
        outputs = torch.func.functional_call(self._model, parameters | self._rest, (inputs,))
        return self._target.loss(outputs, labels)


def _square(parameters: Parameters) -> torch.Tensor:
    return torch.stack([p.square().sum() for p in parameters.values()]).sum()


def _check(target: Target, model: nn.Module) -> None:
    local = target.local
    plain = local.optimizer == "sgd" and not (local.momentum or local.weight_decay)
    if not plain or local.proximal or local.clip_norm or local.rates or local.accumulate > 1:
        raise InputError("many starts at once need a client that runs plain SGD")
    if local.schedule != "constant" or not target.loss.batchable:
        raise InputError("many starts at once need a constant rate and a loss of this package")
    random = (BatchNorm, Dropout)
    if target.train_mode and any(isinstance(m, random) for m in model.modules()):
        raise InputError(
            "many starts at once need a model in eval mode, or without BatchNorm and dropout"
        )
