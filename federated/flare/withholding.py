"""The gate of a site: result filters that let out what is allowed, and nothing else.

NVFlare's own base class lets pass what it does not understand, and an exception in a
filter ends the whole federation. Here both lead to a withheld update: the server gets a
zero difference of vanishing weight, which changes no average, neither with other sites'
updates nor alone (an empty update, alone, would wipe the global model). What leaves is made
anew from an allow-list (`federated.flare.allowed`), and every result, passed or withheld, is a
line in the site's own log (`audit.gate_log`).
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

from audit import gate_log
from audit.leakage import failed_report, write_leakage
from core.errors import InputError
from federated.flare.allowed import (
    UPDATE_KINDS,
    cleared,
    digest,
    failed_reply,
    left_out,
)
from federated.gate.allowed import (
    NotAllowedError,
    allowed_name,
    array_of,
    check_names,
    is_name,
    is_round,
)
from federated.gate.passage import Passage, Rounds, WithheldError, reason_of

# In the site's own context: what later components may want to know.
GLOBAL_WEIGHTS = "gradinvbench.global_weights"
ROUND = "gradinvbench.round"
WITHHELD = "gradinvbench.withheld"
# What a look at the global model found before anything was trained.
LOOKED = "gradinvbench.looked"
# In an update's own meta data, as far as the first filter: why there is none.
DIVERGED = "gradinvbench.diverged"
# An average with such a weight is that of the others; alone, it is the zero difference.
VANISHING_WEIGHT = 1e-9


class FailClosedFilter(DXOFilter):
    """A filter of updates that withholds whatever it cannot handle.

    Args:
        data_kinds: Kinds of data to filter; all kinds of updates if None. With a shorter
            list, updates of the other kind leave unfiltered, and the log says so.

    Raises:
        InputError: A kind that is no update's.
    """

    def __init__(self, data_kinds: list[str] | None = None) -> None:
        if data_kinds is not None and not set(data_kinds) <= set(UPDATE_KINDS):
            raise InputError(f"data_kinds {data_kinds!r}: choose from {', '.join(UPDATE_KINDS)}")
        super().__init__(UPDATE_KINDS, data_kinds or UPDATE_KINDS)
        self._passage = Passage()
        self._rounds = Rounds()

    @abstractmethod
    def process_update(self, dxo: DXO, fl_ctx: FLContext) -> DXO:
        """The filtered update.

        Raises:
            WithheldError: The update must stay at the site.
        """

    def setting(self) -> dict[str, Any]:
        """The filter's own setting, for the log: plain values."""
        return {"data_kinds": list(self.data_kinds)}

    def record_withheld(self, error: Exception, fl_ctx: FLContext) -> None:
        """Note in the site's results that an update was withheld, and why."""
        passage = self._passage
        write_leakage(
            fl_ctx.get_prop(FLContextKey.APP_ROOT),
            fl_ctx.get_identity_name(),
            passage.name,
            failed_report(reason_of(error)),
            details={"filter": {"name": type(self).__name__}},
        )

    def process(self, shareable: Shareable, fl_ctx: FLContext) -> Shareable:
        """Filter a task's result; never raises."""
        self._passage = Passage(count=self._rounds.count)
        try:
            sent = self._passed(shareable, fl_ctx)
        except Exception as error:
            if not isinstance(error, (WithheldError, NotAllowedError)):
                self.log_exception(fl_ctx, "the update cannot be checked", fire_event=False)
            sent = self._withhold(error, shareable, fl_ctx)
        try:
            self._log(sent, fl_ctx)
        except Exception as error:
            self.log_exception(fl_ctx, "the gate's log cannot be written", fire_event=False)
            if self._passage.verdict != "withheld":
                reason = WithheldError(f"the gate's log cannot be written ({error})")
                sent = self._withhold(reason, shareable, fl_ctx)
        return sent

    def _passed(self, shareable: Shareable, fl_ctx: FLContext) -> Shareable:
        """What may leave of a result.

        Raises:
            WithheldError: Nothing of it.
        """
        if shareable.get_return_code() != ReturnCode.OK:
            self._passage.verdict = "no result"
            return failed_reply(shareable)
        whole = from_shareable(shareable)
        stated = stated_round(whole, fl_ctx)
        self._passage.number = int(stated) if is_round(stated) else None
        updates = [part for part in _leaves(whole) if part.data_kind in UPDATE_KINDS]
        for part in updates:
            if part.get_meta_prop(DIVERGED):
                raise WithheldError(str(part.get_meta_prop(DIVERGED)))
        shapes = None if whole.data_kind == DataKind.COLLECTION else _sizes(fl_ctx)
        allowed = cleared(shareable, shapes)
        self._tell_what_stays(shareable, allowed, fl_ctx)
        if not updates:
            self._passage.verdict = "no update"
            return allowed
        self._rounds.take(stated)
        kinds = sorted({part.data_kind for part in updates} - set(self.data_kinds))
        if kinds:
            self.unmeasured(f"{', '.join(kinds)} is not among data_kinds", fl_ctx)
        return super().process(allowed, fl_ctx)

    def unmeasured(self, reason: str, fl_ctx: FLContext) -> None:
        """Note that an update leaves although this filter does nothing to it."""
        self._passage.verdict, self._passage.reason = "passed unmeasured", reason
        self.log_warning(fl_ctx, f"the update leaves unmeasured: {reason}", fire_event=False)

    def process_dxo(self, dxo: DXO, shareable: Shareable, fl_ctx: FLContext) -> DXO:
        """See `process_update`; an update without content is left as it is."""
        if holds_nothing(dxo, fl_ctx):
            self._passage.reason = "the update holds nothing but zeros or the global weights"
            return dxo
        return self.process_update(dxo, fl_ctx)

    def _tell_what_stays(self, shareable: Shareable, sent: Shareable, fl_ctx: FLContext) -> None:
        stays = left_out(shareable, sent)
        if stays:
            self.log_info(fl_ctx, f"not sent: {', '.join(stays)}", fire_event=False)

    def _log(self, sent: Shareable, fl_ctx: FLContext) -> None:
        passage = self._passage
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
                "sent": digest(sent),
            },
        )

    def _withhold(self, error: Exception, shareable: Shareable, fl_ctx: FLContext) -> Shareable:
        reason = reason_of(error)
        self._passage.verdict, self._passage.reason = "withheld", reason
        name = f"{type(self).__name__} at {fl_ctx.get_identity_name()}"
        # Not as an event, which handlers might forward to the server.
        self.log_warning(fl_ctx, f"{name}: the update is withheld: {reason}", fire_event=False)
        fl_ctx.set_prop(WITHHELD, reason, private=True, sticky=True)
        try:
            self.record_withheld(error, fl_ctx)
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


