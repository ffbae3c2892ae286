"""The audit of a site's outgoing update, and what its verdict means for the update."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from audit.data import SiteData
from audit.decision import Verdict
from audit.record import AuditRecord, ReceivedSection
from audit.request import AuditSettings, make_request
from audit.run import audit
from audit.suspicion import look_before_training
from core.errors import InputError
from core.losses import Function, Loss
from core.models.architecture import GivenModel
from core.storage import write_record

RECORD_NAME = "audit_round{}.json"
# What the look at the received model found, before anything was trained.
LOOK_NAME = "received_round{}.json"
# A round of a federation waits for the audit.
BUDGET = 600.0
# A site's gate measures the update; the rest of an audit is for the command.
SETTINGS = AuditSettings(budget=BUDGET, membership=False, remedies=False)

_TOLD = ("attack", "iterations", "plants", "budget", "alpha")

Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Policy:
    """What a verdict means for an update.

    Attributes:
        withhold_cannot_tell: Whether an update also stays where the audit cannot tell.
        record_only: Whether updates leave whatever the verdict is.
        refuse_suspicious: Whether nothing is trained on a received model that is suspicious.

    Raises:
        InputError: A value that is not true or false.
    """

    withhold_cannot_tell: bool = False
    record_only: bool = False
    refuse_suspicious: bool = False

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not isinstance(value, bool):
                raise InputError(f"{name} {value!r}: must be true or false")

    def withholds(self, verdict: str) -> bool:
        """Whether an update of this verdict stays at the site."""
        stays = {Verdict.LEAKS.value}
        if self.withhold_cannot_tell:
            stays.add(Verdict.CANNOT_TELL.value)
        known = {each.value for each in Verdict}
        return not self.record_only and (verdict in stays or verdict not in known)

    def refuses(self, looked: ReceivedSection | None) -> bool:
        """Whether a received model is not trained on."""
        return self.refuse_suspicious and looked is not None and looked.suspicious


def setting_of(settings: AuditSettings) -> dict[str, object]:
    """What decides how strong an audit is, for a gate's log."""
    return {name: getattr(settings, name) for name in _TOLD}


def reason_in(record: AuditRecord) -> str:
    """The verdict in words, with what limits it."""
    return " ".join([record.statement, *record.warnings])


def write_look(looked: ReceivedSection, folder: Path, name: int) -> None:
    """Keep what was said of a received model, beside the audit of the update that follows."""
    write_record(folder / LOOK_NAME.format(name), asdict(looked))


@dataclass(frozen=True)
class SiteAudit:
    """Audits updates of one site, see `audit.run.audit`.

    Attributes:
        model: Builds the architecture.
        data: Members and non-members.
        loss: What the site minimises; None: cross-entropy.
        local: What is known of its training, such as "sgd lr=0.1 batch-size=8"; the rest is
            estimated.
        settings: How the audit is made.
    """

    model: Callable[[], nn.Module]
    data: SiteData
    loss: str | Function | Loss | None = None
    local: str | None = None
    settings: AuditSettings = field(default=SETTINGS)

    def look(self, received: Arrays, previous: Arrays | None = None) -> ReceivedSection:
        """Whether a received model looks as if it was made to leak, before it is trained.

        Args:
            received: The global model's state by name, or by numbers in its order.
            previous: That of the round before; None where it is not at hand.

        Raises:
            InputError: One sentence on what does not fit the model.
        """
        with torch.random.fork_rng(devices=[]):
            model = self.model()
            earlier = None if previous is None else named_by(model, previous)
            return look_before_training(
                named_by(model, received), model=GivenModel(model), data=self.data, loss=self.loss,
                local=self.local, previous=earlier, settings=self.settings,
            )  # fmt: skip

    def __call__(
        self, received: Arrays, sent: Arrays, kind: str, looked: ReceivedSection | None = None
    ) -> AuditRecord:
        """Audit an update.

        Args:
            received: The global model's state by name, or by numbers in its order.
            sent: What is about to leave, by the same names.
            kind: "weights" or "difference".
            looked: What `look` said of the received model; None: the audit looks itself.

        Raises:
            InputError: The update cannot be audited; one sentence says why.
        """
        # The site's own training draws from the same random numbers.
        with torch.random.fork_rng(devices=[]):
            return self._audited(received, sent, kind, looked)

    def _audited(
        self, received: Arrays, sent: Arrays, kind: str, looked: ReceivedSection | None
    ) -> AuditRecord:
        model = self.model()
        before, after = (named_by(model, arrays) for arrays in (received, sent))
        request = make_request(
            before, after, kind=kind, model=model, data=self.data, loss=self.loss,
            local=self.local, settings=self.settings,
        )  # fmt: skip
        return audit(replace(request, looked=looked))


def named_by(model: nn.Module, arrays: Arrays) -> dict[str, torch.Tensor]:
    """Arrays by the names of a model's state; numbers are places in it, or among parameters.

    Counters are whole numbers again, which an average of sites or noise are not.

    Raises:
        InputError: There are as many numbers as the model has neither variables nor parameters.
    """
    state = model.state_dict()
    tensors = {name: torch.from_numpy(np.array(value)) for name, value in arrays.items()}
    if all(name.isdecimal() for name in tensors):
        tensors = _by_place(tensors, list(state), [name for name, _ in model.named_parameters()])
    counters = {name for name, value in state.items() if not value.is_floating_point()}
    return {
        name: value.round().to(state[name].dtype) if name in counters else value
        for name, value in tensors.items()
    }


def _by_place(
    tensors: Mapping[str, torch.Tensor], state: list[str], parameters: list[str]
) -> dict[str, torch.Tensor]:
    for names in (state, parameters):
        if len(names) == len(tensors):
            in_order = sorted(tensors, key=int)
            return {name: tensors[place] for name, place in zip(names, in_order, strict=True)}
    raise InputError(
        f"the update holds {len(tensors)} arrays without names; the model has {len(state)} "
        f"variables, of which {len(parameters)} are parameters"
    )
