"""What does our own update give away? Two states and two sets of images say it."""

import copy

import torch
from torch import nn

import gradinvbench as gib

torch.manual_seed(0)  # Yours: images of the training, and others of the same site.
images, findings = gib.chest_phantoms(26, size=16, seed=3)
members, non_members = (images[:2], findings[:2]), (images[2:], findings[2:])
received = nn.Sequential(nn.Conv2d(1, 8, 5, 2, 2), nn.Sigmoid(), nn.Flatten(), nn.Linear(512, 3))
# One round of the site's own training.
sent = copy.deepcopy(received)
nn.functional.binary_cross_entropy_with_logits(sent(members[0]), members[1]).backward()
torch.optim.SGD(sent.parameters(), lr=0.1).step()
found = gib.audit(
    received,
    sent,
    model=received,
    loss="binary-cross-entropy",
    members=members,
    non_members=non_members,
    budget=5,  # seconds, for a demonstration that leaves out the two parts that take longest:
    membership=False,
    remedies=False,
)
print(found)  # the page for a data protection officer
found.save("out")  # audit.json and audit.html: numbers, no image
