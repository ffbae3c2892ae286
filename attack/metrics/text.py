"""How much of the private sentences a reconstruction reads.

Sentences are rows of T token ids. The tokens' texts, where they are known, give the words that
ROUGE counts; else every token is a word.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment

from attack.metrics.evaluation import (
    ONE_TO_ONE,
    TEXT_METRICS,
    Evaluation,
    mean_and_std,
    plain_label,
)
from core.data.specs import DataSpec
from core.errors import InputError
from core.target import Truth

ROUGE = {"rouge1": "rouge1", "rouge2": "rouge2", "rouge_l": "rougeL"}
# From two sentences, as ids and as texts, to a number.
Score = Callable[[Sequence[int], Sequence[int], str, str], float]


def evaluate_text(
    ids: torch.Tensor,
    labels: torch.Tensor | None,
    truth: Truth,
    data: DataSpec | None = None,
    metrics: Sequence[str] | None = None,
    guesses: dict[str, torch.Tensor] | None = None,
) -> Evaluation:
    """Compare sentences with what was meant to stay private.

    Every recovered sentence is assigned to one true sentence, once, so that most tokens are in
    their places.

    Args:
        ids: M x T token ids, M >= N, in any order.
        labels: M recovered labels; None where the attack recovers none.
        truth: N sentences and their labels.
        data: Has the texts of tokens; None: they are unknown.
        metrics: Names in `TEXT_METRICS`; None for all.
        guesses: By name, further sentences (N x T) that know nothing of the gradient.

    Raises:
        InputError: Shapes that do not belong together, or a metric that does not read text.
    """
    names = tuple(TEXT_METRICS if metrics is None else metrics)
    _check(ids, truth, names)
    ids, originals = ids.cpu(), truth.images.cpu()
    text = data.text if data is not None else _ids_as_words
    scores, missing = _scores(names)
    order = assign_sentences(ids, originals, data)

    def measured(found: torch.Tensor) -> dict[str, list[float | None]]:
        pairs = [
            (f[_words(f, data)].tolist(), o[_words(o, data)].tolist(), text(f), text(o))
            for f, o in zip(found, originals, strict=True)
        ]
        nothing: list[float | None] = [None] * len(pairs)
        return {n: [scores[n](*p) for p in pairs] if n in scores else nothing for n in names}

    values = measured(ids[order])
    guessed = {**_guesses(truth), **(guesses or {})}
    baselines = {}
    for name, guess in guessed.items():
        found = measured(guess[assign_sentences(guess, originals, data)])
        baselines[name] = {metric: mean_and_std(numbers) for metric, numbers in found.items()}
    return Evaluation(
        metrics=names,
        matching=ONE_TO_ONE,
        per_image=[
            {
                "index": i,
                "reconstruction": int(order[i]),
                "label_true": _class(truth.labels[i]),
                "label_recovered": None if labels is None else _class(labels[order[i]]),
                "exact": bool(torch.equal(ids[order[i]], originals[i])),
                **{name: values[name][i] for name in names},
            }
            for i in range(len(originals))
        ],
        baselines=baselines,
        order=order,
        missing=missing,
    )


def _check(ids: torch.Tensor, truth: Truth, names: Sequence[str]) -> None:
    wrong = [name for name in names if name not in TEXT_METRICS]
    if wrong:
        raise InputError(f"the metric {wrong[0]} does not read text; {', '.join(TEXT_METRICS)} do")
    if ids.is_floating_point() or ids.shape[1:] != truth.images.shape[1:]:
        raise InputError(
            f"sentences of shape {tuple(ids.shape)} cannot be compared with true ones of shape "
            f"{tuple(truth.images.shape)}"
        )
    if len(ids) < len(truth.images):
        raise InputError(f"{len(ids)} sentences for {len(truth.images)} true ones")


def _class(label: torch.Tensor) -> int | float | list[int] | list[float] | None:
    """A class; of a language model nothing, since its targets are the sentence itself."""
    return None if label.dim() else plain_label(label)


def _ids_as_words(ids: torch.Tensor) -> str:
    return " ".join(map(str, ids.tolist()))


def _words(ids: torch.Tensor, data: DataSpec | None) -> torch.Tensor:
    """Which token ids are no padding; all, where nobody says what is."""
    return torch.ones_like(ids, dtype=torch.bool) if data is None else data.is_word(ids)


def assign_sentences(
    ids: torch.Tensor, originals: torch.Tensor, data: DataSpec | None = None
) -> torch.Tensor:
    """For each of N originals the sentence of M that is assigned to it.

    Tokens in their places count; between equals, those anywhere in the sentence.

    Args:
        ids: M x T.
        originals: N x T.
        data: Says what fills up short sentences, which counts as no token.
    """
    words = _words(originals, data)[:, None]
    placed = ((originals[:, None] == ids[None]) & words).double().mean(-1)
    anywhere = torch.tensor(
        [[_tokens_found(f, o, "", "") for f in ids.tolist()] for o in originals.tolist()]
    )
    _, columns = linear_sum_assignment(np.asarray(-(placed + 1e-3 * anywhere)))
    return torch.from_numpy(columns)


def _guesses(truth: Truth) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    if truth.mean_image is not None:
        found["most frequent tokens"] = truth.mean_image.expand_as(truth.images)
    if truth.nearest_images is not None:
        found["best non-member"] = truth.nearest_images
    return found


def _tokens_placed(found: Sequence[int], true: Sequence[int], _: str, __: str) -> float:
    return sum(f == t for f, t in zip(found, true, strict=False)) / len(true)


def _tokens_found(found: Sequence[int], true: Sequence[int], _: str, __: str) -> float:
    return (Counter(found) & Counter(true)).total() / len(true)


def _exact(found: Sequence[int], true: Sequence[int], _: str, __: str) -> float:
    return float(found == true)


def _edits(found: Sequence[int], true: Sequence[int], _: str, __: str) -> float:
    """Levenshtein's distance of the tokens, per token."""
    row = list(range(len(true) + 1))
    for i, f in enumerate(found, 1):
        last, row[0] = row[0], i
        for j, t in enumerate(true, 1):
            last, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, last + (f != t))
    return row[-1] / len(true)


def _scores(names: Sequence[str]) -> tuple[dict[str, Score], dict[str, str]]:
    """The metrics that can be computed here, and why others cannot."""
    own: dict[str, Score] = {
        "tokens_placed": _tokens_placed,
        "tokens_found": _tokens_found,
        "sentence_exact": _exact,
        "edit_distance": _edits,
    }
    try:
        from rouge_score.rouge_scorer import RougeScorer
        from rouge_score.tokenizers import DefaultTokenizer
    except ImportError:
        reason = "needs rouge-score: pip install 'gradinvbench[text]'"
        return own, {name: reason for name in names if name in ROUGE}
    scorer = RougeScorer([*ROUGE.values()], tokenizer=DefaultTokenizer(use_stemmer=False))

    def rouge(kind: str) -> Score:
        return lambda _, __, read, true: float(scorer.score(true, read)[kind].fmeasure)

    return {**own, **{name: rouge(kind) for name, kind in ROUGE.items()}}, {}
