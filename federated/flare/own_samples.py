"""A site's own samples, in the place of the images of a data list."""

from __future__ import annotations

import torch
from torch.utils.data import Dataset

from core.data.data_sets import ClientSamples, DataSets, take_samples
from core.data.given import given_data_sets
from core.data.specs import DataSpec
from core.named_objects import called


class OwnSamples(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """The samples that a function of the site's code gave, by the interface of listed images.

    Args:
        samples: Normalised inputs with targets; None for none.
        spec: Undoes the normalisation.
    """

    def __init__(self, samples: ClientSamples | None, spec: DataSpec) -> None:
        self.samples, self.spec = samples, spec

    def __len__(self) -> int:
        return 0 if self.samples is None else len(self.samples)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Input (C x ..., normalised) and target."""
        if self.samples is None:
            raise IndexError(index)
        given, target = self.samples[index]
        return given, torch.as_tensor(target)

    def images(self) -> torch.Tensor:
        """All inputs before normalisation, N x C x ...; in [0, 1] where they have bounds."""
        if self.samples is None or not len(self):
            return torch.zeros(0, *self.spec.shape)
        return take_samples(self.samples, range(len(self)), self.spec)[0]

    def labels(self) -> torch.Tensor:
        """All targets, N x ..."""
        return torch.stack([self[index][1] for index in range(len(self))])


def site_data(text: str, seed: int = 0) -> DataSets:
    """The data of a site's own code, without regard to a model.

    Args:
        text: `module:function`, as `--data` of the commands takes it.
        seed: Seed of random numbers that the site's code draws.

    Raises:
        InputError: They cannot be read as data.
    """
    return given_data_sets(called(text, "data"), seed, f"data {text}")
