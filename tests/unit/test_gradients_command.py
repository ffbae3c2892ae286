"""The stage 2 command: every setting means what it says, alone and together."""

from __future__ import annotations

import argparse
import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from core.data.specs import DataSpec
from core.errors import InputError
from core.models.building import ModelSpec, build_model
from core.target import LocalTraining, Target, Truth
from gradients.checkpoint import load_target
from gradients.command import build_parser, main
from gradients.command import run as run_command
from gradients.defenses import defense_names, parse_defenses
from gradients.extract import needs_our_stem
from gradients.inspect import main as inspect

CLASSES, PER_CLASS, SIDE = 8, 6, 16
SMALL = ["--arch", "cnn", "--width", "4"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of noise with a training and a validation part."""
    root = tmp_path_factory.mktemp("data")
    generator = torch.Generator().manual_seed(0)
    for part, count in (("train", PER_CLASS), ("val", 1)):
        for label in range(CLASSES):
            folder = root / part / f"class{label}"
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = torch.randint(0, 256, (SIDE, SIDE, 3), generator=generator)
                Image.fromarray(pixels.byte().numpy()).save(folder / f"{index}.png")
    return root


class Shared:
    """What one run of the command wrote."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (self.path,) = folder.glob("*-checkpoint.pth.tar")
        (record,) = folder.glob("*.json")
        self.record: dict[str, Any] = json.loads(record.read_text())
        target, truth = load_target(self.path)
        assert truth is not None
        self.target: Target = target
        self.truth: Truth = truth

    @property
    def gradient(self) -> torch.Tensor:
        return torch.cat([g.flatten() for g in self.target.gradient.values()])


class Run:
    """Runs the command in a fresh folder each time."""

    def __init__(self, data: Path, root: Path) -> None:
        self.data, self.root, self.count = data, root, 0

    def __call__(self, *flags: str, model: list[str] = SMALL, batch: int = 4) -> Shared:
        self.count += 1
        folder = self.root / str(self.count)
        argv = ["--data", str(self.data), "--results", str(folder), "-b", str(batch), "--cpu"]
        assert main([*argv, *model, *flags]) == 0
        return Shared(folder)


@pytest.fixture
def run(data: Path, tmp_path: Path) -> Run:
    return Run(data, tmp_path)


def _recomputed(shared: Shared) -> torch.Tensor:
    """The gradient of the stored model for the stored images, by plain autograd."""
    model = shared.target.build_model()
    inputs = shared.target.data.normalize(shared.truth.images)
    loss = F.cross_entropy(model(inputs), shared.truth.labels)
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])


def test_everything_is_written_and_belongs_together(run: Run, data: Path) -> None:
    shared = run("--id", "mine", "--target-idx", "2")
    stem = f"idmine_cnn_init_{data.name}_b4_i2"
    written = sorted(path.name for path in shared.folder.iterdir())
    assert written == sorted(
        [f"{stem}-checkpoint.pth.tar", f"{stem}-true.png", f"{stem}.json", "model.pth"]
    )
    model = torch.load(shared.folder / "model.pth", weights_only=True)
    assert all(torch.equal(v, shared.target.state_dict[k]) for k, v in model.items())
    torch.testing.assert_close(shared.gradient, _recomputed(shared), rtol=1e-5, atol=1e-6)
    record = shared.record
    assert record["checkpoint"] == str(shared.path)
    assert record["labels"] == shared.truth.labels.tolist()
    assert record["gradient_norm"] == pytest.approx(float(shared.gradient.norm()), rel=1e-5)
    assert record["defenses"] == []
    assert record["privacy"] is None
    assert record["rank_analysis"] is None
    assert 0 < record["seconds_of_update"] <= record["seconds"]
    assert record["peak_memory_mib"] > 10
    assert record["provenance"]["seed"] == 0
    with Image.open(shared.folder / f"{stem}-true.png") as picture:
        assert picture.size == (4 * (SIDE + 2) + 2, SIDE + 4)


