"""The names of sentences in a transformer that a malicious server made, and who bears them.

The first attention writes a projection of the first few tokens of a sentence into the last
features of all its rows (`gradients.malicious_text`): one term per token, which the server knows.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from core.models.module_inputs import inputs_of
from core.models.transformer_blocks import Block, transformer_blocks
from core.models.unchanged import in_mode
from core.target import Target

# Cosine above which two names are one: names that differ in one of four tokens have 0.75.
SAME = 0.98
# Combinations of first tokens that are tried for a sentence, at most.
MOST = 200_000
# Likewise, where one of them may be any of the vocabulary.
UNKNOWN = 128
# Sweeps over the first tokens, each replaced by the best one of the vocabulary.
SWEEPS = 3
# Tokens of the vocabulary that run through the model at a time.
CHUNK = 4096


def plain(rows: torch.Tensor) -> torch.Tensor:
    """Rows centred and of unit length: norms move and stretch a row."""
    return F.normalize(rows - rows.mean(-1, keepdim=True), dim=-1)


@dataclass(frozen=True)
class SentenceNames:
    """What tokens add to the name of the sentence that they begin.

    Attributes:
        terms: m x tokens x features, of a token at each of the first m positions.
        whole: Whether all rows of a sentence bear its name; else those do from position m - 1
            on, because a row sees no later token.
    """

    terms: torch.Tensor
    whole: bool

    @property
    def depth(self) -> int:
        """Number of tokens that make a name."""
        return len(self.terms)

    @property
    def first_named(self) -> int:
        """The position from which rows bear the whole name."""
        return 0 if self.whole else self.depth - 1

    def of(self, tokens: torch.Tensor) -> torch.Tensor:
        """Names (N x features, plain) of sentences that begin with these tokens (N x m)."""
        return plain(sum_of_terms(self.terms, tokens.unbind(1)))

    def decoded(
        self, name: torch.Tensor, candidates: Sequence[Sequence[int]]
    ) -> tuple[list[int], float]:
        """The first tokens of the sentence of that name, and the cosine that they reach.

        Args:
            name: features, plain.
            candidates: Of each of the m positions; the vocabulary is tried where none fits.
        """
        most = int(MOST ** (1 / max(1, sum(len(each) > 1 for each in candidates))))
        tried = torch.tensor(list(itertools.product(*(each[:most] for each in candidates))))
        cosines = self.of(tried) @ name
        best, value = tried[cosines.argmax()], float(cosines.max())
        if value < SAME:
            best, value = self._with_one_unknown(name, candidates)
        for _ in range(SWEEPS):
            if value > SAME:
                break
            for place in range(self.depth):
                others = sum_of_terms(self.terms, best) - self.terms[place, best[place]]
                cosines = plain(others + self.terms[place]) @ name
                if float(cosines.max()) > value:
                    best, value = best.clone(), float(cosines.max())
                    best[place] = cosines.argmax()
        return best.tolist(), value

    def _with_one_unknown(
        self, name: torch.Tensor, candidates: Sequence[Sequence[int]]
    ) -> tuple[torch.Tensor, float]:
        """First tokens of which one is any of the vocabulary, and the cosine that they reach."""
        best, value = torch.zeros(self.depth, dtype=torch.long), -2.0
        for place in range(self.depth):
            others = [each if t != place else [0] for t, each in enumerate(candidates)]
            for tokens in itertools.islice(itertools.product(*others), UNKNOWN):
                rest = sum_of_terms(self.terms, torch.tensor(tokens)) - self.terms[place, 0]
                cosines = plain(rest + self.terms[place]) @ name
                if float(cosines.max()) > value:
                    value, best = float(cosines.max()), torch.tensor(tokens)
                    best[place] = cosines.argmax()
        return best, value


def sum_of_terms(
    terms: torch.Tensor, tokens: Sequence[torch.Tensor] | torch.Tensor
) -> torch.Tensor:
    """The terms of one token per position, added up."""
    added = [term[token] for term, token in zip(terms, tokens, strict=True)]
    return torch.stack(added).sum(0)


def sentence_names(target: Target, features: int) -> SentenceNames:
    """Read off the model what every token adds to a name.

    Args:
        target: Of a client whose model a server made with `decepticons`.
        features: How many of the last features name a sentence.
    """
    model = in_mode(target.build_model().double(), False)
    block = transformer_blocks(model)[0]
    size = block.query.weight.shape[0] // block.heads
    heads = [slice(h * size, (h + 1) * size) for h in range(block.heads)]
    depth = sum(bool(block.out.weight[:, head].any()) for head in heads)
    depth = min(depth, target.data.shape[0])
    parts = []
    every = torch.arange(target.data.n_tokens)
    # Nothing attends to padding, and no sentence begins with it.
    every[~target.data.is_word(every)] = target.data.any_word
    for part in every.split(CHUNK):
        with torch.enable_grad():
            (rows,) = inputs_of(model, [block.attended], part[:, None].expand(-1, depth))
        parts.append(
            torch.stack([_term(block, heads[i], features, rows[:, i]) for i in range(depth)])
        )
    return SentenceNames(torch.cat(parts, 1), _is_whole(model, block, target))


def _term(block: Block, head: slice, features: int, rows: torch.Tensor) -> torch.Tensor:
    """What a head that attends to these rows alone (n x width) writes into the last features."""
    value = rows @ block.value.weight[head].T + block.value.bias[head]
    return value @ block.out.weight[-features:, head].T


def _is_whole(model: torch.nn.Module, block: Block, target: Target) -> bool:
    """Whether the first row of a sentence depends on its later tokens."""
    words = target.data.words
    ids = words[:1].repeat(2, target.data.shape[0])
    ids[1, 1:] = words[1]
    with torch.enable_grad():
        (rows,) = inputs_of(model, [block.widened], ids)
    return not torch.allclose(rows[0, 0], rows[1, 0])
