"""The words of `--dp-clipping`: what differential privacy clips, in every stage."""

from __future__ import annotations

import argparse

from core.errors import InputError

PER_SAMPLE, BATCH = "per-sample", "batch"
CLIPPINGS = (PER_SAMPLE, BATCH)
# Words of earlier versions.
_FORMER = {"sample": PER_SAMPLE}


def clipping_word(text: str) -> str:
    """The word for a way of clipping, also where it is given in an earlier version's.

    Args:
        text: As typed, or as read from a checkpoint or record.

    Returns:
        "per-sample" or "batch".

    Raises:
        InputError: There is no such way.
    """
    word = _FORMER.get(text, text)
    if word not in CLIPPINGS:
        raise InputError(f"--dp-clipping {text}: choose {' or '.join(CLIPPINGS)}")
    return word


def clipping_argument(text: str) -> str:
    """`clipping_word` as a parser's type: argparse shows no other error's sentence."""
    try:
        return clipping_word(text)
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
