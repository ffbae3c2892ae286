"""The order in which tests run, what their processes start from, and a folder for Ray.

Tests that wait for each other begin first. Ray notes in the folder for temporary files which
cluster was started last, and `ray.init` joins it: a cluster of the user's, or one that is gone.
Processes are forked from a server that has what its first process needed; it has here what the
processes of most tests need.
"""

from __future__ import annotations

import multiprocessing.forkserver
import os
import tempfile
from collections.abc import Iterator

import pytest

from tests.launched import IMPORTS

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


@pytest.fixture(scope="session", autouse=True)
def one_server() -> Iterator[None]:
    """Whichever test is the first to start a process, its server suits all others."""
    server = multiprocessing.forkserver
    ask = server.set_forkserver_preload

    def ask_for_all(names: list[str]) -> None:
        ask([*dict.fromkeys([*IMPORTS, *names])])

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(server, "set_forkserver_preload", ask_for_all)
        yield
