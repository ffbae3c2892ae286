"""DAGER: exact text from the subspaces of attention gradients (Petrov et al. 2024)."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch

from attack.attacks.base import Attack, register_attack
from attack.attacks.parts.closed_form import gradient_loss
from attack.attacks.text.parts.last_tokens import last_tokens
from attack.attacks.text.parts.layers import TokenLayer, TokenLayers, token_layers
from attack.attacks.text.parts.result import (
    arranged,
    is_pruned,
    lengths_of,
    noise_of,
    text_reconstruction,
)
from attack.attacks.text.parts.spans import ROUNDING, Span, shown_rows, span_of
from attack.reconstruction import Reconstruction
from core.data.specs import DataSpec
from core.errors import InputError
from core.losses import Targets
from core.target import Target

# Relative distance from the first span, and from deeper ones, below which a row lies in it.
# Rounding gives up to 3e-3 where a token's gradient is weak; one at random is far above 0.1.
NEAR = 1e-2
INSIDE = 1e-3
# After several local steps: singular values below this share of the largest are of rows that
# moved with the parameters, and rows lie so many times as far from a span.
MOVED = 1e-4
LOOSER = 3.0
# Tokens that are tried at a position, at most.
MAX_CANDIDATES = 1024
# Beginnings that are followed, at most, in sentences of the batch.
BEAM = 4
# Under noise that the client told of: beginnings per sentence, and tokens at a position.
BEAM_IN_NOISE = 8
NEAREST_IN_NOISE = 8
# Else, where no token lies in the first span, or all do.
NEAREST = 4
# Of so few tokens all are followed, also where the first span is the whole space.
SMALL_VOCABULARY = 128
# Deeper layers that a sentence is checked against.
DEPTH = 3
# Of an encoder: random orders that are improved, per sentence.
STARTS = 12
SWEEPS = 4


@register_attack
class Dager(Attack):
    """Find the tokens whose embeddings lie in the span of a gradient, then their order.

    The gradient of a layer's weight shows the span of the layer's inputs while there are fewer
    tokens in the batch than the layer is wide. In front of the first attention a row depends on a
    token and its position alone: all tokens of the vocabulary are tried. Behind it a row depends
    on the sentence: a decoder's sentences grow token by token, keeping the beginnings that lie in
    the spans of deeper layers; an encoder's are improved one token at a time from random orders.

    All projections of the first attention are read together, because under a causal mask the
    query's gradient misses the first token. The last token of a language model has no gradient; it
    is the last label, which the gradient of the last layers shows. Told of noise or pruning,
    singular values below what the defense changed are left out, and beginnings are ranked by their
    distances from all spans together. After several local steps the rows have moved with the
    parameters, and are looked for a little further from the spans, as section 5 of the paper does
    for federated averaging. Of adapters (LoRA) the first matrix shows its inputs, while there are
    fewer tokens than its rank.

    Source: Petrov, Dimitrov, Baader, Mueller and Vechev, "DAGER: Exact Gradient Inversion for
        Large Language Models", NeurIPS 2024, algorithms 1 and 2, https://arxiv.org/abs/2405.15586.

    Published: GPT-2 and BERT base (width 768), sentences of SST-2 and others: ROUGE-1 of 100 up
        to batches of 64 for decoders, where the tokens are fewer than the width.

    Reproduced:
        dager: 1.000 (1.000 to 1.000, n = 8), 2026-11-29: reproduced.

    Example:
        python training/get_gradients.py --model core.models.language:gpt2 --loss next-token \\
            --data pydoc-topics -b 4 --model-eval
        python main_run.py --attack dager --model core.models.language:gpt2 \\
            --checkpoint CHECKPOINT --metric
    """

    name = "dager"
    reads_tokens = True
    recovers_labels = True
    fits = frozenset({Targets.TOKENS, Targets.CLASSES})

    def reconstruct(
        self,
        target: Target,
        *,
        labels: torch.Tensor | None,
        device: torch.device,
        seed: int,
        **run: Any,
    ) -> Reconstruction:
        """See `Attack.reconstruct`; on the CPU in float64.

        Raises:
            InputError: The model has no attention whose gradient is shared.
        """
        began = time.perf_counter()
        spans = read_spans(target)
        candidates = token_filter(spans, target)
        generator = torch.Generator().manual_seed(seed)
        search = _decoder_search if spans.layers.causal else _encoder_search
        found = search(spans, candidates, target, generator)
        reads_last = target.loss.targets is Targets.TOKENS and not spans.first.reached[-1]
        if target.data.pad is not None and reads_last and len(found.ids):
            found = _with_beginnings(found, spans, target)
        ids = _filled(found, candidates, target)
        if reads_last:
            ids = _completed(ids, spans, target)
        details = {
            "rank": spans.first.basis.shape[1],
            "width": spans.first.basis.shape[0],
            "tokens_over_width": _tokens_over_width(spans, target),
            "candidates": [len(each) for each in candidates],
            "sentences": len(found.ids),
            "largest_distance": _largest(found, spans),
        }
        return text_reconstruction(target, ids, arranged(target, ids, labels), began, details)


def _largest(found: Found, spans: Spans) -> float | None:
    """The largest distance of any row; under noise sums are kept instead."""
    return float(found.distances.max()) if len(found.ids) and not spans.noisy else None


@dataclass(frozen=True)
class Spans:
    """What the gradient tells of the tokens.

    Attributes:
        layers: The client's model.
        first: Of the layer whose rows depend on single tokens.
        deeper: Of layers whose rows depend on sentences.
        loose: How many times as far from a span as usual a row of it may lie.
        noisy: Whether a defense is told of that leaves no row inside.
    """

    layers: TokenLayers
    first: Span
    deeper: tuple[Span, ...]
    loose: float
    noisy: bool = False


@dataclass(frozen=True)
class Found:
    """Sentences, or beginnings of them.

    Attributes:
        ids: N x t.
        distances: N, the largest distance of any row from a span that it should lie in; of a
            decoder's sentences under noise the sum of the logarithms of all.
    """

    ids: torch.Tensor
    distances: torch.Tensor


def read_spans(target: Target) -> Spans:
    """The spans of the first layer and of a few behind it.

    Raises:
        InputError: No layer with a gradient reads single tokens.
    """
    layers, noise, pruned = token_layers(target), noise_of(target), is_pruned(target)
    # The first matrix of an adapter has no gradient while the second is zero.
    groups = [group for group in layers.groups if _has_gradient(group, target)]
    local = [group for group in groups if group[0].local]
    # A layer with fewer outputs than inputs shows as many directions only.
    mixed = [g for g in groups if not g[0].local and _outputs(g) >= g[0].inputs.shape[1]]
    mixed = [group for group in mixed if shown_rows(group).double().mean() > 0.5]
    if not local:
        raise InputError(
            f"--attack dager: {target.model.name} shares no gradient of a layer that reads every "
            "token by itself, as the projections of a first attention do"
        )
    rounding = ROUNDING if target.local.shares_gradient else MOVED
    first, *deeper = (
        span_of(group, target.gradient, noise, rounding, pruned)
        for group in (local[0], *mixed[:DEPTH])
    )
    loose = 1.0 if target.local.shares_gradient else LOOSER
    return Spans(layers, first, tuple(deeper), loose, noisy=pruned or noise > 0)


def _has_gradient(group: tuple[TokenLayer, ...], target: Target) -> bool:
    return any(bool(target.gradient[layer.parameter].any()) for layer in group)


def _tokens_over_width(spans: Spans, target: Target) -> float:
    """Tokens with a gradient over the directions that the first span could have at most."""
    layer, tokens = spans.first.layer, target.batch_size * int(spans.first.reached.sum())
    return tokens / min(layer.inputs.shape[1], layer.slopes.shape[1])


def _outputs(group: tuple[TokenLayer, ...]) -> int:
    return sum(layer.slopes.shape[1] for layer in group)


def token_filter(spans: Spans, target: Target) -> list[torch.Tensor]:
    """For every position the tokens whose rows lie in the first span, the nearest first.

    Where none lies in it, and under noise, a few of the nearest ones per sentence; where all of a
    large vocabulary do, because the span is the whole space, no more than these.
    """
    distances = first_distances(spans, target)
    candidates = []
    for t in range(target.data.shape[0]):
        if not spans.first.reached[t]:
            candidates.append(torch.empty(0, dtype=torch.long))
            continue
        order = distances[:, t].argsort()
        inside = int((distances[:, t] < NEAR * spans.loose).sum())
        few = (NEAREST_IN_NOISE if spans.noisy else NEAREST) * target.batch_size
        every = spans.first.is_full and len(order) <= SMALL_VOCABULARY
        if (spans.first.is_full and not every) or not inside or spans.noisy:
            inside = few if spans.first.is_full else max(few, inside)
        candidates.append(order[: min(inside, MAX_CANDIDATES)])
    return candidates


def first_distances(spans: Spans, target: Target) -> torch.Tensor:
    """Distance of every token at every position from the first span: tokens x T."""
    length = target.data.shape[0]
    parts = []
    for chunk in torch.arange(target.data.n_tokens).split(512):
        # Sentences of one token each: a row depends on nothing else.
        rows = spans.layers.quick_inputs(spans.first.layer, chunk[:, None].expand(-1, length))
        parts.append(spans.first.distances(rows))
    distances = torch.cat(parts)
    every = torch.arange(len(distances))
    distances[~target.data.is_word(every)] = torch.inf
    return distances


def _distances(spans: Spans, span: Span, ids: torch.Tensor) -> torch.Tensor:
    """Of the rows of sentences (N x T) from one span: N x T, 0 where it does not show them."""
    rows = spans.layers.quick_inputs(span.layer, ids)
    return span.distances(rows) * span.reached[: ids.shape[1]]


def _decoder_search(
    spans: Spans, candidates: list[torch.Tensor], target: Target, generator: torch.Generator
) -> Found:
    """Beginnings that lie in the deeper spans, longer by one token at a time.

    Where sentences have unequal lengths, one ends where no longer beginning lies in them.
    """
    if target.data.pad is not None and not spans.noisy:
        return _unequal_sentences(spans, candidates, target)
    found = Found(torch.empty((1, 0), dtype=torch.long), torch.zeros(1))
    for tokens in candidates:
        if not len(tokens):
            break
        longer = _lengthened(found, tokens)
        found = (_nearest_in_noise if spans.noisy else _inside)(spans, longer, target)
    best = found.distances.argsort(stable=True)[: target.batch_size]
    best = _apart(found, target.batch_size, 1) if spans.noisy else best
    return Found(found.ids[best], found.distances[best])


def _unequal_sentences(spans: Spans, candidates: list[torch.Tensor], target: Target) -> Found:
    """Beginnings that no token continues, filled up; a token without a gradient follows each."""
    assert target.data.pad is not None
    length, last = target.data.shape[0], int(not spans.first.reached[-1])
    found = Found(torch.empty((1, 0), dtype=torch.long), torch.zeros(1))
    ended: list[torch.Tensor] = []
    distances: list[float] = []
    # Behind the last place there is no token.
    for t, tokens in enumerate([*candidates, torch.empty(0, dtype=torch.long)]):
        longer = _continued(spans, found, tokens, target)
        parents = {tuple(ids[:t].tolist()) for ids in longer.ids}
        for ids, distance in zip(found.ids, found.distances.tolist(), strict=True):
            if t and tuple(ids.tolist()) not in parents:
                whole = torch.full((length,), target.data.pad)
                whole[: t + last] = target.data.any_word
                whole[:t] = ids
                ended.append(whole)
                distances.append(distance)
        found = longer
        if not len(found.ids):
            break
    if not ended:
        return Found(torch.empty((0, length), dtype=torch.long), torch.empty(0))
    best = torch.tensor(distances).argsort(stable=True)[: target.batch_size]
    return Found(torch.stack(ended)[best], torch.tensor(distances)[best])


def _completed(ids: torch.Tensor, spans: Spans, target: Target) -> torch.Tensor:
    """The sentences with their last tokens, which are labels only."""
    ids, last = ids.clone(), lengths_of(ids, target.data) - 1
    ids[torch.arange(len(ids)), last] = last_tokens(spans.layers, ids, target)
    return ids


def _with_beginnings(found: Found, spans: Spans, target: Target) -> Found:
    """Sentences that are missing, as beginnings of others: those that explain the gradient best."""
    assert target.data.pad is not None
    while 0 < len(found.ids) < target.batch_size:
        tried: list[tuple[float, torch.Tensor]] = []
        for whole in found.ids:
            for end in range(2, int(lengths_of(whole[None], target.data)) + 1):
                cut = whole.clone()
                cut[end - 1 :] = target.data.pad
                cut[end - 1] = target.data.any_word
                ids = _completed(torch.cat([found.ids, cut[None]]), spans, target)
                tried.append((gradient_loss(target, ids, ids, ids.device), cut))
        best = min(tried, key=lambda each: each[0])[1]
        found = Found(
            torch.cat([found.ids, best[None]]), torch.cat([found.distances, torch.zeros(1)])
        )
    return found


def _lengthened(found: Found, tokens: torch.Tensor) -> Found:
    """Every beginning with every one of these tokens behind it."""
    n, m = len(found.ids), len(tokens)
    ids = torch.cat([found.ids.repeat_interleave(m, 0), tokens.repeat(n)[:, None]], 1)
    return Found(ids, found.distances.repeat_interleave(m))


def _continued(spans: Spans, found: Found, tokens: torch.Tensor, target: Target) -> Found:
    """Beginnings with one of these tokens behind them, as far as they lie in the deeper spans."""
    longer = _lengthened(found, tokens)
    for span in spans.deeper:
        if not len(longer.ids):
            break
        here = _distances(spans, span, longer.ids)[:, -1]
        distances = torch.maximum(longer.distances, here)
        kept = distances.argsort(stable=True)[: BEAM * target.batch_size]
        kept = kept[distances[kept] < INSIDE * spans.loose]
        longer = Found(longer.ids[kept], distances[kept])
    return longer


def _inside(spans: Spans, found: Found, target: Target) -> Found:
    """Those beginnings whose last row lies in the deeper spans."""
    # The shallow spans are quick to ask, and leave little to the others.
    for span in spans.deeper:
        here = _distances(spans, span, found.ids)[:, -1]
        distances = torch.maximum(found.distances, here)
        found = _nearest(found.ids, distances, target, INSIDE * spans.loose)
    return found


def _nearest_in_noise(spans: Spans, found: Found, target: Target) -> Found:
    """The nearest beginnings by all spans together, where no row lies inside any of them.

    A defense leaves a span of every layer, some much better than others: the logarithm lets
    those decide in which a beginning is much nearer than another.
    """
    distances = found.distances
    for span in (spans.first, *spans.deeper):
        here = _distances(spans, span, found.ids)[:, -1]
        distances = distances + here.clamp_min(INSIDE).log()
    found = Found(found.ids, distances)
    best = _apart(found, BEAM_IN_NOISE * target.batch_size, BEAM)
    return Found(found.ids[best], found.distances[best])


def _apart(found: Found, most: int, alike: int) -> torch.Tensor:
    """Numbers of the nearest beginnings, few of which share most of their tokens with a nearer one.

    Args:
        found: Beginnings.
        most: How many are chosen.
        alike: Of those that share more than half of their tokens with one, how many at most.
    """
    chosen: list[int] = []
    counts: dict[int, int] = {}
    for index in found.distances.argsort(stable=True)[: 8 * most].tolist():
        leaders = torch.tensor([*counts], dtype=torch.long)
        same = (found.ids[leaders] == found.ids[index]).double().mean(1)
        leader = int(leaders[same.argmax()]) if bool((same > 0.5).any()) else index
        counts[leader] = counts.get(leader, 0) + 1
        if counts[leader] <= alike:
            chosen.append(index)
        if len(chosen) == most:
            break
    return torch.tensor(chosen, dtype=torch.long)


def _nearest(ids: torch.Tensor, distances: torch.Tensor, target: Target, near: float) -> Found:
    """The beginnings inside a span; or the nearest ones, where none is, as under noise."""
    order = distances.argsort(stable=True)
    inside = int((distances < near).sum())
    kept = order[: min(inside or target.batch_size, BEAM * target.batch_size)]
    return Found(ids[kept], distances[kept])


def _encoder_search(
    spans: Spans, candidates: list[torch.Tensor], target: Target, generator: torch.Generator
) -> Found:
    """Sentences from random candidates, improved one token at a time, until all are found."""
    sentences: list[torch.Tensor] = []
    distances: list[float] = []
    left = [set(tokens.tolist()) for tokens in candidates]
    for _ in range(STARTS * target.batch_size):
        start = torch.stack(
            [_pick(each, tokens, generator) for each, tokens in zip(left, candidates, strict=True)]
        )
        if target.data.pad is not None:
            start[int(torch.randint(2, len(start) + 1, (), generator=generator)) :] = (
                target.data.pad
            )
        ids, distance = _improved(spans, start, candidates, target.data)
        if any(torch.equal(ids, other) for other in sentences):
            continue
        sentences.append(ids)
        distances.append(distance)
        if distance < INSIDE * spans.loose:
            left = [each - {token} for each, token in zip(left, ids.tolist(), strict=True)]
        if sum(each < INSIDE * spans.loose for each in distances) >= target.batch_size:
            break
    order = torch.tensor(distances).argsort()[: target.batch_size]
    return Found(torch.stack(sentences)[order], torch.tensor(distances)[order])


def _pick(left: set[int], tokens: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A random candidate, of those in no sentence yet if there are any."""
    pool = torch.tensor(sorted(left)) if left else tokens
    return pool[torch.randint(len(pool), (), generator=generator)]


