"""Flower's client mods for differential privacy, around a client that has trained."""

from __future__ import annotations

import abc
import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from federated.vendors.differences import Arrays, length_of, numpy_seeded, required, update_of
from gradients.defenses import ClientView, Defense, Gradient, register_defense
from gradients.defenses.base import require

MODS = "flwr.clientapp.mod"
CLIPPING_NORM = "clipping_norm"


class FlowerMod(Defense):
    """One of Flower's mods on the messages between the server and a client.

    A mod sees parameters, not differences: the server's and those that the client has trained.
    In float32 their difference is rounded to a millionth of the parameters, as in a federation.
    """

    @abc.abstractmethod
    def vendor(self) -> Any:
        """Flower's mod."""

    def server_config(self) -> dict[str, float]:
        """What the server's strategy tells the mod."""
        return {}

    def apply(self, gradient: Gradient, client: ClientView) -> Gradient:
        """What leaves the client through the mod."""
        mod, length = self.vendor(), length_of(client)
        weights = {name: value.detach() for name, value in client.model.named_parameters()}
        received = {n: weights[n].cpu().numpy() for n in gradient}
        trained = {n: (weights[n] - length * g).detach().cpu().numpy() for n, g in gradient.items()}
        with numpy_seeded(client):
            sent = _through(mod, received, trained, self.server_config())
        return update_of({n: sent[n] - received[n] for n in sent}, gradient, client)


def _through(mod: Any, received: Arrays, trained: Arrays, config: dict[str, float]) -> Arrays:
    """The arrays of the client's reply after the mod."""
    from flwr.app import (
        Array,
        ArrayRecord,
        ConfigRecord,
        Context,
        Message,
        MetricRecord,
        RecordDict,
    )
    from flwr.app.metadata import Metadata

    def record(values: Arrays) -> ArrayRecord:
        return ArrayRecord({name: Array(np.ascontiguousarray(v)) for name, v in values.items()})

    content = RecordDict({"arrays": record(received), "config": ConfigRecord({**config})})
    message = Message(content, metadata=Metadata(1, "m", 1, 2, "", "", time.time(), 600.0, "train"))
    context = Context(1, 2, {}, RecordDict(), {})

    def app(msg: Message, _: Context) -> Message:
        metrics = MetricRecord({"num-examples": 1})
        return Message(RecordDict({"arrays": record(trained), "metrics": metrics}), reply_to=msg)

    reply = mod(message, context, app)
    if reply.has_error():
        raise RuntimeError(f"the mod replied with an error: {reply.error.reason}")
    (arrays,) = reply.content.array_records.values()
    return {name: array.numpy() for name, array in arrays.items()}


@register_defense("flower-local-dp")
@dataclass(frozen=True)
class LocalDp(FlowerMod):
    """Flower's `LocalDpMod`: the update is clipped, and the parameters get Gaussian noise.

    The deviation is sensitivity sqrt(2 ln(1.25 / delta)) / epsilon. The sensitivity is the user's
    to state: of an update clipped at C it is 2 C, and a smaller one makes epsilon untrue.

    Args:
        clipping_norm: C, of the difference of weights.
        sensitivity: That the noise is made for.
        target_epsilon: Asked for, in one round.
        target_delta: Likewise.

    Source: Flower, `flwr.clientapp.mod.localdp_mod`, which has no defaults.
    """

    clipping_norm: float = 1.0
    sensitivity: float = 1.0
    target_epsilon: float = 1.0
    target_delta: float = 1e-5

    def __post_init__(self) -> None:
        values = (self.clipping_norm, self.sensitivity, self.target_epsilon, self.target_delta)
        require(min(values) > 0, "all parameters must be positive")

    def vendor(self) -> Any:
        """`LocalDpMod`."""
        kind = required(MODS, self.word, "flower").LocalDpMod
        return kind(self.clipping_norm, self.sensitivity, self.target_epsilon, self.target_delta)

    def epsilon(self, norm: float, rounds: int, delta: float) -> float | None:
        """What the noise is worth for a client's whole update: neighbours are 2 C apart."""
        from gradients.private_gradient import gaussian_epsilon

        asked = np.sqrt(2 * np.log(1.25 / self.target_delta)) / self.target_epsilon
        return gaussian_epsilon(asked * self.sensitivity / (2 * self.clipping_norm), delta, rounds)


@register_defense("flower-fixed-clipping")
@dataclass(frozen=True)
class FixedClipping(FlowerMod):
    """Flower's `fixedclipping_mod`: the update is clipped; noise is the server's affair.

    The strategy `DifferentialPrivacyClientSideFixedClipping` adds it to the mean, after the server
    has seen every update.

    Args:
        max_norm: Of the difference of weights, as the strategy states it.

    Source: Flower, `flwr.clientapp.mod.centraldp_mods`; 10 in its example `fl-dp-sa`.
    """

    max_norm: float = 10.0

    def __post_init__(self) -> None:
        require(self.max_norm > 0, "the norm must be positive")

    def vendor(self) -> Any:
        """`fixedclipping_mod`."""
        return required(MODS, self.word, "flower").fixedclipping_mod

    def server_config(self) -> dict[str, float]:
        """The clipping norm."""
        return {CLIPPING_NORM: self.max_norm}


@register_defense("flower-adaptive-clipping")
@dataclass(frozen=True)
class AdaptiveClipping(FlowerMod):
    """Flower's `adaptiveclipping_mod` at the norm that its strategy starts from.

    The strategy `DifferentialPrivacyClientSideAdaptiveClipping` moves the norm by at most a tenth
    a round; here it stays.

    Args:
        max_norm: Of the difference of weights; `initial_clipping_norm` is 0.1 by default.

    Source: Flower, `flwr.clientapp.mod.centraldp_mods`; Andrew et al.,
        https://arxiv.org/abs/1905.03871.
    """

    max_norm: float = 0.1

    def __post_init__(self) -> None:
        require(self.max_norm > 0, "the norm must be positive")

    def vendor(self) -> Any:
        """`adaptiveclipping_mod`."""
        return required(MODS, self.word, "flower").adaptiveclipping_mod

    def server_config(self) -> dict[str, float]:
        """The clipping norm."""
        return {CLIPPING_NORM: self.max_norm}
