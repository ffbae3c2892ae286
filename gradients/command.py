"""The stage 2 command: take a client's batch, compute what it shares, write it."""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.clipping import CLIPPINGS, PER_SAMPLE, clipping_argument
from core.errors import InputError, exit_status
from core.launch_arguments import (
    CommandParser,
    LaunchSettings,
    add_launch_arguments,
    add_own_client_arguments,
    add_text_arguments,
    given_flags,
)
from core.plugins import import_plugin
from core.reading import check_name

if TYPE_CHECKING:
    from core.local_training import LocalTraining
    from gradients.client import ClientSettings
    from gradients.settings import ExtractSettings, ModelSettings
    from gradients.sums import Aggregation

DEFAULT_RESULTS = "results/gradients"
LABEL_DUPLICATES = 4
# What `--local` says in one word.
LOCAL_FLAGS = (
    "epochs",
    "lr",
    "local_epochs",
    "local_batches",
    "local_momentum",
    "local_weight_decay",
)


def build_parser() -> argparse.ArgumentParser:
    """The command line of stage 2."""
    parser = CommandParser(
        prog="get_gradients.py",
        description="Compute what a client of federated learning shares for one batch.",
    )
    _add_data_arguments(parser)
    _add_model_arguments(parser)
    add_own_client_arguments(parser)
    _add_client_arguments(parser)
    _add_defense_arguments(parser)
    add_launch_arguments(parser)
    return parser


def _add_data_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("data and files")
    group.add_argument("--id", default="test", help="first part of the file name")
    group.add_argument("--results", default=DEFAULT_RESULTS, metavar="DIR", help="where to write")
    group.add_argument(
        "--data",
        metavar="DIR",
        help="folder with images, built-in name, a table (randhie, fair, breast_cancer, diabetes, "
        "FILE.csv), pydoc-topics, a text file or folder of texts, or MODULE:FUNCTION that gives "
        "your own samples",
    )
    add_text_arguments(group)
    group.add_argument("--data-name", help="imagenet, cifar100, svhn, celeba, ...")
    group.add_argument("--data-root", metavar="DIR", help="where a built-in data set lies")
    group.add_argument("--split-seed", type=int, default=0, help="as in training")
    group.add_argument("-j", "--workers", type=int, default=4, help="threads that read images")
    group.add_argument("-b", "--batch-size", type=int, default=32, help="images of the client")
    group.add_argument("--target-idx", type=int, default=0, help="which batch of the data set")
    group.add_argument(
        "--aggregate",
        type=int,
        default=1,
        metavar="K",
        help="share the mean update of K clients with -b images each, as a server sees it under "
        "secure aggregation",
    )
    group.add_argument(
        "--participants",
        metavar="I,J,...",
        help="which of the K clients take part in this round, from 0 (default: all)",
    )
    group.add_argument(
        "--reveal-from",
        type=int,
        default=1,
        metavar="T",
        help="of the sum, reveal the elements alone that T clients or more contribute to",
    )
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
        help="a malicious server sends a changed model: imprint:BINS, loki:BINS[:CLIENTS] (told "
        "apart under --aggregate), ares:BINS (of a hidden layer), trap:RECORDS (that shall "
        "activate a neuron of the first layer), eggv:STEPS (of a training), fishing:CLASS, or "
        "fishing-feature:CLASS[:FEATURE[:CUT]] (FEATURE: a number or logit, the default; images "
        "of the class pass below CUT, by default where one of the batch is expected); of a "
        "language model imprint:BINS or decepticons:FEATURES (that name a sentence)",
    )


