"""The attacks of `breaching` on sentences, beside ours: of a server that changes the model.

`breaching` is installed by whoever wants the comparison; none of its code is in this project.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from attack.reconstruction import Reconstruction
from benchmarks.fidelity.beside import PACKAGE, Metadata, as_exchanged, breaching
from benchmarks.fidelity.declare import Trial
from core.models.malicious import ImprintedEmbedding
from core.target import Target

# Networks as `breaching` calls them: by the attributes that tell them from others.
TRANSFORMER3, BERT = "transformer3", "bert-base-uncased"
# The number of the embedding's and of the last bias's gradient, where `breaching` looks for them.
PLACES = {TRANSFORMER3: (-3, -1), BERT: (0, -5)}


def placed(named: dict[str, torch.Tensor], name: str, embedding: str, bias: str) -> list[str]:
    """Names of gradients in an order in which `breaching` finds those of two layers.

    Args:
        named: Gradients by parameter.
        name: Of the network.
        embedding: Parameter of the embedding.
        bias: Of the last layer.
    """
    order = [each for each in named if each not in (embedding, bias)]
    for own, place in sorted(
        zip((embedding, bias), PLACES[name], strict=True), key=lambda p: -p[1]
    ):
        order.insert(place if place >= 0 else len(order) + 1 + place, own)
    return order


@dataclass(frozen=True)
class BreachingTextImprint:
    """The readout of an imprint block behind the embedding, of our server's block."""

    package: str = PACKAGE

    def __call__(self, target: Target, labels: torch.Tensor, trial: Trial) -> Reconstruction:
        """See `Beside`."""
        package, model = breaching(), target.build_model()
        model.name = TRANSFORMER3  # type: ignore[assignment]
        layer = next(m for m in model.modules() if isinstance(m, ImprintedEmbedding))
        names = placed(target.gradient, TRANSFORMER3, "encoder.embedding.weight", "decoder.bias")
        gradients = [target.gradient[name] for name in names]
        at = [names.index(f"encoder.imprint.0.{part}") for part in ("weight", "bias")]
        # Its blocks are in the order in which one neuron's sentences are among the next one's.
        order = target.state_dict["encoder.imprint.0.bias"].argsort()
        for place in at:
            gradients[place] = gradients[place][order]
        payload, shared = as_exchanged(target, model, None, trial.device)
        shared["gradients"] = gradients
        config = package.get_attack_config("imprint")
        setup = {"device": trial.device, "dtype": torch.float}
        attacker: Any = package.attacks.prepare_attack(model, nn.Identity(), config, setup)
        attacker.embeddings = [{"weight": layer.embedding.weight.detach()}]
        secrets = {
            "ImprintBlock": {
                "weight_idx": at[0],
                "bias_idx": at[1],
                "structure": "cumulative",
                "shape": (layer.length, layer.embedding.embedding_dim),
            }
        }
        found, _ = attacker.reconstruct([payload], [shared], secrets)
        return Reconstruction(found["data"].detach().cpu(), labels, float("nan"))


@dataclass(frozen=True)
class BreachingDecepticons:
    """Server and attack of `breaching`, from the parameters and the sentences that ours has.

    What the server does to the model is part of the attack, and its own.

    Attributes:
        network: `TRANSFORMER3` or `BERT`.
        features: That name a sentence.
        server: Further settings of the server, as in the published notebook.
        attack: Settings of the attack, likewise, in the words of Hydra.
    """

    network: str
    features: int
    server: tuple[tuple[str, float | bool], ...] = ()
    attack: tuple[str, ...] = ()
    package: str = PACKAGE

    def attacked(
        self, model: nn.Module, ids: torch.Tensor, public: torch.Tensor, trial: Trial
    ) -> Reconstruction:
        """Change the model, take the client's gradient and invert it.

        Args:
            model: With the parameters that our server begins with.
            ids: N x T, the client's sentences.
            public: Sentences of the server's own.
            trial: Its number is the seed.
        """
        package = breaching()
        servers, losses, preparation = (
            importlib.import_module(f"{package.__name__}.cases.{name}")
            for name in ("servers", "models.losses", "models.model_preparation")
        )
        case = package.get_case_config(
            "10_causal_lang_training", overrides=["server=malicious-transformer"]
        )
        tokens = next(m for m in model.modules() if isinstance(m, nn.Embedding)).num_embeddings
        if self.network == TRANSFORMER3:
            tokens = model.get_parameter("encoder.weight").shape[0]
        case.data.shape, case.data.vocab_size = [ids.shape[1]], tokens
        case.server.param_modification.v_length = self.features
        for key, value in self.server:
            case.server.param_modification[key] = value
        setup = {"device": trial.device, "dtype": torch.float}
        theirs = self._theirs(preparation, model, case.data)
        torch.manual_seed(trial.number)
        loss = losses.CausalLoss()
        given = [{"input_ids": part} for part in public.split(8)]
        server = servers.MaliciousTransformerServer(theirs, loss, case, setup, given)
        payload = server.distribute_payload()
        payload["metadata"] = Metadata(
            shape=[ids.shape[1]], modality="text", task="causal-lm", vocab_size=tokens
        )
        named = dict(theirs.named_parameters())
        gradients = torch.autograd.grad(
            loss(theirs(ids), ids), list(named.values()), materialize_grads=True
        )
        shared = {
            "gradients": list(gradients),
            "buffers": None,
            "metadata": {"num_data_points": len(ids), "labels": None, "local_hyperparams": None},
        }
        config = package.get_attack_config("decepticon", overrides=list(self.attack))
        attacker: Any = package.attacks.prepare_attack(theirs, loss, config, setup)
        with sdpa_kernel(SDPBackend.MATH):
            found, _ = attacker.reconstruct([payload], [shared], server.secrets)
        return Reconstruction(found["data"].detach().cpu(), ids, float("nan"))

    def _theirs(self, preparation: Any, model: nn.Module, data: Any) -> Any:
        """The same function as a model of `breaching`."""
        if self.network == BERT:
            theirs = preparation.HuggingFaceContainer(model)
        else:
            theirs = preparation._construct_text_model(TRANSFORMER3, data, pretrained=False)
            theirs.load_state_dict(model.state_dict(), strict=False)
        theirs.name = self.network
        return theirs.eval()
