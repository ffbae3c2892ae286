"""Your own module of three layers under squared error: its inputs come back exactly."""

import torch
from torch import nn

import gradinvbench as gib


class Regressor(nn.Module):
    """Put your own model here."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(144, 64), nn.Linear(64, 32)
        self.third = nn.Linear(32, 4)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Four values of every picture."""
        hidden = torch.tanh(self.first(images.flatten(1)))
        return self.third(torch.tanh(self.second(hidden)))


torch.manual_seed(0)
coarse = torch.rand(1, 1, 4, 4).double()
images = nn.functional.interpolate(coarse, (12, 12), mode="bicubic").clamp(0, 1)
target, truth = gib.share(Regressor().double(), images, torch.randn(1, 4), loss="mse")
found = gib.invert(target, iterations=400, double=True, progress=False)
psnr = gib.evaluate(found, truth).to_frame().psnr
print(f"PSNR {psnr[0]:.1f} dB; the four values it found: {found.labels[0].tolist()}")
