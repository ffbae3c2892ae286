"""Decepticons: a transformer that was made to leak its tokens (Fowl et al. 2022)."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F

from attack.attacks.base import Attack, register_attack
from attack.attacks.parts.bins import read_bins
from attack.attacks.text.parts.last_labels import read_labels
from attack.attacks.text.parts.optimised import labels_of
from attack.attacks.text.parts.result import as_many, lengths_of, text_reconstruction
from attack.attacks.text.parts.sentence_names import (
    SAME,
    SentenceNames,
    plain,
    sentence_names,
)
from attack.knowledge.threat_models import Capability
from attack.reconstruction import Reconstruction
from core.errors import InputError
from core.losses import Targets
from core.models.malicious import malice_of, parse_text_malice
from core.models.module_inputs import inputs_of
from core.models.transformer_blocks import transformer_blocks
from core.models.unchanged import in_mode
from core.target import Target

# A bin whose bias gradient is below this share of the largest is empty.
EMPTY = {torch.float64: 1e-10, torch.float32: 1e-6}
# Cosine above which a row is one token and no mixture: rounding leaves 1e-5 of it.
ALONE = 1 - 1e-3
# Tokens of the vocabulary that are tried at a time.
CHUNK = 256
# Tokens times positions that are all tried; beyond, the likeliest of every row.
ALL = 4_000_000
SHIFTS = 4
LIKELY = 4
# Long sentences that run through the model at a time.
PACKED = 4

# Sentences (n x T), and what reaches the first network for them (n x T x width).
Part = tuple[torch.Tensor, torch.Tensor]


@register_attack
class Decepticons(Attack):
    """Read single tokens out of the feed-forward networks, and put the sentences together.

    The server made the model (stage 2: `--malicious decepticons:FEATURES`). Every neuron of a
    feed-forward network measures the same and has a threshold of its own, so that two neighbours'
    gradients differ by the tokens in between. A token that is alone there comes out exactly: the
    features that name its sentence, which are a sum over the sentence's first four tokens, and
    those of the token and its position, which are looked up among all tokens of the vocabulary;
    the server runs these through the model that it sent. The last token of a language model is a
    label only; the gradient of the last layer tells it.

    Sentences that begin with the same four tokens have the same name, and their tokens may be
    exchanged; in the paper it is the first one that names them. Every network measures along a
    direction of its own, and positions and tokens are looked up together; the paper shares one
    direction's thresholds out and assigns positions first.

    Source: Fowl, Geiping, Reich, Wen, Czaja, Goldblum, Goldstein, "Decepticons: Corrupted
        Transformers Breach Privacy in Federated Learning for Language Models", ICLR 2023,
        section 3, https://arxiv.org/abs/2201.12675.

    Published: .887 of the tokens of 8 sentences of 32 tokens, in the notebook of
        https://github.com/JonasGeiping/breaching (transformer3).

    Reproduced:
        decepticons: 0.984 (0.953 to 1.000, n = 8), 2026-11-29: above.
        decepticons-bert: 1.000 (1.000 to 1.000, n = 8), 2026-11-29: above.

    Example:
        python training/get_gradients.py --model core.models.language:gpt2 --loss next-token \\
            --data pydoc-topics -b 8 --model-eval --malicious decepticons:16
        python main_run.py --attack decepticons --model core.models.language:gpt2 \\
            --checkpoint CHECKPOINT --metric
    """

    name = "decepticons"
    reads_tokens = True
    recovers_labels = True
    fits = frozenset({Targets.TOKENS, Targets.CLASSES})
    requires: ClassVar[frozenset[Capability]] = frozenset({Capability.MALICIOUS_SERVER})

    def reconstruct(
        self,
        target: Target,
        *,
        labels: torch.Tensor | None,
        device: torch.device,
        seed: int,
        **run: Any,
    ) -> Reconstruction:
        """See `Attack.reconstruct`; nothing is random.

        Raises:
            InputError: The server was honest, nothing of the feed-forward networks was shared, or
                there are several local steps.
        """
        began = time.perf_counter()
        word = malice_of(target.model)
        if not word.startswith(self.name):
            raise InputError(
                f"--attack {self.name}: {target.model.name} is honest; a malicious server makes "
                "it in stage 2 with --malicious decepticons:FEATURES"
            )
        if not target.local.shares_gradient:
            raise InputError(f"--attack {self.name}: needs the gradient of one local step")
        features = parse_text_malice(word).number
        rows = _tokens_alone(target)
        read = read_rows(target, rows, features)
        names = sentence_names(target, features)
        ids, sure, sentences = sentences_of(read, names, target)
        if target.loss.targets is Targets.TOKENS:
            unknown = target.data.is_word(ids) & ~sure
            unknown[:, 0] = False
            unknown[torch.arange(len(ids)), lengths_of(ids, target.data) - 1] = True
            ids = read_labels(target, ids, unknown)
        alone = int((read.score > ALONE).sum())
        details = {"rows": len(rows), "alone": alone, "sentences": sentences}
        return text_reconstruction(target, ids, labels_of(target, labels), began, details)


@dataclass(frozen=True)
class ReadRows:
    """What rows say.

    Attributes:
        names: K x features, plain, the name of the row's sentence.
        places: K, the position in it.
        tokens: K, the token there.
        score: K, cosine of the row with what this token would give, 1 for a token that is alone.
    """

    names: torch.Tensor
    places: torch.Tensor
    tokens: torch.Tensor
    score: torch.Tensor


def _tokens_alone(target: Target) -> torch.Tensor:
    """Mean input of every filled bin of all feed-forward networks: K x width.

    Raises:
        InputError: Nothing of them was shared.
    """
    found = []
    most = target.batch_size * target.data.shape[0]
    for block in transformer_blocks(target.build_model()):
        weight = target.gradient.get(block.first.parameter)
        bias = target.gradient.get(block.first.bias_parameter)
        if weight is None or bias is None or not bias.any():
            continue
        rows = weight.T if block.first.transposed else weight
        empty = EMPTY.get(weight.dtype, 1e-3)
        found.append(read_bins(-block.first.bias, rows.double(), bias.double(), most, empty))
    if not found:
        raise InputError(
            "--attack decepticons: no gradient of the feed-forward networks was shared"
        )
    return torch.cat(found)


def read_rows(target: Target, rows: torch.Tensor, features: int) -> ReadRows:
    """Look rows (K x width) up among all tokens of the vocabulary at all positions.

    Args:
        target: Its model says what every token gives.
        rows: What came out of the bins.
        features: How many of the last features name a sentence.
    """
    held = plain(rows[:, :-features])
    places = torch.zeros(len(rows), dtype=torch.long)
    tokens, score = places.clone(), torch.full((len(rows),), -2.0, dtype=rows.dtype)
    few = target.data.n_tokens * target.data.shape[0] <= ALL
    parts = _of_vocabulary(target) if few else _of_likely(target, held, features)
    for ids, inputs in parts:
        best, which = (held @ plain(inputs[..., :-features]).flatten(0, 1).T).max(1)
        better = best > score
        tokens[better] = ids.flatten()[which[better]]
        places[better] = which[better] % ids.shape[1]
        score[better] = best[better]
    return ReadRows(plain(rows[:, -features:]), places, tokens, score)


def _inputs(target: Target, sentences: Iterable[torch.Tensor]) -> Iterator[Part]:
    """What reaches the first network for sentences (each n x T): these and n x T x width."""
    model = in_mode(target.build_model().double(), False)
    block = transformer_blocks(model)[0]
    for ids in sentences:
        # With gradients, or torch's own encoder would skip its modules.
        with torch.enable_grad():
            (rows,) = inputs_of(model, [block.widened], ids)
        yield ids, rows


def _of_vocabulary(target: Target) -> Iterator[Part]:
    """Every token at every position, as sentences of one repeated token each."""
    length = target.data.shape[0]
    tokens = target.data.words.split(CHUNK)
    return _inputs(target, (part[:, None].expand(-1, length) for part in tokens))


def _of_likely(target: Target, held: torch.Tensor, features: int) -> Iterator[Part]:
    """The likeliest tokens of every row at its likeliest positions, packed into sentences.

    A row is about a token's part and a position's part. Every token is seen at a few positions,
    whose mean shows its part, and every position with many tokens.

    Args:
        target: Its model says what every token gives.
        held: K x width less features, plain.
        features: How many of the last features name a sentence.
    """
    length, n_tokens = target.data.shape[0], target.data.n_tokens
    words = target.data.words
    every = words[torch.arange(-(-n_tokens // length) * length) % len(words)]
    shifts = {int(i * length / SHIFTS) for i in range(SHIFTS)}
    seen = [every.view(-1, length).roll(shift, 1) for shift in sorted(shifts)]
    of_token = torch.zeros((n_tokens, held.shape[1]), dtype=held.dtype)
    of_place = torch.zeros((length, held.shape[1]), dtype=held.dtype)
    parts = [part for each in seen for part in each.split(PACKED)]
    for ids, inputs in _inputs(target, parts):
        rows = plain(inputs[..., :-features])
        of_token.index_add_(0, ids.flatten(), rows.flatten(0, 1))
        of_place += rows.sum(0)
    of_place /= sum(map(len, seen))
    for ids in seen:
        of_token.index_add_(0, ids.flatten(), -of_place.repeat(len(ids), 1))
    of_token = F.normalize(of_token - of_token.mean(0), dim=-1)
    packed: list[set[int]] = [set() for _ in range(length)]
    directions = F.normalize(of_place - of_place.mean(0), dim=-1)
    for places in (held @ directions.T).topk(min(LIKELY, length)).indices.T:
        likely = ((held - of_place[places]) @ of_token.T).topk(min(LIKELY, n_tokens)).indices
        for place, tokens in zip(places.tolist(), likely.tolist(), strict=True):
            packed[place].update(tokens)
    tried = torch.full((max(map(len, packed)), length), target.data.any_word)
    for place, tokens in enumerate(packed):
        tried[: len(tokens), place] = torch.tensor(sorted(tokens), dtype=torch.long)
    return _inputs(target, tried.split(PACKED))


def sentences_of(
    read: ReadRows, names: SentenceNames, target: Target
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Sentences from single tokens, the surest first.

    Rows of one name are one sentence, or as many as there are different tokens at one place: those
    begin alike. A sentence that may be short ends behind the last token that was read, a language
    model's one token later.

    Returns:
        Token ids, N x T; which of them were read alone; and how many sentences were found.
    """
    batch_size, length, data = target.batch_size, target.data.shape[0], target.data
    behind = 1 + (target.loss.targets is Targets.TOKENS)
    groups = _groups(read, names, batch_size)
    slots: list[list[list[int]]] = [[[] for _ in range(length)] for _ in groups]
    known = torch.zeros((len(groups), length), dtype=torch.bool)
    for number, (head, cosine) in enumerate(_heads(read, names, groups)):
        known[number, : names.depth] = cosine > SAME
        for place, token in enumerate(head):
            slots[number][place].append(token)
    if groups:
        likeness = read.names @ torch.stack(groups).T
        for index in read.score.argsort(descending=True).tolist():
            place, token = int(read.places[index]), int(read.tokens[index])
            if place < names.depth:
                continue
            alone = bool(read.score[index] > ALONE)
            nearest = int(likeness[index].argmax())
            here = slots[nearest][place]
            known[nearest, place] |= alone
            # A mixture is a guess, for where nothing better is known.
            if token not in here and (alone or not here):
                here.append(token)
    found: list[list[int]] = []
    sure: list[torch.Tensor] = []
    for places, read_alone in zip(slots, known, strict=True):
        end = max(place for place, tokens in enumerate(places) if tokens) + behind
        # What nothing was read of is filled up, or unknown.
        fill = [data.any_word if t < end or data.pad is None else data.pad for t in range(length)]
        for number in range(max(map(len, places))):
            pairs = zip(places, fill, strict=True)
            found.append([p[min(number, len(p) - 1)] if p else other for p, other in pairs])
            sure.append(read_alone)
    kept = torch.tensor(found, dtype=torch.long).reshape(-1, length)[:batch_size]
    ids = as_many(kept, batch_size)
    told = torch.stack(sure)[:batch_size] if sure else torch.ones((1, length), dtype=torch.bool)
    return ids, told[torch.arange(batch_size) % len(told)], len(found)


