"""What an attacker does about published defenses, one file each.

Importing this package registers the answers; `attack.knowledge.known_defenses` holds those to
noise, clipping and compression, and asks for one by name.
"""

from attack.knowledge.answers import (
    ats,
    censor,
    dcs2,
    graddefense,
    hidden_layers,
    instahide,
    mixup,
    outpost,
    precode,
    refiner,
    shadow,
    svdefense,
)

__all__ = [
    "ats",
    "censor",
    "dcs2",
    "graddefense",
    "hidden_layers",
    "instahide",
    "mixup",
    "outpost",
    "precode",
    "refiner",
    "shadow",
    "svdefense",
]
