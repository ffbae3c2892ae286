"""A job folder in NVFlare's simulator: read, made ready, run, ended."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.errors import InputError
from core.reading import read_json_object

WORKSPACES = Path("results") / "federated"
REPOSITORY = Path(__file__).resolve().parents[2]
MONAI_NETWORK = "monai.networks.nets.torchvision_fc.TorchVisionFCModel"


@dataclass(frozen=True)
class Job:
    """A job folder.

    Attributes:
        folder: Folder of the job.
        apps: App folder by site, the server's included.
        num_rounds: Rounds of the federation; None where the job does not say.
        evaluates: Whether models are validated across sites at the end.
    """

    folder: Path
    apps: Mapping[str, Path]
    num_rounds: int | None
    evaluates: bool

    @property
    def sites(self) -> list[str]:
        """The clients."""
        return [site for site in self.apps if site != "server"]

    def client(self, site: str) -> dict[str, Any]:
        """A client's configuration."""
        return read_json(self.apps[site] / "config" / "config_fed_client.json")


def read_job(folder: Path) -> Job:
    """Read a job folder.

    Raises:
        InputError: It is none.
    """
    if not (folder / "meta.json").is_file():
        raise InputError(f"{folder} is no job folder: there is no meta.json")
    deploy = read_json(folder / "meta.json").get("deploy_map", {})
    apps = {site: folder / app for app, sites in deploy.items() for site in sites}
    if "server" not in apps or len(apps) < 2:
        raise InputError(f"{folder}/meta.json: deploy_map must name the server and clients")
    for app in apps.values():
        if not (app / "config").is_dir():
            raise InputError(f"{folder}/meta.json names the app {app.name}, which is not there")
    server = read_json(apps["server"] / "config" / "config_fed_server.json")
    return Job(folder, apps, _rounds(server), _evaluates(server))


def _rounds(server: Mapping[str, Any]) -> int | None:
    for workflow in server.get("workflows", []):
        found = value_of(workflow.get("args", {}).get("num_rounds"), server)
        if isinstance(found, int):
            return found
    return None


def _evaluates(server: Mapping[str, Any]) -> bool:
    workflows = server.get("workflows", [])
    return any("Eval" in str(w.get("path") or w.get("name")) for w in workflows)


def value_of(value: Any, content: Mapping[str, Any]) -> Any:
    """A value of a configuration, or that of the variable it names as `{KEY}`."""
    return content.get(value.strip("{}")) if isinstance(value, str) else value


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        InputError: Names the file.
    """
    return read_json_object(path)


def require_nvflare() -> None:
    """Refuse to go on without NVFlare.

    Raises:
        InputError: With what to install.
    """
    from importlib.util import find_spec

    if find_spec("nvflare") is None:
        raise InputError(
            "running a federation needs NVFlare: pip install 'gradinvbench[federated]'"
        )


def simulate(job: Job, workspace: Path) -> None:
    """Run a job in the simulator; its output goes to the terminal and `simulator.log`.

    Args:
        job: What to run; its folder stays as it is.
        workspace: Folder of this run, which is not there yet.

    Raises:
        InputError: A path with spaces, at which NVFlare's simulator fails, or a former run.
    """
    if any(character.isspace() for character in str(workspace)):
        raise InputError(f"workspace {workspace}: NVFlare's simulator needs a path without spaces")
    if workspace.exists():
        raise InputError(f"workspace {workspace} holds a former run; remove it first")
    prepared = prepare(job, workspace / "job")
    command = simulator_command(prepared, workspace / "run", job.sites, count_gpus())
    with open(workspace / "simulator.log", "wb") as log:
        process = subprocess.Popen(
            command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        # `timeout` and schedulers end a command so; its clients have to end with it.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            assert process.stdout is not None
            for line in process.stdout:
                log.write(line)
                sys.stdout.buffer.write(line)
                sys.stdout.buffer.flush()
            process.wait()
        except BaseException:
            stop(process)
            raise
        finally:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def simulator_command(prepared: Path, run: Path, sites: Sequence[str], n_gpus: int) -> list[str]:
    """The simulator's command line.

    Args:
        prepared: The job's folder, see `prepare`.
        run: Folder that the simulator works in.
        sites: Names of the clients; each has a thread of its own, fewer make it crawl.
        n_gpus: GPUs to spread them over; 0 for the CPU.
    """
    return [
        *(sys.executable, "-m", "nvflare.private.fed.app.simulator.simulator", str(prepared)),
        *("-w", str(run), "-c", ",".join(sites), "-t", str(len(sites))),
        *gpu_arguments(len(sites), n_gpus),
    ]


def stop(process: subprocess.Popen[bytes]) -> None:
    """End the simulator with its clients, which are process groups of their own."""
    children = descendants(process.pid)
    process.terminate()
    for pid in children:
        try:
            os.kill(pid, signal.SIGTERM)
        except ProcessLookupError:
            continue
    process.wait()


def descendants(pid: int) -> list[int]:
    """Processes below a process, where the system lists them (Linux)."""
    found: list[int] = []
    for path in Path("/proc").glob(f"{pid}/task/*/children"):
        for child in map(int, path.read_text().split()):
            found += [child, *descendants(child)]
    return found


def prepare(job: Job, target: Path) -> Path:
    """A copy of a job folder that this NVFlare can run.

    NVFlare 2.9 loads classes from outside its own package only for apps with a `custom`
    folder, which older job folders lack; and MONAI's wrapper of torchvision's networks,
    which they name at the server, becomes the network itself.

    Args:
        job: The job that runs.
        target: The copy's folder.

    Returns:
        `target`.
    """
    from core.storage import write_text
    from federated.experiment.job_folder import CUSTOM_NOTE

    shutil.copytree(job.folder, target)
    for app in {path.name for path in job.apps.values()}:
        custom = target / app / "custom"
        if not custom.is_dir() or not any(custom.iterdir()):
            write_text(custom / "README.txt", CUSTOM_NOTE)
    path = target / job.apps["server"].name / "config" / "config_fed_server.json"
    write_text(path, json.dumps(without_monai(read_json(path)), indent=4) + "\n")
    return target


def without_monai(value: Any) -> Any:
    """A configuration in which torchvision's networks stand for MONAI's wrappers of them."""
    if isinstance(value, list):
        return [without_monai(item) for item in value]
    if not isinstance(value, dict):
        return value
    if value.get("path") != MONAI_NETWORK:
        return {key: without_monai(item) for key, item in value.items()}
    given = value.get("args", {})
    names = {"model_name": given.get("model_name", "resnet18")}
    sizes = {"num_class": given.get("num_classes", 1), "image_size": 224}
    return {"path": "federated.flare.global_model.global_model", "args": {**names, **sizes}}


def count_gpus() -> int:
    """GPUs that NVFlare's simulator may use."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") == "" or shutil.which("nvidia-smi") is None:
        return 0
    found = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True)
    return (
        0 if found.returncode else sum(line.startswith("GPU") for line in found.stdout.split("\n"))
    )


def gpu_arguments(n_clients: int, n_gpus: int) -> list[str]:
    """Simulator flags that spread clients over GPUs evenly; none without GPUs."""
    if not n_gpus:
        return []
    return ["--gpu", ",".join(str(client % n_gpus) for client in range(n_clients))]


def environment() -> dict[str, str]:
    """For the simulator: this repository importable, one thread per client, determinism.

    Clients that each take every core spend their time waiting for each other.
    """
    paths = [str(REPOSITORY), os.environ.get("PYTHONPATH", "")]
    return {
        "OMP_NUM_THREADS": "1",
        "PYTHONUNBUFFERED": "1",
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
    }
