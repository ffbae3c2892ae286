"""Stage 1 command: train a classifier under a defense scheme.

python training/main_pytorch.py --scheme GH --data photo-patches --result-root results/GH
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if __name__ == "__main__":
    # As a script, Python puts this file's folder first; the rooms lie one above.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from core.clipping import CLIPPINGS, PER_SAMPLE, clipping_argument
from core.errors import InputError, exit_status
from core.launch_arguments import (
    CommandParser,
    LaunchSettings,
    add_launch_arguments,
    add_own_client_arguments,
    add_text_arguments,
)
from core.plugins import import_plugin

if TYPE_CHECKING:
    from training.settings import Federation, RunSettings, TrainingConfig


def build_parser() -> argparse.ArgumentParser:
    """The command line; defaults are the published ones."""
    from training.schemes import CUSTOM

    parser = CommandParser(
        prog="training/main_pytorch.py",
        description="Train a classifier under a defense scheme.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--scheme",
        default=CUSTOM,
        metavar="{None,pure,RA,DP-SGD,GH}",
        help="defense scheme; sets batch size, BatchNorm, pooling and privacy "
        "unless their flags are given",
    )
    parser.add_argument(
        "--plugin", default=None, metavar="MODULE", help="imported first; may register schemes"
    )
    parser.add_argument(
        "--result-root", default=None, metavar="DIR", help="default: results/training/SCHEME"
    )
    _add_data_arguments(parser)
    _add_model_arguments(parser)
    add_own_client_arguments(parser)
    _add_training_arguments(parser)
    _add_privacy_arguments(parser)
    _add_federation_arguments(parser)
    _add_speed_arguments(parser)
    add_launch_arguments(parser)
    return parser


def _add_data_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("data")
    group.add_argument(
        "--data",
        default="photo-patches",
        metavar="DIR",
        help="folder with train/ and val/, folder of class folders, .json list, built-in name, a "
        "table (randhie, fair, breast_cancer, diabetes, FILE.csv; --arch mlp by default), "
        "pydoc-topics or a text file or folder of texts, or MODULE:FUNCTION that gives your own "
        "samples",
    )
    add_text_arguments(group)
    group.add_argument("--data-root", default=None, metavar="DIR", help="files of a built-in set")
    group.add_argument("--data-name", default=None, help="name of the data set in --data")
    group.add_argument("--image-size", type=int, default=None, help="side in pixels")
    group.add_argument("--split-seed", type=int, default=0, help="seed of a held-out validation")
    group.add_argument("-j", "--workers", type=int, default=4, help="over all processes")


def _add_model_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument("-a", "--arch", default="resnet18")
    group.add_argument("--stem", choices=["auto", "imagenet", "cifar"], default="auto")
    group.add_argument("--width", type=int, default=None, help="channels of the first stage")
    group.add_argument(
        "--norm",
        choices=["auto", "batch", "group"],
        default="auto",
        help="auto: group for DP-SGD per sample, else batch",
    )
    group.add_argument("--kernel-size-of-maxpool", type=int, default=3, metavar="K")
    group.add_argument("--syncbn", action="store_true", help="synchronize BatchNorm")
    group.add_argument(
        "--bn-groups",
        type=int,
        default=None,
        metavar="N",
        help="asynchronous BatchNorm of N groups",
    )
    group.add_argument("--bn-backend", choices=["auto", "own", "torch", "apex"], default="auto")
    group.add_argument(
        "--pretrained",
        nargs="?",
        const="torchvision",
        default=None,
        metavar="PATH",
        help="start from these parameters (no PATH: torchvision's)",
    )


def _add_training_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("training")
    group.add_argument("--epochs", type=int, default=90)
    group.add_argument("--start-epoch", type=int, default=0)
    group.add_argument("-b", "--batch-size", type=int, default=128, help="over all processes")
    group.add_argument("--lr", "--learning-rate", type=float, default=0.1)
    group.add_argument("--momentum", type=float, default=0.9)
    group.add_argument("--wd", "--weight-decay", type=float, default=1e-4, dest="weight_decay")
    group.add_argument("--lr-schedule", choices=["step", "cosine"], default="step")
    group.add_argument(
        "--lr-step", type=int, default=30, help="epochs per drop of the step schedule"
    )
    group.add_argument("--warmup-epochs", type=int, default=0)
    group.add_argument("--accumulate", type=int, default=1, help="parts of a shard")
    group.add_argument(
        "--resume", default="", metavar="PATH", help="checkpoint, or auto: the latest if any"
    )
    group.add_argument("--overwrite", action="store_true", help="discard an earlier run's results")
    group.add_argument(
        "--save-every", type=int, default=10, help="keep every Nth epoch's checkpoint"
    )
    group.add_argument("--no-tensorboard", action="store_true")
    group.add_argument("-e", "--evaluate", action="store_true", help="validate only")


def _add_privacy_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("differential privacy")
    group.add_argument("--enable_dp", "--enable-dp", action="store_true")
    group.add_argument("--sigma", type=float, default=0.01, help="noise multiplier")
    group.add_argument("-c", "--max-per-sample-grad_norm", type=float, default=1.0)
    group.add_argument("--delta", type=float, default=1e-5)
    group.add_argument(
        "--dp-clipping",
        type=clipping_argument,
        metavar=f"{{{','.join(CLIPPINGS)}}}",
        default=PER_SAMPLE,
        help="what is clipped; batch: the published variant, whose noise is sigma C on the mean "
        "gradient and not sigma C / B, and which gives no guarantee",
    )


def _add_federation_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("federation")
    group.add_argument(
        "--clients",
        type=int,
        default=None,
        metavar="K",
        help="train K clients in rounds; the server averages their updates. -b is the images of "
        "all clients together in one local step; default: all images in one place",
    )
    group.add_argument(
        "--defense",
        default="",
        metavar="NAME:PARAM[,...]",
        help="what every client does to its update, as --defense of training/get_gradients.py",
    )
    group.add_argument(
        "--local-steps", type=int, default=1, metavar="N", help="between two rounds; 1 is FedSGD"
    )
    group.add_argument(
        "--rounds-per-epoch",
        type=int,
        default=None,
        metavar="N",
        help="default: until the clients have gone through as many images as there are",
    )
    group.add_argument("--split", default="iid", metavar="{iid,dirichlet:ALPHA}")
    group.add_argument(
        "--error-feedback",
        default=None,
        choices=["ef-sgd", "dgc"],
        help="what a defense drops is added to the client's next update; ef-sgd: Karimireddy et "
        "al., dgc: momentum at the clients, Lin et al. (Deep Gradient Compression)",
    )


def _add_speed_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("speed")
    group.add_argument("--amp", choices=["bf16", "fp16"], default=None)
    group.add_argument("--channels-last", action="store_true")
    group.add_argument("--compile", action="store_true")
    group.add_argument("--no-tf32", action="store_true", help="full float32 on CUDA")


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse a command line; a scheme and a table change defaults, explicit flags win."""
    from core.data.records import is_table
    from core.models.building import RECORDS_ARCH
    from training.schemes import CUSTOM, get_scheme

    parser = build_parser()
    chosen, _ = parser.parse_known_args(argv)
    import_plugin(chosen.plugin)
    if is_table(chosen.data):
        parser.set_defaults(arch=RECORDS_ARCH)
    if chosen.scheme != CUSTOM:
        parser.set_defaults(**get_scheme(chosen.scheme).defaults())
    args = parser.parse_args(argv)
    if args.result_root is None:
        args.result_root = str(Path("results") / "training" / args.scheme)
    return args


