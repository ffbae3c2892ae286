"""The package that a user imports: share, invert, evaluate, and what they refuse."""

from __future__ import annotations

import base64
import copy
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import gradinvbench as gib
from core.models.building import build_model
from gradients.inspect import format_report
from gradinvbench import command
from gradinvbench._shadowing import HOME

ROOT = Path(__file__).resolve().parents[2]


def two_layers(channels: int = 1, height: int = 12, width: int = 12) -> nn.Module:
    """A smooth classifier, whose gradient determines its input."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(channels, 6, 3, padding=1),
        nn.Sigmoid(),
        nn.Flatten(),
        nn.Linear(6 * height * width, 5),
    )


def own_module() -> nn.Module:
    """What a reader of a file passes to rebuild the model."""
    return two_layers()


def pictures(n: int, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    coarse = torch.rand((n, shape[0], 3, 3), generator=generator)
    return nn.functional.interpolate(coarse, shape[1:], mode="bicubic").clamp(0, 1)


def found_and_true(model: nn.Module, *shape: int, **options: Any) -> tuple[Any, gib.Truth]:
    target, truth = gib.share(model, pictures(2, *shape), torch.tensor([3, 1]), **options)
    return gib.invert(target, iterations=200, progress=False), truth


def test_three_lines_recover_one_channel() -> None:
    found, truth = found_and_true(two_layers(), 1, 12, 12)
    evaluation = gib.evaluate(found, truth)
    assert found.labels.tolist() == [1, 3]
    assert evaluation.to_frame()["psnr"].min() > 30


def test_two_channels_that_are_not_square_and_are_normalised() -> None:
    found, truth = found_and_true(two_layers(2, 8, 14), 2, 8, 14, mean=(0.5, 0.4), std=0.25)
    assert found.images.shape == (2, 2, 8, 14)
    assert gib.evaluate(found, truth).to_frame()["psnr"].min() > 30


def test_several_local_steps() -> None:
    local = gib.LocalTraining(epochs=3, lr=0.05)
    found, truth = found_and_true(two_layers(), 1, 12, 12, local=local)
    assert gib.evaluate(found, truth).to_frame()["psnr"].min() > 30


def test_what_is_shared_is_the_gradient_of_the_loss() -> None:
    model, images, labels = two_layers().double(), pictures(3, 1, 12, 12), torch.tensor([0, 4, 2])
    target, truth = gib.share(model, images, labels, mean=0.3, std=0.7)
    inputs = (images.double() - 0.3) / 0.7
    loss = nn.functional.cross_entropy(model(inputs), labels)
    exact = torch.autograd.grad(loss, list(model.parameters()))
    assert list(target.gradient) == [name for name, _ in model.named_parameters()]
    for shared, gradient in zip(target.gradient.values(), exact, strict=True):
        torch.testing.assert_close(shared, gradient)
    assert torch.equal(truth.images, images)
    assert truth.labels.tolist() == [0, 4, 2]


def test_a_start_near_the_truth_is_taken() -> None:
    target, truth = share()
    found = gib.invert(target, prior=truth.images[0], iterations=1, lr=1e-6, progress=False)
    torch.testing.assert_close(found.images[0], truth.images[0], atol=1e-3, rtol=0)


def test_a_defense_by_name_or_as_an_object() -> None:
    from gradients.defenses import Clip, Gaussian

    arguments = (two_layers(), pictures(2, 1, 12, 12), [0, 1])
    forms: list[Any] = ["clip:0.1,gaussian:0.01", ["clip:0.1", "gaussian:0.01"]]
    forms.append([Clip(0.1), Gaussian(0.01)])
    shared = [gib.share(*arguments, defense=form)[0] for form in forms]
    assert all(target.defenses == ("clip:0.1", "gaussian:0.01") for target in shared)
    for target in shared[1:]:
        for name, gradient in target.gradient.items():
            assert torch.equal(gradient, shared[0].gradient[name])


def test_the_model_is_left_as_it_was() -> None:
    model = nn.Sequential(nn.BatchNorm2d(1), two_layers(1, 6, 6)).train()
    model[1][0].weight.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    target, _ = gib.share(model, pictures(4, 1, 6, 6), [0, 1, 2, 3], defense="freeze:1")
    assert list(target.gradient) == ["1.3.weight", "1.3.bias"]
    gib.invert(target, iterations=3, progress=False)
    assert model.training
    assert all(module.training for module in model.modules())
    frozen = [not parameter.requires_grad for parameter in model.parameters()]
    assert frozen == [False, False, True, False, False, False]
    assert all(parameter.grad is None for parameter in model.parameters())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_the_mode_is_the_models_own_unless_given() -> None:
    model = two_layers(1, 6, 6)
    arguments = (pictures(1, 1, 6, 6), [0])
    assert gib.share(model.train(), *arguments)[0].train_mode
    assert not gib.share(model.eval(), *arguments)[0].train_mode
    assert gib.share(model, *arguments, train_mode=True)[0].train_mode


def test_a_model_by_name_is_the_same_for_the_same_seed() -> None:
    spec = gib.ModelSpec("lenet", 10, 8, width=8)
    arguments = (spec, pictures(1, 3, 8, 8), [2])
    state = torch.random.get_rng_state()
    targets = [gib.share(*arguments, seed=seed)[0] for seed in (0, 0, 1)]
    assert torch.equal(state, torch.random.get_rng_state())
    weights = [next(iter(target.state_dict.values())) for target in targets]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert list(targets[0].state_dict) == list(build_model(spec).state_dict())


def test_a_file_without_truth_gives_the_identical_result(tmp_path: Path) -> None:
    target, truth = gib.share(two_layers(), pictures(2, 1, 12, 12), [3, 1])
    gib.save_target(tmp_path / "with.tar", target, truth, builder="my.models:build")
    gib.save_target(tmp_path / "without.tar", target, builder="my.models:build")
    read = [gib.load_target(tmp_path / f"{n}.tar", build=own_module) for n in ("with", "without")]
    assert read[0][1] is not None
    assert torch.equal(read[0][1].images, truth.images)
    assert read[1][1] is None
    found = [gib.invert(t, iterations=5, progress=False) for t in (target, read[0][0], read[1][0])]
    assert all(torch.equal(one.images, found[0].images) for one in found)


def test_a_file_of_a_given_module_names_its_builder_and_runs_nothing(tmp_path: Path) -> None:
    target, _ = gib.share(two_layers(), pictures(1, 1, 12, 12), [3])
    path = tmp_path / "target.tar"
    for builder in ("", "models", "models:", "../models:build"):
        with pytest.raises(gib.InputError, match="builder='module:function'"):
            gib.save_target(path, target, builder=builder)
    gib.save_target(path, target, builder="not.installed:build")
    with pytest.raises(gib.InputError, match=r"built by not\.installed:build.*build=function"):
        gib.load_target(path)
    with pytest.raises(gib.InputError, match=r"the parameter 0\.weight has shape"):
        gib.load_target(path, build=lambda: two_layers(2))
    read, _ = gib.load_target(path, build=own_module)
    assert "Sequential (5 classes, a module of the user's own)" in format_report(read, None)
    # A file that was read can be written again without saying it all over.
    gib.save_target(path, read)


WRONG: list[tuple[Callable[[], Any], str]] = [
    (lambda: share(labels=[0, 5]), r"labels must lie in 0\.\.4.* and one is 5"),
    (lambda: share(labels=[-1, 0]), r"labels must lie in 0\.\.4.* and one is -1"),
    (lambda: share(labels=[0]), "one class index for each of the 2 images"),
    (lambda: share(labels=[0.0, 1.0]), "one class index"),
    (lambda: share(images=pictures(2, 1, 9, 12)), "1 x 9 x 12: .*mat1 and mat2 shapes cannot be"),
    (lambda: share(images=pictures(2, 3, 12, 12)), "3 x 12 x 12: Given groups=1, weight of size"),
    (lambda: share(images=pictures(2, 1, 12, 12)[0]), "N x C x H x W"),
    (lambda: share(images=(255 * pictures(2, 1, 12, 12)).byte()), "floating-point.*uint8"),
    (lambda: share(images=4 * pictures(2, 1, 12, 12) - 1), r"must lie in \[0, 1\].* mean="),
    (lambda: share(images=pictures(2, 1, 12, 12) * float("nan")), r"must lie in \[0, 1\]"),
    (lambda: share(mean=(0.1, 0.2)), "mean must be a number, or one for each of the 1 channels"),
    (lambda: share(std=0.0), "std must be positive"),
    (lambda: share(class_names=["a"]), "1 class_names for 5 classes"),
    (lambda: share(defense="clp:1"), r"defense 'clp' is unknown; did you mean clip\?"),
    (lambda: share(defense="clip:x"), "clip:x"),
    (lambda: share(model=nn.Conv2d(1, 2, 3)), "one row of logits per image"),
    (lambda: share(model=nn.Flatten()), "Flatten has no parameters"),
    (lambda: invert(attack="spectrl"), r"attack 'spectrl' is unknown; did you mean spectral"),
    (lambda: invert(iteratons=3), r"setting 'iteratons' is unknown; did you mean iterations"),
    (lambda: invert(labels=[0]), "1 labels for a batch of 2 images"),
    (lambda: invert(labels=[0, 9]), r"labels must lie in 0\.\.4"),
    (lambda: invert(iterations=0), "must be at least 1"),
    (lambda: invert(prior=torch.rand(3, 4, 4)), "prior has shape"),
    (lambda: evaluate(metrics=["pnsr"]), r"metric 'pnsr' is unknown; did you mean psnr"),
    (lambda: evaluate(found=torch.rand(2, 3, 4, 4)), "cannot be compared"),
]


def share(**changes: Any) -> tuple[gib.Target, gib.Truth]:
    given: dict[str, Any] = {
        "model": two_layers(), "images": pictures(2, 1, 12, 12), "labels": [3, 1]
    }  # fmt: skip
    return gib.share(**(given | changes))


def invert(**changes: Any) -> gib.Reconstruction:
    return gib.invert(share()[0], progress=False, **changes)


def evaluate(**changes: Any) -> gib.Evaluation:
    truth = share()[1]
    return gib.evaluate(**({"found": truth.images, "truth": truth} | changes))


@pytest.mark.parametrize(("call", "message"), WRONG, ids=[message for _, message in WRONG])
def test_what_cannot_be_used_is_refused_in_one_sentence(
    call: Callable[[], Any], message: str
) -> None:
    with pytest.raises(gib.InputError) as caught:
        call()
    assert re.search(message, str(caught.value)), str(caught.value)
    assert "\n" not in str(caught.value)


def test_results_print_and_plot() -> None:
    target, truth = share()
    found = gib.invert(target, iterations=2, progress=False)
    assert repr(target).startswith("Target of 2 images (1 x 12 x 12)")
    assert repr(truth) == "Truth of 2 images (1 x 12 x 12), labels [3, 1]"
    assert repr(found).startswith("Reconstruction of 2 images (1 x 12 x 12), labels [1, 3]")
    titles = [axis.get_title() for axis in found.plot().axes]
    assert titles == ["1", "3"]
    picture = re.search('base64,([^"]*)', found._repr_html_())
    assert picture is not None
    assert base64.b64decode(picture[1])[1:4] == b"PNG"
    evaluation = gib.evaluate(found, truth)
    assert "PSNR (dB)" in str(evaluation)
    assert "<table>" in evaluation._repr_html_()
    frame = evaluation.to_frame()
    assert list(frame.index) == [0, 1]
    assert list(frame["label_true"]) == [3, 1]
    assert {"psnr", "ssim", "mse"} <= set(frame.columns)


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_images_of_any_number_of_channels_are_measured_and_drawn(channels: int) -> None:
    images = pictures(2, channels, 20, 34)
    truth = gib.Truth(images, torch.tensor([0, 1]))
    reconstruction = gib.Reconstruction(images.flip(0), torch.tensor([1, 0]), 0.0)
    evaluation = gib.evaluate(reconstruction, truth, metrics=list(gib.metrics()))
    assert evaluation.order.tolist() == [1, 0]
    row = evaluation.per_image[0]
    assert (row["psnr"], row["exact"]) == (100.0, True)
    assert row["ssim"] == pytest.approx(1)
    assert row["cw_ssim"] == pytest.approx(1)
    assert len(reconstruction.plot().axes) == 2


def test_everything_that_can_be_named_has_a_line() -> None:
    for catalogue in (gib.attacks(), gib.defenses(), gib.metrics()):
        assert all(line.strip() for line in catalogue.values())
        assert len(str(catalogue).splitlines()) == len(catalogue)
        assert catalogue._repr_html_().count("<tr>") == len(catalogue)
    assert {"spectral", "auto"} <= set(gib.attacks())
    assert {"clip", "gaussian"} <= set(gib.defenses())
    assert {"psnr", "ssim"} <= set(gib.metrics())


def test_labels_are_recovered_where_features_are_signed() -> None:
    # The sign rules take features for non-negative; after tanh they are not.
    right = 0
    for seed in range(8):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Flatten(), nn.Linear(36, 16), nn.Tanh(), nn.Linear(16, 5))
        target, _ = gib.share(model, pictures(1, 1, 6, 6), [seed % 5])
        right += gib.invert(target, iterations=1, progress=False).labels.tolist() == [seed % 5]
    assert right == 8


def test_every_public_name_is_there() -> None:
    assert sorted(gib.__all__) == gib.__all__
    for name in gib.__all__:
        assert getattr(gib, name) is not None
    assert set(gib.__all__) <= set(dir(gib))
    assert (HOME / "gradinvbench" / "py.typed").exists()
    with pytest.raises(AttributeError, match="nothing_of_the_kind"):
        gib.nothing_of_the_kind  # noqa: B018


def test_the_version_is_written_in_one_place() -> None:
    assert f"version: {gib.__version__}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert "version = attr: core.version.__version__" in (ROOT / "setup.cfg").read_text()


def run(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Python in another folder, which it searches before the repository."""
    code = f"import sys; sys.path.append({str(ROOT)!r}); "
    return subprocess.run(
        [sys.executable, "-c", code + " ".join(words)],
        cwd=folder,
        env={"PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("package", ["training", "core"])
def test_a_package_that_hides_ours_is_named(package: str, tmp_path: Path) -> None:
    (tmp_path / package).mkdir()
    (tmp_path / package / "__init__.py").touch()
    done = run(tmp_path, "import gradinvbench")
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(f"ImportError: gradinvbench's package {package} is hidden by")
    assert str(tmp_path / package) in last


def test_a_module_that_hides_ours_is_named(tmp_path: Path) -> None:
    (tmp_path / "attack.py").touch()
    done = run(tmp_path, "import gradinvbench")
    assert f"hidden by another one of that name, {tmp_path / 'attack.py'}" in done.stderr


def test_the_command_lists_the_commands_and_answers_without_torch(tmp_path: Path) -> None:
    done = run(
        tmp_path,
        "from gradinvbench.command import main; status = main(['--help']);",
        "sys.exit(9 if 'torch' in sys.modules else status)",
    )
    assert done.returncode == 0, done.stderr
    assert all(name in done.stdout for name in command.COMMANDS)


def test_an_unknown_command_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["atack"]) == 2
    assert capsys.readouterr().err.startswith("error: there is no command atack; choose one of")
    assert command.main([]) == 2
    assert command.main(["--version"]) == 0
    assert capsys.readouterr().out.strip().endswith(gib.__version__)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["train", "--help"], "main_pytorch.py"),
        (["extract", "--help"], "get_gradients.py"),
        (["attack", "--help"], "main_run.py"),
        (["table", "--help"], "python -m benchmarks"),
        (["leaderboard", "--help"], "leaderboard"),
    ],
)
def test_a_command_gets_its_arguments(
    words: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        command.main(words)
    assert ended.value.code == 0
    assert expected in capsys.readouterr().out


def test_a_wrong_argument_ends_with_two(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["attack", "--checkpoint", "no-such-file.tar"]) == 2
    assert "no-such-file.tar" in capsys.readouterr().err


def test_tables_need_a_checkout(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "CHECKOUT", tmp_path)
    assert command.main(["table", "schemes"]) == 2
    assert "from a checkout" in capsys.readouterr().err


@pytest.mark.parametrize("table", ["text", "tabular"])
def test_a_table_prints_what_is_committed(
    table: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the committed results of all cells at hand nothing is left to compute."""
    committed = ROOT / "results" / "reference" / table
    words = ["table", table, "--from", str(committed / f"{table}.json"), "--quiet"]
    words += ["--store", str(tmp_path / "store"), "--output", str(tmp_path / "out")]
    assert command.main(words) == 0
    shown = capsys.readouterr().out
    assert (committed / f"{table}.txt").read_text().strip() in shown
    assert "results" in (tmp_path / "out" / "report.html").read_text()
