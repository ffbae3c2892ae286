"""What readers see: text tables, files, the report and its behaviour in a browser."""

from __future__ import annotations

import base64
import csv
import dataclasses
import io
import json
import re
import tracemalloc
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
from PIL import Image

from benchmarks.declare.columns import find_column
from benchmarks.declare.figures import FIGURES
from benchmarks.declare.records import Run
from benchmarks.run.store import Store
from benchmarks.show import charts
from benchmarks.show.charts import _looks, heatmap
from benchmarks.show.figures import _DRAW, _distinct_slugs
from benchmarks.show.output import write_outputs
from benchmarks.show.pictures import Picture
from benchmarks.show.render import (
    to_csv,
    to_json,
    to_latex,
    to_markdown,
    to_terminal,
    to_text_table,
)
from benchmarks.show.report import to_html
from benchmarks.show.results import TableResult, collect
from benchmarks.show.statistics import bootstrap_interval, summarize
from core.errors import InputError
from tests.browser import Page, find_browser
from tests.example_results import TABLE, attack_record, example, fill, load


@pytest.fixture
def result(tmp_path: Path) -> TableResult:
    return example(tmp_path)[0]


def test_summary_is_of_all_images_and_seeds(result: TableResult) -> None:
    # Two seeds (20 and 21 dB) with two images each (+0 and +1).
    summary = result.rows[0].summaries["psnr"]
    assert summary is not None
    assert (summary.n, summary.mean, summary.worst) == (4, 21.0, 22.0)
    assert summary.std == pytest.approx(np.std([20, 21, 21, 22], ddof=1))


def test_worst_is_the_side_on_which_more_leaked() -> None:
    assert summarize([1.0, 3.0], "high").worst == 3.0  # type: ignore[union-attr]
    assert summarize([1.0, 3.0], "low").worst == 1.0  # type: ignore[union-attr]
    assert summarize([float("nan")]) is None


def test_bootstrap_interval_covers_the_mean_95_times_in_100() -> None:
    rng = np.random.default_rng(0)
    samples = rng.normal(5.0, 2.0, size=(300, 40))
    intervals = [bootstrap_interval(sample, seed=i) for i, sample in enumerate(samples)]
    covered = np.mean([low <= 5.0 <= high for low, high in intervals])
    assert 0.90 <= covered <= 0.98
    width = np.mean([high - low for low, high in intervals])
    assert width == pytest.approx(2 * 1.96 * 2.0 / np.sqrt(40), rel=0.06)


def test_recovered_counts_images_of_a_batch_above_a_psnr() -> None:
    images = [{"psnr": value} for value in (19.0, 25.0, 61.0, 100.0)]
    run = Run({"attack": {"evaluation": {"per_image": images}}})
    names = ("recovered", "recovered at 30 dB", "recovered at 20 dB", "recovered at 99.5 dB")
    shares = [find_column(name).values(run) for name in names]
    assert shares == [[0.5], [0.5], [0.75], [0.25]]
    assert find_column("recovered at 20 dB").header == "> 20 dB"
    with pytest.raises(InputError, match="unknown column recovered at dB"):
        find_column("recovered at dB")


def test_text_table(result: TableResult) -> None:
    table = to_text_table(result)
    assert table.header[:3] == ["defense", "batch size", "PSNR"]
    assert table.rows[0][2:5] == ["21.00 ± 0.82", "22.00", "20.25 to 21.75"]
    assert table.rows[0][-1].startswith("14.2 dB [")
    assert table.rows[4][1] == "1 [c]"
    assert table.rows[4][2] == "failed"
    assert table.baselines == [["flat colour", "", "12.50", "–", "–", "0.100", "–", "–", "–"]]
    sentences = dict(table.footnotes)
    assert sentences["a"] == "LPIPS: no weights"
    assert "extract failed: exit status 1: error: out of <memory>" in sentences.values()


