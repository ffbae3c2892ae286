"""Models that a malicious server sends to clients with text, and what they give away."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import gradinvbench as gib
from attack.attacks.parts.bins import read_bins
from attack.attacks.text import decepticons
from attack.attacks.text.decepticons import read_rows
from attack.attacks.text.parts.sentence_names import SAME, plain, sentence_names
from benchmarks.fidelity.networks import Transformer3
from core.errors import InputError
from core.losses import as_loss
from core.models.architecture import GivenModel
from core.models.malicious import ImprintedEmbedding, add_to_language_model
from core.models.transformer_blocks import transformer_blocks
from gradients.malicious_text import NAMED, rows_at, tamper_with_text

TOKENS, LENGTH = 60, 6


def sentences(n: int, seed: int) -> torch.Tensor:
    """Sentences that begin with different tokens."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(TOKENS, (n, LENGTH), generator=generator)
    ids[:, 0] = torch.randperm(TOKENS, generator=generator)[:n]
    return ids


def gpt2() -> nn.Module:
    pytest.importorskip("transformers")
    from core.models.language import causal_model

    torch.manual_seed(0)
    return causal_model(48, 2, 2, vocabulary=TOKENS).eval()


def encoder() -> nn.Module:
    torch.manual_seed(0)
    return Transformer3(TOKENS).eval()


BUILDERS = {"gpt2": gpt2, "encoder": encoder}


def sent(kind: str, malicious: str) -> GivenModel:
    model = tamper_with_text(BUILDERS[kind](), malicious, sentences(40, 1))
    return GivenModel(model, f"tests.unit.test_malicious_text:{kind}", (LENGTH,), malicious)


@pytest.mark.parametrize("kind", ["gpt2", "encoder"])
@pytest.mark.parametrize(
    ("attack", "malicious"),
    [("decepticons", "decepticons:12"), ("robbing-the-fed-text", "imprint:512")],
)
def test_a_whole_batch_is_read(kind: str, attack: str, malicious: str) -> None:
    ids = sentences(5, 2)
    target, truth = gib.share(
        sent(kind, malicious), ids, ids, loss="next-token", defense="clip:0.1"
    )
    found = gib.invert(target, attack=attack, progress=False)
    assert {*map(tuple, found.images.tolist())} == {*map(tuple, truth.images.tolist())}


def test_behind_the_first_attention_a_token_sees_the_first_of_its_sentence_alone() -> None:
    model = sent("encoder", "decepticons:12").build().double()
    one = sentences(1, 3).expand(3, -1).clone()
    # The second differs behind the tokens that name it, but for position 5; the third in one.
    one[1, NAMED:] = (one[1, NAMED:] + 1) % TOKENS
    one[1, 5] = one[0, 5]
    one[2, 1] = (one[0, 1] + 1) % TOKENS
    for block in transformer_blocks(model):
        rows = rows_at(model, block.widened, one)
        assert torch.allclose(rows[0, [0, 5]], rows[1, [0, 5]], atol=1e-6)
        assert not torch.allclose(rows[0, 5], rows[2, 5], atol=1e-2)


def test_bins_give_what_is_alone_in_them() -> None:
    generator = torch.Generator().manual_seed(0)
    values, slopes = torch.tensor([0.5, 2.5, 2.6, 3.5]), torch.tensor([1.0, -2.0, 0.5, 3.0])
    inputs = torch.randn((4, 3), generator=generator)
    thresholds = torch.tensor([2.0, 0.0, 3.0, 1.0])
    on = (values > thresholds[:, None]).float() * slopes
    found = read_bins(thresholds, on @ inputs, on.sum(1), 4, 1e-4)
    mixed = (-2.0 * inputs[1] + 0.5 * inputs[2]) / -1.5
    assert torch.allclose(found, torch.stack([inputs[3], mixed, inputs[0]]), atol=1e-5)