def check_arguments(args: argparse.Namespace) -> None:
    """Refuse impossible settings before any work.

    Raises:
        InputError: With the flag to change.
    """
    from core.models.building import model_names

    if args.arch not in model_names():
        raise InputError(f"--arch {args.arch}: unknown architecture (see torchvision.models)")
    minima = {"epochs": 0, "batch_size": 1, "workers": 0, "accumulate": 1, "save_every": 1}
    minima |= {"lr_step": 1, "warmup_epochs": 0, "kernel_size_of_maxpool": 1, "start_epoch": 0}
    minima |= {"clients": 1, "local_steps": 1, "rounds_per_epoch": 1}
    minima |= {"width": 1, "bn_groups": 1, "momentum": 0, "weight_decay": 0, "sigma": 0}
    for name, least in minima.items():
        value = getattr(args, name)
        # NaN and infinity are no settings either.
        if value is not None and not least <= value < math.inf:
            raise InputError(f"{_flag(name)} must be at least {least}, not {value}")
    for name in ("lr", "max_per_sample_grad_norm"):
        if not 0 < getattr(args, name) < math.inf:
            raise InputError(f"{_flag(name)} must be positive, not {getattr(args, name)}")
    if not 0 < args.delta < 1:
        raise InputError("--delta must lie between 0 and 1")
    if args.enable_dp and args.dp_clipping == PER_SAMPLE and (args.compile or args.amp):
        raise InputError("--compile and --amp cannot be combined with per-sample clipping")
    _check_federation(args)