def _sizes(fl_ctx: FLContext) -> dict[str, int] | None:
    """Number of values of each variable of the global model, where a tap saw it."""
    weights = fl_ctx.get_prop(GLOBAL_WEIGHTS)
    return None if weights is None else {k: int(np.asarray(v).size) for k, v in weights.items()}


def holds_nothing(dxo: DXO, fl_ctx: FLContext) -> bool:
    """Whether an update says nothing of the site's data: zeros, or the global weights again.

    Its values decide. What it states of itself (a vanishing weight) anybody can write who
    writes the training script.
    """
    if dxo.data_kind == DataKind.WEIGHT_DIFF:
        return not any(_has_a_bit(value) for value in dxo.data.values())
    known = fl_ctx.get_prop(GLOBAL_WEIGHTS)
    if dxo.data_kind != DataKind.WEIGHTS or not known:
        return False
    return all(name in known and _same(value, known[name]) for name, value in dxo.data.items())


def _has_a_bit(value: Any) -> bool:
    return bool(np.frombuffer(array_of(value).tobytes(), np.uint8).any())


def _same(value: Any, known: Any) -> bool:
    """Whether two variables agree to the bit: a sign of a zero could carry a message too."""
    first, second = array_of(value), array_of(known)
    return first.dtype == second.dtype and first.tobytes() == second.tobytes()


