"""Write what the documents say about attacks, defenses, flags and records, from the code.

python docs/generate.py

The pages land in `docs/generated/`. They are committed, and a test compares them with the
code: change a docstring or a flag, run this, commit both.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import importlib.util
import inspect
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from core.launch_arguments import CommandParser

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    # As a script, Python puts this file's folder first; the rooms lie one above.
    sys.path[0] = str(ROOT)

from benchmarks.docstring_sections import linked, sections  # noqa: E402

GENERATED = ROOT / "docs" / "generated"
AUDIT_RECORD = ROOT / "docs" / "audit-record.md"
REFERENCE = ROOT / "results" / "reference"
NOTE = "<!-- Written by docs/generate.py. Change {source} instead. -->"

# Every published command: its module, then the function that builds its parser if that has a name
# of its own, then the command of that parser. The three stages are asked for through the harness,
# which knows where their parsers are.
COMMANDS = {
    "python training/main_pytorch.py": "stage:train",
    "python training/get_gradients.py": "stage:extract",
    "python main_run.py": "stage:attack",
    "python -m benchmarks leaderboard": "benchmarks.command:build_leaderboard_parser:leaderboard",
    "python -m benchmarks submit": "benchmarks.command:build_leaderboard_parser:submit",
    "python -m benchmarks vendor_defaults": "benchmarks.vendor_defaults",
    "python -m benchmarks.utility": "benchmarks.utility",
    "python -m benchmarks fidelity": "benchmarks.fidelity.command",
    "python -m benchmarks": "benchmarks.command",
    "python -m federated.create_job_config": "federated.create_job_config",
    "./start_fl_sim.sh": "federated.simulate",
    "python -m federated.recipe": "federated.recipe",
    "python -m federated.make_phantoms": "federated.make_phantoms",
    "python -m federated.plot_rdlv_per_round": "federated.plot_rdlv_per_round",
    "python -m federated.plot_rdlv_vs_gauss": "federated.plot_rdlv_vs_gauss",
    "python -m federated.plot_reconstructions": "federated.plot_reconstructions",
    "python -m federated.compare_methods": "federated.compare_methods",
    "python -m gradients.inspect": "gradients.inspect",
    "python -m attack.disaggregation": "attack.disaggregation",
    "python -m audit.gate_log": "audit.gate_log",
    "gradinvbench audit": "audit.command",
    "python -m training.reports": "training.reports",
    "python -m benchmarks.equal_time": "benchmarks.speed.equal_time",
    "python -m benchmarks.models": "benchmarks.models.__main__",
    "python -m benchmarks.label_rules": "benchmarks.label_rules.__main__",
    "python -m benchmarks.decision": "benchmarks.decision",
    "python -m benchmarks.audit_power": "benchmarks.audit_power",
    "python -m benchmarks.tabular": "benchmarks.tabular",
    "python -m benchmarks.bounds": "benchmarks.bounds",
    "python -m benchmarks.detection": "benchmarks.detection",
    "python -m benchmarks.audit_federation": "benchmarks.audit_federation",
    "python -m benchmarks.speed": "benchmarks.speed.__main__",
    "python -m benchmarks.speed.gpu_suite": "benchmarks.speed.gpu_suite",
    "python -m benchmarks.speed.scaling": "benchmarks.speed.scaling",
    "python -m benchmarks.speed.pages": "benchmarks.speed.pages",
}
# What records and checkpoints are made of: the part, its module, its classes (none: all).
RECORDS = (
    ("Architecture", "core.models.building", ("ModelSpec",)),
    ("Images", "core.data.specs", ("DataSpec",)),
    ("Local training", "core.target", ("LocalTraining",)),
    ("Rank analysis", "gradients.rank_analysis", ("LayerRank",)),
    ("Record of stage 1", "training.record", ()),
    ("Record of stage 2", "gradients.record", ()),
    ("Record of stage 3", "attack.record", ()),
)

# Pages that a record is shown on: the module whose `page_of` reads it, and its folder.
RECORDED = {
    "models.md": ("benchmarks.models.record", "models"),
    "bounds.md": ("benchmarks.bounds", "bounds"),
    "detection.md": ("benchmarks.detection", "detection"),
    "graveyard.md": ("benchmarks.graveyard", "reference/graveyard"),
    "what-we-tried.md": ("benchmarks.ablation", "reference/ablation"),
    "fidelity.md": ("benchmarks.fidelity.page", "fidelity"),
    "label-rules.md": ("benchmarks.label_rules.record", "label_rules"),
}


def main() -> None:
    """Write the generated pages anew, and what attacks' docstrings say of the record."""
    from benchmarks.fidelity.docstrings import restate
    from benchmarks.fidelity.record import Record

    # The docstrings first, which cards show; all that can fail comes before the first page.
    for path, text in restate(Record.read(ROOT / "results" / "fidelity")).items():
        path.write_text(text, encoding="utf-8")
    files = {ROOT / "docs" / name: text for name, text in recorded_pages().items()}
    files[AUDIT_RECORD] = audit_record_page()
    generated = {GENERATED / name: text for name, text in pages().items()}
    for path, text in {**files, **generated}.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    for stale in set(GENERATED.rglob("*.md")) - set(generated):
        stale.unlink()


