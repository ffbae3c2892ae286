"""The words of `--dp-clipping`: what differential privacy clips, in every stage.

"per-sample" is DP-SGD: every image's gradient is clipped to C, and the mean over B images gets
noise of sigma C / B. "batch" is the variant of "Reveal the Leaker and Block the Attacker": the
mean gradient is clipped to C and gets noise of sigma C whatever B is, with BatchNorm in train
mode. At the same sigma its noise is B times as strong, and it guarantees nothing.
"""

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


def noise_sentence(word: str, sigma: float, max_norm: float, batch_size: int) -> str:
    """How strong the noise on a mean gradient is, and how strong it would be the other way.

    Args:
        word: "per-sample" or "batch".
        sigma: Noise multiplier.
        max_norm: C, the clipping norm.
        batch_size: Images of a step.
    """
    strong, weak = sigma * max_norm, sigma * max_norm / batch_size
    if word == PER_SAMPLE:
        return (
            f"noise on the mean gradient: sigma C / B = {weak:.3g}; the published variant "
            f"(--dp-clipping batch) adds sigma C = {strong:.3g}, {batch_size} times as much"
        )
    return (
        f"noise on the mean gradient: sigma C = {strong:.3g}, as published; DP-SGD "
        f"(--dp-clipping per-sample) adds sigma C / B = {weak:.3g}, {batch_size} times less"
    )


def clipping_argument(text: str) -> str:
    """`clipping_word` as a parser's type: argparse shows no other error's sentence."""
    try:
        return clipping_word(text)
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
