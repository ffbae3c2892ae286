"""What does our own update give away? Two states and two sets of images say it."""

import copy

import torch
from torch import nn

import gradinvbench as gib

torch.manual_seed(0)
# Yours: images of the training (members), and others of the same site (non-members).
images, findings = gib.chest_phantoms(26, size=16, seed=3)
received = nn.Sequential(nn.Conv2d(1, 8, 5, 2, 2), nn.Sigmoid(), nn.Flatten(), nn.Linear(512, 3))

# One round of the site's own training.
sent = copy.deepcopy(received)
optimizer = torch.optim.SGD(sent.parameters(), lr=0.1)
nn.functional.binary_cross_entropy_with_logits(sent(images[:2]), findings[:2]).backward()
optimizer.step()

found = gib.audit(
    received,
    sent,
    model=received,
    loss="binary-cross-entropy",
    local="sgd lr=0.1 batch-size=2",
    members=(images[:2], findings[:2]),
    non_members=(images[2:], findings[2:]),
    iterations=100,
    plants=2,
    progress=False,
)
print(found)  # the page for a data protection officer
found.save("out")  # audit.json and audit.html: numbers, no image
