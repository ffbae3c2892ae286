"""What stage 2 writes: checkpoint, model, picture of the true images, and record."""

from __future__ import annotations

import argparse
import dataclasses
import resource
import sys
from pathlib import Path
from typing import Any

import torch
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid

from core.records import provenance
from core.storage import atomic_file, save_checkpoint, write_json
from core.target import Target, Truth
from gradients.checkpoint import save_target
from gradients.describe import describe, describe_gradient
from gradients.private_gradient import PER_SAMPLE, gaussian_epsilon
from gradients.rank_analysis import LayerRank, ra_index

# Larger values of epsilon promise nothing that anybody would notice.
MEANINGLESS_EPSILON = 100


def peak_memory(device: torch.device) -> float:
    """MiB: allocated on a GPU, resident in this process on a CPU."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2**20, 1)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Linux counts kibibytes, macOS bytes.
    return round(peak / (2**20 if sys.platform == "darwin" else 2**10), 1)


def write_results(
    args: argparse.Namespace,
    target: Target,
    truth: Truth,
    ranks: list[LayerRank],
    device: torch.device,
    measured: dict[str, Any],
) -> Path:
    """Write checkpoint, model, picture and (last) the record, and print a summary.

    Args:
        args: The command line.
        target: What is shared.
        truth: What lies behind it.
        ranks: The rank analysis, if asked for.
        device: Where it was computed.
        measured: Seconds, memory and the like, for the record.

    Returns:
        The checkpoint's path.
    """
    folder, stem = Path(args.results), _stem(args, target)
    path = folder / f"{stem}-checkpoint.pth.tar"
    record = {
        **_record(args, target, truth, ranks),
        **measured,
        "checkpoint": str(path),
        "provenance": provenance(device, args.seed),
    }
    save_checkpoint(target.state_dict, folder / "model.pth")
    _write_picture(folder / f"{stem}-true.png", truth)
    save_target(path, target, truth, args)
    write_json(folder / f"{stem}.json", record)
    _print_summary(record)
    print(f"gradient checkpoint: {path}")
    return path


def _record(
    args: argparse.Namespace, target: Target, truth: Truth, ranks: list[LayerRank]
) -> dict[str, Any]:
    return {
        **describe(target),
        **describe_gradient(target),
        "arguments": vars(args),
        "labels": truth.labels.tolist(),
        "privacy": _privacy_record(args, target),
        "rank_analysis": {
            "layers": [{**dataclasses.asdict(r), "index": r.index} for r in ranks],
            "maximum": ra_index(ranks),
        }
        if ranks
        else None,
    }


def _privacy_record(args: argparse.Namespace, target: Target) -> dict[str, Any] | None:
    if not args.enable_dp:
        return None
    guaranteed = args.dp_clipping == PER_SAMPLE and args.sigma > 0
    steps = target.local.steps
    return {
        "clipping": args.dp_clipping,
        "noise_multiplier": args.sigma,
        "max_norm": args.max_per_sample_grad_norm,
        "delta": args.delta,
        "epsilon": gaussian_epsilon(args.sigma, args.delta, steps) if guaranteed else None,
    }


def _stem(args: argparse.Namespace, target: Target) -> str:
    origin = "init" if args.pretrained is None else Path(args.pretrained).name
    name = args.data_name or target.data.name
    return (
        f"id{args.id}_{target.model.arch}_{origin}_{name}_b{target.batch_size}_i{args.target_idx}"
    )


def _write_picture(path: Path, truth: Truth) -> None:
    grid = make_grid(truth.images, nrow=min(8, len(truth.images)), pad_value=1.0)
    with atomic_file(path) as file:
        to_pil_image(grid).save(file, format="PNG")


def _print_summary(record: dict[str, Any]) -> None:
    print(f"labels: {record['labels']}")
    print(
        f"gradient norm {record['gradient_norm']:.6g} of {record['n_gradients']} tensors; "
        f"{record['seconds']:.1f} s, peak {record['peak_memory_mib']:.0f} MiB"
    )
    privacy = record["privacy"]
    if privacy is None:
        return
    if privacy["epsilon"] is None:
        print("privacy: no guarantee (without per-sample clipping and noise epsilon is infinite)")
    else:
        meaningless = privacy["epsilon"] > MEANINGLESS_EPSILON
        meaning = ", which protects nobody" if meaningless else ""
        print(f"privacy: epsilon {privacy['epsilon']:.4g} at delta {privacy['delta']:g}{meaning}")
