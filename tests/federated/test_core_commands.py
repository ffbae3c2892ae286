"""The flags of the federated stage's commands, and that their help needs no library."""

from __future__ import annotations

import importlib
import subprocess
import sys
from typing import Any

import pytest

FLAGS: dict[str, dict[str, tuple[Any, Any]]] = {
    "plot_rdlv_per_round": {"--workspace": (None, None), "--output": (None, None)},
    "plot_rdlv_vs_gauss": {"--workspaces": (None, "workspaces"), "--output": (None, None)},
    "plot_reconstructions": {
        "--workspaces": (None, "workspaces"),
        "--site": (None, "site-9"),
        "--round": (int, None),
        "--output": (None, None),
    },
    "make_phantoms": {
        "--output": (None, None),
        "--scale": (float, 1.0),
        "--size": (int, 64),
        "--seed": (int, 0),
    },
    "compare_methods": {
        "--output": (None, None),
        "--size": (int, 32),
        "--iterations": (int, 300),
        "--seeds": (int, 3),
        "--images": (None, None),
        "--methods": (None, "published,bn,full"),
    },
}


@pytest.mark.parametrize("command", FLAGS)
def test_flags_are_frozen(command: str) -> None:
    parser = importlib.import_module(f"federated.experiment.cli.{command}").build_parser()
    found = {
        action.option_strings[-1]: (action.type, action.default)
        for action in parser._actions
        if action.dest != "help"
    }
    assert found == FLAGS[command]


def test_help_loads_no_heavy_library() -> None:
    modules = ", ".join(f"federated.{command}" for command in FLAGS)
    code = (
        f"import sys, {modules}\n"
        "print([m for m in ('torch', 'matplotlib', 'numpy', 'nvflare') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
