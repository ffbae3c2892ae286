"""Sentences of unequal length: padding has no loss, no gradient, and counts as no token."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gradinvbench as gib
from attack.metrics import evaluate_text
from attack.metrics.text import assign_sentences
from core.data.specs import DataSpec
from core.data.text import PAD, text_data
from core.errors import InputError
from core.losses import NextToken, as_loss, loss_from, share_right
from core.models.architecture import GivenModel
from gradients.client_batch import sentence_guesses
from gradients.malicious_text import tamper_with_text

TOKENS, LENGTH = 120, 10


def sentences(lengths: list[int], seed: int) -> torch.Tensor:
    """Sentences of these lengths, filled up with token 0."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, TOKENS, (len(lengths), LENGTH), generator=generator)
    ids[:, 0] = 1 + torch.randperm(TOKENS - 1, generator=generator)[: len(lengths)]
    return torch.where(torch.arange(LENGTH) < torch.tensor(lengths)[:, None], ids, 0)


def padded_gpt2() -> nn.Module:
    pytest.importorskip("transformers")
    from core.models.language import Padded, causal_model

    torch.manual_seed(0)
    return Padded(causal_model(96, 2, 4, vocabulary=TOKENS)).eval()


def padded_bert() -> nn.Module:
    pytest.importorskip("transformers")
    from core.models.language import Padded, sentence_classifier

    torch.manual_seed(0)
    model = sentence_classifier(96, 2, 2, vocabulary=TOKENS, classes=3)
    with torch.no_grad():
        # Attention that tells tokens apart, as after training.
        for name, parameter in model.named_parameters():
            if "self" in name:
                parameter.mul_(8)
    return Padded(model).eval()


def share(
    model: nn.Module | GivenModel, ids: torch.Tensor, **more: str
) -> tuple[gib.Target, gib.Truth]:
    return gib.share(model, ids, ids, loss="next-token", pad=0, **more)  # type: ignore[arg-type]


def as_set(ids: torch.Tensor) -> set[tuple[int, ...]]:
    return {*map(tuple, ids.tolist())}


def test_padding_has_no_loss() -> None:
    torch.manual_seed(0)
    ids, logits = sentences([4, 10], 1), torch.randn(2, LENGTH, TOKENS, requires_grad=True)
    loss = NextToken(pad=0)
    short = F.cross_entropy(logits[0, :3], ids[0, 1:4])
    whole = F.cross_entropy(logits[1, :9], ids[1, 1:])
    assert torch.allclose(loss(logits, ids), (short + whole) / 2)
    (slopes,) = torch.autograd.grad(loss(logits, ids), [logits])
    assert not slopes[0, 3:].any()
    assert slopes[1, :9].any(-1).all()
    again = loss_from(loss.describe())
    assert isinstance(again, NextToken)
    assert again.pad == 0
    assert as_loss("next-token").describe() == {"loss": "next-token"}
    said = F.one_hot(ids.roll(-1, 1), TOKENS).float()
    said[0, 0] = said[0, 0].roll(1)
    right = share_right(loss, said, ids)
    assert right is not None
    assert right.tolist() == pytest.approx([2 / 3, 1])
    with pytest.raises(InputError, match="a token id as pad"):
        NextToken(pad=-1)


@pytest.mark.parametrize("build", [padded_gpt2, padded_bert])
def test_what_fills_up_a_sentence_changes_nothing(build: object) -> None:
    """A short sentence alone has the gradient that it has beside nothing but padding."""
    assert callable(build)
    model, ids = build(), sentences([6], 2)
    targets = ids if build is padded_gpt2 else torch.tensor([1])
    loss = NextToken(0) if build is padded_gpt2 else as_loss(None)
    gradients = []
    for given in (ids, ids[:, :6]):
        wanted = given if build is padded_gpt2 else targets
        value = loss(model(given), wanted)
        gradients.append(torch.autograd.grad(value, list(model.parameters()), allow_unused=True))
    for padded, plain in zip(*gradients, strict=True):
        if plain is not None:
            assert torch.allclose(padded, plain, atol=1e-6)


@pytest.mark.parametrize("defense", ["", "clip:0.1"])
def test_dager_reads_sentences_of_unequal_length(defense: str) -> None:
    ids = sentences([4, 10, 7, 9], 3)
    target, truth = share(padded_gpt2(), ids, defense=defense)
    found = gib.invert(target, attack="dager", progress=False)
    assert as_set(found.images) == as_set(ids)
    assert gib.evaluate(found, truth).summary()["sentence_exact"]["mean"] == 1


def test_a_sentence_that_begins_another_is_found() -> None:
    ids = sentences([9, 5, 8], 9)
    ids[1, :5] = ids[0, :5]
    ids[1, 4] = 3
    assert ids[0, 4] != 3
    target, _ = share(padded_gpt2(), ids)
    found = gib.invert(target, attack="dager", progress=False)
    assert as_set(found.images) == as_set(ids)


