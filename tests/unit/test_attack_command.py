"""Stage 3 from the command line: bad input, repeated and killed runs, processes."""

from __future__ import annotations

import functools
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import gradinvbench as gib
from attack.cli.command import main
from core.errors import exit_status
from core.models.building import ModelSpec
from core.target import Truth
from gradients.checkpoint import load_target, save_target
from tests.launched import Command
from tests.targets import make_target

ROOT = Path(__file__).resolve().parents[2]
FLAGS = ["--epochs", "12", "--pseudo-label-init", "from_grads", "--quiet", "--cpu", "--double"]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints")
    target, truth = make_target(ModelSpec("lenet", 10, 8, width=8), 2)
    truth = Truth(truth.images, truth.labels, torch.full((3, 8, 8), 0.5))
    save_target(folder / "lenet.tar", target, truth)
    save_target(folder / "stripped.tar", target)
    whole = (folder / "lenet.tar").read_bytes()
    (folder / "cut.tar").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.tar").touch()
    torch.save({"state_dict": {}}, folder / "other.tar")
    raw = torch.load(folder / "lenet.tar", weights_only=False)
    setup = {**raw["dataset_setup"], "n_classes": 7}
    torch.save({**raw, "dataset_setup": setup}, folder / "classes.tar")
    cnn, truth = make_target(ModelSpec("cnn", 10, 8, width=4), 2, train_mode=True)
    save_target(folder / "cnn.tar", cnn, truth)
    return folder


