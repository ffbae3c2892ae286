"""What a malicious server does to the parameters of a language model that it sends."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import nn

from core.errors import InputError
from core.losses import Loss, NextToken, Targets, counted
from core.models.malicious import ImprintedEmbedding, add_to_language_model, parse_text_malice
from core.models.module_inputs import inputs_of
from core.models.transformer_blocks import Block, Matrix, transformer_blocks
from core.models.unchanged import in_mode, unchanged
from gradients.servers.base import MARGIN, spread_ties

# Logits between the position that a head reads and every other one: their share is e^-60.
FIRST = 60.0
# First tokens of a sentence that name it, at most: one per head of the first attention.
NAMED = 4
# Largest distance between two thresholds in units of what a smooth activation needs to switch.
SHARP = 50.0
# What the feed-forward networks add to the stream of hidden states, against the embeddings.
QUIET = 1e-3


def tamper_with_text(
    model: nn.Module, malicious: str, public_ids: torch.Tensor, loss: Loss | None = None
) -> nn.Module:
    """The language model that a malicious server sends instead of `model`.

    Args:
        model: The honest model; left as it is.
        malicious: What to do, `imprint:BINS` or `decepticons:FEATURES`.
        public_ids: N x T token ids of the server's own sentences.
        loss: What clients minimise; None: next-token.

    Raises:
        InputError: It cannot be done to this model, or to clients with this loss.
    """
    loss, malice = loss or NextToken(), parse_text_malice(malicious)
    sent = add_to_language_model(copy.deepcopy(model), malicious, public_ids.shape[1])
    if malice.kind == "imprint":
        _set_imprint(sent, public_ids)
    else:
        _set_decepticons(sent, malice.number, public_ids, counted(loss, public_ids))
    _check_reached(sent, public_ids, loss)
    return sent


@torch.no_grad()
def _set_imprint(model: nn.Module, public_ids: torch.Tensor) -> None:
    """Every neuron measures a sentence's embeddings along one direction against its threshold.

    As `gradients.servers.imprint` does it to images, whose direction is the mean.

    Source: Fowl et al. 2022, section 3.1, https://arxiv.org/abs/2110.13057.
    """
    layer = next(m for m in model.modules() if isinstance(m, ImprintedEmbedding))
    first, _, second = layer.imprint
    assert isinstance(first, nn.Linear)
    assert isinstance(second, nn.Linear)
    rows = layer.embedding(public_ids.to(first.weight.device)).flatten(1).double()
    direction = _random(rows.shape[1], 1)
    direction = direction / (rows @ direction).std()
    thresholds = _thresholds(rows @ direction, first.out_features)
    first.weight.copy_(direction.expand_as(first.weight))
    first.bias.copy_(-thresholds)
    answer = float(rows.std()) * _random(rows.shape[1], 2)
    second.weight.copy_((answer / first.out_features)[:, None].expand_as(second.weight))
    second.bias.zero_()


@torch.no_grad()
def _set_decepticons(
    model: nn.Module, features: int, public_ids: torch.Tensor, words: torch.Tensor
) -> None:
    """The first attention names sentences, the feed-forward networks measure tokens.

    The last features of every hidden state are emptied. The first attention looks at the first
    tokens of the sentence only, and writes what it reads there into them; the others write
    nothing. Every feed-forward network measures what reaches it along a direction of its own
    against one threshold per neuron.

    Source: Fowl et al. 2022, section 3, https://arxiv.org/abs/2201.12675; there the first token
        alone names a sentence, and all networks measure along one direction and share its
        thresholds out.
    """
    blocks = transformer_blocks(model)
    width = blocks[0].first.weight.shape[1]
    if features > width // 2:
        raise InputError(
            f"--malicious decepticons:{features}: at most half of the model's {width} features can "
            "name a sentence"
        )
    _level(model, width, features)
    for number, block in enumerate(blocks):
        block.out.weight.zero_()
        block.out.bias.zero_()
        if number == 0:
            _name_sentences(model, block, features, public_ids, words)
    quiet = QUIET * _spread_of_embeddings(model, width, features)
    handles = [
        block.widened.register_forward_pre_hook(_Measuring(block, features, number, quiet, words))
        for number, block in enumerate(blocks)
    ]
    # One pass sets every network, before it runs itself.
    try:
        rows_at(model, blocks[-1].second_layer, public_ids)
    finally:
        for handle in handles:
            handle.remove()


def _level(model: nn.Module, width: int, features: int) -> None:
    """Norms without weights of their own, and embeddings that leave the last features empty."""
    for module in model.modules():
        if isinstance(module, nn.LayerNorm) and module.elementwise_affine:
            module.weight.fill_(1.0)
            if module.bias is not None:
                module.bias.zero_()
        elif isinstance(module, nn.Embedding) and module.embedding_dim == width:
            module.weight[:, -features:] = 0.0


def _name_sentences(
    model: nn.Module,
    block: Block,
    features: int,
    public_ids: torch.Tensor,
    words: torch.Tensor,
) -> None:
    """Attend to the first tokens from everywhere, one per head; write projections as the name.

    A head that does not see its token, under a causal mask or in a short sentence, attends to the
    first one. Heads whose position cannot be told from the others stay silent.
    """
    rows = rows_at(model, block.attended, public_ids)
    size = block.query.weight.shape[0] // block.heads
    most = min(block.heads if size > 1 else 1, NAMED, rows.shape[1])
    found = [_position(rows, words, 0)]
    while len(found) < most and (told := _told_apart(rows, words, len(found))) is not None:
        found.append(told)
    for matrix in (block.query, block.key, block.value):
        matrix.weight.zero_()
        matrix.bias.zero_()
    scale = _spread_of_embeddings(model, rows.shape[2], features) / len(found) ** 0.5
    first, margin = found[0]
    logits = FIRST / margin
    range_of_first = float((rows @ first).max() - (rows @ first).min())
    for number, (direction, margin) in enumerate(found):
        at = number * size
        own = logits if number == 0 else (FIRST + logits * range_of_first) / margin
        block.key.weight[at] = direction.to(block.key.weight)
        block.query.bias[at] = own * size**0.5
        if number:
            block.key.weight[at + 1] = first.to(block.key.weight)
            block.query.bias[at + 1] = logits * size**0.5
        here = rows[words[:, number], number]
        _write_name(block, slice(at, at + min(size, features)), features, here, scale)


def _write_name(block: Block, at: slice, features: int, rows: torch.Tensor, scale: float) -> None:
    """A projection of what a head attends to (N x width) into the last features."""
    rank = at.stop - at.start
    projection = _random((rank, rows.shape[1]), 3 + at.start)
    projection = projection / (rows @ projection.T).std().clamp_min(1e-12)
    block.value.weight[at] = projection.to(block.value.weight)
    block.value.bias[at] = -(rows.mean(0) @ projection.T).to(block.value.bias)
    spread = torch.linalg.qr(_random((features, rank), 4 + at.start))[0]
    block.out.weight[-features:, at] = scale * spread.to(block.out.weight)


def _spread_of_embeddings(model: nn.Module, width: int, features: int) -> float:
    """Standard deviation of the features of token embeddings that are not emptied."""
    found = [m for m in model.modules() if isinstance(m, nn.Embedding) and m.embedding_dim == width]
    most = max(found, key=lambda module: module.num_embeddings)
    return float(most.weight[:, :-features].std())


def _told_apart(
    rows: torch.Tensor, words: torch.Tensor, place: int
) -> tuple[torch.Tensor, float] | None:
    """What `_position` finds; None where there is no such direction."""
    try:
        return _position(rows, words, place)
    except InputError:
        return None


def _position(rows: torch.Tensor, words: torch.Tensor, place: int) -> tuple[torch.Tensor, float]:
    """A direction in which the rows (N x T x width) at one position lie above all others.

    Args:
        rows: Of sentences.
        words: N x T, which of them are no padding.
        place: The position.

    Returns:
        The direction, and by how much at least.

    Raises:
        InputError: There is none.
    """
    here = rows[words[:, place], place]
    elsewhere = words.clone()
    elsewhere[:, place] = False
    others = rows[elsewhere]
    if len(here) < 2 or len(others) < 2:
        raise InputError("--malicious decepticons: the server has too few sentences")
    spread = sum(torch.cov(part.T) for part in (here, others))
    assert isinstance(spread, torch.Tensor)
    spread.diagonal().add_(1e-2 * spread.diagonal().mean().clamp_min(1e-12))
    direction = torch.linalg.solve(spread, here.mean(0) - others.mean(0))
    margin = float((here @ direction).min() - (others @ direction).max())
    if not margin > 0:
        raise InputError(
            f"--malicious decepticons: the first attention cannot tell position {place} of a "
            "sentence from the others"
        )
    return direction, margin


@dataclass(frozen=True)
class _Measuring:
    """Lets every neuron of a feed-forward network measure tokens against its threshold.

    All neurons answer alike, in features that name no sentence: all have the same gradient per
    token. The measurement is steep, so that a smooth activation switches as a step does.

    Attributes:
        block: Whose network.
        features: That name a sentence.
        number: Of the block.
        quiet: What the network adds to the stream of hidden states, at most.
        words: N x T, which of the server's tokens are no padding.
    """

    block: Block
    features: int
    number: int
    quiet: float
    words: torch.Tensor

    @torch.no_grad()
    def __call__(self, module: nn.Module, given: tuple[torch.Tensor, ...]) -> None:
        """Set the network, from what reaches its first layer (N x T x width)."""
        rows = given[0].cpu()[self.words].double()
        width, bins = rows.shape[1], len(self.block.first.bias)
        direction = _random(width, 10 + self.number)
        direction = direction / (rows @ direction).std().clamp_min(1e-12)
        steep = SHARP * bins
        thresholds = _thresholds(rows @ direction, bins)
        _fill(self.block.first, steep * direction, -steep * thresholds)
        answer = _random(width, 1000 + self.number)
        answer[-self.features :] = 0
        answer *= self.quiet / (steep * bins)
        self.block.second.weight.copy_(answer[:, None].expand_as(self.block.second.weight))
        self.block.second.bias.zero_()


def _fill(matrix: Matrix, row: torch.Tensor, bias: torch.Tensor) -> None:
    matrix.weight.copy_(row.expand_as(matrix.weight))
    matrix.bias.copy_(bias)


def _thresholds(values: torch.Tensor, bins: int) -> torch.Tensor:
    """Quantiles, of which the first lies below everything that may come."""
    levels = torch.arange(bins, dtype=torch.float64) / bins
    found = spread_ties(values.quantile(levels.to(values)))
    found[0] = values.min() - MARGIN
    return found


def _random(shape: int | tuple[int, ...], seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def rows_at(model: nn.Module, module: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """What reaches a module of a model for sentences (N x T): N x T x width, in float64."""
    device = next(model.parameters()).device
    # Torch's own encoder would skip its modules where no gradient is asked for.
    quick = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad(), unchanged(model):
            (rows,) = inputs_of(in_mode(model, False), [module], ids.to(device))
    finally:
        torch.backends.mha.set_fastpath_enabled(quick)
    return rows.double().cpu()


def _check_reached(model: nn.Module, ids: torch.Tensor, loss: Loss) -> None:
    """Refuse a client whose loss says nothing about most tokens.

    Raises:
        InputError: Such as a classifier by its first token.
    """
    blocks = [m for m in model.modules() if isinstance(m, ImprintedEmbedding)]
    seen: list[torch.Tensor] = []
    module: nn.Module = blocks[0] if blocks else transformer_blocks(model)[0].widened
    handle = module.register_forward_hook(lambda m, given, out: seen.append(out))
    ids = ids[:4].to(next(model.parameters()).device)
    targets = ids if loss.targets is Targets.TOKENS else torch.zeros(len(ids), dtype=torch.long)
    try:
        with torch.enable_grad(), unchanged(model):
            value = loss(in_mode(model, False)(ids), targets.to(ids.device))
    finally:
        handle.remove()
    (slopes,) = torch.autograd.grad(value, seen[:1], allow_unused=True)
    words = counted(loss, ids)
    reached = 0.0 if slopes is None else float((slopes != 0).any(-1)[words].double().mean())
    if reached < 0.5:
        raise InputError(
            f"--malicious: the loss of {type(model).__name__} depends on {reached:.0%} of the "
            "tokens once attention is switched off, as that of a classifier by the first token does"
        )