def test_dager_reads_an_encoder_s_sentences_of_unequal_length() -> None:
    ids = sentences([5, 8], 4)
    target, _ = gib.share(padded_bert(), ids, [0, 2], pad=0)
    found = gib.invert(target, attack="dager", progress=False)
    assert as_set(found.images) == as_set(ids)


@pytest.mark.parametrize(
    ("attack", "malicious"),
    [("decepticons", "decepticons:12"), ("robbing-the-fed-text", "imprint:512")],
)
def test_malicious_servers_read_sentences_of_unequal_length(attack: str, malicious: str) -> None:
    lengths = [6, 10, 8]
    public = sentences([5 + i % 6 for i in range(80)], 5)
    model = tamper_with_text(padded_gpt2(), malicious, public, NextToken(0))
    ids = sentences(lengths, 7)
    target, _ = share(GivenModel(model, shape=(LENGTH,), malicious=malicious), ids)
    found = gib.invert(target, attack=attack, progress=False)
    assert as_set(found.images) == as_set(ids)


@pytest.mark.parametrize("attack", ["tag", "lamp"])
def test_embeddings_are_seen_though_their_sentences_are_unknown(attack: str) -> None:
    """The stand-in for tokens is no padding, which the model would not see."""
    target, truth = share(padded_gpt2(), sentences([LENGTH], 8))
    found = gib.invert(target, attack=attack, iterations=150, progress=False)
    assert (found.images == truth.images).double().mean() >= 0.3


def test_metrics_count_no_padding() -> None:
    data = DataSpec.of_tokens("words", 4, 5, ["", "a ", "b ", "c ", "d "], pad=0)
    true = torch.tensor([[1, 2, 0, 0], [3, 4, 1, 2]])
    found = torch.tensor([[3, 4, 1, 0], [1, 3, 0, 0]])
    result = evaluate_text(found, None, gib.Truth(true, true), data)
    first, second = result.per_image
    assert (first["tokens_placed"], first["tokens_found"], first["edit_distance"]) == (
        0.5,
        0.5,
        0.5,
    )
    assert (second["tokens_placed"], second["sentence_exact"]) == (0.75, 0)
    assert assign_sentences(found, true, data).tolist() == [1, 0]
    assert data.text(true[0]) == "a b "
    assert DataSpec.from_dict(data.to_dict()) == data
    frequent, _ = sentence_guesses(true, true, data)
    assert 0 not in frequent[:3].tolist()
    with pytest.raises(InputError, match=r"a token id in 0\.\.4"):
        DataSpec.of_tokens("words", 4, 5, pad=5)


def test_padding_stands_at_the_end() -> None:
    ids = sentences([4, 10], 1)
    ids[0, 2] = 0
    with pytest.raises(InputError, match="padding stands behind"):
        share(padded_gpt2(), ids)


def test_a_text_s_short_sentences_are_kept() -> None:
    pytest.importorskip("tokenizers")
    whole, padded = text_data(length=12), text_data(length=12, shortest=6)
    assert isinstance(padded.train, tuple)
    assert isinstance(whole.train, tuple)
    assert padded.pad == PAD
    assert len(padded.train[0]) > len(whole.train[0])
    lengths = (padded.train[0] != PAD).sum(1)
    assert (int(lengths.min()), int(lengths.max())) == (6, 12)
    assert padded.tokens[PAD] == ""
    assert whole.pad is None
    with pytest.raises(InputError, match="the shortest sentence has 2 to 12 tokens"):
        text_data(length=12, shortest=13)


def test_the_commands_take_short_sentences(tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    pytest.importorskip("transformers")
    from core.models.language import gpt2_padded
    from gradients.command import main as extract
    from training.main_pytorch import main as train

    words = ["--model", "core.models.language:gpt2_padded", "--loss", "next-token", "--cpu"]
    words += ["--data", "pydoc-topics", "--tokens", "12", "--shortest", "6"]
    trained = ["--epochs", "1", "-b", "64", "--result-root"]
    for scheme in ("pure", "DP-SGD"):
        train([*words, *trained, str(tmp_path / scheme), "--scheme", scheme])
    extract([*words, "--results", str(tmp_path), "-b", "3", "--model-eval"])
    (path,) = tmp_path.glob("*-checkpoint.pth.tar")
    target, truth = gib.load_target(path, build=gpt2_padded)
    assert target.data.pad == PAD
    assert target.loss.describe() == {"loss": "next-token", "pad": PAD}
    assert truth is not None
    found = gib.invert(target, attack="dager", progress=False)
    assert gib.evaluate(found, truth).summary()["sentence_exact"]["mean"] == 1