def recorded_pages() -> dict[str, str]:
    """Pages that show a record of `results/`, by their name below `docs`."""
    return {
        name: importlib.import_module(module).page_of(ROOT / "results" / folder)
        for name, (module, folder) in RECORDED.items()
    }


def audit_record_page() -> str:
    """The page on `audit.json`: what stands above the remark, then every field."""
    above, remark, _ = re.split(r"(<!-- .*? -->\n)", AUDIT_RECORD.read_text(), maxsplit=1)
    kinds = dataclasses_of("audit.record", ())
    parts = [f"## {kind.__name__}\n\n{_fields(kind)}" for kind in kinds]
    return above + remark + "\n" + "\n\n".join(parts) + "\n"


def pages() -> dict[str, str]:
    """Every generated page, by its name below `docs/generated`."""
    import federated.vendors  # noqa: F401 (registers the frameworks' classes)
    from attack.attacks import attack_names, get_attack
    from gradients.defenses import defense_names, parse_defenses

    results = list(reference_results())
    written = {"flags.md": flags_page(), "records.md": records_page()}
    for name in attack_names():
        attack = get_attack(name)
        if ours(attack):
            written[f"attacks/{name}.md"] = attack_card(name, attack, results)
    for name in defense_names():
        defense = type(parse_defenses(name)[0])
        if ours(defense):
            written[f"defenses/{name}.md"] = defense_card(name, defense, results)
    return written


def ours(kind: type) -> bool:
    """Whether a class is this repository's, and not a plugin's."""
    return kind.__module__.startswith(("attack.", "gradients.", "federated."))


# --- docstrings -----------------------------------------------------------------


def entries(section: str) -> dict[str, str]:
    """What an `Args` or `Attributes` section says, by name."""
    found: dict[str, str] = {}
    name = ""
    for line in inspect.cleandoc("\n" + section).splitlines():
        start = re.match(r"(\w+): (.*)", line)
        if start:
            name, line = start[1], start[2]
        found[name] = f"{found.get(name, '')} {line.strip()}".strip()
    return found


def cell(text: str) -> str:
    """The text as it may stand in a table."""
    return linked(" ".join(text.split())).replace("|", "\\|")


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    ruler = [":---"] * len(header)
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, ruler, *rows))


def page(title: str, source: str, parts: Sequence[tuple[str, str]]) -> str:
    """A page of sections; empty ones are left out."""
    text = [f"# {title}", NOTE.format(source=source)]
    for heading, body in parts:
        if body:
            text += [f"## {heading}", body] if heading else [body]
    return "\n\n".join(text) + "\n"


# --- cards ----------------------------------------------------------------------


