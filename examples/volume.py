"""A volume of 16 x 16 x 16 voxels and a network of three-dimensional convolutions."""

import torch
from torch import nn

import gradinvbench as gib

torch.manual_seed(0)
model = nn.Sequential(
    nn.Conv3d(1, 8, 3, stride=2, padding=1),
    nn.Sigmoid(),
    nn.Conv3d(8, 8, 3, padding=1),
    nn.Sigmoid(),
    nn.Flatten(),
    nn.Linear(8 * 8 * 8 * 8, 3),
)
coarse = torch.rand(1, 1, 4, 4, 4)
volume = nn.functional.interpolate(coarse, (16, 16, 16), mode="trilinear")

target, truth = gib.share(model, volume, [1])
found = gib.invert(target, iterations=200, progress=False)
seen = gib.evaluate(found, truth, metrics=["ncc", "psnr"]).to_frame().loc[0]
print(f"NCC {seen.ncc:.3f}, PSNR {seen.psnr:.1f} dB")
found.plot().savefig("volume.png")
