"""How the images of a federation's sites are described."""

from __future__ import annotations

from core.data.specs import IMAGENET_MEAN, IMAGENET_STD, DataSpec


def chest_spec(size: int, num_class: int = 2, name: str = "chest") -> DataSpec:
    """Shape and normalisation of the federated stage's images.

    Args:
        size: Side in pixels.
        num_class: Number of classes.
        name: Of the data set, for records.
    """
    return DataSpec(name, (3, size, size), IMAGENET_MEAN, IMAGENET_STD, num_class)