def test_true_images_are_those_of_the_data(run: Run, data: Path) -> None:
    shared = run()
    files = sorted((data / "train").glob("*/*.png"))
    for image, label in zip(shared.truth.images, shared.truth.labels, strict=True):
        pixels = (image * 255).round().byte().permute(1, 2, 0).numpy().tobytes()
        (found,) = [f for f in files if Image.open(f).tobytes() == pixels]
        assert found.parent.name == f"class{int(label)}"


@pytest.mark.parametrize(
    "flags",
    [
        (),
        ("--enable-dp", "--sigma", "1"),
        ("--defense", "gaussian:0.1,quantize:4,laplace:0.1"),
        ("--epochs", "2", "--duplicates", "2"),
        ("--local-epochs", "2", "--local-batches", "2"),
    ],
)
def test_the_same_command_gives_the_same_tensors_to_the_bit(run: Run, flags: tuple[str]) -> None:
    first, second = run(*flags), run(*flags)
    assert torch.equal(first.gradient, second.gradient)
    assert torch.equal(first.truth.images, second.truth.images)
    state = second.target.state_dict
    assert all(torch.equal(v, state[k]) for k, v in first.target.state_dict.items())
    assert not torch.equal(first.gradient, run(*flags, "--seed", "1").gradient)


def test_batches_of_one_seed_cover_the_data_without_overlap(run: Run) -> None:
    batches = [run("--target-idx", str(i), batch=16).record["indices"] for i in range(3)]
    assert sorted(i for batch in batches for i in batch) == list(range(CLASSES * PER_CLASS))


def test_number_of_workers_does_not_change_the_batch(run: Run) -> None:
    one, many = run("-j", "0"), run("-j", "3")
    assert torch.equal(one.truth.images, many.truth.images)
    assert torch.equal(one.truth.labels, many.truth.labels)


def test_double_precision(run: Run) -> None:
    single, double = run(), run("--double")
    assert double.gradient.dtype == torch.float64
    assert double.truth.images.shape == single.truth.images.shape
    torch.testing.assert_close(double.gradient.float(), single.gradient, rtol=1e-3, atol=1e-5)
    # The model is the same one: its values were drawn in single precision.
    state = double.target.build_model().state_dict()
    assert all(torch.equal(v, state[k]) for k, v in single.target.state_dict.items())


def test_batch_size(run: Run) -> None:
    shared = run(batch=7)
    assert shared.target.batch_size == len(shared.truth.images) == 7