def command(*words: str) -> int:
    return exit_status(functools.partial(main, list(words)))


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def start(
    *words: str, launcher: tuple[str, ...] = (), path: str = ""
) -> Command | subprocess.Popen[str]:
    if not launcher:
        return Command("main_run.py", *words, PYTHONPATH=f"{ROOT}{os.pathsep}{path}")
    return subprocess.Popen(
        [sys.executable, *launcher, "main_run.py", *words],
        cwd=ROOT, env=environment(), text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def images(folder: Path) -> torch.Tensor:
    return torch.load(folder / "reconstruction.pt", weights_only=True)["images"]


MISTAKES = [
    ("none.tar", [], "there is no file"),
    ("cut.tar", [], "truncated"),
    ("empty.tar", [], "0 bytes"),
    ("other.tar", [], "not a gradient checkpoint"),
    ("classes.tar", [], "differ"),
    ("lenet.tar", ["--attack", "best"], "--attack best"),
    ("lenet.tar", ["--optim", "Adamm"], "--optim Adamm"),
    ("lenet.tar", ["--tv-kind", "cubic"], "--tv-kind cubic"),
    ("lenet.tar", ["--start", "cold"], "--start cold"),
    ("lenet.tar", ["--coordinates", "fourier"], "--coordinates fourier"),
    ("lenet.tar", ["--lr-schedule", "sawtooth"], "--lr-schedule sawtooth"),
    ("lenet.tar", ["--layers", "middle"], "--layers"),
    ("lenet.tar", ["--pseudo-label-init", "guess"], "--pseudo-label-init guess"),
    ("lenet.tar", ["--MinCombine"], "--n-seed 2 or more"),
    ("lenet.tar", ["--epochs", "0"], "--epochs"),
    ("lenet.tar", ["--BN", "0.1"], "no BatchNorm layer"),
    ("lenet.tar", ["--lr", "nan"], "--lr nan: must be a finite number"),
    ("lenet.tar", ["--TV", "inf"], "--TV inf: must be a finite number"),
    ("lenet.tar", ["--layers", "first:0"], "--layers: unknown layer weights first:0"),
    ("lenet.tar", ["--patch", "1", "--patch-size", "0"], "--patch-size must be at least 1"),
    ("lenet.tar", ["--state-every", "0"], "--state-every must be at least 1"),
    ("lenet.tar", ["--id", "../x"], "--id ../x: becomes the name of a folder"),
    ("lenet.tar", ["--metric", "--lpips-weights", "nowhere"], "there is no folder nowhere"),
    ("lenet.tar", ["--dist-backend", "nccl"], "use --dist-backend gloo"),
    ("lenet.tar", ["--superparameters-search"], "needs --simulation-checkpoint"),
    ("lenet.tar", ["--cuda-graphs"], "--cuda-graphs needs a CUDA GPU"),
    ("lenet.tar", ["--precision", "bf16"], "--double and --precision bf16"),
    ("lenet.tar", ["--compile", "--hvp", "exact"], "not with --hvp exact"),
    ("lenet.tar", ["--compile", "--restarts-at-once", "2"], "not with --restarts-at-once"),
    ("stripped.tar", ["--metric"], "--metric: "),
    ("stripped.tar", ["--GInfoR"], "--GInfoR: "),
    ("stripped.tar", ["--pseudo-label-init", "known"], "--pseudo-label-init known"),
]


@pytest.mark.parametrize(("file", "more", "sentence"), MISTAKES, ids=str)
def test_mistakes_are_one_sentence_and_status_2(
    file: str,
    more: list[str],
    sentence: str,
    files: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["--checkpoint", str(files / file), "--root", str(tmp_path), *FLAGS, *more]
    assert command(*words) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1
    assert said[0].startswith("error: ")
    assert sentence in said[0]
    assert not list(tmp_path.rglob("reconstruction.pt"))


def test_exact_statistics_have_to_be_there(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw = torch.load(files / "cnn.tar", weights_only=False)
    nothing = {"bn_statistics": None, "bn_mean_list": None, "bn_var_list": None}
    torch.save({**raw, **nothing}, tmp_path / "cnn.tar")
    words = ["--checkpoint", str(tmp_path / "cnn.tar"), "--root", str(tmp_path), *FLAGS]
    assert command(*words, "--BN", "0.1", "--exact-bn") == 2
    assert "--exact-bn: the checkpoint holds no batch statistics" in capsys.readouterr().err


class RunsCode:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (os.mkdir, (os.environ["MARK"],))


def test_a_checkpoint_that_would_run_code_runs_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    mark = tmp_path / "executed"
    monkeypatch.setenv("MARK", str(mark))
    torch.save({"state_dict": RunsCode()}, tmp_path / "evil.tar")
    (tmp_path / "evil.pkl").write_bytes(pickle.dumps(RunsCode()))
    for name in ("evil.tar", "evil.pkl"):
        assert command("--checkpoint", str(tmp_path / name)) == 2
        assert name in capsys.readouterr().err
    assert not mark.exists()


def test_more_processes_than_images(files: Path, tmp_path: Path) -> None:
    process = start(
        "--checkpoint", str(files / "lenet.tar"), "--root", str(tmp_path), *FLAGS,
        "--multiprocessing-distributed", "--nproc-per-node", "3",
        "--dist-url", "tcp://127.0.0.1:0",
    )  # fmt: skip
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 2
    assert "3 processes for a batch of 2" in said.strip().splitlines()[-1]


def test_help_imports_no_torch() -> None:
    script = (
        "import sys\nfrom attack.cli.command import build_parser\nbuild_parser().format_help()\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=environment(), check=False)
    assert done.returncode == 0


def test_a_reader_that_leaves_is_no_failure(files: Path) -> None:
    inspect = subprocess.Popen(
        [sys.executable, "-m", "gradients.inspect", str(files / "lenet.tar")],
        cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert inspect.stdout is not None
    assert inspect.stderr is not None
    inspect.stdout.close()
    said = inspect.stderr.read()
    assert inspect.wait(timeout=60) == 141
    assert said == b""


def test_a_gpu_asked_for_without_one_is_a_warning(
    files: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    words = ["--checkpoint", str(files / "lenet.tar"), "--root", str(tmp_path), *FLAGS]
    assert command(*words, "--gpu", "0") == 0
    assert "--gpu 0: no CUDA GPU is used" in caplog.text


def test_the_truth_does_not_help(files: Path, tmp_path: Path) -> None:
    for name in ("lenet", "stripped"):
        more = ["--metric"] if name == "lenet" else []
        where = ["--checkpoint", str(files / f"{name}.tar"), "--root", str(tmp_path)]
        assert command(*where, "--id", name, *FLAGS, *more) == 0
    assert torch.equal(images(tmp_path / "lenet"), images(tmp_path / "stripped"))
    record = json.loads((tmp_path / "lenet" / "record.json").read_text())
    assert {"mean image"} <= {str(k).replace("_", " ") for k in record["evaluation"]["baselines"]}


def test_a_finished_run_is_not_repeated_and_a_changed_one_is(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--checkpoint", str(files / "lenet.tar"), "--root", str(tmp_path), *FLAGS]
    file = tmp_path / "test" / "reconstruction.pt"
    assert command(*words) == 0
    written = file.stat().st_mtime_ns
    assert command(*words) == 0
    assert "already done" in capsys.readouterr().out
    assert file.stat().st_mtime_ns == written
    assert command(*words, "--TV", "0.2") == 0
    assert file.stat().st_mtime_ns > written
    assert not list(tmp_path.rglob("state-*"))


def test_killed_and_run_again_ends_as_uninterrupted(files: Path, tmp_path: Path) -> None:
    words = ["--checkpoint", str(files / "lenet.tar"), *FLAGS]
    words += ["--epochs", "600", "--state-every", "20", "--input-noise", "0.1", "--n-seed", "2"]
    words += ["--metric", "--save-every", "10"]
    process = start(*words, "--root", str(tmp_path / "killed"))
    deadline = time.monotonic() + 100
    while not list(tmp_path.rglob("state-*.pt")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    process.communicate()
    killed = tmp_path / "killed" / "test"
    assert not (killed / "reconstruction.pt").exists()
    state = next(killed.glob("state-*.pt"))
    assert 0 < torch.load(state, weights_only=True)["progress"]["iteration"] < 600
    for folder in ("killed", "whole"):
        again = start(*words, "--root", str(tmp_path / folder))
        assert again.wait(timeout=100) == 0
        again.communicate()
    whole = tmp_path / "whole" / "test"
    assert torch.equal(images(killed), images(whole))
    assert not list(killed.glob("state-*"))
    curves = [json.loads((f / "record.json").read_text())["psnr_curve"] for f in (killed, whole)]
    assert curves[0] == curves[1] != []


LAUNCHES = {
    "one": ((), []),
    "spawned": (
        (),
        ["--multiprocessing-distributed", "--nproc-per-node", "2", "--dist-backend", "gloo",
         "--dist-url", "tcp://127.0.0.1:0"],
    ),
    "torchrun": (("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"), []),
}  # fmt: skip


def test_processes_reconstruct_what_one_does(files: Path, tmp_path: Path) -> None:
    found = {}
    for name, (launcher, more) in LAUNCHES.items():
        process = start(
            "--checkpoint", str(files / "cnn.tar"), "--root", str(tmp_path), "--id", name,
            *FLAGS, "--no-signed", "--hvp", "exact", *more, launcher=launcher,
        )  # fmt: skip
        said, _ = process.communicate(timeout=120)
        assert process.returncode == 0, said
        found[name] = images(tmp_path / name)
        record = json.loads((tmp_path / name / "record.json").read_text())
        assert record["provenance"]["processes"] == (1 if name == "one" else 2)
    for name in ("spawned", "torchrun"):
        torch.testing.assert_close(found[name], found["one"], rtol=0, atol=1e-6)


def test_mean_image_travels_with_the_truth_only(files: Path) -> None:
    _, truth = load_target(files / "lenet.tar")
    assert truth is not None
    assert truth.mean_image is not None
    assert torch.equal(truth.mean_image, torch.full((3, 8, 8), 0.5))
    assert load_target(files / "stripped.tar")[1] is None


def test_ctrl_c_measures_the_best_so_far_and_can_be_continued(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["--checkpoint", str(files / "lenet.tar"), *FLAGS, "--metric", "--state-every", "5"]
    words += ["--save-every", "8"]
    assert command(*words, "--root", str(tmp_path / "whole")) == 0
    with monkeypatch.context() as patched:

        def stop(*_: object, **__: object) -> None:
            raise KeyboardInterrupt

        # The first picture is due after eight of twelve iterations.
        patched.setattr("attack.cli.curve.save_images", stop)
        assert command(*words, "--root", str(tmp_path / "cut")) == 130
    folder = tmp_path / "cut" / "test"
    record = json.loads((folder / "record.json").read_text())
    assert (record["status"], record["iterations"]) == ("interrupted", 8)
    assert all(row["psnr"] > 0 for row in record["evaluation"]["per_image"])
    assert command(*words, "--root", str(tmp_path / "cut")) == 0
    assert json.loads((folder / "record.json").read_text())["status"] == "finished"
    assert torch.equal(images(folder), images(tmp_path / "whole" / "test"))


def test_a_run_leaves_its_log_and_its_losses_by_layer(files: Path, tmp_path: Path) -> None:
    words = ["--checkpoint", str(files / "lenet.tar"), *FLAGS, "--TV", "0.01"]
    assert command(*words, "--root", str(tmp_path)) == 0
    folder = tmp_path / "test"
    log = (folder / "log.txt").read_text()
    assert log.count("AnisotropicTV term") == 3
    assert "gradient term" in log
    record = json.loads((folder / "record.json").read_text())
    layers = record["details"]["layers"]
    target, _ = load_target(files / "lenet.tar")
    assert set(layers) == set(target.gradient)
    # The whole objective from the layers' own numbers, against what the loop says.
    shared = sum(row["norm"] ** 2 for row in layers.values())
    own, product = 0.0, 0.0
    for row in layers.values():
        # |a|^2 from |a - b|^2 and the cosine: (1 - sim) |a| |b| = a.b
        c, b = (1 - row["sim"]), row["norm"]
        root = (c * b) + ((c * b) ** 2 - b**2 + row["L2"]) ** 0.5
        own, product = own + root**2, product + c * b * root
    assert 1 - product / (own * shared) ** 0.5 == pytest.approx(record["objective"], abs=0.02)
    assert "parameter" in (folder / "layers.txt").read_text()


def test_the_record_keeps_the_doubt_about_a_label_rule(tmp_path: Path) -> None:
    """A sign rule on features of both signs: the record says so, the exact rule's does not."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.Linear(192, 9), torch.nn.Tanh(), torch.nn.Linear(9, 4)
    )
    target, truth = gib.share(model, torch.rand(1, 3, 8, 8), [2])
    path = tmp_path / "signed.tar"
    gib.save_target(path, target, truth, builder="own_tanh:build")
    (tmp_path / "own_tanh.py").write_text(
        "from torch import nn\n\n\ndef build():\n    return nn.Sequential(nn.Flatten(), "
        "nn.Linear(192, 9), nn.Tanh(), nn.Linear(9, 4))\n"
    )
    notes = {}
    for rule in ("idlg", "exact"):
        words = ["--checkpoint", str(path), "--model", "own_tanh:build", "--epochs", "2",
                 "--pseudo-label-init", rule, "--root", str(tmp_path / rule)]  # fmt: skip
        process = start(*words, path=str(tmp_path))
        said, _ = process.communicate(timeout=120)
        assert process.returncode == 0, said
        (record,) = (tmp_path / rule).rglob("record.json")
        notes[rule] = json.loads(record.read_text())["details"].get("label_warning")
    assert "assumes that no feature" in notes["idlg"]
    assert notes["exact"] is None


def test_e2egis_stages_end_with_pictures(files: Path, tmp_path: Path) -> None:
    words = ["--checkpoint", str(files / "lenet.tar"), *FLAGS, "--MinCombine", "--n-seed", "2"]
    assert command(*words, "--T-in", "3", "--root", str(tmp_path)) == 0
    names = {path.name for path in (tmp_path / "test").glob("stage*.png")}
    assert names == {"stage1.png", "stage2.png"}
    assert json.loads((tmp_path / "test" / "record.json").read_text())["psnr_curve"] == []


def test_a_search_needs_nothing_to_attack(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from attack.cli.search import SearchResult

    monkeypatch.setattr(
        "attack.cli.search.search", lambda *_, **__: SearchResult({"lr": 0.25, "TV": 0.5}, 0.1, [])
    )
    words = ["--superparameters-search", "--simulation-checkpoint", str(files / "lenet.tar")]
    assert command(*words, "--lr-tune", "--root", str(tmp_path), "--cpu") == 0
    assert json.loads((tmp_path / "test" / "best_setting.json").read_text()) == {"lr": 0.25}
    assert "--checkpoint PATH --lr 0.25" in capsys.readouterr().out
    assert command(*words[:1], "--root", str(tmp_path)) == 2
    assert "needs --simulation-checkpoint" in capsys.readouterr().err
