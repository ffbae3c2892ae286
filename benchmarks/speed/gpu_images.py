"""ResNet-18 at 224 px for the published number of iterations, on real images.

python -m benchmarks.speed.gpu_images --images FOLDER --device cuda

Inverts the gradient of batches of 1, 8 and 32 images of a folder, and of the photographs that
come with scikit-image and scikit-learn: seconds, memory, PSNR and SSIM of both; pictures of the
latter only, whose licences allow it. Untrained weights unless `--pretrained` names a file.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.errors import InputError, exit_status
from core.launch_arguments import CommandParser

if TYPE_CHECKING:
    import torch

    from core.target import Target, Truth

RECORD = "gpu-images.json"
FORMATS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Inversion:
    """What is inverted, and how.

    Attributes:
        arch: Name of the architecture.
        image_size: Height and width in pixels.
        pretrained: File of weights (a state_dict); None for initial ones.
        attack: Name of the attack.
        iterations: None for the published number.
        time_budget: Seconds per batch; None for no limit.
        precision: "float32", "tf32" or "bf16".
        compile: Whether torch compiles the model.
        cuda_graphs: Whether iterations are replayed as a CUDA graph.
        channels_last: Whether images and weights lie channels last.
        seed: Seed of the model's weights and of the attack's start.
    """

    arch: str = "resnet18"
    image_size: int = 224
    pretrained: str | None = None
    attack: str = "inverting-gradients"
    iterations: int | None = None
    time_budget: float | None = None
    precision: str = "float32"
    compile: bool = False
    cuda_graphs: bool = False
    channels_last: bool = False
    seed: int = 0


def build_parser() -> CommandParser:
    """The command line."""
    parser = CommandParser(
        prog="python -m benchmarks.speed.gpu_images",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--images", metavar="FOLDER", help="images, also in folders below it")
    parser.add_argument("--batches", default="1,8,32", metavar="N,N,...")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--arch", default="resnet18")
    parser.add_argument("--pretrained", metavar="FILE", help="weights: a state_dict")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--attack", default="inverting-gradients")
    parser.add_argument("--iterations", type=int, default=None, help="default: the published ones")
    parser.add_argument("--time-budget", type=float, default=None, metavar="SECONDS", help="each")
    parser.add_argument("--precision", choices=["float32", "tf32", "bf16"], default="float32")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--cuda-graphs", action="store_true")
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true", help="keep the batches of a record")
    parser.add_argument("--output", default="results/speed", metavar="DIR")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Invert every batch; the record grows with each."""
    args = build_parser().parse_args(argv)
    batches = _batches(args.batches)
    import torch

    from core.records import provenance
    from core.storage import write_json

    device = torch.device(args.device)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: torch sees no CUDA GPU here")
    fields = [field.name for field in dataclasses.fields(Inversion)]
    inversion = Inversion(**{name: getattr(args, name) for name in fields})
    sources, folder = _sources(args.images), Path(args.output)
    rows = _rows_so_far(folder, inversion, device) if args.resume else []
    done = {(row["source"], row["batch"]) for row in rows}
    for name, files in sources.items():
        for batch in batches:
            if batch > len(files):
                print(f"{name}: {len(files)} images make no batch of {batch}")
                continue
            if (name, batch) in done:
                continue
            rows.append(_measure(inversion, name, files[:batch], device, folder))
            record = {
                "rows": rows,
                "setting": dataclasses.asdict(inversion),
                "provenance": provenance(device, args.seed),
            }
            write_json(folder / RECORD, record)
            print({k: v for k, v in rows[-1].items() if k != "per_image"})


def _rows_so_far(folder: Path, inversion: Inversion, device: torch.device) -> list[dict[str, Any]]:
    """What an interrupted run with the same setting on the same device left."""
    from core.reading import read_json_object
    from core.records import provenance

    if not (folder / RECORD).exists():
        return []
    record = read_json_object(folder / RECORD, "--output", "record of images")
    made, now = record["provenance"], provenance(device, inversion.seed)
    same = record.get("setting") == dataclasses.asdict(inversion)
    same = same and all(made[key] == now[key] for key in ("device", "versions"))
    return list(record["rows"]) if same else []


