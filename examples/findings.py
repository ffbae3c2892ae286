"""Chest radiographs (drawn, of nobody) with several findings each, and their loss."""

import torch
from torch import nn

import gradinvbench as gib

torch.manual_seed(0)
images, findings = gib.chest_phantoms(1, size=32, seed=3)
model = nn.Sequential(
    nn.Conv2d(1, 12, 5, stride=2, padding=2),
    nn.Sigmoid(),
    nn.Conv2d(12, 12, 3, padding=1),
    nn.Sigmoid(),
    nn.Flatten(),
    nn.Linear(12 * 16 * 16, 3),
)

target, truth = gib.share(model, images, findings, loss="binary-cross-entropy")
found = gib.invert(target, iterations=300, progress=False)
image = gib.evaluate(found, truth).to_frame().loc[0]
print(f"PSNR {image.psnr:.1f} dB, SSIM {image.ssim:.3f}")
print(f"findings {found.labels[0].round().tolist()}, true ones {truth.labels[0].tolist()}")
