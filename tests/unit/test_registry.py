"""What is known by its name."""

from __future__ import annotations

import pytest

from core.errors import InputError
from core.registry import Registry


def test_names_are_taken_once_and_found() -> None:
    known = Registry[int]("number")
    assert known.add("two", 2) == 2
    known.add("one", 1)
    with pytest.raises(ValueError, match="number two is registered already"):
        known.add("two", 3)
    with pytest.raises(ValueError, match="number all is registered already"):
        Registry[int]("number", reserved="all").add("all", 1)
    assert known.names() == ["one", "two"]
    assert known.find("two", "--number two: unknown") == 2
    with pytest.raises(InputError, match=r"^--number six: unknown; known are one, two$"):
        known.find("six", "--number six: unknown")
