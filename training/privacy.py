"""Differentially private SGD over any number of processes, and what it guarantees.

Gradients are clipped per sample (Opacus), summed over all processes, and noised once:
every process draws the same noise from the same generator, so that it need not travel.

Source: Abadi et al., Deep Learning with Differential Privacy, algorithm 1,
https://arxiv.org/abs/1607.00133. The variant of "Reveal the Leaker and Block the
Attacker" clips the mean gradient of the batch instead (`clip_and_noise_batch`); one
sample can then move it by twice the clipping norm, and BatchNorm mixes samples
besides: it gives no guarantee.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from core.errors import InputError
from core.losses import DEFAULT_LOSS, Loss, main_output
from core.models.kinds import BatchNorm
from core.processes.distributed import all_reduce, derived_seed

NOISE = 2  # domain of derived seeds
# Above this the PRV accountant needs gigabytes for a number without meaning.
PRV_LIMIT = 200.0
MEANINGLESS_EPSILON = 100.0


def require_opacus() -> Any:
    """Import Opacus, or say how to get it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import opacus
    except ImportError:
        raise InputError(
            "--enable-dp with per-sample clipping needs Opacus: pip install 'gradinvbench[privacy]'"
        ) from None
    return opacus


@dataclass(frozen=True)
class Epsilon:
    """A privacy budget that has been spent.

    Attributes:
        value: Epsilon at `delta`; infinite where nothing is guaranteed.
        delta: Probability that the bound fails.
        accountant: "prv" or "rdp", whichever gave `value`.
        rdp: The RDP accountant's epsilon, the cross-check.
        steps: Steps of SGD.
    """

    value: float
    delta: float
    accountant: str
    rdp: float
    steps: int

    def sentence(self, noise_multiplier: float) -> str:
        """What the number means, for a person."""
        head = f"noise multiplier {noise_multiplier:g}, {self.steps} steps"
        if math.isinf(self.value):
            return f"{head}: epsilon is infinite; no noise, no guarantee"
        numbers = f"{head}: epsilon = {self.value:.3g} at delta = {self.delta:g}"
        if self.value > MEANINGLESS_EPSILON:
            return (
                f"{numbers}, which is no meaningful guarantee: the bound allows an observer to "
                "tell with near certainty whether an image was trained on (useful values "
                "lie below about 10)"
            )
        return f"{numbers} ({self.accountant.upper()} accountant; RDP says {self.rdp:.3g})"


