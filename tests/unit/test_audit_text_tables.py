"""Sentences, records of tables and NIfTI volumes as members of an audit."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import gradinvbench as gib
from audit.data import SiteData, open_data
from audit.references import similarities, similarity_section
from audit.request import AuditSettings, make_request
from audit.run import audit
from core.data.given import GivenData
from core.data.specs import DataSpec
from core.errors import InputError
from core.losses import loss_class
from core.target import Truth
from tests.unit.test_text import LENGTH, TOKENS, Writer

OTHERS = 24
QUICK = AuditSettings(iterations=30, plants=2, membership=False, remedies=False, budget=60)


def updated(
    model: nn.Module, inputs: torch.Tensor, targets: torch.Tensor, loss: str = "cross-entropy"
) -> nn.Module:
    """The model after one step of torch's own SGD."""
    after = copy.deepcopy(model)
    optimiser = torch.optim.SGD(after.parameters(), lr=0.1)
    loss_class(loss)()(after(inputs), targets).backward()
    optimiser.step()
    return after


# -- Sentences --------------------------------------------------------------------------------


def sentences(n: int, seed: int) -> torch.Tensor:
    return torch.randint(TOKENS, (n, LENGTH), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("leaks", [True, False])
def test_a_sentence_in_an_update_is_found_and_one_that_is_not_is_not(leaks: bool) -> None:
    torch.manual_seed(0)
    model = Writer()
    members, others, elsewhere = sentences(1, 1), sentences(OTHERS, 2), sentences(1, 3)
    behind = members if leaks else elsewhere
    spec = DataSpec.of_tokens("sentences", LENGTH, TOKENS)
    data = SiteData(Truth(members, members), Truth(others, others), spec)
    request = make_request(
        model, updated(model, behind, behind, "next-token"), model=model, data=data,
        loss="next-token", local="sgd lr=0.1", settings=QUICK,
    )  # fmt: skip
    record = audit(request)
    # Read exactly, token by token, by the attack on the spans of gradients.
    (decides,) = [attack for attack in record.attacks if attack.test is not None]
    assert decides.attack == "dager"
    tokens, places = decides.similarities
    assert (tokens.metric, places.metric) == ("tokens", "places")
    assert (tokens.best_member == (1.0,)) == leaks
    assert record.verdict == ("leaks" if leaks else "no leak found")
    assert record.power[0].found == record.power[0].of == 2
    assert "what the images were labelled with" not in record.granted
    page = str(gib.Audit(record)) if hasattr(gib, "Audit") else ""
    assert "NCC" not in page


def test_tokens_in_common_against_plain_counts() -> None:
    found, images = sentences(3, 5), sentences(4, 6) % 7
    found = found % 7
    shared, placed = (similarities(m, found, images) for m in ("tokens", "places"))
    for i, own in enumerate(found.tolist()):
        for j, other in enumerate(images.tolist()):
            left, both = list(other), 0
            for token in own:
                if token in left:
                    left.remove(token)
                    both += 1
            assert shared[i, j] == pytest.approx(both / LENGTH)
            assert placed[i, j] == pytest.approx(np.mean(np.equal(own, other)))
    spec = DataSpec.of_tokens("sentences", LENGTH, TOKENS)
    section = similarity_section("tokens", found, images, images, seed=0, data=spec)
    assert len(section.noise) == 100
    assert 0 <= section.noise_99 <= 1


def test_reads_sentences_from_text_files(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    with pytest.raises(InputError, match="no folder"):
        open_data(str(tmp_path))
    (tmp_path / "members.txt").write_text("the heart is large\nno\nthe lung is clear today\n")
    (tmp_path / "non_members.txt").write_text("clear is the lung\n")
    with pytest.raises(InputError, match=r"tokenizer\.json"):
        open_data(str(tmp_path), size=4)
    words = ["the", "heart", "is", "large", "lung", "clear", "no", "today"]
    model = tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="no")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    data = open_data(str(tmp_path), size=4)
    assert data.members.images.tolist() == [[0, 1, 2, 3], [0, 4, 2, 5]]
    assert torch.equal(data.members.labels, data.members.images)
    assert data.non_members.images.tolist() == [[5, 2, 0, 4]]
    assert (data.spec.n_tokens, data.spec.shape) == (8, (4,))
    (tmp_path / "members.txt").write_text("ill\tthe heart is large\nwell\tthe lung is clear\n")
    with pytest.raises(InputError, match="some lines begin with a class and a tab"):
        open_data(str(tmp_path), size=4)
    (tmp_path / "non_members.txt").write_text("well\tclear is the lung\n")
    data = open_data(str(tmp_path), size=4)
    assert (data.members.labels.tolist(), data.non_members.labels.tolist()) == ([0, 1], [1])
    with pytest.raises(InputError, match="no sentence of 9 tokens"):
        open_data(str(tmp_path), size=9)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match=r"tokenizer\.json is no file of a tokenizer"):
        open_data(str(tmp_path), size=4)