@pytest.fixture
def compared(tmp_path: Path) -> TableResult:
    text = TABLE.replace("interval psnr", "change psnr") + "compare: {defense: none}\n"
    table, store = load(tmp_path, text), Store(tmp_path / "store")
    fill(table, store)
    return collect(table, store)


def test_changes_are_paired_image_by_image(compared: TableResult) -> None:
    reference, noise = compared.rows[0], compared.rows[2]
    assert noise.row.labels == {"defense": "noise", "batch size": "1"}
    # The noise costs every image 5 dB, whatever the images differ by.
    change = noise.changes["psnr"]
    assert change is not None
    assert (change.n, change.mean, change.low, change.high) == (4, -5.0, -5.0, -5.0)
    assert reference.changes["psnr"] is None
    table = to_text_table(compared)
    at = table.header.index("PSNR change")
    assert [row[at] for row in table.rows[:3]] == ["–", "–", "-5.00 (-5.00 to -5.00)"]
    assert to_json(compared)["rows"][2]["changes"]["psnr"]["mean"] == -5.0


def test_several_starts_on_an_image_are_one_image(tmp_path: Path) -> None:
    """Three starts, of which one is 3 dB better, on two images from each of two clients."""
    text = TABLE.replace("interval psnr", "change psnr") + "compare: {defense: none}\n"
    text = text.replace("repeats:", "repeats:\n  attack.seed: [0, 1, 2]", 1)
    table, store = load(tmp_path, text), Store(tmp_path / "store")
    fill(table, store)
    for cell in table.cells():
        if cell.stage == "attack" and cell.config["seed"] == 2:
            extract = cell.inputs["checkpoint"].cell
            sigma, client = extract.config.get("sigma", 0), extract.config["seed"]
            if sigma != 9:
                store.finish(cell, attack_record(20.0 - 50 * sigma + client + 3))
    result = collect(table, store)
    summary, change = result.rows[0].summaries["psnr"], result.rows[2].changes["psnr"]
    assert summary is not None
    assert change is not None
    # As with one start, and 1 dB more: their mean. The worst value is the best start's.
    assert (summary.n, summary.mean, summary.worst) == (4, 22.0, 25.0)
    assert summary.std == pytest.approx(np.std([20, 21, 21, 22], ddof=1))
    assert (change.n, change.mean) == (4, -5.0)


def test_a_cell_that_does_not_beat_the_guesses_is_marked(tmp_path: Path) -> None:
    text = TABLE.replace("sigma: 0.1", "sigma: 0.2") + "compare: {defense: none}\n"
    table, store = load(tmp_path, text), Store(tmp_path / "store")
    fill(table, store)
    result = collect(table, store)
    # 11 dB and a flat colour's 12.5.
    assert result.rows[2].beaten_by == {"psnr": "flat colour"}
    assert result.rows[0].beaten_by == {}
    text_table = to_text_table(result)
    marks = {sentence: mark for mark, sentence in text_table.footnotes}
    mark = next(mark for sentence, mark in marks.items() if "does not beat" in sentence)
    assert text_table.rows[2][2] == f"11.00 ± 0.82 [{mark}]"
    assert f"[{mark}]" not in text_table.rows[0][2]


def test_rows_that_a_budget_has_left_are_counted_and_not_shown(tmp_path: Path) -> None:
    table, store = load(tmp_path, TABLE + "budget: 30m\n"), Store(tmp_path / "store")
    for cell in table.rows[0].repeats[0].values():
        store.finish(cell, attack_record(20.0) if cell.stage == "attack" else {})
    result = collect(table, store)
    shown = to_text_table(result)
    assert [row[0] for row in shown.rows] == ["none"]
    assert "5 of 6 rows are not computed yet" in dict(shown.footnotes).values()
    page = to_html(result, [], store)
    assert "5 of 6 rows are not computed yet" in page
    rows = page.partition('<table class="numbers">')[2].partition("</table>")[0]
    assert "20.00" in rows
    assert ">0.1<" not in rows


