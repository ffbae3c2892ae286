"""Membership: is an image told from one that was not trained on, by the models' losses?

Attack A of the protocol that hospitals of a swarm follow. Two attackers see every image's loss
under models that a site receives or sends: the threshold says "member" where the last model's
loss is small; the trajectory is a logistic regression on the losses under all models, learned on
one half of the images and measured on the other, over five random halves. A third sees no label:
it says "member" where the last model is sure of whatever class it predicts.

Members and non-members have to be exchangeable but for the training: the same classes in the same
shares, no patient on both sides.

Source: Yeom et al., Privacy Risk in Machine Learning, CSF 2018, https://arxiv.org/abs/1709.01604
    (threshold); Liu et al., Membership Inference Attacks by Exploiting Loss Trajectory, CCS 2022,
    https://arxiv.org/abs/2208.14933 (trajectory).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from audit.record import RateSection
from core.data.specs import DataSpec
from core.errors import InputError
from core.losses import Loss, Targets, main_output
from core.models.building import load_parameters
from core.models.unchanged import unchanged
from core.target import Target, Truth

State = Mapping[str, torch.Tensor]

THRESHOLD, TRAJECTORY = "loss threshold", "loss trajectory"
CONFIDENCE = "confidence threshold"
GLOBAL, LOCAL, SINGLE_SITE = "global", "local", "single site"
# Members, and non-members, below which a half has nothing to learn from or to measure.
FEWEST = 4
_HALVES = 5
_INTERVAL = (2.5, 97.5)
# Images that pass a model at once.
_BATCH = 64


def measure_membership(
    client: Target,
    rounds: Sequence[State],
    local: State | None,
    members: Truth,
    non_members: Truth,
    *,
    single_site: Sequence[State] = (),
    seed: int = 0,
    bootstrap: int = 1000,
    device: torch.device | str = "cpu",
) -> tuple[RateSection, ...]:
    """How well members are told from non-members.

    Args:
        client: Says what the model, its inputs and its loss are.
        rounds: The global model after each round, the last one last.
        local: What the site sent; its trajectory is the rounds' and its own. None: there is none.
        members: Images (N x C x ...) that were trained on, and their targets.
        non_members: Likewise, of images that were not.
        single_site: A model of the site's images alone, after each of its rounds, the last one
            last; only the last one has no trajectory.
        seed: Of halves and bootstrap.
        bootstrap: Samples behind an interval.
        device: Where the models run.

    Returns:
        Threshold, trajectory and confidence for the global, then for the local and the single-site
        model, each over all images and then per class. Empty where there are too few images, see
        `too_few`; without those of a class that has too few. One model has no trajectory.

    Raises:
        InputError: scikit-learn is absent, or a loss is not finite.
    """
    _require_scikit_learn()
    if too_few(len(members.labels), len(non_members.labels)):
        return ()
    both = [members, non_members]
    is_member = np.arange(sum(len(s.labels) for s in both)) < len(members.labels)
    classes = _classes(client.loss, *both)
    models = {
        GLOBAL: list(rounds),
        LOCAL: [] if local is None else [*rounds, local],
        SINGLE_SITE: list(single_site),
    }
    losses = {id(s): losses_under(client, [s], both, device)
              for states in models.values() for s in states}  # fmt: skip
    found: list[RateSection] = []
    for model, states in models.items():
        if states:
            seen = np.concatenate([losses[id(s)] for s in states], axis=1)
            sure = None if classes is None else confidences(client, states[-1], both, device)
            found += rates(model, seen, is_member, classes, seed, bootstrap, sure)
    return tuple(found)


def too_few(members: int, non_members: int) -> str:
    """Why membership cannot be measured, in a sentence; empty where it can."""
    if min(members, non_members) >= FEWEST:
        return ""
    return (
        f"membership is not measured: it takes {FEWEST} members and {FEWEST} non-members, and "
        f"there are {members} and {non_members}"
    )


def _require_scikit_learn() -> None:
    try:
        import sklearn  # noqa: F401
    except ImportError:
        raise InputError(
            "measuring membership needs scikit-learn: pip install 'gradinvbench[audit]'"
        ) from None


def _classes(loss: Loss, *images: Truth) -> np.ndarray | None:
    """Every image's class; None where targets are no class indices."""
    labels = torch.cat([each.labels for each in images])
    if loss.targets is not Targets.CLASSES or labels.dim() > 1:
        return None
    return labels.numpy()


# -- Losses -------------------------------------------------------------------------------


