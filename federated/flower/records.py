"""What may leave a site with a Flower reply: an allow-list, everything else stays.

A reply's content is made anew: arrays of the global model's names and sizes, scores that are
one number each. Values of a `ConfigRecord` can be text or bytes of any length; of those only
what Flower itself writes around a `NumPyClient`'s results leaves, and of the client's own
dictionary in it the numbers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from federated.gate.allowed import (
    NotAllowedError,
    add_to_digest,
    allowed_name,
    check_names,
    is_name,
    score,
    scores,
    variables,
)

Arrays = Mapping[str, np.ndarray]

# What Flower makes of the results of `NumPyClient` and `Client`.
_METRICS = ("fitres.metrics", "evaluateres.metrics", "getpropertiesres.properties")
_STATUS = ("fitres.status", "evaluateres.status", "getpropertiesres.status")


def arrays_of(record: ArrayRecord) -> dict[str, np.ndarray]:
    """The arrays of a record by name, as they are."""
    return {name: np.array(array.numpy()) for name, array in record.items()}


def only_arrays(content: RecordDict) -> dict[str, np.ndarray] | None:
    """The arrays of the one `ArrayRecord` of a message; None where there is not one."""
    found = list(content.array_records.values())
    return arrays_of(found[0]) if len(found) == 1 else None


def cleared(content: RecordDict, known: Arrays | None) -> RecordDict:
    """A reply's content with what may leave, and nothing else.

    Args:
        content: What the app replied.
        known: The global model's arrays, for a reply to a training; None: no array may leave.

    Raises:
        NotAllowedError: Arrays that are none of the global model's, or scores that are not one
            number each.
    """
    if len(content.array_records) > (known is not None):
        raise NotAllowedError(
            f"{len(content.array_records)} array records; a reply to a training has one, others "
            "have none"
        )
    sent = RecordDict()
    for name, record in content.items():
        if isinstance(record, ArrayRecord):
            sent[allowed_name(name)] = _arrays(record, known or {})
        elif isinstance(record, MetricRecord):
            sent[allowed_name(name)] = MetricRecord(scores(dict(record), "metrics"))
        elif name in _METRICS:
            sent[name] = ConfigRecord(_numbers(record))
        elif name in _STATUS:
            sent[name] = ConfigRecord({"code": 0, "message": ""})
    scored = (record for record in sent.values() if not isinstance(record, ArrayRecord))
    check_names([*sent, *(name for record in scored for name in record)], "records and metrics")
    return sent


def refused_by_client(content: RecordDict) -> bool:
    """Whether a `Client` says that it could not do what it was asked."""
    return any(content.config_records.get(name, {}).get("code") for name in _STATUS)


def _arrays(record: ArrayRecord, known: Arrays) -> ArrayRecord:
    found = variables(arrays_of(record), {name: value.size for name, value in known.items()})
    # In the global model's order: the order of names could say something, too.
    return ArrayRecord({name: Array(found[name]) for name in known if name in found})


def _numbers(record: Mapping[str, object]) -> dict[str, float | int]:
    kept: dict[str, float | int] = {}
    for name, value in record.items():
        try:
            number = score(value, name)
        except NotAllowedError:
            continue
        if number is not None and is_name(name):
            kept[name] = number
    return kept


def left_out(content: RecordDict, sent: RecordDict) -> list[str]:
    """What a reply had and what is sent has not: names of records, and of what is in them."""
    return sorted(_names(content) - _names(sent))


def _names(content: RecordDict) -> set[str]:
    inside = {f"{name}: {key}" for name, record in content.items() for key in record}
    return set(content) | inside


def digest(content: RecordDict) -> str:
    """SHA-256 of what leaves: names, types, shapes and values."""
    found = hashlib.sha256()
    for name, record in content.items():
        found.update(f"{name}:{len(record)}".encode())
        is_arrays = isinstance(record, ArrayRecord)
        add_to_digest(found, arrays_of(record) if is_arrays else dict(record))
    return found.hexdigest()


def same(one: Arrays, other: Arrays) -> bool:
    """Whether arrays are some of others, to the bit: a sign of a zero could carry a message."""
    return all(
        name in other
        and value.dtype == other[name].dtype
        and value.tobytes() == other[name].tobytes()
        for name, value in one.items()
    )