@pytest.fixture
def pivoted(tmp_path: Path) -> TableResult:
    text = TABLE + "pivot: {batch size: [psnr, worst psnr]}\n"
    table, store = load(tmp_path, text), Store(tmp_path / "store")
    fill(table, store)
    return collect(table, store)


def test_values_of_a_pivot_stand_side_by_side(pivoted: TableResult, result: TableResult) -> None:
    table, long = to_text_table(pivoted), to_text_table(result)
    assert table.header[:5] == [
        "defense",
        "PSNR (1)",
        "PSNR (4)",
        "worst PSNR (1)",
        "worst PSNR (4)",
    ]
    assert table.header[5:] == long.header[4:]
    assert [row[0] for row in table.rows] == ["none", "noise", "broken [c]"]
    psnr, worst = long.header.index("PSNR"), long.header.index("worst PSNR")
    for line, one, four in zip(table.rows, long.rows[::2], long.rows[1::2], strict=True):
        assert line[1:5] == [one[psnr], four[psnr], one[worst], four[worst]]
        assert line[5:] == one[4:]
    assert len(table.baselines[0]) == len(table.header)


def test_a_pivot_changes_nothing_for_programs(pivoted: TableResult, result: TableResult) -> None:
    assert to_csv(pivoted) == to_csv(result)
    assert to_json(pivoted) == to_json(result)


def test_a_pivoted_report_has_a_line_per_defense(pivoted: TableResult, tmp_path: Path) -> None:
    write_outputs(pivoted, Store(tmp_path / "store"), tmp_path / "out")
    html = (tmp_path / "out" / "report.html").read_text()
    assert html.count("<tr data-labels") + html.count('<tr class="failed" data-labels') == 3
    assert "PSNR (4)" in html
    assert 'name="batch size"' not in html


