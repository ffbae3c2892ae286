"""Text: token ids as inputs, the attacks on them, and how sentences are compared."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gradinvbench as gib
from attack.attacks.auto import Auto
from attack.attacks.ensemble import EnsembleConfig
from attack.attacks.parts.closed_form import gradient_loss
from attack.attacks.text.lamp import random_order
from attack.attacks.text.parts.embedding_space import embedding_space
from attack.attacks.text.parts.layers import token_layers
from attack.attacks.text.parts.spans import span_of, squares_cut
from attack.loop.inversion import Inversion
from attack.metrics import evaluate_text
from core.data.specs import DataSpec
from core.data.text import is_text, split_sentences, text_data
from core.errors import InputError
from core.losses import Targets
from core.models.token_embedding import token_embedding

TOKENS, WIDTH, LENGTH = 60, 32, 6


class Writer(nn.Module):
    """A causal transformer of one layer, or a classifier by the mean over tokens."""

    def __init__(self, tied: bool = True, classes: int = 0) -> None:
        super().__init__()
        self.words = nn.Embedding(TOKENS, WIDTH)
        self.places = nn.Embedding(16, WIDTH)
        # Of unit length a tied model would be sure to read the same word twice.
        nn.init.normal_(self.words.weight, std=0.1)
        nn.init.normal_(self.places.weight, std=0.1)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, classes or TOKENS, bias=False)
        if tied and not classes:
            self.head.weight = self.words.weight
        self.classes = classes

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        t = ids.shape[1]
        x = self.words(ids) + self.places(torch.arange(t))
        q, k, v = self.qkv(F.layer_norm(x, (WIDTH,))).chunk(3, -1)
        hidden = torch.ones(t, t, dtype=torch.bool).triu(1)
        weights = (q @ k.mT / WIDTH**0.5).masked_fill(hidden, -torch.inf).softmax(-1)
        x = x + self.out(weights @ v)
        x = x + self.down(F.gelu(self.up(F.layer_norm(x, (WIDTH,)))))
        logits: torch.Tensor = self.head(F.layer_norm(x, (WIDTH,)))
        return logits.mean(1) if self.classes else logits


def shared(
    n: int, tied: bool = True, classes: int = 0, defense: str = ""
) -> tuple[gib.Target, gib.Truth]:
    torch.manual_seed(0)
    model = Writer(tied, classes).eval()
    ids = torch.randint(TOKENS, (n, LENGTH))
    if classes:
        return gib.share(model, ids, torch.arange(n) % classes, defense=defense)
    return gib.share(model, ids, ids, loss="next-token", defense=defense)


def test_a_span_is_that_of_the_layers_inputs() -> None:
    target, truth = shared(3)
    layers = token_layers(target)
    assert layers.causal
    assert [group[0].local for group in layers.groups][:2] == [True, False]
    for group in layers.groups[:3]:
        span = span_of(group, target.gradient, 0.0)
        (rows,) = layers.inputs([group[0]], truth.images)
        # The last token reads nothing; SVD of the inputs themselves gives the same projection.
        rows = rows[:, :-1].flatten(0, 1)
        rank = int(torch.linalg.matrix_rank(rows))
        right = torch.linalg.svd(rows)[2][:rank]
        assert span.basis.shape[1] == rank < WIDTH
        assert torch.allclose(span.basis @ span.basis.T, right.T @ right, atol=1e-3)
        assert span.reached.tolist() == [True] * (LENGTH - 1) + [False]


@pytest.mark.parametrize(
    ("n", "tied", "classes", "defense"),
    [(4, True, 0, ""), (4, False, 0, "clip:0.01"), (4, True, 3, "freeze:qkv+out+up+down+head")],
)
def test_dager_recovers_every_sentence(n: int, tied: bool, classes: int, defense: str) -> None:
    target, truth = shared(n, tied, classes, defense)
    labels = truth.labels if classes else None
    found = gib.invert(target, attack="dager", targets=labels, progress=False)
    assert {*map(tuple, found.images.tolist())} == {*map(tuple, truth.images.tolist())}
    values = gib.evaluate(found, truth)
    assert values.summary()["sentence_exact"]["mean"] == 1
    assert all(each["label_true"] == each["label_recovered"] for each in values.per_image)


def test_beyond_the_width_dager_says_so() -> None:
    target, truth = shared(12)
    found = gib.invert(target, attack="dager", progress=False)
    assert found.details["rank"] <= WIDTH < 12 * (LENGTH - 1)
    exact = gib.evaluate(found, truth).summary()["sentence_exact"]["mean"]
    assert (exact or 0.0) < 0.5


@pytest.mark.parametrize("defense", ["gaussian:1e-6", "gaussian:1e-5", "prune:0.05", "topk:0.9"])
def test_dager_ranks_what_noise_leaves_outside_of_every_span(defense: str) -> None:
    target, truth = shared(3, defense=defense)
    found = gib.invert(target, attack="dager", progress=False)
    assert found.details["largest_distance"] is None
    untold = dataclasses.replace(target, defenses=())
    values = [
        gib.evaluate(each, truth).summary()["sentence_exact"]["mean"] or 0.0
        for each in (found, gib.invert(untold, attack="dager", progress=False))
    ]
    assert values[0] == 1 > values[1]


def test_what_pruning_took_is_told_by_what_is_left() -> None:
    plain, pruned = (shared(3, defense=word)[0].gradient for word in ("", "prune:0.1"))
    for name in ("qkv.weight", "out.weight", "up.weight"):
        taken = float((plain[name] - pruned[name]).double().square().mean())
        assert 0.5 * taken < squares_cut(pruned[name]) < 2 * taken


def test_told_of_noise_dager_leaves_it_out() -> None:
    """Noise fills the space; the directions above its largest singular value are the tokens'."""
    target, _ = shared(2, defense="gaussian:1e-7")
    plain, _ = shared(2)
    group = token_layers(target).groups[0]
    told, untold = (span_of(group, target.gradient, noise) for noise in (1e-7, 0.0))
    assert told.basis.shape[1] <= span_of(group, plain.gradient, 0.0).basis.shape[1]
    assert untold.basis.shape[1] == WIDTH


