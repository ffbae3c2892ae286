"""Small transformers of published shapes, with random weights; they need `transformers`.

Functions without arguments are for the commands: `--model core.models.language:gpt2`.
"""

from __future__ import annotations

import torch
from torch import nn

from core.data.text import PAD
from core.errors import InputError

# What the vocabulary of `core.data.text` has at most.
VOCABULARY = 4096
# The classes of `core.data.text`.
CLASSES = 8
POSITIONS = 128


def causal_model(
    width: int, layers: int = 2, heads: int = 4, *, vocabulary: int = VOCABULARY, tied: bool = True
) -> nn.Module:
    """A language model in the shape of GPT-2, without dropout.

    Args:
        width: Of the embeddings and hidden states.
        layers: Transformer blocks.
        heads: Of every block's attention.
        vocabulary: Tokens.
        tied: Whether the last layer's weight is that of the embedding, as in GPT-2.

    Source: Radford et al., "Language Models are Unsupervised Multitask Learners", 2019.
    """
    try:
        from transformers import GPT2Config, GPT2LMHeadModel
    except ImportError:
        raise _absent() from None
    config = GPT2Config(
        vocab_size=vocabulary, n_positions=POSITIONS, n_embd=width, n_layer=layers, n_head=heads,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False,
        tie_word_embeddings=tied, bos_token_id=0, eos_token_id=0, attn_implementation="eager",
    )  # fmt: skip
    model: nn.Module = GPT2LMHeadModel(config)
    return model


def sentence_classifier(
    width: int,
    layers: int = 2,
    heads: int = 4,
    *,
    vocabulary: int = VOCABULARY,
    classes: int = CLASSES,
) -> nn.Module:
    """A classifier of sentences in the shape of BERT, without dropout.

    Args:
        width: Of the embeddings and hidden states.
        layers: Transformer blocks.
        heads: Of every block's attention.
        vocabulary: Tokens.
        classes: Outputs.

    Source: Devlin et al., BERT, NAACL 2019, https://arxiv.org/abs/1810.04805.
    """
    try:
        from transformers import BertConfig, BertForSequenceClassification
    except ImportError:
        raise _absent() from None
    config = BertConfig(
        vocab_size=vocabulary, hidden_size=width, num_hidden_layers=layers,
        num_attention_heads=heads, intermediate_size=4 * width, num_labels=classes,
        max_position_embeddings=POSITIONS, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0, attn_implementation="eager",
    )  # fmt: skip
    model: nn.Module = BertForSequenceClassification(config)
    return model


class Padded(nn.Module):
    """A model that sees no padding: its attention mask leaves out what fills up a sentence.

    Args:
        model: Takes `input_ids` and `attention_mask`, as those of `transformers` do.
        pad: The token id that fills up.
    """

    def __init__(self, model: nn.Module, pad: int = PAD) -> None:
        super().__init__()
        self.model, self.pad = model, pad

    def forward(self, ids: torch.Tensor) -> object:
        """The outputs for N x T token ids."""
        return self.model(input_ids=ids, attention_mask=(ids != self.pad).long())


class LowRank(nn.Module):
    """A linear layer that stays as it is, and a product of two small ones that learns beside it.

    Args:
        layer: Any module from width to outputs; its parameters are frozen.
        width: Of its inputs.
        outputs: Of its outputs.
        rank: Of the product.

    Source: Hu et al., LoRA, ICLR 2022, section 4.1, https://arxiv.org/abs/2106.09685; there the
        second matrix begins at zero, and is as it stands here after some steps.
    """

    def __init__(self, layer: nn.Module, width: int, outputs: int, rank: int) -> None:
        super().__init__()
        self.layer = layer.requires_grad_(False)
        self.down = nn.Linear(width, rank, bias=False)
        self.up = nn.Linear(rank, outputs, bias=False)
        nn.init.normal_(self.up.weight, std=0.02)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """N x T x width to N x T x outputs."""
        result: torch.Tensor = self.layer(inputs) + self.up(self.down(inputs))
        return result


def with_low_rank(model: nn.Module, rank: int) -> nn.Module:
    """A model in the shape of GPT-2 of which low-rank adapters alone are trained and shared.

    Args:
        model: Changed; every projection of its blocks gets an adapter.
        rank: Of the adapters.
    """
    model.requires_grad_(False)
    names = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    for name, layer in list(model.named_modules()):
        if name.endswith(names):
            width, outputs = layer.get_parameter("weight").shape
            parent, _, own = name.rpartition(".")
            setattr(model.get_submodule(parent), own, LowRank(layer, width, outputs, rank))
    return model


def gpt2() -> nn.Module:
    """Two layers of width 128, 1.0 million parameters."""
    return causal_model(128)


def gpt2_narrow() -> nn.Module:
    """Two layers of width 64."""
    return causal_model(64)


def gpt2_wide() -> nn.Module:
    """Two layers of width 256."""
    return causal_model(256)


def gpt2_lora() -> nn.Module:
    """Two layers of width 128, of which adapters of rank 64 are trained and shared."""
    return with_low_rank(causal_model(128), 64)


def bert() -> nn.Module:
    """Two layers of width 128 that tell eight classes."""
    return sentence_classifier(128)


def bert_wide() -> nn.Module:
    """Two layers of width 256 that tell eight classes."""
    return sentence_classifier(256)


def gpt2_padded() -> nn.Module:
    """`gpt2` for sentences of unequal length."""
    return Padded(gpt2())


def bert_padded() -> nn.Module:
    """`bert` for sentences of unequal length."""
    return Padded(bert())


def _absent() -> InputError:
    return InputError("language models need transformers: pip install 'gradinvbench[text]'")
