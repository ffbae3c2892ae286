"""What a client's detectors are: looks at the model that a server sent; and their names."""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, TypeVar

import torch
from torch import nn

from core.losses import Loss, main_output
from core.models.kinds import Convolution
from core.models.unchanged import in_mode, unchanged
from core.registry import Registry

# Below this, numbers that are compared by their ratio are rounding.
TINY = 1e-12
# Samples of the client's own that are looked at; more cost time and tell little more.
MOST_SAMPLES = 32


@dataclass(frozen=True)
class View:
    """A model as a client sees it on samples of its own; nothing of it is changed.

    Layers are looked at in eval mode: what a sample gives away must not hang on its neighbours.

    Attributes:
        model: What a server sent.
        inputs: N x ..., normalised.
        targets: N x ..., as the loss takes them.
        loss: What the client minimises.
    """

    model: nn.Module
    inputs: torch.Tensor
    targets: torch.Tensor
    loss: Loss

    @cached_property
    def weights(self) -> dict[str, torch.Tensor]:
        """Parameters by name, in float64."""
        return {name: p.detach().double() for name, p in self.model.named_parameters()}

    @cached_property
    def matrices(self) -> dict[str, torch.Tensor]:
        """Weights of dense layers and convolutions as outputs x inputs, by parameter name."""
        return {n: w.flatten(1) for n, w in self.weights.items() if w.dim() > 1 and w.numel() > 1}

    @cached_property
    def sample_losses(self) -> torch.Tensor:
        """N, the loss of every sample by itself."""
        return self._passes[0]

    @cached_property
    def sample_norms(self) -> dict[str, torch.Tensor]:
        """By parameter name N norms, those of every sample's own gradient."""
        return self._passes[1]

    @cached_property
    def gradient_norms(self) -> dict[str, float]:
        """By parameter name, norm of the gradient of all samples as one batch."""
        return self._passes[2]

    @cached_property
    def _passes(self) -> tuple[torch.Tensor, dict[str, torch.Tensor], dict[str, float]]:
        losses: list[float] = []
        norms: dict[str, list[float]] = {}
        sums: dict[str, torch.Tensor] = {}
        with unchanged(self.model), torch.enable_grad():
            model = in_mode(self.model, False)
            trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
            for x, y in zip(self.inputs.split(1), self.targets.split(1), strict=True):
                loss = self.loss(model(x), y)
                losses.append(float(loss.detach()))
                found = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
                for name, given in zip(trained, found, strict=True):
                    g = torch.zeros(()) if given is None else given.detach().double()
                    norms.setdefault(name, []).append(float(g.norm()))
                    sums[name] = sums[name] + g if name in sums else g
        whole = {name: float(g.norm()) / len(losses) for name, g in sums.items()}
        return torch.tensor(losses), {n: torch.tensor(v) for n, v in norms.items()}, whole

    @cached_property
    def activation_rates(self) -> dict[str, torch.Tensor]:
        """By name of a dense layer or convolution: share of the samples that turn a unit on.

        A unit is an output, of a convolution at every place; it is on above zero.
        """
        rates: dict[str, torch.Tensor] = {}

        def note(name: str) -> Callable[..., None]:
            def take(module: nn.Module, args: object, output: torch.Tensor) -> None:
                rates[name] = (output.detach() > 0).double().mean(0).flatten()

            return take

        with unchanged(self.model), torch.no_grad():
            model = in_mode(self.model, False)
            layers = {
                n: m for n, m in model.named_modules() if isinstance(m, (nn.Linear, Convolution))
            }
            handles = [m.register_forward_hook(note(n)) for n, m in layers.items()]
            try:
                main_output(model(self.inputs))
            finally:
                for handle in handles:
                    handle.remove()
        return rates


@dataclass(frozen=True)
class Received:
    """What a detector looks at.

    Attributes:
        now: The model that was received.
        before: That of the round before; None where it is not at hand.
    """

    now: View
    before: View | None = None


class Detector(abc.ABC):
    """Says how suspicious a received model is.

    A score has no unit: what is large is said by the scores of honest rounds, see
    `audit.detectors.calibration`.

    Attributes:
        name: What records and tables call it.
    """

    name: ClassVar[str]

    def score(self, received: Received) -> float:
        """Higher is more suspicious; infinite where what was received cannot be computed with."""
        if received.before is None:
            found = self.alone(received.now)
        else:
            found = self.against(received.now, received.before)
        return math.inf if math.isnan(found) else found

    @abc.abstractmethod
    def alone(self, now: View) -> float:
        """The score of a model by itself."""

    def against(self, now: View, before: View) -> float:
        """The score of a model whose forerunner is known: by how much it is larger."""
        return self.alone(now) - self.alone(before)


_DETECTORS = Registry[type[Detector]]("detector")
D = TypeVar("D", bound=type[Detector])


def register_detector(detector: D) -> D:
    """Class decorator: make a detector known by its name.

    Raises:
        ValueError: The name is taken.
    """
    _DETECTORS.add(detector.name, detector)
    return detector


def detector_names() -> list[str]:
    """Names of all registered detectors."""
    return _DETECTORS.names()


def get_detector(name: str) -> type[Detector]:
    """The detector of that name.

    Raises:
        KeyError: There is none.
    """
    return _DETECTORS[name]


def scores_of(received: Received) -> dict[str, float]:
    """What every registered detector says."""
    return {name: get_detector(name)().score(received) for name in detector_names()}


def log_ratio(one: float, other: float) -> float:
    """Decimal logarithm of a ratio of two numbers that are not negative."""
    return math.log10(max(one, TINY) / max(other, TINY))


def largest_change(now: Mapping[str, float], before: Mapping[str, float]) -> float:
    """The largest |log ratio| of two models' numbers; infinite where their names differ."""
    if now.keys() != before.keys():
        return math.inf
    return max((abs(log_ratio(now[name], before[name])) for name in now), default=0.0)