def test_the_embedded_client_has_the_same_gradient() -> None:
    target, truth = shared(2, tied=False)
    space = embedding_space(target)
    inversion = Inversion(
        space.target, truth.images, gib.Settings(tv=0.0), device=torch.device("cpu")
    )
    update = inversion.replica.update(space.vectors[truth.images], truth.images, False)
    for own, theirs in zip(update, space.target.gradient.values(), strict=True):
        assert torch.allclose(own, theirs, atol=1e-6)
    assert torch.equal(space.nearest(space.vectors[truth.images]), truth.images)


@pytest.mark.parametrize("attack", ["tag", "lamp"])
def test_matching_embeddings_finds_most_tokens(attack: str) -> None:
    target, truth = shared(1)
    found = gib.invert(target, attack=attack, iterations=200, progress=False)
    wrong = (truth.images + 1) % TOKENS
    assert found.objective < gradient_loss(target, wrong, wrong, torch.device("cpu"))
    assert (found.images == truth.images).double().mean() >= 0.5


def test_an_order_is_a_permutation() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        assert random_order(7, generator).sort().values.tolist() == list(range(7))


def test_sentences_are_compared_as_texts() -> None:
    data = DataSpec.of_tokens("words", 4, 5, ["a ", "b ", "c ", "d ", "e "])
    true = torch.tensor([[0, 1, 2, 3], [4, 4, 4, 4]])
    found = torch.tensor([[4, 4, 4, 3], [1, 0, 2, 3]])
    result = evaluate_text(found, None, gib.Truth(true, true), data)
    first, second = result.per_image
    assert (first["reconstruction"], second["reconstruction"]) == (1, 0)
    assert (first["tokens_placed"], first["tokens_found"], first["edit_distance"]) == (0.5, 1, 0.5)
    assert (second["tokens_placed"], second["tokens_found"]) == (0.75, 0.75)
    if not result.missing:
        assert first["rouge1"] == 1
        assert first["rouge2"] == pytest.approx(1 / 3)


def test_a_file_holds_text(tmp_path: Path) -> None:
    target, truth = shared(2)
    path = tmp_path / "text.tar"
    gib.save_target(path, target, truth, builder="tests.unit.test_text:Writer")
    read, behind = gib.load_target(path, build=Writer)
    assert read.data == target.data
    assert behind is not None
    assert torch.equal(behind.images, truth.images)
    assert torch.equal(behind.labels, truth.labels)
    broken = gib.Truth(truth.images + TOKENS, truth.labels)
    gib.save_target(path, target, broken, builder="tests.unit.test_text:Writer")
    with pytest.raises(InputError, match="outside its vocabulary"):
        gib.load_target(path, build=Writer)


def test_what_does_not_fit_is_refused() -> None:
    target, truth = shared(1)
    with pytest.raises(InputError, match="is made for images"):
        gib.invert(target, attack="inverting-gradients")
    with pytest.raises(InputError, match=r"must lie in 0\.\.59"):
        gib.share(Writer(), truth.images + TOKENS, truth.images, loss="next-token")
    images, _ = gib.share(nn.Sequential(nn.Flatten(), nn.Linear(4, 2)), torch.rand(1, 1, 2, 2), [0])
    with pytest.raises(InputError, match="is made for text"):
        gib.invert(images, attack="dager")
    with pytest.raises(InputError, match=r"no nn\.Embedding"):
        token_embedding(nn.Sequential(nn.Identity(), nn.Flatten(), _Floats()), 4)


class _Floats(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 2)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.layer(ids.float())
        return result