def test_rank_analysis_and_its_defense(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    # Wide enough for the first layer to expand: the pooling layer then decides.
    model = ["--arch", "resnet18", "--width", "16", "--stem", "imagenet", "--image-size", "128"]
    plain = run("--ra", model=model, batch=1)
    assert f"{16 * (64**2 - 32**2) - 16384}" in capsys.readouterr().out
    defended = run("--ra", "--kernel-size-of-maxpool", "19", model=model, batch=1)
    assert defended.target.model.pool_kernel == 19
    by_name = {row["name"]: row for row in defended.record["rank_analysis"]["layers"]}
    assert by_name["maxpool"]["n_z"] < 16 * 32**2
    assert defended.record["rank_analysis"]["maximum"] == max(
        row["index"] for row in by_name.values()
    )
    assert defended.record["rank_analysis"]["maximum"] > plain.record["rank_analysis"]["maximum"]


def test_private_gradients_of_an_initial_model_use_group_norm(run: Run) -> None:
    shared = run("--enable-dp", "--sigma", "0.01")
    assert shared.target.model.norm == "group"
    assert shared.target.train_mode
    assert shared.target.defenses == ("dp-sgd:0.01:1",)
    assert shared.record["privacy"]["epsilon"] > 5000
    # Clipped to norm 1 per image; noise of 0.01 / 4 on every element.
    noise = 0.01 / 4 * len(shared.gradient) ** 0.5
    assert float(shared.gradient.norm()) < 1 + 2 * noise


def test_private_noise_is_sigma_norm_over_batch(run: Run) -> None:
    clean = run("--enable-dp", "--sigma", "0", "-c", "0.5")
    noisy = run("--enable-dp", "--sigma", "3", "--max-per-sample-grad_norm", "0.5")
    deviation = float((noisy.gradient - clean.gradient).std())
    assert deviation == pytest.approx(3 * 0.5 / 4, rel=0.05)
    assert clean.record["privacy"]["epsilon"] is None


@pytest.mark.parametrize("batch", [2, 4])
def test_the_published_noise_is_the_same_for_every_batch(
    batch: int, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    private = ("--enable-dp", "--dp-clipping", "batch", "-c", "0.5")
    clean = run(*private, "--sigma", "0", batch=batch)
    noisy = run(*private, "--sigma", "3", batch=batch)
    assert float((noisy.gradient - clean.gradient).std()) == pytest.approx(3 * 0.5, rel=0.05)
    said = capsys.readouterr().out
    assert f"sigma C / B = {1.5 / batch:.3g}, {batch} times less" in said


def test_the_papers_clipping_keeps_batch_norm_and_guarantees_nothing(run: Run) -> None:
    shared = run("--enable-dp", "--sigma", "0", "-c", "0.1", "--dp-clipping", "batch")
    assert shared.target.model.norm == "batch"
    assert shared.target.defenses == ("dp-batch:0:0.1",)
    assert shared.record["privacy"]["epsilon"] is None
    plain = _recomputed(shared)
    torch.testing.assert_close(shared.gradient, plain * 0.1 / plain.norm(), rtol=1e-4, atol=1e-7)


def test_local_iterations_are_those_of_a_real_client(run: Run) -> None:
    shared = run("--local-epochs", "3", "--lr", "0.05", "--local-momentum", "0.9")
    model = shared.target.build_model()
    start = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    inputs = shared.target.data.normalize(shared.truth.images)
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), shared.truth.labels).backward()
        optimizer.step()
    pairs = zip(start.parameters(), model.parameters(), strict=True)
    expected = torch.cat([(a - b).flatten() for a, b in pairs]).detach() / (0.05 * 3)
    torch.testing.assert_close(shared.gradient, expected, rtol=1e-3, atol=1e-4)
    assert shared.target.local.steps == 3


def test_published_epochs_are_one_step_per_part_of_the_batch(run: Run) -> None:
    shared = run("--epochs", "3", "--lr", "0.05", "--model-eval", batch=6)
    assert shared.target.local == LocalTraining(epochs=1, batches=3, lr=0.05)
    model = shared.target.build_model()
    start = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    inputs = shared.target.data.normalize(shared.truth.images)
    for images, labels in zip(inputs.chunk(3), shared.truth.labels.chunk(3), strict=True):
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
    pairs = zip(start.parameters(), model.parameters(), strict=True)
    expected = torch.cat([(a - b).flatten() for a, b in pairs]).detach() / (0.05 * 3)
    torch.testing.assert_close(shared.gradient, expected, rtol=1e-3, atol=1e-4)
    same = run("--local-batches", "3", "--lr", "0.05", "--model-eval", batch=6)
    assert torch.equal(shared.gradient, same.gradient)


def test_duplicate_labels_are_eight_classes_of_four_real_images(run: Run) -> None:
    shared = run("--duplicate-label", batch=32)
    assert shared.truth.labels.bincount().tolist() == [4] * 8
    assert len(set(shared.record["indices"])) == 32
    assert len(torch.unique(shared.truth.images.flatten(1), dim=0)) == 32
    torch.testing.assert_close(shared.gradient, _recomputed(shared), rtol=1e-4, atol=1e-5)


def test_number_of_duplicates_can_be_chosen(run: Run) -> None:
    first = run("--duplicates", "3", batch=6)
    counts = first.truth.labels.bincount()
    assert sorted(counts[counts > 0].tolist()) == [3, 3]
    second = run("--duplicates", "3", "--target-idx", "1", batch=6)
    assert first.record["indices"] != second.record["indices"]