def losses_under(
    client: Target,
    states: Sequence[State],
    images: Sequence[Truth],
    device: torch.device | str = "cpu",
) -> np.ndarray:
    """Every image's loss under every state of the model, images x states.

    Args:
        client: Says what the model, its inputs and its loss are.
        states: Parameters and buffers.
        images: Sets of images and targets, one after the other.
        device: Where the model runs.

    Raises:
        InputError: A loss is not finite.
    """
    model, columns = client.model.build().to(device), []
    for state in states:
        load_parameters(model, state)
        columns.append(
            [v for s in images for v in sample_losses(model, client.data, client.loss, s)]
        )
    losses = np.array(columns, dtype=float).T
    if not np.isfinite(losses).all():
        raise InputError("membership: a loss is not finite; a model has diverged")
    return losses


@torch.no_grad()
def sample_losses(model: nn.Module, data: DataSpec, loss: Loss, images: Truth) -> list[float]:
    """The loss of every image alone, in eval mode; the model stays as it is."""
    parameter = next(model.parameters())
    inputs = data.normalize(data.placed(images.inputs, parameter))
    targets = images.targets.to(parameter.device)
    with unchanged(model):
        model.eval()
        batches = zip(inputs.split(_BATCH), targets.split(_BATCH), strict=True)
        return [value for batch in batches for value in _losses(model, loss, *batch)]


def _losses(
    model: nn.Module, loss: Loss, inputs: torch.Tensor, targets: torch.Tensor
) -> Iterator[float]:
    outputs = model(inputs)
    if len(inputs) == 1:
        yield float(loss(outputs, targets))
    elif isinstance(outputs, torch.Tensor):
        pairs = zip(outputs.split(1), targets.split(1), strict=True)
        yield from (float(loss(*pair)) for pair in pairs)
    else:
        # How several outputs are cut only the model knows: one image at a time.
        for pair in zip(inputs.split(1), targets.split(1), strict=True):
            yield from _losses(model, loss, *pair)


@torch.no_grad()
def confidences(
    client: Target, state: State, images: Sequence[Truth], device: torch.device | str = "cpu"
) -> np.ndarray:
    """How sure a model is of the class that it predicts, per image.

    Args:
        client: Says what the model and its inputs are; its outputs are logits of classes.
        state: Parameters and buffers.
        images: Sets of images, one after the other.
        device: Where the model runs.
    """
    model = client.model.build().to(device)
    load_parameters(model, state)
    with unchanged(model):
        model.eval()
        inputs = torch.cat([each.inputs for each in images])
        sure = [
            main_output(model(client.data.normalize(batch.to(device)))).softmax(1).amax(1)
            for batch in inputs.split(_BATCH)
        ]
    return torch.cat(sure).double().cpu().numpy()


# -- Statistics ---------------------------------------------------------------------------


@dataclass(frozen=True)
class _Scored:
    """What an attacker says of some images.

    Attributes:
        places: Numbers of the images.
        values: Their scores, large for members.
        threshold: From where on it says "member".
    """

    places: np.ndarray
    values: np.ndarray
    threshold: float = 0.0

    def of(self, chosen: np.ndarray) -> _Scored:
        """The part that belongs to some images (one boolean for every image)."""
        inside = chosen[self.places]
        return _Scored(self.places[inside], self.values[inside], self.threshold)


def rates(
    model: str,
    losses: np.ndarray,
    is_member: np.ndarray,
    classes: np.ndarray | None,
    seed: int,
    bootstrap: int,
    sure: np.ndarray | None = None,
) -> Iterator[RateSection]:
    """The rates of the attackers on one model, over all images and per class.

    Args:
        model: What the sections call it.
        losses: Images x models, the last model last.
        is_member: Per image.
        classes: Per image, or None.
        seed: Of halves and bootstrap.
        bootstrap: Samples behind an interval.
        sure: Per image, how sure the last model is of the class that it predicts; None: nobody
            looked.
    """
    halves = _halves(is_member, classes, np.random.default_rng(seed))
    everything = _Scored(np.arange(len(losses)), -losses[:, -1])
    judged = [_at_threshold(-losses[:, -1], is_member, *half) for half in halves]
    methods = {THRESHOLD: ([everything], judged)}
    if losses.shape[1] > 1:
        learned = [_at_threshold(_learned(losses, is_member, h[0]), is_member, *h) for h in halves]
        methods[TRAJECTORY] = (learned, learned)
    if sure is not None:
        judged = [_at_threshold(sure, is_member, *half) for half in halves]
        methods[CONFIDENCE] = ([_Scored(np.arange(len(losses)), sure)], judged)
    for method, (ranked, at_threshold) in methods.items():
        for of_class, chosen in _groups(is_member, classes):
            auroc, low, high = _auroc([r.of(chosen) for r in ranked], is_member, seed, bootstrap)
            members = int((is_member & chosen).sum())
            yield RateSection(
                method=method,
                model=model,
                auroc=auroc,
                auroc_low=low,
                auroc_high=high,
                balanced_accuracy=_balanced([s.of(chosen) for s in at_threshold], is_member),
                of_class=of_class,
                members=members,
                non_members=int(chosen.sum()) - members,
                best_balanced_accuracy=_best_balanced([r.of(chosen) for r in ranked], is_member),
            )


