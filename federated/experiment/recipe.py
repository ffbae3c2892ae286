"""The experiment as NVFlare's recipe API builds it, at several levels of noise."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import federated.flare
from core.escaping import printable
from federated.experiment.federation import (
    Client,
    JobData,
    check_settings,
    inversion,
    write_prior,
)
from federated.experiment.job_folder import own_files
from federated.experiment.run_results import (
    FINAL_MODEL,
    app_folder,
    missing_results,
    print_results,
    write_run,
)
from federated.experiment.settings import OWN, FederationSettings
from federated.experiment.simulator import read_job, read_json, require_nvflare, simulate

if TYPE_CHECKING:
    from nvflare.job_config.api import FedJob

INVERSION_FILE = "config_inversion.json"
TRAIN = ["train"]


def run_experiments(
    settings: FederationSettings, noise: Sequence[float], workspace: Path
) -> list[str]:
    """Run one federation per level of noise, but for those that are done.

    Args:
        settings: The federation.
        noise: Levels of `GaussianPrivacy`.
        workspace: Folder of the runs.

    Returns:
        What the runs should have left and did not.

    Raises:
        InputError: Names the flag.
    """
    clients, data = check_settings(settings, noise, workspace)
    require_nvflare()
    write_prior(settings, clients[0], data)
    missing = []
    for sigma0 in noise:
        experiment = Experiment(settings, clients, data, sigma0)
        folder = workspace.resolve() / f"sigma0_{sigma0:g}"
        if experiment.is_done(folder):
            print(printable(f"{folder}: done before"))
        else:
            missing += experiment.run(folder)
    return missing


@dataclass(frozen=True)
class Experiment:
    """One federation at one noise level.

    Attributes:
        settings: What was asked for.
        clients: The clients of the federation.
        data: The clients' images.
        sigma0: Noise of `GaussianPrivacy`.
    """

    settings: FederationSettings
    clients: Sequence[Client]
    data: JobData
    sigma0: float

    def record(self) -> dict[str, Any]:
        """All that determines the run, as plain values."""
        given = asdict(self.settings)
        # What is not said of an own client is left out: runs from before it count on.
        said = {k: v for k, v in given.items() if k not in OWN or v}
        plain = {k: str(v) if isinstance(v, Path) else v for k, v in said.items()}
        return {**plain, "sigma0": self.sigma0, "clients": [asdict(c) for c in self.clients]}

    def is_done(self, workspace: Path) -> bool:
        """Whether the workspace holds this very run."""
        from federated.experiment.runs import RUN_FILE

        path = workspace / RUN_FILE
        return path.is_file() and read_json(path).get("settings") == self.record()

    def run(self, workspace: Path) -> list[str]:
        """Simulate it and write its record; returns what is missing."""
        folder = self.export(workspace.parent / "jobs" / workspace.name)
        job = read_job(folder)
        if workspace.exists():
            what = f"removing {workspace}: it is not finished, or of other settings"
            print(printable(what), flush=True)
            shutil.rmtree(workspace)
        simulate(job, workspace)
        missing = missing_results(job, workspace)
        if not missing:
            accuracy = self.test_accuracy(app_folder(workspace, "server") / FINAL_MODEL)
            write_run(
                job, workspace, sigma0=self.sigma0, test_accuracy=accuracy, settings=self.record()
            )
        print_results(workspace)
        return missing

    def test_accuracy(self, checkpoint: Path) -> float | None:
        """Of the final global model on the test images; None if there are none."""
        from core.storage import load_checkpoint
        from federated.flare.site_training import SiteTraining

        site = SiteTraining(self._site(self.clients[0]))
        if not len(site.test_images):
            return None
        site.load({k: v.numpy() for k, v in load_checkpoint(checkpoint)["model"].items()})
        return site.evaluate(site.test_images).accuracy

    def export(self, folder: Path) -> Path:
        """Write the job as a folder that `start_fl_sim.sh` runs too.

        Returns:
            The job's folder.
        """
        if folder.exists():
            shutil.rmtree(folder)
        job = self.build()
        job.export_job(str(folder.parent))
        (folder.parent / job.name).rename(folder)
        for client in self.clients:
            if client.invert:
                path = folder / f"app_{client.name}" / "config" / INVERSION_FILE
                content = {"save_path": "gradinv", **inversion(self.settings, self.data)}
                path.write_text(json.dumps(content, indent=4) + "\n", encoding="utf-8")
        return folder

    def build(self) -> FedJob:
        """The federation as an NVFlare job."""
        from nvflare.app_common.workflows.fedavg import FedAvg
        from nvflare.app_opt.pt.job_config.base_fed_job import BaseFedJob
        from nvflare.app_opt.pt.job_config.model import PTModel

        job = BaseFedJob(name="cxr_recipe", min_clients=len(self.clients))
        # Installed at every site, and not to be copied into the job piece by piece.
        job.set_app_packages(["federated", "audit", "attack", "gradients", "training", "core"])
        network = {
            "model_name": self.settings.model_name,
            "num_class": self.settings.num_class,
            "image_size": self.settings.image_size,
            "seed": self.settings.seed,
            **({"model": self.settings.model} if self.settings.model else {}),
        }
        model = PTModel({"path": "federated.flare.global_model.global_model", "args": network})
        persistor = job.to_server(model, id="persistor")["persistor_id"]
        rounds = self.settings.num_rounds
        controller = FedAvg(
            num_clients=len(self.clients), num_rounds=rounds, persistor_id=persistor
        )
        job.to_server(controller)
        for path in own_files(self.settings):
            for place in ("server", *(client.name for client in self.clients)):
                job.to(str(path), place)
        for client in self.clients:
            self._add_client(job, client)
        return job

    def _add_client(self, job: FedJob, client: Client) -> None:
        from nvflare.job_config.defs import FilterType
        from nvflare.job_config.script_runner import ScriptRunner

        from federated.flare.gaussian_privacy import GaussianPrivacy
        from federated.flare.taps import GlobalModelTap

        flags = [f"--{name} {shlex.quote(str(v))}" for name, v in self._training(client).items()]
        script = Path(federated.flare.__file__).with_name("client.py")
        job.to(ScriptRunner(script=str(script), script_args=" ".join(flags)), client.name)
        sent = {"filter_type": FilterType.TASK_RESULT, "tasks": TRAIN}
        job.to(GlobalModelTap(), client.name, filter_type=FilterType.TASK_DATA, tasks=TRAIN)
        job.to(GaussianPrivacy(sigma0=self.sigma0), client.name, **sent)
        if client.invert:
            self._add_measurement(job, client, sent)

    def _add_measurement(self, job: FedJob, client: Client, sent: dict[str, Any]) -> None:
        from audit.similarity import ImageSimMetric
        from federated.flare.inverter import GradInversionInverter
        from federated.flare.rdlv_filter import RelativeDataLeakageValueFilter
        from federated.flare.site_description import SiteDescription

        place = self._data(client)
        leakage = RelativeDataLeakageValueFilter(
            data_root=place.get("data_root"),
            dataset_json=place.get("dataset_json"),
            prior_filename=None if self.data.prior is None else str(self.data.prior),
            frequency=self.settings.frequency,
            rdlv_threshold=self.settings.rdlv_threshold,
            save_best_matches=True,
            data=self.settings.data,
        )
        job.to(SiteDescription(**self._training(client)), client.name, id="learner")
        job.to(GradInversionInverter(), client.name, id="grad_inverter")
        job.to(ImageSimMetric(), client.name, id="sim_metric")
        job.to(leakage, client.name, **sent)

    def _data(self, client: Client) -> dict[str, str]:
        """A client's list; nothing where it brings its own samples."""
        if self.data.root is None:
            return {}
        return {
            "data_root": str(self.data.root),
            "dataset_json": str(self.data.datalist(client)),
        }

    def _training(self, client: Client) -> dict[str, Any]:
        """Arguments of a site's script."""
        return {
            **self._data(client),
            "model_name": self.settings.model_name,
            "num_class": self.settings.num_class,
            "image_size": self.settings.image_size,
            "batch_size": client.batch_size,
            "aggregation_epochs": self.settings.local_epochs,
            "lr": self.settings.lr,
            "seed": self.settings.seed,
            **self.settings.own,
        }

    def _site(self, client: Client) -> Any:
        from federated.flare.site_training import SiteSettings

        return SiteSettings(**{"data_root": None, "dataset_json": None, **self._training(client)})
