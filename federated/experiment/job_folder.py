"""A job folder for NVFlare, filled in from the template app."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.errors import InputError
from core.named_objects import is_object_name
from core.reading import read_json_object
from federated.experiment.federation import (
    Client,
    JobData,
    check_settings,
    inversion,
    write_prior,
)
from federated.experiment.settings import FederationSettings

TEMPLATE = Path(__file__).resolve().parents[2] / "jobs" / "app_template"
CUSTOM_NOTE = (
    "NVFlare loads classes from outside its own package only for apps that have this folder.\n"
    "Python files put here can be imported by the app.\n"
)
# Settings by name, and what a template's client configuration and inversion call them.
VARIABLES = {
    "model_name": "MODEL_NAME",
    "num_class": "NUM_CLASS",
    "image_size": "IMAGE_SIZE",
    "seed": "SEED",
    "lr": "LR",
    "local_epochs": "LOCAL_EPOCHS",
    "frequency": "FREQUENCY",
    "rdlv_threshold": "RDLV_THRESHOLD",
}
INVERSION_KEYS = {
    "method": "method",
    "iterations": "iterations",
    "model_name": "model_name",
    "image_size": "resolution",
}


def create_job(
    settings: FederationSettings,
    output: Path,
    *,
    sigma0: float = 0.0,
    template: Path = TEMPLATE,
    given: Collection[str] | None = None,
) -> list[Client]:
    """Write the job folder.

    Args:
        settings: The federation.
        output: The job folder; a job folder that is there is replaced.
        sigma0: Noise of `GaussianPrivacy`.
        template: Folder with the template app.
        given: Names of the settings that count; of the others, the template's own values do,
            where it states some. None: all count.

    Returns:
        The job's clients.

    Raises:
        InputError: Names the flag.
    """
    files = _Template(template)
    _check_output(output)
    if given is not None:
        settings = files.completed(settings, given)
    files.check_variables(settings.own)
    clients, data = check_settings(settings, [sigma0], output)
    if output.exists():
        shutil.rmtree(output)
    _write_job(_Plan(settings, clients, files, data, sigma0, given), output)
    return clients


def _check_output(output: Path) -> None:
    """Only a job folder is replaced."""
    is_job = (output / "meta.json").is_file()
    if output.exists() and not is_job and (not output.is_dir() or any(output.iterdir())):
        raise InputError(f"--output: {output} exists and is no job folder")


class _Template:
    """The files of a template app.

    Args:
        folder: Holds `server/config`, `client/config` and `meta.json`.
    """

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise InputError(f"--app_folder: there is no folder {folder}")
        self.server = _load(folder / "server/config/config_fed_server.json")
        self.inverting = _load(folder / "client/config/config_fed_client_inv.json")
        self.plain = _load(folder / "client/config/config_fed_client_noinv.json")
        self.inversion = _load(folder / "client/config/config_inversion.json")
        self.meta = _load(folder / "meta.json")

    def check_variables(self, names: Collection[str]) -> None:
        """Refuse settings that a template of the user's own has no variables for."""
        for name in names:
            if name.upper() not in self.inverting or name.upper() not in self.plain:
                raise InputError(
                    f"--{name}: the client configurations of --app_folder have no variable "
                    f"{name.upper()}"
                )

    def completed(self, settings: FederationSettings, given: Collection[str]) -> FederationSettings:
        """The settings, with the template's own values for those that were not given."""
        own = {name: self.inversion.get(key) for name, key in INVERSION_KEYS.items()}
        for name, key in VARIABLES.items():
            own[name] = self.inverting.get(key, own.get(name))
        fields = {field.name: field for field in dataclasses.fields(FederationSettings)}
        stated = {
            name: _number_like(value, fields[name].default, name)
            for name, value in own.items()
            if value is not None and name not in given
        }
        return dataclasses.replace(settings, **stated)


def _number_like(value: Any, default: Any, name: str) -> Any:
    """A template's value, if it is of the kind that the setting has."""
    kinds = (int, float) if isinstance(default, float) else type(default)
    if isinstance(value, bool) or not isinstance(value, kinds):
        raise InputError(f"--app_folder: its {name} is {value!r}; give --{name}")
    return value