class Accountant:
    """Counts steps of the subsampled Gaussian mechanism.

    Args:
        noise_multiplier: Standard deviation of the noise over the clipping norm.
        sample_rate: Probability of a sample to be in a batch.
        delta: Probability that the bound fails.
    """

    def __init__(self, noise_multiplier: float, sample_rate: float, delta: float) -> None:
        self.noise_multiplier = noise_multiplier
        self.sample_rate = sample_rate
        self.delta = delta
        self.history: list[tuple[float, float, int]] = []

    def step(self) -> None:
        """Count one step."""
        setting = (self.noise_multiplier, self.sample_rate)
        steps = 1
        if self.history and self.history[-1][:2] == setting:
            steps += self.history.pop()[2]
        self.history.append((*setting, steps))

    def epsilon(self) -> Epsilon:
        """The budget spent so far."""
        steps = sum(count for *_, count in self.history)
        if not self.history:
            return Epsilon(0.0, self.delta, "prv", 0.0, 0)
        if any(noise <= 0 for noise, *_ in self.history):
            return Epsilon(math.inf, self.delta, "rdp", math.inf, steps)
        with warnings.catch_warnings():
            # Opacus asks for more orders where the epsilon is astronomic anyway.
            warnings.simplefilter("ignore")
            rdp = self._opacus("rdp")
            if rdp > PRV_LIMIT:
                return Epsilon(rdp, self.delta, "rdp", rdp, steps)
            prv = self._opacus("prv")
        # Both are upper bounds, so that the smaller one holds.
        value, name = (prv, "prv") if prv <= rdp else (rdp, "rdp")
        return Epsilon(value, self.delta, name, rdp, steps)

    def planned(self, steps: int) -> Epsilon:
        """The budget that `steps` steps from the start would spend."""
        plan = Accountant(self.noise_multiplier, self.sample_rate, self.delta)
        plan.history = [(self.noise_multiplier, self.sample_rate, steps)] if steps else []
        return plan.epsilon()

    def _opacus(self, mechanism: str) -> float:
        require_opacus()
        from opacus.accountants import create_accountant

        accountant = create_accountant(mechanism)
        accountant.history = list(self.history)
        return float(accountant.get_epsilon(delta=self.delta))

    def state_dict(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        return {"history": [list(entry) for entry in self.history]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`."""
        self.history = [(float(s), float(q), int(n)) for s, q, n in state["history"]]


def noise_generator(device: torch.device, seed: int, epoch: int, step: int) -> torch.Generator:
    """The generator of one step's noise: the same on every process, and after a resume."""
    return torch.Generator(device).manual_seed(derived_seed(seed, NOISE, epoch, step))


class PerSampleClipping:
    """Fills `.grad` of a model's parameters with the clipped, noised mean of DP-SGD.

    Per-sample gradients come from `torch.func`, which differentiates any architecture
    (Opacus' hooks refuse torchvision's in-place residual sums); Opacus' optimizer clips
    them and adds the noise.

    Args:
        model: Without BatchNorm.
        max_norm: Clipping norm of one sample's gradient over all parameters.
        noise_multiplier: Standard deviation of the noise over `max_norm`.
        expected_batch_size: Over all processes; the sum is divided by it, whatever
            the actual number of samples.
        max_physical_batch: Samples whose gradients are held in memory at once.
        client_loss: What is minimised, a mean over samples.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        max_norm: float,
        noise_multiplier: float,
        expected_batch_size: int,
        max_physical_batch: int = 32,
        client_loss: Loss = DEFAULT_LOSS,
    ) -> None:
        opacus = require_opacus()
        check_mixes_no_samples(model)
        self.model, self.client_loss = model, client_loss
        self.named: dict[str, torch.Tensor] = {
            n: p for n, p in model.named_parameters() if p.requires_grad
        }
        self.clipper = opacus.optimizers.DPOptimizer(
            # Clips and adds noise; the step is taken by the caller's own optimizer.
            torch.optim.SGD(self.named.values(), lr=0.0),
            noise_multiplier=noise_multiplier,
            max_grad_norm=max_norm,
            expected_batch_size=expected_batch_size,
        )
        self.max_physical_batch = max_physical_batch
        self._per_sample = torch.func.vmap(
            torch.func.grad_and_value(self._loss, has_aux=True),
            in_dims=(None, 0, 0),
            randomness="different",
        )

    def _loss(
        self, parameters: dict[str, torch.Tensor], image: torch.Tensor, label: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        outputs = torch.func.functional_call(self.model, parameters, (image[None],))
        return self.client_loss(outputs, label[None]), main_output(outputs)[0]

    def backward(
        self, images: torch.Tensor, labels: torch.Tensor, generator: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One step's gradient from this process's shard, which may be empty.

        Args:
            images: N_r x C x H x W, normalised.
            labels: N_r.
            generator: Of the noise, the same on every process.

        Returns:
            Sum of losses, and logits (N_r x classes) of the shard, detached.
        """
        self.clipper.zero_grad(set_to_none=True)
        loss = images.new_zeros(())
        logits: list[torch.Tensor] = []
        for start in range(0, len(images), self.max_physical_batch):
            part = slice(start, start + self.max_physical_batch)
            gradients, (losses, outputs) = self._per_sample(
                dict(self.named), images[part], labels[part]
            )
            self._clip_and_add(gradients)
            loss = loss + losses.sum()
            logits.append(outputs)
        self._sum_over_processes()
        self._add_noise(generator)
        return loss, torch.cat(logits) if logits else images.new_zeros((0, 1))

    def _clip_and_add(self, gradients: dict[str, torch.Tensor]) -> None:
        for name, parameter in self.named.items():
            parameter.grad_sample = gradients[name].detach()  # type: ignore[attr-defined]
        self.clipper.clip_and_accumulate()

    def _sum_over_processes(self) -> None:
        parameters: list[Any] = list(self.named.values())
        sums = [torch.zeros_like(p) if p.summed_grad is None else p.summed_grad for p in parameters]
        for parameter, total in zip(parameters, sum_over_processes(sums), strict=True):
            parameter.summed_grad = total

    def _add_noise(self, generator: torch.Generator) -> None:
        self.clipper.generator = generator
        self.clipper.add_noise()
        parameter: Any
        for parameter in self.named.values():
            parameter.grad /= self.clipper.expected_batch_size
            parameter.grad_sample = parameter.summed_grad = None


def check_mixes_no_samples(model: nn.Module) -> None:
    """Refuse a model whose BatchNorm makes one sample's gradient depend on the others.

    Raises:
        InputError: With the fix.
    """
    if any(isinstance(m, BatchNorm) for m in model.modules()):
        raise InputError(
            "per-sample clipping needs a model without BatchNorm, which mixes the samples of a "
            "batch: use --norm group, or --dp-clipping batch (which gives no guarantee)"
        )


def sum_over_processes(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Sum every tensor over all processes, in one collective.

    One flat buffer of fixed order: the sum is the same to the bit whenever it is made.
    """
    flat = all_reduce(torch.cat([tensor.detach().flatten() for tensor in tensors]))
    parts = flat.split([tensor.numel() for tensor in tensors])
    return [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)]


@torch.no_grad()
def clip_and_noise_batch(
    parameters: Iterable[nn.Parameter],
    *,
    max_norm: float,
    noise_multiplier: float,
    generator: torch.Generator,
) -> None:
    """The paper's variant: clip the batch's mean gradient and add noise. No guarantee.

    Args:
        parameters: With the mean gradient of the whole batch in `.grad`; changed.
        max_norm: Clipping norm over all parameters.
        noise_multiplier: The noise has standard deviation `noise_multiplier * max_norm`.
        generator: The same on every process.
    """
    chosen = [p for p in parameters if p.grad is not None]
    nn.utils.clip_grad_norm_(chosen, max_norm)
    for parameter in chosen:
        assert parameter.grad is not None
        noise = torch.randn(
            parameter.shape, generator=generator, device=parameter.device, dtype=parameter.dtype
        )
        parameter.grad += noise_multiplier * max_norm * noise
