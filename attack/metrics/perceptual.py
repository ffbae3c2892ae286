"""LPIPS: distance of deep features, with the published weights or not at all."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
from torch import nn

from core.errors import InputError
from core.storage import load_checkpoint

# Per backbone: torchvision builder, file of its ImageNet weights, layers of `features`
# after which activations are compared, and the smallest image they leave something of.
_BACKBONES: dict[str, tuple[str, str, tuple[int, ...], int]] = {
    "alex": ("alexnet", "alexnet-owt-7be5be79.pth", (1, 4, 7, 9, 11), 31),
    "vgg": ("vgg16", "vgg16-397923af.pth", (3, 8, 15, 22, 29), 16),
}


class LpipsDistance(nn.Module):
    """Learned perceptual image patch similarity (a distance: 0 is identical).

    Args:
        features: The backbone's convolutional layers, with their trained weights.
        taps: Layers whose activations are compared.
        heads: One vector of channel weights per tap.
        min_size: Smallest side of an image that the backbone takes.

    Source:
        Zhang, Isola, Efros, Shechtman, Wang, The Unreasonable Effectiveness of Deep
        Features as a Perceptual Metric, CVPR 2018, eq. 1, https://arxiv.org/abs/1801.03924
        (version 0.1 of the weights).
    """

    shift: torch.Tensor
    scale: torch.Tensor

    def __init__(
        self,
        features: nn.Sequential,
        taps: tuple[int, ...],
        heads: list[torch.Tensor],
        min_size: int = 1,
    ) -> None:
        super().__init__()
        self.features, self.taps, self.min_size = (
            features.eval().requires_grad_(False),
            taps,
            min_size,
        )
        self.heads = nn.ParameterList([nn.Parameter(h.flatten(), False) for h in heads])
        # ImageNet's normalisation, for inputs in [-1, 1].
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1))

    @torch.no_grad()
    def forward(self, images: torch.Tensor, originals: torch.Tensor) -> torch.Tensor:
        """The distance of every image (N); N x C x H x W in [0, 1], C is 3 or 1."""
        pieces = zip(images.split(64), originals.split(64), strict=True)
        return torch.cat([self._distance(x, y) for x, y in pieces]).to(images.dtype)

    def _distance(self, images: torch.Tensor, originals: torch.Tensor) -> torch.Tensor:
        total = torch.zeros(len(images), device=images.device)
        pairs = zip(self._activations(images), self._activations(originals), strict=True)
        for head, (a, b) in zip(self.heads, pairs, strict=True):
            difference = (a - b).square().mean((-2, -1))
            total = total + difference @ head
        return total

    def _activations(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Activations at the taps, scaled to unit length over the channels."""
        x = (2 * images.to(self.scale).expand(-1, 3, -1, -1) - 1 - self.shift) / self.scale
        found = []
        for index, layer in enumerate(self.features[: self.taps[-1] + 1]):
            x = layer(x)
            if index in self.taps:
                found.append(x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10))
        return found


def load_lpips(
    backbone: str, directory: str | Path | None = None
) -> tuple[LpipsDistance | None, str | None]:
    """The published LPIPS, or the reason why it cannot be had. Nothing is downloaded.

    Args:
        backbone: "alex" or "vgg".
        directory: `--lpips-weights`: a folder with torchvision's ImageNet weights and,
            optionally, LPIPS' linear heads (`alex.pth`, `vgg.pth`). Otherwise they are
            looked for in TORCH_HOME and in the installed `lpips` package.

    Returns:
        The distance and None, or None and one sentence with the reason.

    Raises:
        InputError: Unknown backbone, `directory` is not a folder, or a file is broken.
    """
    if backbone not in _BACKBONES:
        raise InputError(f"LPIPS has no backbone {backbone}; known are {', '.join(_BACKBONES)}")
    if directory is not None and not Path(directory).is_dir():
        raise InputError(f"--lpips-weights: there is no folder {directory}")
    name, file, taps, min_size = _BACKBONES[backbone]
    trunk = _first_file([*_folder(directory), Path(torch.hub.get_dir()) / "checkpoints"], file)
    heads = _first_file([*_folder(directory), *_heads_of_package()], f"{backbone}.pth")
    if trunk is None:
        return None, (
            f"no {file} in --lpips-weights or TORCH_HOME; a random network would measure nothing"
        )
    if heads is None:
        return None, (
            f"no {backbone}.pth in --lpips-weights and the package lpips "
            "is not installed (pip install 'gradinvbench[lpips]')"
        )
    return LpipsDistance(_load_trunk(name, trunk), taps, _load_heads(heads), min_size), None


def _folder(directory: str | Path | None) -> list[Path]:
    return [] if directory is None else [Path(directory)]


def _heads_of_package() -> list[Path]:
    # Found, not imported: the package's import pulls in its training code.
    package = importlib.util.find_spec("lpips")
    if package is None or package.origin is None:
        return []
    return [Path(package.origin).parent / "weights" / "v0.1"]


def _first_file(folders: list[Path], name: str) -> Path | None:
    return next((folder / name for folder in folders if (folder / name).is_file()), None)


def _load_trunk(name: str, path: Path) -> nn.Sequential:
    import torchvision

    state = load_checkpoint(path, "--lpips-weights")
    names = {str(name): value for name, value in state.items()}
    features = {n.removeprefix("features."): v for n, v in names.items() if "features." in n}
    trunk = torchvision.models.get_model(name, weights=None).features
    try:
        trunk.load_state_dict(features)
    except (RuntimeError, AttributeError, TypeError):
        raise InputError(f"--lpips-weights: {path} does not hold the weights of {name}") from None
    return trunk


def _load_heads(path: Path) -> list[torch.Tensor]:
    state = load_checkpoint(path, "--lpips-weights")
    try:
        return [state[f"lin{index}.model.1.weight"] for index in range(5)]
    except KeyError:
        raise InputError(f"--lpips-weights: {path} does not hold LPIPS' linear heads") from None
