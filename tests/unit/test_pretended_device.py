"""What would fail on a GPU, seen without one: see `tests.pretended_device`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from torch.utils import backend_registration

from tests.attack_targets import CASES
from tests.on_pretended_device import ENGINE, MANY_TARGETS, PARTS, SHARED, TRAINED

pytestmark = pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this torch registers no device from Python",
)
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What became of every case, in processes whose torch knows the device, side by side."""
    folder = tmp_path_factory.mktemp("pretended")
    started = {part: start(part, folder / part) for part in PARTS}
    found: dict[str, Any] = {}
    for part, process in started.items():
        assert process.wait() == 0, (folder / part / "errors").read_text()[-2000:]
        lines = (folder / part / "output").read_text().splitlines()
        cases = [json.loads(line) for line in lines if line.startswith("{")]
        found |= {case.pop("case"): case for case in cases}
    return found


def start(part: str, folder: Path) -> subprocess.Popen[bytes]:
    folder.mkdir()
    words = [sys.executable, "-m", "tests.on_pretended_device", part, str(folder)]
    with open(folder / "output", "wb") as output, open(folder / "errors", "wb") as errors:
        return subprocess.Popen(words, cwd=ROOT, stdout=output, stderr=errors)


def test_nothing_mixes_devices(cases: dict[str, Any]) -> None:
    assert {name: case["error"] for name, case in cases.items() if "error" in case} == {}


def test_all_is_tried(cases: dict[str, Any]) -> None:
    kinds = [name.split(":")[0] for name in cases]
    assert kinds.count("refused") == kinds.count("allowed") == 5
    assert kinds.count("engine") == len(ENGINE)
    assert kinds.count("many targets") == len(MANY_TARGETS)
    assert kinds.count("speed") == len(["iterations", "restarts", "levers", "targets"])
    assert kinds.count("attack") == len(CASES)
    assert kinds.count("stages 2 and 3") == len(SHARED)
    assert kinds.count("stage 1") == len(TRAINED)


def test_branches_for_a_gpu_give_the_same_images(cases: dict[str, Any]) -> None:
    compared = {name: case.get("difference") for name, case in cases.items()}
    compared = {name: d for name, d in compared.items() if d is not None}
    assert len(compared) == len(ENGINE) + len(MANY_TARGETS) + len(
        ["ssim", "full", "full", "bn", "published"]
    )
    # The federated inversion is in float32, where iterations magnify rounding.
    bounds = {name: 1e-3 if name.startswith("federated") else 1e-5 for name in compared}
    assert all(d < bounds[name] for name, d in compared.items()), compared
