"""Schemes are records in a registry."""

from __future__ import annotations

import copy
import dataclasses

import pytest

from core.errors import InputError
from training import schemes
from training.schemes import Scheme, get_scheme, register_scheme, scheme_names


@pytest.mark.parametrize(
    ("name", "batch_size", "batch_norm", "pool_kernel", "dp"),
    [
        ("pure", 128, "synchronized", 3, False),
        ("RA", 128, "synchronized", 19, False),
        ("DP-SGD", 128, "synchronized", 3, True),
        ("GH", 384, "asynchronous", 3, False),
    ],
)
def test_published_schemes(
    name: str, batch_size: int, batch_norm: str, pool_kernel: int, dp: bool
) -> None:
    assert get_scheme(name) == Scheme(name, batch_size, batch_norm, pool_kernel, dp)


def test_records_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        get_scheme("pure").batch_size = 1  # type: ignore[misc]


def test_registering(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schemes, "_SCHEMES", copy.copy(schemes._SCHEMES))
    mine = register_scheme(Scheme("mine", batch_norm="asynchronous", pool_kernel=9))
    assert get_scheme("mine") is mine
    assert mine.defaults()["syncbn"] is False
    assert scheme_names() == ["None", "pure", "RA", "DP-SGD", "GH", "mine"]
    for taken in ("mine", "None"):
        with pytest.raises(ValueError, match="registered already"):
            register_scheme(Scheme(taken))


def test_mistakes() -> None:
    with pytest.raises(InputError, match="--scheme puer: unknown; known are None, pure, RA"):
        get_scheme("puer")
    with pytest.raises(ValueError, match="batch_norm"):
        Scheme("x", batch_norm="mixed")
    with pytest.raises(ValueError, match="at least 1"):
        Scheme("x", batch_size=0)
