"""A site's local training in words: the optimiser, its schedule and what is done to a step."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from core.errors import InputError
from core.local_training import ADAM, ADAMW, LocalTraining

# Settings that components have arguments of their own for.
_ELSEWHERE = {
    "epochs": "aggregation_epochs",
    "steps": "aggregation_epochs",
    "batches": "batch_size",
    "batch_size": "batch_size",
    "shuffle": "seed",
    "order": "seed",
    "order_known": "seed",
    "bn_momentum": "bn_momentum of the inverter",
}
# Settings that only make sense with the number of steps.
_OF_STEPS = ("accumulate", "rates")


def check_words(text: str) -> None:
    """Refuse words that say nothing, before the number of steps is known.

    Args:
        text: See `LocalTraining.parse`.

    Raises:
        InputError: A word that is no setting, or that another argument is for.
    """
    for name in map(_name, text.split()):
        if name in _ELSEWHERE:
            raise InputError(f"local: {name} is said by the argument {_ELSEWHERE[name]}")
    _without_steps(text)


def stated_rate(text: str) -> float | None:
    """The learning rate, if the words say one."""
    return _without_steps(text).lr if "lr" in map(_name, text.split()) else None


def _without_steps(text: str) -> LocalTraining:
    return LocalTraining.parse(" ".join(w for w in text.split() if _name(w) not in _OF_STEPS))


def training_of(text: str, *, epochs: int, batches: int, lr: float) -> LocalTraining:
    """The local training of a round.

    Args:
        text: See `LocalTraining.parse`; a learning rate in it counts in all rounds.
        epochs: Passes over the site's samples.
        batches: Steps of a pass.
        lr: The round's learning rate, where the text says none.

    Raises:
        InputError: Settings that do not fit each other, or the number of steps.
    """
    rate = f" lr={lr!r}" if stated_rate(text) is None else ""
    return LocalTraining.parse(f"{text}{rate} epochs={epochs} batches={batches}")


def _name(word: str) -> str:
    return word.partition("=")[0].replace("-", "_")


class LocalOptimizer:
    """`torch.optim`'s optimiser of a local training, with its schedule, clipping and accumulation.

    Args:
        parameters: Of the site's model.
        local: The local training.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], local: LocalTraining) -> None:
        self.local, self.parameters = local, list(parameters)
        self.optimizer = _optimizer(self.parameters, local)
        self.rates = local.learning_rates()
        self.passes = 0

    def backward(self, loss: torch.Tensor) -> None:
        """Take a batch's loss in, and a step where it is the last batch of one."""
        local = self.local
        if self.passes % local.accumulate == 0:
            self.optimizer.zero_grad()
        (loss if local.accumulate == 1 else loss / local.accumulate).backward()
        self.passes += 1
        if self.passes % local.accumulate == 0:
            self._step(self.passes // local.accumulate - 1)

    def _step(self, update: int) -> None:
        if self.local.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.parameters, self.local.clip_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = self.rates[update]
        self.optimizer.step()


def _optimizer(parameters: list[nn.Parameter], local: LocalTraining) -> torch.optim.Optimizer:
    if local.optimizer in (ADAM, ADAMW):
        kind = {ADAM: torch.optim.Adam, ADAMW: torch.optim.AdamW}[local.optimizer]
        return kind(parameters, local.lr, local.betas, local.eps, local.weight_decay, local.amsgrad)
    return torch.optim.SGD(
        parameters, local.lr, local.momentum, local.dampening, local.weight_decay, local.nesterov
    )