def _batches(text: str) -> list[int]:
    try:
        sizes = [int(word) for word in text.split(",")]
    except ValueError:
        raise InputError(f"--batches {text}: give numbers separated by commas") from None
    if min(sizes) < 1:
        raise InputError(f"--batches {text}: a batch has at least one image")
    return sizes


def _sources(images: str | None) -> dict[str, list[Path]]:
    """Image files by where they come from: a folder (`--images`), and scikit's photographs."""
    from core.data.embedded import photograph_files

    sources: dict[str, list[Path]] = {}
    if images is not None:
        found = sorted(p for p in Path(images).rglob("*") if p.suffix.lower() in FORMATS)
        if not found:
            raise InputError(f"--images {images}: no images there")
        sources["folder"] = found
    try:
        sources["embedded"] = list(photograph_files().values())
    except InputError as error:
        if not sources:
            raise
        print(error)
    return sources


def _measure(
    inversion: Inversion, source: str, files: list[Path], device: torch.device, folder: Path
) -> dict[str, Any]:
    """One attack: its record, and its picture where the images may be shown."""
    import torch

    from attack.attacks import OptimizationAttack, get_attack
    from attack.metrics import evaluate
    from core.pictures import save_comparison

    target, truth = _share(inversion, files)
    attack = get_attack(inversion.attack)
    if not issubclass(attack, OptimizationAttack):
        raise InputError(f"--attack {inversion.attack}: has no iterations")
    config = attack.published.changed(**_changes(inversion))
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    found = attack(config).reconstruct(
        target, labels=truth.labels, device=device, seed=inversion.seed, progress=True
    )
    measured = evaluate(found.images, found.labels, truth, metrics=["psnr", "ssim"], device=device)
    scores = measured.per_image
    if source == "embedded":
        path = folder / f"gpu-images-{inversion.arch}-b{len(files)}.png"
        ordered = found.images[measured.order]
        save_comparison(
            path, truth.images, ordered, scores, title=f"{inversion.arch}, {inversion.attack}"
        )
    cuda = device.type == "cuda"
    return {
        "source": source,
        "batch": len(files),
        "arch": inversion.arch,
        "image_size": inversion.image_size,
        "trained": inversion.pretrained is not None,
        "attack": inversion.attack,
        "iterations": found.iterations,
        "status": found.status,
        "seconds": found.seconds,
        "peak_bytes": torch.cuda.max_memory_allocated(device) if cuda else None,
        "objective": found.objective,
        "psnr": sum(s["psnr"] for s in scores) / len(scores),
        "ssim": sum(s["ssim"] for s in scores) / len(scores),
        "per_image": scores,
        "acceleration": found.details.get("acceleration"),
        "config": config.to_flat(),
    }


def _changes(inversion: Inversion) -> dict[str, Any]:
    """What differs from the published setting."""
    names = ("compile", "cuda_graphs", "precision", "channels_last", "time_budget")
    changes = {name: getattr(inversion, name) for name in names}
    return (
        changes if inversion.iterations is None else {**changes, "iterations": inversion.iterations}
    )


def _share(inversion: Inversion, files: list[Path]) -> tuple[Target, Truth]:
    """What a client with these images would share, in eval mode; labels are 0, 1, ..."""
    import torch
    import torch.nn.functional as F

    from core.data.specs import DataSpec
    from core.models.building import ModelSpec, build_model
    from core.pictures import read_image
    from core.storage import load_checkpoint
    from core.target import Target, Truth

    torch.manual_seed(inversion.seed)
    size = inversion.image_size
    data = DataSpec("images", (3, size, size), MEAN, STD, 1000)
    spec = ModelSpec(inversion.arch, 1000, size)
    model = build_model(spec).eval()
    if inversion.pretrained is not None:
        model.load_state_dict(load_checkpoint(Path(inversion.pretrained), "--pretrained"))
    images = torch.stack([read_image(file, data.shape, "--images") for file in files])
    truth = Truth(images, torch.arange(len(files)) % 1000)
    named = dict(model.named_parameters())
    loss = F.cross_entropy(model(data.normalize(images)), truth.labels)
    gradient = dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))
    return Target(spec, data, model.state_dict(), gradient, False, len(files)), truth


if __name__ == "__main__":
    sys.exit(exit_status(main))
