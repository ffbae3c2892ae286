"""Several hypotheses about the labels, of which the gradient loss chooses one.

Rules of label recovery disagree, and where images of a batch are not treated alike
(asynchronous BatchNorm shards, local batches) it matters which label is where. Every
hypothesis is inverted for a few iterations, the worse half is dropped, the others get
twice as many, until one is left. The truth is never looked at.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch

from attack.knowledge.labels import recover_labels, rule_names
from core.errors import InputError
from core.processes.distributed import shard_sizes

if TYPE_CHECKING:
    from core.target import Target

# The objective that an inversion with these N labels reaches within so many iterations.
Trial = Callable[[torch.Tensor, int], float]

MAX_ARRANGEMENTS = 24
FIRST_ITERATIONS = 100
# None of them is a rule that an attacker would choose.
_NO_CHOICE = {"known", "llg-negatives", "llg-stale"}


def label_candidates(target: Target) -> list[torch.Tensor]:
    """What the rules that apply make of the labels, each outcome once.

    Raises:
        InputError: No rule applies.
    """
    model = target.build_model()
    found: dict[tuple[int, ...], torch.Tensor] = {}
    reasons = []
    for rule in rule_names():
        if rule in _NO_CHOICE:
            continue
        try:
            labels = recover_labels(rule, target, model)
        except InputError as error:
            reasons.append(str(error))
            continue
        found.setdefault(tuple(labels.sort().values.tolist()), labels)
    if not found:
        raise InputError(f"no rule recovers labels: {'; '.join(reasons)}")
    return list(found.values())


def parts_of(target: Target) -> list[int]:
    """Sizes of the parts of the batch between which a label's place matters."""
    if target.n_clients > 1:
        return _parts_of_clients(target)
    if target.train_mode and not target.synchronized and target.local.batches == 1:
        return list(target.shards)
    even = target.local.order is None
    if even and target.local.batches > 1 and len(target.shards) == 1:
        return shard_sizes(target.batch_size, target.local.batches)
    return [target.batch_size]


def _parts_of_clients(target: Target) -> list[int]:
    """The local batches of every client; a single step without groups is one of all of them."""
    if target.local.shares_gradient and len(target.shards) == 1:
        return [target.batch_size]
    batches = target.local.batches if target.local.order is None else 1
    return shard_sizes(target.images_per_client, batches) * target.n_clients


def arrangements(
    labels: torch.Tensor, parts: Sequence[int], limit: int = MAX_ARRANGEMENTS, seed: int = 0
) -> list[torch.Tensor]:
    """Distinct ways to distribute a multiset of labels over the parts of a batch.

    Args:
        labels: N class indices, in any order.
        parts: Sizes that add up to N.
        limit: Where there are more ways, so many of them at random.
        seed: Seed of that choice.

    Returns:
        N class indices each, part by part; sorted within a part, where order means nothing.
    """
    counts = Counter(sorted(labels.tolist()))
    ways = list(itertools.islice(_distribute(counts, list(parts)), limit + 1))
    if len(ways) <= limit:
        return [torch.tensor(way) for way in ways]
    generator = torch.Generator().manual_seed(seed)
    chosen: dict[tuple[int, ...], None] = {}
    for _ in range(10 * limit):
        if len(chosen) == limit:
            break
        shuffled = labels[torch.randperm(len(labels), generator=generator)]
        pieces = shuffled.split(list(parts))
        chosen[tuple(n for piece in pieces for n in sorted(piece.tolist()))] = None
    return [torch.tensor(way) for way in chosen]


def _distribute(counts: Counter[int], parts: list[int]) -> Iterator[tuple[int, ...]]:
    if not parts:
        yield ()
        return
    for part in _choices(sorted(counts.items()), parts[0]):
        for rest in _distribute(counts - Counter(part), parts[1:]):
            yield (*part, *rest)


def _choices(counts: list[tuple[int, int]], size: int) -> Iterator[tuple[int, ...]]:
    """Distinct multisets of `size` labels out of the given counts."""
    if size == 0:
        yield ()
        return
    if not counts:
        return
    (label, count), rest = counts[0], counts[1:]
    for taken in range(min(count, size), -1, -1):
        for others in _choices(rest, size - taken):
            yield (label,) * taken + others


def choose_labels(
    candidates: Sequence[torch.Tensor],
    trial: Trial,
    *,
    first_iterations: int = FIRST_ITERATIONS,
) -> tuple[torch.Tensor, int]:
    """The hypothesis whose inversion matches the gradient best, by successive halving.

    Args:
        candidates: N labels each.
        trial: Inverts with some labels, see `attack.loop.inversion.label_trial`.
        first_iterations: For each of them in the first round; doubled in every further one.

    Returns:
        The labels, and the iterations that the choice took in total.
    """
    field, iterations, spent = list(candidates), first_iterations, 0
    while len(field) > 1:
        losses = [trial(labels, iterations) for labels in field]
        spent += iterations * len(field)
        order = sorted(range(len(field)), key=lambda i: (losses[i], i))
        field = [field[i] for i in order[: math.ceil(len(field) / 2)]]
        iterations *= 2
    return field[0], spent


def arrange_labels(
    target: Target, labels: torch.Tensor, trial: Trial, *, seed: int
) -> torch.Tensor:
    """Put recovered labels where they belong, if the batch has parts that differ.

    A label at the wrong shard would pass for protection: with the statistics of two shards
    known, it costs 24 dB.

    Args:
        target: What the client shared.
        labels: N recovered labels in any order.
        trial: Inverts with some labels, see `attack.loop.inversion.label_trial`.
        seed: Seed of the choice among too many arrangements.
    """
    candidates = arrangements(labels, parts_of(target), seed=seed)
    return choose_labels(candidates, trial)[0]


def iterations_for(n_candidates: int, budget: int) -> int:
    """First iterations of `choose_labels` such that all rounds together stay in a budget.

    Every round costs about the same: half as many hypotheses, twice as long.
    """
    rounds = max(1, math.ceil(math.log2(max(2, n_candidates))))
    return max(1, budget // (rounds * max(1, n_candidates)))
