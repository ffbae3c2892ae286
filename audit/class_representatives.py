"""Class representatives: does what a model calls typical of a class look like its patients?

Attack C of the protocol that hospitals of a swarm follow: from noise, an image climbs the class's
output under the priors of the other attacks, several restarts per class. They are held against the
images of their class with the references of every reconstruction (`audit.references`).

Source: Fredrikson, Jha, Ristenpart, Model Inversion Attacks that Exploit Confidence Information,
    CCS 2015, https://doi.org/10.1145/2810103.2813677; the logit in place of the probability, which
    has no slope where it is 1: Nguyen et al., CVPR 2023, https://arxiv.org/abs/2304.01669.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from attack.priors.regularizers import TOTAL_VARIATIONS
from audit.record import ClassSection
from audit.references import metrics_of, similarity_section, some_of
from core.data.specs import DataSpec
from core.losses import Targets, main_output
from core.models.building import load_parameters
from core.models.unchanged import unchanged
from core.target import Target, Truth

# Length of the prior's step relative to the output's: no weight has to be found per model.
_BALANCE = 1.0
_RATE = 0.03
ITERATIONS = 200


@dataclass(frozen=True)
class Representatives:
    """Images of classes, one per restart.

    Attributes:
        classes: Numbers of the classes, in order, K.
        images: Restarts x K x C x ..., in [0, 1] where inputs have bounds; of each class the one
            that the model is surest of first.
        confidences: The model's probability of the class, per class, at that one.
    """

    classes: tuple[int, ...]
    images: torch.Tensor
    confidences: tuple[float, ...]


def invert_model(
    client: Target,
    state: Mapping[str, torch.Tensor],
    classes: tuple[int, ...],
    *,
    restarts: int = 4,
    iterations: int = ITERATIONS,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> Representatives:
    """Find images of every class that the model is sure of.

    Args:
        client: Says what the model, its inputs and its loss are.
        state: Of the model that is inverted.
        classes: Numbers of the classes, in order.
        restarts: Starts per class.
        iterations: How many each start gets.
        seed: Of the starts.
        device: Where the model runs.
    """
    model = client.model.build().to(device)
    load_parameters(model, state)
    each = torch.tensor(classes, device=device)
    generator = torch.Generator().manual_seed(seed)
    with unchanged(model):
        model.eval()
        found, outputs = [], []
        for _ in range(restarts):
            start = torch.rand((len(classes), *client.data.shape), generator=generator)
            found.append(_climbed(model, client.data, each, start.to(device), iterations))
            with torch.no_grad():
                outputs.append(main_output(model(client.data.normalize(found[-1]))))
    images, logits = torch.stack(found), torch.stack(outputs)
    places = torch.arange(len(classes), device=device)
    order = logits[:, places, each].argsort(0, descending=True)
    sure = _probabilities(client, logits[order[0], places])[places, each]
    return Representatives(classes, images[order, places].cpu(), tuple(sure.tolist()))


def _probabilities(client: Target, logits: torch.Tensor) -> torch.Tensor:
    return logits.sigmoid() if client.loss.targets is Targets.LABELS else logits.softmax(1)


def _climbed(
    model: nn.Module, data: DataSpec, classes: torch.Tensor, start: torch.Tensor, iterations: int
) -> torch.Tensor:
    """Images that climbed their class's output, total variation held small, inside the box."""
    images = start.clone().requires_grad_()
    optimiser = torch.optim.Adam([images], lr=_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, iterations)
    smooth = TOTAL_VARIATIONS["double-opponents"]() if len(data.shape) > 1 else None
    for _ in range(iterations):
        outputs = main_output(model(data.normalize(images)))
        (up,) = torch.autograd.grad(outputs.gather(1, classes[:, None]).sum(), images)
        images.grad = -_unit(up)
        if smooth is not None:
            (rough,) = torch.autograd.grad(smooth(images).sum(), images)
            images.grad += _BALANCE * _unit(rough)
        optimiser.step()
        schedule.step()
        with torch.no_grad():
            images.copy_(data.clamp(images))
    return images.detach()


def _unit(gradient: torch.Tensor) -> torch.Tensor:
    """Every image's gradient at length 1."""
    lengths = gradient.flatten(1).norm(dim=1).clamp_min(1e-30)
    return gradient / lengths.view(-1, *[1] * (gradient.dim() - 1))


def class_representatives(
    client: Target,
    state: Mapping[str, torch.Tensor],
    members: Truth,
    non_members: Truth,
    *,
    restarts: int = 4,
    iterations: int = ITERATIONS,
    compared: int = 0,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> tuple[ClassSection, ...]:
    """Class representatives of a model against the members of their class.

    Args:
        client: Says what the model, its inputs and its loss are.
        state: Of the model that is inverted, the final global one.
        members: Images in [0, 1] that were trained on, and their classes or findings.
        non_members: Likewise, of images that were not.
        restarts: Starts per class; the protocol has 50.
        iterations: How many each start gets.
        compared: Images of each kind and class at most, drawn by chance; 0: all.
        seed: Of starts and of the reference noise.
        device: Where the model runs.

    Returns:
        A section for every class of which there are members and non-members; empty where the
        client has neither classes nor findings, and of text.
    """
    classes = classes_of(client, members, non_members)
    if not classes:
        return ()
    found = invert_model(
        client, state, classes,
        restarts=restarts, iterations=iterations, seed=seed, device=device,
    )  # fmt: skip
    return tuple(
        ClassSection(
            of_class=c,
            confidence=sure,
            similarities=tuple(
                similarity_section(
                    metric,
                    images,
                    some_of(members.images[_of_class(members, c)], compared, seed),
                    some_of(non_members.images[_of_class(non_members, c)], compared, seed),
                    seed=seed,
                    data=client.data,
                )
                for metric in metrics_of(client.data)
            ),
        )
        for c, images, sure in zip(
            classes, found.images.transpose(0, 1), found.confidences, strict=True
        )
    )


def classes_of(client: Target, members: Truth, non_members: Truth) -> tuple[int, ...]:
    """The classes, or findings, that there are members and non-members of."""
    # Nothing climbs from token to token.
    if client.loss.targets not in (Targets.CLASSES, Targets.LABELS) or client.data.n_tokens:
        return ()
    return tuple(
        c
        for c in range(client.data.n_classes)
        if _of_class(members, c).any() and _of_class(non_members, c).any()
    )


def _of_class(samples: Truth, of_class: int) -> torch.Tensor:
    """Which samples are of a class, or mostly of it, or have the finding of that number."""
    labels = samples.labels
    return labels == of_class if labels.dim() == 1 else labels[:, of_class] > 0.5
