"""Models that a malicious server sends instead of honest ones.

`ModelSpec.malicious`, or `GivenModel.malicious` of a language model, says what was done, so that
every program that loads a checkpoint builds the same model; `gradients.servers` and
`gradients.malicious_text` set its parameters.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

from core.errors import InputError
from core.models.token_embedding import token_embedding

if TYPE_CHECKING:
    from core.models.architecture import Architecture
    from core.models.building import ModelSpec

# What the number after the kind is, and how many words may follow the kind.
KINDS = {
    "imprint": ("number of bins", 1),
    "fishing": ("class", 1),
    "fishing-feature": ("class", 3),
    "trap": ("number of records", 1),
    "decepticons": ("number of features", 1),
    "loki": ("number of bins", 2),
    "ares": ("number of bins", 1),
    "eggv": ("number of steps", 1),
}
FORMS = (
    "imprint:BINS, loki:BINS[:CLIENTS], ares:BINS, trap:RECORDS, eggv:STEPS, fishing:CLASS or "
    "fishing-feature:CLASS[:FEATURE[:CUT]] (FEATURE: its number, or logit); of a language model "
    "imprint:BINS or decepticons:FEATURES"
)
# What can be done to a language model, and the only one that is done to no other.
OF_TEXT, OF_TEXT_ALONE = ("imprint", "decepticons"), "decepticons"
MAX_BINS = 65536
# Clients that a model can tell apart; of each a copy of the image goes into one layer.
MAX_CLIENTS = 1024
# Instead of a feature's number: the class's own logit, against the mean of all.
LOGIT = "logit"


@dataclass(frozen=True)
class Malice:
    """What a server does to the model it sends.

    Attributes:
        kind: "imprint" (a block in front, Robbing the Fed), "loki" (a block in front that tells
            clients apart), "ares" (a hidden layer), "trap" (the first layer, trap weights),
            "fishing" or "fishing-feature" (the last layer), "eggv" (all of it, by training),
            "decepticons" (all blocks of a transformer).
        number: Bins of a block or layer, records that shall activate a trap, the class to
            fish for, steps of a training, or the features that name a sentence.
        feature: Which feature tells the images of the class apart; None: its logit.
        cut: Value of the feature below which they pass; None: from public images.
        clients: That are told apart.
    """

    kind: str
    number: int
    feature: int | None = None
    cut: float | None = None
    clients: int = 1


def malice_of(model: Architecture) -> str:
    """What a malicious server did to a model, in the words of `--malicious`; empty: nothing."""
    return str(model.describe().get("malicious") or "")


def parse_malice(text: str, n_classes: int, flag: str = "--malicious") -> Malice:
    """Read what the server does, in one of `FORMS`.

    Args:
        text: The flag's value.
        n_classes: Number of the model's outputs.
        flag: Flag that error messages name.

    Raises:
        InputError: Unknown kind, or a number out of range.
    """
    kind, *words = text.split(":")
    what, most = KINDS.get(kind, ("", 0))
    if not 1 <= len(words) <= most or not words[0].isdecimal():
        raise InputError(f"{flag} {text}: expected {FORMS}")
    low, high = _RANGES.get(kind, (0, n_classes - 1))
    if not low <= int(words[0]) <= high:
        raise InputError(f"{flag} {text}: the {what} must lie in {low}..{high}")
    if kind == "loki":
        return Malice(kind, int(words[0]), clients=_clients(text, words[1:], flag))
    feature = words[1] if len(words) > 1 else LOGIT
    if feature != LOGIT and not feature.isdecimal():
        raise InputError(f"{flag} {text}: FEATURE is a number or {LOGIT}")
    cut = _finite(words[2], f"{flag} {text}: CUT") if len(words) > 2 else None
    return Malice(kind, int(words[0]), None if feature == LOGIT else int(feature), cut)


_RANGES = {
    "imprint": (2, MAX_BINS),
    "loki": (2, MAX_BINS),
    "ares": (2, MAX_BINS),
    "trap": (1, MAX_BINS),
    "decepticons": (2, MAX_BINS),
    "eggv": (1, MAX_BINS),
}


def _clients(text: str, words: list[str], flag: str) -> int:
    if not words:
        return 1
    if not words[0].isdecimal() or not 1 <= int(words[0]) <= MAX_CLIENTS:
        raise InputError(f"{flag} {text}: CLIENTS must lie in 1..{MAX_CLIENTS}")
    return int(words[0])


def _finite(text: str, what: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise InputError(f"{what} is a finite number")
    return value


class Imprinted(nn.Module):
    """A classifier behind an imprint block: flatten, linear, ReLU, linear, image again.

    Args:
        model: Takes N x 3 x image_size x image_size.
        image_size: Side of the images.
        bins: Width of the block.

    Source: Fowl et al., "Robbing the Fed", ICLR 2022, section 3,
        https://arxiv.org/abs/2110.13057.
    """

    def __init__(self, model: nn.Module, image_size: int, bins: int) -> None:
        super().__init__()
        n = 3 * image_size**2
        self.imprint = nn.Sequential(
            nn.Flatten(),
            nn.Linear(n, bins),
            nn.ReLU(),
            nn.Linear(bins, n),
            nn.Unflatten(1, (3, image_size, image_size)),
        )
        self.model = model

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """N x 3 x H x W to logits."""
        return self.model(self.imprint(images))


class Separated(nn.Module):
    """A classifier behind a block that keeps the images of several clients apart.

    A convolution gives every client channels of its own, the others' being zero; a dense layer
    sees all channels of all clients; the clipped activation is on for one bin of brightness.

    Args:
        model: Takes N x 3 x image_size x image_size.
        image_size: Side of the images.
        bins: Width of the dense layer.
        clients: Whose channels there are.

    Source: Zhao et al., "LOKI: Large-scale Data Reconstruction Attack against Federated Learning
        through Model Manipulation", IEEE S&P 2024, https://arxiv.org/abs/2303.12233.
    """

    def __init__(self, model: nn.Module, image_size: int, bins: int, clients: int) -> None:
        super().__init__()
        n = 3 * image_size**2
        self.imprint = nn.Sequential(
            nn.Conv2d(3, 3 * clients, 3, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(clients * n, bins),
            nn.Hardtanh(0.0, 1.0),
            nn.Linear(bins, n),
            nn.Unflatten(1, (3, image_size, image_size)),
        )
        self.model = model

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """N x 3 x H x W to logits."""
        return self.model(self.imprint(images))


def add_malicious_layers(model: nn.Module, spec: ModelSpec) -> nn.Module:
    """The model with the layers that `spec.malicious` puts into it."""
    malice = parse_malice(spec.malicious, spec.n_classes)
    if malice.kind == OF_TEXT_ALONE:
        raise InputError(
            f"--malicious {spec.malicious}: is for language models, as --model "
            "core.models.language:gpt2"
        )
    if malice.kind == "imprint":
        return Imprinted(model, spec.image_size, malice.number)
    if malice.kind == "loki":
        return Separated(model, spec.image_size, malice.number, malice.clients)
    return model


def parse_text_malice(text: str, flag: str = "--malicious") -> Malice:
    """Read what the server does to a language model.

    Args:
        text: The flag's value.
        flag: Flag that error messages name.

    Raises:
        InputError: It is done to no language model, or a number is out of range.
    """
    if text.partition(":")[0] not in OF_TEXT:
        raise InputError(
            f"{flag} {text}: a model of your own may be a language model, with imprint:BINS or "
            "decepticons:FEATURES; all else is for our architectures"
        )
    return parse_malice(text, 0, flag)


class ImprintedEmbedding(nn.Module):
    """An embedding behind which an imprint block reads the whole sentence.

    Args:
        embedding: Looks token ids up.
        length: T, tokens of the longest sentence.
        bins: Width of the block.

    Source: Fowl et al., "Robbing the Fed", ICLR 2022, section 3,
        https://arxiv.org/abs/2110.13057; for text as in `breaching`.
    """

    def __init__(self, embedding: nn.Embedding, length: int, bins: int) -> None:
        super().__init__()
        n = length * embedding.embedding_dim
        self.embedding, self.length = embedding, length
        self.imprint = nn.Sequential(nn.Linear(n, bins), nn.ReLU(), nn.Linear(bins, n))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """N x t token ids, t at most T, to N x t x width."""
        missing = self.length - ids.shape[1]
        if missing < 0:
            raise InputError(f"the imprint block takes sentences of {self.length} tokens at most")
        found = F.pad(self.embedding(ids), (0, 0, 0, missing))
        read: torch.Tensor = self.imprint(found.flatten(1)).view_as(found)
        return read[:, : ids.shape[1]]


def add_to_language_model(model: nn.Module, malicious: str, length: int) -> nn.Module:
    """A language model with the layers that a malicious server puts into it.

    Args:
        model: Takes N x T token ids; changed.
        malicious: In the words of `--malicious`; empty for an honest server.
        length: T.

    Raises:
        InputError: The words make no sense.
    """
    if not malicious:
        return model
    malice = parse_text_malice(malicious)
    if malice.kind == "imprint":
        name, layer = token_embedding(model, length)
        block = ImprintedEmbedding(layer, length, malice.number).to(layer.weight)
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, block.train(model.training))
    return model