def test_the_title_names_another_data_set_without_its_place(tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    (folder / "a.png").write_bytes(b"1")
    table = load(tmp_path, data=str(folder))
    result = collect(table, Store(tmp_path / "store"))
    assert to_text_table(result).title.endswith("(embedded preset, photos)")
    assert str(tmp_path) not in json.dumps(to_json(result))
    assert to_json(result)["data"].startswith("photos@")


def test_terminal_and_markdown_show_every_entry(result: TableResult) -> None:
    table = to_text_table(result)
    entries = [entry for row in table.rows for entry in row]
    terminal, markdown = to_terminal(table), to_markdown(table)
    assert all(entry in terminal and entry in markdown for entry in entries)
    lines = [line for line in markdown.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in lines} == {len(table.header) + 1}


def test_latex_is_escaped_and_balanced(result: TableResult) -> None:
    latex = to_latex(to_text_table(result))
    assert r"Two defenses \& a $<$broken$>$ one" in latex
    assert r"21.00 $\pm$ 0.82" in latex
    assert r"lpips" not in latex or r"\_" in latex
    assert latex.count(r"\begin{") == latex.count(r"\end{") == 2
    for rule in ("toprule", "midrule", "bottomrule"):
        assert rf"\{rule}" in latex


def test_csv_and_json_hold_the_same_numbers(result: TableResult) -> None:
    rows = list(csv.DictReader(io.StringIO(to_csv(result))))
    plain = json.loads(json.dumps(to_json(result)))
    assert len(rows) == len(plain["rows"]) == 6
    for row, entry in zip(rows, plain["rows"], strict=True):
        assert row["defense"] == entry["labels"]["defense"]
        psnr = entry["values"]["psnr"]
        assert row["psnr mean"] == ("" if psnr is None else str(psnr["mean"]))
    assert rows[4]["error"] == plain["rows"][4]["errors"][0]


def test_the_same_numbers_give_the_same_vector_figures(tmp_path: Path) -> None:
    result, store = example(tmp_path)
    for name in ("a", "b"):
        write_outputs(result, store, tmp_path / name)
    for figure in ("bars.pdf", "heatmap.pdf", "curves.pdf", "lines.pdf"):
        first, second = ((tmp_path / name / figure).read_bytes() for name in ("a", "b"))
        assert first.startswith(b"%PDF")
        assert first == second


def test_every_figure_that_a_table_may_ask_for_is_drawn() -> None:
    assert _DRAW.keys() == FIGURES.keys()


def test_rows_are_told_apart_in_every_diagram(result: TableResult) -> None:
    looks = _looks(result.rows)
    assert len({(look.colour, look.kind) for look in looks}) == len(result.rows)
    # A colour per defense; batches differ by marker, line and shade.
    assert [look.colour for look in looks] == ["C0", "C0", "C1", "C1", "C2", "C2"]
    assert [look.kind for look in looks] == [0, 1] * 3
    assert len({(look.marker, look.line, look.opacity) for look in looks}) == 2


def test_text_is_drawn_by_its_own_metrics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table, store = load(tmp_path, TABLE), Store(tmp_path / "store")
    for cell in table.cells():
        if cell.stage == "attack":
            n = cell.inputs["checkpoint"].cell.config["batch-size"]
            sentence = {"index": 0, "tokens_placed": 1 / n, "sentence_exact": float(n == 1)}
            record = attack_record(20.0)
            record["evaluation"] = {"per_image": [sentence], "baselines": {}, "missing": {}}
            record["details"] = {"tokens_over_width": n / 2}
            store.finish(cell, record)
        else:
            store.finish(cell, {})
    drawn = {}
    monkeypatch.setattr(
        charts, "save_picture", lambda figure, file, *about: drawn.setdefault(file.stem, figure)
    )
    result = collect(table, store)
    for draw in (charts.bars, charts.lines, charts.tokens_over_width):
        assert len(list(draw(result, store, tmp_path))) == 1
    (widths,) = (patch.get_width() for patch in drawn["bars"].axes[0].patches[:1])
    assert (widths, drawn["bars"].axes[0].get_xlabel()[:15]) == (1.0, "tokens in place")
    assert drawn["lines"].axes[0].lines[0].get_ydata().tolist() == [1.0, 0.25]
    line = drawn["tokens_over_width"].axes[0].lines[0]
    assert [line.get_xdata().tolist(), line.get_ydata().tolist()] == [[0.5, 2.0], [1.0, 0.0]]


def test_a_heat_map_of_a_single_axis_is_left_out(result: TableResult, tmp_path: Path) -> None:
    one = dataclasses.replace(
        result, table=dataclasses.replace(result.table, axes=result.table.axes[:1])
    )
    assert list(heatmap(one, Store(tmp_path / "store"), tmp_path)) == []
    assert list(heatmap(result, Store(tmp_path / "store"), tmp_path))


def test_files_are_written_and_the_report_needs_no_other(tmp_path: Path) -> None:
    result, store = example(tmp_path)
    write_outputs(result, store, tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names >= {f"example.{e}" for e in ("txt", "md", "tex", "csv", "json")}
    assert names >= {"report.html", "bars.png", "heatmap.png", "curves.png", "lines.png"}
    html = (tmp_path / "out" / "report.html").read_text()
    assert "out of <memory>" not in html
    assert "out of &lt;memory&gt;" in html
    references = re.findall(r'(?:src|href)="([^"]*)"', html)
    assert references
    assert all(reference.startswith("data:") for reference in references)


def test_a_report_of_many_pictures_stays_small(tmp_path: Path) -> None:
    """60 pictures of 0.75 MB: the page holds the first whole, and small copies of the others."""
    result, store = example(tmp_path)
    folder = tmp_path / "out"
    folder.mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (500, 500, 3), dtype=np.uint8)
    pictures = []
    for index in range(60):
        file = folder / f"a picture {index}.png"
        Image.fromarray(np.roll(noise, index)).save(file, compress_level=1)
        pictures.append(Picture(file, f"picture {index}"))
    # What it imports is no memory of the pictures.
    to_html(result, pictures[:6], store, folder)
    total = sum(picture.file.stat().st_size for picture in pictures)
    tracemalloc.start()
    html = to_html(result, pictures, store, folder)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert total > 40e6
    assert len(html) < 9e6
    assert peak < 40e6
    whole, small = html.count("data:image/png"), html.count("data:image/jpeg")
    assert (whole, small) == (5, 55)
    links = re.findall(r'<a href="\./([^"]*)"', html)
    assert [folder / unquote(link) for link in links] == [p.file for p in pictures[5:]]
    for data in re.findall(r"data:image/jpeg;base64,([^\"]*)", html):
        with Image.open(io.BytesIO(base64.b64decode(data))) as image:
            assert max(image.size) <= 256


needs_browser = pytest.mark.skipif(
    find_browser() is None, reason="no Chromium on this machine (apt-get install chromium)"
)


@needs_browser
@pytest.mark.parametrize("width", [1200, 390], ids=["desk", "phone"])
def test_report_in_a_browser(tmp_path: Path, width: int) -> None:
    result, store = example(tmp_path)
    write_outputs(result, store, tmp_path / "out")
    shown = "[...document.querySelectorAll('table.numbers tbody:first-of-type tr')]"
    shown += ".filter(r => r.offsetParent !== null)"
    first = f"{shown}.map(r => r.cells[0].innerText + r.cells[1].innerText)"
    psnr = "document.querySelectorAll('table.numbers th button')[2]"
    browser = find_browser()
    assert browser is not None
    with Page(browser, tmp_path / "profile", width) as page:
        page.open(tmp_path / "out" / "report.html")
        assert len(page.run(first)) == 6

        page.run(f"{psnr}.click()")
        ascending = page.run(first)
        assert [name[:5] for name in ascending[:2]] == ["noise", "noise"]
        page.run(f"{psnr}.click()")
        descending = page.run(first)
        assert [name[:4] for name in descending[:2]] == ["none", "none"]
        # What has no value stays at the end either way.
        assert all(name.startswith("broken") for name in ascending[4:] + descending[4:])

        page.run("{const s = document.querySelector('select[name=defense]'); s.value = 'noise';"
                 "s.dispatchEvent(new Event('input'))}")  # fmt: skip
        assert [name[:5] for name in page.run(first)] == ["noise", "noise"]
        page.run("{const s = document.querySelector('#search'); s.value = 'nothing like it';"
                 "s.dispatchEvent(new Event('input'))}")  # fmt: skip
        assert page.run(first) == []

        page.run("document.querySelector('figure button').click()")
        assert page.run("document.querySelector('#enlarged').open") is True
        assert page.run("document.querySelector('#enlarged img').naturalWidth") > 100
        page.run("document.querySelector('#enlarged').click()")
        assert page.run("document.querySelector('#enlarged').open") is False

        # Wide tables scroll inside their box; the page itself never does.
        assert page.run("document.documentElement.scrollWidth <= window.innerWidth") is True
        assert page.complaints == []


def test_every_value_of_an_axis_has_a_picture_of_its_own() -> None:
    assert _distinct_slugs(["0.1", "-0.1", "0/1", "ä", "ü"]) == ["0-1", "0-1-2", "0-1-3", "2", "3"]


def test_a_round_that_was_not_measured_does_not_borrow_an_earlier_value() -> None:
    measured = {"site": "site-9", "round": 10, "rdlv": -0.6, "images": [{"rdlv": -0.6}]}
    why = "The update does not leave the site: local training diverged."
    blind = {"site": "site-9", "round": 20, "rdlv": None, "images": [], "statement": why}
    run = Run({"federated": {"leakage": [measured, blind]}})
    column = find_column("rdlv site-9")
    assert list(column.values(run)) == []
    assert column.note(run) == f"round 20: {why}; round 10: RDLV -0.60"
    before = find_column("rdlv site-9 round 10")
    assert (list(before.values(run)), before.note(run)) == ([-0.6], None)
