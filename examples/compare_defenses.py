"""How much do defenses help? The same client and the same attack, defense by defense."""

import torch
from torch import nn

import gradinvbench as gib

torch.manual_seed(0)
model = nn.Sequential(
    nn.Conv2d(3, 8, 3, padding=1), nn.Sigmoid(), nn.Flatten(), nn.Linear(8 * 12 * 12, 10)
)
coarse = torch.rand(1, 3, 4, 4)
images = nn.functional.interpolate(coarse, (12, 12), mode="bicubic").clamp(0, 1)

print(f"{'defense':20} {'PSNR':>8} {'SSIM':>6}")
for defense in ("", "clip:1", "prune:0.9", "gaussian:0.01", "clip:1,gaussian:0.1"):
    target, truth = gib.share(model, images, [4], defense=defense)
    found = gib.invert(target, iterations=200, progress=False)
    image = gib.evaluate(found, truth).to_frame().loc[0]
    print(f"{defense or 'none':20} {image.psnr:5.1f} dB {image.ssim:6.2f}")
print("\nEvery defense that can be named:", *gib.defenses(), sep="\n  ")