def _groups(read: ReadRows, names: SentenceNames, most: int) -> list[torch.Tensor]:
    """Different names, those of the most rows first, as rows that are alone bear them."""
    found: list[torch.Tensor] = []
    counts: list[int] = []
    for index in read.score.argsort(descending=True).tolist():
        if not read.score[index] > ALONE:
            break
        if read.places[index] < names.first_named:
            continue
        name = read.names[index]
        likeness = torch.stack(found) @ name if found else torch.zeros(1)
        if float(likeness.max()) > SAME:
            counts[int(likeness.argmax())] += 1
        else:
            found.append(name)
            counts.append(1)
    order = sorted(range(len(found)), key=lambda number: -counts[number])
    return [found[number] for number in order[:most]]


def _heads(
    read: ReadRows, names: SentenceNames, groups: list[torch.Tensor]
) -> list[tuple[list[int], float]]:
    """The first tokens of the sentences of these names, and how well they fit."""
    alone = read.score > ALONE
    found = []
    for name in groups:
        candidates = []
        for place in range(names.depth):
            here = alone & (read.places == place)
            own = here & (read.names @ name > SAME) & (place >= names.first_named)
            tokens = read.tokens[own if bool(own.any()) else here].unique().tolist()
            candidates.append(tokens or [0])
        found.append(names.decoded(name, candidates))
    return found
