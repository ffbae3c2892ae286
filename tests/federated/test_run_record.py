"""What a run must leave behind, and jobs of older versions made runnable."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from federated import prepare_job, run_record
from federated.leakage import measure_leakage, write_leakage
from federated.prepare_job import GLOBAL_MODEL
from federated.runs import read_runs
from federated.similarity import ImageSimMetric
from training.errors import InputError

MONAI = {"path": "monai.networks.nets.torchvision_fc.TorchVisionFCModel", "args": {}}
FILTER = {"path": "nvflare_gradinv.RelativeDataLeakageValueFilter", "args": {}}
ACCURACIES = {1: 0.75, 2: 0.85}


def _write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    """As the simulator leaves it after one round with two clients, one of them measuring."""
    server = tmp_path / "server/simulate_job"
    workflows = [{"path": "nvflare.app_common.workflows.CrossSiteModelEval"}]
    _write(
        server / "app_server/config/config_fed_server.json",
        {"num_rounds": 1, "workflows": workflows},
    )
    (server / "app_server/FL_global_model.pt").write_bytes(b"weights")
    scores = {
        f"site-{site}": {"SRV_FL_global_model.pt": {"test_accuracy": accuracy}}
        for site, accuracy in ACCURACIES.items()
    }
    _write(server / "cross_site_val/cross_val_results.json", scores)
    for site, filters in ((1, [FILTER]), (2, [])):
        app = tmp_path / f"site-{site}/simulate_job/app_site-{site}"
        _write(app / "config/config_fed_client.json", {"SIGMA0": 0.3, "filters": filters})
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    report = measure_leakage(images, images, images.mean(0), ImageSimMetric())
    folder = tmp_path / "site-1/simulate_job/app_site-1"
    write_leakage(folder, "site-1", 0, report, reconstructions=images, originals=images)
    return tmp_path


def test_the_record_is_what_figures_read(
    workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_record.main(["--workspace", str(workspace)]) == 0
    record = json.loads((workspace / "run.json").read_text())
    assert (record["sigma0"], record["n_clients"], record["num_rounds"]) == (0.3, 2, 1)
    assert record["test_accuracy"] == pytest.approx(0.8)
    assert [entry["site"] for entry in record["leakage"]] == ["site-1"]
    assert record["leakage"][0]["rdlv"] > 0
    said = capsys.readouterr().out
    assert "0.750" in said
    assert "sigma0 0.3, test accuracy of the global model: 0.800" in said
    (run,) = read_runs(workspace)
    assert run.sigma0 == 0.3
    assert run.test_accuracy == pytest.approx(0.8)


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("server/simulate_job/app_server/FL_global_model.pt", "no round was completed"),
        ("server/simulate_job/cross_site_val/cross_val_results.json", "cross-site validation"),
        ("site-1/simulate_job/app_site-1/leakage_round0.json", "site-1 should have measured"),
    ],
)
def test_a_run_that_broke_is_not_taken_for_a_finished_one(
    workspace: Path, missing: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (workspace / missing).unlink()
    assert run_record.main(["--workspace", str(workspace)]) == 2
    assert message in capsys.readouterr().err
    assert not (workspace / "run.json").exists()


def test_an_older_job_gets_what_it_lacks_and_stays_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    job = tmp_path / "job"
    _write(job / "meta.json", {"deploy_map": {"server": ["server"], "site-9": ["site-9"]}})
    server = {"components": [{"id": "persistor", "args": {"model": MONAI}}]}
    _write(job / "server/config/config_fed_server.json", server)
    _write(job / "site-9/config/config_fed_client.json", {})
    before = sorted(job.rglob("*"))
    names = prepare_job.prepare_job(job, 1, tmp_path / "copy")
    assert names == ["site-9"]
    assert sorted(job.rglob("*")) == before
    copied = json.loads((tmp_path / "copy/server/config/config_fed_server.json").read_text())
    model = copied["components"][0]["args"]["model"]
    assert model["path"] == GLOBAL_MODEL
    assert model["args"] == {"model_name": "resnet18", "num_class": 2, "image_size": 224}
    assert all((tmp_path / "copy" / app / "custom").is_dir() for app in ("server", "site-9"))
    with pytest.raises(InputError, match="N_CLIENTS 2: the job is for 1 clients"):
        prepare_job.prepare_job(job, 2, tmp_path / "other")


def test_the_published_archive_can_be_read_by_others(workspace: Path) -> None:
    (path,) = workspace.rglob("*.npz")
    with np.load(path, allow_pickle=False) as archive:
        assert archive["img_recon_sim_reduced"].shape[0] == 2
