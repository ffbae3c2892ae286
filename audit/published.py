"""The published attack on a federation's updates, with its faults: a baseline.

It is kept as it behaves, not as it was meant, so that what it recovers can be compared:

- its gradient term has no derivative in the images, because the local update is simulated
  by an ordinary optimizer; whatever its factor, it moves nothing. What does move the
  images is the plain training loss, whose backward pass leaves its gradient in them;
- that simulation trains the network it calls global: it drifts with every iteration;
- a site's batches are ignored, all images are one batch;
- BatchNorm statistics are compared through the weights after the update, and the biased
  variance of the candidates with the unbiased one of the site;
- the noise of its "energy" term is added to a copy that is thrown away;
- the prior, in [0, 1], is fed to a network that was trained on normalised images.

It keeps a loop of its own because it is another algorithm: it has no gradient of an objective
to hand to `attack.loop.inversion`, its network drifts from iteration to iteration, and its
result is the last iterate, stretched to the full range. It reads the update itself, since
what it makes of the local training is wrong on purpose.

Source: Hatamizadeh et al., Do Gradient Inversion Attacks Make Federated Learning Unsafe?,
2022, https://arxiv.org/abs/2202.06924; described from the behaviour of its public code.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from attack.loop.schedules import learning_rate
from audit.settings import InversionSettings
from audit.updates import LocalUpdate
from core.target import BatchStatistics
from gradients.batch_statistics import batch_norm_layers, statistics_from_running

BETAS = (0.9, 0.9)
WARMUP = 100


@dataclass
class PublishedResult:
    """What the published attack returns.

    Attributes:
        images: N x C x H x W in [0, 1], each stretched to that range, as it is compared.
        labels: N class indices.
        losses: Loss terms at the last iteration, by name.
        trace: The same every `print_every` iterations.
    """

    images: torch.Tensor
    labels: torch.Tensor
    losses: dict[str, float]
    trace: list[dict[str, float]]


class PublishedAttack:
    """One run of the published attack.

    Args:
        update: The update that the site is about to send.
        settings: Iterations, learning rate and the published factors.
        prior: 3 x H x W in [0, 1].
        seed: Seed of the first label targets.
        device: Device that runs the computation.
    """

    def __init__(
        self,
        update: LocalUpdate,
        settings: InversionSettings,
        *,
        prior: torch.Tensor,
        seed: int,
        device: torch.device,
    ) -> None:
        self.update, self.settings, self.device = update, settings, device
        after = {
            name: value + update.weight_diff.get(name, torch.zeros_like(value)).to(value.dtype)
            for name, value in update.global_weights.items()
        }
        self.network = self._network(dict(update.global_weights))
        self.observer = self._network(after)
        self.sent = [update.weight_diff[n].to(device) for n, _ in self.network.named_parameters()]
        self.known = self._known(after)
        grey = prior.mean(0, keepdim=True)[None].repeat(update.n_images, 1, 1, 1)
        self.images = grey.to(device).clone().requires_grad_()
        generator = torch.Generator().manual_seed(seed)
        targets = torch.rand((update.n_images, update.data.n_classes), generator=generator)
        self.targets = targets.to(device).requires_grad_()

    def _network(self, state: dict[str, torch.Tensor]) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            model = self.update.model.build()
        model.load_state_dict({name: value.clone() for name, value in state.items()})
        return model.train().to(self.device)

    def _known(self, after: dict[str, torch.Tensor]) -> BatchStatistics:
        # As if there had been one local step, however many there were.
        found = statistics_from_running(self.update.global_weights, after, self.update.bn_momentum)
        return {k: (m.to(self.device), v.to(self.device)) for k, (m, v) in found.items()}

    def run(self, progress: bool = False, print_every: int = 10) -> PublishedResult:
        """Optimise for the given number of iterations; the last iterate is the result."""
        optimizer = torch.optim.Adam(
            [self.images, self.targets], lr=self.settings.learning_rate, betas=BETAS
        )
        trace, losses = [], {}
        for iteration in tqdm(range(self.settings.iterations), "published", disable=not progress):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(
                    "cosine",
                    iteration,
                    self.settings.iterations,
                    self.settings.learning_rate,
                    0.0,
                    WARMUP,
                )
            optimizer.zero_grad()
            losses = self._iterate()
            optimizer.step()
            if iteration % print_every == 0 or iteration + 1 == self.settings.iterations:
                trace.append({"iteration": float(iteration), **losses})
        colour = self.images.detach().expand(-1, self.update.data.shape[0], -1, -1)
        return PublishedResult(
            images=_stretched(colour).cpu(),
            labels=self.targets.detach().argmax(1).cpu(),
            losses=losses,
            trace=trace,
        )

    def _iterate(self) -> dict[str, float]:
        inputs = self.images.expand(-1, self.update.data.shape[0], -1, -1)
        terms = {"gradient": 0.0}
        if self.settings.grad_l2 > 0:
            terms["gradient"] = self.settings.grad_l2 * self._simulate(inputs)
        bn = self.settings.original_bn_l2 * torch.stack([*self._bn_distances(inputs)]).sum()
        smoothness = self._smoothness(inputs)
        (bn + smoothness).backward()
        return {**terms, "bn": float(bn.detach()), "prior": float(smoothness.detach())}

    def _simulate(self, inputs: torch.Tensor) -> float:
        """Train the network on the candidates; its backward pass leaks into their gradient."""
        before = [p.detach().clone() for p in self.network.parameters()]
        optimizer = torch.optim.SGD(self.network.parameters(), self.update.learning_rate)
        for _ in range(self.update.local_epochs):
            optimizer.zero_grad()
            loss = F.binary_cross_entropy_with_logits(self.network(inputs), self.targets.sigmoid())
            loss.backward()
            optimizer.step()
        moved = zip(self.network.parameters(), before, self.sent, strict=True)
        return sum(float((p.detach() - old - sent).norm()) for p, old, sent in moved)

    def _bn_distances(self, inputs: torch.Tensor) -> Iterator[torch.Tensor]:
        seen: dict[str, torch.Tensor] = {}

        def keep(name: str) -> nn.Module:
            return lambda _, given: seen.__setitem__(name, given[0])  # type: ignore[return-value]

        layers = batch_norm_layers(self.observer)
        hooks = [m.register_forward_pre_hook(keep(name)) for name, m in layers.items()]
        self.observer(inputs)
        for hook in hooks:
            hook.remove()
        for name, features in seen.items():
            over = [dim for dim in range(features.dim()) if dim != 1]
            mean, variance = self.known[name]
            yield (features.mean(over) - mean).norm()
            yield (features.var(over, unbiased=False) - variance).norm()

    def _smoothness(self, inputs: torch.Tensor) -> torch.Tensor:
        """Total variation over four directions and the images' length."""
        shifted = [
            inputs[..., :-1] - inputs[..., 1:],
            inputs[..., :-1, :] - inputs[..., 1:, :],
            inputs[..., 1:, :-1] - inputs[..., :-1, 1:],
            inputs[..., :-1, :-1] - inputs[..., 1:, 1:],
        ]
        euclidean = torch.stack([d.norm() for d in shifted]).sum()
        absolute = torch.stack([d.abs().mean() for d in shifted]).sum()
        length = inputs.flatten(1).norm(dim=1).mean()
        settings = self.settings
        return settings.tv_l2 * euclidean + settings.tv_l1 * absolute + settings.l2 * length


def _stretched(images: torch.Tensor) -> torch.Tensor:
    low, high = images.amin((1, 2, 3), keepdim=True), images.amax((1, 2, 3), keepdim=True)
    return (images - low) / (high - low).clamp_min(1e-12)
