"""Tables: expansion into cells, and errors that name the line."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest

from attack.metrics import evaluation
from benchmarks.declare.columns import find_column, find_view
from benchmarks.declare.records import Run
from benchmarks.declare.tables import PRESETS, find_table, load_table, table_files
from benchmarks.run.cells import hash_json, in_order
from benchmarks.run.stages import STAGES
from core.errors import InputError
from core.launch_arguments import CommandParser
from tests.example_results import ANY_FLAG, TABLE, load, write_table


def test_every_combination_is_a_row_and_shared_cells_are_one(tmp_path: Path) -> None:
    table = load(tmp_path)
    assert [tuple(row.labels.values()) for row in table.rows] == [
        (defense, size) for defense in ("none", "noise", "broken") for size in ("1", "4")
    ]
    assert all(len(row.repeats) == 2 for row in table.rows)
    stages = [cell.stage for cell in in_order(table.cells())]
    assert (stages.count("train"), stages.count("extract"), stages.count("attack")) == (1, 12, 12)


def test_some_rows_by_the_values_of_their_axes(tmp_path: Path) -> None:
    table = load(tmp_path)

    def chosen(*where: str) -> list[tuple[str, ...]]:
        return [tuple(row.labels.values()) for row in table.only(where).rows]

    assert len(chosen()) == 6
    assert chosen("defense=noise") == [("noise", "1"), ("noise", "4")]
    assert chosen("batch size=4", "defense=none", "defense=broken") == [
        ("none", "4"),
        ("broken", "4"),
    ]
    with pytest.raises(InputError, match="--where defence=noise: expected AXIS=VALUE with an axis"):
        chosen("defence=noise")
    with pytest.raises(InputError, match="--where defense=noize: values of defense are none, noi"):
        chosen("defense=noize")


def test_values_of_the_form_stage_slash_file_are_inputs(tmp_path: Path) -> None:
    run = load(tmp_path).rows[0].repeats[0]
    assert run["extract"].inputs["pretrained"].cell == run["train"]
    assert run["extract"].inputs["pretrained"].pattern == "model_best.pth.tar"
    assert "pretrained" not in run["extract"].config


def test_labels_of_cells_say_what_all_their_rows_share(tmp_path: Path) -> None:
    table = load(tmp_path)
    labels, run = table.labels(), table.rows[2].repeats[0]
    assert labels[run["train"].key] == "train"
    assert labels[run["attack"].key] == "attack noise 1"


def test_presets_change_flags_and_replace_axes(tmp_path: Path) -> None:
    text = TABLE + (
        "presets:\n  embedded:\n    train: {epochs: 9}\n"
        "    axes: {batch size: {extract.batch-size: [2]}}\n  small: {}\n"
    )
    table = load(tmp_path, text)
    run = table.rows[0].repeats[0]
    assert run["train"].config["epochs"] == 9
    assert run["extract"].config["batch-size"] == 2
    assert len(load(tmp_path, text, preset="small").rows) == 6
    with pytest.raises(InputError, match="--preset paper: the table has embedded, small"):
        load(tmp_path, text, preset="paper")


@pytest.mark.parametrize("name", ["text", "text_batch", "text_defenses"])
@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_of_a_table_of_text_is_of_text(name: str, preset: str) -> None:
    table = load_table(table_files()[name], preset)
    data = {run["extract"].config["data"] for row in table.rows for run in row.repeats}
    assert data == {"pydoc-topics"}


def test_a_preset_s_value_of_the_same_name_starts_from_the_table_s_flags(tmp_path: Path) -> None:
    text = TABLE + (
        "presets:\n  embedded:\n    axes: {defense: {noise: {train: {epochs: 3}}, new: {}}}\n"
    )
    table = load(tmp_path, text)
    assert list(dict.fromkeys(row.labels["defense"] for row in table.rows)) == ["noise", "new"]
    run = table.rows[0].repeats[0]
    assert run["train"].config["epochs"] == 3
    assert run["extract"].config["sigma"] == 0.1


LIKE = """\
title: Like another
like: schemes
axes:
  mode: {train: {}, eval: {extract: {model-eval: true}}}
