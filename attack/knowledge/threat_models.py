"""What an attacker is given, and what an attack needs.

A threat model is a named set of capabilities. An attack, a way to get labels and the
settings of a run state what they require; what the threat model withholds is refused
before any work is done, and hidden from the attack besides.

The letters A to H are those of Carletti, Foggia, Mazzocca, Parrella and Vento, "SoK: Gradient
Inversion Attacks in Federated Learning", USENIX Security 2025 (table of threat models at
https://github.com/gparrella12/sok_gias_fl); each stands for the model that grants the same.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Iterable
from dataclasses import dataclass

from core.errors import InputError
from core.registry import Registry
from core.target import Target


class Capability(enum.Enum):
    """One thing that a threat model grants or withholds."""

    LABELS = "labels known"
    BATCH_SIZE = "batch size known"
    BATCH_STATISTICS = "exact BatchNorm statistics of the batch known"
    RUNNING_STATISTICS = "running BatchNorm statistics known"
    PRIOR_DATA = "prior images available"
    LOCAL_TRAINING = "the client's local hyper-parameters known"
    DEFENSE = "the client's defense known"
    DROPOUT_MASKS = "the seed of the client's dropout masks known"
    MALICIOUS_SERVER = "the server may change the model it sends"


Capabilities = frozenset[Capability]


@dataclass(frozen=True)
class ThreatModel:
    """A named attacker.

    Attributes:
        name: What `--threat` and tables call it.
        grants: What the attacker is given beside the model and the shared gradient.
        description: Who that is, in one sentence.
    """

    name: str
    grants: Capabilities
    description: str

    def view(self, target: Target) -> Target:
        """The target as this attacker sees it: without what is withheld.

        Local hyper-parameters stay, because without them the shared gradient has no scale;
        attacks that unroll local steps state that they require them.
        """
        hidden: dict[str, tuple[str, ...] | None] = {}
        if Capability.DROPOUT_MASKS not in self.grants:
            hidden["dropout_seed"] = None
        if Capability.BATCH_STATISTICS not in self.grants:
            hidden["bn_statistics"] = hidden["running_after"] = None
        if Capability.DEFENSE not in self.grants:
            hidden["defenses"] = ()
        return dataclasses.replace(target, **hidden)  # type: ignore[arg-type]


# Where no threat model is named, the flags of the run decide.
CUSTOM = "custom"

_MODELS = Registry[ThreatModel]("threat model", reserved=CUSTOM)

# By the letter of the systematization: what it calls "basic knowledge" is the size of the batch
# and what the model itself shows, "training details" are local training and defense, "surrogate
# data" are public images, and "client data distribution" are the statistics of the batch.
LETTERS = {
    "A": "eavesdropper",
    "B": "eavesdropper-no-labels",
    "C": "honest-server",
    "D": "honest-server-with-public-data",
    "E": "honest-server-with-data",
    "F": "malicious-server-no-data",
    "G": "malicious-server-no-statistics",
    # It also chooses the clients, so as to see the update of one alone. Here every attack does.
    "H": "malicious-server-no-statistics",
}


def register_threat_model(name: str, grants: Iterable[Capability], description: str) -> ThreatModel:
    """Make `--threat name` known.

    Raises:
        ValueError: The name is taken.
    """
    return _MODELS.add(name, ThreatModel(name, frozenset(grants), description))


def threat_names() -> list[str]:
    """Every name that `--threat` knows; the letters in `LETTERS` are further names of some."""
    return [CUSTOM, *_MODELS]


def find_threat(name: str | None) -> ThreatModel | None:
    """The threat model of that name or letter; None for `custom` and where none is given.

    Raises:
        InputError: There is none.
    """
    if name is None or name == CUSTOM:
        return None
    model = _MODELS.get(LETTERS.get(name, name))
    if model is None:
        known = ", ".join(threat_names())
        raise InputError(f"--threat {name}: unknown; known are {known}, and the letters A to H")
    return model


def letters_of(threat: str) -> str:
    """The letters that stand for a threat model, such as "G, H"; empty where none does."""
    return ", ".join(letter for letter, name in LETTERS.items() if name == threat)


_EAVESDROPPER = (Capability.BATCH_SIZE, Capability.RUNNING_STATISTICS)
_SERVER = (*_EAVESDROPPER, Capability.LOCAL_TRAINING, Capability.DEFENSE)

register_threat_model(
    "eavesdropper",
    (),
    "Reads the model that is sent and the update that comes back, and knows nothing else.",
)
register_threat_model(
    "eavesdropper-no-labels",
    _EAVESDROPPER,
    "Reads the model that is sent and the update that comes back, and knows nothing of what "
    "the client does in between.",
)
register_threat_model(
    "honest-server",
    _SERVER,
    "Follows the protocol, which it wrote: local training and defense are known to it, labels "
    "and batch statistics are not.",
)
register_threat_model(
    "honest-server-with-bn",
    (*_SERVER, Capability.BATCH_STATISTICS),
    "As honest-server, where clients share their BatchNorm statistics, from which those of the "
    "batch follow after one local step.",
)
register_threat_model(
    "honest-server-with-masks",
    (*_SERVER, Capability.DROPOUT_MASKS),
    "As honest-server, where the code that the server hands out seeds the clients' random "
    "numbers, so that their dropout masks are known; elsewhere a client draws them by itself.",
)
register_threat_model(
    "honest-server-with-labels",
    (*_SERVER, Capability.LABELS),
    "As honest-server, with labels known from elsewhere and in order; isolates how well images "
    "are recovered from how well labels are.",
)
register_threat_model(
    "honest-server-with-public-data",
    (*_SERVER, Capability.PRIOR_DATA),
    "As honest-server, with public images that resemble the client's.",
)
register_threat_model(
    "honest-server-with-data",
    (*_SERVER, Capability.BATCH_STATISTICS, Capability.PRIOR_DATA),
    "As honest-server-with-bn, with public images that resemble the client's.",
)
register_threat_model(
    "malicious-server-no-data",
    (*_SERVER, Capability.MALICIOUS_SERVER),
    "As honest-server, and may send a model that was made to leak.",
)
register_threat_model(
    "malicious-server-no-statistics",
    (*_SERVER, Capability.PRIOR_DATA, Capability.MALICIOUS_SERVER),
    "As malicious-server-no-data, with public images that resemble the client's.",
)
register_threat_model(
    "malicious-server",
    (*_SERVER, Capability.BATCH_STATISTICS, Capability.PRIOR_DATA, Capability.MALICIOUS_SERVER),
    "May also send a model that was made to leak; labels are still the client's secret.",
)
register_threat_model(
    "worst-case",
    tuple(Capability),
    "Is given everything but the images: an upper bound, not a realistic attacker.",
)


def check_capabilities(
    what: str, requires: Iterable[Capability], granted: Iterable[Capability], threat: str = ""
) -> None:
    """Refuse what needs more than the threat model grants.

    Args:
        what: Who asks (an attack, a flag), as the message calls it.
        requires: What the attack or flag needs.
        granted: What the threat model grants.
        threat: The threat model's name, for the message.

    Raises:
        InputError: Names what asks and what it lacks.
    """
    missing = sorted(c.value for c in set(requires) - set(granted))
    if missing:
        named = f"--threat {threat}" if threat else "the threat model"
        raise InputError(f"{what} needs what {named} withholds: {'; '.join(missing)}")
