"""The order in which tests run: those that wait for each other begin first."""

from __future__ import annotations

import pytest

# One simulated federation at a time; begun last, they would keep one process busy and no other.
ONE_AT_A_TIME = "tests/federated/test_nvflare_simulator.py"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the simulated federations in front; all else keeps its order."""
    items.sort(key=lambda item: not item.nodeid.startswith(ONE_AT_A_TIME))