def stated_round(dxo: DXO, fl_ctx: FLContext) -> Any:
    """The round of an update: as a tap saw it, as the site knows, or as it says itself."""
    for number in (
        fl_ctx.get_prop(ROUND),
        dxo.get_meta_prop(AppConstants.CURRENT_ROUND),
        fl_ctx.get_prop(AppConstants.CURRENT_ROUND),
    ):
        if number is not None:
            return number
    return None


def current_round(dxo: DXO, fl_ctx: FLContext) -> int:
    """The round of an update, for names and records.

    Raises:
        InputError: Nobody knows, or what is stated is no round.
    """
    number = stated_round(dxo, fl_ctx)
    if number is None:
        raise InputError(
            "the round of the update is unknown: add federated.flare.taps.GlobalModelTap"
        )
    if not is_round(number):
        raise InputError(f"the round {number!r} is no number of a round")
    return int(number)


def withheld_update(dxo: DXO, fl_ctx: FLContext) -> DXO:
    """What is sent in place of an update.

    Args:
        dxo: The update, as NVFlare's data exchange object.
        fl_ctx: Of the site; holds the global weights if a `GlobalModelTap` saw them.

    Returns:
        A zero difference (the global weights, where weights are expected) by the update's
        names and shapes, with a vanishing weight and without what else came along.
    """
    meta = {MetaKey.NUM_STEPS_CURRENT_ROUND: VANISHING_WEIGHT}
    number = dxo.get_meta_prop(AppConstants.CURRENT_ROUND)
    if is_round(number):
        meta[AppConstants.CURRENT_ROUND] = int(number)
    if dxo.data_kind == DataKind.COLLECTION:
        check_names([allowed_name(name) for name in dxo.data], "parts")
        parts = {name: withheld_update(part, fl_ctx) for name, part in dxo.data.items()}
        return DXO(DataKind.COLLECTION, parts, meta)
    if dxo.data_kind == DataKind.WEIGHTS:
        known = fl_ctx.get_prop(GLOBAL_WEIGHTS) or {}
        return DXO(dxo.data_kind, {name: known[name] for name in dxo.data}, meta)
    if dxo.data_kind == DataKind.WEIGHT_DIFF:
        # A name is text as well, and text can say anything.
        known = fl_ctx.get_prop(GLOBAL_WEIGHTS) or dxo.data
        names = [name for name in known if name in dxo.data and is_name(name)]
        zeros = {name: _zeros(known[name], dxo.data[name]) for name in names}
        return DXO(dxo.data_kind, zeros, meta)
    raise WithheldError(f"no replacement for data of kind {dxo.data_kind}")


def diverged_meta(reason: str) -> dict[str, Any]:
    """For the zero difference of a site whose training diverged: weighs nothing, says why.

    The first filter records the reason at the site and takes it off what is sent.
    """
    return {MetaKey.NUM_STEPS_CURRENT_ROUND: VANISHING_WEIGHT, DIVERGED: reason}


def _zeros(like: Any, sent: Any) -> Any:
    """Zeros of one variable's shape, as a tensor where such was sent."""
    zeros = np.zeros_like(array_of(like))
    return torch.from_numpy(zeros) if isinstance(sent, torch.Tensor) else zeros


def _leaves(dxo: DXO) -> Iterator[DXO]:
    if dxo.data_kind != DataKind.COLLECTION:
        yield dxo
        return
    parts = dxo.data.values() if isinstance(dxo.data, Mapping) else dxo.data
    for part in parts:
        yield from _leaves(part)
