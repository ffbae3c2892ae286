"""Commands and Python examples of the documents, run as they are written, but for fewer iterations.

Everything runs in two processes of its own, one for the commands and one for the examples: what
an example registers stays there, and torch is imported once.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.documents import DOCUMENTS, ROOT, all_commands, name_of, python_blocks

FRONT_DOOR = importlib.util.find_spec("gradinvbench") is not None
# A command of the documents, and what makes it small; in this order, one needs another's files.
EXECUTED = [
    ("python training/get_gradients.py --data photo-patches --arch cnn --width 32 -b 2 "
     "--results out", "--workers 0"),
    ("python -m gradients.inspect out/idtest_cnn_init_photo-patches_b2_i0-checkpoint.pth.tar", ""),
    ("python main_run.py --checkpoint out/*-checkpoint.pth.tar --attack spectral --epochs 600 "
     "--exact-bn --BN 0.5 --min-grads-loss --metric", "--epochs 5"),
    ("python main_run.py --checkpoint out/*-checkpoint.pth.tar --labels-only", "--id labels"),
    ("python main_run.py --plugin mine --attack patient --checkpoint out/*-checkpoint.pth.tar "
     "--metric", "--epochs 2 --id patient"),
    ("python training/main_pytorch.py --plugin mine --scheme small-batch --arch cnn --epochs 2 "
     "--result-root out/small-batch", "--epochs 1 --width 4 --workers 0 --no-tensorboard"),
    ("python training/get_gradients.py --plugin mydefense --data photo-patches -b 4 "
     "--defense shrink:0.25 --results out", "--arch cnn --width 4 -b 1 --workers 0 --id mine"),
    ("python training/main_pytorch.py --model mymodule:build --loss mymodule:loss --data "
     "mymodule:dataset --epochs 3 -b 8 --lr 0.05 --result-root out/site",
     "--workers 0 --no-tensorboard"),
    ("python training/get_gradients.py --model mymodule:build --loss mymodule:loss --data "
     "mymodule:dataset --pretrained out/site/model_best.pth.tar -b 1 --results shared",
     "--workers 0"),
    ("python main_run.py --checkpoint shared/*-checkpoint.pth.tar --model mymodule:build --loss "
     "mymodule:loss --attack spectral --epochs 600 --pseudo-label-init known --metric",
     "--epochs 20 --id site"),
    ("python training/main_pytorch.py --model mysite:build --loss binary-cross-entropy --data "
     "mysite:dataset --epochs 1 -b 4 --lr 0.1 --result-root out/round",
     "--workers 0 --no-tensorboard"),
    ("gradinvbench audit --global out/round/model_init.pth.tar --local "
     "out/round/model_best.pth.tar --local 'sgd lr=0.1 epochs=1 batch-size=4' --model mysite:build "
     "--loss binary-cross-entropy --data mysite:dataset --budget 3m --report out/audit",
     "--iterations 50 --plants 1 --no-membership --no-remedies --protocol ms6"),
    ("python -m benchmarks --list", ""),
    ("python -m benchmarks noise --dry-run", ""),
    ("python -m benchmarks mine.yaml", "--dry-run"),
    ("python -m benchmarks leaderboard", "--output leaderboard"),
    ("python -m federated.make_phantoms --output phantoms --scale 0.02 --size 32", ""),
    ("python -m federated.create_job_config --n_clients 1 --num_rounds 3 --scale 0.02 "
     "--output jobs/cxr_1client", "--num_rounds 1"),
    ("python -m federated.create_job_config --model mymodule:build --loss mymodule:loss --data "
     "mymodule:dataset --optimizer adamw --lr 0.001 --output jobs/own", "--num_rounds 1"),
]  # fmt: skip

RUN_COMMANDS = """
import glob, json, runpy, shlex, sys

for command, smaller in json.loads(sys.argv[1]):
    program, *words = shlex.split(command)
    words = ["-m", program, *words] if program == "gradinvbench" else words
    words = [found for word in words for found in (glob.glob(word) or [word])] + smaller.split()
    print("#", command, flush=True)
    try:
        if words[0] == "-m":
            sys.argv = words[1:]
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = [f"{ROOT}/{words[0]}", *words[1:]]
            runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        assert not end.code, (command, end.code)
"""
RUN_BLOCKS = """
import json, sys

for document, blocks in json.load(open(sys.argv[1])).items():
    print("#", document, flush=True)
    names = {}
    for number, block in enumerate(blocks):
        # A dataclass looks up the module that it is in.
        names["__name__"] = "__main__"
        exec(compile(block, f"{document}, example {number + 1}", "exec"), names)
"""


def run(code: str, argument: str, folder: Path) -> str:
    """Run Python code in a folder; what it printed."""
    path = os.pathsep.join([str(folder), str(ROOT), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", code, argument],
        cwd=folder, capture_output=True, text=True, timeout=250, check=False,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def plugin(name: str) -> str:
    """The module of that name, as a document shows it."""
    blocks = [block for document in DOCUMENTS for block in python_blocks(document)]
    return next(block for block in blocks if block.startswith(f'"""{name}.py"""'))


def test_executed_commands_are_those_of_the_documents() -> None:
    shown = [words for _, words in all_commands()]
    assert [command for command, _ in EXECUTED if shlex.split(command) not in shown] == []


@pytest.mark.slow
def test_documented_commands_run(tmp_path: Path) -> None:
    for name in ("mine", "mydefense", "mymodule", "mysite"):
        (tmp_path / f"{name}.py").write_text(plugin(name))
    table = (ROOT / "docs" / "regenerate-a-table.md").read_text()
    yaml = table.partition("```yaml\n")[2].partition("```")[0]
    (tmp_path / "mine.yaml").write_text(yaml)
    code = f"ROOT = {str(ROOT)!r}\n{RUN_COMMANDS}"
    printed = run(code, json.dumps(EXECUTED), tmp_path)
    assert [command for command, _ in EXECUTED if f"# {command}" not in printed] == []
    record = json.loads((tmp_path / "results" / "test" / "record.json").read_text())
    assert record["attack"] == "spectral"
    patient = json.loads((tmp_path / "results" / "patient" / "record.json").read_text())
    assert "mae" in patient["evaluation"]["per_image"][0]
    site = json.loads((tmp_path / "results" / "site" / "record.json").read_text())
    assert site["evaluation"]["per_image"][0]["psnr"] > 10
    audit = json.loads((tmp_path / "out" / "audit" / "audit.json").read_text())
    assert audit["verdict"] == "leaks"
    assert {"audit.html", "ms6.md"} <= {path.name for path in (tmp_path / "out/audit").iterdir()}
    assert (tmp_path / "out" / "small-batch" / "record.json").exists()
    assert (tmp_path / "leaderboard" / "leaderboard.md").exists()
    assert (tmp_path / "jobs" / "cxr_1client" / "meta.json").exists()


@pytest.mark.slow
def test_python_examples_run(tmp_path: Path) -> None:
    """The examples of one document build on each other."""
    examples = {name_of(document): python_blocks(document) for document in DOCUMENTS}
    chosen = {
        name: blocks
        for name, blocks in examples.items()
        if blocks and (FRONT_DOOR or not any("gradinvbench" in block for block in blocks))
    }
    assert len(chosen) >= 2
    (tmp_path / "examples.json").write_text(json.dumps(chosen))
    run(RUN_BLOCKS, str(tmp_path / "examples.json"), tmp_path)
    if not FRONT_DOOR:
        pytest.skip("the front door is not installed: its examples did not run")
