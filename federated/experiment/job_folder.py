"""Command: a job folder for NVFlare from the template app.

python -m federated.create_job_config --n_clients 1 --num_rounds 3 --output jobs/cxr_1client
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.errors import InputError, exit_status

TEMPLATE = Path(__file__).resolve().parents[2] / "jobs" / "app_template"
HIGH_RISK_CLIENT = 9
CUSTOM_NOTE = (
    "NVFlare loads classes from outside its own package only for apps that have this folder.\n"
    "Python files put here can be imported by the app.\n"
)


def build_parser() -> argparse.ArgumentParser:
    """The command's flags."""
    parser = argparse.ArgumentParser(
        prog="python -m federated.create_job_config",
        description="Fill the template app in for a number of clients.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--app_folder", type=Path, default=TEMPLATE, help="folder with the template app")
    add("--output", type=Path, required=True, help="job folder to write; replaced if it is one")
    add("--sigma0", type=float, default=0.0, help="noise of GaussianPrivacy")
    add_job_flags(parser)
    return parser


def add_job_flags(parser: argparse.ArgumentParser) -> None:
    """Flags that say what federation to run."""
    add = parser.add_argument
    add("--n_clients", type=int, default=1, help="1 takes the high-risk client 9 alone")
    add("--num_rounds", type=int, default=100, help="rounds of the federation")
    add("--min_clients", type=int, help="updates that a round needs (default: all clients')")
    add("--invert_clients", default="9", help="clients that measure leakage, such as 1,5,9")
    add("--batch_sizes", help="one per client, such as 4,4,4,4,8,8,8,8,1 (default: published)")
    data = parser.add_argument_group("data")
    data.add_argument("--data_root", type=Path, help="folder of images (default: phantoms)")
    data.add_argument(
        "--dataset_json_prefix", "--dataset_json", help="lists are PREFIX + client + .json"
    )
    data.add_argument("--prior_file", type=Path, help="public image to start from and compare with")
    data.add_argument("--scale", type=float, default=1.0, help="share of the phantoms' sizes")
    data.add_argument("--image_size", type=int, default=32, help="side in pixels")
    data.add_argument("--num_class", type=int, default=2, help="number of classes")
    training = parser.add_argument_group("training")
    training.add_argument("--model_name", default="cnn", help="network (resnet18 for 224 px, GPU)")
    training.add_argument("--lr", type=float, default=0.01, help="local learning rate")
    training.add_argument("--local_epochs", type=int, default=1, help="local epochs per round")
    training.add_argument("--seed", type=int, default=0, help="of first weights and image order")
    leakage = parser.add_argument_group("leakage")
    leakage.add_argument("--rdlv_threshold", type=float, default=1.0, help="withhold above it")
    leakage.add_argument("--frequency", type=int, default=1, help="measure every so many rounds")
    leakage.add_argument("--method", default="full", help="full, bn, published, or an attack")
    leakage.add_argument("--iterations", type=int, default=300, help="of the inversion")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    args = build_parser().parse_args(arguments)
    return exit_status(lambda: _run(args))


def _run(args: argparse.Namespace) -> None:
    clients = create_job(args)
    inverted = [client.name for client in clients if client.invert]
    print(
        f"{args.output}: {len(clients)} clients ({', '.join(c.name for c in clients)}), "
        f"{args.num_rounds} rounds, sigma0 {args.sigma0:g}; "
        f"leakage is measured at {', '.join(inverted) or 'no client'}"
    )


@dataclass(frozen=True)
class Client:
    """One client of the job.

    Attributes:
        number: In file names and in `site-NUMBER`.
        batch_size: Images per local step.
        invert: Whether it measures leakage.
    """

    number: int
    batch_size: int
    invert: bool

    @property
    def name(self) -> str:
        """As the federation calls it."""
        return f"site-{self.number}"


@dataclass(frozen=True)
class JobData:
    """Where the job's images are; absolute paths, since clients run elsewhere.

    Attributes:
        root: Folder of images.
        prefix: Of the lists.
        prior: The public image.
    """

    root: Path
    prefix: str
    prior: Path

    def datalist(self, client: Client) -> Path:
        """A client's list."""
        return Path(f"{self.prefix}{client.number}.json")


def create_job(args: argparse.Namespace) -> list[Client]:
    """Write the job folder.

    Args:
        args: The command's flags.

    Returns:
        The job's clients.

    Raises:
        InputError: Names the flag.
    """
    template = _Template(args.app_folder)
    _check_output(args.output)
    clients, data = check_flags(args, [args.sigma0], args.output)
    if args.output.exists():
        shutil.rmtree(args.output)
    _write_job(args, clients, template, data)
    return clients


