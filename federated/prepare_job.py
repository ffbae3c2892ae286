"""Command: a copy of a job folder that this machine's NVFlare can run.

python -m federated.prepare_job --job jobs/cxr_9clients --n_clients 9 --output workspace/job

Jobs written for older versions run as they are. What they lack is added to the copy: the
`custom` folders without which NVFlare loads no class from outside its own package, and,
where MONAI is not installed, a global model that does not need it.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from federated.create_job_config import CUSTOM_NOTE
from training.errors import InputError, exit_status

EVERYONE = "@ALL"
GLOBAL_MODEL = "federated.global_model.global_model"
# What the published learner assumes where a job says nothing.
PUBLISHED_IMAGE_SIZE = 224


def build_parser() -> argparse.ArgumentParser:
    """The command's flags."""
    parser = argparse.ArgumentParser(
        prog="python -m federated.prepare_job",
        description="Copy a job so that NVFlare can run it here; prints its clients' names.",
    )
    parser.add_argument("--job", type=Path, required=True, help="job folder")
    parser.add_argument("--n_clients", type=int, required=True, help="clients that will run it")
    parser.add_argument("--output", type=Path, required=True, help="the copy; must not exist")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    args = build_parser().parse_args(arguments)
    return exit_status(lambda: _run(args))


def _run(args: argparse.Namespace) -> None:
    print(",".join(prepare_job(args.job, args.n_clients, args.output)))


def prepare_job(job: Path, n_clients: int, output: Path) -> list[str]:
    """Copy a job and add what it lacks.

    Args:
        job: The job folder.
        n_clients: Clients that will run it.
        output: The copy.

    Returns:
        The clients' names.

    Raises:
        InputError: No job folder, another number of clients, or the copy exists.
    """
    meta = _load(job / "meta.json", "--job")
    clients = _clients(meta, n_clients)
    if output.exists():
        raise InputError(f"--output: {output} exists")
    shutil.copytree(job, output)
    for app in sorted(path.parent for path in output.glob("*/config") if path.is_dir()):
        note = app / "custom" / "README.txt"
        note.parent.mkdir(exist_ok=True)
        note.write_text(CUSTOM_NOTE, encoding="utf-8")
    for config in sorted(output.glob("*/config/config_fed_server.json")):
        _replace_monai(config)
    return clients


def _clients(meta: dict[str, Any], n_clients: int) -> list[str]:
    """The names in the job's deployment map."""
    sites = [site for app in meta.get("deploy_map", {}).values() for site in app]
    if EVERYONE in sites:
        return [f"site-{number}" for number in range(1, n_clients + 1)]
    names = [site for site in sites if site != "server"]
    if len(names) != n_clients:
        raise InputError(
            f"N_CLIENTS {n_clients}: the job is for {len(names)} clients ({', '.join(names)})"
        )
    return names


def _replace_monai(path: Path) -> None:
    """Where MONAI is missing, the same network from torchvision."""
    if importlib.util.find_spec("monai") is not None:
        return
    config = _load(path, "--job")
    changed = False
    for component in config.get("components", []):
        model = component.get("args", {}).get("model")
        if isinstance(model, dict) and str(model.get("path", "")).startswith("monai."):
            component["args"]["model"] = {"path": GLOBAL_MODEL, "args": _network(model)}
            changed = True
    if changed:
        path.write_text(json.dumps(config, indent=4) + "\n", encoding="utf-8")


def _network(model: dict[str, Any]) -> dict[str, Any]:
    """Arguments of our global model for MONAI's; its weights are not pretrained."""
    args = model.get("args", {})
    return {
        "model_name": args.get("model_name", "resnet18"),
        "num_class": args.get("num_classes", 2),
        "image_size": PUBLISHED_IMAGE_SIZE,
    }


def _load(path: Path, flag: str) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{flag}: there is no file {path}") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{flag}: {path} cannot be read as JSON ({error})") from None
    if not isinstance(content, dict):
        raise InputError(f"{flag}: {path} is not a JSON object")
    return content


if __name__ == "__main__":
    sys.exit(main())
