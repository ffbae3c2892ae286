"""What may leave a site with a task's result: an allow-list, everything else stays.

A result is made anew from what is allowed. Headers, meta data and keys that nobody looked at
do not travel with it, whoever put them there.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from nvflare.apis.dxo import DXO, DataKind, MetaKey, from_shareable
from nvflare.apis.fl_constant import ReturnCode
from nvflare.apis.shareable import Shareable, make_reply
from nvflare.app_common.app_constant import AppConstants, ValidateType

UPDATE_KINDS = [DataKind.WEIGHT_DIFF, DataKind.WEIGHTS]
# Names and scores of a METRICS result: as many as an evaluation has, too few to hold an image.
MAX_METRICS = 64
MAX_NAME = 128
_NAME = re.compile(r"[\w .:/@-]+")

_RETURN_CODES = {
    value for name, value in vars(ReturnCode).items() if name.isupper() and isinstance(value, str)
}
_VALIDATIONS = {ValidateType.BEFORE_TRAIN_VALIDATE, ValidateType.MODEL_VALIDATE}
_ROUND_HEADERS = (AppConstants.CURRENT_ROUND, AppConstants.START_ROUND, AppConstants.NUM_ROUNDS)


class NotAllowedError(ValueError):
    """A result holds something that no rule allows; the message says what."""


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
    found = cleared_dxo(from_shareable(shareable), shapes).to_shareable()
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
        data: dict[str, Any] = _variables(dxo.data, shapes)
    elif dxo.data_kind == DataKind.METRICS:
        data = _scores(dxo.data, "metrics")
    elif dxo.data_kind == DataKind.COLLECTION:
        # Parts may be of several models: their names are not those of the global one.
        data = {_name(name): cleared_dxo(_part(part)) for name, part in _mapping(dxo.data).items()}
    else:
        raise NotAllowedError(f"data of kind {dxo.data_kind} cannot be checked")
    return DXO(dxo.data_kind, data, _meta(dxo.meta))


def is_round(value: Any) -> bool:
    """Whether a value is the number of a round."""
    whole = isinstance(value, (int, np.integer)) and not isinstance(value, (bool, np.bool_))
    return bool(whole and 0 <= int(value) < 2**31)


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


def _add(found: Any, value: Any) -> None:
    if isinstance(value, DXO):
        found.update(f"{value.data_kind}{len(value.data)}".encode())
        _add(found, value.data)
        _add(found, value.meta)
    elif isinstance(value, Mapping):
        for name in sorted(value):
            found.update(f"{name}:".encode())
            _add(found, value[name])
    elif isinstance(value, (np.ndarray, torch.Tensor)):
        array = np.ascontiguousarray(array_of(value))
        found.update(f"{array.dtype}{array.shape}".encode())
        found.update(array.tobytes())
    else:
        found.update(json.dumps(value, default=str).encode())


def array_of(value: Any) -> np.ndarray:
    """A variable as an array of its own values: nothing is rounded.

    NumPy has no bfloat16; float32 holds all of its numbers.
    """
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        value = value.float() if value.dtype == torch.bfloat16 else value
    return np.asarray(value)


def _mapping(data: Any) -> Mapping[str, Any]:
    if not isinstance(data, Mapping):
        raise NotAllowedError("the data are not a dictionary of variables")
    return data


def _part(part: Any) -> DXO:
    if not isinstance(part, DXO):
        raise NotAllowedError(f"a part of a collection is a {type(part).__name__}")
    return part


def is_name(name: Any) -> bool:
    """Whether a variable or a score may be called so: by words, and not by a message."""
    return isinstance(name, str) and len(name) <= MAX_NAME and bool(_NAME.fullmatch(name))


def _name(name: Any) -> str:
    if not is_name(name):
        raise NotAllowedError(
            f"a name is not made of at most {MAX_NAME} letters, digits, spaces and . : / @ -"
        )
    return str(name)


def _variables(data: Any, shapes: Mapping[str, int] | None) -> dict[str, Any]:
    """The variables of an update: arrays of real numbers by the names of the global model."""
    return {_name(k): _variable(k, value, shapes) for k, value in _mapping(data).items()}


def _variable(name: str, value: Any, shapes: Mapping[str, int] | None) -> Any:
    tensor = isinstance(value, torch.Tensor)
    if not tensor and not isinstance(value, (np.ndarray, np.number, int, float)):
        raise NotAllowedError(f"the variable {name} is a {type(value).__name__}, not an array")
    array = array_of(value)
    if array.dtype.kind not in "iuf":
        raise NotAllowedError(f"the variable {name} is of type {array.dtype}, not real numbers")
    if shapes is not None and shapes.get(name) != array.size:
        raise NotAllowedError(
            f"the variable {name} of {array.size} values is none of the global model's"
        )
    return value if tensor else array


def _scores(values: Any, what: str) -> dict[str, Any]:
    values = _mapping(values)
    if len(values) > MAX_METRICS:
        raise NotAllowedError(f"{len(values)} {what} are more than {MAX_METRICS}")
    return {_name(name): _score(value, f"{what}: {name}") for name, value in values.items()}


def _score(value: Any, what: str) -> float | int | None:
    if value is None:
        return None
    if isinstance(value, (np.ndarray, torch.Tensor)) and array_of(value).size == 1:
        value = array_of(value).item()
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, (int, float)) or abs(value) > 1e300:
        raise NotAllowedError(f"{what} is not one number")
    return value


def _meta(meta: Mapping[str, Any] | None) -> dict[str, Any]:
    """The meta data that aggregation needs: how much the update weighs, round, scores."""
    meta = meta or {}
    kept: dict[str, Any] = {}
    steps = meta.get(MetaKey.NUM_STEPS_CURRENT_ROUND)
    if steps is not None:
        weight = _score(steps, "the number of steps")
        if weight is None or not 0 < weight < math.inf:
            raise NotAllowedError(f"the number of steps {steps!r} is no weight")
        kept[MetaKey.NUM_STEPS_CURRENT_ROUND] = weight
    if is_round(meta.get(AppConstants.CURRENT_ROUND)):
        kept[AppConstants.CURRENT_ROUND] = int(meta[AppConstants.CURRENT_ROUND])
    scores = meta.get(MetaKey.INITIAL_METRICS)
    if isinstance(scores, Mapping):
        kept[MetaKey.INITIAL_METRICS] = _scores(scores, "metrics")
    elif scores is not None:
        kept[MetaKey.INITIAL_METRICS] = _score(scores, "the metric")
    return kept


def _names(shareable: Shareable) -> set[str]:
    headers = shareable.get("__headers__") or {}
    names = {f"header {name}" for name in headers} | {f"key {name}" for name in shareable}
    try:
        return names | {f"meta {name}" for name in from_shareable(shareable).meta or {}}
    except ValueError:
        return names
