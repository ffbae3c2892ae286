"""The stage 2 command: take a client's batch, compute what it shares, write it."""

from __future__ import annotations

import argparse
import dataclasses
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.errors import InputError, exit_status
from core.launch_arguments import CommandParser, LaunchSettings, add_launch_arguments

if TYPE_CHECKING:
    from torch import nn

    from core.data.data_sets import DataSets
    from core.data.specs import DataSpec
    from core.models.building import ModelSpec
    from core.processes.distributed import Process
    from core.target import Target
    from gradients.client import ClientSettings
    from gradients.rank_analysis import LayerRank
    from gradients.received_model import Pretrained

DEFAULT_RESULTS = "results/gradients"
LABEL_DUPLICATES = 4


def build_parser() -> argparse.ArgumentParser:
    """The command line of stage 2."""
    parser = CommandParser(
        prog="get_gradients.py",
        description="Compute what a client of federated learning shares for one batch.",
    )
    _add_data_arguments(parser)
    _add_model_arguments(parser)
    _add_client_arguments(parser)
    _add_defense_arguments(parser)
    add_launch_arguments(parser)
    return parser


def _add_data_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("data and files")
    group.add_argument("--id", default="test", help="first part of the file name")
    group.add_argument("--results", default=DEFAULT_RESULTS, metavar="DIR", help="where to write")
    group.add_argument("--data", metavar="DIR", help="folder with images, or a built-in name")
    group.add_argument("--data-name", help="imagenet, cifar100, svhn, celeba, ...")
    group.add_argument("--data-root", metavar="DIR", help="where a built-in data set lies")
    group.add_argument("--split-seed", type=int, default=0, help="as in training")
    group.add_argument("-j", "--workers", type=int, default=4, help="threads that read images")
    group.add_argument("-b", "--batch-size", type=int, default=32, help="images of the client")
    group.add_argument("--target-idx", type=int, default=0, help="which batch of the data set")
    group.add_argument(
        "--duplicate-label",
        action="store_true",
        help=f"{LABEL_DUPLICATES} images per label (8 labels in a batch of 32)",
    )
    group.add_argument("--duplicates", type=int, metavar="N", help="N images per label")


def _add_model_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument("-a", "--arch", default="resnet18", help="unless --pretrained says")
    group.add_argument("--pretrained", metavar="PATH", help=".tar checkpoint or .pth parameters")
    group.add_argument(
        "--outlayer-state", default="None", choices=["None", "kaiming_uniform", "normal"]
    )
    group.add_argument("--model-eval", action="store_true", help="evaluation mode")
    group.add_argument("--stem", choices=["auto", "imagenet", "cifar"], default="auto")
    group.add_argument("--width", type=int, help="channels of the first stage")
    group.add_argument("--image-size", type=int, metavar="PX", help="default: the data set's")
    group.add_argument("--norm", choices=["batch", "group"], help="default: batch")
    group.add_argument("--kernel-size-of-maxpool", type=int, default=3, metavar="K")
    group.add_argument("--ra", action="store_true", help="print the R-GAP rank analysis")
    group.add_argument(
        "--malicious",
        default="",
        metavar="KIND:N",
        help="a malicious server sends a changed model: imprint:BINS, fishing:CLASS, or "
        "fishing-feature:CLASS[:FEATURE[:CUT]] (FEATURE: a number or logit, the default; images "
        "of the class pass below CUT, by default where one of the batch is expected)",
    )


def _add_client_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("local training")
    group.add_argument("--epochs", type=int, default=1, help="number of local iterations")
    group.add_argument("--lr", type=float, default=0.1, help="local learning rate")
    group.add_argument("--local-batches", type=int, default=1, help="batches per local epoch")
    group.add_argument("--local-momentum", type=float, default=0.0)
    group.add_argument("--local-weight-decay", type=float, default=0.0)
    group.add_argument("--syncbn", action="store_true", help="synchronized BatchNorm")
    group.add_argument("--shards", metavar="N,N,...", help="images per process")
    group.add_argument("--double", action="store_true", help="compute in float64")
    group.add_argument(
        "--share-running",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="share BatchNorm's running statistics after the local training",
    )
    group.add_argument("--dropout-seed", type=int, help="seed of dropout masks (default: --seed)")


