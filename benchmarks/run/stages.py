"""How a cell's configuration becomes a command line, and its files a record."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.run.cells import Cell, code_version
from core.launch_arguments import CommandParser
from core.reading import read_json_object

# Not a flag of the commands: how many processes share the work of the cell.
PROCESSES = "processes"
# What a command writes into its record while it is not done.
UNFINISHED = ("running", "interrupted")


@dataclass(frozen=True)
class Stage:
    """One of the commands, as cells run it.

    Attributes:
        name: Name that tables use.
        script: The command's arguments in front of its flags.
        rooms: Code that decides its results.
        outputs: Flags that tell the command where to write, from the cell's folder.
        record: Name (may hold wildcards) of the JSON record that the command writes.
        parser: The command's parser, for checking flags; None accepts any flag.
        distributed: Whether `--multiprocessing-distributed` and its friends are understood.
        beside: Flag that takes further inputs of the command in the same process, as
            `PATH=FOLDER` words; the input that it is about; None: one input per process.
        imports: Modules that every cell imports, so that it may be forked where they are; None:
            every cell is a new interpreter.
    """

    name: str
    script: tuple[str, ...]
    rooms: tuple[str, ...]
    outputs: Callable[[Path], dict[str, Any]]
    record: str
    parser: Callable[[], CommandParser] | None = None
    distributed: bool = True
    beside: tuple[str, str] | None = None
    imports: tuple[str, ...] | None = None

    def code(self) -> str:
        """Version of the stage's code."""
        return code_version(self.rooms)

    def command(
        self,
        config: Mapping[str, Any],
        inputs: Mapping[str, Path],
        folder: Path,
        data: Mapping[str, str],
        others: Sequence[tuple[Mapping[str, Path], Path]] = (),
    ) -> list[str]:
        """The command line of a cell.

        Args:
            config: Flags and values.
            inputs: Files of other cells by flag.
            folder: Folder that the command writes to.
            data: Folders of data sets by the name that configurations use.
            others: Inputs and folders of further cells of this configuration, which the same
                process computes (see `beside`).
        """
        flags = {k: v for k, v in config.items() if k != PROCESSES}
        if "data" in flags:
            flags["data"] = data.get(str(flags["data"]), flags["data"])
        flags |= {flag: str(path) for flag, path in inputs.items()}
        flags |= self.outputs(folder)
        if others and self.beside is not None:
            flag, about = self.beside
            flags[flag] = [f"{paths[about]}={place}" for paths, place in others]
        return [sys.executable, *self.script, *_flags(flags), *self._launch(config)]

    def _launch(self, config: Mapping[str, Any]) -> list[str]:
        processes = int(config.get(PROCESSES, 1))
        if processes == 1 or not self.distributed:
            return []
        launch = {
            "multiprocessing-distributed": True,
            "nproc-per-node": processes,
            "dist-url": "tcp://127.0.0.1:0",
        }
        return _flags(launch)

    def read_record(self, folder: Path) -> dict[str, Any] | None:
        """The command's own record in `folder`, None while there is none or it is a draft."""
        found = sorted(folder.rglob(self.record))
        if not found:
            return None
        record = read_json_object(found[-1], what="record")
        return None if record.get("status") in UNFINISHED else record


def _flags(values: Mapping[str, Any]) -> list[str]:
    words: list[str] = []
    for flag, value in values.items():
        if value is True:
            words.append(f"--{flag}")
        elif isinstance(value, list):
            words += [f"--{flag}", *map(str, value)]
        elif value is not False and value is not None:
            words += [f"--{flag}", str(value)]
    return words


def _parser_of(module: str) -> Callable[[], CommandParser]:
    """The parser of a command, imported when flags are checked and not before."""

    def parser() -> CommandParser:
        built: CommandParser = importlib.import_module(module).build_parser()
        return built

    return parser


STAGES: dict[str, Stage] = {
    stage.name: stage
    for stage in (
        Stage(
            name="train",
            script=("training/main_pytorch.py",),
            rooms=(
                "core",
                "training",
            ),
            # An interrupted training continues from its latest checkpoint.
            outputs=lambda folder: {"result-root": str(folder), "resume": "auto"},
            record="record.json",
            parser=_parser_of("training.main_pytorch"),
            imports=("torchvision", "training.run"),
        ),
        Stage(
            name="extract",
            script=("training/get_gradients.py",),
            rooms=("core", "training", "gradients"),
            outputs=lambda folder: {"results": str(folder), "id": "cell"},
            record="*.json",
            parser=_parser_of("gradients.command"),
            imports=("torchvision", "gradients.extract"),
        ),
        Stage(
            name="attack",
            script=("main_run.py",),
            rooms=("core", "training", "gradients", "attack", "main_run.py"),
            outputs=lambda folder: {"root": str(folder), "id": "cell"},
            record="record.json",
            parser=_parser_of("attack.cli.command"),
            beside=("beside", "checkpoint"),
            imports=("torchvision", "attack.cli.running"),
        ),
        Stage(
            name="federated",
            script=("-m", "federated.recipe"),
            rooms=("core", "training", "gradients", "attack", "audit", "federated"),
            outputs=lambda folder: {"workspace": str(folder)},
            record="run.json",
            parser=_parser_of("federated.experiment.cli.recipe"),
            distributed=False,
        ),
        # A row of a table of records: all of its batches, shared and inverted in one process.
        Stage(
            name="tabular",
            script=("-m", "benchmarks.tabular"),
            rooms=("core", "training", "gradients", "attack", "benchmarks/tabular.py"),
            outputs=lambda folder: {"results": str(folder)},
            record="record.json",
            parser=_parser_of("benchmarks.tabular"),
            distributed=False,
            imports=("torch",),
        ),
    )
}


def make_cell(stage: Stage, config: Mapping[str, Any], inputs: Mapping[str, Any]) -> Cell:
    """A cell of `stage` at its present code version."""
    return Cell(stage=stage.name, config=config, inputs=inputs, code=stage.code())
