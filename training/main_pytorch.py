"""Stage 1 command: train a classifier under a defense scheme.

python training/main_pytorch.py --scheme GH --data photo-patches --result-root results/GH
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __name__ == "__main__":
    # As a script, Python puts this file's folder first; the rooms lie one above.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from core.errors import InputError, exit_status
from core.plugins import import_plugin

if TYPE_CHECKING:
    from torch import nn

    from core.data.data_sets import DataSets
    from core.models.building import ModelSpec
    from core.processes.distributed import Process
    from training.trainer import Trainer, TrainingConfig


def build_parser() -> argparse.ArgumentParser:
    """The command line; defaults are the published ones."""
    from core.launch_arguments import CommandParser, add_launch_arguments
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
    _add_training_arguments(parser)
    _add_privacy_arguments(parser)
    _add_speed_arguments(parser)
    add_launch_arguments(parser)
    return parser


def _add_data_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("data")
    group.add_argument(
        "--data",
        default="photo-patches",
        metavar="DIR",
        help="folder with train/ and val/, folder of class folders, .json list or built-in name",
    )
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
        choices=["sample", "batch"],
        default="sample",
        help="batch: the paper's variant, which gives no guarantee",
    )


def _add_speed_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("speed")
    group.add_argument("--amp", choices=["bf16", "fp16"], default=None)
    group.add_argument("--channels-last", action="store_true")
    group.add_argument("--compile", action="store_true")
    group.add_argument("--no-tf32", action="store_true", help="full float32 on CUDA")


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse a command line; a scheme changes defaults, explicit flags win."""
    from training.schemes import CUSTOM, get_scheme

    parser = build_parser()
    chosen, _ = parser.parse_known_args(argv)
    import_plugin(chosen.plugin)
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
    if args.enable_dp and args.dp_clipping == "sample" and (args.compile or args.amp):
        raise InputError("--compile and --amp cannot be combined with per-sample clipping")


def _flag(name: str) -> str:
    """How the user spells an argument."""
    return {"max_per_sample_grad_norm": "--max-per-sample-grad_norm", "weight_decay": "--wd"}.get(
        name, f"--{name.replace('_', '-')}"
    )


def model_spec(args: argparse.Namespace, data: DataSets) -> ModelSpec:
    """The architecture that the flags and the data ask for."""
    from core.models.building import ModelSpec, default_stem

    size = data.spec.shape[1]
    per_sample = args.enable_dp and args.dp_clipping == "sample"
    return ModelSpec(
        arch=args.arch,
        n_classes=data.spec.n_classes,
        image_size=size,
        stem=default_stem(size) if args.stem == "auto" else args.stem,
        width=args.width,
        pool_kernel=args.kernel_size_of_maxpool,
        norm=("group" if per_sample else "batch") if args.norm == "auto" else args.norm,
    )


def training_config(args: argparse.Namespace) -> TrainingConfig:
    """The flags as the trainer's configuration."""
    from training.trainer import TrainingConfig

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
        synchronized=args.syncbn,
        amp=args.amp,
        channels_last=args.channels_last,
        compile=args.compile,
        save_every=args.save_every,
        tensorboard=not args.no_tensorboard,
    )


def build_client_model(args: argparse.Namespace, spec: ModelSpec, process: Process) -> nn.Module:
    """The model of one process: initialised, BatchNorm converted, on its device."""
    import torch

    from core.models.batch_norm import convert_batch_norm
    from core.models.building import build_model

    # Every process draws the same initial parameters.
    model = build_model(spec)
    if args.bn_groups:
        model = convert_batch_norm(model, "grouped", groups=args.bn_groups)
    elif args.syncbn and process.world_size > 1:
        model = _synchronized(model, args.bn_backend, process)
    model = model.to(process.device)
    return model.to(memory_format=torch.channels_last) if args.channels_last else model


def _synchronized(model: nn.Module, backend: str, process: Process) -> nn.Module:
    import torch

    from core.models.batch_norm import convert_batch_norm

    nccl = torch.distributed.get_backend() == "nccl"
    if backend == "torch" and process.device.type != "cuda":
        raise InputError("--bn-backend torch needs CUDA; use --bn-backend own")
    if backend == "apex":
        return _apex_synchronized(model)
    if backend == "torch" or (backend == "auto" and nccl):
        return torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return convert_batch_norm(model, "synchronized")


