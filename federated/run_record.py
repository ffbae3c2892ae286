"""Command: the record of a finished run, `run.json`, and its cross-site validation.

python -m federated.run_record --workspace results/federated/exp1

NVFlare's simulator ends with status 0 even where clients failed, so this command looks
at what a run must have left behind, and fails where something is missing.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training.errors import InputError, exit_status

if TYPE_CHECKING:
    from prettytable import PrettyTable

JOB = "simulate_job"
GLOBAL_MODEL = "SRV_FL_global_model.pt"
LEAKAGE_FILTER = "RelativeDataLeakageValueFilter"


def build_parser() -> argparse.ArgumentParser:
    """The command's flags."""
    parser = argparse.ArgumentParser(
        prog="python -m federated.run_record",
        description="Check a finished run, write its run.json, show its cross-site validation.",
    )
    parser.add_argument("--workspace", type=Path, required=True, help="of the simulator")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    args = build_parser().parse_args(arguments)
    return exit_status(lambda: _run(args))


def _run(args: argparse.Namespace) -> None:
    record = write_run_record(args.workspace)
    scores = cross_site_scores(args.workspace)
    if scores:
        print(cross_site_table(scores))
    for line in summary_lines(record):
        print(line)


def write_run_record(workspace: str | Path, **details: Any) -> dict[str, Any]:
    """Check what a run left behind, and write `run.json` beside it.

    Args:
        workspace: Of the simulator.
        **details: Further entries of the record.

    Returns:
        sigma0, n_clients, num_rounds, test_accuracy (mean over the sites of the final
        global model; None without cross-site validation), leakage (one entry per site
        and round) and provenance.

    Raises:
        InputError: Something that a finished run leaves behind is missing.
    """
    import torch

    from federated.runs import RUN_FILE
    from training.records import provenance
    from training.storage import write_json

    workspace = Path(workspace)
    if not workspace.is_dir():
        raise InputError(f"--workspace: there is no folder {workspace}")
    clients = _client_configs(workspace)
    server = _config(workspace / "server" / JOB / "app_server/config/config_fed_server.json")
    _check_model(workspace)
    scores = cross_site_scores(workspace)
    if not scores and _validates(server):
        raise InputError(f"{workspace}: the cross-site validation left no results")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    seed = next((int(config["SEED"]) for config in clients.values() if "SEED" in config), 0)
    record = {
        "kind": "federated",
        "sigma0": _noise(clients),
        "n_clients": len(clients),
        "num_rounds": server.get("num_rounds"),
        "test_accuracy": _global_accuracy(scores),
        "cross_site": scores,
        "leakage": _leakage(workspace, clients),
        "settings": {site: _variables(config) for site, config in clients.items()},
        "provenance": provenance(device, seed),
        **details,
    }
    write_json(workspace / RUN_FILE, record)
    return record


def cross_site_scores(workspace: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """Scores by validating site and model; empty where nothing was validated.

    Raises:
        InputError: The file is broken.
    """
    path = workspace / "server" / JOB / "cross_site_val/cross_val_results.json"
    return _config(path) if path.is_file() else {}


def cross_site_table(scores: dict[str, dict[str, dict[str, Any]]]) -> PrettyTable:
    """Test accuracy of every model (column) at every site (row)."""
    from prettytable import PrettyTable

    models = sorted({model for row in scores.values() for model in row})
    table = PrettyTable(["test accuracy", *(m.removesuffix(".pt") for m in models)])
    table.title = "cross-site validation: models in columns, sites in rows"
    for site in sorted(scores):
        found = [scores[site].get(model, {}).get("test_accuracy") for model in models]
        table.add_row([site, *("-" if v is None else f"{v:.3f}" for v in found)])
    return table


def summary_lines(record: dict[str, Any]) -> list[str]:
    """The run's leakage in a line per site, of the last round measured."""
    latest = {entry["site"]: entry for entry in record["leakage"]}
    lines = [f"{site}: {entry['statement']}" for site, entry in sorted(latest.items())]
    accuracy = record["test_accuracy"]
    said = "not measured" if accuracy is None else f"{accuracy:.3f}"
    return [*lines, f"sigma0 {record['sigma0']:g}, test accuracy of the global model: {said}"]


def _client_configs(workspace: Path) -> dict[str, dict[str, Any]]:
    """The configuration that every site ran, by site."""
    pattern = f"*/{JOB}/app_*/config/config_fed_client.json"
    found = {path.parts[-5]: _config(path) for path in sorted(workspace.glob(pattern))}
    if not found:
        raise InputError(f"{workspace}: no client has run here; see its log files")
    return found


def _check_model(workspace: Path) -> None:
    if not list((workspace / "server" / JOB).glob("app_server/*FL_global_model.pt")):
        raise InputError(
            f"{workspace}: the federation left no global model, so no round was completed; "
            f"see {workspace / 'server' / 'error_log.txt'}"
        )


def _validates(server: dict[str, Any]) -> bool:
    names = [str(w.get("path") or w.get("name")) for w in server.get("workflows", [])]
    return any(name.endswith("CrossSiteModelEval") for name in names)


def _noise(clients: dict[str, dict[str, Any]]) -> float:
    """The clients' sigma0, which is the same for all in a job of `create_job_config`."""
    values = {float(config.get("SIGMA0") or 0.0) for config in clients.values()}
    return max(values)


def _global_accuracy(scores: dict[str, dict[str, dict[str, Any]]]) -> float | None:
    found = [row.get(GLOBAL_MODEL, {}).get("test_accuracy") for row in scores.values()]
    known = [float(v) for v in found if v is not None and math.isfinite(v)]
    return sum(known) / len(known) if known else None


def _leakage(workspace: Path, clients: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Every site's measurements, in order of the rounds."""
    from federated.leakage import read_leakage

    measuring = [site for site, config in clients.items() if LEAKAGE_FILTER in json.dumps(config)]
    if not measuring:
        return []
    try:
        records = read_leakage(workspace)
    except InputError as error:
        raise InputError(f"{', '.join(measuring)} should have measured leakage: {error}") from None
    silent = set(measuring) - {record.site for record in records}
    if silent:
        raise InputError(f"{workspace}: no leakage was measured at {', '.join(sorted(silent))}")
    return [_entry(record.content, workspace, record.path) for record in records]


def _entry(content: dict[str, Any], workspace: Path, path: Path) -> dict[str, Any]:
    """What tables need of one measurement."""
    return {
        "site": content["site"],
        "round": content["round"],
        "rdlv": content["rdlv"],
        "images": content["images"],
        "decision": content["decision"],
        "statement": content["statement"],
        "file": str(path.relative_to(workspace)),
    }


def _variables(config: dict[str, Any]) -> dict[str, Any]:
    """The job's variables: its top-level plain values."""
    return {k: v for k, v in config.items() if isinstance(v, (int, float, str, bool))}


def _config(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"there is no {path}: the run was not started or is broken") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as JSON ({error})") from None
    if not isinstance(content, dict):
        raise InputError(f"{path} is not a JSON object")
    return content


if __name__ == "__main__":
    sys.exit(main())