def check_flags(
    args: argparse.Namespace, noise: Sequence[float], folder: Path
) -> tuple[list[Client], JobData]:
    """Check all that a federation is made from, before any long work.

    Args:
        args: See `add_job_flags`.
        noise: Levels of `GaussianPrivacy`.
        folder: Where a missing prior image is written.

    Returns:
        Clients, and the data with the prior image in its place.

    Raises:
        InputError: Names the flag.
    """
    clients = job_clients(args)
    _check_numbers(args, clients, noise)
    _check_network(args)
    data = job_data(args, clients, folder)
    _check_inversion(inversion(args, data))
    return clients, data


def job_clients(args: argparse.Namespace) -> list[Client]:
    """The clients that the flags ask for.

    Raises:
        InputError: Numbers that do not fit together.
    """
    from federated.phantoms.data_set import BATCH_SIZES

    if args.n_clients < 1:
        raise InputError(f"--n_clients {args.n_clients}: must be at least 1")
    one = args.n_clients == 1
    numbers = [HIGH_RISK_CLIENT] if one else list(range(1, args.n_clients + 1))
    inverted = numbers_of("--invert_clients", args.invert_clients)
    if args.batch_sizes is None:
        sizes = [BATCH_SIZES.get(number, 4) for number in numbers]
    else:
        sizes = numbers_of("--batch_sizes", args.batch_sizes)
    if len(sizes) != len(numbers):
        raise InputError(
            f"--batch_sizes {args.batch_sizes}: {len(sizes)} sizes for {len(numbers)} clients"
        )
    if args.invert_clients != "9" and not set(inverted) <= set(numbers):
        raise InputError(
            f"--invert_clients {args.invert_clients}: the clients are "
            f"{', '.join(map(str, numbers))}"
        )
    return [Client(n, size, n in inverted) for n, size in zip(numbers, sizes, strict=True)]


