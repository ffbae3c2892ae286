"""Some images of one setting of a protocol: shared under a defense, attacked and measured.

`submit` runs this for every setting; a piece is what an interruption costs at most.

    python -m benchmarks.leaderboard.piece --pretrained model_best.pth.tar --batch-size 4 \\
        --count 8 --defense clip:1 --results results/piece
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from attack.attacks.auto import Auto
from attack.attacks.ensemble import EnsembleConfig
from attack.knowledge.threat_models import Capability, ThreatModel, find_threat
from attack.metrics import evaluate
from attack.metrics.worst_case import worst_case
from core.data.data_sets import DataSets, derived_seed, load_data, take_samples
from core.errors import InputError, exit_status
from core.launch_arguments import CommandParser
from core.models.building import ModelSpec
from core.plugins import import_plugin
from core.processes.distributed import Process
from core.records import provenance
from core.storage import write_record
from core.target import Target, Truth
from gradients.batch_statistics import batch_norm_layers
from gradients.client import ClientSettings, share_update
from gradients.client_batch import batch_indices, validation_guesses
from gradients.defenses import parse_defenses
from gradients.private_gradient import PrivacySettings
from gradients.received_model import Pretrained, build_received_model, read_pretrained

METRICS = ("psnr", "ssim")
CPU = torch.device("cpu")
# Who a picture is said to be from where no attack applies.
GUESS = "guess"
# Images and their labels, in any order; None where no labels were recovered.
Found = tuple[torch.Tensor, torch.Tensor | None]


@dataclass(frozen=True)
class Piece:
    """What is attacked, by the names of the flags.

    Attributes:
        data: Name of a data set.
        seed: Of the choice of images, of the defense and of the attack's start.
        images: Images that are attacked in all.
        first: Position of the piece's first image among them.
        count: Images of the piece, a multiple of the batch size.
        batch_size: Images behind one update.
        defense: Words of the defense; empty for none.
        plugin: Module that registers it.
        threat: Name of the attacker.
        members: Names of the ensemble's attacks.
        evaluations: Of a gradient, for each batch.
        sigma: Noise multiplier of DP-SGD, which clips every image's gradient at norm 1; None:
            no DP-SGD.
    """

    data: str
    seed: int
    images: int
    first: int
    count: int
    batch_size: int
    defense: str
    plugin: str | None
    threat: str
    members: tuple[str, ...]
    evaluations: int
    sigma: float | None = None


@dataclass(frozen=True)
class ImageResult:
    """What one image gave away.

    Attributes:
        psnr: Of the member that came nearest, in dB.
        ssim: Of the member that came nearest.
        identified: Whether some member's reconstruction is nearer to the image than to any
            other training image, in squared error.
        label: Whether its label was recovered.
        strongest: The member of that SSIM; "guess" where no attack applied.
    """

    psnr: float
    ssim: float
    identified: bool
    label: bool
    strongest: str


def build_parser() -> CommandParser:
    """The command line."""
    parser = CommandParser(
        prog="python -m benchmarks.leaderboard.piece",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--pretrained", required=True, metavar="PATH", help="the model attacked")
    parser.add_argument("--data", default="photo-patches")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--images", type=int, default=32, help="attacked in all")
    parser.add_argument("--first", type=int, default=0, help="position of the piece's first image")
    parser.add_argument("--count", type=int, default=1, help="images of the piece")
    parser.add_argument("-b", "--batch-size", type=int, default=1)
    parser.add_argument("--defense", default="", metavar="NAME:PARAM,...")
    parser.add_argument("--sigma", type=float, help="of DP-SGD; default: no DP-SGD")
    parser.add_argument("--plugin", metavar="MODULE")
    parser.add_argument("--threat", default="honest-server")
    parser.add_argument("--members", default="spectral", metavar="ATTACK,...")
    parser.add_argument("--evaluations", type=int, default=400)
    parser.add_argument("--results", type=Path, required=True, metavar="DIR")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Attack the piece and write its record."""
    args = build_parser().parse_args(argv)
    given = {f.name: getattr(args, f.name) for f in dataclasses.fields(Piece)}
    piece = Piece(**{**given, "members": tuple(args.members.split(","))})
    began = time.process_time()
    results = attack_piece(piece, read_pretrained(args.pretrained))
    record = {
        "status": "finished",
        "images": [dataclasses.asdict(result) for result in results],
        "seconds": time.process_time() - began,
        "provenance": provenance(CPU, piece.seed),
    }
    write_record(args.results / "record.json", record)


