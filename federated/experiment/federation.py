"""The clients of a federation, their images, and all that is checked before it starts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.errors import InputError
from federated.experiment.settings import HIGH_RISK_CLIENT, FederationSettings


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
        root: Folder of images; None where sites bring their own samples.
        prefix: Prefix of the names of the data lists; likewise.
        prior: The public image; None for none.
    """

    root: Path | None = None
    prefix: str | None = None
    prior: Path | None = None

    def datalist(self, client: Client) -> Path | None:
        """A client's list."""
        return None if self.prefix is None else Path(f"{self.prefix}{client.number}.json")


def check_settings(
    settings: FederationSettings, noise: Sequence[float], folder: Path
) -> tuple[list[Client], JobData]:
    """Check all that a federation is made from, before any long work.

    Args:
        settings: What was asked for.
        noise: Levels of `GaussianPrivacy`.
        folder: Folder that receives the prior image if none was given.

    Returns:
        Clients, and the data with the prior image in its place.

    Raises:
        InputError: Names the flag.
    """
    clients = job_clients(settings)
    _check_numbers(settings, clients, noise)
    _check_network(settings)
    data = own_job_data(settings) if settings.data else job_data(settings, clients, folder)
    _check_inversion(inversion(settings, data))
    return clients, data


def job_clients(settings: FederationSettings) -> list[Client]:
    """The clients that the settings ask for.

    Raises:
        InputError: Numbers that do not fit together.
    """
    from federated.phantoms.data_set import BATCH_SIZES

    if settings.n_clients < 1:
        raise InputError(f"--n_clients {settings.n_clients}: must be at least 1")
    one = settings.n_clients == 1
    numbers = [HIGH_RISK_CLIENT] if one else list(range(1, settings.n_clients + 1))
    inverted = numbers_of("--invert_clients", settings.invert_clients)
    if settings.batch_sizes is None:
        sizes = [BATCH_SIZES.get(number, 4) for number in numbers]
    else:
        sizes = numbers_of("--batch_sizes", settings.batch_sizes)
    if len(sizes) != len(numbers):
        raise InputError(
            f"--batch_sizes {settings.batch_sizes}: {len(sizes)} sizes for {len(numbers)} clients"
        )
    if settings.invert_clients != FederationSettings.invert_clients and not set(inverted) <= set(
        numbers
    ):
        raise InputError(
            f"--invert_clients {settings.invert_clients}: the clients are "
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


def own_job_data(settings: FederationSettings) -> JobData:
    """What is said about sites that bring their own samples.

    Raises:
        InputError: There is no such image.
    """
    prior = settings.prior_file
    if prior is not None and not prior.is_file():
        raise InputError(f"--prior_file: there is no image {prior}")
    return JobData(prior=None if prior is None else prior.resolve())


def job_data(settings: FederationSettings, clients: Sequence[Client], folder: Path) -> JobData:
    """The images the settings name; phantoms, drawn now if need be, without `--data_root`.

    Args:
        settings: What was asked for.
        clients: Whose lists must exist.
        folder: Folder that receives the prior image if none was given.

    Raises:
        InputError: A folder, list or image is missing.
    """
    from federated.phantoms.data_set import LIST_PREFIX, PRIOR_FILE, SITE_SIZES, cached_phantoms

    if settings.data_root is None:
        if len(clients) > len(SITE_SIZES):
            raise InputError(
                f"--n_clients {len(clients)}: the phantoms have {len(SITE_SIZES)} sites"
            )
        root = cached_phantoms(scale=settings.scale, size=max(16, settings.image_size)).resolve()
    elif settings.data_root.is_dir():
        root = settings.data_root.resolve()
    else:
        raise InputError(f"--data_root: there is no folder {settings.data_root}")
    prefix = _prefix(settings.dataset_json_prefix or LIST_PREFIX, root, clients[0])
    prior = settings.prior_file or (root / PRIOR_FILE if settings.data_root is None else None)
    if prior is not None and not prior.is_file():
        raise InputError(f"--prior_file: there is no image {prior}")
    data = JobData(root, prefix, (prior or folder / PRIOR_FILE).resolve())
    for client in clients:
        path = data.datalist(client)
        if path is None or not path.is_file():
            raise InputError(f"--dataset_json_prefix: there is no list {path}")
    return data


def _prefix(given: str, root: Path, client: Client) -> str:
    """As given, or within the data folder."""
    for candidate in (Path(given), root / given):
        if Path(f"{candidate}{client.number}.json").is_file():
            return str(candidate.resolve())
    return str(Path(given).resolve())


def _check_numbers(
    settings: FederationSettings, clients: Sequence[Client], noise: Sequence[float]
) -> None:
    for name in ("num_rounds", "frequency", "local_epochs"):
        if getattr(settings, name) < 1:
            raise InputError(f"--{name} {getattr(settings, name)}: must be at least 1")
    for level in noise:
        if not 0 <= level < float("inf"):
            raise InputError(f"--sigma0 {level}: must be a number not below 0")
    if not settings.lr > 0:
        raise InputError(f"--lr {settings.lr}: must be positive")
    if settings.min_clients is not None and not 1 <= settings.min_clients <= len(clients):
        raise InputError(f"--min_clients {settings.min_clients}: there are {len(clients)} clients")


def _check_network(settings: FederationSettings) -> None:
    from federated.flare.networks import network_spec

    _check_own(settings)
    if settings.model:
        return
    try:
        network_spec(settings.model_name, settings.num_class, settings.image_size)
    except InputError as error:
        raise InputError(f"--{error}") from None


def _check_own(settings: FederationSettings) -> None:
    """Refuse a client of the sites' own that no site could build."""
    from core.client import loss_named
    from core.models.own_model import own_architecture
    from federated.flare.site_training import optimiser_of

    if settings.data and not settings.model:
        raise InputError(f"--data {settings.data}: your own samples need your own --model")
    own_architecture(settings.model, settings.seed)
    loss_named(settings.loss)
    if settings.optimizer is not None:
        optimiser_of(settings.optimizer)


def _check_inversion(content: Mapping[str, Any]) -> None:
    from audit.settings import settings_from_dict

    try:
        settings_from_dict(content)
    except InputError as error:
        raise InputError(f"--{error}") from None


def inversion(settings: FederationSettings, data: JobData) -> dict[str, Any]:
    """What the settings say of `config_inversion.json`."""
    return {
        "img_prior": "" if data.prior is None else str(data.prior),
        "method": settings.method,
        "iterations": settings.iterations,
        "model_name": settings.model_name,
        "resolution": settings.image_size,
    }


def write_prior(settings: FederationSettings, client: Client, data: JobData) -> None:
    """Write the mean of the public validation images, never a training image, if need be.

    Raises:
        InputError: There is no prior image and no validation image.
    """
    from torchvision.utils import save_image

    from core.data.list_files import load_datalist
    from core.data.listed_images import ImageListDataset

    path = data.datalist(client)
    if data.prior is None or data.root is None or path is None or data.prior.is_file():
        return
    samples = load_datalist(path, "validation")
    if not samples:
        raise InputError(f"--prior_file: needed, {path} has no validation images")
    mean = ImageListDataset(data.root, samples, settings.image_size).images().mean(0)
    data.prior.parent.mkdir(parents=True, exist_ok=True)
    save_image(mean, data.prior)
