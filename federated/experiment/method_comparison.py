"""What each inversion method recovers from the same updates.

Sites train for real with `torch.optim.SGD`; every method gets the same update, the same
public images and the same number of iterations. Written: methods.json with one entry per
case, seed and method, and methods.png with originals and reconstructions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.errors import InputError

if TYPE_CHECKING:
    import torch

    from audit.updates import LocalUpdate
    from core.data.specs import DataSpec

METHODS = ("published", "bn", "full")
N_PUBLIC = 200


@dataclass(frozen=True)
class Case:
    """A site's local training.

    Attributes:
        n_images: Number of the site's images.
        batch_size: Images per local step.
        epochs: Number of local epochs.
    """

    n_images: int
    batch_size: int
    epochs: int = 1

    def __str__(self) -> str:
        return f"{self.n_images} images, batch {self.batch_size}, {self.epochs} epoch(s)"


CASES = (Case(1, 1), Case(4, 4), Case(8, 8), Case(8, 4), Case(4, 4, 2))


@dataclass
class Victims:
    """Images of sites, and public ones.

    Attributes:
        data: Shape and normalisation.
        images: N x 3 x H x W in [0, 1].
        labels: N class indices.
        public: P x 3 x H x W in [0, 1], of other people.
    """

    data: DataSpec
    images: torch.Tensor
    labels: torch.Tensor
    public: torch.Tensor


def train_locally(
    victims: Victims,
    case: Case,
    *,
    model_name: str = "cnn",
    learning_rate: float = 0.01,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    seed: int = 0,
    order: tuple[tuple[int, ...], ...] | None = None,
) -> LocalUpdate:
    """Train a fresh network on the first images with `torch.optim.SGD`, as a client does.

    Args:
        victims: The images that are attacked.
        case: How many of them, and in which batches.
        model_name: See `federated.flare.networks.network_spec`.
        learning_rate: Of the local SGD.
        momentum: Of the local SGD.
        weight_decay: Of the local SGD.
        seed: Of the network's parameters.
        order: See `LocalUpdate.batch_order`.

    Returns:
        What the client sends.
    """
    import torch

    from audit.updates import LocalUpdate
    from core.models.building import build_model
    from federated.flare.networks import network_spec

    spec = network_spec(model_name, victims.data.n_classes, victims.data.shape[1])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build_model(spec).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.SGD(model.parameters(), learning_rate, momentum, 0.0, weight_decay)
    inputs = victims.data.normalize(victims.images[: case.n_images])
    for epoch in range(case.epochs):
        indices = torch.arange(case.n_images) if order is None else torch.tensor(order[epoch])
        for batch in indices.split(case.batch_size):
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(model(inputs[batch]), victims.labels[batch])
            loss.backward()
            optimizer.step()
    return LocalUpdate(
        model=spec,
        data=victims.data,
        global_weights=before,
        weight_diff={name: v - before[name] for name, v in model.state_dict().items()},
        batch_size=case.batch_size,
        n_images=case.n_images,
        local_epochs=case.epochs,
        learning_rate=learning_rate,
        momentum=momentum,
        weight_decay=weight_decay,
        batch_order=order,
    )


def phantom_victims(size: int, seed: int = 0) -> Victims:
    """Site 2 of the embedded phantoms, starting elsewhere for every seed."""
    from core.data.list_files import load_datalist
    from core.data.listed_images import ImageListDataset
    from federated.flare.images import chest_spec
    from federated.phantoms.data_set import LIST_PREFIX, cached_phantoms

    root, data = cached_phantoms(scale=0.1, size=size), chest_spec(size)
    path = root / f"{LIST_PREFIX}4.json"
    own = ImageListDataset(root, load_datalist(path, "training"), size)
    public = ImageListDataset(root, load_datalist(path, "validation"), size)
    return _from(data, own.images(), own.labels(), public.images(), seed)


def folder_victims(folder: str | Path, size: int, seed: int = 0) -> Victims:
    """Victims and public images from a folder with one folder of pictures per class.

    Raises:
        InputError: There are fewer than two such folders, or too few pictures.
    """
    import torch

    from core.data.image_files import load_image
    from federated.flare.images import chest_spec

    classes = sorted(path for path in Path(folder).glob("*") if path.is_dir())
    if len(classes) < 2:
        raise InputError(f"--images {folder}: there must be one folder of pictures per class")
    files = [sorted(p for p in c.iterdir() if p.suffix in (".png", ".jpg")) for c in classes]
    half = min(len(f) for f in files) // 2
    if half < 8:
        raise InputError(f"--images {folder}: every class needs at least 16 pictures")
    # Classes in turn; the second half is public.
    rows = [[load_image(f[k], size) for f in files] for k in range(2 * half)]
    images = torch.stack([image for row in rows[:half] for image in row])
    public = torch.stack([image for row in rows[half:] for image in row])
    labels = torch.arange(len(classes)).repeat(half)
    return _from(chest_spec(size, len(classes), "folder"), images, labels, public, seed)


def _from(
    data: DataSpec, images: torch.Tensor, labels: torch.Tensor, public: torch.Tensor, seed: int
) -> Victims:
    start = (8 * seed) % len(images)
    return Victims(data, images.roll(-start, 0), labels.roll(-start), public[:N_PUBLIC])


def compare(
    victims: Victims,
    case: Case,
    *,
    iterations: int = 300,
    methods: Sequence[str] = METHODS,
    seed: int = 0,
) -> Iterator[tuple[dict[str, Any], torch.Tensor]]:
    """Attack one update with every method.

    Args:
        victims: Whose images, and the public ones.
        case: The local training.
        iterations: Number of iterations of every method.
        methods: Names of the methods.
        seed: Seed of the network's weights and of the attacks.

    Yields:
        A result (plain values) and the reconstructions, one per original in its order.
    """
    from attack.metrics.assignment import assign
    from audit.inversion import invert_update
    from audit.settings import InversionSettings

    update = train_locally(victims, case, seed=seed)
    originals, prior = victims.images[: case.n_images], victims.public.mean(0)
    for method in methods:
        settings = InversionSettings(method=method, iterations=iterations)
        found = invert_update(update, settings, prior=prior, public=victims.public, seed=seed)
        images = found.images[assign(found.images, originals)]
        scores = _scores(originals, images, prior)
        yield (
            {
                **asdict(case),
                "method": method,
                "seed": seed,
                "iterations": iterations,
                **scores,
                "losses": found.losses,
                "labels_from": found.labels_from,
                "seconds": round(found.seconds, 2),
            },
            images,
        )


def _scores(
    originals: torch.Tensor, images: torch.Tensor, prior: torch.Tensor
) -> dict[str, float | list[float]]:
    from audit.leakage import measure_leakage
    from audit.similarity import ImageSimMetric

    report = measure_leakage(originals, images, prior, ImageSimMetric(), threshold=float("inf"))
    ssim = [image.similarity for image in report.images]
    rdlv = [image.rdlv for image in report.images]
    prior_ssim = [image.prior_similarity for image in report.images]
    return {
        "ssim": sum(ssim) / len(ssim),
        "ssim_prior": sum(prior_ssim) / len(prior_ssim),
        "rdlv": sum(rdlv) / len(rdlv),
        "rdlv_max": max(rdlv),
        "ssim_per_image": ssim,
    }


def compare_all(
    output: Path,
    *,
    images: str | None = None,
    size: int = 32,
    iterations: int = 300,
    seeds: int = 3,
    methods: str = ",".join(METHODS),
) -> None:
    """Attack every case with every method, and write record and picture.

    Args:
        output: Folder for methods.json and methods.png.
        images: Folder with one folder of pictures per class; None for the phantoms.
        size: Side of the images in pixels.
        iterations: Number of iterations of every method.
        seeds: Number of networks and sites.
        methods: Names between commas.

    Raises:
        InputError: There are too few pictures, or no such method.
    """
    import torch

    from core.records import provenance
    from core.storage import write_json

    results: list[dict[str, Any]] = []
    rows: list[tuple[str, torch.Tensor]] = []
    for case in CASES:
        for seed in range(seeds):
            chosen = methods.split(",")
            _compare_case(
                case, seed, _victims(images, size, seed), chosen, iterations, results, rows
            )
    # Where the user's files lie is nobody's business.
    command = {"size": size, "iterations": iterations, "seeds": seeds, "methods": methods}
    record = {
        "command": command,
        "data": "phantoms" if images is None else Path(images).name,
        "summary": _summary(results),
        "results": results,
        "provenance": provenance(torch.device("cpu"), 0),
    }
    write_json(output / "methods.json", record)
    _draw(rows, output / "methods.png")


def _victims(images: str | None, size: int, seed: int) -> Victims:
    return phantom_victims(size, seed) if images is None else folder_victims(images, size, seed)


def _compare_case(
    case: Case,
    seed: int,
    victims: Victims,
    methods: Sequence[str],
    iterations: int,
    results: list[dict[str, Any]],
    rows: list[tuple[str, torch.Tensor]],
) -> None:
    """Add what every method finds; the first seed's images are rows of the picture."""
    if seed == 0:
        rows.append((f"{case}: original", victims.images[: case.n_images]))
    compared = compare(victims, case, iterations=iterations, methods=methods, seed=seed)
    for result, images in compared:
        results.append(result)
        print(f"{case}, seed {seed}, {result['method']}: SSIM {result['ssim']:.3f}")
        if seed == 0:
            rows.append((f"{result['method']}: SSIM {result['ssim']:.2f}", images))


def _summary(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means over seeds, per case and method."""
    keys = ("n_images", "batch_size", "epochs", "method")
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for result in results:
        groups.setdefault(tuple(result[key] for key in keys), []).append(result)
    values = ("ssim", "ssim_prior", "rdlv", "rdlv_max", "seconds")
    return [
        {
            **dict(zip(keys, group, strict=True)),
            **{v: round(sum(r[v] for r in members) / len(members), 4) for v in values},
        }
        for group, members in groups.items()
    ]


def _draw(rows: Sequence[tuple[str, torch.Tensor]], path: Path) -> None:
    from core.figures import blank_figure, save_figure

    columns = max(len(images) for _, images in rows)
    figure = blank_figure(1.0 * columns + 2.4, 1.05 * len(rows), constrained=False)
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for line, (title, images) in zip(axes, rows, strict=True):
        for ax in line:
            ax.set_axis_off()
        for ax, image in zip(line, images, strict=False):
            ax.imshow(image.permute(1, 2, 0).clamp(0, 1).numpy())
        line[0].text(-0.1, 0.5, title, transform=line[0].transAxes, ha="right", va="center",
                     fontsize=8)  # fmt: skip
    save_figure(figure, path, dpi=90, tight=True)
