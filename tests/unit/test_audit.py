"""An audit of a site's own update: what it refuses, what it finds, and that it resumes."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import gradinvbench as gib
from attack.priors.coordinates import Cosines
from audit import command, power, run
from audit.attacked import attack_update
from audit.attempts import Coarse, unexplained
from audit.command import local_parts, seconds
from audit.data import SiteData, chosen, joined, open_data, site_data
from audit.local import told_training
from audit.planning import plan_for
from audit.planting import plant, plant_settings
from audit.record import AuditRecord
from audit.request import AuditRequest, AuditSettings, make_request
from benchmarks import audit_power
from core.errors import InputError
from core.local_training import LocalTraining
from core.named_objects import named_object
from core.reading import read_json_object
from core.target import Truth
from gradinvbench.command import main

SIDE, OTHERS = 8, 48
QUICK = AuditSettings(iterations=60, plants=1, membership=False, remedies=False)


def network(norm: bool = False) -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6) if norm else nn.Identity(), nn.Tanh(),
        nn.Flatten(), nn.Linear(6 * SIDE**2, 12), nn.Tanh(), nn.Linear(12, 2),
    )  # fmt: skip


def pictures(n: int, seed: int) -> Truth:
    """Smooth pictures of two classes by turns, every one another."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand((n, 1, 4, 4), generator=generator)
    images = nn.functional.interpolate(coarse, (SIDE, SIDE), mode="bicubic").clamp(0, 1)
    return Truth(images, torch.arange(n) % 2)


def site(n: int, seed: int = 0) -> tuple[SiteData, Truth]:
    """A site with n members, and as many images that are nowhere in it."""
    data = site_data((_pair(pictures(n, seed)), _pair(pictures(OTHERS, seed + 1))))
    return data, pictures(n, seed + 2)


def _pair(samples: Truth) -> tuple[torch.Tensor, torch.Tensor]:
    return samples.images, samples.labels


def trained(
    model: nn.Module, samples: Truth, batch: int, lr: float = 0.05, adam: bool = False
) -> nn.Module:
    """The model after an epoch of torch's own optimiser."""
    after = copy.deepcopy(model)
    kind = torch.optim.Adam if adam else torch.optim.SGD
    optimiser = kind(after.parameters(), lr=lr)
    for images, labels in zip(
        samples.images.split(batch), samples.labels.split(batch), strict=True
    ):
        optimiser.zero_grad()
        nn.functional.cross_entropy(after(images), labels).backward()
        optimiser.step()
    return after


def asked(n: int = 4, batch: int = 4) -> AuditRequest:
    """The audit of a site that trained on its members."""
    data, _ = site(n)
    model = network()
    after = trained(model, data.members, batch)
    words = f"sgd lr=0.05 batch-size={batch}"
    return make_request(model, after, model=model, data=data, local=words, settings=QUICK)


# --- What is refused, before any long work ------------------------------------------------


def refused(before: object, after: object, data: SiteData | None = None) -> str:
    with pytest.raises(InputError) as error:
        make_request(before, after, model=network(), data=data or site(4)[0], local="sgd lr=0.05")
    return str(error.value)


def test_refuses_two_states_that_are_swapped() -> None:
    model, data = network(), site(4)[0]
    after = trained(model, data.members, 4)
    assert "look swapped" in refused(after, model, data)
    with_counters = network(norm=True)
    later = trained(with_counters, data.members, 4).state_dict()
    with pytest.raises(InputError, match=r"swapped: 1\.num_batches_tracked falls"):
        make_request(later, with_counters, model=network(norm=True), data=data)


def test_takes_a_training_that_overshoots() -> None:
    """The loss grows there as well, along the client's own steps."""
    model, data = network(), site(4)[0]
    after = trained(model, data.members, 1, lr=3.0)
    words = "sgd lr=3 batch-size=1"
    assert make_request(model, after, model=model, data=data, local=words).target.batch_size == 4


def test_refuses_states_of_different_models() -> None:
    state = network().state_dict()
    other = {name.replace("4.weight", "4.weights"): value for name, value in state.items()}
    said = refused(state, other)
    assert "4.weights of --local" in said
    assert "nearest is 4.weight" in said
    assert "are the same" in refused(state, network())


def test_refuses_numbers_that_are_not_finite() -> None:
    state = network().state_dict()
    state["6.bias"] = torch.tensor([0.0, float("nan")])
    assert "6.bias is not finite" in refused(network(), state)


