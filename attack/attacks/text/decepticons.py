"""Decepticons: a transformer that was made to leak its tokens (Fowl et al. 2022)."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F

from attack.attacks.base import Attack, register_attack
from attack.attacks.parts.bins import read_bins
from attack.attacks.text.parts.last_labels import last_labels
from attack.attacks.text.parts.optimised import labels_of
from attack.attacks.text.parts.result import as_many, text_reconstruction
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


@register_attack
class Decepticons(Attack):
    """Read single tokens out of the feed-forward networks, and put the sentences together.

    The server made the model (stage 2: `--malicious decepticons:FEATURES`). Every neuron of a
    feed-forward network measures the same and has a threshold of its own, so that two neighbours'
    gradients differ by the tokens in between. A token that is alone there comes out exactly: the
    features that name its sentence, which are those of the sentence's first token, and those of
    the token and its position. Both are looked up among all tokens of the vocabulary, which the
    server runs through the model that it sent. The last token of a language model is a label
    only; the gradient of the last layer tells it.

    Sentences that begin with the same token have the same name, and their tokens may be
    exchanged. Every network measures along a direction of its own, and positions and tokens are
    looked up together; the paper shares one direction's thresholds out and assigns positions
    first.

    Source: Fowl, Geiping, Reich, Wen, Czaja, Goldblum, Goldstein, "Decepticons: Corrupted
        Transformers Breach Privacy in Federated Learning for Language Models", ICLR 2023,
        section 3, https://arxiv.org/abs/2201.12675.

    Published: .887 of the tokens of 8 sentences of 32 tokens, in the notebook of
        https://github.com/JonasGeiping/breaching (transformer3).

    Reproduced:
        decepticons: 0.932 (0.876 to 0.984, n = 8), 2026-11-29: reproduced.

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
        rows = _tokens_alone(target)
        read = read_rows(target, rows, parse_text_malice(word).number)
        ids, sentences = sentences_of(read, target.batch_size, target.data.shape[0])
        if target.loss.targets is Targets.TOKENS:
            ids[:, -1] = last_labels(target, ids)
        alone = int((read.score > ALONE).sum())
        details = {"rows": len(rows), "alone": alone, "sentences": sentences}
        return text_reconstruction(target, ids, labels_of(target, labels), began, details)


@dataclass(frozen=True)
class ReadRows:
    """What rows say.

    Attributes:
        names: K, the token that names the row's sentence.
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
    # Norms move and stretch a row: what is centred and of unit length is left.
    named, held = _plain(rows[:, -features:]), _plain(rows[:, :-features])
    names = torch.zeros(len(rows), dtype=torch.long)
    places, tokens = names.clone(), names.clone()
    likeness = torch.full((2, len(rows)), -2.0, dtype=rows.dtype)
    for first, inputs in _of_vocabulary(target):
        length = inputs.shape[1]
        best, which = (named @ _plain(inputs[:, 0, -features:]).T).max(1)
        better = best > likeness[0]
        names[better], likeness[0] = first + which[better], likeness[0].maximum(best)
        # Of tokens x positions.
        all_held = _plain(inputs[..., :-features]).flatten(0, 1)
        best, which = (held @ all_held.T).max(1)
        better = best > likeness[1]
        tokens[better] = first + which[better] // length
        places[better] = which[better] % length
        likeness[1] = likeness[1].maximum(best)
    return ReadRows(names, places, tokens, likeness.amin(0))


def _plain(rows: torch.Tensor) -> torch.Tensor:
    return F.normalize(rows - rows.mean(-1, keepdim=True), dim=-1)


def _of_vocabulary(target: Target) -> Iterator[tuple[int, torch.Tensor]]:
    """What reaches the first network for sentences of one repeated token each, in parts.

    Yields:
        The number of the first token, and n x T x width.
    """
    model = in_mode(target.build_model().double(), False)
    block = transformer_blocks(model)[0]
    length = target.data.shape[0]
    for part in torch.arange(target.data.n_tokens).split(CHUNK):
        ids = part[:, None].expand(-1, length)
        # With gradients, or torch's own encoder would skip its modules.
        with torch.enable_grad():
            (rows,) = inputs_of(model, [block.widened], ids)
        yield int(part[0]), rows


def sentences_of(read: ReadRows, batch_size: int, length: int) -> tuple[torch.Tensor, int]:
    """Sentences (N x T) from single tokens, the surest first; and how many were found.

    A name has as many sentences as it has different tokens at one place.
    """
    order = read.score.argsort(descending=True)
    slots: dict[int, list[list[int]]] = {}
    for index in order.tolist():
        alone = bool(read.score[index] > ALONE)
        name, place = int(read.names[index]), int(read.places[index])
        if name not in slots and not alone:
            continue
        slot = slots.setdefault(name, [[] for _ in range(length)])[place]
        token = int(read.tokens[index])
        # A mixture is a guess, for where nothing better is known.
        if token not in slot and (alone or not slot):
            slot.append(token)
    found = []
    for name, places in slots.items():
        if not places[0]:
            places[0].append(name)
        for number in range(max(map(len, places))):
            found.append([p[min(number, len(p) - 1)] if p else 0 for p in places])
    kept = torch.tensor(found, dtype=torch.long).reshape(-1, length)[:batch_size]
    return as_many(kept, batch_size), len(found)
