"""Result filters that fail closed: what they cannot handle does not leave the site.

NVFlare's own base class lets pass what it does not understand, and an exception in a
filter ends the whole federation. Here both lead to a withheld update: the server gets a
zero difference of vanishing weight, which changes no average, neither with other sites'
updates nor alone (an empty update, alone, would wipe the global model).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from nvflare.apis.dxo import DXO, DataKind, MetaKey, from_shareable
from nvflare.apis.dxo_filter import DXOFilter
from nvflare.apis.fl_constant import FLContextKey, ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable, make_reply
from nvflare.app_common.app_constant import AppConstants

from audit.leakage import failed_report, write_leakage
from core.errors import InputError

UPDATE_KINDS = [DataKind.WEIGHT_DIFF, DataKind.WEIGHTS]
# Kinds of results that hold no update.
_HARMLESS = {DataKind.METRICS}
# In the site's own context: what later components may want to know.
GLOBAL_WEIGHTS = "gradinvbench.global_weights"
ROUND = "gradinvbench.round"
WITHHELD = "gradinvbench.withheld"
# In an update's own meta data, as far as the first filter: why there is none.
DIVERGED = "gradinvbench.diverged"
# An average with such a weight is that of the others; alone, it is the zero difference.
VANISHING_WEIGHT = 1e-9


class WithheldError(Exception):
    """The update must not leave the site; the message says why."""


def reason_of(error: Exception) -> str:
    """Why an update is withheld, for people."""
    return str(error) if isinstance(error, WithheldError) else f"the check failed: {error!r}"


class FailClosedFilter(DXOFilter):
    """A filter of updates that withholds whatever it cannot handle.

    Args:
        data_kinds: Kinds of data to filter; all kinds of updates if None. With a shorter
            list, other kinds pass, as whoever wrote it wanted.
    """

    def __init__(self, data_kinds: list[str] | None = None) -> None:
        super().__init__(UPDATE_KINDS, data_kinds or UPDATE_KINDS)
        self.strict = set(self.data_kinds) == set(UPDATE_KINDS)

    @abstractmethod
    def process_update(self, dxo: DXO, fl_ctx: FLContext) -> DXO:
        """The filtered update.

        Raises:
            WithheldError: The update must stay at the site.
        """

    def record_withheld(self, error: Exception, shareable: Shareable, fl_ctx: FLContext) -> None:
        """Note in the site's results that an update was withheld, and why."""
        write_leakage(
            fl_ctx.get_prop(FLContextKey.APP_ROOT),
            fl_ctx.get_identity_name(),
            current_round(from_shareable(shareable), fl_ctx),
            failed_report(reason_of(error)),
            details={"filter": {"name": type(self).__name__}},
        )

    def process(self, shareable: Shareable, fl_ctx: FLContext) -> Shareable:
        """Filter a task's result; never raises."""
        if shareable.get_return_code() != ReturnCode.OK:
            return shareable
        try:
            if self.strict:
                _refuse_unknown(from_shareable(shareable))
            return super().process(shareable, fl_ctx)
        except Exception as error:
            if not isinstance(error, WithheldError):
                self.log_exception(fl_ctx, "the update cannot be checked", fire_event=False)
            return self._withhold(error, shareable, fl_ctx)

    def process_dxo(self, dxo: DXO, shareable: Shareable, fl_ctx: FLContext) -> DXO:
        """See `process_update`; what another filter withheld stays as it is."""
        if dxo.get_meta_prop(DIVERGED):
            raise WithheldError(dxo.get_meta_prop(DIVERGED))
        if dxo.get_meta_prop(MetaKey.NUM_STEPS_CURRENT_ROUND) == VANISHING_WEIGHT:
            return dxo
        return self.process_update(dxo, fl_ctx)

    def _withhold(self, error: Exception, shareable: Shareable, fl_ctx: FLContext) -> Shareable:
        reason = reason_of(error)
        name = f"{type(self).__name__} at {fl_ctx.get_identity_name()}"
        # Not as an event, which handlers might forward to the server.
        self.log_warning(fl_ctx, f"{name}: the update is withheld: {reason}", fire_event=False)
        fl_ctx.set_prop(WITHHELD, reason, private=True, sticky=True)
        try:
            self.record_withheld(error, shareable, fl_ctx)
        except Exception:
            self.log_exception(
                fl_ctx, "the reason for withholding could not be recorded", fire_event=False
            )
        try:
            return withheld_update(from_shareable(shareable), fl_ctx).to_shareable()
        except Exception:
            self.log_exception(
                fl_ctx,
                "no zero difference could be made: an empty result is sent",
                fire_event=False,
            )
            return make_reply(ReturnCode.EMPTY_RESULT)


