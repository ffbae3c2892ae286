"""What may leave a site with an NVFlare task's result: an allow-list, everything else stays.

A result is made anew from what is allowed. Headers, meta data and keys that nobody looked at
do not travel with it, whoever put them there.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from typing import Any

from nvflare.apis.dxo import DXO, DataKind, MetaKey, from_shareable
from nvflare.apis.fl_constant import ReturnCode
from nvflare.apis.shareable import Shareable, make_reply
from nvflare.app_common.app_constant import AppConstants, ValidateType

from federated.gate.allowed import (
    NotAllowedError,
    add_to_digest,
    allowed_name,
    check_names,
    is_round,
    mapping,
    score,
    scores,
    variables,
)

UPDATE_KINDS = [DataKind.WEIGHT_DIFF, DataKind.WEIGHTS]

_RETURN_CODES = {
    value for name, value in vars(ReturnCode).items() if name.isupper() and isinstance(value, str)
}
_VALIDATIONS = {ValidateType.BEFORE_TRAIN_VALIDATE, ValidateType.MODEL_VALIDATE}
_ROUND_HEADERS = (AppConstants.CURRENT_ROUND, AppConstants.START_ROUND, AppConstants.NUM_ROUNDS)


def failed_reply(shareable: Shareable) -> Shareable:
    """The return code of a failed task, and nothing else."""
    code = shareable.get_return_code()
    return make_reply(code if code in _RETURN_CODES else ReturnCode.EXECUTION_RESULT_ERROR)


def cleared(shareable: Shareable, shapes: Mapping[str, int] | None = None) -> Shareable:
    """A result with what may leave, and nothing else.

    Args:
        shareable: The result of a task that went well.
        shapes: Number of values of each variable of the global model; None where unknown.

    Raises:
        NotAllowedError: Its data are of a kind, a form or a size that is not allowed.
    """
    dxo = cleared_dxo(from_shareable(shareable), shapes)
    # Counted over all parts of a collection: many small ones could hold anything.
    check_names(list(_names_in(dxo)), "scores and parts")
    found = dxo.to_shareable()
    for header in _ROUND_HEADERS:
        value = shareable.get_header(header)
        if is_round(value):
            found.set_header(header, int(value))
    kind = shareable.get_header(AppConstants.VALIDATE_TYPE)
    if isinstance(kind, str) and kind in _VALIDATIONS:
        found.set_header(AppConstants.VALIDATE_TYPE, kind)
    return found


def cleared_dxo(dxo: DXO, shapes: Mapping[str, int] | None = None) -> DXO:
    """See `cleared`."""
    if dxo.data_kind in UPDATE_KINDS:
        data: dict[str, Any] = variables(dxo.data, shapes)
    elif dxo.data_kind == DataKind.METRICS:
        data = scores(dxo.data, "metrics")
    elif dxo.data_kind == DataKind.COLLECTION:
        # Parts may be of several models: their names are not those of the global one.
        data = {
            allowed_name(name): cleared_dxo(_part(part)) for name, part in mapping(dxo.data).items()
        }
    else:
        raise NotAllowedError(f"data of kind {dxo.data_kind} cannot be checked")
    return DXO(dxo.data_kind, data, _meta(dxo.meta))


def _names_in(dxo: DXO) -> Iterator[str]:
    """The names of parts and scores in a result, those of parts of parts included."""
    if dxo.data_kind not in UPDATE_KINDS:
        yield from dxo.data
    initial = dxo.get_meta_prop(MetaKey.INITIAL_METRICS)
    yield from initial if isinstance(initial, Mapping) else ()
    if dxo.data_kind == DataKind.COLLECTION:
        for part in dxo.data.values():
            yield from _names_in(part)


def left_out(shareable: Shareable, sent: Shareable) -> list[str]:
    """What a result had and what is sent has not: names of keys, headers and meta data."""
    before, after = _names(shareable), _names(sent)
    return sorted(name for name in before if name not in after)


def digest(shareable: Shareable) -> str:
    """SHA-256 of what leaves: names, types, shapes and values."""
    found = hashlib.sha256(str(shareable.get_return_code()).encode())
    try:
        _add(found, from_shareable(shareable))
    except ValueError:
        found.update(b"no data")
    return found.hexdigest()


def _add(found: Any, dxo: DXO) -> None:
    found.update(f"{dxo.data_kind}{len(dxo.data)}".encode())
    for name in sorted(dxo.data):
        found.update(f"{name}:".encode())
        value = dxo.data[name]
        (_add if isinstance(value, DXO) else add_to_digest)(found, value)
    add_to_digest(found, dxo.meta)


def _part(part: Any) -> DXO:
    if not isinstance(part, DXO):
        raise NotAllowedError(f"a part of a collection is a {type(part).__name__}")
    return part


def _meta(meta: Mapping[str, Any] | None) -> dict[str, Any]:
    """The meta data that aggregation needs: how much the update weighs, round, scores."""
    meta = meta or {}
    kept: dict[str, Any] = {}
    steps = meta.get(MetaKey.NUM_STEPS_CURRENT_ROUND)
    if steps is not None:
        weight = score(steps, "the number of steps")
        if weight is None or not 0 < weight < math.inf:
            raise NotAllowedError(f"the number of steps {steps!r} is no weight")
        kept[MetaKey.NUM_STEPS_CURRENT_ROUND] = weight
    if is_round(meta.get(AppConstants.CURRENT_ROUND)):
        kept[AppConstants.CURRENT_ROUND] = int(meta[AppConstants.CURRENT_ROUND])
    metrics = meta.get(MetaKey.INITIAL_METRICS)
    if isinstance(metrics, Mapping):
        kept[MetaKey.INITIAL_METRICS] = scores(metrics, "metrics")
    elif metrics is not None:
        kept[MetaKey.INITIAL_METRICS] = score(metrics, "the metric")
    return kept


def _names(shareable: Shareable) -> set[str]:
    headers = shareable.get("__headers__") or {}
    names = {f"header {name}" for name in headers} | {f"key {name}" for name in shareable}
    try:
        return names | {f"meta {name}" for name in from_shareable(shareable).meta or {}}
    except ValueError:
        return names
