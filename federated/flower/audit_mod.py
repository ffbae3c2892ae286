"""The client mod that audits what a Flower app is about to send, before it leaves the site."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from flwr.app import Context, Error, Message, RecordDict
from torch import nn

from audit import gate_log
from audit.data import site_data
from audit.record import ReceivedSection
from audit.request import AuditSettings
from audit.show.received import words_of
from audit.show.store import write_audit
from core.errors import InputError
from core.locks import LOCK_NAME, locked
from core.losses import Function, Loss
from federated.flower.kept_model import KEPT, exchanged
from federated.flower.received import Received, failure, withheld
from federated.flower.records import Arrays, cleared, digest, left_out, only_arrays, same
from federated.gate.allowed import NotAllowedError, is_round
from federated.gate.passage import (
    MAX_REASON,
    Passage,
    Rounds,
    Schedule,
    WithheldError,
    reason_of,
)
from federated.gate.site_audit import (
    RECORD_NAME,
    SETTINGS,
    Policy,
    SiteAudit,
    reason_in,
    setting_of,
    write_look,
)

log = logging.getLogger(__name__)

App = Callable[[Message, Context], Message]

# The key of a node's own configuration that names its folder of results.
FOLDER_KEY = "audit-folder"
# Seconds that a message waits for another of the same site.
_WAIT = 3600.0


@dataclass(frozen=True)
class _Look:
    """What a site knows before anything is trained.

    Attributes:
        due: Whether this update is measured; None: it was not decided.
        looked: What the detectors say of the global model; None: they did not look.
    """

    due: bool | None = None
    looked: ReceivedSection | None = None


@dataclass
class _Visit:
    """One message at a site.

    Attributes:
        received: The message.
        context: The node's.
        folder: The site's results of this run.
        rounds: The updates that were counted, by the site's own log: Flower runs an app in a
            new process for every message, and nothing else remembers.
        look: What was said of the global model before the app saw it.
        passage: What becomes of the answer.
    """

    received: Received
    context: Context
    folder: Path
    look: _Look
    rounds: Rounds = field(init=False)
    passage: Passage = field(init=False)

    def __post_init__(self) -> None:
        self.rounds = Rounds()
        if (self.folder / gate_log.LOG_NAME).exists():
            last = gate_log.verify(self.folder)[-1]
            self.rounds = Rounds(int(last["updates"]), int(last["last_round"]))
        stated = self.received.stated
        number = int(stated) if is_round(stated) else None
        self.passage = Passage(number, self.rounds.count)


class AuditMod:
    """A client mod that audits every outgoing update and lets only harmless ones pass.

    Before the app trains, the global model that came in is looked at: whether it may have been
    made to leak (`received_roundN.json`, and the log). It is compared with that of the round
    before, which the site keeps.

    Put it first in the app's list of mods: the first one sees last what leaves. An update that
    leaks is answered with an error message without content; strategies leave failed clients out.
    Whatever cannot be checked stays, too. Records are written to the site's own folder, one line
    per message to its log (`audit.gate_log`), from which rounds are counted.

    Args:
        model: Builds the model that the app trains, such as its class.
        data: From the node's `Context`, the site's members and non-members of the training: a
            pair of samples, or `core.data.given.GivenData` (training and validation).
        loss: What the app minimises; default: cross-entropy.
        local: What is known of the local training, such as "sgd lr=0.1 batch-size=32"; the rest
            is estimated.
        folder: The site's results; a node's own `audit-folder` in its configuration goes
            before. Below it, every site and run has a folder.
        budget: Seconds of an audit.
        settings: How the audit is made otherwise.
        withhold_cannot_tell: Whether an update also stays where the audit cannot tell.
        record_only: Let updates pass whatever the verdict is; what may leave is checked still.
        refuse_suspicious: Train nothing on a global model that looks as if it was made to leak; at
            most a share `alpha` of honest ones does.
        frequency: Measure every that many updates of the site.
        start_round: The first update to measure, from 0.
        random_rounds: Measure each update with probability 1 / frequency instead.

    Raises:
        InputError: Impossible values.

    Example:
        >>> app = ClientApp(mods=[AuditMod(model=Net, data=members_and_others)])
    """

    def __init__(
        self,
        *,
        model: Callable[[], nn.Module],
        data: Callable[[Context], object],
        loss: str | Function | Loss | None = None,
        local: str | None = None,
        folder: str | Path = "audit",
        budget: float = SETTINGS.budget,
        settings: AuditSettings = SETTINGS,
        withhold_cannot_tell: bool = False,
        record_only: bool = False,
        refuse_suspicious: bool = False,
        frequency: int = 1,
        start_round: int = 0,
        random_rounds: bool = False,
    ) -> None:
        for name, value in (("model", model), ("data", data)):
            if not callable(value):
                raise InputError(f"{name} {value!r}: must be a function")
        self.model, self.data, self.loss, self.local = model, data, loss, local
        self.folder = Path(folder)
        self.settings = replace(settings, budget=budget)
        self.policy = Policy(withhold_cannot_tell, record_only, refuse_suspicious)
        self.schedule = Schedule(frequency, start_round, random_rounds)

    def __call__(self, message: Message, context: Context, call_next: App) -> Message:
        """Let the app answer a message, and answer with what may leave; never raises."""
        try:
            received = Received.of(message)
        except Exception:
            log.exception("the message cannot be read")
            return Message(withheld(), reply_to=message)
        look = _Look()
        answered: Message | Exception
        try:
            look = self._look(received, context)
        except Exception:
            log.exception("the global model cannot be looked at before it is trained")
        try:
            if self.policy.refuses(look.looked):
                answered = WithheldError("the global model is suspicious: nothing was trained")
            else:
                answered = call_next(message, context)
        except Exception as error:
            log.exception("the app failed")
            answered = error
        try:
            folder = self.folder_of(context)
            with locked(folder / LOCK_NAME, f"folder {folder}", wait=_WAIT):
                visit = _Visit(received, context, folder, look)
                sent = self._gated(answered, visit)
                self._log(sent, visit)
        except Exception:
            log.exception("the update is withheld: it could not be checked, or not be logged")
            sent = withheld()
        return received.reply(sent)

    def setting(self) -> dict[str, object]:
        """The mod's own setting, for the log: plain values."""
        of_audit = setting_of(self.settings)
        return {**asdict(self.policy), **asdict(self.schedule), "local": self.local, **of_audit}

    def folder_of(self, context: Context) -> Path:
        """A run's folder at a site."""
        config = context.node_config
        partition = config.get("partition-id")
        site = f"node-{context.node_id}" if partition is None else f"partition-{partition}"
        return Path(str(config.get(FOLDER_KEY, self.folder))) / site / f"run-{context.run_id}"

    def _look(self, received: Received, context: Context) -> _Look:
        """Look at the global model that an update is asked of, and keep what is found.

        Raises:
            Exception: Whatever the user's model or data raise.
        """
        if not received.is_training or received.arrays is None:
            return _Look()
        folder = self.folder_of(context)
        with locked(folder / LOCK_NAME, f"folder {folder}", wait=_WAIT):
            passage = _Visit(received, context, folder, _Look()).passage
            previous = exchanged(folder / KEPT, received.arrays)
        if not self.schedule.due(passage.count):
            return _Look(False)
        looked = self._site_audit(context).look(received.arrays, previous)
        write_look(looked, folder, passage.name)
        if looked.suspicious:
            log.warning("%s: %s", folder, words_of(looked))
        return _Look(True, looked)

    def _site_audit(self, context: Context) -> SiteAudit:
        data = site_data(self.data(context), self.settings.seed, "data")
        return SiteAudit(self.model, data, self.loss, self.local, self.settings)

    def _gated(self, answered: Any, visit: _Visit) -> RecordDict | Error:
        """What leaves in place of an answer."""
        passage = visit.passage
        if isinstance(answered, WithheldError):
            passage.verdict, passage.reason = "withheld", reason_of(answered)
            return withheld()
        failed = failure(answered)
        if failed is not None:
            passage.verdict, passage.reason = "no result", repr(answered)[:MAX_REASON]
            return failed
        try:
            return self._passed(answered.content, visit)
        except (WithheldError, NotAllowedError) as error:
            passage.reason = reason_of(error)
        except Exception as error:
            log.exception("the update cannot be checked")
            passage.reason = reason_of(error)
        passage.verdict = "withheld"
        log.warning("%s: the update is withheld: %s", visit.folder, passage.reason)
        return withheld()

    def _passed(self, content: RecordDict, visit: _Visit) -> RecordDict:
        """What may leave of an answer.

        Raises:
            WithheldError: Nothing of it.
            NotAllowedError: Likewise.
        """
        received, passage = visit.received, visit.passage
        allowed = cleared(content, received.arrays if received.is_training else None)
        stays = left_out(content, allowed)
        if stays:
            log.info("%s: not sent: %s", visit.folder, ", ".join(stays))
        update = only_arrays(allowed)
        if update is None or received.arrays is None:
            passage.verdict = "no update"
            return allowed
        visit.rounds.take(received.stated)
        if same(update, received.arrays):
            passage.reason = "the update is the global model again"
        elif not self._due(visit):
            passage.verdict = "passed unmeasured"
            passage.reason = f"update {passage.count} with {self.schedule}"
        else:
            self._measure(received.arrays, update, visit)
        return allowed

    def _due(self, visit: _Visit) -> bool:
        due = visit.look.due
        return self.schedule.due(visit.passage.count) if due is None else due

    def _measure(self, before: Arrays, update: Arrays, visit: _Visit) -> None:
        """Audit an update.

        Raises:
            WithheldError: Its verdict is one that the policy withholds.
        """
        passage = visit.passage
        try:
            checked = self._site_audit(visit.context)
            record = checked(before, update, "weights", visit.look.looked)
            write_audit(record, visit.folder, RECORD_NAME.format(passage.name))
        except Exception as error:
            if not self.policy.record_only:
                raise
            log.exception("the update leaves unmeasured")
            passage.verdict, passage.reason = "passed unmeasured", reason_of(error)
            return
        passage.reason = reason_in(record)
        if self.policy.withholds(record.verdict):
            raise WithheldError(passage.reason)

    def _log(self, sent: RecordDict | Error, visit: _Visit) -> None:
        passage, rounds = visit.passage, visit.rounds
        gate_log.append(
            visit.folder,
            {
                "site": visit.folder.parent.name,
                "filter": type(self).__name__,
                "setting": self.setting(),
                "message": visit.received.metadata.message_type,
                "round": passage.number,
                "count": passage.count,
                "verdict": passage.verdict,
                "reason": passage.reason,
                "received": None if visit.look.looked is None else words_of(visit.look.looked),
                "sent": f"error {sent.code}" if isinstance(sent, Error) else digest(sent),
                "updates": rounds.count,
                "last_round": rounds.last,
            },
        )