columns: [psnr]
"""


@pytest.mark.parametrize(
    ("more", "preset", "indices"),
    [
        ("", "small", [0, 1, 2, 3]),
        ("", "paper", [0, 1, 2, 3, 4]),
        ("", "embedded", [None]),
        ("repeats: {}\n", "small", [None]),
        ("repeats: {extract.target-idx: [7, 9]}\n", "small", [7, 9]),
        ("extract: {target-idx: 5}\n", "small", [5]),
        ("presets: {small: {extract: {target-idx: 6}}}\n", "small", [6]),
        ("chain: [extract, attack]\n", "small", [0, 1, 2, 3]),
    ],
)
def test_repeats_of_the_table_that_one_is_like(
    tmp_path: Path, more: str, preset: str, indices: list[int | None]
) -> None:
    table = load_table(write_table(tmp_path, LIKE + more), preset)
    for row in table.rows:
        assert [run["extract"].config.get("target-idx") for run in row.repeats] == indices


def test_a_table_that_is_like_another_itself_is_none_to_be_like(tmp_path: Path) -> None:
    message = r":2: like: ablation itself is like schemes; name a table that stands alone"
    with pytest.raises(InputError, match=message):
        load(tmp_path, LIKE.replace("like: schemes", "like: ablation"))


def test_an_axis_replaces_the_inherited_repeat_of_its_flag(tmp_path: Path) -> None:
    text = LIKE.replace("  mode:", "  image: {extract.target-idx: [8, 9]}\n  mode:")
    table = load_table(write_table(tmp_path, text), "small")
    found = [run["extract"].config["target-idx"] for row in table.rows for run in row.repeats]
    assert found == [8, 8, 9, 9]


def test_a_folder_of_data_has_the_same_key_everywhere(tmp_path: Path) -> None:
    keys = []
    for parent in ("here", "there"):
        data = tmp_path / parent / "photos"
        data.mkdir(parents=True)
        (data / "a.png").write_bytes(b"1")
        table = load(tmp_path, data=str(data))
        (name,) = table.folders
        assert table.folders[name] == str(data)
        keys.append([cell.key for cell in table.cells()])
    assert keys[0] == keys[1]
    (data / "b.png").write_bytes(b"2")


def test_a_changed_folder_of_data_makes_new_cells(tmp_path: Path) -> None:
    keys = []
    for parent, content in (("here", b"1"), ("there", b"22")):
        data = tmp_path / parent / "photos"
        data.mkdir(parents=True)
        (data / "a.png").write_bytes(content)
        keys.append(load(tmp_path, data=str(data)).cells()[0].key)
    assert keys[0] != keys[1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("title:", "titel:"), r"example.yaml:2: unknown key titel; did you mean title\?"),
        (("columns:", "colums:"), r":15: unknown key colums; did you mean columns\?"),
        (("psnr,", "psrn,"), r":15: unknown column psrn; did you mean psnr\?"),
        (("psnr,", "attack.whatever.typo,"), r":15: unknown column attack.whatever.typo; did you"),
        (("psnr,", "attack.second,"), r":15: unknown column attack.second; did you mean attack.s"),
        (
            ("psnr,", "attack.evaluation.per_image.psrn,"),
            r":15: unknown column .*; did you mean attack.evaluation.per_image.psnr",
        ),
        (("psnr,", "worst pnsr,"), r":15: unknown column pnsr; did you mean psnr"),
        (("psnr,", "worst-case pnsr,"), r"did you mean worst-case psnr"),
        (
            ("columns:", "plugin: not_there\ncolumns:"),
            r":15: --plugin not_there: cannot be imported",
        ),
        (("columns:", "plugin: 3\ncolumns:"), r":15: plugin: expected the name of a module"),
        (("columns:", "budget: 3\ncolumns:"), r":15: budget: expected a time such as 30m"),
        (("columns:", "order: [bach size]\ncolumns:"), r":15: unknown axis bach size; did you"),
        (("columns:", "compare: {defence: a}\ncolumns:"), r":15: where: expected values of"),
        (("bars,", "pies,"), r":16: unknown figure pies; did you mean lines"),
        (("noise: {extract", "noise: {extrakt"), r":7: unknown stage extrakt; did you mean"),
        (("{sigma: 0.1}", "0.1"), r":7: extract: expected {flag: value}"),
        (("{extract.batch-size: [1, 4]}", "[1, 4]"), r":9: axis batch size: write STAGE.FLAG"),
        (("{extract.batch-size: [1, 4]}", "{}"), r":9: axis batch size has no values"),
        (("[1, 4]", "[]"), r":9: axis batch size has no values"),
        (("text: 14.2 dB, ", ""), r":18: expected where, text and source"),
        (("train: {epochs: 1}", "train: 5"), r":12: train: expected a mapping"),
        (("train: {epochs: 1}", "train: {epochs: 1}\ntrain: {}"), r":13: train is given twice"),
        (("train: {epochs: 1}", "train: {epochs: 1"), r"example.yaml:\d+: not YAML"),
        (("train: {epochs: 1}", "train: {<<: {}}"), r":12: a key is a single word"),
        (("train: {epochs: 1}", "train: {[1]: 2}"), r":12: a key is a single word"),
        (("train: {epochs: 1}", "train: &a {b: *a}"), r"a value contains itself"),
        (("columns:", "chain: [train, atack]\ncolumns:"), r":15: unknown stage atack; did you"),
        (
            ("columns:", "pivot: {bach size: [psnr]}\ncolumns:"),
            r":15: unknown axis to show side by",
        ),
        (
            ("columns:", "pivot: {batch size: [pnsr]}\ncolumns:"),
            r":15: pivot: expected a list of psnr",
        ),
        (("columns:", "pivot: [batch size]\ncolumns:"), r":15: pivot: expected a mapping"),
        (("columns: [", "columns: [psnr, "), r":15: column psnr: another column or an axis"),
        (
            ("  batch size: {", "  PSNR: {"),
            r":15: column psnr: another column or an axis has its header PSNR",
        ),
        (("columns:", "chain: [attack, train]\ncolumns:"), r":15: chain: each once, in the order"),
        (("where: {defense", "where: {defence"), r":18: where: expected values of defense, batch"),
        (("where: {defense: none, batch size: 1}", "where: 1"), r":18: where: expected values of"),
    ],
)
def test_errors_name_file_and_line(tmp_path: Path, change: tuple[str, str], message: str) -> None:
    text = TABLE.replace(*change)
    assert text != TABLE
    with pytest.raises(InputError, match=message):
        load(tmp_path, text)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "the file is empty"),
        ("- 1\n", "a table is a mapping"),
        ("title: x\naxes: {a: {b: {}}}\n", "the table has no columns"),
    ],
)
def test_what_is_not_a_table_is_refused(tmp_path: Path, content: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load(tmp_path, content)


PLUGIN = """
from attack.metrics import metric_names, register_metric