def _add_client_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("local training")
    group.add_argument(
        "--epochs",
        type=int,
        default=1,
        help="number of local iterations: the images are split into that many batches, one per "
        "step; the published name of --local-batches",
    )
    group.add_argument("--lr", type=float, default=0.1, help="local learning rate")
    group.add_argument(
        "--local-epochs", type=int, default=1, help="passes over all the client's images"
    )
    group.add_argument(
        "--local-batches", type=int, help="batches per local epoch (default: as --epochs says)"
    )
    group.add_argument("--local-momentum", type=float, default=0.0)
    group.add_argument("--local-weight-decay", type=float, default=0.0)
    group.add_argument(
        "--local",
        default="",
        metavar="WORDS",
        help="the whole local training in place of the flags above, e.g. "
        '"adamw lr=1e-3 weight-decay=0.01 epochs=2 batch-size=8"; see docs/attack-my-model.md',
    )
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
    group.add_argument(
        "--dp-clipping",
        type=clipping_argument,
        metavar=f"{{{','.join(CLIPPINGS)}}}",
        default=PER_SAMPLE,
        help="what is clipped; batch: the published variant, whose noise is sigma C on the mean "
        "gradient and not sigma C / B, and which gives no guarantee",
    )
    group.add_argument(
        "--plugin", metavar="MODULE", help="imported first; may register defenses and models"
    )
    group.add_argument(
        "--defense",
        default="",
        metavar="NAME:PARAM,...",
        help="in order of application, e.g. clip:1,gaussian:0.01; names: ats (policies), censor "
        "(trials, seed, projection), clip (norm), dcs2 (iterations, share), enclave (layers), "
        "freeze (free layers: their number, or names joined by +), gaussian (std), graddefense "
        "(slices, perturbed, scale), instahide (mixed), laplace (scale), layerdrop (share), mixup "
        "(alpha), outpost (noise, prune, phi), percentile-noise (sigma0, percentile), precode "
        "(size, beta), prune (fraction), quantize (levels), refiner (weight, iterations, share), "
        "shadow (std, area), sign, soteria (fraction), svdefense (energy), topk (share)",
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    return exit_status(lambda: run(argv))


def run(argv: Sequence[str] | None = None) -> None:
    """Parse, check, launch.

    Raises:
        InputError: One sentence on what is wrong with the command line or a file.
    """
    parser = build_parser()
    args = parser.parse_args(argv)
    import_plugin(args.plugin)
    check_arguments(args)
    settings = extract_settings(args, given_flags(parser, argv))

    from core.processes.launch import check_launch, launch, processes_of
    from gradients.client import resolve_shards
    from gradients.extract import extract
    from gradients.local_update import images_of_steps
    from gradients.sums import check_alone

    launched = LaunchSettings.from_arguments(args)
    check_launch(launched)
    processes = processes_of(launched)
    if settings.aggregation.sums:
        check_alone(settings.client, processes)
    shards = resolve_shards(settings.batch.size, settings.client, processes)
    images_of_steps(settings.batch.size, settings.client.local, shards)
    launch(extract, launched, settings)


def check_arguments(args: argparse.Namespace) -> None:
    """Refuse what cannot work before any work is done."""
    if args.data is None and args.data_name is None:
        raise InputError("--data: give a folder with images or a built-in name (photo-patches)")
    check_name(args.id, "--id", "part of a file name")
    if args.data_name is not None:
        check_name(args.data_name, "--data-name", "part of a file name")
    for flag in ("batch_size", "epochs", "local_epochs", "local_batches", "duplicates"):
        if getattr(args, flag) is not None and getattr(args, flag) < 1:
            raise InputError(f"--{flag.replace('_', '-')} must be at least 1")
    if args.local_batches is not None and args.epochs not in (1, args.local_batches):
        raise InputError(
            f"--epochs {args.epochs} and --local-batches {args.local_batches}: both say into how "
            "many batches the images are split; passes over all of them are --local-epochs"
        )
    if args.tokens < 2:
        raise InputError("--tokens must be at least 2")
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


def extract_settings(args: argparse.Namespace, given: Mapping[str, Any]) -> ExtractSettings:
    """The flags as one typed record, which every process gets.

    Args:
        args: All flags, with their defaults.
        given: The flags that the command line really states.

    Raises:
        InputError: A defense, a privacy setting or the shards are not understood.
    """
    from gradients.settings import BatchSettings, DataSettings, ExtractSettings

    return ExtractSettings(
        folder=Path(args.results),
        data=DataSettings(
            data=args.data or args.data_name,
            name=args.data_name,
            root=args.data_root,
            image_size=args.image_size,
            split_seed=args.split_seed,
            workers=args.workers,
            tokens=args.tokens,
            shortest=args.shortest,
        ),
        batch=BatchSettings(
            size=args.batch_size,
            index=args.target_idx,
            duplicates=args.duplicates or (LABEL_DUPLICATES if args.duplicate_label else None),
        ),
        model=_model_settings(args, given),
        client=_client_settings(args, given),
        aggregation=_aggregation(args),
        id=args.id,
        seed=args.seed,
        rank_analysis=args.ra,
        plugin=args.plugin,
        arguments=vars(args),
    )


def _model_settings(args: argparse.Namespace, given: Mapping[str, Any]) -> ModelSettings:
    """What the flags say of the model: a checkpoint says more, unless a flag is given."""
    from gradients.settings import ModelSettings

    return ModelSettings(
        arch=given.get("arch"),
        pretrained=args.pretrained,
        outlayer_state=args.outlayer_state,
        stem=None if args.stem == "auto" else args.stem,
        width=args.width,
        norm=args.norm,
        pool_kernel=given.get("kernel_size_of_maxpool"),
        malicious=args.malicious,
        double=args.double,
        builder=args.model,
    )


def _local_training(args: argparse.Namespace, given: Mapping[str, Any]) -> LocalTraining:
    from core.local_training import LocalTraining

    if not args.local:
        return LocalTraining(
            epochs=args.local_epochs,
            batches=args.local_batches or args.epochs,
            lr=args.lr,
            momentum=args.local_momentum,
            weight_decay=args.local_weight_decay,
        )
    twice = [name for name in LOCAL_FLAGS if name in given]
    if twice:
        flag = twice[0].replace("_", "-")
        raise InputError(f"--{flag} and --local both state the local training; give one")
    try:
        return LocalTraining.parse(args.local, args.batch_size)
    except InputError as error:
        raise InputError(f"--local: {error}") from None


def _client_settings(args: argparse.Namespace, given: Mapping[str, Any]) -> ClientSettings:
    from core.client import loss_named
    from core.processes.distributed import derived_seed
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
        local=_local_training(args, given),
        train_mode=not args.model_eval,
        shards=_parse_shards(args.shards),
        synchronized=args.syncbn,
        privacy=privacy,
        defenses=parse_defenses(args.defense),
        # Another batch meets other noise; the first one's is that of the seed itself.
        seed=derived_seed(args.seed, args.target_idx) if args.target_idx else args.seed,
        dropout_seed=args.seed if args.dropout_seed is None else args.dropout_seed,
        share_running=args.share_running,
        loss=loss_named(args.loss),
    )


def _aggregation(args: argparse.Namespace) -> Aggregation:
    from gradients.sums import Aggregation

    try:
        present = tuple(int(n) for n in (args.participants or "").split(",") if n)
    except ValueError:
        raise InputError(
            f"--participants {args.participants}: expected numbers separated by commas"
        ) from None
    return Aggregation(args.aggregate, present, args.reveal_from)


def _parse_shards(text: str | None) -> tuple[int, ...]:
    try:
        return tuple(int(n) for n in text.split(",")) if text else ()
    except ValueError:
        raise InputError(f"--shards {text}: expected numbers separated by commas") from None
