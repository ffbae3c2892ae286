"""Figures and commands on made-up workspaces."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from audit.leakage import failed_report, measure_leakage, write_leakage
from audit.similarity import ImageSimMetric
from core.errors import InputError
from federated.experiment.cli import plot_rdlv_per_round, plot_rdlv_vs_gauss, plot_reconstructions
from federated.experiment.runs import read_runs


def make_run(folder: Path, sigma0: float, *, run_file: bool = True) -> Path:
    """Two sites, two rounds; the second round of site-1 was withheld unmeasured."""
    generator = torch.Generator().manual_seed(int(10 * sigma0))
    for site, n in (("site-1", 2), ("site-9", 1)):
        for number in (0, 1):
            app = folder / site / "simulate_job" / f"app_{site}"
            originals = torch.rand(n, 3, 16, 16, generator=generator)
            found = (originals + 0.1 * sigma0 * torch.randn(originals.shape)).clamp(0, 1)
            report = measure_leakage(
                originals, found, torch.full((3, 16, 16), 0.5), ImageSimMetric()
            )
            if (site, number) == ("site-1", 1):
                write_leakage(app, site, number, failed_report("the attack broke"))
            else:
                write_leakage(app, site, number, report, found, originals)
    if run_file:
        content = {"sigma0": sigma0, "n_clients": 2, "test_accuracy": 0.9 - 0.1 * sigma0}
        (folder / "run.json").write_text(json.dumps(content))
    return folder


def size_of(path: Path) -> tuple[int, int]:
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        return picture.size


def test_runs_are_ordered_by_noise(tmp_path: Path) -> None:
    for sigma0 in (2.0, 0.0, 0.5):
        make_run(tmp_path / f"run-{sigma0}", sigma0)
    runs = read_runs(tmp_path)
    assert [run.sigma0 for run in runs] == [0.0, 0.5, 2.0]
    assert [run.test_accuracy for run in runs] == pytest.approx([0.9, 0.85, 0.7])
    assert all(len(run.records) == 4 for run in runs)


def test_noise_is_read_from_the_job_configuration(tmp_path: Path) -> None:
    for name, value in (("literal", 0.25), ("variable", "{SIGMA0}")):
        folder = make_run(tmp_path / name, 0.0, run_file=False)
        for site in ("site-1", "site-9"):
            config = folder / site / "simulate_job" / f"app_{site}" / "config"
            config.mkdir()
            noise = {"path": "nvflare_gradinv.GaussianPrivacy", "args": {"sigma0": value}}
            content = {"SIGMA0": 7, "task_result_filters": [{"filters": [noise]}]}
            (config / "config_fed_client.json").write_text(json.dumps(content))
    assert [run.sigma0 for run in read_runs(tmp_path)] == [0.25, 7.0]


def test_unknown_noise_is_told(tmp_path: Path) -> None:
    make_run(tmp_path, 0.0, run_file=False)
    with pytest.raises(InputError, match="what noise"):
        read_runs(tmp_path)


def test_commands_draw_pictures(tmp_path: Path) -> None:
    for sigma0 in (0.0, 1.0, 50.0):
        make_run(tmp_path / f"run-{sigma0}", sigma0)
    one = tmp_path / "run-0.0"
    assert plot_rdlv_per_round.main(["--workspace", str(one)]) == 0
    assert size_of(one / "rdlv_per_round.png")[0] > 300
    for command in (plot_rdlv_vs_gauss, plot_reconstructions):
        target = tmp_path / f"{command.__name__}.png"
        assert command.main(["--workspaces", str(tmp_path), "--output", str(target)]) == 0
        assert size_of(target)[0] > 300


def test_table_of_reconstructions_has_a_column_per_noise(tmp_path: Path) -> None:
    widths = []
    for sigma0 in (0.0, 1.0):
        make_run(tmp_path / f"run-{sigma0}", sigma0)
        target = tmp_path / "table.png"
        arguments = ["--workspaces", str(tmp_path), "--site", "site-1", "--output", str(target)]
        assert plot_reconstructions.main(arguments) == 0
        widths.append(size_of(target)[0])
    assert 1.3 < widths[1] / widths[0] < 1.8


@pytest.mark.parametrize(
    ("command", "flag"),
    [
        (plot_rdlv_per_round, "--workspace"),
        (plot_rdlv_vs_gauss, "--workspaces"),
        (plot_reconstructions, "--workspaces"),
    ],
)
def test_empty_folders_are_one_clear_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: object, flag: str
) -> None:
    assert command.main([flag, str(tmp_path)]) == 2  # type: ignore[attr-defined]
    assert "holds no leakage results" in capsys.readouterr().err
    assert command.main([flag, str(tmp_path / "none")]) == 2  # type: ignore[attr-defined]


def test_nothing_measured_and_unknown_sites_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_leakage(tmp_path / "run" / "site-1", "site-1", 0, failed_report("no prior"))
    (tmp_path / "run" / "run.json").write_text(json.dumps({"sigma0": 1.0}))
    assert plot_rdlv_per_round.main(["--workspace", str(tmp_path)]) == 2
    assert "measured RDLV" in capsys.readouterr().err
    arguments = ["--workspaces", str(tmp_path), "--site", "site-7"]
    assert plot_reconstructions.main(arguments) == 2
    assert "site-7" in capsys.readouterr().err
