"""The figures that a table may ask for, by name; `benchmarks.show.figures` draws them."""

from __future__ import annotations

FIGURES: dict[str, str] = {
    "rounds": "the relative data leakage value over the rounds of a federation, a line per site",
    "reconstructions": "originals above reconstructions, a picture per value of the first axis",
    "tradeoff": "leakage against the accuracy of the model, a point per row",
    "bars": "leakage of every row, with the baselines as lines",
    "heatmap": "leakage by the first and the last axis",
    "curves": "objective and PSNR over the iterations of the attack",
    "lines": "leakage along the last axis, a line per value of the others",
    "confidence": "how often cells of records are right, by how sure the attack is of them",
    "tokens_over_width": "exact sentences by tokens over width, a line per value of the first axes",
    "layers": "the rank-analysis index of every layer",
}
