"""A site's sentences or records from files, for an audit: `members` and `non_members` beside.

- `members.txt`, `non_members.txt` and the model's `tokenizer.json` (of the package `tokenizers`):
  a sentence per line; of a classifier's, the class in front of it and a tab in between.
- `members.csv` and `non_members.csv`: tables with a header of the same columns, read as
  `core.data.records` reads them.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from core.data.records import load_tables
from core.data.specs import DataSpec
from core.data.text import LENGTH
from core.errors import InputError
from core.reading import read_bytes
from core.target import Truth

if TYPE_CHECKING:
    from tokenizers import Tokenizer

MEMBERS, NON_MEMBERS, TOKENIZER = "members", "non_members", "tokenizer.json"
MAX_BYTES = 256 << 20

# Members, non-members and what they are.
Read = tuple[Truth, Truth, DataSpec]


def is_such(folder: Path, ending: str) -> bool:
    """Whether a folder holds both files of an ending."""
    return all((folder / f"{part}{ending}").is_file() for part in (MEMBERS, NON_MEMBERS))


def read_records(folder: Path, flag: str) -> Read:
    """Both tables, with columns and classes that are those of both together.

    Raises:
        InputError: They cannot be read as tables of the same columns.
    """
    tables = load_tables([folder / f"{part}.csv" for part in (MEMBERS, NON_MEMBERS)], flag)
    members, others = (Truth(t.inputs, t.targets, columns=t.columns) for t in tables)
    return members, others, tables[0].spec


def read_sentences(folder: Path, length: int | None, flag: str) -> Read:
    """Sentences as token ids: those of at least so many tokens, cut to that length.

    Args:
        folder: See the module.
        length: In tokens; None: `core.data.text.LENGTH`.
        flag: That the folder was given with, for messages.

    Raises:
        InputError: No tokenizer, or no sentence that is long enough; some lines have a class and
            others none.
    """
    length = LENGTH if length is None else length
    tokenizer = _tokenizer(folder / TOKENIZER, flag)
    parts = [
        _sentences(folder / f"{part}.txt", tokenizer, length, flag)
        for part in (MEMBERS, NON_MEMBERS)
    ]
    classes = sorted({name for _, names in parts for name in names})
    if "" in classes and len(classes) > 1:
        raise InputError(f"{flag}: some lines begin with a class and a tab, and others do not")
    members, others = (Truth(ids, _targets(ids, names, classes)) for ids, names in parts)
    return members, others, DataSpec.of_tokens("sentences", length, tokenizer.get_vocab_size())


def _targets(ids: torch.Tensor, names: list[str], classes: list[str]) -> torch.Tensor:
    """Of a language model the text itself."""
    return ids if classes == [""] else torch.tensor([classes.index(name) for name in names])


def _tokenizer(path: Path, flag: str) -> Tokenizer:
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise InputError(
            f"{flag}: reading sentences needs tokenizers: pip install 'gradinvbench[text]'"
        ) from None
    content = read_bytes(path, flag, "tokenizer", MAX_BYTES)
    try:
        return Tokenizer.from_str(content.decode())
    except Exception:  # Its parser raises plain exceptions.
        raise InputError(f"{flag}: {path} is no file of a tokenizer") from None


def _sentences(
    path: Path, tokenizer: Tokenizer, length: int, flag: str
) -> tuple[torch.Tensor, list[str]]:
    """Token ids (N x T), and what stands in front of the tab."""
    try:
        lines = read_bytes(path, flag, "text", MAX_BYTES).decode().splitlines()
    except UnicodeDecodeError:
        raise InputError(f"{flag}: {path} is no text in UTF-8") from None
    ids, names = [], []
    for line in filter(str.strip, lines):
        name, tab, sentence = line.partition("\t")
        tokens = tokenizer.encode(sentence if tab else line, add_special_tokens=False).ids
        if len(tokens) >= length:
            ids.append(tokens[:length])
            names.append(name if tab else "")
    if not ids:
        raise InputError(f"{flag}: {path} has no sentence of {length} tokens (--size N: of N)")
    return torch.tensor(ids), names