def _groups(
    is_member: np.ndarray, classes: np.ndarray | None
) -> Iterator[tuple[int | None, np.ndarray]]:
    """All images, then every class that has enough of both kinds."""
    yield None, np.ones(len(is_member), dtype=bool)
    for of_class in [] if classes is None else np.unique(classes).tolist():
        inside = classes == of_class
        if not too_few(int((is_member & inside).sum()), int((~is_member & inside).sum())):
            yield of_class, inside


def _halves(
    is_member: np.ndarray, classes: np.ndarray | None, rng: np.random.Generator
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Places to learn from and to measure; of members and of each class half on either side."""
    groups = np.zeros(len(is_member)) if classes is None else classes
    strata = [
        np.flatnonzero((is_member == member) & (groups == group))
        for member in (True, False)
        for group in np.unique(groups)
    ]
    halves = []
    for _ in range(_HALVES):
        # Of an odd stratum the odd image falls on either side in turn, not always on the same.
        order = np.concatenate([rng.permutation(stratum) for stratum in strata])
        halves.append((order[::2], order[1::2]))
    return halves


def _learned(losses: np.ndarray, is_member: np.ndarray, learn: np.ndarray) -> np.ndarray:
    """Every image's score by a logistic regression on the losses of some."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    regression = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    regression.fit(losses[learn], is_member[learn])
    return np.asarray(regression.decision_function(losses))


def _at_threshold(
    scores: np.ndarray, is_member: np.ndarray, learn: np.ndarray, measure: np.ndarray
) -> _Scored:
    """The scores of one half, with the threshold that is best on the other."""
    from sklearn.metrics import roc_curve

    false, true, thresholds = roc_curve(is_member[learn], scores[learn])
    return _Scored(measure, scores[measure], float(thresholds[np.argmax(true - false)]))


def _balanced(judged: Sequence[_Scored], is_member: np.ndarray) -> float:
    """Mean over halves of the mean of true positive and true negative rate."""
    found = []
    for scored in judged:
        member, said = is_member[scored.places], scored.values >= scored.threshold
        found.append((said[member].mean() + 1 - said[~member].mean()) / 2)
    return float(np.mean(found))


def _best_balanced(ranked: Sequence[_Scored], is_member: np.ndarray) -> float:
    """The same at the threshold that is best for the images that it is measured on."""
    from sklearn.metrics import roc_curve

    found = []
    for scored in ranked:
        false, true, _ = roc_curve(is_member[scored.places], scored.values)
        found.append(float((true - false).max() + 1) / 2)
    return float(np.mean(found))


def _auroc(
    ranked: Sequence[_Scored], is_member: np.ndarray, seed: int, bootstrap: int
) -> tuple[float, float, float]:
    """Mean AUROC of some rankings, and the mean ends of their 95 % bootstrap intervals.

    A sample takes as many members as there are, and as many non-members, with repetition. The
    interval is as wide as that of one half, which is more than the mean of several varies by. By
    how much more its samples do not say, since one half learns from what another one measures:
    the interval of the mean itself held 0.5 in 85 % of runs without membership, this one in 99 %.
    """
    rng, n = np.random.default_rng(seed), len(is_member)
    counts = np.zeros((1 + bootstrap, n))
    seen = np.isin(np.arange(n), np.concatenate([r.places for r in ranked]))
    for kind in (is_member & seen, ~is_member & seen):
        size = int(kind.sum())
        counts[0, kind] = 1
        counts[1:, kind] = rng.multinomial(size, np.full(size, 1 / size), bootstrap)
    found = np.array([_weighted_auroc(r, is_member, counts) for r in ranked])
    # A sample may hold no member of some half, and says nothing of it.
    low, high = np.nanpercentile(found[:, 1:], _INTERVAL, axis=1).mean(1)
    return float(found[:, 0].mean()), float(low), float(high)


def _weighted_auroc(scored: _Scored, is_member: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """AUROC under every row of counts: the share of pairs in the right order, ties half.

    Args:
        scored: Of some images.
        is_member: Per image.
        counts: Samples x images, how often each image is in it.
    """
    member = is_member[scored.places]
    weights = counts[:, scored.places]
    order = np.argsort(scored.values[~member])
    others, values = scored.values[~member][order], scored.values[member]
    below = np.cumsum(weights[:, ~member][:, order], axis=1)
    below = np.concatenate([np.zeros((len(counts), 1)), below], axis=1)
    smaller, not_larger = (np.searchsorted(others, values, side) for side in ("left", "right"))
    wins = (below[:, smaller] + below[:, not_larger]) / 2
    pairs = weights[:, member].sum(1) * below[:, -1]
    with np.errstate(invalid="ignore"):
        return np.asarray((weights[:, member] * wins).sum(1) / pairs)
