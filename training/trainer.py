"""Train, validate, save, resume: the loop of stage 1.

The state of a run is (epoch, parameters, optimizer, accountant). Everything random is
derived from (seed, epoch, step), so that a run continued from a checkpoint is the
run that was never interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import logging
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Sampler

from core.data.data_sets import DataSets
from core.data.loaders import Key, ShardedBatches, ValidationShard, check_batches, make_loader
from core.errors import InputError
from core.losses import DEFAULT_LOSS, Loss, share_right
from core.models.architecture import Architecture
from core.models.batch_norm import (
    average_running_statistics,
    explain_single_values,
    leave_synchronization_to_python,
)
from core.models.building import load_parameters
from core.optimizer_state import restore_optimizer
from core.processes.distributed import Process, all_reduce, barrier, derived_seed, seed_everything
from core.records import BROKEN, check_types, fits, provenance
from core.storage import load_checkpoint, save_checkpoint
from training.checkpoints import (
    BEST,
    INITIAL,
    checkpoint_epoch,
    checkpoint_name,
    checkpoints,
    latest_checkpoint,
)
from training.privacy import (
    Accountant,
    PerSampleClipping,
    clip_and_noise_batch,
    noise_generator,
    sum_over_processes,
)
from training.record import (
    FINISHED,
    RUNNING,
    CheckpointNames,
    EpochResult,
    FederationRecord,
    PrivacySpent,
    TrainRecord,
    write_record,
)
from training.reports import ScalarLog, plot_curves, write_metrics_csv
from training.settings import TrainingConfig

logger = logging.getLogger(__name__)

STEP = 3  # domain of derived seeds
# What a checkpoint may state.
MAX_EPOCHS, MAX_STEPS = 10**6, 10**9
TOO_FEW_VALUES = (
    "--batch-size: a BatchNorm layer sees one value per channel; use larger batches, "
    "larger images, --syncbn or --norm group"
)


@dataclass
class Sums:
    """Sums over samples, kept on the device until an epoch ends."""

    values: torch.Tensor = field(default_factory=lambda: torch.zeros(4, dtype=torch.float64))

    @staticmethod
    def on(device: torch.device) -> Sums:
        """Of nothing yet."""
        return Sums(torch.zeros(4, dtype=torch.float64, device=device))

    def add(
        self,
        loss_sum: torch.Tensor,
        n: int,
        right: torch.Tensor | None,
        five: torch.Tensor | None = None,
    ) -> None:
        """Count one shard of n samples.

        Args:
            loss_sum: Of their losses.
            n: How many there are.
            right: How right the model is on each; None where that cannot be said.
            five: The same for its first five guesses.
        """
        nothing = loss_sum.new_full((), math.nan if n else 0.0)
        met = [nothing if c is None or not n else c.sum().float() for c in (right, five)]
        self.values += torch.stack([loss_sum.detach().float(), loss_sum.new_tensor(float(n)), *met])

    def over_processes(self) -> tuple[float, float | None, float | None]:
        """Mean loss, and accuracy of the first and of the first five guesses in percent.

        None stands where there is no accuracy.
        """
        loss, n, *met = all_reduce(self.values).tolist()
        first, five = (None if math.isnan(m) else 100 * m / max(n, 1) for m in met)
        return loss / max(n, 1), first, five


class Trainer:
    """Trains one model on every process of a group.

    Args:
        model: On this process' device, BatchNorm already converted; all processes
            must hold the same parameters.
        architecture: How to rebuild it, for the checkpoints.
        data: The data sets to train and to validate on.
        config: Settings of the training.
        process: Rank, device and number of processes.
        root: Folder of checkpoints and records.
        flags: The command line by flag, for the checkpoints.
        print_freq: Steps between renewals of the progress bar.
        loss: What is minimised.

    Raises:
        InputError: The batches, or a loss that is no mean over samples, cannot be spread.
    """

    def __init__(
        self,
        model: nn.Module,
        architecture: Architecture,
        data: DataSets,
        config: TrainingConfig,
        process: Process,
        root: Path,
        *,
        flags: Mapping[str, Any] | None = None,
        print_freq: int = 10,
        loss: Loss = DEFAULT_LOSS,
    ) -> None:
        self.model, self.architecture, self.data = model, architecture, data
        self.loss = loss
        self.config, self.process, self.root = config, process, root
        self.flags, self.print_freq = flags or {}, print_freq
        self.epoch = 0
        self.best_acc1: float | None = 0.0
        self.initial_acc1: float | None = None
        self.history: list[EpochResult] = []
        self.scalars = ScalarLog(root / "tensorboard", process.is_main and config.tensorboard)
        self.n = len(data.train)
        self._check_batches()
        self._prepare_loaders()
        self._prepare_optimizer()

    def _check_batches(self) -> None:
        """Refuse batches that cannot be divided, and losses that are no sum over the parts."""
        parts = self.process.world_size * self.config.accumulate
        check_batches(self.n, self.config.batch_size, parts, self.config.per_sample)
        if not self.loss.mean_over_samples and (parts > 1 or self.config.per_sample):
            raise InputError(
                f"--loss {self.loss.name}: is no mean over samples, so that a batch can neither be "
                "spread over processes or accumulated nor its samples be clipped one by one"
            )

    def _prepare_loaders(self) -> None:
        config, process, shape = self.config, self.process, self.data.spec.shape
        self.loader = make_loader(self.data.train, self._plan(), shape, process, config.workers)
        shard = ValidationShard(len(self.data.val), config.batch_size, process)
        self.val_loader = make_loader(self.data.val, shard, shape, process, config.workers)

    def _plan(self) -> Sampler[list[Key]]:
        """Which images this process trains on at every step of an epoch."""
        config = self.config
        self.batches = ShardedBatches(
            self.n, config.batch_size, self.process, config.seed, poisson=config.per_sample
        )
        return self.batches

    @property
    def steps_per_epoch(self) -> int:
        """How often an epoch uses an image that its batches take."""
        return len(self.batches)

    def _sampling(self) -> tuple[float, int]:
        """The probability of an image to be in a batch, and the images of one."""
        return min(1.0, self.config.batch_size / self.n), self.batches.batch_size

    def _images_of_epoch(self) -> int:
        """How many images the epoch that is planned goes through."""
        return sum(len(batch) for batch in self.batches.batches)

    def _prepare_optimizer(self) -> None:
        config = self.config
        self.optimizer = torch.optim.SGD(
            self.model.parameters(),
            lr=config.lr,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
            fused=self.process.device.type == "cuda",
        )
        self.scaler = torch.amp.GradScaler(self.process.device.type, enabled=config.amp == "fp16")
        self.accountant: Accountant | None = None
        self.clipping: PerSampleClipping | None = None
        if config.per_sample:
            rate, expected = self._sampling()
            self.accountant = Accountant(config.noise_multiplier, rate, config.delta)
            self.clipping = PerSampleClipping(
                self.model,
                max_norm=config.max_norm,
                noise_multiplier=config.noise_multiplier,
                expected_batch_size=expected,
                client_loss=self.loss,
            )
        self.forward = self._wrapped_model()

    def _wrapped_model(self) -> Any:
        """The model as the training step calls it; the plain one keeps the parameters."""
        forward: Any = self.model
        if self.config.compile:
            leave_synchronization_to_python()
            forward = torch.compile(forward)
        if self._uses_ddp:
            # Overlaps communication with the backward pass. Buffers are ours to keep.
            forward = nn.parallel.DistributedDataParallel(
                forward, broadcast_buffers=False, gradient_as_bucket_view=True
            )
        return forward

    @property
    def _uses_ddp(self) -> bool:
        return (
            self.process.device.type == "cuda"
            and self.process.world_size > 1
            and not self.config.per_sample
        )

    # --- training -------------------------------------------------------------

    def fit(self) -> list[EpochResult]:
        """Train until the last epoch, saving after each one.

        Returns:
            One result per epoch of the whole run, those before a resume included.
        """
        if self.epoch == 0:
            self.save_initial()
            self.initial_acc1 = self.validate()[1]
        self.write_record(RUNNING)
        for epoch in range(self.epoch, self.config.epochs):
            result = self.run_epoch(epoch)
            self.history.append(result)
            self.epoch = epoch + 1
            is_best = self._is_best(result)
            self.best_acc1 = result.val_acc1 if is_best else self.best_acc1
            self.save(result.val_acc1, is_best)
            self.write_record(RUNNING)
            self.scalars.write(dataclasses.asdict(result))
            logger.info("%s", self._line(result))
        self.scalars.close()
        self.write_record(FINISHED)
        return self.history

    def _is_best(self, result: EpochResult) -> bool:
        """Whether no epoch before was as good: by accuracy, or by loss where there is none."""
        before = self.history[:-1]
        if not before:
            return True
        if result.val_acc1 is None:
            return all(result.val_loss < earlier.val_loss for earlier in before)
        return result.val_acc1 > (self.best_acc1 or 0.0)

    def run_epoch(self, epoch: int) -> EpochResult:
        """Train on all images once, then validate."""
        start = time.perf_counter()
        lr = self.config.lr_at(epoch)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        train_loss, train_acc1 = self.train_epoch(epoch)
        trained = time.perf_counter() - start
        if not self.config.synchronized:
            average_running_statistics(self.model)
        val_loss, val_acc1, val_acc5 = self.validate()
        images = self._images_of_epoch()
        return EpochResult(
            epoch=epoch + 1,
            lr=lr,
            train_loss=train_loss,
            train_acc1=train_acc1,
            val_loss=val_loss,
            val_acc1=val_acc1,
            epsilon=self._budget(epoch),
            images_per_second=images / trained,
            seconds=time.perf_counter() - start,
            val_acc5=val_acc5,
        )

    def _budget(self, epoch: int) -> float | None:
        """The epsilon spent by the end of an epoch."""
        return self.accountant.epsilon().value if self.accountant else None

    def train_epoch(self, epoch: int) -> tuple[float, float | None]:
        """One pass over the training images.

        Returns:
            Mean loss and accuracy in percent.
        """
        self.model.train()
        self.batches.set_epoch(epoch)
        sums = Sums.on(self.process.device)
        sizes = [len(batch) for batch in self.batches.batches]
        for step, (images, labels) in enumerate(self._with_progress(self.loader, epoch)):
            # Dropout and the like: the same after a resume, different on every process.
            seed_everything(
                derived_seed(self.config.seed, STEP, epoch, step, self.process.rank) % 2**63
            )
            images, labels = self._to_device(images, labels)
            if self.clipping is not None:
                self._private_step(images, labels, sums, epoch, step)
            else:
                with explain_single_values(TOO_FEW_VALUES):
                    self._plain_step(images, labels, sizes[step], sums, epoch, step)
        loss, accuracy, _ = sums.over_processes()
        return self._checked(loss), accuracy

    def _with_progress(self, loader: Any, epoch: int) -> Iterator[Any]:
        from tqdm import tqdm

        return iter(
            tqdm(
                loader,
                desc=f"{self.config.scheme} epoch {epoch + 1}/{self.config.epochs}",
                disable=None if self.process.is_main else True,
                leave=False,
                miniters=self.print_freq,
            )
        )

    def _to_device(
        self, images: torch.Tensor, labels: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        layout = torch.channels_last if self.config.channels_last else torch.preserve_format
        device = self.process.device
        images = images.to(device, non_blocking=True, memory_format=layout)
        return images, labels.to(device, non_blocking=True)

    def _autocast(self) -> Any:
        if self.config.amp is None:
            return contextlib.nullcontext()
        dtype = torch.bfloat16 if self.config.amp == "bf16" else torch.float16
        return torch.autocast(self.process.device.type, dtype)

    def _plain_step(
        self,
        images: torch.Tensor,
        labels: torch.Tensor,
        batch_size: int,
        sums: Sums,
        epoch: int,
        step: int,
    ) -> None:
        """One step of SGD on the mean loss of the whole batch, shards of any size."""
        self.optimizer.zero_grad(set_to_none=True)
        parts = list(
            zip(
                images.tensor_split(self.config.accumulate),
                labels.tensor_split(self.config.accumulate),
                strict=True,
            )
        )
        for index, (part, part_labels) in enumerate(parts):
            with self._without_communication(index < len(parts) - 1):
                with self._autocast():
                    outputs = self.forward(part)
                    loss = self.loss.total(outputs, part_labels)
                # DDP averages over processes; what is wanted is the sum.
                factor = self.process.world_size if self._uses_ddp else 1
                self.scaler.scale(loss * factor / batch_size).backward()
            sums.add(loss, len(part), share_right(self.loss, outputs, part_labels))
        if not self._uses_ddp:
            self._sum_gradients()
        if self.config.dp:
            self.scaler.unscale_(self.optimizer)
            clip_and_noise_batch(
                self.model.parameters(),
                max_norm=self.config.max_norm,
                noise_multiplier=self.config.noise_multiplier,
                generator=noise_generator(self.process.device, self.config.seed, epoch, step),
            )
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def _without_communication(self, wanted: bool) -> Any:
        return self.forward.no_sync() if wanted and self._uses_ddp else contextlib.nullcontext()

    def _sum_gradients(self) -> None:
        if self.process.world_size == 1:
            return
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
        for parameter, total in zip(parameters, sum_over_processes(gradients), strict=True):
            parameter.grad = total

    def _private_step(
        self, images: torch.Tensor, labels: torch.Tensor, sums: Sums, epoch: int, step: int
    ) -> None:
        assert self.clipping is not None
        assert self.accountant is not None
        generator = noise_generator(self.process.device, self.config.seed, epoch, step)
        with self._autocast():
            loss, logits = self.clipping.backward(images, labels, generator)
        self.optimizer.step()
        self.accountant.step()
        sums.add(loss, len(images), share_right(self.loss, logits, labels))

    @staticmethod
    def _checked(loss: float) -> float:
        if not math.isfinite(loss):
            raise InputError(
                "training diverged: the loss is not finite; lower --lr, or add --warmup-epochs"
            )
        return loss

    @torch.no_grad()
    def validate(self) -> tuple[float, float | None, float | None]:
        """On the validation images of all processes.

        Returns:
            Mean loss, and accuracy of the first and of the first five guesses in percent; None
            where there is none.
        """
        self.model.eval()
        sums = Sums.on(self.process.device)
        for images, labels in self.val_loader:
            images, labels = self._to_device(images, labels)
            with self._autocast():
                outputs = self.model(images)
                loss = self.loss.total(outputs, labels)
            first, five = (share_right(self.loss, outputs, labels, k) for k in (1, 5))
            sums.add(loss, len(images), first, five)
        return sums.over_processes()

    def _line(self, result: EpochResult) -> str:
        budget = "" if result.epsilon is None else f" epsilon {result.epsilon:.3g}"
        return (
            f"{self.config.scheme} epoch {result.epoch}/{self.config.epochs} "
            f"lr {result.lr:.2g} train loss {result.train_loss:.3f}{_accuracy(result.train_acc1)} "
            f"val loss {result.val_loss:.3f}{_accuracy(result.val_acc1)}{budget} "
            f"({result.images_per_second:.0f} images/s, {result.seconds:.1f} s)"
        )

    # --- checkpoints ----------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Everything a checkpoint holds; the published keys first."""
        return {
            "epoch": self.epoch,
            "arch": self.architecture.name,
            "state_dict": self.model.state_dict(),
            "best_acc1": self.best_acc1,
            "initial_acc1": self.initial_acc1,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "accountant": self.accountant.state_dict() if self.accountant else None,
            "model": self.architecture.describe(),
            "data": self.data.spec.to_dict(),
            "scheme": self.config.scheme,
            "config": dataclasses.asdict(self.config),
            "history": [dataclasses.asdict(result) for result in self.history],
            "args": argparse.Namespace(**_plain(self.flags)),
        }

    def save_initial(self) -> None:
        """Save the untrained model."""
        if self.process.is_main:
            save_checkpoint(self.state(), self.root / INITIAL)
        barrier()

    def save(self, acc1: float | None, is_best: bool) -> None:
        """Save the latest state; what is older than the one before it goes, if not to be kept."""
        if self.process.is_main:
            name = checkpoint_name(self.epoch, acc1)
            state = self.state()
            # The best one first: killed in between, a resumed run makes both again.
            if is_best:
                save_checkpoint(state, self.root / BEST)
            save_checkpoint(state, self.root / name)
            # Read again before anything older goes.
            load_checkpoint(self.root / name, "--result-root")
            for path in checkpoints(self.root):
                if self._superseded(checkpoint_epoch(path)):
                    path.unlink()
        barrier()

    def _superseded(self, epoch: int) -> bool:
        """The one before the latest stays until there is another: a disk may damage a file."""
        return epoch < self.epoch - 1 and epoch % self.config.save_every != 0

    def resume(self, path: Path) -> None:
        """Continue from a checkpoint of the same model and data.

        Raises:
            InputError: It is not one.
        """
        raw = load_checkpoint(path, "--resume")
        missing = [key for key in ("epoch", "state_dict", "optimizer") if key not in raw]
        if missing:
            raise InputError(f"--resume: {path} is not a training checkpoint (no {missing[0]})")
        try:
            self._check_resumable(path, raw)
            self._restore(raw)
        except InputError as error:
            text = str(error)
            if not text.startswith("--resume"):
                text = f"--resume: {path}: {text}"
            raise InputError(text) from None
        except BROKEN as error:
            reason = (str(error).splitlines() or [type(error).__name__])[-1].strip()
            raise InputError(f"--resume: {path} does not fit this model ({reason:.200})") from None

    def _restore(self, raw: Mapping[str, Any]) -> None:
        """Take over what a checkpoint holds: all of it is checked before anything is changed."""
        epoch, best, initial = raw["epoch"], raw.get("best_acc1", 0.0), raw.get("initial_acc1")
        if type(epoch) is not int or not 0 <= epoch <= MAX_EPOCHS:
            raise InputError(f"its number of epochs is {epoch!r:.40}")
        if not fits(best, float | None) or not fits(initial, float | None):
            raise InputError("its accuracies are not numbers")
        history = [EpochResult(**entry) for entry in raw.get("history", [])]
        for result in history:
            check_types(result)
        state = {name.removeprefix("module."): v for name, v in raw["state_dict"].items()}
        load_parameters(self.model, state)
        restore_optimizer(self.optimizer, raw["optimizer"])
        if raw.get("scaler"):
            self.scaler.load_state_dict(_scale(raw["scaler"], self.scaler.state_dict()))
        if self.accountant is not None and raw.get("accountant"):
            self.accountant.load_state_dict(_spent(raw["accountant"]))
        self.epoch, self.best_acc1, self.initial_acc1 = epoch, best, initial
        self.history = history

    def _check_resumable(self, path: Path, raw: dict[str, Any]) -> None:
        """The model and data must be the same; other settings may change, and it is said."""
        for key, ours in (
            ("model", self.architecture.describe()),
            ("data", self.data.spec.to_dict()),
        ):
            for name, value in ours.items():
                theirs = (raw.get(key) or ours).get(name)
                if type(theirs) is not type(value) or theirs != value:
                    raise InputError(
                        f"--resume: {path} was trained with {key} {name} = {theirs!s:.80}, "
                        f"this command asks for {value}"
                    )
        stated = raw.get("config") or {}
        given = TrainingConfig.from_dict(stated)
        check_types(given)
        before = dataclasses.asdict(given)
        for name, value in dataclasses.asdict(self.config).items():
            if name in stated and before[name] != value:
                logger.warning("resuming with %s = %s instead of %s", name, value, before[name])

    # --- record ---------------------------------------------------------------

    def write_record(self, status: str) -> None:
        """Write `record.json`: what the run is and what came of it so far."""
        if not self.process.is_main:
            return
        record = self.record(status)
        write_record(record, self.root)
        write_metrics_csv(record.history, self.root / "metrics.csv")
        if status == FINISHED and self.history:
            plot_curves(record, self.root / "curves.png")

    def record(self, status: str) -> TrainRecord:
        """The run so far."""
        last = self.history[-1] if self.history else None
        latest = latest_checkpoint(self.root)
        return TrainRecord(
            status=status,
            scheme=self.config.scheme,
            config=self.config,
            model=self.architecture.describe(),
            loss=self.loss.name,
            data=self.data.spec,
            n_train=self.n,
            n_val=len(self.data.val),
            processes=self.process.world_size,
            epochs_done=self.epoch,
            initial_val_acc1=self.initial_acc1,
            best_val_acc1=self.best_acc1 if last else None,
            final_val_acc1=last.val_acc1 if last else None,
            final_train_acc1=last.train_acc1 if last else None,
            privacy=self._privacy_spent(),
            federation=self._federation(),
            images_per_second=_median([r.images_per_second for r in self.history]),
            seconds_per_epoch=_median([r.seconds for r in self.history]),
            seconds=sum(r.seconds for r in self.history),
            history=tuple(self.history),
            checkpoints=CheckpointNames(
                INITIAL, BEST if last else None, latest.name if latest else None
            ),
            provenance=provenance(self.process.device, self.config.seed),
        )

    def _federation(self) -> FederationRecord | None:
        """What the clients did, where there are several."""
        return None

    def _privacy_spent(self) -> PrivacySpent | None:
        config = self.config
        if not config.dp:
            return None
        settings = (config.dp_clipping, config.noise_multiplier, config.max_norm, config.delta)
        if self.accountant is None:
            return PrivacySpent(*settings, None, "batch clipping: no guarantee")
        spent = self.accountant.epsilon()
        return PrivacySpent(
            *settings,
            epsilon=spent.value if math.isfinite(spent.value) else None,
            note=spent.sentence(config.noise_multiplier),
            epsilon_rdp=spent.rdp if math.isfinite(spent.rdp) else None,
            accountant=spent.accountant,
            sample_rate=self.accountant.sample_rate,
            steps=spent.steps,
        )


def _accuracy(share: float | None) -> str:
    return "" if share is None else f" acc {share:.1f}"


def _scale(saved: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """The scaler's own options, with the scale that a checkpoint holds."""
    scale, tracker = saved["scale"], saved["_growth_tracker"]
    if not fits(scale, float) or not 0 < scale < math.inf or not fits(tracker, int):
        raise InputError("its loss scale is no positive number")
    return {**own, "scale": float(scale), "_growth_tracker": tracker} if own else {}


def _spent(saved: Mapping[str, Any]) -> dict[str, Any]:
    """An accountant's history: noise multiplier, sample rate and number of steps."""
    history = saved["history"]
    right = fits(history, list[tuple[float, float, int]]) and all(
        0 < sigma < math.inf and 0 < rate <= 1 and 0 <= steps <= MAX_STEPS
        for sigma, rate, steps in history
    )
    if not right:
        raise InputError("its privacy accountant's history is no list of noise, rate and steps")
    return {"history": history}


def _median(values: list[float]) -> float | None:
    return sorted(values)[len(values) // 2] if values else None


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Only what a checkpoint may hold."""
    kinds = (bool, int, float, str, type(None))
    return {key: value for key, value in values.items() if isinstance(value, kinds)}
