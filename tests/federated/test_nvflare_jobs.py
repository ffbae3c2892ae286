"""Job folders: what the command writes, and what it refuses."""

from __future__ import annotations

import argparse
import configparser
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from core.data.list_files import Sample, write_datalist
from core.errors import InputError
from federated.experiment import federation, run_results, simulator
from federated.experiment.cli import create_job_config, recipe, simulate
from federated.experiment.cli.job_flags import federation_settings
from federated.experiment.recipe import Experiment
from federated.phantoms.data_set import BATCH_SIZES, CACHE_VARIABLE


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path_factory.getbasetemp() / "phantom_cache"
    monkeypatch.setenv(CACHE_VARIABLE, str(folder))


def create(output: Path, *flags: str) -> int:
    return create_job_config.main(["--scale", "0.02", "--output", str(output), *flags])


def load(*parts: str | Path) -> dict[str, Any]:
    return json.loads(Path(*parts).read_text())


@pytest.fixture
def own_images(tmp_path: Path) -> Path:
    """Two clients' images as a user has them: 20 px, decathlon lists."""
    root = tmp_path / "images"
    root.mkdir()
    rng = np.random.default_rng(0)
    samples = []
    for i in range(4):
        Image.fromarray(rng.integers(0, 255, (20, 20), np.uint8)).save(root / f"{i}.png")
        samples.append(Sample(f"{i}.png", i % 2))
    sections = {"training": samples[:2], "validation": samples[2:], "testing": samples[2:]}
    for client in (1, 2, 9):
        write_datalist(root / f"mine_{client}.json", sections)
    return root


def test_one_client_is_the_one_with_a_single_image(tmp_path: Path) -> None:
    assert create(tmp_path / "job", "--num_rounds", "3", "--sigma0", "0.5") == 0
    meta = load(tmp_path, "job/meta.json")
    assert meta["deploy_map"] == {"server": ["server"], "site-9": ["site-9"]}
    server = load(tmp_path, "job/server/config/config_fed_server.json")
    assert (server["num_rounds"], server["min_clients"]) == (3, 1)
    client = load(tmp_path, "job/site-9/config/config_fed_client.json")
    assert (client["SIGMA0"], client["BATCH_SIZE"]) == (0.5, 1)
    assert Path(client["DATASET_JSON"]).is_file()
    assert Path(client["PRIOR_FILE"]).is_file()
    assert (tmp_path / "job/site-9/config/config_inversion.json").is_file()
    assert (tmp_path / "job/site-9/custom").is_dir()
    assert (tmp_path / "job/server/custom").is_dir()


def test_nine_clients_have_the_published_batches(tmp_path: Path) -> None:
    assert create(tmp_path / "job", "--n_clients", "9", "--invert_clients", "1,5,9") == 0
    sizes, inverted = {}, []
    for number in range(1, 10):
        app = tmp_path / "job" / f"site-{number}" / "config"
        client = load(app, "config_fed_client.json")
        sizes[number] = client["BATCH_SIZE"]
        filters = [f["path"] for f in client["task_result_filters"][0]["filters"]]
        assert filters[0] == "federated.GaussianPrivacy"
        if (app / "config_inversion.json").exists():
            inverted.append(number)
            assert filters[1] == "federated.RelativeDataLeakageValueFilter"
    assert sizes == BATCH_SIZES
    assert inverted == [1, 5, 9]


def test_own_images_and_the_prior_is_the_mean_of_validation_images(
    tmp_path: Path, own_images: Path
) -> None:
    flags = ["--data_root", str(own_images), "--dataset_json", "mine_", "--image_size", "20"]
    job = tmp_path / "job"
    assert create(job, *flags, "--n_clients", "2", "--batch_sizes", "1,2") == 0
    client = load(job, "site-1/config/config_fed_client.json")
    assert client["DATASET_JSON"] == str((own_images / "mine_1.json").resolve())
    pictures = [np.asarray(Image.open(own_images / f"{i}.png"), float) for i in (2, 3)]
    prior = np.asarray(Image.open(job / "prior.png").convert("L"), float)
    np.testing.assert_allclose(prior, np.mean(pictures, 0), atol=1)