def attack_card(name: str, kind: type[Any], results: Sequence[Result]) -> str:
    """What is to know about one attack."""
    said = sections(kind.__doc__ or "")
    source = f"the docstring of {kind.__module__}.{kind.__name__}"
    mine = [r for r in results if r.attack == name and r.undefended]
    # Tables that compare attacks say most; else those that ran this one alone.
    mine = [r for r in mine if "attack" in r.labels] or mine
    return page(
        f"Attack {name}",
        source,
        [
            ("", linked(said[""])),
            ("Paper", linked(said.get("Source", ""))),
            ("Published value", linked(said.get("Published", ""))),
            ("Reproduced", reproduced(name)),
            ("Setting", _setting(kind, said)),
            ("Needs", _needs(kind, said)),
            ("Example", _example(said.get("Example", ""))),
            ("Our values", _values(mine, "attack")),
        ],
    )


def reproduced(attack: str) -> str:
    """Our values at published settings, from the record of `benchmarks fidelity`."""
    from benchmarks.fidelity.page import of_attack
    from benchmarks.fidelity.record import Record

    lines = of_attack(Record.read(ROOT / "results" / "fidelity"), attack)
    rows = [
        [
            f"[{line.row.name}](../../fidelity.md#{line.row.name})",
            line.published,
            line.measured(line.ours),
            line.date or "–",
            cell(line.verdict),
        ]
        for line in lines
    ]
    header = ["setting", "published", "ours (95 % interval)", "date", "verdict"]
    return table(header, rows) if rows else ""


def defense_card(name: str, kind: type[Any], results: Sequence[Result]) -> str:
    """What is to know about one defense."""
    said = sections(kind.__doc__ or "")
    meaning = entries(said.get("Args", ""))
    fields = [
        [f"`{f.name}`", f"`{f.default}`", cell(meaning.get(f.name, ""))]
        for f in dataclasses.fields(kind)
    ]
    mine = [r for r in results if r.defense.split(":")[0] == name]
    word = ":".join([name, *(str(f.default) for f in dataclasses.fields(kind))])
    plugin = "--plugin federated.vendors " if kind.__module__.startswith("federated.") else ""
    return page(
        f"Defense {name}",
        f"the docstring of {kind.__module__}.{kind.__name__}",
        [
            ("", linked(said[""])),
            ("Paper", linked(said.get("Source", ""))),
            ("Published value", linked(said.get("Published", ""))),
            ("Parameters", table(["parameter", "default", "meaning"], fields) if fields else ""),
            ("Example", f"    python training/get_gradients.py --data photo-patches -b 4 \\\n"
             f"        {plugin}--defense {word}"),
            ("Our values", _values(strongest(mine), "defense")),
        ],
    )  # fmt: skip


def _setting(kind: type[Any], said: Mapping[str, str]) -> str:
    words = entries(said.get("Args", "")).get("config", "")
    published = getattr(kind, "published", None)
    if published is None:
        return ""
    changed = [[f"`{name}`", f"`{value}`"] for name, value in differences(published)]
    below = "What differs from the settings of `python main_run.py` without `--attack`:"
    return "\n\n".join(filter(None, [linked(words), below, table(["flag", "value"], changed)]))


def differences(config: Any) -> Iterator[tuple[str, Any]]:
    """Settings that are not their defaults, by their flags, topic by topic."""
    from core.settings import declared

    plain = type(config)()
    for field in dataclasses.fields(config):
        topic, default = getattr(config, field.name), getattr(plain, field.name)
        for each in declared(type(topic)):
            if getattr(topic, each.name) != getattr(default, each.name):
                yield each.flag, getattr(topic, each.name)


def _needs(kind: type[Any], said: Mapping[str, str]) -> str:
    from attack.knowledge.threat_models import find_threat, threat_names

    requires = sorted(capability.value for capability in kind.requires)
    known = [find_threat(name) for name in threat_names()]
    models = [f"`{m.name}`" for m in known if m is not None and kind.requires <= m.grants]
    lines = [f"- {what}" for what in requires] or ["- the model and the shared gradient only"]
    lines.append(f"- granted by `--threat` {', '.join(models)}")
    rule = getattr(kind, "label_rule", None)
    if rule:
        lines.append(f"- labels by the rule `{rule}`, unless `--pseudo-label-init` says otherwise")
    if "Shape" in said:
        lines.append(f"- shape: {' '.join(said['Shape'].split())}")
    return "\n".join(lines)