def _check_federation(args: argparse.Namespace) -> None:
    """Refuse what only clients have where there are none, and what clients cannot do."""
    if args.clients is None:
        given = {
            "--defense": args.defense,
            "--local-steps": args.local_steps != 1,
            "--rounds-per-epoch": args.rounds_per_epoch,
            "--split": args.split != "iid",
            "--error-feedback": args.error_feedback,
        }
        for flag in (flag for flag, value in given.items() if value):
            raise InputError(f"{flag} needs --clients: it says what each of several clients does")
        return
    from training.transforms import transform_of

    transform_of(args.defense)
    _federation(args).check()
    if args.batch_size < args.clients:
        raise InputError(
            f"--batch-size {args.batch_size}: is of all clients together, and there are "
            f"{args.clients}"
        )
    for flag, value in (
        ("--amp", args.amp),
        ("--compile", args.compile),
        ("--accumulate", args.accumulate > 1),
        ("--dp-clipping batch", args.enable_dp and args.dp_clipping != PER_SAMPLE),
    ):
        if value:
            raise InputError(f"{flag} cannot be combined with --clients")


def _check_parts(args: argparse.Namespace, processes: int) -> None:
    """Refuse batches that cannot be divided, before processes are started.

    The number of images, which decides for batches that are not full, is not known yet.
    """
    if args.clients is not None:
        if args.clients < processes:
            raise InputError(f"--clients {args.clients}: fewer than the {processes} processes")
        return
    parts = processes * args.accumulate
    per_sample = args.enable_dp and args.dp_clipping == PER_SAMPLE
    if args.batch_size < parts and not per_sample:
        raise InputError(
            f"--batch-size {args.batch_size}: cannot be divided into {parts} parts (processes x "
            "accumulation steps)"
        )


def _flag(name: str) -> str:
    """How the user spells an argument."""
    return {"max_per_sample_grad_norm": "--max-per-sample-grad_norm", "weight_decay": "--wd"}.get(
        name, f"--{name.replace('_', '-')}"
    )


def run_settings(args: argparse.Namespace) -> RunSettings:
    """The flags as one typed record, which every process gets."""
    from training.settings import DataSettings, ModelSettings, RunSettings

    return RunSettings(
        root=Path(args.result_root),
        data=DataSettings(
            data=args.data,
            root=args.data_root,
            name=args.data_name,
            image_size=args.image_size,
            split_seed=args.split_seed,
            tokens=args.tokens,
            shortest=args.shortest,
        ),
        model=ModelSettings(
            arch=args.arch,
            stem=args.stem,
            width=args.width,
            norm=args.norm,
            pool_kernel=args.kernel_size_of_maxpool,
            bn_groups=args.bn_groups,
            bn_backend=args.bn_backend,
            pretrained=args.pretrained,
            builder=args.model,
        ),
        training=_training_config(args),
        loss=args.loss,
        resume=args.resume,
        overwrite=args.overwrite,
        start_epoch=args.start_epoch,
        evaluate=args.evaluate,
        tf32=not args.no_tf32,
        print_freq=args.print_freq,
        plugin=args.plugin,
        flags=vars(args),
    )


def _training_config(args: argparse.Namespace) -> TrainingConfig:
    from training.settings import TrainingConfig

    return TrainingConfig(
        scheme=args.scheme,
        epochs=args.epochs,
        batch_size=args.batch_size,
        lr=args.lr,
        momentum=args.momentum,
        weight_decay=args.weight_decay,
        lr_schedule=args.lr_schedule,
        lr_step=args.lr_step,
        warmup=args.warmup_epochs,
        accumulate=args.accumulate,
        workers=args.workers,
        seed=args.seed,
        dp=args.enable_dp,
        dp_clipping=args.dp_clipping,
        noise_multiplier=args.sigma,
        max_norm=args.max_per_sample_grad_norm,
        delta=args.delta,
        # A client normalises by its own batch, whatever process it is on.
        synchronized=args.syncbn and args.clients is None,
        amp=args.amp,
        channels_last=args.channels_last,
        compile=args.compile,
        save_every=args.save_every,
        tensorboard=not args.no_tensorboard,
        federation=None if args.clients is None else _federation(args),
    )


def _federation(args: argparse.Namespace) -> Federation:
    from training.settings import Federation

    return Federation(
        clients=args.clients,
        local_steps=args.local_steps,
        rounds_per_epoch=args.rounds_per_epoch,
        split=args.split,
        defense=args.defense,
        error_feedback=args.error_feedback,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    return exit_status(lambda: run(argv))


def run(argv: Sequence[str] | None = None) -> None:
    """Parse, check, launch."""
    args = parse_args(argv)
    check_arguments(args)
    from core.processes.launch import check_launch, launch, processes_of
    from training.run import check_root, run_training

    settings = LaunchSettings.from_arguments(args)
    check_launch(settings)
    _check_parts(args, processes_of(settings))
    if not args.evaluate:
        check_root(Path(args.result_root))
    launch(run_training, settings, run_settings(args))


if __name__ == "__main__":
    sys.exit(main())
