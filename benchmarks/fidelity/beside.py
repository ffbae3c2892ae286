"""A second implementation of an attack, run on the same model, gradient and labels.

`breaching` (MIT, https://github.com/JonasGeiping/breaching) is installed by whoever wants the
comparison: `pip install breaching`. None of its code is in this project.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from attack.reconstruction import Reconstruction
from benchmarks.fidelity.declare import Trial
from core.errors import InputError
from core.losses import Targets
from core.target import Target

PACKAGE, TABLEAK = "breaching", "tableak"
# What shows that it is there; TabLeak's repository is a folder on the path and no package.
MODULES = {TABLEAK: "attacks.gradient_inversion_attack"}


class Beside(Protocol):
    """Another implementation of a row's attack."""

    @property
    def package(self) -> str:
        """Which has it."""

    def __call__(self, target: Target, labels: torch.Tensor, trial: Trial) -> Reconstruction:
        """Invert what was shared.

        Args:
            target: What was shared.
            labels: Of the images, for attacks that are given them.
            trial: Its number is the seed.
        """


def installed(package: str) -> bool:
    """Whether the package that a row compares with is there."""
    try:
        found = importlib.util.find_spec(MODULES.get(package, package)) if package else None
    except ImportError:
        return False
    return found is not None


def version(package: str) -> str:
    """The package with its version, as the record states it; of a repository its commit."""
    if package not in MODULES:
        return f"{package} {importlib.metadata.version(package)}"
    found = importlib.util.find_spec(MODULES[package])
    folder = Path(str(found.origin)).parent if found else Path()
    words = ["git", "-C", str(folder), "rev-parse", "--short", "HEAD"]
    try:
        said = subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        said = "of an unknown commit"
    return f"{package} {said}"


def breaching() -> ModuleType:
    """The package.

    Raises:
        InputError: It is absent.
    """
    try:
        return importlib.import_module(PACKAGE)
    except ImportError:
        raise InputError("the second implementation needs `pip install breaching`") from None


class Metadata(dict[str, object]):
    """What `breaching` knows of the data, by key and by attribute."""

    def __getattr__(self, name: str) -> object:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


def metadata(target: Target) -> Metadata:
    """A target's data in the words of `breaching`."""
    shape = list(target.data.shape)
    if target.loss.targets is Targets.TOKENS:
        return Metadata(
            shape=shape, modality="text", task="causal-lm", vocab_size=target.data.n_tokens
        )
    return Metadata(
        shape=shape,
        mean=target.data.mean,
        std=target.data.std,
        classes=target.data.n_classes,
        modality="vision",
        task="classification",
    )


@dataclass(frozen=True)
class Breaching:
    """An attack of `breaching` under its own configuration.

    Attributes:
        name: Of the configuration.
        overrides: Of it, in the words of Hydra.
        labelled: Whether the attack is given the labels.
    """

    name: str
    overrides: tuple[str, ...] = ()
    labelled: bool = True
    package: str = PACKAGE

    def __call__(self, target: Target, labels: torch.Tensor, trial: Trial) -> Reconstruction:
        """See `Beside`."""
        model = self.model_of(target)
        return _reconstructed(self, target, model, labels if self.labelled else None, trial)

    def model_of(self, target: Target) -> nn.Module:
        """The client's model, built so that the attack understands it."""
        return target.build_model()


class BreachingChain(Breaching):
    """An attack that reads the layers of a chain, whose last activation it wants behind Flatten."""

    def model_of(self, target: Target) -> nn.Module:
        """The same function: flattening and an activation change places."""
        layers = list(target.build_model().children())
        flat = next(i for i, layer in enumerate(layers) if isinstance(layer, nn.Flatten))
        layers[flat - 1], layers[flat] = layers[flat], layers[flat - 1]
        return nn.Sequential(*layers)