def _load(path: Path) -> dict[str, Any]:
    return read_json_object(path, "--app_folder")


@dataclass(frozen=True)
class _Plan:
    """All that the job's files are made from."""

    settings: FederationSettings
    clients: Sequence[Client]
    template: _Template
    data: JobData
    sigma0: float
    given: Collection[str] | None

    def inversion(self) -> dict[str, Any]:
        """`config_inversion.json`: the template's, changed by the settings that count."""
        stated = inversion(self.settings, self.data)
        if self.given is not None:
            ignored = {key for name, key in INVERSION_KEYS.items() if name not in self.given}
            stated = {key: value for key, value in stated.items() if key not in ignored}
        return {**self.template.inversion, **stated}


def _write_job(plan: _Plan, output: Path) -> None:
    settings, clients, template = plan.settings, plan.clients, plan.template
    write_prior(settings, clients[0], plan.data)
    least = settings.min_clients or len(clients)
    names = [client.name for client in clients]
    deploy = {"server": ["server"], **{name: [name] for name in names}}
    _write(output / "meta.json", {**template.meta, "deploy_map": deploy, "min_clients": least})
    values = {**_shared(settings), "min_clients": least, "num_rounds": settings.num_rounds}
    server = fill(template.server, values)
    code = own_files(settings)
    _write_app(output / "server", {"config_fed_server.json": server}, code)
    for client in clients:
        files = {"config_fed_client.json": _client(plan, client)}
        if client.invert:
            files["config_inversion.json"] = plan.inversion()
        _write_app(output / client.name, files, code)


def _shared(settings: FederationSettings) -> dict[str, Any]:
    return {
        **{name.upper(): value for name, value in settings.own.items()},
        "MODEL_NAME": settings.model_name,
        "NUM_CLASS": settings.num_class,
        "IMAGE_SIZE": settings.image_size,
        "SEED": settings.seed,
    }


def _client(plan: _Plan, client: Client) -> dict[str, Any]:
    settings, data = plan.settings, plan.data
    values = {
        **_shared(settings),
        "DATA_ROOT": str(data.root or ""),
        "DATASET_JSON": str(data.datalist(client) or ""),
        "PRIOR_FILE": str(data.prior or ""),
        "BATCH_SIZE": client.batch_size,
        "SIGMA0": plan.sigma0,
        "LR": settings.lr,
        "LOCAL_EPOCHS": settings.local_epochs,
        "FREQUENCY": settings.frequency,
        "RDLV_THRESHOLD": settings.rdlv_threshold,
    }
    return fill(plan.template.inverting if client.invert else plan.template.plain, values)


def fill(template: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """A configuration with its variables set; those that it does not have are left out.

    Args:
        template: Variables are top-level keys that the rest refers to as `{KEY}`.
        values: The value of each variable of the template.
    """
    return {key: values.get(key, old) for key, old in template.items()}


def own_files(settings: FederationSettings) -> list[Path]:
    """The files of the sites' own code that lie in the current folder.

    What lies elsewhere on the Python path is installed at the sites.
    """
    named = [settings.own.get(name, "") for name in ("model", "loss", "data")]
    modules = sorted({name.partition(":")[0] for name in named if is_object_name(name)})
    return [path for path in (Path(f"{module}.py") for module in modules) if path.is_file()]


def _write_app(folder: Path, files: dict[str, dict[str, Any]], code: Sequence[Path]) -> None:
    from core.storage import write_text

    for name, content in files.items():
        _write(folder / "config" / name, content)
    write_text(folder / "custom" / "README.txt", CUSTOM_NOTE)
    for path in code:
        shutil.copy(path, folder / "custom" / path.name)


def _write(path: Path, content: dict[str, Any]) -> None:
    from core.storage import write_text

    # Keys in the template's order: variables stand before what refers to them.
    write_text(path, json.dumps(content, indent=4) + "\n")
