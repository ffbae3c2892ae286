"""What a simulated run left: models, scores, leakage, and the record made of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from core.errors import InputError
from core.escaping import in_one_line
from federated.experiment.simulator import Job, count_gpus, read_json, value_of

RUN_NAME = "simulate_job"
FINAL_MODEL = "FL_global_model.pt"


def run_folder(workspace: Path, site: str) -> Path:
    """A site's folder of the run."""
    return workspace / "run" / site / RUN_NAME


def app_folder(workspace: Path, site: str) -> Path:
    """A site's app in the run, where its results are."""
    return run_folder(workspace, site) / f"app_{site}"


def cross_validation(workspace: Path) -> dict[str, Any]:
    """Scores by site and model; empty if there are none."""
    path = run_folder(workspace, "server") / "cross_site_val" / "cross_val_results.json"
    return read_json(path) if path.is_file() else {}


def missing_results(job: Job, workspace: Path) -> list[str]:
    """What a complete run would have left; NVFlare's own status says nothing about it."""
    missing = []
    if not (app_folder(workspace, "server") / FINAL_MODEL).is_file():
        missing.append(f"the federation left no {FINAL_MODEL}; see {workspace / 'simulator.log'}")
    for site in job.sites:
        if job.evaluates and site not in cross_validation(workspace):
            missing.append(f"{site} left no cross-site validation")
        for number in measured_rounds(job, site):
            if not (app_folder(workspace, site) / f"leakage_round{number}.json").is_file():
                missing.append(f"{site} left no leakage result of round {number}")
    return missing


def measured_rounds(job: Job, site: str) -> list[int]:
    """The rounds in which a site measures leakage."""
    content = job.client(site)
    for chain in content.get("task_result_filters", []):
        for component in chain.get("filters", []):
            if str(component.get("path", "")).endswith("RelativeDataLeakageValueFilter"):
                given = component.get("args", {})
                every = value_of(given.get("frequency", 1), content)
                start = value_of(given.get("start_round", 0), content)
                return [n for n in range(start, job.num_rounds or 0) if n % every == 0]
    return []


def write_run(job: Job, workspace: Path, **details: Any) -> Path:
    """Write the run's record, which the figures read.

    Args:
        job: The job that ran.
        workspace: Folder that the job ran in.
        details: More for the record; wins over what is found here.

    Returns:
        The file, `run.json`.
    """
    import torch

    from core.records import provenance
    from core.storage import write_json
    from federated.experiment.runs import RUN_FILE, configured_noise

    config = job.apps[job.sites[0]] / "config" / "config_fed_client.json"
    device = torch.device("cuda" if count_gpus() and torch.cuda.is_available() else "cpu")
    scores = cross_validation(workspace)
    record = {
        "sigma0": configured_noise(config),
        "n_clients": len(job.sites),
        "num_rounds": job.num_rounds,
        "test_accuracy": _mean_accuracy(scores, f"SRV_{FINAL_MODEL}"),
        "best_test_accuracy": _mean_accuracy(scores, f"SRV_best_{FINAL_MODEL}"),
        "leakage": measured_leakage(workspace),
        "provenance": provenance(device, seed=0),
    }
    write_json(workspace / RUN_FILE, {**record, **details})
    return workspace / RUN_FILE


def measured_leakage(workspace: Path) -> list[dict[str, Any]]:
    """What every site measured in every round, as far as tables need it."""
    from audit.leakage import read_leakage

    try:
        records = read_leakage(workspace)
    except InputError:
        return []
    keys = ("site", "round", "rdlv", "images", "decision", "statement")
    return [{key: record.content[key] for key in keys} for record in records]


def _mean_accuracy(scores: Mapping[str, Any], model: str) -> float | None:
    """Of one model at all sites that tested it."""
    found = [site[model].get("test_accuracy") for site in scores.values() if model in site]
    known = [value for value in found if value is not None]
    return sum(known) / len(known) if known else None


def print_results(workspace: Path) -> None:
    """Print scores and leakage."""
    from audit.leakage import read_leakage

    print("cross-site validation:")
    print(json.dumps(cross_validation(workspace), indent=2))
    try:
        records = read_leakage(workspace)
    except InputError:
        return
    print("leakage:")
    for record in records:
        value = "unknown" if record.rdlv is None else f"{record.rdlv:+.3f}"
        withheld = f": withheld, {record.reason}" if record.decision == "withhold" else ""
        line = f"  {record.site} round {record.round_number}: RDLV {value}{withheld}"
        print(in_one_line(line))
    if all(record.decision == "withhold" and record.rdlv is not None for record in records):
        print(
            "every measured update was withheld, so that the model learnt nothing from these "
            "sites; a job with a higher --rdlv_threshold, such as 100, lets them pass, still "
            "measured, which gives curves"
        )