if "mae" not in metric_names():
    register_metric("mae", lambda a, b: (a - b).abs().mean((1, 2, 3)), title="MAE",
                    smaller_is_better=True)
"""


@pytest.mark.parametrize(
    "change",
    [
        ("train: {epochs", "plugin: my_metric\ntrain: {epochs"),
        ("attack: {", "attack: {plugin: my_metric, "),
        ("none: {}", "none: {attack: {plugin: my_metric}}"),
        ("repeats:\n", "repeats:\n  attack.plugin: [my_metric]\n"),
    ],
)
def test_a_metric_of_a_plugin_is_a_column(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: tuple[str, str]
) -> None:
    text = TABLE.replace("[psnr,", "[mae, worst mae, psnr,")
    with monkeypatch.context() as here:
        for name in ("_SIMPLE", "_TITLES", "_ADDED", "_SMALLER_IS_BETTER"):
            here.setattr(evaluation, name, getattr(evaluation, name).copy())
        with pytest.raises(InputError, match="unknown column mae; did you mean mse"):
            load(tmp_path, text)
        (tmp_path / "my_metric.py").write_text(PLUGIN)
        here.syspath_prepend(tmp_path)
        here.delitem(sys.modules, "my_metric", raising=False)
        table = load(tmp_path, text.replace(*change))
        view = find_view("worst mae")
        assert (view.header, view.column.leak) == ("worst MAE", "low")
        run = Run({"attack": {"evaluation": {"per_image": [{"mae": 0.2}, {"mae": 0.1}]}}})
        assert view.column.values(run) == [0.2, 0.1]
        assert table.rows[0].repeats[0]["attack"].config["plugin"] == "my_metric"
        given = {
            stage: cell.config.get("plugin") for stage, cell in table.rows[0].repeats[0].items()
        }
        everywhere = change[1].startswith("plugin")
        assert given["train"] == given["extract"] == ("my_metric" if everywhere else None)


def test_a_path_into_a_list_of_images_has_a_value_per_image() -> None:
    column = find_column("attack.evaluation.per_image.ssim")
    run = Run({"attack": {"evaluation": {"per_image": [{"ssim": 0.5}, {"ssim": None}]}}})
    assert column.values(run) == [0.5]
    assert find_column("attack.labels").values(Run({"attack": {"labels": [3, 4]}})) == [3, 4]


def parser() -> CommandParser:
    made = CommandParser()
    made.add_argument("--epochs", type=int)
    made.add_argument("--data")
    made.add_argument("--syncbn", action="store_true")
    made.add_argument("--scheme", choices=["pure", "GH"])
    return made


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("{epoch: 1}", r":12: unknown flag of train, epoch; did you mean epochs\?"),
        ("{scheme: best}", r":12: train --scheme best: choose from pure, GH"),
        ("{epochs: many}", r":12: train --epochs many: not a valid value"),
        ("{epochs: 2020-01-01}", r":12: train --epochs 2020-01-01: not a valid value"),
        ("{epochs: [1, 2]}", r":12: train --epochs .*: expected a single value"),
        ("{epochs: true}", r":12: train --epochs True: needs a value"),
        ("{epochs: false}", r":12: train --epochs False: needs a value; null leaves the flag out"),
        ("{syncbn: 3}", r":12: train --syncbn 3: a flag without a value"),
        ("{processes: 0}", r":12: train --processes 0: not a valid value"),
        ("{processes: two}", r":12: train --processes two: not a valid value"),
    ],
)
def test_flags_are_checked_against_the_command(tmp_path: Path, change: str, message: str) -> None:
    stages = {**ANY_FLAG, "train": dataclasses.replace(STAGES["train"], parser=parser)}
    file = write_table(tmp_path, TABLE.replace("{epochs: 1}", change))
    with pytest.raises(InputError, match=message):
        load_table(file, stages=stages)


def test_the_line_is_that_of_the_wrong_value_where_a_flag_is_given_twice(tmp_path: Path) -> None:
    stages = {**ANY_FLAG, "train": dataclasses.replace(STAGES["train"], parser=parser)}
    file = write_table(tmp_path, TABLE.replace("none: {}", "none: {train: {epochs: few}}"))
    with pytest.raises(InputError, match=r":6: train --epochs few: not a valid value"):
        load_table(file, stages=stages)


def test_unknown_tables_are_told_with_the_nearest_name(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"unknown table shemes; did you mean schemes\?"):
        find_table("shemes")
    with pytest.raises(InputError, match=r"there is no file .*mine\.yaml"):
        load_table(find_table(str(tmp_path / "mine.yaml")))


@pytest.mark.parametrize("name", sorted(table_files()))
@pytest.mark.parametrize("preset", PRESETS)
def test_the_project_s_tables_expand_under_every_preset(name: str, preset: str) -> None:
    table = load_table(table_files()[name], preset)
    assert table.rows
    assert table.description


@pytest.mark.parametrize("name", sorted(table_files()))
@pytest.mark.parametrize("preset", PRESETS)
def test_the_project_s_cells_are_command_lines_that_their_stages_take(
    name: str, preset: str, tmp_path: Path
) -> None:
    table = load_table(table_files()[name], preset)
    parsers = {name: STAGES[name].parser() for name in table.chain}  # type: ignore[misc]
    # The cells of a table's repeats have the same flags, and inputs of the same names.
    different = {(c.stage, hash_json(dict(c.config)), *c.inputs): c for c in table.cells()}
    for cell in different.values():
        inputs = {flag: tmp_path / i.pattern for flag, i in cell.inputs.items()}
        words = STAGES[cell.stage].command(cell.config, inputs, tmp_path, {})
        args = parsers[cell.stage].parse_args(words[1 + len(STAGES[cell.stage].script) :])
        if cell.stage == "extract":
            assert not args.shards or sum(map(int, args.shards.split(","))) == args.batch_size
            assert args.batch_size % (args.duplicates or 1) == 0
