"""The three commands on a client of the user's own: model, loss and data from a module file."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import gradinvbench as gib
from attack.cli.command import main as attack
from core.errors import InputError
from core.locks import LOCK_NAME
from core.named_objects import is_object_name, named_object
from gradients.command import run as extract
from training.main_pytorch import run as train

MODULE = '''
"""A site's own code."""

import torch
from torch import nn

import gradinvbench as gib


def build():
    torch.manual_seed(torch.initial_seed() % 2**31)
    return nn.Sequential(
        nn.Conv1d(2, 6, 3, padding=1), nn.Sigmoid(), nn.Flatten(), nn.Linear(96, 3)
    )


def no_model():
    return 3


def distance(outputs, targets):
    return (outputs - targets).square().mean()


def not_a_scalar(outputs, targets):
    return outputs - targets


def signals():
    generator = torch.Generator().manual_seed(1)
    inputs = torch.rand((24, 2, 16), generator=generator)
    targets = torch.randn((24, 3), generator=generator)
    return gib.GivenData((inputs[:16], targets[:16]), (inputs[16:], targets[16:]))


def findings():
    generator = torch.Generator().manual_seed(1)
    inputs = torch.rand((24, 2, 16), generator=generator)
    targets = (torch.rand((24, 3), generator=generator) > 0.5).float()
    return (inputs[:16], targets[:16]), (inputs[16:], targets[16:])


def soft():
    generator = torch.Generator().manual_seed(1)
    inputs = torch.rand((24, 2, 16), generator=generator)
    targets = torch.rand((24, 3), generator=generator).softmax(1)
    return (inputs[:16], targets[:16]), (inputs[16:], targets[16:])


def images():
    return torch.rand(8, 3, 4, 4), torch.zeros(8, 3)


def volume_model():
    return nn.Sequential(nn.Conv3d(1, 4, 3), nn.Sigmoid(), nn.Flatten(), nn.Linear(4 * 64, 3))


def volumes():
    return torch.rand(8, 1, 6, 6, 6), torch.arange(8) % 3


def row_model():
    return nn.Sequential(nn.Linear(7, 9), nn.Tanh(), nn.Linear(9, 4))


def rows():
    return torch.randn(8, 7), torch.rand(8, 4).round()


def mask_model():
    return nn.Sequential(nn.Conv2d(1, 5, 3, padding=1), nn.Sigmoid(), nn.Conv2d(5, 3, 1))


def masks():
    return torch.rand(8, 1, 8, 8), torch.randint(3, (8, 8, 8))


def words():
    return ["a", "b"]
