"""One run of stage 1 on every process: data, model, trainer, and the folder it writes to."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path

import torch

from core.client import check_fits, loss_named, named_data, refuse_own_data
from core.clipping import noise_sentence
from core.data.data_sets import DataSets, load_data
from core.data.records import is_table, load_table, table_data_sets
from core.errors import InputError
from core.escaping import log_to_terminal
from core.locks import LOCK_NAME, check_unlocked, locked, remove_left_behind
from core.losses import Loss, ignoring
from core.models.architecture import GivenModel
from core.models.building import DEFAULT_POOL_KERNEL
from core.models.kinds import BatchNorm
from core.models.own_model import own_architecture
from core.models.unchanged import in_mode
from core.plugins import import_plugin
from core.processes.distributed import Process, barrier, broadcast_object, seed_everything
from core.reading import check_regular
from training.checkpoints import (
    checkpoints,
    latest_checkpoint,
    remove_unfinished,
    usable_checkpoint,
)
from training.federated_rounds import FederatedTrainer
from training.initial_model import build_client_model, load_pretrained, model_spec
from training.schemes import get_scheme, scheme_names
from training.settings import DataSettings, RunSettings
from training.trainer import Trainer

logger = logging.getLogger(__name__)


def run_training(process: Process, settings: RunSettings) -> None:
    """Train, on one of the run's processes.

    Args:
        process: Rank, device and number of processes.
        settings: The same on every process.

    Raises:
        InputError: Something that was asked for cannot be done.
    """
    import_plugin(settings.plugin)
    # The first weights: a command has done so, a caller from Python may have drawn since.
    seed_everything(settings.training.seed)
    log_to_terminal(logging.INFO if process.is_main else logging.ERROR, "%(message)s")
    lock = contextlib.nullcontext() if settings.evaluate else _root_of_one_run(process, settings)
    with _product_precision(tf32=settings.tf32), lock:
        _train(process, settings)


def check_root(root: Path) -> None:
    """Refuse a folder that another training writes to, before processes are started.

    Args:
        root: Folder of checkpoints and records.

    Raises:
        InputError: Names the other run.
    """
    check_unlocked(root / LOCK_NAME, f"--result-root: {root}")


@contextlib.contextmanager
def _root_of_one_run(process: Process, settings: RunSettings) -> Iterator[None]:
    """Within the block no other training writes to the folder."""
    root = settings.root
    if not process.is_main or (root.exists() and not root.is_dir()):
        yield
        return
    with locked(root / LOCK_NAME, f"--result-root: {root}"):
        yield


@contextlib.contextmanager
def _product_precision(*, tf32: bool) -> Iterator[None]:
    """Within the block, float32 products may use TF32; whoever called gets its setting back."""
    held = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = tf32
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(held[0])
        torch.backends.cudnn.allow_tf32 = held[1]


def _train(process: Process, settings: RunSettings) -> None:
    trainer = _make_trainer(process, settings)
    checkpoint = _agreed(prepare_root(settings) if process.is_main else None)
    if checkpoint is not None:
        trainer.resume(checkpoint)
    trainer.epoch = settings.start_epoch or trainer.epoch
    barrier()
    if settings.evaluate:
        _evaluate(trainer)
        return
    _announce(settings, trainer)
    trainer.fit()
    _conclude(trainer)


def _make_trainer(process: Process, settings: RunSettings) -> Trainer:
    chosen, model_settings, config = settings.data, settings.model, settings.training
    loss = loss_named(settings.loss)
    own = own_architecture(model_settings.builder, config.seed)
    data = _load_data(chosen, own, loss, config.seed)
    architecture = own or model_spec(model_settings, data.spec, per_sample=config.per_sample)
    model = build_client_model(model_settings, config, architecture, process)
    if data.spec.columns is not None:
        _check_scheme_for_records(settings, model)
    if model_settings.pretrained:
        load_pretrained(model, model_settings.pretrained, architecture.name)
    kind = Trainer if config.federation is None else FederatedTrainer
    return kind(
        model,
        architecture,
        data,
        config,
        process,
        settings.root,
        flags=settings.flags,
        print_freq=settings.print_freq,
        loss=ignoring(loss, data.spec.pad),
    )


def _load_data(settings: DataSettings, own: GivenModel | None, loss: Loss, seed: int) -> DataSets:
    """The data set of a name or a folder, a table, or what the user's own code gives."""
    if own is None:
        refuse_own_data(settings.data)
    else:
        model = in_mode(own.build(), True)
        found = named_data(settings.data, settings.tokens, model, loss, seed, settings.shortest)
        if found is not None:
            return found
    if is_table(settings.data):
        table = load_table(settings.data, settings.root)
        data = table_data_sets(table, settings.split_seed)
    else:
        data = load_data(
            settings.data,
            image_size=settings.image_size,
            seed=seed,
            root=settings.root,
            name=settings.name,
            split_seed=settings.split_seed,
        )
    if own is not None:
        check_fits(in_mode(own.build(), True), data, loss)
    return data