def _improved(
    spans: Spans, ids: torch.Tensor, candidates: list[torch.Tensor], data: DataSpec
) -> tuple[torch.Tensor, float]:
    """Replace one token after another by the candidate that brings the sentence nearest.

    A sentence that may be short is cut at the place as well, or longer by one token there.
    """
    best = _all_distances(spans, ids[None], data)[0]
    for _ in range(SWEEPS):
        before = ids.clone()
        for t, tokens in enumerate(candidates):
            tried = _tried(ids, t, tokens, data)
            if len(tried) < 2:
                continue
            distances = _all_distances(spans, tried, data)
            winner = int((distances.sum(1) / data.is_word(tried).sum(1)).argmin())
            ids, best = tried[winner], distances[winner]
        if float(best.max()) < INSIDE * spans.loose or torch.equal(ids, before):
            break
    return ids, float(best.max())


def _tried(ids: torch.Tensor, t: int, tokens: torch.Tensor, data: DataSpec) -> torch.Tensor:
    """A sentence (T) with each of these tokens at place t; of unequal lengths also cut there."""
    words = data.is_word(ids)
    if not bool(words[: t + 1].all()) and not (t and bool(words[:t].all())):
        return ids[None]
    tried = ids.repeat(len(tokens), 1)
    tried[:, t] = tokens
    if data.pad is None or t < 2:
        return tried
    cut = ids.clone()
    cut[t:] = data.pad
    return torch.cat([tried, cut[None]])


def _all_distances(spans: Spans, ids: torch.Tensor, data: DataSpec) -> torch.Tensor:
    """For whole sentences (N x T) the largest distance of every row from any deeper span: N x T."""
    each = [_distances(spans, span, ids) * data.is_word(ids) for span in spans.deeper]
    return torch.stack(each).amax(0) if each else torch.zeros(ids.shape)


def _filled(found: Found, candidates: list[torch.Tensor], target: Target) -> torch.Tensor:
    """As many whole sentences as the batch has; what was not found repeats what was."""
    length = target.data.shape[0]
    ids = torch.full((target.batch_size, length), target.data.any_word)
    rows = torch.arange(target.batch_size) % max(1, len(found.ids))
    if len(found.ids):
        ids[:, : found.ids.shape[1]] = found.ids[rows]
    return ids