def _apex_synchronized(model: nn.Module) -> nn.Module:
    try:
        from apex.parallel import convert_syncbn_model
    except ImportError:
        raise InputError(
            "--bn-backend apex: NVIDIA Apex is not installed; use --bn-backend torch"
        ) from None
    return convert_syncbn_model(model)


def load_pretrained(model: nn.Module, args: argparse.Namespace) -> None:
    """Load the parameters that `--pretrained` names into a model, in place.

    Raises:
        InputError: They cannot be had, or do not fit.
    """
    from core.models.building import counts_batches, load_parameters
    from core.storage import load_checkpoint

    if args.pretrained == "torchvision":
        state = _torchvision_weights(args.arch)
    else:
        raw = load_checkpoint(args.pretrained, "--pretrained")
        state = raw.get("state_dict", raw)
    state = {str(name).removeprefix("module."): value for name, value in state.items()}
    own = model.state_dict()
    # Another number of classes: the last layer is trained anew.
    fitting = {n: v for n, v in state.items() if n in own and v.shape == own[n].shape}
    if not any(name in fitting for name, _ in model.named_parameters()):
        raise InputError(f"--pretrained {args.pretrained}: no parameter fits --arch {args.arch}")
    load_parameters(model, own | fitting)
    skipped = sorted(n for n in set(own) - set(fitting) if not counts_batches(n))
    if skipped:
        logging.getLogger(__name__).warning(
            "--pretrained: %d tensors do not fit and keep their initialisation (%s, ...)",
            len(skipped),
            skipped[0],
        )


def _torchvision_weights(arch: str) -> dict[str, Any]:
    import torchvision

    try:
        weights = torchvision.models.get_model_weights(arch).DEFAULT
        return weights.get_state_dict(progress=False)
    except (OSError, ValueError) as error:
        raise InputError(
            f"--pretrained: torchvision's weights of {arch} cannot be fetched here ({error}); "
            "give the path of a file instead: --pretrained PATH"
        ) from None


def prepare_root(args: argparse.Namespace) -> Path | None:
    """The checkpoint to continue from, if any; refuses to mix two runs in one folder.

    Raises:
        InputError: The folder holds another run, or the checkpoint does not exist.
    """
    from training.trainer import checkpoints, latest_checkpoint

    root = Path(args.result_root)
    if root.exists() and not root.is_dir():
        raise InputError(f"--result-root: {root} is a file, not a folder")
    _remove_unfinished_files(root)
    latest = latest_checkpoint(root)
    if args.resume == "auto":
        return latest
    if args.resume:
        if not Path(args.resume).exists():
            raise InputError(f"--resume: there is no file {args.resume}")
        return Path(args.resume)
    if latest is not None and not args.evaluate:
        if not args.overwrite:
            raise InputError(
                f"--result-root: {root} holds a run already ({latest.name}); continue it with "
                "--resume auto, discard it with --overwrite, or choose another folder"
            )
        for path in checkpoints(root):
            path.unlink()
    return None


def _remove_unfinished_files(root: Path) -> None:
    """Half-written files of a run that was killed while it saved."""
    for path in root.glob(".*.pth.tar.*"):
        path.unlink()


def work(process: Process, args: argparse.Namespace) -> None:
    """What every process does."""
    import_plugin(args.plugin)
    logging.basicConfig(
        level=logging.INFO if process.is_main else logging.ERROR, format="%(message)s"
    )
    with _product_precision(tf32=not args.no_tf32):
        _train(process, args)


@contextlib.contextmanager
def _product_precision(*, tf32: bool) -> Iterator[None]:
    """Within the block, float32 products may use TF32; whoever called gets its setting back."""
    import torch

    held = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = tf32
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(held[0])
        torch.backends.cudnn.allow_tf32 = held[1]


