"""The filter that looks at a received global model before anything is trained on it."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
from nvflare.apis.fl_constant import FLContextKey
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable
from torch import nn

from audit import gate_log
from audit.data import open_data
from audit.record import ReceivedSection
from audit.show.received import words_of
from core.client import loss_named
from core.errors import InputError
from core.named_objects import called
from federated.flare.taps import GlobalModelTap
from federated.flare.withholding import GLOBAL_WEIGHTS, LOOKED, ROUND
from federated.gate.allowed import is_round
from federated.gate.passage import Passage, WithheldError, reason_of
from federated.gate.site_audit import SETTINGS, Policy, SiteAudit, setting_of, write_look


class ReceivedModelFilter(GlobalModelTap):
    """A `GlobalModelTap` that also says whether the global model may have been made to leak.

    A task data filter: it looks before the site's executor sees the task. What the detectors
    find is `received_roundN.json` in the site's app folder and a line of the site's log, and
    `federated.AuditFilter` takes it over. From the second round on the model is compared with
    that of the round before.

    Args:
        model: Builds the model that the site trains, `module:function` of the job's custom
            folder.
        data: The site's members and non-members of its training, as of `AuditFilter`.
        loss: Name of a loss, or `module:loss`; cross-entropy if None.
        local: What is known of the local training, such as "sgd lr=0.1 batch-size=8"; honest
            rounds to compare with are made by it.
        budget: Seconds of an audit, of which a small share is for this look.
        refuse_suspicious: Do not train on a model that looks as if it was made to leak, at most
            5 % of honest ones: the server is told that the task failed, and goes on as long as
            enough other sites answer.

    Raises:
        InputError: Impossible values.
    """

    def __init__(
        self,
        model: str,
        data: str,
        loss: str | None = None,
        local: str | None = None,
        budget: float = SETTINGS.budget,
        refuse_suspicious: bool = False,
    ) -> None:
        super().__init__()
        for name, value in {"model": model, "data": data}.items():
            if not isinstance(value, str) or not value:
                raise InputError(f"{name} {value!r}: must be text")
        self._policy = Policy(refuse_suspicious=refuse_suspicious)
        self._settings = replace(SETTINGS, budget=budget)
        self._count = 0
        # NVFlare writes a component's arguments from attributes of the same names.
        self.model = model
        self.data = data
        self.loss = loss
        self.local = local
        self.budget = budget
        self.refuse_suspicious = refuse_suspicious

    def process(self, shareable: Shareable, fl_ctx: FLContext) -> Shareable:
        """Look at a task's model and let the task pass unchanged.

        Raises:
            WithheldError: The model is suspicious, and such a one is not trained on.
        """
        previous = fl_ctx.get_prop(GLOBAL_WEIGHTS)
        fl_ctx.set_prop(LOOKED, None, private=True, sticky=True)
        shareable = super().process(shareable, fl_ctx)
        received = fl_ctx.get_prop(GLOBAL_WEIGHTS)
        if received is previous:  # The task brought no model.
            return shareable
        stated = fl_ctx.get_prop(ROUND)
        passage = Passage(int(stated) if is_round(stated) else None, self._count)
        self._count += 1
        looked = self._looked(received, previous, passage, fl_ctx)
        fl_ctx.set_prop(LOOKED, looked, private=True, sticky=True)
        refused = self._policy.refuses(looked)
        passage.verdict = "refused" if refused else passage.verdict
        self._log(passage, fl_ctx)
        if refused:
            raise WithheldError("the global model is suspicious: nothing is trained")
        return shareable

    def _looked(
        self,
        received: dict[str, np.ndarray],
        previous: dict[str, np.ndarray] | None,
        passage: Passage,
        fl_ctx: FLContext,
    ) -> ReceivedSection | None:
        """What the detectors say; None where they cannot look."""
        try:
            found = self._audit.look(received, previous)
            write_look(found, Path(fl_ctx.get_prop(FLContextKey.APP_ROOT)), passage.name)
        except Exception as error:
            self.log_exception(fl_ctx, "the global model cannot be looked at", fire_event=False)
            passage.verdict, passage.reason = "not looked at", reason_of(error)
            return None
        passage.verdict = "suspicious" if found.suspicious else "not suspicious"
        passage.reason = words_of(found)
        say = self.log_warning if found.suspicious else self.log_info
        say(fl_ctx, f"round {passage.name}: {passage.reason}", fire_event=False)
        return found

    def _log(self, passage: Passage, fl_ctx: FLContext) -> None:
        gate_log.append(
            fl_ctx.get_prop(FLContextKey.APP_ROOT),
            {
                "site": fl_ctx.get_identity_name(),
                "filter": type(self).__name__,
                "setting": self.setting(),
                "round": passage.number,
                "count": passage.count,
                "verdict": passage.verdict,
                "reason": passage.reason,
            },
        )

    def setting(self) -> dict[str, Any]:
        """The filter's own setting, for the log: plain values."""
        refuses = self._policy.refuse_suspicious
        return {"refuse_suspicious": refuses, "local": self.local, **setting_of(self._settings)}

    @cached_property
    def _audit(self) -> SiteAudit:
        # Opened when it is needed: NVFlare builds components before a job's code is there.
        return SiteAudit(
            lambda: cast(nn.Module, called(self.model, "model")),
            open_data(self.data),
            loss_named(self.loss, "loss"),
            self.local,
            self._settings,
        )
