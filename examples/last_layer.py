"""A client that shares its last layer only, and freezes everything before it."""

import torch
from torch import nn

import gradinvbench as gib

torch.manual_seed(0)
body = nn.Sequential(
    nn.Conv2d(1, 8, 3, stride=2, padding=1),
    nn.Sigmoid(),
    nn.Conv2d(8, 16, 3, padding=1),
    nn.Sigmoid(),
    nn.Flatten(),
)
model = nn.Sequential()
model.add_module("body", body)
model.add_module("head", nn.Linear(16 * 8 * 8, 10))
images = nn.functional.interpolate(torch.rand(1, 1, 4, 4), (16, 16), mode="bicubic").clamp(0, 1)

target, truth = gib.share(model, images, [7], shared=["head.*"])
print(f"shared: {', '.join(target.gradient)}")
found = gib.invert(target, iterations=300, progress=False)
image = gib.evaluate(found, truth).to_frame().loc[0]
print(f"PSNR {image.psnr:.1f} dB, SSIM {image.ssim:.3f}, label {found.labels.tolist()}")