def _reconstructed(
    attack: Breaching,
    target: Target,
    model: nn.Module,
    labels: torch.Tensor | None,
    trial: Trial,
) -> Reconstruction:
    package = breaching()
    began = time.perf_counter()
    config = package.get_attack_config(attack.name, overrides=list(attack.overrides))
    is_text = target.loss.targets is Targets.TOKENS
    loss = _causal_loss(package) if is_text else nn.CrossEntropyLoss()
    setup = {"device": trial.device, "dtype": torch.float}
    attacker: Any = package.attacks.prepare_attack(model, loss, config, setup)
    torch.manual_seed(trial.number)
    payload, shared = as_exchanged(target, model, labels, trial.device)
    # Of torch's attention one way alone has a second derivative.
    with sdpa_kernel(SDPBackend.MATH):
        found, stats = attacker.reconstruct([payload], [shared], {}, dryrun=False)
    images = found["data"].detach().cpu()
    if not is_text:
        images = target.data.clamp(target.data.denormalize(images.float()))
    return Reconstruction(
        images=images,
        labels=torch.as_tensor(found["labels"]).cpu(),
        objective=float(stats.get("opt_value", float("nan"))),
        seconds=time.perf_counter() - began,
    )


def _causal_loss(package: ModuleType) -> nn.Module:
    losses = importlib.import_module(f"{package.__name__}.cases.models.losses")
    loss: nn.Module = losses.CausalLoss()
    return loss


def as_exchanged(
    target: Target, model: nn.Module, labels: torch.Tensor | None, device: torch.device
) -> tuple[dict[str, object], dict[str, object]]:
    """What the server of `breaching` sends and its user shares, of a model in eval mode."""
    payload = {
        "parameters": list(model.parameters()),
        "buffers": list(model.buffers()),
        "metadata": metadata(target),
    }
    shared: dict[str, object] = {
        "gradients": [gradient.to(device) for gradient in target.gradient.values()],
        "buffers": None,
        "metadata": {
            "num_data_points": target.batch_size,
            "labels": None if labels is None else labels.to(device),
            "local_hyperparams": None,
        },
    }
    return payload, shared


@dataclass(frozen=True)
class BreachingApril:
    """The closed form of APRIL in `breaching`, on a vision transformer of torchvision.

    It reads a model and gradients by the names and places of another library; they are given to it
    under these.
    """

    package: str = PACKAGE

    def __call__(self, target: Target, labels: torch.Tensor, trial: Trial) -> Reconstruction:
        """See `Beside`."""
        home = importlib.import_module(f"{breaching().__name__}.attacks.analytic_attack")
        model: Any = target.build_model()
        first = next(iter(model.encoder.layers.named_children()))[0]
        name = f"encoder.layers.{first}.self_attention.in_proj_weight"
        qkv = SimpleNamespace(weight=model.get_parameter(name))
        block = SimpleNamespace(attn=SimpleNamespace(qkv=qkv))
        renamed = SimpleNamespace(
            blocks=[block],
            pos_embed=model.encoder.pos_embedding,
            patch_embed=SimpleNamespace(proj=model.conv_proj),
        )
        positions = target.gradient["encoder.pos_embedding"]
        places = [positions, positions, positions, positions, target.gradient[name]]
        solved = home.AprilAttacker.closed_form_april(
            SimpleNamespace(model=renamed), {"gradients": places}
        )
        images = home.AprilAttacker.recover_patch(solved)[None]
        images = target.data.clamp(target.data.denormalize(images.float()))
        return Reconstruction(images, labels, float("nan"))


@dataclass(frozen=True)
class BreachingImprint:
    """The readout of an imprint block in `breaching`.

    Its blocks are in the order in which one neuron's images are among the next one's: rows of ours
    are given to it in that order.
    """

    package: str = PACKAGE

    def __call__(self, target: Target, labels: torch.Tensor, trial: Trial) -> Reconstruction:
        """See `Beside`."""
        package = breaching()
        model = target.build_model()
        names = list(target.gradient)
        weight, bias = names.index("imprint.1.weight"), names.index("imprint.1.bias")
        order = target.state_dict["imprint.1.bias"].argsort()
        payload, shared = as_exchanged(target, model, None, trial.device)
        gradients = list(target.gradient.values())
        gradients[weight], gradients[bias] = gradients[weight][order], gradients[bias][order]
        shared["gradients"] = gradients
        config = package.get_attack_config("imprint")
        setup = {"device": trial.device, "dtype": torch.float}
        attacker: Any = package.attacks.prepare_attack(model, nn.CrossEntropyLoss(), config, setup)
        secrets = {
            "ImprintBlock": {
                "weight_idx": weight,
                "bias_idx": bias,
                "structure": "cumulative",
                "shape": target.data.shape,
            }
        }
        found, _ = attacker.reconstruct([payload], [shared], secrets)
        images = target.data.denormalize(found["data"].detach().float().nan_to_num())
        return Reconstruction(target.data.clamp(images), labels, float("nan"))
