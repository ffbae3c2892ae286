"""Random damage to a file of every kind: `InputError` leaves its reader, or a value does.

The examples are the same in every run. GRADINVBENCH_FUZZ=100 tries a hundred times as many.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

from core.errors import InputError
from tests.reader_files import JSON, READERS, TORCH, same, whole_file

pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

FACTOR = float(os.environ.get("GRADINVBENCH_FUZZ", "1"))
# A table reads for a quarter of a second, and what resumes builds a model.
EXAMPLES = {"table": 8, "training checkpoint": 20, "attack state": 15}
SETTINGS = {
    "deadline": None,
    "derandomize": True,
    "database": None,
    "suppress_health_check": list(HealthCheck),
}


def _examples(kind: str, usual: int = 40) -> int:
    return max(1, int(FACTOR * EXAMPLES.get(kind, usual)))


# Where (as a share of the file), what becomes of the bytes there.
DAMAGE = st.tuples(
    st.floats(0, 1, exclude_max=True),
    st.one_of(
        st.tuples(st.just("flip"), st.integers(1, 255)),
        st.tuples(st.just("cut"), st.just(0)),
        st.tuples(st.just("insert"), st.binary(min_size=1, max_size=9)),
        st.tuples(st.just("remove"), st.integers(1, 64)),
        st.tuples(st.just("overwrite"), st.binary(min_size=1, max_size=16)),
    ),
)
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=8)
)
PLAIN = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)
TENSORS = st.builds(
    lambda shape, dtype: torch.zeros(shape).to(dtype),
    st.lists(st.integers(0, 3), max_size=4),
    st.sampled_from([torch.float32, torch.int64, torch.bool, torch.complex64, torch.float16]),
)


def _damaged(whole: bytes, place: float, kind: str, with_what: Any) -> bytes:
    at = int(place * len(whole))
    if kind == "flip":
        return whole[:at] + bytes([whole[at] ^ with_what]) + whole[at + 1 :]
    if kind == "cut":
        return whole[:at]
    if kind == "remove":
        return whole[:at] + whole[at + with_what :]
    rest = at if kind == "insert" else at + len(with_what)
    return whole[:at] + with_what + whole[rest:]


@pytest.fixture(scope="module")
def folder() -> Any:
    with tempfile.TemporaryDirectory() as made:
        yield Path(made)


@pytest.mark.parametrize("kind", READERS)
def test_damaged_bytes(kind: str, folder: Path) -> None:
    path = whole_file(kind, folder / kind / "bytes")
    whole, reference = path.read_bytes(), READERS[kind].read(path)
    summed = kind in TORCH and kind != "legacy model"

    @settings(max_examples=_examples(kind), **SETTINGS)  # type: ignore[arg-type]
    @given(st.lists(DAMAGE, min_size=1, max_size=2))
    def attempt(damages: list[Any]) -> None:
        content = whole
        for place, (what, with_what) in damages:
            content = _damaged(content, place, what, with_what) if content else content
        path.write_bytes(content)
        try:
            read = READERS[kind].read(path)
        except InputError:
            return
        assert not summed or same(read, reference)

    attempt()


def _places(value: Any, place: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where there is a value in nested containers."""
    inner: list[tuple[Any, Any]] = []
    if isinstance(value, dict):
        inner = list(value.items())
    elif isinstance(value, list):
        inner = list(enumerate(value))
    return [place, *(p for key, each in inner for p in _places(each, (*place, key)))]


def _replaced(value: Any, place: tuple[Any, ...], by: Any) -> Any:
    if not place:
        return by
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[place[0]] = _replaced(copy[place[0]], place[1:], by)
    return copy


@pytest.mark.parametrize("kind", [*JSON, *TORCH])
def test_other_values(kind: str, folder: Path) -> None:
    path = whole_file(kind, folder / kind / "values")
    is_json = kind in JSON
    whole = json.loads(path.read_text()) if is_json else torch.load(path, weights_only=False)
    whole = {key: value for key, value in whole.items() if key != "checksum"}
    places = _places(whole)

    @settings(max_examples=_examples(kind, 60), **SETTINGS)  # type: ignore[arg-type]
    @given(st.sampled_from(range(len(places))), PLAIN if is_json else PLAIN | TENSORS)
    def attempt(number: int, value: Any) -> None:
        changed = _replaced(whole, places[number], value)
        if is_json:
            path.write_text(json.dumps(changed))
        else:
            torch.save(changed, path)
        with contextlib.suppress(InputError):
            READERS[kind].read(path)

    attempt()