def current_round(dxo: DXO, fl_ctx: FLContext) -> int:
    """The round of an update: as it says itself, as a tap saw it, or as the site knows.

    Raises:
        InputError: Nobody knows.
    """
    for number in (
        dxo.get_meta_prop(AppConstants.CURRENT_ROUND),
        fl_ctx.get_prop(ROUND),
        fl_ctx.get_prop(AppConstants.CURRENT_ROUND),
    ):
        if number is not None:
            return int(number)
    raise InputError("the round of the update is unknown: add federated.flare.taps.GlobalModelTap")


def withheld_update(dxo: DXO, fl_ctx: FLContext) -> DXO:
    """What is sent in place of an update.

    Args:
        dxo: The update.
        fl_ctx: Of the site; holds the global weights if a `GlobalModelTap` saw them.

    Returns:
        A zero difference (the global weights, where weights are expected) by the update's
        names and shapes, with a vanishing weight and without what else came along.
    """
    meta = {MetaKey.NUM_STEPS_CURRENT_ROUND: VANISHING_WEIGHT}
    number = dxo.get_meta_prop(AppConstants.CURRENT_ROUND)
    if number is not None:
        meta[AppConstants.CURRENT_ROUND] = number
    if dxo.data_kind == DataKind.COLLECTION:
        parts = {name: withheld_update(part, fl_ctx) for name, part in dxo.data.items()}
        return DXO(DataKind.COLLECTION, parts, meta)
    if dxo.data_kind == DataKind.WEIGHTS:
        known = fl_ctx.get_prop(GLOBAL_WEIGHTS) or {}
        return DXO(dxo.data_kind, {name: known[name] for name in dxo.data}, meta)
    if dxo.data_kind == DataKind.WEIGHT_DIFF:
        return DXO(dxo.data_kind, {k: _zeros(v) for k, v in dxo.data.items()}, meta)
    raise WithheldError(f"no replacement for data of kind {dxo.data_kind}")


def diverged_meta(reason: str) -> dict[str, Any]:
    """For the zero difference of a site whose training diverged: weighs nothing, says why.

    The first filter records the reason at the site and takes it off what is sent.
    """
    return {MetaKey.NUM_STEPS_CURRENT_ROUND: VANISHING_WEIGHT, DIVERGED: reason}


def _zeros(value: Any) -> Any:
    return torch.zeros_like(value) if isinstance(value, torch.Tensor) else np.zeros_like(value)


def _refuse_unknown(dxo: DXO) -> None:
    """A kind that no filter looks into may hold anything."""
    for part in _leaves(dxo):
        if part.data_kind not in {*UPDATE_KINDS, *_HARMLESS}:
            raise WithheldError(f"data of kind {part.data_kind} cannot be checked")
        if part.data_kind in UPDATE_KINDS and not isinstance(part.data, Mapping):
            raise WithheldError("the update is not a dictionary of variables")


def _leaves(dxo: DXO) -> Iterator[DXO]:
    if dxo.data_kind != DataKind.COLLECTION:
        yield dxo
        return
    parts = dxo.data.values() if isinstance(dxo.data, Mapping) else dxo.data
    for part in parts:
        yield from _leaves(part)
