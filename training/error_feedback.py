"""What clients keep of their updates when a defense drops a part, and add to the next one."""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence

import torch

from core.errors import InputError
from core.processes.distributed import all_reduce
from training.transforms import Update

Memory = dict[str, torch.Tensor]


class ErrorFeedback(abc.ABC):
    """The memory of every client.

    Args:
        momentum: Of the optimiser.
    """

    # Whether the clients' momentum stands in the place of the server's.
    own_momentum = False

    def __init__(self, momentum: float) -> None:
        self.momentum = momentum
        self.memories: dict[int, dict[str, Memory]] = {}

    @abc.abstractmethod
    def compensated(self, client: int, update: Update, length: float) -> Update:
        """The update with what the client remembers.

        Args:
            client: Its number.
            update: By parameter name.
            length: Learning rate times local steps: what an update is multiplied by.
        """

    @abc.abstractmethod
    def remember(self, client: int, update: Update, shared: Update, length: float) -> None:
        """Keep what was not shared of the compensated `update`, both of the same names."""

    def gathered(self, clients: int) -> dict[str, torch.Tensor]:
        """The memories of all clients as tensors (clients x ...); a collective operation."""
        mine = next(iter(self.memories.values()), {})
        rows: dict[str, torch.Tensor] = {}
        for kind, memory in mine.items():
            for name, like in memory.items():
                row = like.new_zeros((clients, *like.shape))
                for client, kinds in self.memories.items():
                    row[client] = kinds[kind][name]
                rows[f"{kind}/{name}"] = all_reduce(row)
        return rows

    def restore(self, rows: Mapping[str, torch.Tensor], clients: Sequence[int]) -> None:
        """The inverse of `gathered` for some clients."""
        for client in clients:
            memories: dict[str, Memory] = {}
            for key, row in rows.items():
                kind, _, name = key.partition("/")
                memories.setdefault(kind, {})[name] = row[client].clone()
            if memories:
                self.memories[client] = memories


class ErrorFeedbackSGD(ErrorFeedback):
    """What was not shared is added to the next update.

    With gamma the length of a step, p = gamma g + e is transformed, and e becomes p minus what
    was shared of it.

    Source: Karimireddy et al., "Error Feedback Fixes SignSGD and other Gradient Compression
        Schemes", algorithm 1 (EF-SGD), https://arxiv.org/abs/1901.09847.
    """

    def compensated(self, client: int, update: Update, length: float) -> Update:
        """See `ErrorFeedback`."""
        error = self.memories.get(client, {}).get("error", {})
        return {n: g + error[n] / length if n in error else g for n, g in update.items()}

    def remember(self, client: int, update: Update, shared: Update, length: float) -> None:
        """See `ErrorFeedback`."""
        error = {name: (update[name] - given) * length for name, given in shared.items()}
        self.memories[client] = {"error": error}


class DeepGradientCompression(ErrorFeedback):
    """Momentum at the client, accumulated where nothing is shared.

    u = m u + g and v = v + u; v is made sparse and shared; v loses what was shared, and u is
    set to zero there (momentum factor masking).

    Source: Lin et al., "Deep Gradient Compression", section 3.1 and algorithm 4,
        https://arxiv.org/abs/1712.01887; without its warm-up of the sparsity and its clipping.
    """

    own_momentum = True

    def compensated(self, client: int, update: Update, length: float) -> Update:
        """See `ErrorFeedback`."""
        kept = self.memories.get(client)
        velocity, total = (kept["velocity"], kept["total"]) if kept else ({}, {})
        moved = {n: self.momentum * velocity[n] + g if kept else g for n, g in update.items()}
        self.memories[client] = {"velocity": moved, "total": total}
        return {n: total[n] + u if kept else u for n, u in moved.items()}

    def remember(self, client: int, update: Update, shared: Update, length: float) -> None:
        """See `ErrorFeedback`."""
        velocity = self.memories[client]["velocity"]
        self.memories[client] = {
            "velocity": {name: u * (shared[name] == 0) for name, u in velocity.items()},
            "total": {name: v - shared[name] for name, v in update.items()},
        }


FEEDBACKS: dict[str, type[ErrorFeedback]] = {
    "ef-sgd": ErrorFeedbackSGD,
    "dgc": DeepGradientCompression,
}


def feedback_named(name: str | None, momentum: float) -> ErrorFeedback | None:
    """The error feedback of that name; None for none.

    Raises:
        InputError: There is none of that name.
    """
    if name is None:
        return None
    if name not in FEEDBACKS:
        raise InputError(f"--error-feedback {name}: known are {', '.join(FEEDBACKS)}")
    return FEEDBACKS[name](momentum)
