"""Model, data and training of the app."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.data import DataLoader

SIDE = 8
N_CLASSES = 2
HELD_OUT = 60


class Net(nn.Module):
    """Two layers for pictures of three channels."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(3 * SIDE * SIDE, 16)
        self.classes = nn.Linear(16, N_CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classes(torch.relu(self.hidden(x.flatten(1))))


def pictures(n: int, seed: int) -> list[dict[str, torch.Tensor]]:
    """Smooth coloured pictures, normalised to -1 to 1, of both classes in turn."""
    coarse = torch.rand(n, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    fine = nn.functional.interpolate(coarse, (SIDE, SIDE), mode="bilinear")
    labels = torch.arange(n) % N_CLASSES
    return [{"img": 2 * x - 1, "label": y} for x, y in zip(fine, labels, strict=True)]


def load_data(partition_id: int, num_partitions: int, batch_size: int):
    """The first site trains on one picture, the others on 192."""
    n = 1 if partition_id == 0 else 192
    train, test = pictures(n, 2 * partition_id), pictures(HELD_OUT, 2 * partition_id + 1)
    return DataLoader(train, batch_size=batch_size), DataLoader(test, batch_size=batch_size)


def train(net: nn.Module, trainloader: DataLoader, epochs: int, lr: float) -> float:
    """Local training; returns the mean loss."""
    optimizer = torch.optim.SGD(net.parameters(), lr=lr, momentum=0.9)
    losses = []
    for _ in range(epochs):
        for batch in trainloader:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(net(batch["img"]), batch["label"])
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return sum(losses) / len(losses)


@torch.no_grad()
def test(net: nn.Module, testloader: DataLoader) -> float:
    """Share of pictures whose class is right."""
    right = [net(b["img"]).argmax(1) == b["label"] for b in testloader]
    return torch.cat(right).float().mean().item()


test.__test__ = False  # type: ignore[attr-defined]
