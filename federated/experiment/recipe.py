"""Command and recipe: the experiment in Python, for people who do not want JSON.

python -m federated.recipe --n_clients 9 --num_rounds 3 --sigma0 0 0.3 1 3 --workspace DIR

Every noise level is a run of its own, DIR/sigma0_LEVEL, with a `run.json` that the figures
read. The sites run `federated.flare.client` on NVFlare's Client API under FedAvg.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import federated.flare
from core.errors import exit_status
from federated.experiment import simulate
from federated.experiment.create_job_config import (
    Client,
    JobData,
    add_job_flags,
    check_flags,
    inversion,
    write_prior,
)

if TYPE_CHECKING:
    from nvflare.job_config.api import FedJob

INVERSION_FILE = "config_inversion.json"
TRAIN = ["train"]


def build_parser() -> argparse.ArgumentParser:
    """The command's flags."""
    parser = argparse.ArgumentParser(
        prog="python -m federated.recipe",
        description="Run a federation for every noise level and record what it leaks.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--workspace", type=Path, default=simulate.WORKSPACES / "recipe", help="folder for runs")
    add("--sigma0", type=float, nargs="+", default=[0.0], help="noise levels of GaussianPrivacy")
    add_job_flags(parser)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status: 1 if a run left something out."""
    args = build_parser().parse_args(arguments)
    missing: list[str] = []
    status = exit_status(lambda: missing.extend(_run(args)))
    for what in missing:
        print(f"error: {what}", file=sys.stderr)
    return status or int(bool(missing))


def _run(args: argparse.Namespace) -> list[str]:
    clients, data = check_flags(args, args.sigma0, args.workspace)
    simulate.require_nvflare()
    write_prior(args, clients[0], data)
    missing = []
    for sigma0 in args.sigma0:
        experiment = Experiment(args, clients, data, sigma0)
        workspace = args.workspace.resolve() / f"sigma0_{sigma0:g}"
        if experiment.is_done(workspace):
            print(f"{workspace}: done before")
        else:
            missing += experiment.run(workspace)
    return missing


@dataclass(frozen=True)
class Experiment:
    """One federation at one noise level.

    Attributes:
        args: The command's flags.
        clients: Of the federation.
        data: Their images.
        sigma0: Noise of `GaussianPrivacy`.
    """

    args: argparse.Namespace
    clients: Sequence[Client]
    data: JobData
    sigma0: float

    def settings(self) -> dict[str, Any]:
        """All that determines the run, as plain values."""
        given = {key: value for key, value in vars(self.args).items() if key != "workspace"}
        plain = {k: str(v) if isinstance(v, Path) else v for k, v in given.items()}
        return {**plain, "sigma0": self.sigma0, "clients": [asdict(c) for c in self.clients]}

    def is_done(self, workspace: Path) -> bool:
        """Whether the workspace holds this very run."""
        from federated.experiment.runs import RUN_FILE

        path = workspace / RUN_FILE
        return path.is_file() and simulate.read_json(path).get("settings") == self.settings()

    def run(self, workspace: Path) -> list[str]:
        """Simulate it and write its record; returns what is missing."""
        folder = self.export(workspace.parent / "jobs" / workspace.name)
        job = simulate.read_job(folder)
        simulate.simulate(job, workspace)
        missing = simulate.missing_results(job, workspace)
        if not missing:
            accuracy = self.test_accuracy(
                simulate.app_folder(workspace, "server") / simulate.FINAL_MODEL
            )
            simulate.write_run(
                job, workspace, sigma0=self.sigma0, test_accuracy=accuracy, settings=self.settings()
            )
        simulate.print_results(workspace)
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
                content = {"save_path": "gradinv", **inversion(self.args, self.data)}
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
            "model_name": self.args.model_name,
            "num_class": self.args.num_class,
            "image_size": self.args.image_size,
            "seed": self.args.seed,
        }
        model = PTModel({"path": "federated.flare.global_model.global_model", "args": network})
        persistor = job.to_server(model, id="persistor")["persistor_id"]
        rounds = self.args.num_rounds
        controller = FedAvg(
            num_clients=len(self.clients), num_rounds=rounds, persistor_id=persistor
        )
        job.to_server(controller)
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

        leakage = RelativeDataLeakageValueFilter(
            data_root=str(self.data.root),
            dataset_json=str(self.data.datalist(client)),
            prior_filename=str(self.data.prior),
            frequency=self.args.frequency,
            rdlv_threshold=self.args.rdlv_threshold,
            save_best_matches=True,
        )
        job.to(SiteDescription(**self._training(client)), client.name, id="learner")
        job.to(GradInversionInverter(), client.name, id="grad_inverter")
        job.to(ImageSimMetric(), client.name, id="sim_metric")
        job.to(leakage, client.name, **sent)

    def _training(self, client: Client) -> dict[str, Any]:
        """Arguments of a site's script."""
        return {
            "data_root": str(self.data.root),
            "dataset_json": str(self.data.datalist(client)),
            "model_name": self.args.model_name,
            "num_class": self.args.num_class,
            "image_size": self.args.image_size,
            "batch_size": client.batch_size,
            "aggregation_epochs": self.args.local_epochs,
            "lr": self.args.lr,
            "seed": self.args.seed,
        }

    def _site(self, client: Client) -> Any:
        from federated.flare.site_training import SiteSettings

        return SiteSettings(**self._training(client))
