"""An attack and a metric of your own, beside all others."""

import torch
from torch import nn

import gradinvbench as gib


@gib.register_attack
class Smooth(gib.OptimizationAttack):
    """Plain Adam on the cosine distance, from two starts."""

    name = "smooth"
    published = gib.Settings(iterations=200, lr=0.05, signed=False, tv=1e-4, restarts=2)


gib.register_metric("mae", lambda x, y: (x - y).abs().flatten(1).mean(1), title="MAE")

torch.manual_seed(0)
model = nn.Sequential(nn.Flatten(), nn.Linear(144, 24), nn.Tanh(), nn.Linear(24, 10))
images = nn.functional.interpolate(torch.rand(1, 1, 4, 4), (12, 12), mode="bicubic").clamp(0, 1)
target, truth = gib.share(model, images, [2])

for attack in ("smooth", "spectral", "analytic"):
    found = gib.invert(target, attack=attack, progress=False, iterations=200)
    print(f"{attack}\n{gib.evaluate(found, truth, metrics=['mae', 'psnr'])}")
