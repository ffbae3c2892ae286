"""What an attack leaves behind: record, tables, pictures and tensors."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from attack.cli.text_report import measure_text, write_recovered
from attack.knowledge.labels import accuracy_by_rule, label_accuracy
from attack.loop.inversion import as_matched
from attack.matching.replica import Replica
from attack.metrics import Evaluation, evaluate
from attack.metrics.information_ratio import gradient_information
from attack.metrics.records import comparison
from attack.metrics.worst_case import worst_case
from attack.record import AttackRecord, LabelRecord, RunRecord
from attack.recovered import recovered_records
from attack.settings import InversionConfig
from core.errors import InputError
from core.escaping import printable
from core.pictures import save_comparison, save_curve, save_images
from core.processes.distributed import alone
from core.records import provenance
from core.storage import save_checkpoint, write_record, write_text
from gradients.record import describe

if TYPE_CHECKING:
    from attack.attacks.base import Attack
    from attack.cli.request import AttackRun
    from attack.reconstruction import Reconstruction
    from core.processes.distributed import Process
    from core.target import Target, Truth

logger = logging.getLogger(__name__)

# Records of a table that are printed beside the originals.
SHOWN_RECORDS = 32


@dataclass(frozen=True)
class Output:
    """What the results of one run are made from.

    Attributes:
        run: What was asked for.
        key: Identifies it.
        attack: What is run.
        target: What the client shared.
        truth: To compare with; None where it is unknown.
        process: Rank and device that run the attack.
    """

    run: AttackRun
    key: str
    attack: Attack
    target: Target
    truth: Truth | None
    process: Process


def write_results(
    output: Output, found: Reconstruction, curve: Sequence[dict[str, float]]
) -> AttackRecord:
    """Measure a reconstruction and write everything about it to the run's folder.

    Args:
        output: The run.
        found: What came out.
        curve: PSNR over iterations.

    Returns:
        The record, as written to `record.json`.
    """
    folder, truth, measuring = output.run.folder, output.truth, output.run.measuring
    record = _attack_record(output, found, curve)
    _record_layers(output, found, record)
    tensors = {"images": found.images, "labels": found.labels}
    save_checkpoint(tensors, folder / "reconstruction.pt")
    if truth is not None and measuring.images:
        _measure(output, truth, found, record)
    elif found.data is None:
        save_images(folder / "reconstruction.png", found.images, title=output.attack.name)
        record.pictures.append("reconstruction.png")
    else:
        record.tables.append("\n".join(found.texts))
    _draw_curve(output, record)
    if truth is not None and measuring.information:
        information = gradient_information(output.target, truth)
        record.GInfoR = information.to_record()
        record.tables.append(information.to_table().get_string())
    write_text(folder / "metrics.txt", "\n\n".join(record.tables) + "\n")
    _write(output, record)
    return record


def _record_layers(output: Output, found: Reconstruction, record: AttackRecord) -> None:
    config = getattr(output.attack, "config", None)
    settings = config if isinstance(config, InversionConfig) else None
    try:
        layers = losses_by_layer(output.target, found, settings)
    except (InputError, RuntimeError, ValueError, TypeError) as error:
        # What hours of an attack found is not lost over what is said of it beside.
        logger.warning("no losses by layer: %s", error)
        return
    record.details = {**record.details, "layers": layers}
    write_text(output.run.folder / "layers.txt", _layer_table(layers) + "\n")


def losses_by_layer(
    target: Target, found: Reconstruction, config: InversionConfig | None
) -> dict[str, dict[str, float]]:
    """How far the result's gradient is from the shared one, parameter by parameter.

    Args:
        target: What the client shared.
        found: What came out.
        config: Says what is made of several local steps; None: they are unrolled.

    Returns:
        By parameter: the norm of its shared gradient, the squared distance ("L2") and one
        minus the cosine ("sim"); all of a zero gradient is 1 away from any.
    """
    seen = target if config is None else as_matched(target, config)
    with alone():
        replica = Replica(seen, torch.device("cpu"))
        inputs = seen.data.normalize(seen.data.placed(found.images, replica.parameters[0]))
        update = replica.update(inputs, found.labels.cpu(), create_graph=False)
    rows = {}
    for name, own, shared in zip(replica.names, update, replica.target_gradient, strict=True):
        a, b = own.detach().double().flatten(), shared.double().flatten()
        lengths = float(a.norm() * b.norm())
        cosine = float(a @ b) / lengths if lengths > 0 else 0.0
        rows[name] = {"norm": float(b.norm()), "L2": float((a - b).square().sum())}
        rows[name]["sim"] = 1 - cosine
    return rows


def _layer_table(layers: Mapping[str, Mapping[str, float]]) -> str:
    from prettytable import PrettyTable

    table = PrettyTable(["parameter", "norm", "L2", "sim"])
    for name, row in layers.items():
        table.add_row([name, *(f"{row[key]:.4g}" for key in ("norm", "L2", "sim"))])
    table.align = "r"
    table.align["parameter"] = "l"
    return table.get_string()


def _attack_record(
    output: Output, found: Reconstruction, curve: Sequence[dict[str, float]]
) -> AttackRecord:
    """The record before anything is measured."""
    run, process = output.run, output.process
    return AttackRecord(
        key=output.key,
        status=found.status,
        attack=output.attack.name,
        threat=run.knowledge.to_record(),
        config=output.attack.plain_settings(),
        arguments=dict(run.arguments),
        target=describe(output.target).setting(),
        provenance=provenance(process.device, run.seed) | {"processes": process.world_size},
        seconds=found.seconds,
        iterations=found.iterations,
        objective=found.objective,
        labels=found.labels.tolist(),
        details=found.details,
        trace=found.trace,
        psnr_curve=list(curve),
    )


def write_label_results(output: Output) -> LabelRecord:
    """Recover the labels by every rule, measure, and write the record.

    Args:
        output: The run; it knows the truth.

    Returns:
        The record, as written to `record.json`.
    """
    from prettytable import PrettyTable

    assert output.truth is not None
    run, began = output.run, time.perf_counter()
    rules = accuracy_by_rule(output.target, output.truth.labels)
    table = PrettyTable(["rule", "label accuracy"])
    for rule, found in rules.items():
        accuracy = found["accuracy"]
        table.add_row([rule, found["reason"] if accuracy is None else f"{accuracy:.3f}"])
    record = LabelRecord(
        key=output.key,
        threat=run.knowledge.to_record(),
        arguments=dict(run.arguments),
        target=describe(output.target).setting(),
        provenance=provenance(output.process.device, run.seed),
        seconds=time.perf_counter() - began,
        label_rules=rules,
        tables=[table.get_string()],
    )
    _write(output, record)
    return record


def _write(output: Output, record: RunRecord) -> None:
    path = output.run.folder / "record.json"
    write_record(path, record.to_json())
    if not output.run.showing.quiet:
        print(printable("\n\n".join(record.tables)))
        print(printable(f"wrote {path}"))


def _evaluated(output: Output, found: Reconstruction, truth: Truth, guesses: bool) -> Evaluation:
    """A reconstruction against the truth, beside guesses from known images if asked."""
    return evaluate(
        found.images,
        found.labels,
        truth,
        one_to_one=output.run.measuring.one_to_one,
        lpips_weights=output.run.measuring.lpips_weights,
        mean_image=truth.mean_image if guesses else None,
        nearest_images=truth.nearest_images if guesses else None,
        confidence=found.confidence,
    )


def _measure(output: Output, truth: Truth, found: Reconstruction, record: AttackRecord) -> None:
    if truth.is_text:
        measure_text(output.target, truth, found, record, output.run.folder)
        return
    evaluation = _evaluated(output, found, truth, guesses=True)
    accuracy = label_accuracy(found.labels, truth.labels)
    rule = output.run.knowledge.label_rule
    record.label_accuracy = accuracy
    record.evaluation = evaluation.to_record()
    record.tables += [evaluation.render(), f"label accuracy {accuracy:.3f} ({rule})"]
    if truth.columns is not None:
        ordered = found.images[evaluation.order]
        first = (part[:SHOWN_RECORDS] for part in (ordered, truth.images))
        record.tables.append(comparison(truth.columns, *first).to_string(index=False))
        recovered = recovered_records(truth.columns, truth.images, ordered, evaluation)
        write_recovered(recovered, record, evaluation, output.run.folder)
    target = output.target
    save_comparison(
        output.run.folder / "reconstruction.png",
        truth.images,
        found.images[evaluation.order],
        evaluation.per_image,
        title=f"{output.attack.name} on {target.model.name}, batch {target.batch_size}",
    )
    record.pictures.append("reconstruction.png")
    if found.members:
        _measure_worst_case(output, truth, found, record)


def _measure_worst_case(
    output: Output, truth: Truth, ensemble: Reconstruction, record: AttackRecord
) -> None:
    """Every member against the truth; which the ensemble's own choice never saw."""
    evaluations = {
        name: _evaluated(output, member, truth, guesses=False)
        for name, member in ensemble.members.items()
    }
    worst = worst_case(evaluations)
    record.worst_case = worst.to_record()
    record.tables.append(worst.to_table().get_string())
    rows = [(row, row.get("ssim_attack") or row["psnr_attack"]) for row in worst.per_image]
    images = [
        ensemble.members[name].images[evaluations[name].order[row["index"]]] for row, name in rows
    ]
    save_comparison(
        output.run.folder / "worst_case.png",
        truth.images,
        torch.stack(images),
        [evaluations[name].per_image[row["index"]] for row, name in rows],
        title=f"worst case over {len(evaluations)} attacks",
    )
    record.pictures.append("worst_case.png")


def _draw_curve(output: Output, record: AttackRecord) -> None:
    if not record.trace:
        return
    points = [*record.trace, *record.psnr_curve]
    save_curve(output.run.folder / "curve.png", points, title=output.attack.name)
    record.pictures.append("curve.png")
