"""What an attack leaves behind: record, tables, pictures and tensors."""

from __future__ import annotations

import argparse
import dataclasses
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from attack.cli.requirements import threat_record
from core.records import provenance
from core.storage import save_checkpoint, write_json, write_text
from core.target import Target, Truth

if TYPE_CHECKING:
    from attack.attacks.base import Attack
    from attack.reconstruction import Reconstruction
    from core.processes.distributed import Process


def write_results(
    args: argparse.Namespace,
    folder: Path,
    key: str,
    attack: Attack,
    target: Target,
    truth: Truth | None,
    reconstruction: Reconstruction,
    curve: Any,
    process: Process,
) -> dict[str, Any]:
    """Measure a reconstruction and write everything about it to `folder`.

    Args:
        args: The command line.
        folder: Where to.
        key: Identifies the run.
        attack: What was run.
        target: On what.
        truth: To compare with, under `--metric`.
        reconstruction: What came out.
        curve: PSNR over iterations (`points`).
        process: Where it ran.

    Returns:
        The record, as written to `record.json`.
    """
    tables: list[str] = []
    record: dict[str, Any] = {
        "key": key,
        "status": reconstruction.status,
        "attack": attack.name,
        "threat": threat_record(args),
        "config": _plain(getattr(attack, "config", None)),
        "arguments": {k: v for k, v in vars(args).items() if k != "explicit"},
        "target": describe(target),
        "provenance": provenance(process.device, args.seed) | {"processes": process.world_size},
        "seconds": reconstruction.seconds,
        "iterations": reconstruction.iterations,
        "objective": reconstruction.objective,
        "labels": reconstruction.labels.tolist(),
        "details": reconstruction.details,
        "trace": reconstruction.trace,
        "psnr_curve": curve.points,
        "pictures": [],
    }
    save_checkpoint(
        {"images": reconstruction.images, "labels": reconstruction.labels},
        folder / "reconstruction.pt",
    )
    if truth is not None and args.metric:
        _measure(args, folder, attack, target, truth, reconstruction, record, tables)
    else:
        from core.pictures import save_images

        save_images(folder / "reconstruction.png", reconstruction.images, title=attack.name)
        record["pictures"].append("reconstruction.png")
    _draw_curve(folder, attack, record)
    if truth is not None and args.GInfoR:
        _information(target, truth, record, tables)
    record["tables"] = tables
    write_text(folder / "metrics.txt", "\n\n".join(tables) + "\n")
    write_json(folder / "record.json", record)
    if not args.quiet:
        print("\n\n".join(tables))
        print(f"wrote {folder / 'record.json'}")
    return record


def write_label_results(
    args: argparse.Namespace,
    folder: Path,
    key: str,
    target: Target,
    truth: Truth,
    process: Process,
) -> dict[str, Any]:
    """Recover the labels by every rule, measure, and write the record.

    Args:
        args: The command line.
        folder: Where to.
        key: Identifies the run.
        target: What was shared.
        truth: With the labels to compare with.
        process: Where it runs.

    Returns:
        The record, as written to `record.json`.
    """
    from prettytable import PrettyTable

    from attack.knowledge.labels import accuracy_by_rule

    began = time.perf_counter()
    rules = accuracy_by_rule(target, truth.labels)
    table = PrettyTable(["rule", "label accuracy"])
    for rule, found in rules.items():
        accuracy = found["accuracy"]
        table.add_row([rule, found["reason"] if accuracy is None else f"{accuracy:.3f}"])
    record = {
        "key": key,
        "status": "finished",
        "threat": threat_record(args),
        "arguments": {k: v for k, v in vars(args).items() if k != "explicit"},
        "target": describe(target),
        "provenance": provenance(process.device, args.seed),
        "seconds": time.perf_counter() - began,
        "label_rules": rules,
        "tables": [table.get_string()],
    }
    write_json(folder / "record.json", record)
    if not args.quiet:
        print(table)
    return record


def describe(target: Target) -> dict[str, Any]:
    """What is known about the target, as plain values."""
    return {
        "model": target.model.describe(),
        "data": target.data.to_dict(),
        "train_mode": target.train_mode,
        "batch_size": target.batch_size,
        "local_training": dataclasses.asdict(target.local),
        "shards": list(target.shards),
        "synchronized": target.synchronized,
        "defenses": list(target.defenses),
    }


def _plain(config: Any) -> dict[str, Any] | None:
    return None if config is None else dataclasses.asdict(config)


def _measure(
    args: argparse.Namespace,
    folder: Path,
    attack: Attack,
    target: Target,
    truth: Truth,
    reconstruction: Reconstruction,
    record: dict[str, Any],
    tables: list[str],
) -> None:
    from attack.knowledge.labels import label_accuracy
    from attack.metrics import evaluate
    from core.pictures import save_comparison

    evaluation = evaluate(
        reconstruction.images,
        reconstruction.labels,
        truth,
        one_to_one=args.one_to_one_similarity,
        lpips_weights=args.lpips_weights,
        mean_image=truth.mean_image,
        nearest_images=truth.nearest_images,
    )
    accuracy = label_accuracy(reconstruction.labels, truth.labels)
    record["label_accuracy"] = accuracy
    record["evaluation"] = evaluation.to_record()
    tables += [evaluation.render(), f"label accuracy {accuracy:.3f} ({args.pseudo_label_init})"]
    save_comparison(
        folder / "reconstruction.png",
        truth.images,
        reconstruction.images[evaluation.order],
        evaluation.per_image,
        title=f"{attack.name} on {target.model.name}, batch {target.batch_size}",
    )
    record["pictures"].append("reconstruction.png")
    if reconstruction.members:
        _measure_worst_case(args, folder, truth, reconstruction, record, tables)


def _measure_worst_case(
    args: argparse.Namespace,
    folder: Path,
    truth: Truth,
    ensemble: Reconstruction,
    record: dict[str, Any],
    tables: list[str],
) -> None:
    """Every member against the truth; which the ensemble's own choice never saw."""
    from attack.metrics import evaluate
    from attack.metrics.worst_case import worst_case
    from core.pictures import save_comparison

    evaluations = {
        name: evaluate(
            member.images,
            member.labels,
            truth,
            one_to_one=args.one_to_one_similarity,
            lpips_weights=args.lpips_weights,
        )
        for name, member in ensemble.members.items()
    }
    worst = worst_case(evaluations)
    record["worst_case"] = worst.to_record()
    tables.append(worst.to_table().get_string())
    rows = [(row, row["ssim_attack"] or row["psnr_attack"]) for row in worst.per_image]
    images = [
        ensemble.members[name].images[evaluations[name].order[row["index"]]] for row, name in rows
    ]
    scores = [evaluations[name].per_image[row["index"]] for row, name in rows]
    title = f"worst case over {len(evaluations)} attacks"
    save_comparison(
        folder / "worst_case.png", truth.images, torch.stack(images), scores, title=title
    )
    record["pictures"].append("worst_case.png")


def _draw_curve(folder: Path, attack: Attack, record: dict[str, Any]) -> None:
    from core.pictures import save_curve

    if not record["trace"]:
        return
    points = [*record["trace"], *record["psnr_curve"]]
    save_curve(folder / "curve.png", points, title=attack.name)
    record["pictures"].append("curve.png")


def _information(target: Target, truth: Truth, record: dict[str, Any], tables: list[str]) -> None:
    from attack.metrics.information_ratio import gradient_information

    information = gradient_information(target, truth)
    record["GInfoR"] = information.to_record()
    tables.append(information.to_table().get_string())
