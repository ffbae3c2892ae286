"""The client trains for several steps before it shares; the attacker follows every step."""

import torch
from torch import nn

import gradinvbench as gib

torch.manual_seed(0)
model = nn.Sequential(nn.Flatten(), nn.Linear(2 * 10 * 14, 32), nn.Tanh(), nn.Linear(32, 5))
# Two channels, 10 x 14 pixels: any shape will do.
coarse = torch.rand(4, 2, 3, 4)
images = nn.functional.interpolate(coarse, (10, 14), mode="bicubic").clamp(0, 1)

# Two passes over two batches of two images each.
training = gib.LocalTraining(epochs=2, batches=2, lr=0.05)
target, truth = gib.share(model, images, [0, 1, 2, 3], local=training)
print(target)

# Which images were in the same batch is part of what the labels say.
found = gib.invert(target, labels=truth.labels, iterations=300)
print(gib.evaluate(found, truth))
