"""MSE, PSNR and SSIM of many images, against a loop over scikit-image.

python -m benchmarks.speed.metrics --images 1000 --size 32 --output speed.json
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from attack.metrics import mse, psnr, ssim
from core.errors import InputError, exit_status
from core.records import provenance
from core.storage import write_json

Scores = dict[str, torch.Tensor]


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=1000, help="number of images")
    parser.add_argument("--size", type=int, default=32, help="side of an image in pixels")
    parser.add_argument("--device", default="cpu", help="where ours is computed")
    parser.add_argument("--repeats", type=int, default=3, help="the fastest of so many counts")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", help="write the record to this JSON file")
    return parser


def ours(images: torch.Tensor, originals: torch.Tensor) -> Scores:
    """The whole batch at once, on its device."""
    return {
        "mse": mse(images, originals),
        "psnr": psnr(images, originals),
        "ssim": ssim(images, originals),
    }


def loop(images: torch.Tensor, originals: torch.Tensor) -> Scores:
    """scikit-image, one image after the other, the same definitions."""
    try:
        from skimage import metrics
    except ImportError:
        raise InputError(
            "the comparison needs scikit-image: pip install 'gradinvbench[embedded]'"
        ) from None
    rows = [
        (
            metrics.mean_squared_error(y, x),
            metrics.peak_signal_noise_ratio(y, x, data_range=1.0),
            metrics.structural_similarity(
                y,
                x,
                data_range=1.0,
                channel_axis=0,
                gaussian_weights=True,
                sigma=1.5,
                use_sample_covariance=False,
            ),
        )
        for x, y in zip(images.numpy(), originals.numpy(), strict=True)
    ]
    columns = torch.tensor(rows, dtype=torch.float64).unbind(1)
    return dict(zip(("mse", "psnr", "ssim"), columns, strict=True))


@dataclass(frozen=True)
class Timing:
    """The fastest of several calls.

    Attributes:
        seconds: By the clock on the wall.
        cpu_seconds: Of this process, which other work on the machine hardly changes.
        scores: The computed scores.
    """

    seconds: float
    cpu_seconds: float
    scores: Scores


def fastest(function: Callable[[], Scores], repeats: int) -> Timing:
    """Time `repeats` calls and keep the best of both clocks."""
    clocks = []
    for _ in range(repeats):
        wall, cpu = time.perf_counter(), time.process_time()
        scores = {name: values.cpu() for name, values in function().items()}
        clocks.append((time.perf_counter() - wall, time.process_time() - cpu))
    walls, cpus = zip(*clocks, strict=True)
    return Timing(min(walls), min(cpus), scores)


def measure(n: int, size: int, device: torch.device, repeats: int, seed: int) -> dict[str, Any]:
    """Seconds of both, their ratio, and by how much their values differ at most."""
    # As the command that scores images does.
    generator = torch.Generator().manual_seed(seed)
    originals = torch.rand(n, 3, size, size, generator=generator)
    noise = torch.randn(originals.shape, generator=generator)
    images = (originals + 0.1 * noise).clamp(0, 1)
    on_device = images.to(device), originals.to(device)
    ours(*on_device)
    fast = fastest(lambda: ours(*on_device), repeats)
    slow = fastest(lambda: loop(images, originals), repeats)
    differences = {
        name: float((fast.scores[name].double() - expected).abs().max())
        for name, expected in slow.scores.items()
    }
    return {
        "images": n,
        "size": size,
        "seconds_ours": fast.seconds,
        "seconds_scikit_image": slow.seconds,
        "ratio": slow.seconds / fast.seconds,
        "ratio_of_cpu_seconds": slow.cpu_seconds / fast.cpu_seconds,
        "largest_difference": differences,
        **provenance(device, seed),
    }


def main() -> None:
    """Measure, print, and write the record where asked to."""
    args = build_parser().parse_args()
    record = measure(args.images, args.size, torch.device(args.device), args.repeats, args.seed)
    print(
        f"{record['images']} images of {record['size']} px: ours {record['seconds_ours']:.4f} s, "
        f"scikit-image {record['seconds_scikit_image']:.4f} s, {record['ratio']:.1f} times faster"
    )
    print("largest difference:", record["largest_difference"])
    if args.output:
        write_json(args.output, record)


if __name__ == "__main__":
    raise SystemExit(exit_status(main))