@pytest.mark.parametrize(("members", "others", "says"), [(1, 18, "takes 19"), (4, 2, "takes 3")])
def test_says_how_many_non_members_it_takes(members: int, others: int, says: str) -> None:
    samples = [Truth(p.images, torch.zeros(len(p.labels), dtype=torch.long))
               for p in (pictures(members, 0), pictures(others, 1))]  # fmt: skip
    data = site_data(tuple(map(_pair, samples)))
    model = network()
    assert says in refused(model, trained(model, samples[0], 4), data)


def test_counts_non_members_within_their_class() -> None:
    member, others = pictures(1, 0), pictures(19, 1)
    model = network()
    data = site_data((_pair(member), _pair(others)))
    assert "19 non-members of class 0" in refused(model, trained(model, member, 1), data)


def test_says_which_members_are_also_held_out() -> None:
    data, _ = site(4)
    held_out = joined(data.non_members, chosen(data.members, [1, 2]))
    both = dataclasses.replace(data, non_members=held_out)
    model = network()
    after = trained(model, data.members, 4)
    said = [
        " ".join(make_request(model, after, model=model, data=each, settings=QUICK).warnings)
        for each in (data, both)
    ]
    assert ["are also among the non-members" in words for words in said] == [False, True]
    assert "2 of the members are" in said[1]


def test_doubts_members_that_were_not_in_the_training() -> None:
    data, elsewhere = site(4)
    model = network()
    said = [
        make_request(model, trained(model, behind, 4), model=model, data=data, local="sgd lr=0.05")
        for behind in (data.members, elsewhere)
    ]
    doubted = ["may not have been in this training" in " ".join(r.warnings) for r in said]
    assert doubted == [False, True]


class Viewed(nn.Module):
    """As Flower's quickstart flattens: by a view, which takes one layout of memory only."""

    def __init__(self, view: bool) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.conv, self.classes, self.view = nn.Conv2d(1, 4, 3), nn.Linear(4 * 36, 2), view

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.conv(x))
        return self.classes(x.view(-1, 4 * 36) if self.view else x.flatten(1))


def test_attacks_a_network_that_views_its_activations_as_one_that_flattens_them() -> None:
    data, found = site(2)[0], []
    for view in (True, False):
        model = Viewed(view)
        request = make_request(
            model, trained(model, data.members, 2), model=model, data=data,
            local="sgd lr=0.05", settings=dataclasses.replace(QUICK, attack="spectral"),
        )  # fmt: skip
        found.append(attack_update(request, plan_for(request)).sections[0].objectives)
    assert found[0] == pytest.approx(found[1], abs=0.05)


# --- Data ----------------------------------------------------------------------------------


def as_folder(folder: Path, data: SiteData) -> None:
    for part, samples in (("members", data.members), ("non_members", data.non_members)):
        for number, (image, label) in enumerate(zip(samples.images, samples.labels, strict=True)):
            place = folder / part / ("healthy", "ill")[int(label)]
            place.mkdir(parents=True, exist_ok=True)
            if number % 2:
                np.save(place / f"case{number}.npy", image.numpy())
            else:
                grey = (255 * image[0]).round().byte().numpy()
                Image.fromarray(grey).save(place / f"case{number}.png")


def test_reads_a_folder_of_pictures_and_arrays(tmp_path: Path) -> None:
    """As the tensors that they were made from, up to the 8 bits of pictures."""
    data, _ = site(4)
    as_folder(tmp_path, data)
    with pytest.raises(InputError, match="has another shape than the first file"):
        open_data(str(tmp_path))
    for path in tmp_path.rglob("*.npy"):
        np.save(path, np.repeat(np.load(path), 3, 0))
    found = open_data(str(tmp_path)).as_grey()
    assert found is not None
    assert found.spec.shape == (1, SIDE, SIDE)
    by_class = torch.cat([data.members.images[0::2], data.members.images[1::2]])
    assert (found.members.images - by_class).abs().max() <= 0.5 / 255 + 1e-6
    assert found.members.labels.tolist() == [0, 0, 1, 1]