def _example(text: str) -> str:
    if text.startswith(">>>"):
        return f"```pycon\n{text}\n```"
    return "\n".join(f"    {line}" for line in text.splitlines())


# --- what the reference tables say ----------------------------------------------


@dataclasses.dataclass(frozen=True)
class Result:
    """One row of a committed reference table.

    Attributes:
        table: Its name.
        folder: Below `results/reference`.
        title: The table's.
        labels: Of the row.
        attack: Which ran.
        defense: The word of `--defense`, empty without one.
        scheme: Of the training, empty where it is `pure` or there was none.
        psnr: Mean over the images, dB.
        ssim: Mean over the images; None where the table has none.
    """

    table: str
    folder: str
    title: str
    labels: Mapping[str, str]
    attack: str
    defense: str
    scheme: str
    psnr: float
    ssim: float | None

    @property
    def undefended(self) -> bool:
        """Whether neither the update nor the training was defended; each row once."""
        plain = self.labels.get("defense", "none") == "none" and not (self.defense or self.scheme)
        return plain and self.labels.get("attacker") != "told"


def reference_results() -> Iterator[Result]:
    """Rows with a PSNR of all tables under `results/reference`."""
    from benchmarks.declare.tables import find_table, load_table

    for file in sorted(REFERENCE.glob("*/*.json")):
        written = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(written, dict) or "table" not in written:
            continue
        # A table that is not one of the project's own lies beside its results.
        beside = file.with_suffix(".yaml")
        table = beside if beside.exists() else find_table(written["table"])
        declared = load_table(table, written["preset"])
        cells = {frozenset(row.labels.items()): row.repeats[0] for row in declared.rows}
        for row in written["rows"]:
            stages = cells.get(frozenset(row["labels"].items()), {})
            if "attack" in stages and (row["values"].get("psnr") or {}).get("mean") is not None:
                yield _result(file, written, row, stages)


def _result(
    file: Path, written: Mapping[str, Any], row: Mapping[str, Any], stages: Mapping[str, Any]
) -> Result:
    config = {name: stage.config for name, stage in stages.items()}
    extract, attack = config.get("extract", {}), config["attack"]
    scheme = str(config.get("train", {}).get("scheme", "pure"))
    values = row["values"]
    return Result(
        table=written["table"],
        folder=file.parent.name,
        title=written["title"],
        labels=row["labels"],
        attack=str(attack.get("attack", "")),
        defense=str(extract.get("defense", "")),
        scheme="" if scheme == "pure" and not extract.get("enable-dp") else scheme,
        psnr=values["psnr"]["mean"],
        ssim=(values.get("ssim") or {}).get("mean"),
    )


def strongest(results: Sequence[Result]) -> list[Result]:
    """Of the rows that differ in nothing but the attack, the one with the highest PSNR."""
    best: dict[Any, Result] = {}
    for result in results:
        labels = [item for item in result.labels.items() if item[0] != "attack"]
        key = (result.folder, tuple(sorted(labels)))
        if key not in best or result.psnr > best[key].psnr:
            best[key] = result
    return list(best.values())


def _values(results: Sequence[Result], what: str) -> str:
    if not results:
        return ""
    rows = [
        [
            f"[{result.title}](../../../results/reference/{result.folder}/{result.table}.md)",
            cell(", ".join(_label(result, what))),
            f"{result.psnr:.2f}",
            "–" if result.ssim is None else f"{result.ssim:.3f}",
        ]
        for result in results
    ]
    return table(["table", "row", "mean PSNR, dB", "mean SSIM"], rows)


def _label(result: Result, what: str) -> Iterator[str]:
    for name, value in result.labels.items():
        if name != what or what == "defense":
            yield f"{name} {value}" if value else f"no {name}"
    if what == "defense" and "attack" not in result.labels:
        yield f"attack {result.attack}"


# --- flags ----------------------------------------------------------------------


