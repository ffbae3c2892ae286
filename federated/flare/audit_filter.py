"""The filter that audits an update before it leaves the site: leaks, no leak found, cannot tell."""

from __future__ import annotations

from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

from nvflare.apis.dxo import DXO, DataKind
from nvflare.apis.fl_constant import FLContextKey
from nvflare.apis.fl_context import FLContext
from torch import nn

from audit.data import open_data
from audit.request import AUTO
from audit.show.store import write_audit
from core.client import loss_named
from core.errors import InputError
from core.named_objects import called
from federated.flare.withholding import GLOBAL_WEIGHTS, LOOKED, FailClosedFilter
from federated.gate.allowed import array_of
from federated.gate.passage import Schedule, WithheldError, reason_of
from federated.gate.site_audit import (
    RECORD_NAME,
    SETTINGS,
    Policy,
    SiteAudit,
    reason_in,
    setting_of,
)


class AuditFilter(FailClosedFilter):
    """Audits the site's own outgoing update and withholds it if it leaks.

    A round's audit is `audit_roundN.json` in the site's app folder. Put the filter after those
    that change the update, and add a `GlobalModelTap` for tasks: the site must have seen the
    global model. A `ReceivedModelFilter` in its place says before anything is trained whether
    that model may have been made to leak.

    Args:
        model: Builds the model that the site trains, `module:function` of the job's custom
            folder.
        data: The site's members and non-members of its training: `module:function` that gives a
            pair of samples or `core.data.given.GivenData` (training and validation), or a folder
            with `members/` and `non_members/`, as the command `audit` takes it.
        loss: Name of a loss, or `module:loss`; cross-entropy if None.
        local: What is known of the local training, such as "sgd lr=0.1 batch-size=8"; the rest
            is estimated.
        budget: Seconds of an audit.
        attack: "auto", or the name of an attack.
        iterations: Of an inversion; as many as the budget allows if None.
        plants: Planted images per setting of the power; likewise.
        withhold_cannot_tell: Whether an update also stays where the audit cannot tell.
        record_only: Let updates pass whatever the verdict is; what may leave is checked still.
        frequency: Measure every that many updates; the site counts them itself, from 0.
        start_round: The first update to measure.
        random_rounds: Measure each update with probability 1 / frequency instead.
        data_kinds: Kinds of data to filter; `["WEIGHT_DIFF", "WEIGHTS"]` if None.

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
        attack: str = AUTO,
        iterations: int | None = None,
        plants: int | None = None,
        withhold_cannot_tell: bool = False,
        record_only: bool = False,
        frequency: int = 1,
        start_round: int = 0,
        random_rounds: bool = False,
        data_kinds: list[str] | None = None,
    ) -> None:
        super().__init__(data_kinds)
        for name, value in {"model": model, "data": data}.items():
            if not isinstance(value, str) or not value:
                raise InputError(f"{name} {value!r}: must be text")
        self._schedule = Schedule(frequency, start_round, random_rounds)
        self._policy = Policy(withhold_cannot_tell, record_only)
        self._settings = replace(
            SETTINGS, budget=budget, attack=attack, iterations=iterations, plants=plants
        )
        # NVFlare writes a component's arguments from attributes of the same names.
        self.model = model
        self.data = data
        self.loss = loss
        self.local = local
        self.budget = budget
        self.attack = attack
        self.iterations = iterations
        self.plants = plants
        self.withhold_cannot_tell = withhold_cannot_tell
        self.record_only = record_only
        self.frequency = frequency
        self.start_round = start_round
        self.random_rounds = random_rounds

    def setting(self) -> dict[str, Any]:
        """See `FailClosedFilter.setting`."""
        of_audit = {"local": self.local, **setting_of(self._settings)}
        return {
            **super().setting(), **asdict(self._policy), **asdict(self._schedule), **of_audit,
        }  # fmt: skip

    def process_update(self, dxo: DXO, fl_ctx: FLContext) -> DXO:
        """See `FailClosedFilter.process_update`."""
        if not self._schedule.due(self._passage.count):
            self.unmeasured(f"update {self._passage.count} with {self._schedule}", fl_ctx)
            return dxo
        try:
            verdict = self._measure(dxo, fl_ctx)
        except Exception as error:
            if not self.record_only:
                raise
            self.log_exception(fl_ctx, "the update cannot be audited", fire_event=False)
            self.unmeasured(reason_of(error), fl_ctx)
            return dxo
        if self._policy.withholds(verdict):
            raise WithheldError(self._passage.reason)
        return dxo

    def record_withheld(self, error: Exception, fl_ctx: FLContext) -> None:
        """Nothing: what was measured is written, and the log has the reason for the rest."""

    def _measure(self, dxo: DXO, fl_ctx: FLContext) -> str:
        """Audit an update; the statement is kept as the reason."""
        received = fl_ctx.get_prop(GLOBAL_WEIGHTS)
        if received is None:
            raise InputError(
                "the global weights are unknown: add federated.flare.taps.GlobalModelTap"
            )
        sent = {name: array_of(value) for name, value in dxo.data.items()}
        kind = "difference" if dxo.data_kind == DataKind.WEIGHT_DIFF else "weights"
        record = self._audit(received, sent, kind, fl_ctx.get_prop(LOOKED))
        folder = Path(fl_ctx.get_prop(FLContextKey.APP_ROOT))
        write_audit(record, folder, RECORD_NAME.format(self._passage.name))
        self._passage.reason = reason_in(record)
        text = f"round {self._passage.name}: {self._passage.reason}"
        self.log_info(fl_ctx, text, fire_event=False)
        return record.verdict

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
