"""Rounds of a federation: clients train, transform their updates, and the server averages them.

In every round each client starts from the server's parameters theta_0, takes `local_steps` steps
of plain SGD and shares (theta_0 - theta_K) / (lr K), as in stage 2, after its defense. The server
takes one step of its own optimiser (momentum, weight decay) along the mean update, weighted by
the clients' images, of length lr K. With one local step that is FedSGD: without a defense the
same as SGD on the clients' batches together, if no layer mixes the samples of a batch.

Source: McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized
Data", algorithm 1, https://arxiv.org/abs/1602.05629; the server's momentum: Hsu et al. (FedAvgM),
https://arxiv.org/abs/1909.06335.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.data import Sampler

from core.data.loaders import Key
from core.errors import InputError
from core.local_training import LocalTraining
from core.losses import share_right
from core.models.batch_norm import explain_single_values
from core.processes.distributed import all_reduce, alone, derived_seed, seed_everything
from training.client_shards import ClientBatches, split_images
from training.error_feedback import ErrorFeedback, feedback_named
from training.privacy import noise_generator
from training.record import FederationRecord
from training.settings import Federation
from training.trainer import STEP, TOO_FEW_VALUES, Sums, Trainer
from training.transforms import ClientView, Transform, Update, transform_of

TRANSFORM, ENCODE = 12, 13  # domains of derived seeds
Batches = Iterator[tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class Moment:
    """When something happens: its epoch, and its round in the epoch, counted from 0."""

    epoch: int
    number: int


class WeightedMean:
    """The mean of named tensors over all clients, summed in float64.

    In float64 the order of the sum, and so the number of processes, makes no difference that
    is left in float32.
    """

    def __init__(self) -> None:
        self._sums: dict[str, torch.Tensor] = {}

    def add(self, tensors: Mapping[str, torch.Tensor], weight: float) -> None:
        """Count one client's tensors; every client has the same names."""
        for name, tensor in tensors.items():
            part = weight * tensor.detach().double()
            self._sums[name] = self._sums[name] + part if name in self._sums else part

    def over_processes(self) -> dict[str, torch.Tensor]:
        """The sums of all processes; a collective operation."""
        if not self._sums:
            return {}
        flat = all_reduce(torch.cat([part.flatten() for part in self._sums.values()]))
        parts = flat.split([part.numel() for part in self._sums.values()])
        return {
            name: part.view(summed.shape)
            for (name, summed), part in zip(self._sums.items(), parts, strict=True)
        }


class Snapshot:
    """A model's parameters and buffers at one moment."""

    def __init__(self, model: nn.Module) -> None:
        self._state = {name: value.clone() for name, value in model.state_dict().items()}

    def restore(self, model: nn.Module) -> None:
        """Give the model these values again."""
        model.load_state_dict(self._state)

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._state[name]


