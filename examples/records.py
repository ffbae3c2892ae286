"""Records of patients: an honest server's best attack, and a server that sets traps."""

import torch
from torch import nn

import gradinvbench as gib

table = gib.table("diabetes")
print(table)
batch = table.batch(8, seed=1)
torch.manual_seed(0)
model = nn.Sequential(
    nn.Linear(table.columns.width, 100),
    nn.ReLU(),
    nn.Linear(100, 100),
    nn.ReLU(),
    nn.Linear(100, 2),
)

target, truth = gib.share(model, batch)
found = gib.invert(target, attack="tableak", iterations=100, restarts=8, progress=False)
print(gib.evaluate(found, truth))
print("\nThe first patient:", batch.to_frame().iloc[0].to_dict(), sep="\n")
best = gib.evaluate(found, truth).order[0]
print("as recovered:", table.columns.decode(found.images).iloc[int(best)].to_dict(), sep="\n")
