"""What is told of the model that a site received."""

from __future__ import annotations

from audit.record import ReceivedSection
from audit.show.words import listed, p_text, percent, sentence


def words_of(received: ReceivedSection) -> str:
    """Whether it looks like one that was made to leak, in a few sentences."""
    if received.p_value is None or received.false_alarm is None:
        return sentence(
            "whether the received model was made to leak was not examined: "
            f"{received.note or 'nothing is known'}"
        )
    against = "and with the model of the round before " if received.compared else ""
    basis = (
        f"Compared {against}with {received.rounds} honest rounds that the site made by itself, at "
        f"most {percent(received.false_alarm)} of honest models are called suspicious "
        f"({p_text(received.p_value)} is this model's p-value)."
    )
    if not received.suspicious:
        return f"The received model does not look as if it was made to leak. {basis}"
    alarms = [each.detector for each in received.detectors if each.alarm]
    named = f" Alarms: {listed(alarms)}." if alarms else ""
    return (
        "The received model is suspicious: it may have been made to leak. Do not train it before "
        f"somebody has looked.{named} {basis}"
    )