'''


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with the module, in which the user stands."""
    (tmp_path / "own_site.py").write_text(MODULE, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield tmp_path
    sys.modules.pop("own_site", None)


def trained(loss: str, data: str, *more: str) -> None:
    train(["--model", "own_site:build", "--loss", loss, "--data", f"own_site:{data}", "--epochs",
           "2", "-b", "8", "--lr", "0.05", "--result-root", "trained", "--no-tensorboard",
           *more])  # fmt: skip


def extracted(loss: str, data: str, *more: str) -> Path:
    extract(["--model", "own_site:build", "--loss", loss, "--data", f"own_site:{data}", "-b", "1",
             "--results", "shared", "--double", *more])  # fmt: skip
    (found,) = Path("shared").glob("*-checkpoint.pth.tar")
    return found


@pytest.mark.parametrize("loss", ["mse", "own_site:distance"])
def test_a_regression_goes_through_all_three_stages(site: Path, loss: str) -> None:
    trained(loss, "signals")
    record = json.loads((site / "trained" / "record.json").read_text())
    assert record["model"] == {"arch": "Sequential", "builder": "own_site:build"}
    assert record["final_val_acc1"] is None
    losses = [epoch["val_loss"] for epoch in record["history"]]
    assert losses[-1] < losses[0]
    checkpoint = extracted(loss, "signals", "--pretrained", "trained/model_best.pth.tar")
    own = ["--loss", loss] if ":" in loss else []
    attack(["--checkpoint", str(checkpoint), "--model", "own_site:build", *own, "--attack",
            "spectral", "--epochs", "150", "--pseudo-label-init", "known", "--metric", "--quiet",
            "--double", "--root", "found"])  # fmt: skip
    file = site / "found" / "test" / "record.json"
    found = json.loads(file.read_text())
    assert found["evaluation"]["per_image"][0]["psnr"] > 30
    # Trained further from the parameters that were trained, not from new ones.
    target, _ = gib.load_target(
        checkpoint, build=named_object("own_site:build", "x"),  # type: ignore[arg-type]
        loss=None if loss == "mse" else named_object(loss, "x"),  # type: ignore[arg-type]
    )  # fmt: skip
    best = torch.load(site / "trained" / "model_best.pth.tar", weights_only=False)["state_dict"]
    assert torch.equal(target.state_dict["3.weight"].float(), best["3.weight"])


def file_of(state: dict[str, torch.Tensor], name: str = "given.pth") -> list[str]:
    torch.save(state, name)
    return ["--pretrained", name]


def pretrained_state() -> dict[str, torch.Tensor]:
    torch.manual_seed(9)
    state: dict[str, torch.Tensor] = named_object("own_site:build", "x")().state_dict()  # type: ignore[operator]
    return state


@pytest.mark.parametrize("case", ["no head", "other classes", "another head", "inside"])
def test_a_backbones_file_leaves_the_head_as_it_is_built(
    site: Path, case: str, caplog: pytest.LogCaptureFixture
) -> None:
    state = pretrained_state()
    backbone = {name: value for name, value in state.items() if name.startswith("0.")}
    files = {
        "no head": backbone,
        "other classes": state | {"3.weight": torch.ones(7, 96), "3.bias": torch.ones(7)},
        "another head": backbone | {"fc.weight": torch.ones(7, 96), "fc.bias": torch.ones(7)},
        # The convolution's own file, of which the model is one part.
        "inside": {name.removeprefix("0."): value for name, value in backbone.items()},
    }
    with caplog.at_level(logging.WARNING):
        checkpoint = extracted("mse", "signals", *file_of(files[case]))
    assert "2 tensors of the head are initialised anew (3.weight, 3.bias)" in caplog.text
    assert ("not the model's and left out" in caplog.text) == (case == "another head")
    build = named_object("own_site:build", "x")
    target, _ = gib.load_target(checkpoint, build=build)  # type: ignore[arg-type]
    assert torch.equal(target.state_dict["0.weight"].float(), state["0.weight"])


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"0.weight": None, "0.bias": None}, "does not fit Sequential: 2 names are missing: 0.w"),
        ({"0.weight": torch.ones(6, 2, 5)}, r"0.weight has shape \(6, 2, 5\)"),
        ({"3.weight": torch.ones(3, 48)}, r"3.weight has shape \(3, 48\)"),
    ],
)
def test_a_file_of_another_backbone_is_refused(
    site: Path, change: dict[str, torch.Tensor | None], sentence: str
) -> None:
    state = {n: v for n, v in (pretrained_state() | change).items() if v is not None}
    with pytest.raises(InputError, match=f"--pretrained given.pth: .*{sentence}"):
        extracted("mse", "signals", *file_of(state))


def test_its_parameters_ask_for_the_module_they_belong_to(site: Path) -> None:
    trained("mse", "signals", "--epochs", "1")
    with pytest.raises(InputError, match="give --model own_site:build"):
        extract(["--data", "photo-patches", "--pretrained", "trained/model_best.pth.tar"])


def test_several_findings_have_an_accuracy(site: Path) -> None:
    trained("binary-cross-entropy", "findings")
    record = json.loads((site / "trained" / "record.json").read_text())
    assert 0 <= record["final_val_acc1"] <= 100


def test_soft_labels_count_as_their_largest_class(site: Path) -> None:
    trained("cross-entropy", "soft")
    record = json.loads((site / "trained" / "record.json").read_text())
    assert 0 <= record["final_val_acc1"] <= record["history"][-1]["val_acc5"] == 100


def test_an_interrupted_training_goes_on(site: Path) -> None:
    trained("mse", "signals", "--epochs", "1")
    trained("mse", "signals", "--resume", "auto")
    record = json.loads((site / "trained" / "record.json").read_text())
    assert record["epochs_done"] == 2


KINDS = {
    "volumes": ("volume_model", "cross-entropy", "volumes", []),
    "rows": ("row_model", "binary-cross-entropy", "rows", []),
    "masks": ("mask_model", "pixel-cross-entropy", "masks", ["--joint-labels"]),
    "overlap": ("mask_model", "dice", "masks", ["--joint-labels"]),
    "known": ("build", "own_site:distance", "signals", ["--pseudo-label-init", "known"]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_samples_of_every_shape_go_through_stages_two_and_three(site: Path, kind: str) -> None:
    model, loss, data, more = KINDS[kind]
    checkpoint = extracted(loss, data, "--model", f"own_site:{model}")
    assert list(Path("shared").glob("*-true.png"))
    own = ["--loss", loss] if ":" in loss else []
    attack(["--checkpoint", str(checkpoint), "--model", f"own_site:{model}", *own, "--root",
            "out", "--attack", "spectral", "--epochs", "5", "--metric", "--quiet",
            *more])  # fmt: skip
    (file,) = (site / "out").rglob("*record*.json")
    assert json.loads(file.read_text())["evaluation"]["summary"]["mse"]["mean"] >= 0


REFUSED = {
    "no such module": (["--model", "own_sight:build"], "own_sight cannot be imported"),
    "no such name": (["--model", "own_site:buld"], "has no buld; did you mean build"),
    "not a name": (["--model", "own_site.py"], "give a module and a name in it"),
    "no module": (["--model", "own_site:no_model"], "gives a int, not an nn.Module"),
    "no scalar": (["--loss", "own_site:not_a_scalar"], "must give a scalar tensor"),
    "no such loss": (["--loss", "crossentropy"], "crossentropy"),
    "other shape": (["--data", "own_site:images"], "does not take images of shape 3 x 4 x 4"),
    "no samples": (["--data", "own_site:words"], "item 0 is no pair"),
    "no function": (["--data", "own_site:torch"], "is a module, not a function"),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("stage", ["train", "extract"])
def test_what_does_not_fit_is_one_sentence(site: Path, stage: str, case: str) -> None:
    flags, message = REFUSED[case]
    run = train if stage == "train" else extract
    where = ["--result-root", "out"] if stage == "train" else ["--results", "out"]
    with pytest.raises(InputError, match=message):
        run(["--model", "own_site:build", "--loss", "mse", "--data", "own_site:signals", "-b", "4",
             *where, *flags])  # fmt: skip
    assert {path.name for path in (site / "out").glob("*")} <= {LOCK_NAME}


def test_own_samples_need_an_own_model(site: Path) -> None:
    with pytest.raises(InputError, match="your own samples need your own --model"):
        extract(["--data", "own_site:signals", "--results", "out"])
    with pytest.raises(InputError, match="your own samples need your own --model"):
        train(["--data", "own_site:signals", "--result-root", "out"])


def test_a_checkpoint_of_an_own_module_names_the_flag(site: Path) -> None:
    checkpoint = extracted("mse", "signals")
    with pytest.raises(InputError, match="--model module:function"):
        attack(["--checkpoint", str(checkpoint), "--root", "found"])


def test_names_of_objects() -> None:
    assert is_object_name("a.b:c")
    assert not any(map(is_object_name, ["photo-patches", "/data:x", "a.py", "C:\\data", "a:b:c"]))