def _train(process: Process, args: argparse.Namespace) -> None:
    from core.data.data_sets import load_data
    from core.processes.distributed import barrier
    from training.trainer import Trainer

    data = load_data(
        args.data,
        image_size=args.image_size,
        seed=args.seed,
        root=args.data_root,
        name=args.data_name,
        split_seed=args.split_seed,
    )
    spec = model_spec(args, data)
    model = build_client_model(args, spec, process)
    if args.pretrained:
        load_pretrained(model, args)
    trainer = Trainer(
        model, spec, data, training_config(args), process, Path(args.result_root), args
    )
    checkpoint = _agreed(prepare_root(args) if process.is_main else None)
    if checkpoint is not None:
        trainer.resume(checkpoint)
    trainer.epoch = args.start_epoch or trainer.epoch
    barrier()
    if args.evaluate:
        _evaluate(trainer)
        return
    _announce(args, trainer)
    trainer.fit()
    _conclude(trainer)


def _agreed(checkpoint: Path | None) -> Path | None:
    """Rank 0's choice on every process: the others must not look at a changing folder."""
    from core.processes.distributed import broadcast_object

    chosen = broadcast_object(None if checkpoint is None else str(checkpoint))
    return None if chosen is None else Path(chosen)


def _evaluate(trainer: Trainer) -> None:
    loss, acc1 = trainer.validate()
    if trainer.process.is_main:
        print(f"validation loss {loss:.4f} acc1 {acc1:.2f} (epoch {trainer.epoch})")


def _announce(args: argparse.Namespace, trainer: Trainer) -> None:
    log, process = logging.getLogger(__name__), trainer.process
    spec = trainer.data.spec
    norm = trainer.model_spec.norm
    if norm == "batch":
        norm = "synchronized BatchNorm" if args.syncbn else "asynchronous BatchNorm"
    log.info(
        "scheme %s: %s on %s (%d training, %d validation images of %d classes), %s, batch %d, "
        "%d process(es) on %s",
        args.scheme,
        args.arch,
        spec.name,
        trainer.n,
        len(trainer.data.val),
        spec.n_classes,
        norm,
        args.batch_size,
        process.world_size,
        process.device.type,
    )
    _announce_pooling(trainer)
    if args.scheme == "GH" and process.world_size == 1 and not args.bn_groups:
        log.warning(
            "GH on one process: asynchronous BatchNorm is plain BatchNorm of the whole batch; "
            "use --multiprocessing-distributed --nproc-per-node N, or --bn-groups N"
        )
    if args.enable_dp and args.dp_clipping == "batch":
        log.warning("--dp-clipping batch clips the mean gradient: it gives no privacy guarantee")
    if trainer.accountant is not None:
        planned = trainer.accountant.planned(trainer.config.epochs * len(trainer.batches))
        log.info("after all epochs: %s", planned.sentence(args.sigma))
    if trainer.epoch:
        log.info("continuing after epoch %d", trainer.epoch)


def _announce_pooling(trainer: Trainer) -> None:
    """Say so where the kernel of the RA defense is scaled to a small feature map."""
    import torch

    from training.schemes import DEFAULT_POOL_KERNEL

    asked = trainer.model_spec.pool_kernel
    if asked == DEFAULT_POOL_KERNEL:
        return
    pools = (m for m in trainer.model.modules() if isinstance(m, torch.nn.MaxPool2d))
    actual = getattr(next(pools, None), "kernel_size", asked)
    if actual != asked:
        logging.getLogger(__name__).info(
            "max-pooling kernel %s (for 224 px images) becomes %s at this resolution", asked, actual
        )


def _conclude(trainer: Trainer) -> None:
    if not trainer.process.is_main:
        return
    if trainer.accountant is not None:
        spent = trainer.accountant.epsilon()
        print(spent.sentence(trainer.config.noise_multiplier))
    reached = f"best validation accuracy {trainer.best_acc1:.2f} %"
    if not trainer.history:
        reached = "no epoch was trained"
    print(f"{trainer.config.scheme}: {reached}, results in {trainer.root}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    return exit_status(lambda: run(argv))


def run(argv: Sequence[str] | None = None) -> None:
    """Parse, check, launch."""
    args = parse_args(argv)
    check_arguments(args)
    from core.launch_arguments import LaunchSettings
    from core.processes.launch import launch

    launch(work, LaunchSettings.from_arguments(args), args)


if __name__ == "__main__":
    sys.exit(main())
