"""What is in a gradient checkpoint: `python -m gradients.inspect FILE [--strip-truth OUT]`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from core.errors import exit_status
from core.escaping import printable
from core.launch_arguments import CommandParser

if TYPE_CHECKING:
    from core.models.architecture import Description
    from core.target import Target, Truth


def build_parser() -> CommandParser:
    """The command line."""
    parser = CommandParser(prog="python -m gradients.inspect", description=__doc__)
    parser.add_argument("file", metavar="FILE", help="gradient checkpoint (.tar)")
    parser.add_argument(
        "--strip-truth", metavar="OUT", help="write a copy without the true images and labels"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    return exit_status(lambda: run(argv))


def run(argv: Sequence[str] | None = None) -> None:
    """Print what a checkpoint holds, and strip it if asked.

    Raises:
        InputError: The file is not a gradient checkpoint.
    """
    args = build_parser().parse_args(argv)
    from gradients.checkpoint import load_target, save_target

    target, truth = load_target(args.file, "FILE")
    print(printable(format_report(target, truth)))
    if args.strip_truth is not None:
        save_target(args.strip_truth, target)
        print(f"without the truth: {Path(args.strip_truth)}")


def capabilities(target: Target, truth: Truth | None) -> list[str]:
    """What the file lets an attacker know, in words."""
    known = ["batch size", "local hyper-parameters"]
    if any(name.endswith("running_mean") for name in target.state_dict):
        known.append("running BatchNorm statistics")
    if target.running_after is not None:
        known.append("running BatchNorm statistics after the local training")
    if target.bn_statistics is not None:
        known.append("exact BatchNorm statistics of the batch")
    if target.defenses:
        known.append("the client's defenses")
    if target.dropout_seed is not None:
        known.append("seed of the dropout masks")
    if truth is not None:
        known.append("labels (in the truth)")
    return known


def format_report(target: Target, truth: Truth | None) -> str:
    """A text report: model, setting, norms per layer, capabilities, truth."""
    from core.losses import is_default
    from gradients.record import describe

    about = describe(target)
    model, data, local = about.model, about.data, about.local
    shards = "+".join(map(str, about.shards))
    kind = "synchronized" if target.synchronized else "asynchronous"
    lines = [
        f"model        {_model_line(model, data.n_classes)}, {about.mode} mode",
        f"data         {data.name}, {_size(data.shape)}",
        f"batch        {about.batch_size} images over shards {shards}, {kind} BatchNorm",
        f"local        {local.steps} step(s) = {local.epochs} epoch(s) x "
        f"{local.batches} batch(es), lr {local.lr:g}, momentum {local.momentum:g}, "
        f"weight decay {local.weight_decay:g}",
        *([] if is_default(target.loss) else [f"loss         {target.loss!r}"]),
        f"defenses     {', '.join(about.defenses) or 'none stated'}",
        f"attacker     {'; '.join(capabilities(target, truth))}",
        f"truth        {_truth_line(truth)}",
        f"gradient     norm {about.gradient_norm:.6g} over {len(about.gradient_norms)} tensors",
    ]
    norms = about.gradient_norms.items()
    lines += [f"  {norm:12.5g}  {_shape(target, name):>18}  {name}" for name, norm in norms]
    return "\n".join(lines)


def _size(shape: Sequence[int]) -> str:
    """Of an image in pixels; of anything else all of its sides."""
    if len(shape) == 3:
        return f"{shape[1]} x {shape[2]} px"
    return " x ".join(map(str, shape))


def _model_line(model: Description, n_classes: int) -> str:
    """The architecture in a line; of a module of the user's own only its class is known."""
    if "stem" not in model:
        classes = f"{n_classes} classes, " if n_classes else ""
        return f"{model['arch']} ({classes}a module of the user's own)"
    return (
        f"{model['arch']} ({n_classes} classes, stem {model['stem']}, "
        f"width {model['width'] or 'standard'}, norm {model['norm']}, "
        f"pooling kernel {model['pool_kernel']})"
    )


def _truth_line(truth: Truth | None) -> str:
    from core.target import described

    if truth is None:
        return "absent"
    return f"present: {len(truth.images)} images, labels {described(truth.labels)}"


def _shape(target: Target, name: str) -> str:
    return "x".join(map(str, target.gradient[name].shape)) or "scalar"


if __name__ == "__main__":
    sys.exit(main())