def test_the_published_command_line_works(tmp_path: Path, own_images: Path) -> None:
    prior = tmp_path / "prior.jpg"
    Image.new("L", (20, 20), 90).save(prior)
    finished = subprocess.run(
        [
            *(sys.executable, "-m", "nvflare_gradinv.utils.create_job_config"),
            *("--app_folder", "./jobs/app_template", "--n_clients", "1", "--num_rounds", "3"),
            f"--data_root={own_images}",
            f"--dataset_json={own_images}/mine_",
            f"--prior_file={prior}",
            *("--output", str(tmp_path / "job")),
        ],
        cwd=simulator.REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, finished.stderr
    inversion = load(tmp_path, "job/site-9/config/config_inversion.json")
    assert inversion["img_prior"] == str(prior)


def own_template(folder: Path) -> Path:
    """The template app with an inversion and a site of one's own."""
    shutil.copytree(simulator.REPOSITORY / "jobs" / "app_template", folder)
    config = folder / "client" / "config"
    inversion = load(config / "config_inversion.json")
    inversion |= {"iterations": 40000, "resolution": 48, "tv_l2": 5e-4, "method": "published"}
    (config / "config_inversion.json").write_text(json.dumps(inversion))
    for name in ("config_fed_client_inv.json", "config_fed_client_noinv.json"):
        client = load(config / name) | {"IMAGE_SIZE": 48, "LR": 0.05}
        (config / name).write_text(json.dumps(client))
    return folder


def test_a_given_template_keeps_what_no_flag_says(tmp_path: Path) -> None:
    template = own_template(tmp_path / "template")
    assert create(tmp_path / "job", "--app_folder", str(template)) == 0
    found = load(tmp_path, "job/site-9/config/config_inversion.json")
    written = load(template, "client/config/config_inversion.json")
    assert {**found, "img_prior": ""} == written
    client = load(tmp_path, "job/site-9/config/config_fed_client.json")
    assert (client["IMAGE_SIZE"], client["LR"]) == (48, 0.05)
    server = load(tmp_path, "job/server/config/config_fed_server.json")
    assert server["IMAGE_SIZE"] == 48


def test_a_flag_counts_over_the_template_even_with_its_default(tmp_path: Path) -> None:
    template = own_template(tmp_path / "template")
    flags = ["--app_folder", str(template), "--iterations", "300", "--image_size", "32"]
    assert create(tmp_path / "job", *flags) == 0
    found = load(tmp_path, "job/site-9/config/config_inversion.json")
    assert (found["iterations"], found["resolution"]) == (300, 32)
    assert (found["tv_l2"], found["method"]) == (5e-4, "published")
    assert load(tmp_path, "job/site-9/config/config_fed_client.json")["IMAGE_SIZE"] == 32


def test_a_template_with_a_value_of_another_kind_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    template = own_template(tmp_path / "template")
    path = template / "client" / "config" / "config_inversion.json"
    path.write_text(json.dumps(load(path) | {"iterations": "many"}))
    assert create(tmp_path / "job", "--app_folder", str(template)) == 2
    assert "its iterations is 'many'; give --iterations" in capsys.readouterr().err


def test_the_default_threshold_is_said_to_withhold(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    create(tmp_path / "job")
    assert "--rdlv_threshold 100 lets them pass" in capsys.readouterr().out
    create(tmp_path / "job", "--rdlv_threshold", "1")
    said = capsys.readouterr().out
    assert "lets them pass" not in said
    assert "the job folder that is there is replaced" in said


def test_a_former_run_is_removed_only_when_that_is_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[Path] = []
    monkeypatch.setattr(simulate, "require_nvflare", lambda: None)
    monkeypatch.setattr(simulate, "simulate", lambda job, folder: started.append(folder))
    create(tmp_path / "job")
    runs = tmp_path / "runs"
    former = runs / "1clients_exp1" / "run.json"
    former.parent.mkdir(parents=True)
    former.write_text("{}")
    words = ["1", str(tmp_path / "job"), "exp1", "--workspaces", str(runs)]
    assert simulate.main(words) == 2
    assert "1clients_exp1 holds a former run: give another EXP_NAME" in capsys.readouterr().err
    assert former.exists()
    # Nothing is left behind by the run that only pretends to be one.
    assert simulate.main([*words, "--overwrite"]) == 1
    assert "removing the former run in" in capsys.readouterr().out
    assert started == [former.parent]
    assert not former.exists()


def test_what_the_set_up_installs_is_what_the_package_knows() -> None:
    lines = (simulator.REPOSITORY / "requirements.txt").read_text().splitlines()
    (line,) = [line for line in lines if line and not line.startswith("#")]
    setup = configparser.ConfigParser()
    setup.read(simulator.REPOSITORY / "setup.cfg")
    known = set(setup["options.extras_require"])
    extras = set(line.removeprefix("-e .[").removesuffix("]").split(","))
    assert extras <= known
    assert known - extras == {"docs", "flower", "test", "lint"}


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--n_clients", "0"], "--n_clients"),
        (["--n_clients", "10"], "--batch_sizes|--n_clients"),
        (["--n_clients", "2", "--batch_sizes", "4"], "--batch_sizes"),
        (["--batch_sizes", "four"], "--batch_sizes"),
        (["--batch_sizes", "0"], "--batch_sizes"),
        (["--n_clients", "2", "--invert_clients", "1,7"], "--invert_clients"),
        (["--num_rounds", "0"], "--num_rounds"),
        (["--frequency", "0"], "--frequency"),
        (["--sigma0", "-1"], "--sigma0"),
        (["--sigma0", "nan"], "--sigma0"),
        (["--lr", "0"], "--lr"),
        (["--min_clients", "2"], "--min_clients"),
        (["--model_name", "nothing"], "--model_name"),
        (["--method", "nothing"], "--method"),
        (["--iterations", "0"], "--iterations"),
        (["--scale", "0"], "--scale"),
        (["--data_root", "nowhere"], "--data_root"),
        (["--prior_file", "nowhere.png"], "--prior_file"),
        (["--dataset_json_prefix", "nowhere_"], "--dataset_json_prefix"),
        (["--app_folder", "nowhere"], "--app_folder"),
    ],
)
def test_impossible_flags_are_named(
    tmp_path: Path, flags: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert create(tmp_path / "job", *flags) == 2
    message = capsys.readouterr().err
    assert any(name in message for name in named.split("|"))
    assert message.count("\n") == 1
    assert not (tmp_path / "job").exists()


def test_only_a_job_folder_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "precious.txt").write_text("mine")
    assert create(tmp_path) == 2
    assert (tmp_path / "precious.txt").read_text() == "mine"
    assert create(tmp_path / "job") == 0
    assert create(tmp_path / "job", "--num_rounds", "7") == 0
    assert load(tmp_path, "job/server/config/config_fed_server.json")["num_rounds"] == 7


