"""The networks that a federation trains: names in a job to architectures."""

from __future__ import annotations

from core.errors import InputError
from core.models.building import ModelSpec, default_stem, model_names

# The embedded victim: small enough to be inverted on a processor in seconds.
DEFAULT_MODEL = "cnn"
# The published network and image side, for a GPU.
GPU_MODEL, GPU_IMAGE_SIZE = "resnet18", 224


def network_spec(model_name: str, num_class: int, image_size: int) -> ModelSpec:
    """What `core.models.building.build_model` needs to build a job's network.

    A torchvision network keeps torchvision's names in its `state_dict`, so that its
    parameters can be exchanged with other federations. Small images get the stem that
    keeps their resolution.

    Args:
        model_name: "cnn" (four convolutions with BatchNorm, for 32 or 64 px), "resnet18"
            (for 224 px on a GPU) or any other name of `core.models.building.model_names`.
        num_class: Number of classes.
        image_size: Side of the images in pixels.

    Raises:
        InputError: Unknown name, or impossible numbers.
    """
    if model_name not in model_names():
        raise InputError(
            f"model_name {model_name}: unknown network; known are {', '.join(model_names())}"
        )
    if num_class < 2:
        raise InputError(f"num_class {num_class}: there must be at least 2 classes")
    if not 8 <= image_size <= 1024:
        raise InputError(f"image_size {image_size}: must lie between 8 and 1024 pixels")
    return ModelSpec(model_name, num_class, image_size, stem=default_stem(image_size))