def test_text_is_cut_into_sentences(tmp_path: Path) -> None:
    assert split_sentences("One is\n here. Two?  Three") == ["One is here.", "Two?", "Three"]
    assert [is_text(name) for name in ("pydoc-topics", "a.txt", "photo-patches")] == [1, 1, 0]
    pytest.importorskip("tokenizers")
    (tmp_path / "a.txt").write_text("".join(f"The number {i} is here for all. " for i in range(99)))
    data = text_data(str(tmp_path), 5, Targets.TOKENS)
    assert isinstance(data.train, tuple)
    assert data.train[0].shape[1] == 5
    words = "".join(data.tokens[i] for i in data.train[0][0])
    assert "The number 0 is here".startswith(words)
    with pytest.raises(InputError, match="sentences of 500 tokens"):
        text_data(str(tmp_path), 500, Targets.TOKENS)


@pytest.mark.parametrize("kind", ["causal", "classifier"])
def test_transformers_models_give_their_text_away(kind: str) -> None:
    pytest.importorskip("transformers")
    from core.models.language import causal_model, sentence_classifier

    torch.manual_seed(0)
    ids = torch.randint(200, (2, 8))
    if kind == "causal":
        model = causal_model(48, 1, 2, vocabulary=200).eval()
        target, truth = gib.share(model, ids, ids, loss="next-token")
    else:
        model = sentence_classifier(48, 2, 2, vocabulary=200, classes=3).eval()
        target, truth = gib.share(model, ids, [1, 2])
    found = gib.invert(target, attack="dager", progress=False)
    assert {*map(tuple, found.images.tolist())} == {*map(tuple, truth.images.tolist())}


def adapted(rank: int) -> Writer:
    """A writer of whose attention and feed-forward network adapters alone are trained."""
    from core.models.language import LowRank

    torch.manual_seed(0)
    model = Writer(tied=False).requires_grad_(False)
    for name, outputs in (("qkv", 3 * WIDTH), ("out", WIDTH), ("up", 2 * WIDTH)):
        setattr(model, name, LowRank(getattr(model, name), WIDTH, outputs, rank))
    return model.eval()


@pytest.mark.parametrize("begun", [True, False])
def test_dager_reads_the_gradient_of_adapters(begun: bool) -> None:
    """While the second matrix is zero it alone has a gradient; then the first one, too."""
    model = adapted(24)
    if not begun:
        for name in ("qkv", "out", "up"):
            nn.init.zeros_(model.get_submodule(name).get_parameter("up.weight"))
    ids = torch.randint(TOKENS, (3, LENGTH), generator=torch.Generator().manual_seed(4))
    target, truth = gib.share(model, ids, ids, loss="next-token")
    assert all(".down." in name or ".up." in name for name in target.gradient)
    found = gib.invert(target, attack="dager", progress=False)
    read = found.images[:, :-1].tolist()
    assert {*map(tuple, read)} == {*map(tuple, truth.images[:, :-1].tolist())}
    assert found.details["tokens_over_width"] == pytest.approx(15 / 24)
    assert torch.equal(found.images[:, -1].sort().values, ids[:, -1].sort().values)


def test_dager_reads_the_update_of_several_local_steps() -> None:
    torch.manual_seed(0)
    model = Writer().eval()
    ids = torch.randint(TOKENS, (4, LENGTH))
    local = "sgd lr=0.0001 epochs=2 batches=2"
    target, truth = gib.share(model, ids, ids, loss="next-token", local=local)
    found = gib.invert(target, attack="dager", progress=False)
    read = found.images[:, :-1].tolist()
    assert {*map(tuple, read)} == {*map(tuple, truth.images[:, :-1].tolist())}


@pytest.mark.parametrize("classes", [0, 3])
def test_auto_reads_text(classes: int) -> None:
    target, truth = shared(2, tied=False, classes=classes)
    found = gib.invert(target, attack="auto", iterations=12, progress=False)
    members = found.details["members"]
    assert {*members} == {"dager", "tag", "lamp", "decepticons", "robbing-the-fed-text"}
    assert found.details["chosen"] == "dager"
    assert members["decepticons"]["status"] == "not applicable"
    assert found.objective == min(m.objective for m in found.members.values())
    assert gib.evaluate(found, truth).summary()["sentence_exact"]["mean"] == 1
    assert found.texts == [target.data.text(ids) for ids in found.images]


def test_auto_s_results_on_text_are_kept(tmp_path: Path) -> None:
    target, _ = shared(2)
    state = tmp_path / "state.pt"
    config = EnsembleConfig(members=("dager", "tag", "spectral"), iterations=20)
    run = {"labels": None, "device": torch.device("cpu"), "seed": 0, "state_file": state}
    first, second = (Auto(config).reconstruct(target, **run) for _ in range(2))
    assert torch.equal(first.images, second.images)
    seconds = [each.details["members"]["tag"]["seconds"] for each in (first, second)]
    assert seconds[0] == seconds[1]
    in_time = dataclasses.replace(config, time_budget=1.0)
    assert Auto(in_time).reconstruct(target, **{**run, "state_file": None}).details["budget"] > 0