# -- Records ----------------------------------------------------------------------------------


def write_tables(folder: Path, members: int = 1, others: int = OTHERS) -> None:
    rng = np.random.default_rng(0)
    for name, n in (("members", members), ("non_members", others)):
        rows = [
            f"{rng.normal(60, 12):.1f},{rng.choice(['m', 'f'])},{rng.choice(['a', 'b', 'c', 'd'])},"
            f"{rng.normal(5, 2):.2f},{rng.normal(0, 1):.3f},{('no', 'yes')[i % 2]}"
            for i in range(n)
        ]
        (folder / f"{name}.csv").write_text("age,sex,ward,dose,score,ill\n" + "\n".join(rows))


@pytest.mark.parametrize("leaks", [True, False])
def test_a_record_in_an_update_is_found_and_one_that_is_not_is_not(
    leaks: bool, tmp_path: Path
) -> None:
    write_tables(tmp_path, others=48)
    data = open_data(str(tmp_path))
    assert data.spec.columns is not None
    assert data.spec.shape == (data.spec.columns.width,)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(data.spec.shape[0], 32), nn.ReLU(), nn.Linear(32, 2))
    other = data.spec.columns.sample(1, seed=9)
    behind = data.members.images if leaks else other
    after = updated(model, behind, data.members.labels)
    settings = AuditSettings(plants=2, membership=False, remedies=False, iterations=30, budget=60)
    request = make_request(
        model, after, model=model, data=data, local="sgd lr=0.1", settings=settings
    )
    record = audit(request)
    (decides,) = [attack for attack in record.attacks if attack.test is not None]
    assert [s.metric for s in decides.similarities] == ["cells"]
    assert (decides.similarities[0].best_member == (1.0,)) == leaks
    assert record.verdict == ("leaks" if leaks else "no leak found")


def test_tables_share_columns_and_classes(tmp_path: Path) -> None:
    write_tables(tmp_path, members=6)
    text = (tmp_path / "members.csv").read_text()
    (tmp_path / "members.csv").write_text(text + "\n50.0,m,e,1.00,0.100,no")
    data = open_data(str(tmp_path))
    assert data.spec.columns is not None
    ward = data.spec.columns.columns[2]
    assert ward.values == ("a", "b", "c", "d", "e")
    assert len(data.members.labels) == 7
    frame = data.spec.columns.decode(data.members.images)
    assert frame["ward"].tolist()[-1] == "e"
    (tmp_path / "non_members.csv").write_text(text.replace("dose", "doses"))
    with pytest.raises(InputError, match=r"non_members\.csv has other columns"):
        open_data(str(tmp_path))


# -- Volumes ----------------------------------------------------------------------------------


def write_volumes(nibabel: object, folder: Path, ending: str) -> dict[str, np.ndarray]:
    rng, made = np.random.default_rng(1), {}
    for part in ("members", "non_members"):
        place = folder / part / "ill"
        place.mkdir(parents=True, exist_ok=True)
        volume = rng.random((4, 5, 6)).astype(np.float32)
        # A fourth axis of one volume, and values that the header scales.
        image = nibabel.Nifti1Image(volume[..., None], np.eye(4))  # type: ignore[attr-defined]
        nibabel.save(image, str(place / f"case{ending}"))  # type: ignore[attr-defined]
        made[part] = volume
    return made


@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
def test_reads_nifti_volumes(ending: str, tmp_path: Path) -> None:
    nibabel = pytest.importorskip("nibabel", reason="needs pip install 'gradinvbench[medical]'")
    made = write_volumes(nibabel, tmp_path, ending)
    data = open_data(str(tmp_path))
    assert data.spec.shape == (1, 4, 5, 6)
    assert np.array_equal(data.members.images[0, 0].numpy(), made["members"])
    assert np.array_equal(data.non_members.images[0, 0].numpy(), made["non_members"])
    path = tmp_path / "members" / "ill" / f"case{ending}"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(InputError, match="is no NIfTI volume"):
        open_data(str(tmp_path))


def test_takes_text_and_tables_from_python() -> None:
    """As `--data mymodel:dataset` gives them."""
    from audit.data import site_data

    members, others = sentences(2, 1), sentences(20, 2)
    data = site_data(GivenData((members, members), (others, others), n_tokens=TOKENS))
    assert data.spec.n_tokens == TOKENS
    assert torch.equal(data.members.images, members)
