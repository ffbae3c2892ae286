"""The comparison with published values: what is said of a row, what is kept, what is shown."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from attack.attacks import get_attack
from attack.knowledge.labels import rule_names
from benchmarks.command import main
from benchmarks.fidelity.beside_text import placed
from benchmarks.fidelity.declare import Outcome, Published, Row, Trial
from benchmarks.fidelity.docstrings import restate, restated
from benchmarks.fidelity.experiments import ImageAttack, alone_in_a_bin
from benchmarks.fidelity.networks import GPT2_TOKENS, Transformer3
from benchmarks.fidelity.page import Line, lines, page_of, to_text
from benchmarks.fidelity.record import FILE, Record
from benchmarks.fidelity.rows import ROWS
from benchmarks.fidelity.run import Request, fingerprint, jobs, run
from benchmarks.fidelity.samples import CIFAR10, Samples
from benchmarks.fidelity.verdict import Measured, verdict
from core.errors import InputError
from core.models.building import ModelSpec
from gradinvbench import invert

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Counted:
    """An experiment of known values that notes its calls in a file."""

    calls: str
    level: float = 10.0
    kind: str = CIFAR10
    needs: tuple[str, ...] = ()
    second: str = ""

    def ours(self, trial: Trial) -> Outcome:
        with open(self.calls, "a") as file:
            file.write(f"{trial.number}\n")
        return Outcome(self.level + trial.number, {"seen": 1.0})

    def beside(self, trial: Trial) -> Outcome:
        raise AssertionError("there is none")


def a_row(experiment: Counted | None = None, **changes: object) -> Row:
    published = Published(10.0, "dB", "table 1", "https://example.org")
    row = Row("a-row", "dlg", "a setting", published, experiment, trials=4)
    return replace(row, **changes)  # type: ignore[arg-type]


def request(row: Row, **changes: object) -> Request:
    asked = Request((row,), False, Samples({CIFAR10: "somewhere"}), {}, CPU)
    return replace(asked, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("measured", "changes", "said"),
    [
        (Measured(4, 10.0, 9.0, 11.0), {}, "reproduced"),
        (Measured(4, 12.0, 11.0, 13.0), {}, "above"),
        (Measured(4, 8.0, 7.0, 9.0), {"below": "a reason"}, "below: a reason"),
        (Measured(4, 8.0, 7.0, 9.0), {}, "below: not explained yet"),
        # The published value has two digits behind the point.
        (Measured(4, 10.004, 10.004, 10.004), {}, "reproduced"),
        (Measured(3, 8.0, 7.0, 9.0), {}, "3 of 4 computed so far"),
        (Measured(4, 8.0, 7.0, 9.0), {"incomparable": "it differs"}, "not comparable: it differs"),
        (None, {"gpu_hours": 3.0}, "needs a GPU (about 3 hours)"),
        (None, {}, "not computed yet"),
    ],
)
def test_the_verdict_follows_from_the_numbers(
    measured: Measured | None, changes: dict[str, object], said: str
) -> None:
    assert verdict(a_row(**changes), measured) == said


def test_other_samples_are_never_a_reproduction() -> None:
    assert verdict(a_row(), Measured(4, 10.0, 9.0, 11.0), stands_in=True).endswith("other data")


def test_a_stopped_comparison_goes_on_and_a_changed_one_begins_anew(tmp_path: Path) -> None:
    calls = tmp_path / "calls"
    row = a_row(Counted(str(calls)))
    record = Record.read(tmp_path)
    for job in jobs(request(row, trials=2), record):
        run(job, record)
    again = Record.read(tmp_path)
    assert [job.trial.number for job in jobs(request(row), again)] == [2, 3]
    for job in jobs(request(row), again):
        run(job, again)
    assert calls.read_text().split() == ["0", "1", "2", "3"]
    line = Line.of(row, Record.read(tmp_path))
    assert line.ours is not None
    assert (line.ours.n, line.ours.mean) == (4, 11.5)
    changed = a_row(Counted(str(calls), level=20.0))
    assert fingerprint(row.experiment) != fingerprint(changed.experiment)  # type: ignore[arg-type]
    assert len(jobs(request(changed), again)) == 4


def test_two_runs_keep_each_others_trials(tmp_path: Path) -> None:
    row = a_row(Counted(str(tmp_path / "calls")))
    first, second = Record.read(tmp_path), Record.read(tmp_path)
    todo = jobs(request(row), first)
    run(todo[0], first)
    run(todo[1], second)
    assert [entry.trial for entry in Record.read(tmp_path).of("a-row", CIFAR10)] == [0, 1]


def test_embedded_photographs_stand_beside_the_images_asked_for(tmp_path: Path) -> None:
    row = a_row(Counted(str(tmp_path / "calls")))
    record = Record.read(tmp_path)
    for job in jobs(request(row, samples=Samples()), record):
        run(job, record)
    assert Line.of(row, record).verdict == "not comparable: other data"
    for job in jobs(request(row), record):
        run(job, record)
    assert len(record.entries) == 8
    # 10, 11, 12 and 13 dB: the published 10 dB lies below their mean's interval.
    assert Line.of(row, record).verdict == "above"


def test_rows_that_need_a_gpu_or_weights_run_only_where_they_can(tmp_path: Path) -> None:
    row = a_row(Counted("calls"), gpu_hours=1.0)
    record = Record.read(tmp_path)
    assert not jobs(request(row), record)
    assert jobs(request(row, named=True), record)
    weighty = a_row(Counted("calls", needs=("resnet18",)))
    assert not jobs(request(weighty), record)
    assert jobs(request(weighty, weights={"resnet18": Path("file")}), record)


def test_a_damaged_record_is_refused(tmp_path: Path) -> None:
    (tmp_path / FILE).write_text(json.dumps({"entries": [{"row": "r-gap"}]}))
    with pytest.raises(InputError, match="not a whole record"):
        Record.read(tmp_path)


def test_rows_state_what_a_reader_needs() -> None:
    assert len({row.name for row in ROWS}) == len(ROWS)
    for row in ROWS:
        name, _, rule = row.attack.partition(":")
        assert rule in rule_names() if rule else get_attack(name).name == row.attack
        assert row.setting
        assert row.published.address.startswith("https://")
        assert row.trials >= 8
        # Whoever cannot compute a row here learns how to.
        assert row.experiment is not None or row.command
        assert row.run_by.startswith("python -m benchmarks ")


def test_no_trial_has_an_image_twice_and_all_are_the_same_next_time() -> None:
    samples = Samples()
    drawn = [samples.images(CIFAR10, n, 16, 32) for n in range(2)]
    images = torch.cat([each.images for each in drawn]).flatten(1)
    assert len(images.unique(dim=0)) == 32
    assert len(drawn[0].labels.unique()) == drawn[0].n_classes
    assert torch.equal(Samples().images(CIFAR10, 1, 16, 32).images, drawn[1].images)


def test_fewer_channels_than_values_show_what_the_embedding_sees() -> None:
    narrow = ModelSpec("vit_april", image_size=48, width=66)
    experiment = ImageAttack("april", narrow, double=True)
    case = experiment.case(Trial(0, Samples(), CPU))
    found = invert(case.target, attack="april", labels=case.truth.labels)
    weight = case.target.build_model().get_parameter("conv_proj.weight").detach().flatten(1)
    weight = weight.double()
    seen = torch.linalg.pinv(weight) @ weight
    assert weight.shape[1] > weight.shape[0]
    fold = {"kernel_size": 6, "stride": 6}
    patches = torch.nn.functional.unfold(
        case.target.data.normalize(case.truth.images.double()), **fold
    )
    inputs = torch.nn.functional.fold(seen @ patches, (48, 48), **fold)
    expected = case.target.data.denormalize(inputs).clamp(0, 1)
    assert torch.allclose(found.images.double(), expected, atol=1e-5)


def test_alone_in_a_bin_counts_by_the_thresholds() -> None:
    spec = ModelSpec("cnn", image_size=32, width=4, malicious="imprint:64")
    experiment = ImageAttack("robbing-the-fed", spec, batch=8, measure=alone_in_a_bin)
    outcome = experiment.ours(Trial(0, Samples(), CPU))
    assert 0 < outcome.details["alone"] <= 1
    # What is alone in its bin is read off exactly, up to float32's rounding.
    assert outcome.value > 35


def test_transformer3_has_the_published_number_of_parameters() -> None:
    with torch.device("meta"):
        model = Transformer3(GPT2_TOKENS)
    assert sum(p.numel() for p in model.parameters()) == 10_800_433


def test_a_docstring_gets_its_section_once() -> None:
    line = Line.of(a_row(gpu_hours=2.0), Record(Path("nowhere")))
    paper = "    Source: A paper,\n        https://example.org."
    bare = f'    """What.\n\n{paper}\n\n    Args:\n        x: Y.\n    """\n'
    once = restated(bare, [line])
    assert "    Reproduced:\n        a-row: needs a GPU (about 2 hours).\n\n    Args:" in once
    assert restated(once, [line]) == once
    assert restated(once, []) == bare


def test_the_attacks_say_what_the_record_says() -> None:
    record = Record.read(ROOT / "results" / "fidelity")
    stale = [path.name for path, text in restate(record).items() if path.read_text() != text]
    assert not stale, "run python docs/generate.py"


def test_page_and_terminal_show_every_row() -> None:
    folder = ROOT / "results" / "fidelity"
    page = page_of(folder)
    text = to_text(ROWS, Record.read(folder))
    for line in lines(Record.read(folder)):
        assert f"### {line.row.name}\n" in page
        assert f"{line.row.name}: published" in text
        # Numbers stand there only where they were measured.
        assert (line.ours is None) == (line.measured(line.ours) == "–")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--only", "nothing"], "--only nothing: there is no such row"),
        (["--trials", "0"], "--trials must be at least 1"),
        (["--budget", "0"], "--budget must be above 0"),
        (["--data", "mnist=here"], "--data mnist=here"),
        (["--weights", "resnet18=/nowhere"], "--weights resnet18=/nowhere"),
        (["--device", "tpu"], "--device tpu"),
    ],
)
def test_bad_input_is_one_sentence(
    words: list[str], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fidelity", *words, "--output", str(tmp_path)]) == 2
    assert sentence in capsys.readouterr().err


def test_gradients_stand_where_breaching_looks_for_them() -> None:
    named = {name: torch.zeros(1) for name in ("emb", "a", "b", "weight", "bias", "c")}
    order = placed(named, "transformer3", "emb", "bias")
    assert (order[-3], order[-1]) == ("emb", "bias")
    order = placed(named, "bert-base-uncased", "emb", "bias")
    assert (order[0], order[-5]) == ("emb", "bias")
    assert sorted(order) == sorted(named)


def test_long_texts_run_over_the_ends_of_sentences() -> None:
    pytest.importorskip("tokenizers")
    samples = Samples()
    first, second = (samples.sentences(number, 1, 512) for number in range(2))
    assert first.shape == second.shape == (1, 512)
    assert not torch.equal(first, second)
    public = samples.public_sentences(0, 1, 512, 8)
    assert len(public) == 8
    assert not any(torch.equal(first[0], text) for text in public)
