"""Runs of a federation in a folder: their noise, their accuracy and their leakage records."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from audit.leakage import LeakageRecord, read_leakage
from core.errors import InputError
from core.reading import read_json_object

RUN_FILE = "run.json"
CLIENT_CONFIG = "config_fed_client.json"
# Where NVFlare leaves the scores of the models, from a site's folder or the run's.
SCORES = tuple(
    Path(place) / "cross_site_val" / "cross_val_results.json"
    for place in ("", "server/simulate_job", "run/server/simulate_job")
)
# The first one that was tested counts.
GLOBAL_MODELS = ("SRV_best_FL_global_model.pt", "SRV_FL_global_model.pt")


@dataclass
class Run:
    """One run of a federation.

    Attributes:
        folder: Folder of the run.
        sigma0: Noise level of the privacy filter.
        test_accuracy: Of the final global model; None where unknown.
        records: Leakage of every site and round.
    """

    folder: Path
    sigma0: float
    test_accuracy: float | None
    records: list[LeakageRecord]


def read_runs(workspaces: str | Path) -> list[Run]:
    """All runs below a folder, ordered by their noise.

    A run is a folder with `run.json` ({"sigma0": ..., "test_accuracy": ...}). Results
    outside of such folders are taken by the noise that the clients' job configuration
    beside them states.

    Raises:
        InputError: There are no results, or nothing says what noise they had.
    """
    records = read_leakage(workspaces)
    root = Path(workspaces).resolve()
    found: dict[tuple[Path, float], Run] = {}
    for record in records:
        folder, sigma0, accuracy = _run_of(record.path.resolve(), root)
        run = found.setdefault((folder, sigma0), Run(folder, sigma0, accuracy, []))
        run.records.append(record)
    return sorted(found.values(), key=lambda run: (run.sigma0, str(run.folder)))


def _run_of(path: Path, root: Path) -> tuple[Path, float, float | None]:
    """The run a result belongs to: folder, noise, accuracy."""
    for folder in _folders(path, root):
        if (folder / RUN_FILE).is_file():
            content = _read(folder / RUN_FILE)
            accuracy = content.get("test_accuracy")
            sigma0 = _number(content.get("sigma0"), folder / RUN_FILE)
            return folder, sigma0, None if accuracy is None else float(accuracy)
    for folder in _folders(path, root):
        config = folder / "config" / CLIENT_CONFIG
        if config.is_file():
            return root, configured_noise(config), _cross_validated(path, root)
    raise InputError(
        f"nothing says what noise {path} had: there is no {RUN_FILE} and no {CLIENT_CONFIG} "
        f"between it and {root}"
    )


def _cross_validated(path: Path, root: Path) -> float | None:
    """Test accuracy of the best global model, where the run's own folders hold one."""
    for folder in _folders(path, root):
        for place in SCORES:
            if (folder / place).is_file():
                return _best_accuracy(folder / place)
    return None


def _best_accuracy(path: Path) -> float | None:
    """Mean over the sites that tested the global model."""
    found = []
    for scores in _read(path).values():
        chosen = next((scores[m] for m in GLOBAL_MODELS if m in scores), None)
        accuracy = None if chosen is None else chosen.get("test_accuracy")
        if isinstance(accuracy, (int, float)):
            found.append(float(accuracy))
    return sum(found) / len(found) if found else None


def _folders(path: Path, root: Path) -> Iterator[Path]:
    for folder in path.parents:
        yield folder
        if folder == root:
            return


def _read(path: Path) -> dict[str, Any]:
    return read_json_object(path)


def _number(value: Any, path: Path) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise InputError(f"{path}: sigma0 is {value!r}, not a number")
    return float(value)


def configured_noise(path: Path) -> float:
    """sigma0 of the noise filter in a client's configuration; 0 where there is none.

    The argument may name a variable of the same file, such as "{SIGMA0}".
    """
    content = _read(path)
    for chain in content.get("task_result_filters", []):
        for component in chain.get("filters", []):
            kind = str(component.get("path") or component.get("name") or "")
            if kind.endswith("GaussianPrivacy"):
                value = component.get("args", {}).get("sigma0", 0.1)
                if isinstance(value, str):
                    value = content.get(value.strip("{}"))
                return _number(value, path)
    return 0.0
