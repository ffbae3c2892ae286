"""The published flags keep their names, types and defaults.

New flags may be added beside these; a changed row here breaks people's scripts.
"""

from __future__ import annotations

import argparse
from typing import Any

import pytest

FLAG = "flag"
# Flag: type ("flag" takes no value) and default.
Flags = dict[str, tuple[Any, Any]]

COMMON: Flags = {
    "--seed": (int, 0),
    "-p": (int, 10),
    "--print-freq": (int, 10),
    "--gpu": (int, None),
    "--world-size": (int, 1),
    "--rank": (int, 0),
    "--dist-url": (str, "tcp://127.0.0.1:10023"),
    "--dist-backend": (str, None),
    "--multiprocessing-distributed": (FLAG, False),
    "--nproc-per-node": (int, None),
    "--timeout": (float, 600.0),
}
TRAIN: Flags = {
    "--data": (str, "photo-patches"),
    "-a": (str, "resnet18"),
    "--arch": (str, "resnet18"),
    "-j": (int, 4),
    "--workers": (int, 4),
    "--epochs": (int, 90),
    "--start-epoch": (int, 0),
    "-b": (int, 128),
    "--batch-size": (int, 128),
    "--lr": (float, 0.1),
    "--learning-rate": (float, 0.1),
    "--momentum": (float, 0.9),
    "--wd": (float, 1e-4),
    "--weight-decay": (float, 1e-4),
    "--resume": (str, ""),
    "-e": (FLAG, False),
    "--evaluate": (FLAG, False),
    "--pretrained": (str, None),
    "--result-root": (str, None),
    "--syncbn": (FLAG, False),
    "--enable_dp": (FLAG, False),
    "--enable-dp": (FLAG, False),
    "--sigma": (float, 0.01),
    "-c": (float, 1.0),
    "--max-per-sample-grad_norm": (float, 1.0),
    "--delta": (float, 1e-5),
    "--scheme": (str, "None"),
}
EXTRACT: Flags = {
    "--id": (str, "test"),
    "--data": (str, None),
    "--data-name": (str, None),
    "-a": (str, "resnet18"),
    "--arch": (str, "resnet18"),
    "-j": (int, 4),
    "--epochs": (int, 1),
    "--local-epochs": (int, 1),
    "--local-batches": (int, None),
    "-b": (int, 32),
    "--lr": (float, 0.1),
    "--target-idx": (int, 0),
    "--pretrained": (str, None),
    "--outlayer-state": (str, "None"),
    "--model-eval": (FLAG, False),
    "--syncbn": (FLAG, False),
    "--ra": (FLAG, False),
    "--kernel-size-of-maxpool": (int, 3),
    "--enable-dp": (FLAG, False),
    "--sigma": (float, 0.01),
    "--max-per-sample-grad_norm": (float, 1.0),
    "--delta": (float, 1e-5),
    "--duplicate-label": (FLAG, False),
    "--results": (str, "results/gradients"),
    "--malicious": (str, ""),
}
ATTACK: Flags = {
    "--id": (str, "test"),
    "--checkpoint": (str, None),
    "--exact-bn": (FLAG, False),
    "--bn-from-update": (FLAG, False),
    "--n-seed": (int, 1),
    "--optim": (str, "Adam"),
    "--gradient-loss-fun": (str, "sim"),
    "--min-grads-loss": (FLAG, False),
    "--epochs": (int, 15000),
    "--lr": (float, 0.1),
    "--grads-weight": (float, 1.0),
    "--TV": (float, 0.1),
    "--BN": (float, 0.0),
    "--input-norm": (float, 0.0),
    "--target-tv": (float, 0.28),
    "--pseudo-label-init": (str, "exact"),
    "--MinCombine": (FLAG, False),
    "--Group": (float, 0.0),
    "--T-init-rate": (float, 0.3),
    "--total-T-in-rate": (float, 0.3),
    "--T-in": (int, 1000),
    "--T-end-rate": (float, 0.4),
    "--input-noise": (float, 0.0),
    "--compile": (FLAG, False),
    "--cuda-graphs": (FLAG, False),
    "--precision": (str, "float32"),
    "--channels-last": (FLAG, False),
    "--metric": (FLAG, False),
    "--one-to-one-similarity": (FLAG, True),
    "--GInfoR": (FLAG, False),
    "--local-steps": (str, "unroll"),
    "--lr-schedule": (str, "cosine-published"),
    "--threat": (str, None),
    "--adaptive": (FLAG, None),
    "--no-adaptive": (FLAG, None),
    "--labels-only": (FLAG, False),
    "--superparameters-search": (FLAG, False),
    "--simulation-checkpoint": (str, None),
    "--max-concurrent": (int, 8),
    "--num-samples": (int, 16),
    "--ngpus-per-trial": (float, 0.5),
    "--epochs-tune": (FLAG, False),
    "--lr-tune": (FLAG, False),
    "--TV-tune": (FLAG, False),
    "--BN-tune": (FLAG, False),
    "--input-norm-tune": (FLAG, False),
    "--grads-weight-tune": (FLAG, False),
    "--max-t": (int, 3000),
    "--min-t": (int, 2000),
    "--HP-epochs": (int, 5000),
    "--verbose": (int, 3),
}


def train_parser() -> argparse.ArgumentParser:
    from training.main_pytorch import build_parser

    return build_parser()


def extract_parser() -> argparse.ArgumentParser:
    from gradients.command import build_parser

    return build_parser()


def attack_parser() -> argparse.ArgumentParser:
    from attack.cli.command import build_parser

    return build_parser()


PARSERS = {"train": train_parser, "extract": extract_parser, "attack": attack_parser}
PROMISED = {"train": TRAIN, "extract": EXTRACT, "attack": ATTACK}
ROWS = [
    (command, flag, kind, default)
    for command, flags in PROMISED.items()
    for flag, (kind, default) in {**flags, **COMMON}.items()
]


@pytest.mark.parametrize(
    ("command", "flag", "kind", "default"), ROWS, ids=[f"{row[0]} {row[1]}" for row in ROWS]
)
def test_flag(command: str, flag: str, kind: Any, default: Any) -> None:
    actions = PARSERS[command]()._option_string_actions
    assert flag in actions, f"{command} has lost its flag {flag}"
    action = actions[flag]
    assert action.default == default
    if kind is FLAG:
        assert action.nargs == 0
    else:
        assert (action.type or str) is kind


@pytest.mark.parametrize("command", PARSERS)
@pytest.mark.parametrize("value", ["-1e-6", "-1E-06", "-.5e2", "-2"])
def test_negative_numbers_are_values_and_not_flags(command: str, value: str) -> None:
    parser = PARSERS[command]()
    parser.add_argument("--number", type=float)
    assert parser.parse_args(["--number", value]).number == float(value)