def attack_piece(piece: Piece, model: Pretrained) -> list[ImageResult]:
    """Share and attack every batch of a piece.

    Args:
        piece: What is attacked.
        model: Its network, as the client receives it.

    Returns:
        One result per image, in order.

    Raises:
        InputError: An unknown defense, threat model or plugin, or a file that is no model of ours.
    """
    import_plugin(piece.plugin)
    parse_defenses(piece.defense)
    if piece.count % piece.batch_size:
        raise InputError(f"--count {piece.count}: no multiple of -b {piece.batch_size}")
    starts = range(piece.first, piece.first + piece.count, piece.batch_size)
    return [result for start in starts for result in _attack_batch(piece, model, start)]


def _attack_batch(piece: Piece, model: Pretrained, start: int) -> Iterator[ImageResult]:
    threat = find_threat(piece.threat)
    assert threat is not None
    indices = attacked(piece.data, piece.images, piece.seed)[start : start + piece.batch_size]
    seed = derived_seed(piece.seed, start) % 2**31
    target, truth = shared(piece, model, indices, seed)
    members = _reconstructions(piece, threat, target, truth, seed)
    return _measured(members, truth, indices, piece.data)


def attacked(data: str, images: int, seed: int) -> list[int]:
    """Which training images are attacked: the first ones of a seeded shuffle."""
    return batch_indices(len(data_sets(data).train_plain), images, 0, seed)


@functools.cache
def data_sets(name: str) -> DataSets:
    """A data set, loaded once in a process."""
    return load_data(name, training=False)


def shared(
    piece: Piece, model: Pretrained, indices: Sequence[int], seed: int
) -> tuple[Target, Truth]:
    """What the client shares of some images, and these images.

    Args:
        piece: Says which data set and which defense.
        model: The network that the client receives.
        indices: Of training images.
        seed: Of the defense.
    """
    spec = model.model
    if not isinstance(spec, ModelSpec):
        raise InputError(f"--pretrained: {model.path} is no model of stage 1")
    data = data_sets(piece.data)
    truth = Truth(*take_samples(data.train_plain, indices, data.spec))
    received = build_received_model(spec, model)
    private = None if piece.sigma is None else PrivacySettings(noise_multiplier=piece.sigma)
    client = ClientSettings(
        # BatchNorm over the batch would mix images whose gradients are clipped alone.
        train_mode=private is None or not batch_norm_layers(received),
        privacy=private,
        defenses=parse_defenses(piece.defense),
        seed=seed,
        dropout_seed=seed,
    )
    received.train(client.train_mode)
    images, labels = truth.images, truth.labels
    target = share_update(received, spec, data.spec, images, labels, client, Process(device=CPU))
    assert target is not None
    return target, truth


def _reconstructions(
    piece: Piece, threat: ThreatModel, target: Target, truth: Truth, seed: int
) -> dict[str, Found]:
    """By member; the mean of images that are no client's where no attack applies."""
    granted = tuple(sorted(capability.name for capability in threat.grants))
    config = EnsembleConfig(piece.members, iterations=piece.evaluations, granted=granted)
    labels = truth.labels if Capability.LABELS in threat.grants else None
    try:
        found = Auto(config).reconstruct(threat.view(target), labels=labels, device=CPU, seed=seed)
    except InputError:
        # Labels that no rule recovers, or a defense that leaves nothing to compare.
        mean, _ = validation_guesses(data_sets(piece.data), truth.images)
        assert mean is not None
        return {GUESS: (mean.expand_as(truth.images), None)}
    return {name: (member.images, member.labels) for name, member in found.members.items()}


def _measured(
    members: dict[str, Found],
    truth: Truth,
    indices: Sequence[int],
    data: str,
) -> Iterator[ImageResult]:
    measured, identified = {}, torch.zeros(len(indices), dtype=torch.bool)
    right = torch.zeros(len(indices), dtype=torch.bool)
    for name, found in members.items():
        images, labels = found
        measured[name] = evaluate(images, labels, truth, metrics=METRICS)
        order = measured[name].order
        identified |= nearest_of_all(images[order], data) == torch.tensor(indices)
        right |= labels is not None and labels[order] == truth.labels
    rows = worst_case(measured).per_image
    for row, known, label in zip(rows, identified.tolist(), right.tolist(), strict=True):
        yield ImageResult(row["psnr"], row["ssim"], known, label, row["ssim_attack"])


def nearest_of_all(images: torch.Tensor, data: str) -> torch.Tensor:
    """The index of the training image that is nearest to each of N images, in squared error."""
    pool = _training_images(data).flatten(1)
    distance = torch.cdist(
        images.to(pool).flatten(1), pool, compute_mode="donot_use_mm_for_euclid_dist"
    )
    return distance.argmin(1)


@functools.cache
def _training_images(data: str) -> torch.Tensor:
    sets = data_sets(data)
    return take_samples(sets.train_plain, range(len(sets.train_plain)), sets.spec)[0]


if __name__ == "__main__":
    sys.exit(exit_status(main))