def _add_defense_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("defenses")
    group.add_argument("--enable-dp", "--enable_dp", action="store_true", help="clip, add noise")
    group.add_argument("--sigma", type=float, default=0.01, help="noise multiplier")
    group.add_argument("-c", "--max-per-sample-grad_norm", type=float, default=1.0, metavar="C")
    group.add_argument("--delta", type=float, default=1e-5)
    group.add_argument("--dp-clipping", choices=["per-sample", "batch"], default="per-sample")
    group.add_argument(
        "--plugin", metavar="MODULE", help="imported first; may register defenses and models"
    )
    group.add_argument(
        "--defense",
        default="",
        metavar="NAME:PARAM,...",
        help="in order of application, e.g. clip:1,gaussian:0.01; names: clip (norm), freeze "
        "(free layers: their number, or names joined by +), gaussian (std), laplace (scale), "
        "percentile (sigma0, percentile), prune (fraction), quantize (levels), sign, "
        "soteria (fraction), topk (share)",
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    return exit_status(lambda: run(argv))


def run(argv: Sequence[str] | None = None) -> None:
    """Parse, check, launch.

    Raises:
        InputError: One sentence on what is wrong with the command line or a file.
    """
    args = build_parser().parse_args(argv)
    _import_plugin(args)
    check_arguments(args)

    from core.processes.launch import launch

    launch(work, LaunchSettings.from_arguments(args), args)


def _import_plugin(args: argparse.Namespace) -> None:
    from core.plugins import import_plugin

    import_plugin(args.plugin)


def check_arguments(args: argparse.Namespace) -> None:
    """Refuse what cannot work before any work is done."""
    if args.data is None and args.data_name is None:
        raise InputError("--data: give a folder with images or a built-in name (photo-patches)")
    for flag, word in (("--id", args.id), ("--data-name", args.data_name or "")):
        if Path(word).name != word:
            raise InputError(f"{flag} {word}: becomes part of a file name, without folders")
    for flag in ("batch_size", "epochs", "local_batches", "duplicates"):
        if getattr(args, flag) is not None and getattr(args, flag) < 1:
            raise InputError(f"--{flag.replace('_', '-')} must be at least 1")
    if args.workers < 0:
        raise InputError("--workers must not be negative")
    # Written so that NaN is refused as well.
    if not 0 < args.lr < math.inf:
        raise InputError("--lr must be positive")
    if not (0 <= args.local_momentum < math.inf and 0 <= args.local_weight_decay < math.inf):
        raise InputError("--local-momentum and --local-weight-decay must not be negative")
    if args.kernel_size_of_maxpool < 2:
        raise InputError("--kernel-size-of-maxpool must be at least 2")
    if args.width is not None and args.width < 1:
        raise InputError("--width must be at least 1")
    if args.pretrained is not None and not Path(args.pretrained).is_file():
        raise InputError(f"--pretrained: there is no file {args.pretrained}")
    if args.duplicate_label and args.duplicates is None and args.batch_size != 32:
        raise InputError(
            f"--duplicate-label is stated for -b 32, not {args.batch_size}; for other batches "
            "give the number of images per label with --duplicates"
        )
    _client_settings(args)


def work(process: Process, args: argparse.Namespace) -> Path | None:
    """Compute and write, on one of the client's processes.

    Args:
        process: This process.
        args: The command line.

    Returns:
        The checkpoint's path on the first process, else None.
    """
    import torch

    from core.models.malicious import parse_malice
    from core.target import Truth
    from gradients.client import share_update
    from gradients.client_batch import load_batch, public_samples, validation_guesses
    from gradients.malicious_server import tamper
    from gradients.output import peak_memory, write_results
    from gradients.received_model import build_received_model, read_pretrained

    _import_plugin(args)
    began = time.perf_counter()
    pretrained = None if args.pretrained is None else read_pretrained(args.pretrained)
    data, data_spec = _load_data(args, pretrained)
    spec = _model_spec(args, pretrained, data_spec)
    if args.malicious:
        parse_malice(args.malicious, spec.n_classes)
    spec, settings = _suit_privacy(spec, _client_settings(args), args, process)
    indices = _choose(args, data)
    images, labels = load_batch(data, indices, args.workers)
    mean, nearest = (
        validation_guesses(data, images, args.workers) if process.is_main else (None, None)
    )
    truth = Truth(images, labels, mean_image=mean, nearest_images=nearest)
    model = build_received_model(spec, pretrained, args.outlayer_state, args.seed)
    model = model.double() if args.double else model
    if args.malicious:
        spec = dataclasses.replace(spec, malicious=args.malicious)
        public, classes = public_samples(data, args.workers)
        model = tamper(model, spec, data_spec.normalize(public), classes, args.batch_size)
    ranks = _rank_analysis(model, data_spec, args, process)
    if process.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(process.device)
    loaded = time.perf_counter()
    cost: dict[str, Any] = {}
    target = share_update(
        model, spec, data_spec, truth.images, truth.labels, settings, process, cost
    )
    if target is None:
        return None
    _check_finite(target, args)
    measured = cost | {
        "seconds": round(time.perf_counter() - began, 3),
        "seconds_of_update": round(time.perf_counter() - loaded, 3),
        "peak_memory_mib": peak_memory(process.device),
        "processes": process.world_size,
        "indices": indices,
    }
    return write_results(args, target, truth, ranks, process.device, measured)


def _check_finite(target: Target, args: argparse.Namespace) -> None:
    """Refuse to share NaN: nothing could be learnt from it, nor read in a table."""
    if all(gradient.isfinite().all() for gradient in target.gradient.values()):
        return
    if all(value.isfinite().all() for value in target.state_dict.values()):
        raise InputError(f"the update is not finite: local training diverges with --lr {args.lr:g}")
    raise InputError(f"--pretrained: the parameters in {args.pretrained} are not finite")


def _client_settings(args: argparse.Namespace) -> ClientSettings:
    from core.target import LocalTraining
    from gradients.client import ClientSettings
    from gradients.defenses import parse_defenses
    from gradients.private_gradient import PrivacySettings

    privacy = None
    if args.enable_dp:
        privacy = PrivacySettings(
            noise_multiplier=args.sigma,
            max_norm=args.max_per_sample_grad_norm,
            clipping=args.dp_clipping,
            delta=args.delta,
        )
    return ClientSettings(
        local=LocalTraining(
            epochs=args.epochs,
            batches=args.local_batches,
            lr=args.lr,
            momentum=args.local_momentum,
            weight_decay=args.local_weight_decay,
        ),
        train_mode=not args.model_eval,
        shards=_parse_shards(args.shards),
        synchronized=args.syncbn,
        privacy=privacy,
        defenses=parse_defenses(args.defense),
        seed=args.seed,
        dropout_seed=args.seed if args.dropout_seed is None else args.dropout_seed,
        share_running=args.share_running,
    )


def _parse_shards(text: str | None) -> tuple[int, ...]:
    try:
        return tuple(int(n) for n in text.split(",")) if text else ()
    except ValueError:
        raise InputError(f"--shards {text}: expected numbers separated by commas") from None


def _load_data(
    args: argparse.Namespace, pretrained: Pretrained | None
) -> tuple[DataSets, DataSpec]:
    """The data set, and its description with the normalisation that the model expects."""
    from core.data.data_sets import load_data

    described = None if pretrained is None else pretrained.model
    size = args.image_size or (None if described is None else described.image_size)
    data = load_data(
        args.data or args.data_name,
        image_size=size,
        root=args.data_root,
        name=args.data_name,
        seed=args.seed,
        split_seed=args.split_seed,
    )
    if pretrained is None or pretrained.data is None:
        return data, data.spec
    trained = pretrained.data
    return data, dataclasses.replace(data.spec, mean=trained.mean, std=trained.std)


def _model_spec(
    args: argparse.Namespace, pretrained: Pretrained | None, data: DataSpec
) -> ModelSpec:
    """The architecture: as the checkpoint says, else as the flags say."""
    from core.models.building import DEFAULT_POOL_KERNEL, ModelSpec, default_stem

    size = data.shape[1]
    kernel = args.kernel_size_of_maxpool
    described = None if pretrained is None else pretrained.model
    if described is None:
        return ModelSpec(
            arch=args.arch,
            n_classes=data.n_classes,
            image_size=size,
            stem=default_stem(size) if args.stem == "auto" else args.stem,
            width=args.width,
            pool_kernel=kernel,
            norm=args.norm or "batch",
        )
    _check_described(args, described)
    return dataclasses.replace(
        described,
        n_classes=data.n_classes,
        image_size=size,
        pool_kernel=described.pool_kernel if kernel == DEFAULT_POOL_KERNEL else kernel,
    )


def _check_described(args: argparse.Namespace, described: ModelSpec) -> None:
    """Refuse flags that contradict what the checkpoint says about its model."""
    given = {
        "--arch": None if args.arch == "resnet18" else args.arch,
        "--stem": None if args.stem == "auto" else args.stem,
        "--width": args.width,
        "--norm": args.norm,
    }
    for flag, value in given.items():
        stated = getattr(described, flag.removeprefix("--"))
        if value is not None and value != stated:
            raise InputError(f"{flag} {value}: the model in {args.pretrained} has {stated}")


def _suit_privacy(
    spec: ModelSpec, settings: ClientSettings, args: argparse.Namespace, process: Process
) -> tuple[ModelSpec, ClientSettings]:
    """Make per-sample gradients well defined: no layer may mix the images of a batch.

    An initial model gets GroupNorm, as in training with DP-SGD. Given parameters
    belong to BatchNorm, which then runs with its running statistics.
    """
    from core.models.building import skeleton_of
    from gradients.batch_statistics import batch_norm_layers
    from gradients.private_gradient import PER_SAMPLE

    privacy = settings.privacy
    per_sample = privacy is not None and privacy.clipping == PER_SAMPLE
    if not (per_sample and settings.train_mode and batch_norm_layers(skeleton_of(spec))):
        return spec, settings
    if args.norm == "batch":
        raise InputError(
            "--norm batch with --enable-dp: train-mode BatchNorm mixes the images of a batch, so "
            "that none can be clipped alone; use --norm group, --model-eval or --dp-clipping batch"
        )
    if args.pretrained is None:
        _say(process, "per-sample clipping: BatchNorm is replaced by GroupNorm")
        return dataclasses.replace(spec, norm="group"), settings
    _say(process, "per-sample clipping: BatchNorm runs with its running statistics (eval mode)")
    return spec, dataclasses.replace(settings, train_mode=False)


def _say(process: Process, sentence: str) -> None:
    if process.is_main:
        print(sentence)


def _choose(args: argparse.Namespace, data: DataSets) -> list[int]:
    from gradients.client_batch import batch_indices, duplicate_label_indices

    duplicates = args.duplicates or (LABEL_DUPLICATES if args.duplicate_label else None)
    images = data.train_plain
    if duplicates is None:
        return batch_indices(len(images), args.batch_size, args.target_idx, args.seed)
    return duplicate_label_indices(
        images.labels, args.batch_size, duplicates, args.target_idx, args.seed
    )


def _rank_analysis(
    model: nn.Module, data: DataSpec, args: argparse.Namespace, process: Process
) -> list[LayerRank]:
    if not args.ra or not process.is_main:
        return []
    from gradients.rank_analysis import format_table, rank_analysis

    layers = rank_analysis(model, data.shape, args.batch_size)
    print(format_table(layers))
    return layers