def test_asynchronous_shards_in_one_process(run: Run) -> None:
    asynchronous = run("--shards", "3,1")
    assert asynchronous.target.shards == (3, 1)
    assert not asynchronous.target.synchronized
    assert len(asynchronous.target.bn_statistics or ()) == 2
    synchronized = run("--shards", "3,1", "--syncbn")
    assert synchronized.target.synchronized
    torch.testing.assert_close(synchronized.gradient, run().gradient)
    assert not torch.allclose(synchronized.gradient, asynchronous.gradient, rtol=1e-2)


def test_dropout_is_active_seeded_and_recorded(run: Run) -> None:
    model = ["--arch", "mobilenet_v2", "--image-size", "32"]
    first, other = run(model=model), run("--dropout-seed", "5", model=model)
    assert (first.target.dropout_seed, other.target.dropout_seed) == (0, 5)
    assert not torch.equal(first.gradient, other.gradient)
    quiet = run("--model-eval", model=model)
    assert quiet.target.dropout_seed is None
    assert torch.equal(
        quiet.gradient, run("--model-eval", "--dropout-seed", "5", model=model).gradient
    )
    torch.testing.assert_close(quiet.gradient, _recomputed(quiet), rtol=1e-4, atol=1e-5)


def test_evaluation_mode_uses_running_statistics(run: Run) -> None:
    shared = run("--model-eval")
    assert not shared.target.train_mode
    assert shared.target.bn_statistics is None
    torch.testing.assert_close(shared.gradient, _recomputed(shared), rtol=1e-5, atol=1e-6)


def test_defenses_are_applied_and_told(run: Run) -> None:
    shared = run("--defense", "clip:0.5,prune:0.9,freeze:2")
    assert shared.target.defenses == ("clip:0.5", "prune:0.9", "freeze:2")
    assert list(shared.target.gradient) == ["bn4.weight", "bn4.bias", "fc.weight", "fc.bias"]
    weight = shared.target.gradient["fc.weight"]
    assert int((weight != 0).sum()) == weight.numel() - int(0.9 * weight.numel())
    assert float(shared.gradient.norm()) <= 0.5


PLUGIN = """
from dataclasses import dataclass
from gradients.defenses import Defense, register_defense

@register_defense("times")
@dataclass(frozen=True)
class Times(Defense):
    factor: float = 2.0

    def apply(self, gradient, client):
        return {name: self.factor * g for name, g in gradient.items()}
"""


