"""What stage 2 writes: checkpoint, model, picture of the true images, and record."""

from __future__ import annotations

import resource
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid

from core.clipping import PER_SAMPLE, noise_sentence
from core.escaping import printable
from core.locks import locked, remove_left_behind
from core.pictures import save_images
from core.records import provenance
from core.storage import atomic_file, save_checkpoint, write_text
from core.target import Target, Truth
from gradients.checkpoint import save_target
from gradients.private_gradient import PrivacySettings, gaussian_epsilon
from gradients.rank_analysis import LayerRank
from gradients.record import ExtractRecord, Measured, UpdatePrivacy, describe, write_record
from gradients.settings import ExtractSettings

# Larger values of epsilon promise nothing that anybody would notice.
MEANINGLESS_EPSILON = 100
# Characters of labels that are printed: a mask has thousands.
_MOST_SHOWN = 300


def peak_memory(device: torch.device) -> float:
    """MiB: allocated on a GPU, resident in this process on a CPU."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2**20, 1)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Linux counts kibibytes, macOS bytes.
    return round(peak / (2**20 if sys.platform == "darwin" else 2**10), 1)


def write_results(
    settings: ExtractSettings,
    target: Target,
    truth: Truth,
    ranks: Sequence[LayerRank],
    device: torch.device,
    measured: Measured,
) -> Path:
    """Write checkpoint, model, picture and (last) the record, and print a summary.

    Args:
        settings: What was asked for.
        target: What the client shares.
        truth: The images and labels that the client keeps private.
        ranks: The rank analysis, if asked for.
        device: Device that computed the gradient.
        measured: What it cost.

    Returns:
        The checkpoint's path.
    """
    folder, stem = settings.folder, _stem(settings, target)
    path = folder / f"{stem}-checkpoint.pth.tar"
    record = ExtractRecord(
        target=describe(target),
        labels=tuple(truth.labels.tolist()),
        checkpoint=str(path),
        measured=measured,
        privacy=_privacy(settings.client.privacy, target),
        ranks=tuple(ranks),
        arguments=settings.arguments,
        provenance=provenance(device, settings.seed),
    )
    remove_left_behind(folder)
    # Two runs of one name: each writes all its files, or none.
    with locked(folder / f".{stem}.lock", f"--results and --id: {path}", wait=60):
        save_checkpoint(target.state_dict, folder / "model.pth")
        if truth.is_text:
            sentences = "\n".join(map(target.data.text, truth.images))
            write_text(folder / f"{stem}-true.txt", sentences + "\n")
        else:
            _write_picture(folder / f"{stem}-true.png", truth)
        save_target(path, target, truth, settings.arguments)
        write_record(record, folder / f"{stem}.json")
    _print_summary(record)
    print(printable(f"gradient checkpoint: {path}"))
    return path


def _privacy(privacy: PrivacySettings | None, target: Target) -> UpdatePrivacy | None:
    if privacy is None:
        return None
    sigma, delta = privacy.noise_multiplier, privacy.delta
    guaranteed = privacy.clipping == PER_SAMPLE and sigma > 0
    epsilon = gaussian_epsilon(sigma, delta, target.local.steps) if guaranteed else None
    return UpdatePrivacy(privacy.clipping, sigma, privacy.max_norm, delta, epsilon)


def _stem(settings: ExtractSettings, target: Target) -> str:
    pretrained = settings.model.pretrained
    origin = "init" if pretrained is None else Path(pretrained).name
    name = settings.data.name or target.data.name
    clients = f"_k{target.n_clients}" if settings.aggregation.sums else ""
    batch = f"b{target.images_per_client}{clients}_i{settings.batch.index}"
    return f"id{settings.id}_{target.model.name}_{origin}_{name}_{batch}"


def _write_picture(path: Path, truth: Truth) -> None:
    if truth.images.dim() != 4 or truth.images.shape[1] not in (1, 3):
        save_images(path, truth.images)
        return
    grid = make_grid(truth.images, nrow=min(8, len(truth.images)), pad_value=1.0)
    with atomic_file(path) as file:
        to_pil_image(grid).save(file, format="PNG")


def _print_summary(record: ExtractRecord) -> None:
    labels = str(list(record.labels))
    print(f"labels: {labels if len(labels) <= _MOST_SHOWN else labels[:_MOST_SHOWN] + ' ...'}")
    about, measured = record.target, record.measured
    print(
        f"gradient norm {about.gradient_norm:.6g} of {len(about.gradient_norms)} tensors; "
        f"{measured.seconds:.1f} s, peak {measured.peak_memory_mib:.0f} MiB"
    )
    if record.privacy is not None:
        private, local = record.privacy, about.local
        images = about.batch_size // max(1, len(about.clients))
        step = max(1, images // local.batches)
        print(_privacy_sentence(private))
        print(noise_sentence(private.clipping, private.noise_multiplier, private.max_norm, step))


def _privacy_sentence(privacy: UpdatePrivacy) -> str:
    if privacy.epsilon is None:
        return "privacy: no guarantee (without per-sample clipping and noise epsilon is infinite)"
    meaning = ", which protects nobody" if privacy.epsilon > MEANINGLESS_EPSILON else ""
    return f"privacy: epsilon {privacy.epsilon:.4g} at delta {privacy.delta:g}{meaning}"