@pytest.mark.parametrize("every", [True, False])
def test_rows_say_sentence_position_and_token(every: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where only the likeliest tokens of a long sentence are tried."""
    monkeypatch.setattr(decepticons, "ALL", 10**9 if every else 0)
    ids = sentences(4, 5)
    target, _ = gib.share(sent("encoder", "decepticons:12"), ids, ids, loss="next-token")
    model = target.build_model().double()
    rows = rows_at(model, transformer_blocks(model)[1].widened, ids)
    read = read_rows(target, rows.flatten(0, 1), 12)
    assert torch.equal(read.tokens.view(4, -1), ids)
    assert torch.equal(read.places.view(4, -1), torch.arange(LENGTH).expand(4, -1))


@pytest.mark.parametrize("kind", ["gpt2", "encoder"])
def test_the_first_tokens_name_a_sentence(kind: str) -> None:
    ids = sentences(3, 5)
    # Two begin alike and differ in the last token that names them.
    ids[1, : NAMED - 1] = ids[0, : NAMED - 1]
    target, _ = gib.share(sent(kind, "decepticons:12"), ids, ids, loss="next-token")
    model = target.build_model().double()
    names = sentence_names(target, 12)
    assert names.whole == (kind == "encoder")
    rows = rows_at(model, transformer_blocks(model)[-1].widened, ids)
    borne = plain(rows[..., -12:])[:, names.first_named :]
    wanted = names.of(ids[:, : names.depth])
    assert torch.allclose(borne, wanted[:, None].expand_as(borne), atol=1e-4)
    # Of one token nothing is known, and of the others that they are among a few.
    candidates = [[0], *([each, 0] for each in ids[1, 1 : names.depth].tolist())]
    decoded, cosine = names.decoded(wanted[1], candidates)
    assert decoded == ids[1, : names.depth].tolist()
    assert cosine > SAME


@pytest.mark.parametrize("kind", ["gpt2", "encoder"])
def test_sentences_that_begin_alike_are_kept_apart(kind: str) -> None:
    ids = sentences(4, 6)
    ids[1:3, 0] = ids[0, 0]
    target, truth = gib.share(sent(kind, "decepticons:12"), ids, ids, loss="next-token")
    found = gib.invert(target, attack="decepticons", progress=False)
    assert {*map(tuple, found.images.tolist())} == {*map(tuple, truth.images.tolist())}


def test_sentences_share_a_bin_or_a_name() -> None:
    """What is not alone is not read: as many bins as sentences, and equal beginnings."""
    ids = sentences(5, 2)
    target, truth = gib.share(sent("encoder", "imprint:2"), ids, ids, loss="next-token")
    found = gib.invert(target, attack="robbing-the-fed-text", progress=False)
    assert found.details["filled_bins"] <= 2
    assert (gib.evaluate(found, truth).summary()["sentence_exact"]["mean"] or 0.0) < 1
    ids[1, :NAMED] = ids[0, :NAMED]
    target, truth = gib.share(sent("encoder", "decepticons:12"), ids, ids, loss="next-token")
    found = gib.invert(target, attack="decepticons", progress=False)
    summary = gib.evaluate(found, truth).summary()
    assert found.details["sentences"] == 5
    assert summary["sentence_exact"]["mean"] in (0.6, 1.0)


@pytest.mark.parametrize("malicious", ["decepticons:12", "imprint:64"])
def test_a_file_holds_a_model_that_was_made_to_leak(tmp_path: Path, malicious: str) -> None:
    ids = sentences(2, 2)
    target, truth = gib.share(sent("encoder", malicious), ids, ids, loss="next-token")
    path = tmp_path / "text.tar"
    gib.save_target(path, target, truth)
    read, _ = gib.load_target(path, build=encoder)
    assert read.model.describe()["malicious"] == malicious
    assert torch.equal(read.build_model()(ids), target.build_model()(ids))
    raw = torch.load(path, weights_only=False)
    raw["model"]["malicious"] = "imprint:65000"
    torch.save(raw, path)
    with pytest.raises(InputError, match="65000 bins"):
        gib.load_target(path, build=encoder)


class ByFirstToken(nn.Module):
    """A classifier by what the first token's state says."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = encoder()
        self.inner.decoder = nn.Linear(96, 3)  # type: ignore[assignment]

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.inner(ids)[:, 0]
        return logits


def test_what_cannot_be_done_is_refused() -> None:
    public, ids = sentences(20, 1), sentences(2, 2)
    with pytest.raises(InputError, match="of a language model"):
        tamper_with_text(encoder(), "decepticons", public)
    with pytest.raises(InputError, match="all else is for our architectures"):
        tamper_with_text(encoder(), "trap:1", public)
    with pytest.raises(InputError, match="at most half of the model's 96 features"):
        tamper_with_text(encoder(), "decepticons:50", public)
    with pytest.raises(InputError, match="no blocks in the shape of"):
        tamper_with_text(nn.Sequential(nn.Embedding(TOKENS, 4)), "decepticons:2", public)
    with pytest.raises(InputError, match="classifier by the first token"):
        tamper_with_text(ByFirstToken(), "decepticons:12", public, as_loss("cross-entropy"))
    honest, _ = gib.share(encoder(), ids, ids, loss="next-token")
    with pytest.raises(InputError, match="is honest"):
        gib.invert(honest, attack="decepticons")
    with pytest.raises(InputError, match="has no imprint block"):
        gib.invert(honest, attack="robbing-the-fed-text")
    several, _ = gib.share(
        sent("encoder", "decepticons:12"), ids, ids, loss="next-token", local="sgd lr=0.1 steps=2"
    )
    with pytest.raises(InputError, match="one local step"):
        gib.invert(several, attack="decepticons")
    block = ImprintedEmbedding(nn.Embedding(TOKENS, 4), LENGTH, 8)
    assert block(ids[:, :2]).shape == (2, 2, 4)
    with pytest.raises(InputError, match="6 tokens at most"):
        block(torch.zeros((1, LENGTH + 1), dtype=torch.long))
    assert add_to_language_model(block, "", LENGTH) is block
