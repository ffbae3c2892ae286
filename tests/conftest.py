"""The order in which tests run, and a folder for Ray that nobody else knows.

Tests that wait for each other begin first. Ray notes in the folder for temporary files which
cluster was started last, and `ray.init` joins it: a cluster of the user's, or one that is gone.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator

import pytest

# One simulated federation at a time, and one test of a minute. Begun last, they would keep one
# process busy and no other.
LONGEST = (
    "tests/federated/test_nvflare_simulator.py",
    "tests/unit/test_pretended_device.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put what takes longest in front; all else keeps its order."""
    items.sort(key=lambda item: not item.nodeid.startswith(LONGEST))


@pytest.fixture(scope="session", autouse=True)
def ray_folder() -> Iterator[None]:
    """What tests and the processes they start see of Ray is theirs alone."""
    kept = {name: os.environ.pop(name, None) for name in ("RAY_TMPDIR", "RAY_ADDRESS")}
    # In pytest's own folders the paths of Ray's sockets would be too long.
    with tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as folder:
        os.environ["RAY_TMPDIR"] = folder
        yield
    os.environ.pop("RAY_TMPDIR")
    os.environ.update({name: value for name, value in kept.items() if value is not None})
