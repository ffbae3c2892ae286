"""Whole federations in NVFlare's simulator, judged by what they leave behind."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("nvflare", reason="needs pip install 'gradinvbench[federated]'")

from audit.show.store import read_audit
from federated.experiment import run_results, simulator
from federated.experiment.cli import recipe
from federated.flare.global_model import global_model
from federated.phantoms.data_set import CACHE_VARIABLE
from tests.federation import edit, make_job, run, started, wait_for

# Five processes each: they take turns, and waiting counts.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path_factory.getbasetemp() / "phantom_cache"
    monkeypatch.setenv(CACHE_VARIABLE, str(folder))


@pytest.fixture(autouse=True)
def _one_at_a_time() -> Iterator[None]:
    with open(Path(tempfile.gettempdir()) / "gradinvbench-simulator.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def same_as_at_the_start(model: dict[str, Any]) -> bool:
    start = global_model().state_dict()
    named = dict(global_model().named_parameters())
    return all(torch.equal(torch.as_tensor(model[n]), start[n]) for n in named)


def published_style(job: Path) -> None:
    """Turn a job into one as published: class paths, short names, no `custom` folders."""
    for app in job.iterdir():
        if (app / "custom").is_dir():
            shutil.rmtree(app / "custom")
    client = job / "site-9" / "config" / "config_fed_client.json"
    client.write_text(client.read_text().replace('"federated.', '"nvflare_gradinv.'))

    def shorten(server: dict[str, Any]) -> None:
        for component in server["components"][1:4] + server["workflows"]:
            component["name"] = component.pop("path").rsplit(".", 1)[1]
        server["workflows"][1]["name"] = "CrossSiteModelEval"
        server["workflows"][1]["args"]["submit_model_timeout"] = 600

    edit(job / "server" / "config" / "config_fed_server.json", shorten)


def test_a_published_job_of_one_client_leaks_its_image(tmp_path: Path) -> None:
    job = make_job(tmp_path / "job", "--iterations", "150")
    published_style(job)
    finished = run(job, tmp_path / "runs", 1)
    assert finished.status == 0, finished.output[-3000:]
    for number in (0, 1):
        record = finished.record("site-9", number)
        assert record["decision"] == "pass"
        assert record["rdlv"] > 0.1
        assert record["attack"]["method"] == "full"
    content = json.loads((finished.workspace / "run.json").read_text())
    assert (content["sigma0"], content["num_rounds"]) == (0, 2)
    assert 0 <= content["test_accuracy"] <= 1
    # Global, best global and the site's own model, all validated at the site.
    scores = run_results.cross_validation(finished.workspace)["site-9"]
    assert set(scores) >= {"SRV_FL_global_model.pt", "site-9"}
    assert scores["site-9"]["train_auc"] is None
    assert not same_as_at_the_start(finished.global_model())


AUDITED = """
from core.data.given import GivenData
from core.data.list_files import load_datalist
from core.data.listed_images import ImageListDataset
from federated.flare.images import chest_spec
from federated.flare.networks import network_spec


def build():
    return network_spec("cnn", 2, 32).build()


def section(name):
    listed = ImageListDataset({root!r}, load_datalist({datalist!r}, name), 32)
    return listed.images(), listed.labels()


def members_and_others():
    spec = chest_spec(32)
    return GivenData(section("training"), section("validation"), mean=spec.mean, std=spec.std)
"""


def audit_too(site: Path) -> None:
    """Let a site of a job also audit its updates, and send them whatever is found."""

    def add(client: dict[str, Any]) -> None:
        args = {"model": "audited:build", "data": "audited:members_and_others",
                "local": "sgd lr=0.01 batch-size=4", "iterations": 5, "plants": 1,
                "frequency": 2, "record_only": True}  # fmt: skip
        tap = {"path": "federated.flare.taps.GlobalModelTap", "args": {}}
        client["task_data_filters"] = [{"tasks": ["train"], "filters": [tap]}]
        filters = client["task_result_filters"][0]["filters"]
        filters.append({"path": "federated.AuditFilter", "args": args})
        code = AUDITED.format(root=client["DATA_ROOT"], datalist=client["DATASET_JSON"])
        (site / "custom" / "audited.py").write_text(code)

    edit(site / "config" / "config_fed_client.json", add)


def test_a_site_whose_check_breaks_sends_nothing_and_the_others_go_on(tmp_path: Path) -> None:
    flags = ["--n_clients", "2", "--invert_clients", "1,2", "--sigma0", "0.1"]
    job = make_job(tmp_path / "job", *flags)
    edit(job / "site-1/config/config_inversion.json", lambda c: c.update(img_prior="nowhere.png"))
    audit_too(job / "site-2")
    finished = run(job, tmp_path / "runs", 2)
    assert finished.status == 0, finished.output[-3000:]
    folder = run_results.app_folder(finished.workspace, "site-2")
    assert read_audit(folder / "audit_round0.json").local.steps == 2
    for number in (0, 1):
        broken, passed = finished.record("site-1", number), finished.record("site-2", number)
        assert broken["decision"] == "withhold"
        assert "nowhere.png" in broken["reason"]
        assert passed["decision"] == "pass"
    assert "withheld" in finished.output
    assert not same_as_at_the_start(finished.global_model())


def test_a_recipe_whose_only_site_withholds_keeps_its_global_model(tmp_path: Path) -> None:
    flags = ["--scale", "0.02", "--num_rounds", "2", "--iterations", "5", "--sigma0", "0.2"]
    arguments = [*flags, "--rdlv_threshold", "-100", "--workspace", str(tmp_path)]
    assert recipe.main(arguments) == 0
    workspace = tmp_path / "sigma0_0.2"
    records = [
        json.loads((run_results.app_folder(workspace, "site-9") / name).read_text())
        for name in ("leakage_round0.json", "leakage_round1.json")
    ]
    assert [record["decision"] for record in records] == ["withhold"] * 2
    assert all("above the threshold" in record["reason"] for record in records)
    from core.storage import load_checkpoint

    path = run_results.app_folder(workspace, "server") / run_results.FINAL_MODEL
    assert same_as_at_the_start(load_checkpoint(path)["model"])
    assert json.loads((workspace / "run.json").read_text())["sigma0"] == 0.2


def test_a_killed_site_does_not_stop_the_others(tmp_path: Path) -> None:
    job = make_job(tmp_path / "job", "--n_clients", "2", "--min_clients", "1", "--num_rounds", "2")
    edit(
        job / "server/config/config_fed_server.json",
        lambda c: c["workflows"][1]["args"].update(validation_timeout=30),
    )
    folder = tmp_path / "runs"
    workspace = folder / "2clients_exp"
    with started(job, folder, 2) as (process, log):
        victim = run_results.app_folder(workspace, "site-2") / "local_model.pt"
        wait_for(victim.is_file)
        for pid in simulator.descendants(process.pid):
            # Its worker alone: the simulator's arguments name all clients in one.
            if "site-2" in Path(f"/proc/{pid}/cmdline").read_text().split("\0"):
                os.kill(pid, signal.SIGKILL)
        process.wait(200)
    output = log.read_text()
    assert process.returncode == 1, output[-3000:]
    assert "site-2 left no cross-site validation" in output
    assert (run_results.app_folder(workspace, "server") / run_results.FINAL_MODEL).is_file()
    assert "site-1" in run_results.cross_validation(workspace)