def numbers_of(flag: str, text: str) -> list[int]:
    """Positive whole numbers between commas.

    Raises:
        InputError: Names the flag.
    """
    try:
        numbers = [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise InputError(f"{flag} {text}: must be whole numbers between commas") from None
    if any(number < 1 for number in numbers):
        raise InputError(f"{flag} {text}: numbers must be at least 1")
    return numbers


def job_data(args: argparse.Namespace, clients: Sequence[Client], folder: Path) -> JobData:
    """The images the flags name; phantoms, drawn now if need be, without `--data_root`.

    Args:
        args: See `add_job_flags`.
        clients: Whose lists must exist.
        folder: Where the prior image will be written if there is none.

    Raises:
        InputError: A folder, list or image is missing.
    """
    from federated.phantoms.data_set import LIST_PREFIX, PRIOR_FILE, SITE_SIZES, cached_phantoms

    if args.data_root is None:
        if len(clients) > len(SITE_SIZES):
            raise InputError(
                f"--n_clients {len(clients)}: the phantoms have {len(SITE_SIZES)} sites"
            )
        root = cached_phantoms(scale=args.scale, size=max(16, args.image_size)).resolve()
    elif args.data_root.is_dir():
        root = args.data_root.resolve()
    else:
        raise InputError(f"--data_root: there is no folder {args.data_root}")
    prefix = _prefix(args.dataset_json_prefix or LIST_PREFIX, root, clients[0])
    prior = args.prior_file or (root / PRIOR_FILE if args.data_root is None else None)
    if prior is not None and not prior.is_file():
        raise InputError(f"--prior_file: there is no image {prior}")
    data = JobData(root, prefix, (prior or folder / PRIOR_FILE).resolve())
    for client in clients:
        if not data.datalist(client).is_file():
            raise InputError(f"--dataset_json_prefix: there is no list {data.datalist(client)}")
    return data


def _prefix(given: str, root: Path, client: Client) -> str:
    """As given, or within the data folder."""
    for candidate in (Path(given), root / given):
        if Path(f"{candidate}{client.number}.json").is_file():
            return str(candidate.resolve())
    return str(Path(given).resolve())


def _check_numbers(
    args: argparse.Namespace, clients: Sequence[Client], noise: Sequence[float]
) -> None:
    for name in ("num_rounds", "frequency", "local_epochs"):
        if getattr(args, name) < 1:
            raise InputError(f"--{name} {getattr(args, name)}: must be at least 1")
    for level in noise:
        if not 0 <= level < float("inf"):
            raise InputError(f"--sigma0 {level}: must be a number not below 0")
    if not args.lr > 0:
        raise InputError(f"--lr {args.lr}: must be positive")
    if args.min_clients is not None and not 1 <= args.min_clients <= len(clients):
        raise InputError(f"--min_clients {args.min_clients}: there are {len(clients)} clients")


def _check_output(output: Path) -> None:
    """Only a job folder is replaced."""
    is_job = (output / "meta.json").is_file()
    if output.exists() and not is_job and (not output.is_dir() or any(output.iterdir())):
        raise InputError(f"--output: {output} exists and is no job folder")


def _check_network(args: argparse.Namespace) -> None:
    from federated.flare.networks import network_spec

    try:
        network_spec(args.model_name, args.num_class, args.image_size)
    except InputError as error:
        raise InputError(f"--{error}") from None


def _check_inversion(content: dict[str, Any]) -> None:
    from audit.settings import settings_from_dict

    try:
        settings_from_dict(content)
    except InputError as error:
        raise InputError(f"--{error}") from None


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


def _load(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"--app_folder: there is no file {path}") from None
    except ValueError as error:
        raise InputError(f"--app_folder: {path} is not JSON ({error})") from None


def _write_job(
    args: argparse.Namespace, clients: Sequence[Client], template: _Template, data: JobData
) -> None:
    write_prior(args, clients[0], data)
    least = args.min_clients or len(clients)
    names = [client.name for client in clients]
    deploy = {"server": ["server"], **{name: [name] for name in names}}
    _write(args.output / "meta.json", {**template.meta, "deploy_map": deploy, "min_clients": least})
    values = {**_shared(args), "min_clients": least, "num_rounds": args.num_rounds}
    server = fill(template.server, values)
    _write_app(args.output / "server", {"config_fed_server.json": server})
    for client in clients:
        files = {"config_fed_client.json": _client(args, client, template, data)}
        if client.invert:
            files["config_inversion.json"] = {**template.inversion, **inversion(args, data)}
        _write_app(args.output / client.name, files)


def _shared(args: argparse.Namespace) -> dict[str, Any]:
    return {
        "MODEL_NAME": args.model_name,
        "NUM_CLASS": args.num_class,
        "IMAGE_SIZE": args.image_size,
        "SEED": args.seed,
    }


def _client(
    args: argparse.Namespace, client: Client, template: _Template, data: JobData
) -> dict[str, Any]:
    values = {
        **_shared(args),
        "DATA_ROOT": str(data.root),
        "DATASET_JSON": str(data.datalist(client)),
        "PRIOR_FILE": str(data.prior),
        "BATCH_SIZE": client.batch_size,
        "SIGMA0": args.sigma0,
        "LR": args.lr,
        "LOCAL_EPOCHS": args.local_epochs,
        "FREQUENCY": args.frequency,
        "RDLV_THRESHOLD": args.rdlv_threshold,
    }
    return fill(template.inverting if client.invert else template.plain, values)


def inversion(args: argparse.Namespace, data: JobData) -> dict[str, Any]:
    """What the flags say of `config_inversion.json`."""
    return {
        "img_prior": str(data.prior),
        "method": args.method,
        "iterations": args.iterations,
        "model_name": args.model_name,
        "resolution": args.image_size,
    }


def fill(template: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """A configuration with its variables set; those that it does not have are left out.

    Args:
        template: Variables are top-level keys that the rest refers to as `{KEY}`.
        values: By variable.
    """
    return {key: values.get(key, old) for key, old in template.items()}


def _write_app(folder: Path, files: dict[str, dict[str, Any]]) -> None:
    from core.storage import write_text

    for name, content in files.items():
        _write(folder / "config" / name, content)
    write_text(folder / "custom" / "README.txt", CUSTOM_NOTE)


def _write(path: Path, content: dict[str, Any]) -> None:
    from core.storage import write_text

    # Keys in the template's order: variables stand before what refers to them.
    write_text(path, json.dumps(content, indent=4) + "\n")


def write_prior(args: argparse.Namespace, client: Client, data: JobData) -> None:
    """Write the mean of the public validation images, never a training image, if need be.

    Raises:
        InputError: There is no prior image and no validation image.
    """
    from torchvision.utils import save_image

    from core.data.list_files import load_datalist
    from core.data.listed_images import ImageListDataset

    if data.prior.is_file():
        return
    samples = load_datalist(data.datalist(client), "validation")
    if not samples:
        raise InputError(f"--prior_file: needed, {data.datalist(client)} has no validation images")
    mean = ImageListDataset(data.root, samples, args.image_size).images().mean(0)
    data.prior.parent.mkdir(parents=True, exist_ok=True)
    save_image(mean, data.prior)