def test_says_what_a_folder_lacks(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"there is no folder .*members"):
        open_data(str(tmp_path))
    (tmp_path / "members" / "ill").mkdir(parents=True)
    with pytest.raises(InputError, match="no class folders with files"):
        open_data(str(tmp_path))
    (tmp_path / "members" / "ill" / "a.npy").write_bytes(b"nothing")
    (tmp_path / "non_members" / "ill").mkdir(parents=True)
    np.save(tmp_path / "non_members" / "ill" / "b.npy", np.zeros((1, 8, 8)))
    with pytest.raises(InputError, match=r"a\.npy is no whole numpy array"):
        open_data(str(tmp_path))
    (tmp_path / "members" / "ill" / "a.npy").rename(tmp_path / "members" / "ill" / "a.nii")
    with pytest.raises(InputError, match=r"a\.nii (needs nibabel|is no NIfTI)"):
        open_data(str(tmp_path))


# --- Local training -------------------------------------------------------------------------


def test_knows_what_was_told() -> None:
    assert told_training("sgd lr=0.1", 8).told == ("optimiser", "learning_rate")
    assert told_training("lr=0.1 epochs=2", 8).told == ("learning_rate",)
    assert told_training("adamw lr=1e-3 epochs=2 batch-size=2", 8).estimated == ()
    assert told_training(None, 8).told == ()


@pytest.mark.parametrize(("batch", "adam"), [(4, False), (2, False), (4, True)])
def test_estimates_what_was_not_told(batch: int, adam: bool) -> None:
    model, data = network(norm=True), site(4)[0]
    after = trained(model, data.members, batch, 0.02, adam)
    request = make_request(model, after, model=model, data=data)
    found = request.local.section(4)
    assert (found.optimiser, found.steps) == ("adam" if adam else "sgd", 4 // batch)
    assert found.learning_rate == pytest.approx(0.02, rel=0.05)
    assert found.told == ()
    assert "is estimated" in " ".join(request.warnings)


# --- What the attack knows of its own images --------------------------------------------------


def test_measures_what_each_image_leaves_unexplained() -> None:
    """As the gradients of each image say, one by one; 0 for the true images."""
    request = asked()
    members, target = request.data.members, request.target
    assert max(unexplained(target, members.images, members.labels)) < 1e-4
    guess = pictures(4, 9)
    images = torch.cat([members.images[:2], guess.images[2:]])
    model = target.build_model().double()
    rows = []
    for image, label in zip(images, members.labels, strict=True):
        loss = nn.functional.cross_entropy(model(image[None].double()), label[None])
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, model.parameters())]))
    shared = torch.cat([g.flatten().double() for g in target.gradient.values()])
    whole = torch.stack(rows).mean(0)
    scale = whole @ shared / (whole @ whole)
    expected = []
    for own in rows:
        left = shared - scale * (whole - own / 4)
        expected.append(1 - float(torch.cosine_similarity(left, own, 0)))
    assert unexplained(target, images, members.labels) == pytest.approx(expected, abs=1e-6)


