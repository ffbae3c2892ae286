"""Small transformers of published shapes, with random weights; they need `transformers`.

Functions without arguments are for the commands: `--model core.models.language:gpt2`.
"""

from __future__ import annotations

from torch import nn

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


def gpt2() -> nn.Module:
    """Two layers of width 128, 1.0 million parameters."""
    return causal_model(128)


def gpt2_narrow() -> nn.Module:
    """Two layers of width 64."""
    return causal_model(64)


def gpt2_wide() -> nn.Module:
    """Two layers of width 256."""
    return causal_model(256)


def bert() -> nn.Module:
    """Two layers of width 128 that tell eight classes."""
    return sentence_classifier(128)


def bert_wide() -> nn.Module:
    """Two layers of width 256 that tell eight classes."""
    return sentence_classifier(256)


def _absent() -> InputError:
    return InputError("language models need transformers: pip install 'gradinvbench[text]'")