def parser_of(command: str) -> CommandParser:
    """The parser of a published command."""
    place, *names = COMMANDS[command].split(":")
    if place == "stage":
        from benchmarks.run.stages import STAGES

        build = STAGES[names[0]].parser
        assert build is not None
        return build()
    home = importlib.import_module(place)
    if names:
        builder, command_name = names
        whole: CommandParser = getattr(home, builder)()
        return whole.commands[command_name]
    if not hasattr(home, "build_parser"):
        # A published path, which imports its `main` from where the command is.
        home = importlib.import_module(home.main.__module__)
    parser: CommandParser = home.build_parser()
    return parser


def flags_page() -> str:
    """The flags of every published command."""
    parts = []
    for command in COMMANDS:
        parser = parser_of(command)
        body = [parser.description or "", *_groups(parser)]
        parts.append((command, "\n\n".join(filter(None, body))))
    return page("Flags of all commands", "the parsers", parts)


def _groups(parser: CommandParser) -> Iterator[str]:
    general = [action for action in parser.declared[""] if action.dest != "help"]
    words = [action for action in general if not action.option_strings]
    flags = [action for action in general if action.option_strings]
    titled = [(title, actions) for title, actions in parser.declared.items() if title]
    for title, actions in [("", words), ("", flags), *titled]:
        if actions:
            shown = table(["flag", "value", "default", "meaning"], [*map(_flag, actions)])
            yield f"*{title}*\n\n{shown}" if title else shown


def _flag(action: argparse.Action) -> list[str]:
    names = ", ".join(f"`{name}`" for name in action.option_strings)
    help_text = (action.help or "") % {"default": _plain(action.default)}
    return [names or f"`{action.dest}`", _value(action), _default(action), cell(help_text)]


def _value(action: argparse.Action) -> str:
    if action.nargs == 0:
        return ""
    if action.choices:
        return ", ".join(f"`{choice}`" for choice in action.choices)
    kind = getattr(action.type, "__name__", "text")
    return {"str": "text", "int": "whole number", "float": "number"}.get(kind, kind)


def _default(action: argparse.Action) -> str:
    if action.default in (None, argparse.SUPPRESS, "") or action.nargs == 0:
        return ""
    return f"`{_plain(action.default)}`"


def _plain(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value).replace(
        f"{ROOT}/", ""
    )  # fmt: skip


# --- records --------------------------------------------------------------------


def records_page() -> str:
    """The fields of what records and checkpoints are made of."""
    parts = [
        (f"{title}: {kind.__name__}" if number else title, _fields(kind))
        for title, module, names in RECORDS
        for number, kind in enumerate(dataclasses_of(module, names))
    ]
    return page("Fields of the records", "the docstrings of the classes", parts)


def dataclasses_of(module: str, names: Sequence[str]) -> list[type[Any]]:
    """The dataclasses of a module; none where there is no such module.

    Args:
        module: Where to look.
        names: Of the classes; empty for all, the record itself first.
    """
    if importlib.util.find_spec(module) is None:
        return []
    members = vars(importlib.import_module(module))
    kinds = [kind for kind in members.values() if dataclasses.is_dataclass(kind)]
    own = [kind for kind in kinds if isinstance(kind, type) and kind.__module__ == module]
    wanted = [kind for kind in own if not names or kind.__name__ in names]
    return sorted(wanted, key=lambda kind: not kind.__name__.endswith("Record"))


def _fields(kind: type[Any]) -> str:
    said = sections(kind.__doc__ or "")
    meaning: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        meaning |= entries(sections(base.__doc__ or "").get("Attributes", ""))
    rows = [
        [f"`{f.name}`", f"`{_type(f.type)}`", cell(meaning.get(f.name, ""))]
        for f in dataclasses.fields(kind)
    ]
    return f"`{kind.__name__}`: {linked(said[''])}\n\n{table(['field', 'type', 'meaning'], rows)}"


def _type(annotation: Any) -> str:
    return str(getattr(annotation, "__name__", annotation)).replace("|", "\\|")


if __name__ == "__main__":
    main()