def test_coarse_images_are_those_of_the_lowest_frequencies() -> None:
    """`pull_back` is the transpose of `decode`, and decoding what was encoded is a projection."""
    size = (8, 6)
    coordinates = Coarse(Cosines(size, dtype=torch.float64), size, 4, torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    z, x = (torch.randn((2, 1, *size), generator=generator, dtype=torch.float64) for _ in range(2))
    one, other = (coordinates.decode(z) * x).sum(), (z * coordinates.pull_back(x)).sum()
    assert float(one) == pytest.approx(float(other))
    shown = coordinates.decode(coordinates.encode(x))
    assert torch.allclose(coordinates.decode(coordinates.encode(shown)), shown)
    assert not torch.allclose(shown, x)


# --- Plants ---------------------------------------------------------------------------------


def test_plants_an_update_of_other_images_of_the_same_classes() -> None:
    """It is what torch's own optimiser makes of the planted images."""
    request = asked(n=4, batch=2)
    single, own = plant_settings(request)
    assert (single.images, single.training.training.steps) == (1, 1)
    planted = plant(request, own, 0)
    assert not planted.is_planted[:4].any()
    assert planted.is_planted.sum() == 4
    assert sorted(planted.labels.tolist()) == [0, 0, 1, 1]
    everyone = request.data.everyone
    for order in _orders(np.flatnonzero(planted.is_planted)):
        samples = Truth(everyone.images[order], everyone.labels[order])
        model = request.target.build_model()
        after = trained(model, samples, 2).state_dict()
        found = {
            n: (model.state_dict()[n] - after[n]) / (0.05 * 2) for n in planted.target.gradient
        }
        if all(torch.allclose(found[n], g, atol=1e-5) for n, g in planted.target.gradient.items()):
            return
    pytest.fail("no order of the planted images gives the planted update")


def test_plants_under_dropout_and_attacks_without_its_masks() -> None:
    model, data = network(), site(2)[0]
    model.insert(4, nn.Dropout(0.5))
    request = make_request(
        model, trained(model, data.members, 2), model=model, data=data, local="sgd lr=0.05"
    )
    planted = plant(request, plant_settings(request)[0], 0).target
    dropped = (planted.gradient["5.weight"] == 0).all(0).float().mean()
    assert 0.3 < float(dropped) < 0.7
    assert planted.dropout_seed is None
    attacked = planted.build_model()
    assert torch.equal(attacked(data.members.images), attacked(data.members.images))
    assert "The masks of dropout are not known" in request.warnings[0]


def _orders(places: np.ndarray) -> list[list[int]]:
    import itertools

    return [list(order) for order in itertools.permutations(places.tolist())]


# --- The whole ---------------------------------------------------------------------------------


def test_finds_one_image_and_nothing_where_there_is_none() -> None:
    model, leaks = network(), []
    for seed in range(0, 18, 3):
        data, elsewhere = site(1, seed)
        for behind in (data.members, elsewhere):
            after = trained(model, behind, 1)
            request = make_request(
                model, after, model=model, data=data, local="sgd lr=0.05", settings=QUICK
            )
            found = attack_update(request, plan_for(request))
            decision = found.decided(request, ())
            assert decision is not None
            leaks.append(decision.verdict is gib.Verdict.LEAKS)
    assert all(leaks[0::2])
    # More than 2 of 6 at 5 % each: 1 in 500.
    assert sum(leaks[1::2]) <= 2


def test_the_record_keeps_to_its_level_and_finds_what_is_planted() -> None:
    """What `python -m benchmarks.audit_power` wrote: 200 audits without a leak, 20 with one."""
    record = read_json_object(Path(__file__).parents[2] / "results/audit/audit_power.json")
    leaks = {"no leak": list[bool](), "planted": list[bool](), "power": list[bool]()}
    for row in record["rows"]:
        assert row["leaks"] == [p <= record["level"] for p in row["p"]]
        leaks[row["setting"]["purpose"]] += row["leaks"]
    assert len(leaks["no leak"]) == 200
    assert sum(leaks["no leak"]) <= 0.05 * 200
    assert leaks["planted"] == [True] * 20
    # What the document says of it is what the record says.
    page = (Path(__file__).parents[2] / "docs/audit-my-update.md").read_text()
    assert "\n".join(audit_power.table(record)) in page
    assert f"it says `leaks` in {sum(leaks['no leak'])} (" in page


def test_says_what_it_would_have_found() -> None:
    data, elsewhere = site(2)
    model = network()
    found = gib.audit(
        model, trained(model, elsewhere, 2), model=model, members=_pair(data.members),
        non_members=_pair(data.non_members), local="sgd lr=0.05 batch-size=2", iterations=60,
        plants=2, membership=False, remedies=False, progress=False,
    )  # fmt: skip
    assert found.verdict is gib.Verdict.NO_LEAK_FOUND
    single, own = found.record.power
    assert (single.batch_size, single.found, single.of) == (1, 2, 2)
    assert (own.batch_size, own.steps) == (2, 1)
    assert "no leak found" in str(found).lower()


def test_goes_on_where_it_was_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    request = asked(n=2, batch=2)
    whole = run.audit(request)
    with monkeypatch.context() as broken:
        broken.setattr(power, "plant", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            run.audit(request, report=tmp_path)
    kept = next(tmp_path.glob("stages-*.json")).read_text()
    assert "images" not in json.loads(kept)
    with monkeypatch.context() as broken:
        broken.setattr(run, "attack_update", _interrupt)
        resumed = run.audit(request, report=tmp_path)
    assert _without_times(resumed) == _without_times(whole)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def _without_times(record: AuditRecord) -> AuditRecord:
    attacks = tuple(dataclasses.replace(attack, seconds=0.0) for attack in record.attacks)
    return dataclasses.replace(record, attacks=attacks, seconds=0.0)


def test_audits_from_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    data, _ = site(4)
    as_folder(tmp_path / "scans", data)
    for path in (tmp_path / "scans").rglob("*.npy"):
        image = Image.fromarray((255 * np.load(path)[0]).round().astype(np.uint8))
        image.save(path.with_suffix(".png"))
        path.unlink()
    model = network()
    torch.save(model.state_dict(), "G.pt")
    torch.save(trained(model, open_grey(tmp_path / "scans").members, 4).state_dict(), "W.pt")
    before = sorted(path for path in tmp_path.rglob("*") if path.is_file())
    (tmp_path / "auditedmodel.py").write_text(
        "from torch import nn\n\n\ndef build():\n    return nn.Sequential(nn.Conv2d(1, 6, 3, "
        "padding=1), nn.Identity(), nn.Tanh(), nn.Flatten(), nn.Linear(384, 12), nn.Tanh(), "
        "nn.Linear(12, 2))\n"
    )
    named_object("auditedmodel:build", "--model")
    monkeypatch.setattr(command, "PROTOCOL_RESTARTS", 3)
    words = ["--local", "W.pt", "--local", "sgd lr=0.05", "--data", "scans", "--report", "out"]
    quick = ["--iterations", "60", "--plants", "1", "--no-remedies", "--protocol", "ms6"]
    quick += ["--rounds", "G.pt", "--final", "W.pt", "--single-site", "W.pt", "--round", "7"]
    model_words = ["--global", "G.pt", "--model", "auditedmodel:build", "--device", "cpu"]
    assert main(["audit", *model_words, *words, *quick]) == 0
    assert "VERDICT" in capsys.readouterr().out
    written = json.loads((tmp_path / "out" / "audit.json").read_text())
    assert written["round_number"] == 7
    report = (tmp_path / "out" / "ms6.md").read_text()
    assert "Round used: 7." in report
    # Only the single site's trajectory takes more than the models that were given, and classes
    # more images.
    lacking = set(re.findall(r"not measured: ([^|\n]*[^|\n ])", report))
    assert lacking == {
        "the attack starts from none", "too few images of each, or no classes",
        "not several models of it, one per round (--single-site)",
    }  # fmt: skip
    assert "3 restarts for each of 2 classes" in report
    assert written["verdict"] in {verdict.value for verdict in gib.Verdict}
    assert (tmp_path / "out" / "audit.html").exists()
    after = {path for path in tmp_path.rglob("*") if path.is_file()} - set(before)
    outside = [p for p in after if "out" not in p.parts and "auditedmodel" not in p.name]
    assert outside == []
    for path in (tmp_path / "out").iterdir():
        assert not re.search(r"case\d|scans|W\.pt", path.read_text())


def test_keeps_reconstructions_only_where_the_site_says(tmp_path: Path) -> None:
    data, _ = site(2)
    model, kept = network(), tmp_path / "kept"
    for folder in (None, kept):
        found = gib.audit(
            model, trained(model, data.members, 2), model=model, members=_pair(data.members),
            non_members=_pair(data.non_members), local="sgd lr=0.05", iterations=5, plants=1,
            membership=False, remedies=False, progress=False, keep_images=folder,
        )  # fmt: skip
        found.save(tmp_path / "out")
        assert kept.exists() == (folder is not None)
    images = np.load(kept / "reconstructions.npy")
    assert images.shape == (2, 1, SIDE, SIDE)
    assert Image.open(kept / "reconstructions.png").width > SIDE
    # What may leave is the same with and without them, and holds none of their numbers.
    written = {path.name: path.read_text() for path in (tmp_path / "out").iterdir()}
    assert set(written) == {"audit.json", "audit.html"}
    pixels = {f"{value:.6f}" for value in images.flatten().tolist()}
    assert not any(pixel in text for pixel in pixels for text in written.values())


def test_models_of_other_rounds_are_read_once_each() -> None:
    """The trajectory is of the global models in order, the final one last."""
    data, _ = site(4)
    model = network()
    sent = trained(model, data.members, 4)
    states = [{k: v + i for k, v in model.state_dict().items()} for i in range(4)]

    def trajectory(**given: object) -> list[float]:
        request = make_request(
            model, sent, model=model, data=data, local="sgd lr=0.05", **given
        )  # fmt: skip
        shift = request.target.state_dict["6.bias"]
        return [round(float((s["6.bias"] - shift).mean())) for s in request.trajectory]

    assert trajectory() == [0]
    assert trajectory(rounds=states[1:3]) == [1, 2, 0]
    # The model that the site received is one of the rounds.
    assert trajectory(rounds=states[:3]) == [0, 1, 2]
    assert trajectory(rounds=states[:3], final=states[3]) == [0, 1, 2, 3]
    assert trajectory(rounds=states[:3], final=states[2]) == [0, 1, 2]
    assert trajectory(final=states[3]) == [3]
    other = {"a": torch.zeros(1)}
    for flag, given in (("--rounds", {"rounds": [other]}), ("--final", {"final": other}),
                        ("--single-site", {"single_site": [other]})):  # fmt: skip
        with pytest.raises(InputError, match=f"{flag}: a model is not of the same kind"):
            trajectory(**given)


def open_grey(folder: Path) -> SiteData:
    found = open_data(str(folder)).as_grey()
    assert found is not None
    return found


def test_takes_the_local_flag_for_both() -> None:
    assert local_parts(["W.pt", "sgd lr=0.1"]) == ("W.pt", "sgd lr=0.1")
    assert local_parts(["lr=0.1", "a/W.pt"]) == ("a/W.pt", "lr=0.1")
    assert local_parts(["W.pt"], "adamw lr=1e-3") == ("W.pt", "adamw lr=1e-3")
    with pytest.raises(InputError, match="one file of the local model"):
        local_parts(["sgd lr=0.1"])
    with pytest.raises(InputError, match="twice"):
        local_parts(["W.pt", "sgd lr=0.1"], "sgd lr=0.2")
    assert [seconds(text) for text in ("90s", "1h30m", "2h", "15")] == [90, 5400, 7200, 15]
    with pytest.raises(InputError, match="--budget soon"):
        seconds("soon")


def test_a_local_training_of_python_counts_as_told() -> None:
    assert told_training(LocalTraining(lr=0.2), 4).estimated == ()


@pytest.mark.parametrize(
    "setting",
    [
        {"budget": True}, {"budget": float("inf")}, {"budget": float("nan")}, {"budget": "9"},
        {"iterations": True}, {"iterations": 1.5}, {"iterations": "9"}, {"iterations": 0},
        {"plants": True}, {"plants": 1.5}, {"plants": -1}, {"alpha": "x"}, {"alpha": True},
        {"attack": None}, {"attack": 5}, {"attack": "none"}, {"seed": -1}, {"seed": 1.5},
        {"seed": True}, {"membership": 1}, {"remedies": None}, {"keep_images": "folder"},
    ],
    ids=str,
)  # fmt: skip
def test_settings_of_another_kind(setting: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(setting))):
        AuditSettings(**setting)


def test_errors_from_python_name_arguments_and_no_flags() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 2))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    after = {name: value + 0.1 for name, value in before.items()}
    samples = (torch.rand(25, 1, 4, 4), torch.zeros(25).long())
    images = {"members": [t[:1] for t in samples], "non_members": [t[1:] for t in samples]}
    images = {name: tuple(pair) for name, pair in images.items()}
    wrong: dict[str, tuple[tuple[object, object], dict[str, object]]] = {
        "^global_state and local_state are the same": ((before, before), {}),
        "^budget soon: give a time": ((before, after), {"budget": "soon"}),
        "^round_number -1: ": ((before, after), {"round_number": -1}),
        "^members and non_members: 1 member against 3 non-members": (
            (before, after),
            {"non_members": tuple(t[1:4] for t in samples)},
        ),
    }
    for sentence, (states, given) in wrong.items():
        with pytest.raises(InputError, match=sentence):
            gib.audit(*states, model=model, **{**images, **given})  # type: ignore[arg-type]


@pytest.mark.parametrize("place", ["members", "members/a"])
def test_a_folder_that_may_not_be_read_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    for folder in ("members/a", "non_members/a"):
        (tmp_path / folder).mkdir(parents=True)
        Image.new("L", (8, 8)).save(tmp_path / folder / "0.png")
    closed = str(tmp_path / place)

    # An administrator may read everything: the system's answer is made here.
    def answering(read: Callable[..., Any]) -> Callable[..., Any]:
        def call(path: Any = ".") -> Any:
            if os.path.abspath(os.fspath(path)) == closed:
                raise PermissionError(13, "Permission denied", closed)
            return read(path)

        return call

    for name in ("scandir", "listdir"):
        monkeypatch.setattr(os, name, answering(getattr(os, name)))
    with pytest.raises(InputError, match=rf"^--data: cannot read {closed} \(Permission denied\)"):
        open_data(str(tmp_path))