def test_a_defense_from_outside_the_package(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_defense.py").write_text(PLUGIN)
    monkeypatch.syspath_prepend(str(tmp_path))
    shared = run("--plugin", "my_defense", "--defense", "times:3")
    assert shared.target.defenses == ("times:3",)
    torch.testing.assert_close(shared.gradient, 3 * run().gradient)


def test_all_settings_together(run: Run) -> None:
    shared = run(
        *("--ra", "--kernel-size-of-maxpool", "5", "--enable-dp", "--sigma", "0.1", "--syncbn"),
        *("--local-epochs", "2", "--local-batches", "2", "--local-weight-decay", "0.01"),
        *("--duplicates", "2", "--defense", "topk:0.5,gaussian:0.001", "--target-idx", "3"),
        model=["--arch", "resnet18", "--width", "4", "--stem", "imagenet", "--image-size", "64"],
        batch=8,
    )
    target = shared.target
    assert target.model == ModelSpec("resnet18", 8, 64, "imagenet", 4, 5, "group")
    assert target.local.steps == 4
    assert target.defenses == ("dp-sgd:0.1:1", "topk:0.5", "gaussian:0.001")
    assert shared.record["rank_analysis"]["maximum"] is not None
    counts = shared.truth.labels.bincount()
    assert sorted(counts[counts > 0].tolist()) == [2] * 4
    assert torch.isfinite(shared.gradient).all()
    assert Path(shared.record["checkpoint"]).is_file()


def _stage_one(path: Path, **changes: Any) -> ModelSpec:
    """A checkpoint as stage 1 writes it."""
    spec = ModelSpec("cnn", n_classes=CLASSES, image_size=12, width=3, **changes)
    torch.manual_seed(9)
    model = build_model(spec)
    data = DataSpec("trained", (3, 12, 12), (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), CLASSES)
    state = {f"module.{name}": value for name, value in model.state_dict().items()}
    torch.save(
        {"arch": "cnn", "state_dict": state, "model": spec.to_dict(), "data": data.to_dict()}, path
    )
    return spec


def test_a_training_checkpoint_brings_its_architecture(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "epoch.pth.tar"
    spec = _stage_one(path)
    shared = run("--pretrained", str(path), model=[])
    assert shared.target.model == spec
    assert shared.target.data.mean == (0.1, 0.2, 0.3)
    assert shared.truth.images.shape[-1] == 12
    assert "_cnn_epoch.pth.tar_" in shared.path.name
    raw = torch.load(path)["state_dict"]
    assert torch.equal(shared.target.state_dict["conv1.weight"], raw["module.conv1.weight"])
    torch.testing.assert_close(shared.gradient, _recomputed(shared), rtol=1e-5, atol=1e-6)


def test_private_gradients_of_given_batch_norm_run_in_eval_mode(run: Run, tmp_path: Path) -> None:
    _stage_one(tmp_path / "a.tar")
    shared = run("--pretrained", str(tmp_path / "a.tar"), "--enable-dp", model=[])
    assert shared.target.model.norm == "batch"
    assert not shared.target.train_mode
    _stage_one(tmp_path / "b.tar", norm="group")
    shared = run("--pretrained", str(tmp_path / "b.tar"), "--enable-dp", model=[])
    assert shared.target.model.norm == "group"
    assert shared.target.train_mode


def test_plain_parameters_load_with_and_without_prefix(run: Run, tmp_path: Path) -> None:
    torch.manual_seed(4)
    state = build_model(ModelSpec("cnn", CLASSES, SIDE, width=4)).state_dict()
    torch.save(state, tmp_path / "plain.pth")
    torch.save({f"module.{k}": v for k, v in state.items()}, tmp_path / "prefixed.pth")
    plain = run("--pretrained", str(tmp_path / "plain.pth"))
    prefixed = run("--pretrained", str(tmp_path / "prefixed.pth"))
    assert torch.equal(plain.target.state_dict["conv1.weight"], state["conv1.weight"])
    assert torch.equal(plain.gradient, prefixed.gradient)


def test_another_number_of_classes_gets_a_new_classifier(run: Run, tmp_path: Path) -> None:
    state = build_model(ModelSpec("cnn", 3, SIDE, width=4)).state_dict()
    torch.save(state, tmp_path / "plain.pth")
    shared = run("--pretrained", str(tmp_path / "plain.pth"))
    assert torch.equal(shared.target.state_dict["conv1.weight"], state["conv1.weight"])
    assert len(shared.target.state_dict["fc.weight"]) == CLASSES


def test_moco_checkpoints_give_the_encoder(run: Run, tmp_path: Path) -> None:
    spec = ModelSpec("resnet18", CLASSES, 16, "cifar", 4)
    torch.manual_seed(4)
    state = build_model(spec).state_dict()
    head = {"fc.0.weight": torch.zeros(4, 32), "fc.2.weight": torch.zeros(2, 4)}
    moco = {k: v for k, v in state.items() if not k.startswith("fc.")} | head
    queue = {"module.queue": torch.zeros(2, 2)}
    raw = {f"module.encoder_q.{k}": v for k, v in moco.items()} | queue
    torch.save({"state_dict": raw, "arch": "resnet18"}, tmp_path / "moco.pth.tar")
    model = ["--arch", "resnet18", "--width", "4"]
    shared = run("--pretrained", str(tmp_path / "moco.pth.tar"), model=model)
    assert torch.equal(shared.target.state_dict["conv1.weight"], state["conv1.weight"])
    assert shared.target.state_dict["fc.weight"].shape == (CLASSES, 32)


def test_state_of_the_classification_layer(run: Run) -> None:
    normal = run("--outlayer-state", "normal").target.state_dict
    assert float(normal["fc.weight"].std()) == pytest.approx(0.01, rel=0.1)
    assert float(normal["fc.bias"].abs().max()) == 0
    uniform = run("--outlayer-state", "kaiming_uniform").target.state_dict
    bound = uniform["fc.weight"].shape[1] ** -0.5
    assert float(uniform["fc.weight"].abs().max()) == pytest.approx(bound, rel=0.02)
    untouched = run().target.state_dict
    assert torch.equal(untouched["conv1.weight"], normal["conv1.weight"])


BAD = {
    "no data": ([], "--data: give a folder"),
    "data missing": (["--data", "nowhere"], "--data: there is no folder nowhere"),
    "architecture": (["--data", "{data}", "-a", "nonet"], "--arch nonet: unknown architecture"),
    "nccl": (["--data", "{data}", "--dist-backend", "nccl"], "--dist-backend gloo"),
    "batch of none": (["--data", "{data}", "-b", "0"], "--batch-size must be at least 1"),
    "folder in the name": (["--data", "{data}", "--id", "../x"], "--id ../x: becomes part of"),
    "workers": (["--data", "{data}", "-j", "-1"], "--workers must not be negative"),
    "no iterations": (["--data", "{data}", "--epochs", "0"], "--epochs must be at least 1"),
    "no passes": (["--data", "{data}", "--local-epochs", "0"], "--local-epochs must be at least 1"),
    "two numbers of batches": (
        ["--data", "{data}", "--epochs", "2", "--local-batches", "3"],
        "--epochs 2 and --local-batches 3: both say",
    ),
    "learning rate": (["--data", "{data}", "--lr", "0"], "--lr must be positive"),
    "learning rate of NaN": (["--data", "{data}", "--lr", "nan"], "--lr must be positive"),
    "no duplicates": (["--data", "{data}", "--duplicates", "0"], "--duplicates must be at least 1"),
    "divergence": (
        ["--data", "{data}", "--lr", "1e30", "--epochs", "3", "-b", "4"],
        "local training diverges with --lr 1e+30",
    ),
    "parameters of NaN": (
        ["--data", "{data}", "-b", "4", "--pretrained", "{nan}"],
        "the parameters in {nan} are not finite",
    ),
    "results in a file": (["--data", "{data}", "-b", "4", "--results", "{broken}"], "File exists"),
    "batch too large": (["--data", "{data}", "-b", "64"], "-b 64: the data set has 48 images"),
    "no such batch": (
        ["--data", "{data}", "-b", "4", "--target-idx", "12"],
        "--target-idx 12: 48 images make 12 batches of 4",
    ),
    "negative batch": (["--data", "{data}", "-b", "4", "--target-idx", "-1"], "--target-idx -1"),
    "duplicates at another batch": (
        ["--data", "{data}", "-b", "16", "--duplicate-label"],
        "--duplicates",
    ),
    "too many duplicates": (
        ["--data", "{data}", "-b", "32", "--duplicates", "16"],
        "needs 2 classes with at least 16 images each and the data set has 0",
    ),
    "uneven duplicates": (["--data", "{data}", "-b", "7", "--duplicates", "2"], "not a multiple"),
    "negative batch of duplicates": (
        ["--data", "{data}", "-b", "4", "--duplicates", "2", "--target-idx", "-1"],
        "--target-idx -1 must not be negative",
    ),
    "shards of text": (["--data", "{data}", "--shards", "2,x"], "--shards 2,x"),
    "shards of another batch": (
        ["--data", "{data}", "-b", "4", "--shards", "2,1"],
        "--shards 2,1: must be positive and sum to the batch, 4",
    ),
    "more local batches than images": (
        ["--data", "{data}", "-b", "4", "--local-batches", "5"],
        "--local-batches",
    ),
    "sigma": (["--data", "{data}", "--enable-dp", "--sigma", "-1"], "--sigma"),
    "clipping of batch norm": (
        ["--data", "{data}", "--enable-dp", "--norm", "batch"],
        "--norm group, --model-eval or --dp-clipping batch",
    ),
    "plugin": (["--data", "{data}", "--plugin", "nowhere"], "--plugin nowhere: cannot be"),
    "defense": (["--data", "{data}", "--defense", "blur"], "--defense blur: unknown defense"),
    "defense of a layer": (
        ["--data", "{data}", "--defense", "freeze:nose"],
        "the model has no layer nose",
    ),
    "pretrained missing": (["--data", "{data}", "--pretrained", "x.tar"], "there is no file x.tar"),
    "pretrained broken": (["--data", "{data}", "--pretrained", "{broken}"], "--pretrained"),
    "pretrained of another model": (
        ["--data", "{data}", "--pretrained", "{other}"],
        "do not fit --arch cnn",
    ),
    "one value per channel": (
        ["--data", "{data}", "-b", "1", "-a", "resnet18", "--image-size", "8"],
        "single value per channel",
    ),
    "rank analysis of branches": (
        ["--data", "{data}", "-a", "squeezenet1_1", "--ra", "--image-size", "64"],
        "sequential and residual networks",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_told_in_one_sentence(
    name: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags, sentence = BAD[name]
    torch.save({"state_dict": {"w": torch.zeros(2)}}, tmp_path / "other.tar")
    (tmp_path / "broken.tar").write_bytes(b"x" * 100)
    known = {"data": data}
    known |= {stem: tmp_path / f"{stem}.tar" for stem in ("other", "broken", "nan")}
    broken_model = build_model(ModelSpec("cnn", CLASSES, SIDE, "cifar", 4))
    torch.nn.init.constant_(next(broken_model.parameters()), float("nan"))
    torch.save(broken_model.state_dict(), tmp_path / "nan.tar")
    argv = [flag.format(**known) for flag in flags]
    if "-a" not in argv:
        argv = [*SMALL, *argv]
    results = tmp_path / "results"
    assert main(["--results", str(results), *argv]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert sentence.format(**known) in error
    assert error.count("\n") == 1
    assert not results.exists()


def test_inspect_reports_and_strips(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shared = run("--defense", "gaussian:0.01", "--shards", "3,1")
    capsys.readouterr()
    out = tmp_path / "stripped.tar"
    assert inspect([str(shared.path), "--strip-truth", str(out)]) == 0
    report = capsys.readouterr().out
    for part in ("cnn", "gaussian:0.01", "shards 3+1, asynchronous", "fc.weight", "present: 4"):
        assert part in report
    assert "exact BatchNorm statistics" in report
    assert inspect([str(out)]) == 0
    assert "truth        absent" in capsys.readouterr().out
    target, truth = load_target(out)
    assert truth is None
    assert torch.equal(target.gradient["conv1.weight"], shared.target.gradient["conv1.weight"])


def test_inspect_refuses_other_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"state_dict": {}}, tmp_path / "a.tar")
    assert inspect([str(tmp_path / "a.tar")]) == 2
    assert "is not a gradient checkpoint" in capsys.readouterr().err


def test_help_names_every_defense() -> None:
    (flag,) = [a for a in build_parser()._actions if a.dest == "defense"]
    # Other tests register defenses of plugins.
    modules = {name: type(parse_defenses(name)[0]).__module__ for name in defense_names()}
    own = [name for name, module in modules.items() if module.startswith("gradients.defenses.")]
    assert [name for name in own if name not in str(flag.help)] == []


def test_published_flags_and_defaults() -> None:
    args = vars(build_parser().parse_args([]))
    published = {
        "id": "test",
        "seed": 0,
        "data": None,
        "data_name": None,
        "arch": "resnet18",
        "workers": 4,
        "epochs": 1,
        "batch_size": 32,
        "lr": 0.1,
        "target_idx": 0,
        "pretrained": None,
        "outlayer_state": "None",
        "model_eval": False,
        "syncbn": False,
        "ra": False,
        "kernel_size_of_maxpool": 3,
        "enable_dp": False,
        "sigma": 0.01,
        "max_per_sample_grad_norm": 1.0,
        "delta": 1e-5,
        "duplicate_label": False,
        "world_size": 1,
        "rank": 0,
        "multiprocessing_distributed": False,
    }
    assert {key: args[key] for key in published} == published


def test_torchvisions_stem_loads_where_the_small_one_does_not() -> None:
    import torchvision

    theirs = torchvision.models.resnet18(num_classes=CLASSES)
    for stem, fits in (("imagenet", True), ("cifar", False)):
        spec = ModelSpec("resnet18", CLASSES, 32, stem)
        assert needs_our_stem(spec) != fits
        state = build_model(spec).state_dict()
        if fits:
            theirs.load_state_dict(state)
        else:
            with pytest.raises(RuntimeError, match="conv1"):
                theirs.load_state_dict(state)
    assert not needs_our_stem(ModelSpec("cnn", CLASSES, 32, "cifar"))


def test_the_small_stem_is_said(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    run(model=["--arch", "resnet18", "--image-size", "16"])
    assert "--stem imagenet" in capsys.readouterr().out
    run(model=["--arch", "resnet18", "--image-size", "16", "--stem", "imagenet"])
    assert "--stem imagenet" not in capsys.readouterr().out


def test_published_command_lines_parse() -> None:
    lines = [
        "--gpu 0 --kernel-size-of-maxpool 19 --ra --data D --results R --pretrained P",
        "--enable-dp --sigma 0.01 --max-per-sample-grad_norm 1 --delta 1e-5 --data D",
        "--syncbn --data D --multiprocessing-distributed --dist-url tcp://127.0.0.1:10023 "
        "--dist-backend nccl --world-size 1 --rank 0",
        "--epochs 3 -b 79 --duplicate-label --arch vgg11 --model-eval",
    ]
    for line in lines:
        assert isinstance(build_parser().parse_args(line.split()), argparse.Namespace)


def described_checkpoint(path: Path, **changes: Any) -> Path:
    """A training's checkpoint of a small CNN, which says how the CNN is built."""
    spec = ModelSpec("cnn", CLASSES, SIDE, "cifar", 4, **changes)
    torch.save({"state_dict": build_model(spec).state_dict(), "model": spec.to_dict()}, path)
    return path


@pytest.mark.parametrize("flag", ["-a", "--arch"])
def test_the_default_architecture_given_in_words_is_not_ignored(
    flag: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = described_checkpoint(tmp_path / "cnn.tar")
    argv = ["--data", str(data), "--results", str(tmp_path / "out"), "-b", "2", "--cpu"]
    assert main([*argv, "--pretrained", str(path), flag, "resnet18"]) == 2
    assert f"--arch resnet18: the model in {path} has cnn" in capsys.readouterr().err


def test_the_default_pooling_given_in_words_is_not_ignored(run: Run, tmp_path: Path) -> None:
    path = described_checkpoint(tmp_path / "ra.tar", pool_kernel=19)
    source = ["--pretrained", str(path)]
    assert run(model=source).target.model.pool_kernel == 19
    given = run("--kernel-size-of-maxpool", "3", model=source)
    assert given.target.model.pool_kernel == 3


@pytest.mark.parametrize("word", ["per-sample", "sample"])
def test_both_words_for_clipping_every_image(word: str, run: Run) -> None:
    shared = run("--enable-dp", "--sigma", "0.5", "--dp-clipping", word)
    assert shared.record["privacy"]["clipping"] == "per-sample"
    assert shared.target.defenses == ("dp-sgd:0.5:1",)


def test_the_whole_local_training_in_words(run: Run) -> None:
    shared = run("--local", "adamw lr=1e-3 weight-decay=0.01 epochs=2 batch-size=2")
    local = shared.target.local
    assert (local.optimizer, local.lr, local.weight_decay) == ("adamw", 1e-3, 0.01)
    assert (local.epochs, local.batches, local.steps) == (2, 2, 4)


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--local", "adam", "--lr", "0.1"], "--lr and --local both state"),
        (["--local", "adam", "--local-epochs", "2"], "--local-epochs and --local both state"),
        (["--local", "adan lr=1"], "--local: local training: optimizer 'adan' is none of"),
    ],
)
def test_words_and_flags_that_contradict_each_other(flags: list[str], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        run_command(["--data", "photo-patches", *flags])