class FederatedTrainer(Trainer):
    """Trains one model by rounds of several clients, spread over the processes of a group.

    Takes what `Trainer` takes; `config.federation` says what the clients do.

    Raises:
        InputError: The clients cannot be spread over the images or the processes.
    """

    transform: Transform
    feedback: ErrorFeedback | None

    @functools.cached_property
    def federation(self) -> Federation:
        """The clients and what they do."""
        assert self.config.federation is not None
        return self.config.federation

    def _check_batches(self) -> None:
        clients, processes = self.federation.clients, self.process.world_size
        if clients < processes:
            raise InputError(f"--clients {clients}: fewer than the {processes} processes")

    def _plan(self) -> Sampler[list[Key]]:
        config, process = self.config, self.process
        labels = [] if self.federation.alpha is None else self.data.train.labels
        self.rounds = ClientBatches(
            split_images(self.n, self.federation, labels, config.seed),
            config.batch_size,
            self.federation,
            range(process.rank, self.federation.clients, process.world_size),
            config.seed,
            poisson=config.per_sample,
        )
        return self.rounds

    def _prepare_optimizer(self) -> None:
        self.transform = transform_of(self.federation.defense)
        self.transform.prepare(self.model)
        if not any(parameter.requires_grad for parameter in self.model.parameters()):
            raise InputError(f"--defense {self.transform.word}: every parameter is frozen")
        super()._prepare_optimizer()
        self.feedback = feedback_named(self.federation.error_feedback, self.config.momentum)
        self._gathered: dict[str, torch.Tensor] = {}
        if self.feedback is not None and self.feedback.own_momentum:
            self.optimizer.param_groups[0]["momentum"] = 0.0

    @property
    def steps_per_epoch(self) -> int:
        """Local steps of a client in an epoch."""
        return self.rounds.rounds * self.federation.local_steps

    @property
    def _uses_ddp(self) -> bool:
        return False

    def _sampling(self) -> tuple[float, int]:
        return self.rounds.rate, self.rounds.sizes[0]

    def _images_of_epoch(self) -> int:
        return self.rounds.images

    # --- training -------------------------------------------------------------

    def train_epoch(self, epoch: int) -> tuple[float, float | None]:
        """The rounds of one epoch.

        Returns:
            Mean loss and accuracy in percent of the clients' batches, before their steps.
        """
        self.model.train()
        self.rounds.set_epoch(epoch)
        sums = Sums.on(self.process.device)
        batches = self._with_progress(self.loader, epoch)
        for number in range(self.rounds.rounds):
            self._round(batches, Moment(epoch, number), sums)
        next(batches, None)  # Lets the progress bar end.
        if self.feedback is not None:
            self._gathered = self.feedback.gathered(self.federation.clients)
        loss, accuracy, _ = sums.over_processes()
        return self._checked(loss), accuracy

    def _round(self, batches: Batches, when: Moment, sums: Sums) -> None:
        start = Snapshot(self.model)
        updates, buffers = WeightedMean(), WeightedMean()
        for client in self.rounds.mine:
            start.restore(self.model)
            update, images, labels = self._train_locally(client, batches, when, sums)
            weight = self.rounds.weight(client)
            buffers.add(dict(self.model.named_buffers()), weight)
            start.restore(self.model)
            updates.add(self._shared(client, update, images, labels, when), weight)
        start.restore(self.model)
        self._server_step(updates.over_processes(), buffers.over_processes())
        if self.accountant is not None:
            for _ in range(self.federation.local_steps):
                self.accountant.step()

    def _train_locally(
        self, client: int, batches: Batches, when: Moment, sums: Sums
    ) -> tuple[Update, torch.Tensor, torch.Tensor]:
        """The client's update before its defense, and the images and labels it is made of."""
        self.model.train()  # A defense may have looked at it in another mode.
        total: Update = {}
        used: list[tuple[torch.Tensor, torch.Tensor]] = []
        for step in range(self.federation.local_steps):
            seed = derived_seed(self.config.seed, STEP, when.epoch, when.number, client, step)
            seed_everything(seed % 2**63)
            drawn = derived_seed(self.config.seed, ENCODE, when.epoch, when.number, client, step)
            batch = self._encoded(*self._to_device(*next(batches)), drawn)
            gradient = self._gradient(batch, client, when, step, sums)
            for name, g in gradient.items():
                total[name] = total[name] + g if name in total else g
            self._step_locally(gradient)
            used.append(batch)
        steps = self.federation.local_steps
        update = {name: g / steps for name, g in total.items()} if steps > 1 else total
        images, labels = zip(*used, strict=True)
        return update, torch.cat(images), torch.cat(labels)

    def _encoded(
        self, images: torch.Tensor, labels: torch.Tensor, seed: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What a client trains on in a local step, instead of its batch."""
        generator = torch.Generator().manual_seed(seed % 2**63)
        spec = self.data.spec
        view = ClientView(self.model, images, labels, generator, self.loss, data=spec)
        return self.transform.encode(view)

    def _gradient(
        self,
        batch: tuple[torch.Tensor, torch.Tensor],
        client: int,
        when: Moment,
        step: int,
        sums: Sums,
    ) -> Update:
        """Of one local step, by the names of the trained parameters."""
        self.optimizer.zero_grad(set_to_none=True)
        if self.clipping is not None:
            self._private_gradient(batch, client, when, step, sums)
        else:
            images, labels = batch
            with explain_single_values(TOO_FEW_VALUES):
                outputs = self.model(images)
                loss = self.loss(outputs, labels)
                loss.backward()
            right = share_right(self.loss, outputs, labels)
            sums.add(loss * len(images), len(images), right)
        trained = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        return {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in trained.items()}

    def _private_gradient(
        self,
        batch: tuple[torch.Tensor, torch.Tensor],
        client: int,
        when: Moment,
        step: int,
        sums: Sums,
    ) -> None:
        """Clipped per image and noised by the client itself, whose images alone are summed."""
        assert self.clipping is not None
        number = (when.number * self.federation.local_steps + step) * self.federation.clients
        generator = noise_generator(
            self.process.device, self.config.seed, when.epoch, number + client
        )
        self.clipping.clipper.expected_batch_size = self.rounds.sizes[client]
        with alone():
            loss, logits = self.clipping.backward(*batch, generator)
        sums.add(loss, len(batch[0]), share_right(self.loss, logits, batch[1]))

    @torch.no_grad()
    def _step_locally(self, gradient: Update) -> None:
        lr = self.optimizer.param_groups[0]["lr"]
        for name, parameter in self.model.named_parameters():
            if name in gradient:
                parameter.sub_(lr * gradient[name])

    def _shared(
        self,
        client: int,
        update: Update,
        images: torch.Tensor,
        labels: torch.Tensor,
        when: Moment,
    ) -> Update:
        """What the server gets of an update, the model being theta_0 again."""
        lr, steps = self.optimizer.param_groups[0]["lr"], self.federation.local_steps
        if self.feedback is not None:
            update = self.feedback.compensated(client, update, lr * steps)
        seed = derived_seed(self.config.seed, TRANSFORM, when.epoch, when.number, client)
        generator = torch.Generator().manual_seed(seed % 2**63)
        local = LocalTraining(batches=steps, lr=lr)
        spec = self.data.spec
        view = ClientView(self.model, images, labels, generator, self.loss, local, spec)
        given = self.transform.apply(update, view)
        # What a client does not share counts as zero in the mean.
        shared = {n: given[n] if n in given else torch.zeros_like(g) for n, g in update.items()}
        if self.feedback is not None:
            self.feedback.remember(client, update, shared, lr * steps)
        return shared

    def _server_step(
        self, update: Mapping[str, torch.Tensor], buffers: Mapping[str, torch.Tensor]
    ) -> None:
        """One step of the server's optimiser, as long as the clients' steps together."""
        for name, parameter in self.model.named_parameters():
            # What no client shares stays as it is: no weight decay, no momentum.
            shared = name in update and bool(update[name].any())
            parameter.grad = update[name].to(parameter.dtype) if shared else None
        group = self.optimizer.param_groups[0]
        lr = group["lr"]
        group["lr"] = lr * self.federation.local_steps
        self.optimizer.step()
        group["lr"] = lr
        with torch.no_grad():
            for name, buffer in self.model.named_buffers():
                # Counts of batches are whole numbers.
                mean = buffers[name]
                buffer.copy_(mean if buffer.is_floating_point() else mean.round())

    # --- checkpoints and record -----------------------------------------------

    def state(self) -> dict[str, Any]:
        """See `Trainer.state`; and what the clients remember."""
        return {**super().state(), "clients": self._gathered}

    def _restore(self, raw: Mapping[str, Any]) -> None:
        remembered = raw.get("clients") or {}
        if self.feedback is not None:
            self._check_remembered(remembered)
        super()._restore(raw)
        if self.feedback is not None:
            self._gathered = dict(remembered)
            rows = {key: row.to(self.process.device) for key, row in remembered.items()}
            self.feedback.restore(rows, self.rounds.mine)

    def _check_remembered(self, rows: Mapping[str, torch.Tensor]) -> None:
        """Refuse another number of clients, or parameters that the model does not have."""
        known = dict(self.model.named_parameters())
        for key, row in rows.items():
            name = key.partition("/")[2]
            wanted = (self.federation.clients, *known[name].shape) if name in known else ()
            if tuple(row.shape) != wanted:
                raise InputError("what its clients remember does not fit --clients or the model")

    def _budget(self, epoch: int) -> float | None:
        if self.accountant is not None:
            return super()._budget(epoch)
        return self.transform.epsilon((epoch + 1) * self.rounds.rounds, self.config.delta)

    def _federation(self) -> FederationRecord:
        rounds = self.epoch * self.rounds.rounds
        return FederationRecord(
            clients=self.federation.clients,
            images=tuple(map(len, self.rounds.shards)),
            local_steps=self.federation.local_steps,
            rounds=rounds,
            split=self.federation.split,
            defense=self.transform.word,
            error_feedback=self.federation.error_feedback,
            epsilon=self.transform.epsilon(rounds, self.config.delta) if rounds else None,
            delta=self.config.delta,
        )
