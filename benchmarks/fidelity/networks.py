"""Networks that rows attack and the project has not among its own, and their normalisations."""

from __future__ import annotations

import math

import torch
from torch import nn

from core.errors import InputError
from core.models.language import causal_model

# Of the packages that the values were published with.
CIFAR10_MEAN = (0.4914672374725342, 0.4822617471218109, 0.4467701315879822)
CIFAR10_STD = (0.24703224003314972, 0.24348513782024384, 0.26158785820007324)
# GPT-2's vocabulary.
GPT2_TOKENS = 50257


class Transformer3(nn.Module):
    """The language model of "A Field Guide to Federated Optimization", with learnt positions.

    Three layers of an encoder, width 96, 8 heads, 1536 hidden units; it is not causal, as in
    `breaching`, whose parameters have the same names.

    Args:
        n_tokens: Of the vocabulary.

    Source: Wang et al. 2021, https://arxiv.org/abs/2107.06917; `transformer3` of
        https://github.com/JonasGeiping/breaching.
    """

    width, positions = 96, 1024

    def __init__(self, n_tokens: int = GPT2_TOKENS) -> None:
        super().__init__()
        self.pos_encoder = nn.ModuleDict({"embedding": nn.Embedding(self.positions, self.width)})
        layer = nn.TransformerEncoderLayer(self.width, 8, 1536, 0.0, batch_first=True)
        self.transformer_encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
        self.encoder = nn.Embedding(n_tokens, self.width)
        self.decoder = nn.Linear(self.width, n_tokens)
        for weight in (self.encoder.weight, self.decoder.weight):
            nn.init.uniform_(weight, -0.1, 0.1)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """N x T token ids to N x T x tokens."""
        places = torch.arange(ids.shape[1], device=ids.device)
        embedded = self.encoder(ids) * math.sqrt(self.width)
        embedded = embedded + self.pos_encoder["embedding"](places)
        logits: torch.Tensor = self.decoder(self.transformer_encoder(embedded))
        return logits


def gpt2_base() -> nn.Module:
    """GPT-2 of twelve layers and width 768, on this project's vocabulary."""
    return causal_model(768, 12, 12)


def bert_base() -> nn.Module:
    """BERT base from its configuration, without dropout, with a head for every token."""
    try:
        from transformers import BertConfig, BertForMaskedLM
    except ImportError:
        raise InputError("needs transformers: pip install 'gradinvbench[text]'") from None
    config = BertConfig(
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, attn_implementation="eager"
    )
    model: nn.Module = BertForMaskedLM(config)
    return model


def lenet5(n_classes: int) -> nn.Module:
    """LeNet-5 for 32 px colour images, with ReLU and He's initialisation of the convolutions.

    Source: LeCun et al. 1998; as in https://github.com/BUAA-CST/iLRG, `models.py`.
    """
    first, second = nn.Conv2d(3, 6, 5), nn.Conv2d(6, 16, 5)
    model = nn.Sequential(
        first, nn.ReLU(), nn.MaxPool2d(2), second, nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, n_classes),
    )  # fmt: skip
    for layer in (first, second):
        nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    return model


def tableak_network(features: int, n_classes: int) -> nn.Module:
    """TabLeak's: two hidden ReLU layers of 100 neurons."""
    return nn.Sequential(
        nn.Linear(features, 100), nn.ReLU(), nn.Linear(100, 100), nn.ReLU(),
        nn.Linear(100, n_classes),
    )  # fmt: skip