@pytest.mark.parametrize(
    ("n_clients", "n_gpus", "expected"),
    [(9, 0, []), (1, 1, ["--gpu", "0"]), (5, 2, ["--gpu", "0,1,0,1,0"])],
)
def test_clients_are_spread_over_gpus(n_clients: int, n_gpus: int, expected: list[str]) -> None:
    assert simulator.gpu_arguments(n_clients, n_gpus) == expected


@pytest.mark.parametrize("n_gpus", [0, 2])
def test_the_simulator_is_told_of_its_clients_and_gpus(tmp_path: Path, n_gpus: int) -> None:
    """As NVFlare's own parser reads it; a GPU is not needed to construct the line."""
    parser = pytest.importorskip(
        "nvflare.private.fed.app.simulator.simulator",
        reason="needs pip install 'gradinvbench[federated]'",
    ).define_simulator_parser
    sites = ["site-1", "site-2", "site-9"]
    command = simulator.simulator_command(tmp_path / "job", tmp_path / "run", sites, n_gpus)
    given = argparse.ArgumentParser()
    parser(given)
    read = given.parse_args(command[3:])
    assert (read.job_folder, read.workspace) == (str(tmp_path / "job"), str(tmp_path / "run"))
    assert (read.clients.split(","), read.threads) == (sites, 3)
    assert read.gpu == ("0,1,0" if n_gpus else None)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["1", "nowhere", "exp"], "nowhere"),
        (["2", "job", "exp"], "2 clients"),
        (["1", "job", "../exp"], "../exp"),
    ],
)
def test_a_run_that_cannot_start_says_why(
    tmp_path: Path, arguments: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    create(tmp_path / "job")
    n_clients, job, name = arguments
    status = simulate.main(
        [n_clients, str(tmp_path / job), name, "--workspaces", str(tmp_path / "runs")]
    )
    assert status == 2
    assert named in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_a_workspace_with_spaces_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("nvflare", reason="needs pip install 'gradinvbench[federated]'")
    create(tmp_path / "job")
    folder = tmp_path / "my runs"
    assert simulate.main(["1", str(tmp_path / "job"), "exp", "--workspaces", str(folder)]) == 2
    assert "without spaces" in capsys.readouterr().err


def test_a_run_without_results_is_a_failure(tmp_path: Path) -> None:
    create(tmp_path / "job", "--num_rounds", "3", "--frequency", "2")
    missing = run_results.missing_results(simulator.read_job(tmp_path / "job"), tmp_path)
    assert len(missing) == 4
    assert "FL_global_model.pt" in missing[0]
    assert [text[-7:] for text in missing[2:]] == ["round 0", "round 2"]


def test_old_jobs_are_completed_in_a_copy(tmp_path: Path) -> None:
    create(tmp_path / "old")
    (tmp_path / "old/server/custom/README.txt").unlink()
    (tmp_path / "old/server/custom").rmdir()
    path = tmp_path / "old/server/config/config_fed_server.json"
    server = load(path)
    network = {"model_name": "resnet18", "num_classes": 2, "bias": True, "pretrained": True}
    server["components"][0]["args"]["model"] = {"path": simulator.MONAI_NETWORK, "args": network}
    path.write_text(json.dumps(server))
    before = path.read_text()
    simulator.prepare(simulator.read_job(tmp_path / "old"), tmp_path / "new")
    found = load(tmp_path, "new/server/config/config_fed_server.json")
    model = found["components"][0]["args"]["model"]
    assert model["path"] == "federated.flare.global_model.global_model"
    assert model["args"] == {"model_name": "resnet18", "num_class": 2, "image_size": 224}
    assert any((tmp_path / "new/server/custom").iterdir())
    assert path.read_text() == before


def test_the_recipe_refuses_before_it_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert recipe.main(["--sigma0", "0", "-1", "--workspace", str(tmp_path / "w")]) == 2
    assert "--sigma0 -1" in capsys.readouterr().err


def test_the_recipe_exports_a_job_that_the_simulator_reads(tmp_path: Path) -> None:
    pytest.importorskip("nvflare", reason="needs pip install 'gradinvbench[federated]'")
    flags = ["--n_clients", "2", "--invert_clients", "2", "--num_rounds", "4", "--scale", "0.02"]
    args = recipe.build_parser().parse_args([*flags, "--workspace", str(tmp_path)])
    settings = federation_settings(args)
    clients, data = federation.check_settings(settings, args.sigma0, args.workspace)
    experiment = Experiment(settings, clients, data, 0.3)
    job = simulator.read_job(experiment.export(tmp_path / "jobs" / "one"))
    assert job.sites == ["site-1", "site-2"]
    assert (job.num_rounds, job.evaluates) == (4, False)
    assert run_results.measured_rounds(job, "site-2") == [0, 1, 2, 3]
    assert run_results.measured_rounds(job, "site-1") == []
    # The script alone; the packages are installed at the sites.
    copied = {path.name for path in tmp_path.rglob("custom/**/*.py")}
    assert copied == {"client.py"}


OWN_MODULE = """
import torch

def build():
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(256, 3))

def data():
    inputs, targets = torch.rand(6, 1, 16, 16), torch.rand(6, 3).round()
    return (inputs[:2], targets[:2]), (inputs[2:], targets[2:])
"""
OWN_FLAGS = ["--model", "job_site:build", "--loss", "binary-cross-entropy", "--data",
             "job_site:data", "--optimizer", "adamw eps=1e-6"]  # fmt: skip


@pytest.fixture
def own_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with the sites' own module, in which the user stands."""
    (tmp_path / "job_site.py").write_text(OWN_MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield tmp_path
    sys.modules.pop("job_site", None)


def test_a_job_takes_the_sites_own_client_along(own_code: Path) -> None:
    assert create(own_code / "job", "--n_clients", "2", "--invert_clients", "1", *OWN_FLAGS) == 0
    for app in ("server", "site-1", "site-2"):
        assert (own_code / "job" / app / "custom" / "job_site.py").read_text() == OWN_MODULE
    client = load(own_code, "job/site-1/config/config_fed_client.json")
    assert [client[name] for name in ("MODEL", "LOSS", "DATA", "OPTIMIZER")] == OWN_FLAGS[1::2]
    assert (client["DATA_ROOT"], client["DATASET_JSON"], client["PRIOR_FILE"]) == ("", "", "")
    assert load(own_code, "job/server/config/config_fed_server.json")["MODEL"] == "job_site:build"
    assert load(own_code, "job/site-1/config/config_inversion.json")["img_prior"] == ""


def test_the_recipe_takes_the_sites_own_client_along(own_code: Path) -> None:
    pytest.importorskip("nvflare", reason="needs pip install 'gradinvbench[federated]'")
    args = recipe.build_parser().parse_args([*OWN_FLAGS, "--workspace", str(own_code / "w")])
    settings = federation_settings(args)
    clients, data = federation.check_settings(settings, [0.0], args.workspace)
    folder = Experiment(settings, clients, data, 0.0).export(own_code / "jobs" / "one")
    copied = {str(p.relative_to(folder)) for p in folder.rglob("custom/*.py")}
    assert {"app_server/custom/job_site.py", "app_site-9/custom/job_site.py"} <= copied
    config = load(folder, "app_site-9/config/config_fed_client.json")
    described = next(c["args"] for c in config["components"] if c["id"] == "learner")
    assert (described["model"], described["optimizer"]) == ("job_site:build", "adamw eps=1e-6")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data", "job_site:data"], "your own samples need your own --model"),
        (["--model", "job_site:bild"], "job_site has no bild; did you mean build"),
        (["--loss", "hinge"], "hinge"),
        (["--optimizer", "adamw epochs=2"], "the others are arguments of their own"),
    ],
)
def test_an_own_client_that_no_site_could_build_is_named(
    own_code: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    assert create(own_code / "job", *flags) == 2
    assert message in capsys.readouterr().err
    assert not (own_code / "job").exists()


def test_a_template_without_an_own_client_says_so(
    own_code: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    template = own_template(own_code / "template")
    path = template / "client/config/config_fed_client_inv.json"
    path.write_text(json.dumps({k: v for k, v in load(path).items() if k != "MODEL"}))
    assert create(own_code / "job", "--app_folder", str(template), *OWN_FLAGS) == 2
    assert "have no variable MODEL" in capsys.readouterr().err


def test_components_without_nvflare_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    import federated

    for name in [name for name in sys.modules if name.startswith("federated.flare.gaussian")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "nvflare", None)
    for name in [name for name in sys.modules if name.startswith("nvflare.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, "federated.flare.withholding", raising=False)
    with pytest.raises(InputError, match=r"gradinvbench\[federated\]"):
        _ = federated.GaussianPrivacy
    assert federated.ImageSimMetric("ssim").names == ["ssim"]
