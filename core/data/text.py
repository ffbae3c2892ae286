"""Sentences of any text as token ids, with a byte-pair vocabulary trained on that text.

`pydoc-topics` is the English that Python's own `help()` prints: 460 KB that are wherever Python
is. The vocabulary needs `tokenizers`.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from core.data.given import GivenData
from core.errors import InputError
from core.losses import Targets
from core.reading import read_bytes

if TYPE_CHECKING:
    from tokenizers import Tokenizer

PYDOC_TOPICS = "pydoc-topics"
VOCABULARY = 4096
# Tokens of a sentence, where nothing else is said.
LENGTH = 16
# Fills up short sentences, where they are kept.
PAD, PAD_TEXT = 0, "<pad>"
# The longest texts are the classes of a classifier.
CLASSES = 8
_ENDINGS = (".txt", ".md", ".rst")
MAX_BYTES = 64 * 2**20
# What is longer is no word; a vocabulary of one of 300,000 characters takes minutes.
MAX_WORD = 200
# Of every so many sentences one is for validation.
_VALIDATED = 10


@dataclass(frozen=True)
class Corpus:
    """Sentences of a few texts.

    Attributes:
        name: For file names and tables.
        titles: Of the texts.
        sentences: Of every text.
    """

    name: str
    titles: tuple[str, ...]
    sentences: tuple[tuple[str, ...], ...]


def is_text(data: str) -> bool:
    """Whether `--data` names text: `pydoc-topics`, a text file or a folder of them."""
    if data == PYDOC_TOPICS:
        return True
    path = Path(data)
    if not path.is_dir():
        return path.suffix in _ENDINGS
    # A folder of images may hold a text about them.
    return bool(_files(path)) and len(_files(path)) == sum(1 for _ in path.iterdir())


def text_data(
    data: str = PYDOC_TOPICS,
    length: int = LENGTH,
    targets: Targets | str = Targets.TOKENS,
    shortest: int | None = None,
) -> GivenData:
    """Sentences of token ids; every tenth is for validation.

    Sentences that are too short are left out, longer ones are cut, each is taken once.

    Args:
        data: See `is_text`.
        length: Tokens of each sentence.
        shortest: Sentences of so many tokens and more are kept and filled up with the token
            `PAD`, which the vocabulary has then; None: all have `length` tokens.
        targets: Of the client's loss: of "tokens" the ids themselves, of "classes" the number of
            the text that a sentence is from, of the eight with the most sentences.

    Raises:
        InputError: It cannot be read, has no sentence that is long enough, or the loss has
            other targets.
    """
    targets = Targets(targets)
    corpus = _corpus(data)
    padded = shortest is not None
    vocabulary = _vocabulary(data, padded)
    least = length if shortest is None else shortest
    if not 2 <= least <= length:
        raise InputError(f"the shortest sentence has 2 to {length} tokens, not {least}")
    chosen = _classes(corpus) if targets is Targets.CLASSES else range(len(corpus.titles))
    # By sentence: one that occurs twice would be both the client's and known.
    texts: dict[tuple[int, ...], int] = {}
    for number, text in enumerate(chosen):
        for encoded in vocabulary.encode_batch(list(corpus.sentences[text])):
            if len(encoded.ids) >= least:
                fill = [PAD] * (length - len(encoded.ids))
                texts.setdefault(tuple(encoded.ids[:length] + fill), number)
    if len(texts) < _VALIDATED:
        raise InputError(f"--data {data}: has {len(texts)} sentences of {least} tokens")
    ids = torch.tensor(list(texts))
    known = {Targets.TOKENS: ids, Targets.CLASSES: torch.tensor(list(texts.values()))}
    if targets not in known:
        raise InputError(f"--data {data}: is for --loss next-token or cross-entropy")
    held = torch.arange(len(ids)) % _VALIDATED == _VALIDATED - 1
    return GivenData(
        (ids[~held], known[targets][~held]),
        (ids[held], known[targets][held]),
        name=corpus.name,
        n_tokens=vocabulary.get_vocab_size(),
        tokens=[vocabulary.decode([number]) for number in range(vocabulary.get_vocab_size())],
        class_names=[corpus.titles[text] for text in chosen] if targets is Targets.CLASSES else (),
        pad=PAD if padded else None,
    )


def token_stream(data: str = PYDOC_TOPICS) -> torch.Tensor:
    """All sentences of a text as one row of token ids.

    Args:
        data: See `is_text`.
    """
    corpus, vocabulary = _corpus(data), _vocabulary(data)
    parts = [each.ids for text in corpus.sentences for each in vocabulary.encode_batch(list(text))]
    return torch.tensor([number for part in parts for number in part])


def split_sentences(text: str) -> list[str]:
    """Sentences, each in one line; those with endless words are none."""
    parts = [part.split() for part in re.split(r"(?<=[.!?:])\s+|\n\s*\n", text)]
    return [" ".join(words) for words in parts if words and max(map(len, words)) <= MAX_WORD]


def train_vocabulary(
    sentences: list[str], size: int = VOCABULARY, padded: bool = False
) -> Tokenizer:
    """A byte-pair vocabulary of at most that many tokens, the same for the same sentences.

    Args:
        sentences: To be trained on.
        size: Tokens, at most.
        padded: Whether the first token is one for padding, which no text has.

    Raises:
        InputError: `tokenizers` is absent.
    """
    try:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    except ImportError:
        raise InputError("text needs tokenizers: pip install 'gradinvbench[text]'") from None
    vocabulary = Tokenizer(models.BPE())
    vocabulary.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    vocabulary.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        initial_alphabet=sorted(alphabet),
        show_progress=False,
        special_tokens=[PAD_TEXT] if padded else [],
    )
    vocabulary.train_from_iterator(sentences, trainer)
    return vocabulary


@functools.cache
def _corpus(data: str) -> Corpus:
    if data == PYDOC_TOPICS:
        from pydoc_data.topics import topics

        texts = dict(sorted(topics.items()))
    else:
        texts = _read(Path(data))
    sentences = tuple(tuple(split_sentences(text)) for text in texts.values())
    return Corpus(Path(data).stem, tuple(texts), sentences)


@functools.cache
def _vocabulary(data: str, padded: bool = False) -> Tokenizer:
    return train_vocabulary([s for text in _corpus(data).sentences for s in text], padded=padded)


def _classes(corpus: Corpus) -> list[int]:
    """The texts with the most sentences."""
    order = sorted(range(len(corpus.titles)), key=lambda i: (-len(corpus.sentences[i]), i))
    return sorted(order[:CLASSES])


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix in _ENDINGS)


def _read(path: Path) -> dict[str, str]:
    """Texts by file name, of a file or of a folder."""
    files = _files(path) if path.is_dir() else [path]
    return {file.name: _text(file) for file in files}


def _text(file: Path) -> str:
    text = read_bytes(file, "--data", "text", MAX_BYTES).decode("utf-8", errors="replace")
    return text.replace("\r\n", "\n").replace("\r", "\n")