def _check_scheme_for_records(settings: RunSettings, model: torch.nn.Module) -> None:
    """Refuse a scheme whose defense is a layer that the model for records has not.

    Raises:
        InputError: Names the scheme's flag.
    """
    kernel, name = settings.model.pool_kernel, settings.training.scheme
    if kernel != DEFAULT_POOL_KERNEL:
        raise InputError(
            f"--kernel-size-of-maxpool {kernel} (scheme RA): a model of records has no max-pooling "
            "layer; the schemes pure and DP-SGD train on tables"
        )
    apart = name in scheme_names()[1:] and get_scheme(name).batch_norm == "asynchronous"
    if apart and not any(isinstance(layer, BatchNorm) for layer in model.modules()):
        raise InputError(
            f"--scheme {name}: every process has BatchNorm statistics of its own, and this model "
            "has no BatchNorm; the schemes pure and DP-SGD train on tables, or give a --model with "
            "BatchNorm"
        )


def _agreed(checkpoint: Path | None) -> Path | None:
    """Rank 0's choice on every process: the others must not look at a changing folder."""
    chosen = broadcast_object(None if checkpoint is None else str(checkpoint))
    return None if chosen is None else Path(chosen)


def _evaluate(trainer: Trainer) -> None:
    loss, acc1, acc5 = trainer.validate()
    guesses = {"acc1": acc1, "acc5": acc5}
    accuracy = "".join(f" {k} {v:.2f}" for k, v in guesses.items() if v is not None)
    if trainer.process.is_main:
        print(f"validation loss {loss:.4f}{accuracy} (epoch {trainer.epoch})")


def _announce(settings: RunSettings, trainer: Trainer) -> None:
    process, config, spec = trainer.process, trainer.config, trainer.data.spec
    norm = str(trainer.architecture.describe().get("norm", "its own norm"))
    if norm == "batch" and not any(isinstance(m, BatchNorm) for m in trainer.model.modules()):
        norm = "no BatchNorm"
    elif norm == "batch":
        norm = "synchronized BatchNorm" if config.synchronized else "asynchronous BatchNorm"
    logger.info(
        "%s: %s on %s (%d training, %d validation %s of %d classes), %s, batch %d, "
        "%d process(es) on %s",
        config.called,
        trainer.architecture.name,
        spec.name,
        trainer.n,
        len(trainer.data.val),
        "images" if spec.columns is None else "records",
        spec.n_classes,
        norm,
        config.batch_size,
        process.world_size,
        process.device.type,
    )
    _announce_pooling(trainer)
    if config.scheme == "GH" and process.world_size == 1 and not settings.model.bn_groups:
        logger.warning(
            "GH on one process: asynchronous BatchNorm is plain BatchNorm of the whole batch; "
            "use --multiprocessing-distributed --nproc-per-node N, or --bn-groups N"
        )
    if config.dp:
        noise = (config.noise_multiplier, config.max_norm, config.batch_size)
        logger.info("%s", noise_sentence(config.dp_clipping, *noise))
    if config.dp and not config.per_sample:
        logger.warning("--dp-clipping batch clips the mean gradient: it gives no privacy guarantee")
    if trainer.accountant is not None:
        planned = trainer.accountant.planned(config.epochs * trainer.steps_per_epoch)
        logger.info("after all epochs: %s", planned.sentence(config.noise_multiplier))
    if trainer.epoch:
        logger.info("continuing after epoch %d", trainer.epoch)


def _announce_pooling(trainer: Trainer) -> None:
    """Say so where the kernel of the RA defense is scaled to a small feature map."""
    asked = trainer.architecture.describe().get("pool_kernel", DEFAULT_POOL_KERNEL)
    if asked == DEFAULT_POOL_KERNEL:
        return
    pools = (m for m in trainer.model.modules() if isinstance(m, torch.nn.MaxPool2d))
    actual = getattr(next(pools, None), "kernel_size", asked)
    if actual != asked:
        logger.info(
            "max-pooling kernel %s (for 224 px images) becomes %s at this resolution", asked, actual
        )


def _conclude(trainer: Trainer) -> None:
    if not trainer.process.is_main:
        return
    if trainer.accountant is not None:
        spent = trainer.accountant.epsilon()
        print(spent.sentence(trainer.config.noise_multiplier))
    print(f"{trainer.config.called}: {_reached(trainer)}, results in {trainer.root}")


def _reached(trainer: Trainer) -> str:
    """How good the best epoch was, in words."""
    if not trainer.history:
        return "no epoch was trained"
    if trainer.best_acc1 is None:
        return f"smallest validation loss {min(e.val_loss for e in trainer.history):.4g}"
    return f"best validation accuracy {trainer.best_acc1:.2f} %"


def prepare_root(settings: RunSettings) -> Path | None:
    """The checkpoint to continue from, if any; refuses to mix two runs in one folder.

    Args:
        settings: Of the run.

    Raises:
        InputError: The folder holds another run, or the checkpoint does not exist.
    """
    root = settings.root
    if root.exists() and not root.is_dir():
        raise InputError(f"--result-root: {root} is a file, not a folder")
    remove_unfinished(root)
    remove_left_behind(root)
    latest = latest_checkpoint(root)
    if settings.resume == "auto":
        return usable_checkpoint(root)
    if settings.resume:
        return check_regular(settings.resume, "--resume", "checkpoint file")
    if latest is not None and not settings.evaluate:
        if not settings.overwrite:
            raise InputError(
                f"--result-root: {root} holds a run already ({latest.name}); continue it with "
                "--resume auto, discard it with --overwrite, or choose another folder"
            )
        for path in checkpoints(root):
            path.unlink()
    return None
